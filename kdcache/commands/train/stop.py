"""Ends a training before its last step: after a signal, or when patience has run out."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdcache.commands.interrupt import check


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """Raises KeyboardInterrupt at the next step or evaluation batch after a signal that a library
    swallowed.
    """

    def _check(self, *_: Any, **__: Any) -> None:
        check()

    on_step_begin = on_substep_end = on_step_end = on_prediction_step = on_evaluate = _check


class Patience(TrainerCallback):  # type: ignore[misc]
    """Stops after so many evaluations without a better one.

    It counts them in the run's own history, so a resumed run stops where the first sitting did,
    or would have with the patience that is asked for now.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._over = False  # before this sitting

    def _worse(self, state: TrainerState) -> int:
        """Evaluations since the best one."""
        best = state.best_global_step or 0
        return sum("eval_loss" in line and line["step"] > best for line in state.log_history)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take no step where patience ran out in an earlier sitting."""
        self._over = control.should_training_stop = self._worse(state) >= self._patience

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Evaluate and save nothing again where no step was taken."""
        if self._over:
            control.should_log = control.should_evaluate = control.should_save = False

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        """Look at the evaluation just logged, which is not yet compared with the best."""
        # A figure that is not defined is no better than any.
        value = metrics.get(str(args.metric_for_best_model), math.nan)
        sign = 1 if args.greater_is_better else -1
        best = -math.inf if state.best_metric is None else sign * state.best_metric
        if not sign * value > best and self._worse(state) >= self._patience:
            control.should_training_stop = True
