"""Callbacks of the HF Trainer: they write `metrics.jsonl`, report progress, and end a training
before its last step, after a signal or when patience has run out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformers import TrainerCallback, TrainerState
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    WandbCallback,
    get_available_reporting_integrations,
)

from kdcache.commands.interrupt import check
from kdcache.commands.run_folder import METRICS_FILE, TrainProgress, seconds_before
from kdcache.errors import EXTRAS, install_command
from kdcache.humanize import duration
from kdcache.student.checkpoints import better

_QUIET_SECONDS = 10.0


class ReportProgress(TrainerCallback):  # type: ignore[misc]
    """Reports everything logged to the caller."""

    def __init__(self, on_progress: Callable[[TrainProgress], None] | None) -> None:
        self._on_progress = on_progress
        self._begun, self._before = time.perf_counter(), 0.0

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any
    ) -> None:
        """Report losses or figures, but not the Trainer's own summary at the end."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        seconds = self._before + time.perf_counter() - self._begun
        self.report(
            TrainProgress(
                state.global_step, state.max_steps, float(state.epoch or 0.0), seconds, dict(logs)
            )
        )

    def report(self, progress: TrainProgress) -> None:
        """To the caller."""
        if self._on_progress is not None:
            self._on_progress(progress)


class MetricsCallback(ReportProgress):
    """Appends a line for everything logged as well."""

    def __init__(self, run: Path, on_progress: Callable[[TrainProgress], None] | None) -> None:
        super().__init__(on_progress)
        self._run = run

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Start the clock where the previous run of the command stopped it."""
        self._begun, self._before = time.perf_counter(), seconds_before(self._run)

    def report(self, progress: TrainProgress) -> None:
        """Write one line."""
        line = {"step": progress.step, **progress.logs, "seconds": round(progress.seconds, 3)}
        with (self._run / METRICS_FILE).open("a") as file:
            file.write(json.dumps(line) + "\n")
        super().report(progress)


class SlowSteps(TrainerCallback):  # type: ignore[misc]
    """Reports the steps themselves where nothing was logged for a while."""

    def __init__(self, report: Callable[[str], None], every: float = _QUIET_SECONDS) -> None:
        """Report at the first step, and then after `every` seconds without a log."""
        self._report, self._every = report, every
        self._told = self._begun = time.perf_counter()
        self._first = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Say how many steps there are."""
        self._told = self._begun = time.perf_counter()
        self._first = state.global_step
        self._report(f"{state.max_steps - self._first:,} steps to do")

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Report a step, with what one takes."""
        now = time.perf_counter()
        if now - self._told >= self._every:
            self._told = now
            seconds = (now - self._begun) / max(1, state.global_step - self._first)
            done = f"step {state.global_step:,} of {state.max_steps:,}"
            left = duration(seconds * (state.max_steps - state.global_step))
            self._report(f"{done}, {duration(seconds)} a step, {left} left")

    def on_log(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """A line was shown."""
        self._told = time.perf_counter()


def wrong_trackers(names: Sequence[str]) -> list[str]:
    """The problems of the requested trackers: a line each."""
    here, wrong = get_available_reporting_integrations(), []
    for name in names:
        if name in ("auto", "none", *here):
            continue
        if name in INTEGRATION_TO_CALLBACK:
            how = f" ({install_command(name)})" if name in EXTRAS else ""
            wrong.append(
                f"report_to is {name}, which is not installed. Install it{how} or leave it out."
            )
        else:
            known = ", ".join(["auto", "none", *sorted(INTEGRATION_TO_CALLBACK)])
            wrong.append(f"report_to is {name!r}, expected one of {known}.")
    return wrong


class PlainTensorBoard(TensorBoardCallback):  # type: ignore[misc]
    """HF's own callback, without a model: a student need not have an HF config."""

    def on_train_begin(self, *given: Any, **kwargs: Any) -> None:
        """Open the log."""
        kwargs.pop("model", None)
        super().on_train_begin(*given, **kwargs)


class OwnWandb(WandbCallback):  # type: ignore[misc]
    """HF's own callback, with a run of Weights & Biases for each training.

    HF leaves it open, and the next training of the process would continue it.
    """

    _ours: ClassVar[Any] = None  # the run open now, unless the caller made it

    def on_train_begin(self, *given: Any, **kwargs: Any) -> None:
        """Open a run, unless the caller has one open."""
        self._close()  # that of a training that failed
        theirs = self._wandb.run
        super().on_train_begin(*given, **kwargs)
        OwnWandb._ours = None if self._wandb.run is theirs else self._wandb.run

    def on_train_end(self, *given: Any, **kwargs: Any) -> None:
        """Close it."""
        super().on_train_end(*given, **kwargs)
        self._close()

    def _close(self) -> None:
        if OwnWandb._ours is not None and OwnWandb._ours is self._wandb.run:
            self._wandb.finish()
        OwnWandb._ours = None


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

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Take no step where patience ran out in an earlier sitting."""
        self._over = control.should_training_stop = self._worse(state) >= self._patience

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Evaluate and save nothing again where no step was taken."""
        if self._over:
            control.should_log = control.should_evaluate = control.should_save = False

    def on_evaluate(
        self, args: Any, state: TrainerState, control: Any, metrics: Any, **_: Any
    ) -> None:
        """Look at the evaluation just logged, which is not yet compared with the best."""
        if not better(metrics, args, state) and self._worse(state) >= self._patience:
            control.should_training_stop = True
