"""The distillation loss inside a Trainer that prepares, orders and collates its rows by itself.

`CachedTrainer` is a Hugging Face Trainer, and goes before a subclass of it as a base class. While
its loader is made, its collator is wrapped: targets are looked up where the batch is made, in the
loader's own processes, and travel with it. The loss is that of `DistilledStudent`, inside the
model's forward, which is what DDP and autocast wrap. It is divided by the labels of the whole step,
over all workers and accumulated batches, as `kdcache train` does. Evaluation keeps the trainer's
own loss.

Guarantee: the gradient of a step is that of `kdcache train` on the same rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from kdcache.errors import UsageError
from kdcache.stream.lookup import Found, TargetLookup
from kdcache.student import DistilledStudent
from kdcache.student.figures import parts_of, soft_name
from kdcache.student.precision import use_one_gpu
from kdcache.tasks import CAUSAL_LM

_KEY = "kdcache"


@dataclass(frozen=True)
class Distillation:
    """Which caches, and which loss.

    Attributes:
        cache: caches by URL; of several the first that has a row answers.
        temperature: of the targets.
        alpha: weight of the hard loss, 0 to 1.
        divergence: see `kdcache.loss.distillation_loss`; None is the first that language models
            have.
        tail: for top-k targets, "bucket" or "renormalize".
        on_miss: "hard" trains rows that no cache has on their hard labels alone.
    """

    cache: str | Sequence[str]
    temperature: float = 1.0
    alpha: float = 0.5
    divergence: str | None = None
    tail: str = "bucket"
    on_miss: Literal["error", "hard"] = "error"

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> Distillation:
        """From values by name, those of text too.

        Args:
            values: some of the attributes.
            where: where a user wrote them, for messages.

        Raises:
            UsageError: an unknown name, no cache, or a value that can't be.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise UsageError(f"{where}: unknown {unknown[0]!r}, expected {', '.join(known)}.")
        if not values.get("cache"):
            raise UsageError(f"{where}: no cache is named. Give cache, the folder of a build.")
        found = dict(values)
        try:
            found |= {n: float(values[n]) for n in ("temperature", "alpha") if n in values}
        except (TypeError, ValueError) as error:
            raise UsageError(f"{where}: {error}; expected a number.") from None
        return cls(**found)

    def lookup(self) -> TargetLookup:
        """Where targets are found."""
        return TargetLookup(self.cache, temperature=self.temperature, on_miss=self.on_miss)


class CachedTrainer(Trainer):  # type: ignore[misc]
    """The Hugging Face Trainer, or a subclass of it that comes after this one, on soft targets.

    For causal language models.

    Logged with the loss: `hard_loss`, `soft_loss` (`soft_cross_entropy` for sampled targets) and,
    where rows were missed, `missed`, their share. A checkpoint keeps the digests of the caches, and
    an anchor's theta; a run that resumes with other caches is refused.
    """

    data_collator: Any
    distillation: Distillation | None = None

    def __init__(self, *args: Any, distillation: Distillation | None = None, **kwargs: Any) -> None:
        """Make the trainer; without a `distillation` it stays as it is.

        Raises:
            UsageError: caches or loss can't be used, or the trainer divides rows over workers.
        """
        settings = distillation or self.distillation
        self._lookup = None if settings is None else settings.lookup()  # before a model is loaded
        super().__init__(*args, **kwargs)
        if settings is None or self._lookup is None:
            return
        use_one_gpu(self.args, "torchrun trains on all of them.")
        across = getattr(self.accelerator, "parallelism_config", None)
        if across is not None and (across.cp_enabled or across.sp_enabled or across.tp_enabled):
            raise UsageError(
                "targets are found by whole rows, and context, sequence and tensor parallelism "
                "divide them over workers. Use data parallelism."
            )
        vocab_size = self._lookup.caches[0].spec.vocab_size
        self._student = student_of(self.model, settings, vocab_size)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the labels of the whole step
        self.loss_is_scaled_for_ga = True
        self._sums = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        self._steps, self._soft_name = 0, ""
        self.add_callback(_EndOfStep(self, [cache.digest for cache in self._lookup.caches]))

    def get_train_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; its batches have their targets."""
        if self._lookup is None:
            return super().get_train_dataloader(*args, **kwargs)
        own, self.data_collator = self.data_collator, _Collator(self.data_collator, self._lookup)
        try:
            return super().get_train_dataloader(*args, **kwargs)
        finally:
            self.data_collator = own

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of a step, and how many labels they have over all workers."""
        samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if any(_KEY in batch for batch in samples):
            count = torch.tensor(sum(b[_KEY].positions for b in samples), device=self.args.device)
            count = self.accelerator.reduce(count, "sum").clamp_min(1)
        return samples, count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a batch; times the workers, over which gradients are averaged."""
        found: Found | None = inputs.get(_KEY)
        if found is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        own = {name: v for name, v in inputs.items() if name not in (_KEY, "labels")}
        outputs = model(**own, **{_KEY: (found.to(self.args.device), num_items_in_batch)})
        rows = self._sums.new_tensor([found.missed, found.rows])
        self._sums += torch.cat([parts_of(outputs.hard_loss, outputs.soft_loss), rows])
        self._soft_name = soft_name(found.targets)
        loss = outputs.loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the trainer; a line of the training loss has its parts as well."""
        if self._lookup is not None and "loss" in logs and self._steps:
            sums = self.accelerator.reduce(self._sums.clone(), "sum").tolist()
            logs |= {"hard_loss": sums[0] / self._steps, self._soft_name: sums[1] / self._steps}
            if sums[2]:
                logs["missed"] = sums[2] / sums[3]
            self._sums.zero_()
            self._steps = 0
        super().log(logs, *args, **kwargs)


