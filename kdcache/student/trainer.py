"""`DistillationTrainer`: the HF Trainer on a stream of cached targets.

The Trainer keeps its loop, optimizer, schedulers, precision, checkpoints and callbacks, but:

* batches come from a `TargetStream` as they are (accelerate would shard or gather them again);
* a loss is divided by the positions of the whole global batch, so that several workers or
  accumulated slices give the gradient of the one big batch;
* alpha and T are set at each step, hard and soft loss logged separately, and trackers record what
  is distilled, and how; an anchor's theta comes from the sums over all workers and slices;
* checkpoints hold the cursor and the identity of the caches;
* a stream is evaluated with losses and the task's figure, of all rows and of each named domain.

Guarantee: a run that was stopped and resumed takes the same steps as one that was not; on one CPU,
to the bit.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import TrainerControl

from kdcache.errors import UsageError, doing
from kdcache.lora import is_adapted
from kdcache.loss import Anchor
from kdcache.stream import Batch, Cursor, TargetStream
from kdcache.student.checkpoints import (
    CheckpointingTrainer,
    check_identity,
    last_checkpoint,
    read_state,
)
from kdcache.student.figures import Totals, label_shares, mean_parts, parts_of, soft_name
from kdcache.student.padding import without_mask
from kdcache.student.precision import shard_over_ranks
from kdcache.student.stream_loader import Copies, CursorCallback, StreamLoader, host_positions
from kdcache.student.wrapper import DistilledStudent


def recorded(
    stream: TargetStream, model: nn.Module, alpha: Callable[[int], float] | None, steps: int
) -> dict[str, Any]:
    """The caches, their order and the loss of a run.

    Args:
        model: its alpha, divergence and tail are recorded if it has them.
        alpha: weight of the hard loss at each step; None for the model's.

    Returns:
        Values by name, flat as MLflow needs them. A schedule is `start:end`.
    """
    spec = stream.caches[0].spec
    facts = {
        "cache_digests": [cache.digest for cache in stream.caches],
        "codec": spec.codec,
        "cache_temperatures": list(spec.temperatures),
        "temperature": _first_and_last(stream.temperature, steps),
        "alpha": _first_and_last(alpha or getattr(model, "alpha", None), steps),
        "divergence": getattr(model, "divergence", None),
        "tail": getattr(model, "tail", None),
    }
    if facts["divergence"] == "huber":
        facts["huber_delta"] = getattr(model, "huber_delta", None)
    anchor = getattr(model, "anchor", None)
    if spec.codec.startswith("anchored") and anchor is not None:
        facts["anchor"] = "estimated" if anchor.estimated else float(anchor.theta)
    positions, weights = str(getattr(model, "positions", None) or ""), stream.weights.shown()
    optional = {"positions": positions, "cache_weights": weights}
    facts |= {**stream.reading.settings, **{k: v for k, v in optional.items() if v}}
    facts |= {name: getattr(stream, name) for name in ("batch_size", "seed", "streams", "group")}
    return {f"kdcache_{name}": value for name, value in facts.items()}


def _first_and_last(value: Any, steps: int) -> Any:
    if not callable(value):
        return value
    first, last = value(0), value(steps - 1)
    return first if first == last else f"{first:g}:{last:g}"


WEIGHTS_FILE = "model.safetensors"


class DistillationTrainer(CheckpointingTrainer):
    """HF Trainer of a `DistilledStudent`, which returns the loss in its forward.

    With a `TargetStream` as `train_dataset`, the trainer gives the stream its rank, world size and
    accumulation; `per_device_train_batch_size` has no part, the stream's `batch_size` is that of a
    step. With any other dataset (a `TargetDataset` with a `Collator`) it is the plain Trainer.
    """

    control: TrainerControl
    is_fsdp_enabled: bool

    def __init__(
        self,
        *args: Any,
        alpha: Callable[[int], float] | None = None,
        identity: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Set up.

        Args:
            args: as for the HF Trainer, like `kwargs`.
            alpha: weight of the hard loss at each step; None leaves the model's.
            identity: facts that a resumed run must share with the one that made the checkpoint.
            kwargs: see `args`.
        """
        super().__init__(*args, **kwargs)
        self.add_callback(CursorCallback(self))
        # The loss is divided by the count of the whole step: the Trainer must not divide it again.
        if self.streams:
            self.model_accepts_loss_kwargs = True
        self.alpha = alpha
        self.identity = dict(identity or {})
        # Sums over steps: hard and soft loss, the share of labels in what they are a mean over, KL,
        # and the share of labels without a soft target.
        self._parts = torch.zeros(5, dtype=torch.float64, device=self.args.device)
        self._parts_steps = 0
        self._window: dict[str, Any] = {}
        self._soft_name = ""
        self._knows_kl = False
        self._last: dict[str, float] = {}
        self._loader: StreamLoader | None = None

    @property
    def streams(self) -> bool:
        """Whether the training set is a `TargetStream`."""
        return isinstance(self.train_dataset, TargetStream)

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer, but FSDP also works on a CPU, and the loss stays float32 under it."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is not None:
            shard_over_ranks(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    # Data

    def get_train_dataloader(self) -> Any:
        """The stream itself, one epoch an iteration; other datasets as the Trainer does."""
        if not self.streams:
            return super().get_train_dataloader()
        stream = self._set_ranks(self.train_dataset, self.args.gradient_accumulation_steps)
        self._loader = StreamLoader(stream, self.total_steps(stream))
        return self._loader

    def total_steps(self, stream: TargetStream) -> int:
        """Steps of the whole run."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        return math.ceil(float(self.args.num_train_epochs) * stream.steps)

    def _set_ranks(self, stream: TargetStream, accumulation: int) -> TargetStream:
        stream.rank, stream.world_size = self.args.process_index, self.args.world_size
        stream.accumulation = accumulation
        return stream

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """The slices of one step, and the count its loss is divided by."""
        if not self.streams or self.control.should_training_stop:
            samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
            return samples, count
        slices = [b for b in (next(epoch_iterator, None) for _ in range(num_batches)) if b]
        return slices, slices[0]["count"] if slices else None

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if isinstance(self.model, DistilledStudent):
            inputs = without_mask(self.model, inputs)
            labels = inputs.get("labels") if self.args.device.type == "cuda" else None
            at = None if labels is None else host_positions(labels, self.model.task)
            inputs = inputs if at is None else {**inputs, "label_positions": at}
        return self._copies(inputs)

    @cached_property
    def _copies(self) -> Copies:
        return Copies(self.args.device)

    # Training

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train; with a stream, resuming begins at the cursor without reading what was seen.

        Without a checkpoint training begins at the stream's first row, wherever it stands.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the last one of the run.
            args: as for the HF Trainer, like `kwargs`.
            kwargs: see `args`.

        Raises:
            UsageError: the checkpoint is of other caches or another identity; or there is none, and
                the stream was set to begin elsewhere.
        """
        if not self.streams:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        self.args.ignore_data_skip = True  # the cursor states where to resume
        self.train_dataset.left_out = np.zeros(2, np.int64)
        if resume_from_checkpoint is True:
            found = last_checkpoint(Path(self.args.output_dir))
            resume_from_checkpoint = str(found) if found else None
        if resume_from_checkpoint:
            state = read_state(Path(str(resume_from_checkpoint)), contents=True)
            self.train_dataset.load_state_dict(state["cursor"])
            check_identity(state, self._identity(), str(resume_from_checkpoint))
            self._window = state.get("window", {})
            anchor = state.get("anchor")
        else:
            anchor = Anchor().state_dict()
            if self.train_dataset.start != Cursor():
                raise UsageError(
                    f"the stream begins at {self.train_dataset.start.to_dict()}, and train() at "
                    "its first row. Make the stream without a cursor, or resume from a checkpoint."
                )
            self.train_dataset.cursor, self._window = Cursor(), {}
        # Every tracker records the arguments as this gives them.
        arguments = self.args.to_dict()
        self.args.to_dict = lambda: {**arguments, **self.run_facts()}
        if isinstance(self.model, DistilledStudent) and anchor is not None:
            self.model.anchor.load_state_dict(anchor)
        try:
            return super().train(resume_from_checkpoint or None, *args, **kwargs)
        finally:
            del self.args.to_dict
            if self._loader is not None:
                self._loader.close()

    def rows_of(self, step: int) -> str:
        """Which rows of its epoch a step was of, in the order of the stream."""
        if not self.streams:
            return ""
        stream = self.train_dataset
        epoch, first = divmod(step - 1, stream.steps)
        first *= stream.batch_size
        last = min(first + stream.batch_size, stream.rows)
        return f" (rows {first + 1:,} to {last:,} of epoch {epoch + 1})"

    def run_facts(self) -> dict[str, Any]:
        """What trackers record of the distillation, by name."""
        stream = self._set_ranks(self.train_dataset, self.args.gradient_accumulation_steps)
        return recorded(stream, self.model, self.alpha, self.total_steps(stream))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The model's loss of one slice; times the ranks, over which gradients are averaged."""
        if not self.streams:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.alpha is not None:
            inputs = {**inputs, "alpha": self.alpha(self.state.global_step)}
            self._last["alpha"] = inputs["alpha"]
        if "targets" in inputs:
            self._last["temperature"] = inputs["targets"].temperature
            self._soft_name = soft_name(inputs["targets"])
        with doing(f"running the student at step {self.state.global_step + 1}"):
            outputs = model(**inputs)
        if model.training:
            self._parts[:2] += parts_of(outputs.hard_loss, outputs.soft_loss)
            self._parts[[2, 4]] += label_shares(self.train_dataset.task, inputs)
            self._knows_kl = outputs.kl is not None
            if outputs.kl is not None:
                self._parts[3] += outputs.kl.detach()
        loss = outputs.loss * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer; a line of the training loss also has its two parts, alpha, T and theta.

        `hard_loss` is the mean over what has a label, and missing where nothing has; each step
        counts alike. The soft part, a mean over all positions with its T^2, is `soft_loss`; or
        `soft_cross_entropy` for sampled targets: the divergence plus the teacher's entropy. Where
        the caches keep that, T being 1, the divergence is `kl`.
        """
        if self.streams and "loss" in logs and self._parts_steps:
            parts = self.accelerator.reduce(self._parts.clone(), "sum")
            logs |= mean_parts(parts, self._parts_steps, self._soft_name, self._knows_kl)
            logs.update(self._last)
            if self._anchored:
                logs["anchor"] = float(self.model.anchor.theta)
            self._parts.zero_()
            self._parts_steps = 0
        super().log(logs, *args, **kwargs)

    # Evaluation

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Losses, and the figure of a task, on a `TargetStream`; else as the Trainer does.

        Those of a domain follow as `eval_loss/NAME`, and so on; batches have rows of one domain.
        """
        stream = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(stream, TargetStream):
            metrics: dict[str, float] = super().evaluate(
                eval_dataset, ignore_keys, metric_key_prefix
            )
            return metrics
        begun = time.perf_counter()
        found = self._evaluate_stream(stream)
        found["runtime"] = time.perf_counter() - begun
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    @torch.no_grad()
    def _evaluate_stream(self, stream: TargetStream) -> dict[str, float]:
        parts = self._set_ranks(stream, 1).by_domain()
        was_training = self.model.training
        self.model.eval()
        totals = Totals.zeros(len(parts), self.args.device)
        soft_known = ""
        for part, own in zip(parts.values(), totals, strict=True):
            soft_known = self._add_up(part, Totals(own)) or soft_known
        self.model.train(was_training)
        reduced = self.accelerator.reduce(totals, "sum").cpu()
        alpha = float(self._final_alpha()) if soft_known else 1.0
        found = Totals(reduced.sum(0)).figures(stream, alpha, soft_known)
        for domain, own in zip(parts, reduced, strict=True):
            if domain is not None:
                figures = Totals(own).figures(stream, alpha, soft_known)
                found |= {f"{name}/{domain}": value for name, value in figures.items()}
        return found

    def _add_up(self, stream: TargetStream, totals: Totals) -> str:
        """Add a stream's rows; returns the soft loss's name."""
        soft_known = ""
        for batch in stream:
            count, text = float(batch["count"]), batch.pop("text", None)
            inputs = self._prepare_inputs(batch)
            outputs = self.model(**inputs, return_logprobs=text is not None)
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )
            if not math.isfinite(count):
                continue  # a rank without rows only keeps the others company
            soft_known = soft_name(inputs["targets"]) if "targets" in inputs else ""
            totals.add(stream, inputs, outputs, count, text)
        return soft_known

    def _final_alpha(self) -> float | Tensor:
        if self.alpha is None:
            return getattr(self.model, "alpha", 0.5)
        # At the end of its schedule, so that evaluations of one run compare.
        return self.alpha(self.total_steps(self.train_dataset) - 1)

    # Checkpoints: safetensors of the whole wrapper, tied weights stored once; with an adapter only
    # of what is trained

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self._adapted:
            from kdcache.student.adapter import trained_weights

            own = {n: p.detach().contiguous() for n, p in trained_weights(self.model).items()}
            safetensors.torch.save_file(own, str(folder / WEIGHTS_FILE))
        elif state_dict is None:
            safetensors.torch.save_model(self.model, str(folder / WEIGHTS_FILE))
        else:  # gathered from shards: whole tensors on the CPU
            whole = {k: v.detach().clone().contiguous() for k, v in state_dict.items()}
            safetensors.torch.save_file(
                whole, str(folder / WEIGHTS_FILE), metadata={"format": "pt"}
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint, WEIGHTS_FILE)
        if self.is_fsdp_enabled or not path.is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self._load_weights(path)

    def _load_weights(self, path: Path) -> None:
        if not self._adapted:
            safetensors.torch.load_model(self.model, str(path))
            return
        from kdcache.student.adapter import trained_weights

        found = safetensors.torch.load_file(path)
        lost = trained_weights(self.model).keys() - found.keys()
        try:
            unknown = self.model.load_state_dict(found, strict=False).unexpected_keys
        except RuntimeError as error:  # other shapes
            raise UsageError(f"{path} is of another student: {error}") from error
        if lost or unknown:
            raise UsageError(f"{path} is of another student: {min([*lost, *unknown])}.")

    @property
    def _adapted(self) -> bool:
        return isinstance(self.model, DistilledStudent) and is_adapted(self.model.student)

    def _load_best_model(self) -> None:
        self.bring_checkpoint(int(self.state.best_global_step))
        if self.is_fsdp_enabled:
            super()._load_best_model()
            return
        self._load_weights(Path(self.state.best_model_checkpoint, WEIGHTS_FILE))

    def _identity(self) -> dict[str, Any]:
        stream = self.train_dataset
        caches = [cache.digest for cache in stream.caches]
        order = {n: getattr(stream, n) for n in ("batch_size", "seed", "streams", "group")}
        weights = stream.weights.shown() or [1.0] * len(caches)
        facts = {**order, "weights": weights, **self.identity, "caches": caches}
        if stream.reading.identity:
            facts["cross"] = stream.reading.identity
        return dict(json.loads(json.dumps(facts)))

    def checkpoint_facts(self) -> dict[str, Any]:
        """Cursor and identity of the run."""
        if not self.streams:
            return {}
        facts = {"cursor": self.train_dataset.state_dict(), "identity": self._identity()}
        theta = {"anchor": self.model.anchor.state_dict()} if self._anchored else {}
        return {**facts, **theta, "window": self._window}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.streams:
            self._window = self._keep_window()
        super()._save_checkpoint(model, trial)

    @property
    def _anchored(self) -> bool:
        """Whether targets have been anchored."""
        return isinstance(self.model, DistilledStudent) and self.model.anchor.met

    def end_anchors_step(self) -> None:
        """theta of the next step, the same on every rank."""
        if self._anchored:
            self.model.anchor.update(lambda sums: self.accelerator.reduce(sums, "sum"))

    # The window of the next logged loss: the steps since the last one, over all sittings

    def _keep_window(self) -> dict[str, Any]:
        reduce = self.accelerator.reduce
        return {
            "steps": self._parts_steps,
            "loss": reduce(self._tr_loss.clone(), "mean").item(),
            "sums": reduce(self._parts.clone(), "sum").tolist(),
            "left_out": self.left_out().tolist(),
        }

    def left_out(self) -> np.ndarray:
        """`TargetStream.left_out` of all workers, over all sittings."""
        mine = torch.from_numpy(self.train_dataset.left_out).to(self.args.device)
        return np.asarray(self.accelerator.reduce(mine, "sum").cpu())

    def begin_window(self) -> None:
        """Go on with the window that the checkpoint was taken in."""
        self._parts.zero_()
        self._parts_steps = self._window.get("steps", 0)
        self._globalstep_last_logged -= self._parts_steps
        if self.is_world_process_zero():
            self.train_dataset.left_out = np.array(self._window.get("left_out", [0, 0]))
        if self._parts_steps:
            self._tr_loss += self._window[
                "loss"
            ]  # every rank has the mean; the mean of these is the same
            if self.is_world_process_zero():
                sums = self._parts.new_tensor(self._window["sums"])
                self._parts[: len(sums)] += sums  # earlier versions summed less