def student_of(model: nn.Module, settings: Distillation, vocab_size: int) -> DistilledStudent:
    """Let a model's forward return the distillation loss of a batch that has targets.

    Args:
        model: a causal language model, with adapters or without; its forward is replaced.
        settings: of the loss.
        vocab_size: of the caches.
    """
    loss = {name: getattr(settings, name) for name in ("alpha", "divergence", "tail")}
    student = DistilledStudent(model, CAUSAL_LM, **loss, vocab_size=vocab_size)
    student.checks_padding = False  # the batches are the trainer's
    forward: Callable[..., Any] = model.forward

    @functools.wraps(forward)
    def distilled(*args: Any, **inputs: Any) -> Any:
        batch: tuple[Found, Tensor] | None = inputs.pop(_KEY, None)
        if batch is None:
            return forward(*args, **inputs)
        found, count = batch
        return student(found.labels, found.targets, count=count, hard_labels=found.hard, **inputs)

    model.forward = distilled
    return student


class _Collator:
    """A collator whose batches have their targets."""

    def __init__(self, collator: Any, lookup: TargetLookup) -> None:
        self._collator, self._lookup = collator, lookup

    def __call__(self, examples: Any) -> dict[str, Any]:
        batch = self._collator(examples)
        ids = batch["input_ids"]
        beside = [batch.get(name) for name in ("position_ids", "attention_mask")]
        flat = [x if x is not None and x.shape == ids.shape else None for x in beside]
        return {**batch, _KEY: self._lookup.find(ids, batch["labels"], *flat)}


class _EndOfStep(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Ends an anchor's step, and keeps in checkpoints what a resumed run needs."""

    def __init__(self, trainer: CachedTrainer, caches: list[str]) -> None:
        self._trainer, self._caches = trainer, caches

    def state(self) -> dict[str, Any]:
        """See `transformers.trainer_callback.ExportableState`."""
        anchor = self._trainer._student.anchor.state_dict()
        return {"args": {}, "attributes": {"anchor": anchor, "caches": self._caches}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go on from a checkpoint."""
        kept = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and kept is not None:
            if kept["attributes"]["caches"] != self._caches:
                raise UsageError(
                    "the checkpoint was trained on other caches. Name the same ones, or begin anew."
                )
            self._trainer._student.anchor.load_state_dict(kept["attributes"]["anchor"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the step; theta of the next one, the same on every worker."""
        self._trainer._steps += 1
        reduce = self._trainer.accelerator.reduce
        self._trainer._student.anchor.update(lambda sums: reduce(sums, "sum"))
