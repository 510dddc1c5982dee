"""Targets at one temperature as tensors: what a codec decodes, a batch carries and a loss reads.

They carry what a loss must not guess: the temperature of their numbers, and whether sparse weights
are probabilities (top-k) or an unbiased sample.

accelerate, the HF Trainer and PyTorch's `DataLoader` look for `to` and `pin_memory`. Targets are
not a pytree node: FSDP would round their numbers to the 16 bits of its parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.targets.output_layer import OutputLayer

Self = TypeVar("Self", bound="_Positions")

_OF_ALL = ("exact", "layer")  # attributes that are not a position's own


class _Positions:
    """The common part of all kinds. Tensors have a row for each position."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    temperature: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UsageError(f"temperature is {self.temperature:g}; it must be above 0.")

    def __len__(self) -> int:
        """Number of positions."""
        return len(next(iter(self._tensors().values())))

    def __getitem__(self: Self, positions: slice | Tensor) -> Self:
        """Some positions: those of a slice as views, those of an index or a mask as copies."""
        return self._map(lambda tensor: tensor[positions])

    def to(self: Self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        """Copy to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self: Self) -> Self:
        """Copy to page-locked memory."""
        return self._map(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Memory of these is not used again before the work that this stream has now is done."""
        for tensor in self._tensors().values():
            tensor.record_stream(stream)

    @classmethod
    def concat(cls: type[Self], parts: Sequence[Self]) -> Self:
        """Join positions; narrower sparse targets are filled up with unused slots.

        Raises:
            ValueError: no part, or parts of different kinds or temperatures.
        """
        tensors = [part._tensors() for part in parts]
        kinds = {(type(p), p.temperature, *(getattr(p, n, None) for n in _OF_ALL)) for p in parts}
        if len(kinds) != 1:
            raise ValueError("targets to be joined must be of one kind and temperature")
        joined = {name: _cat([part[name] for part in tensors]) for name in tensors[0]}
        return dataclasses.replace(parts[0], **joined)

    def _tensors(self) -> dict[str, Tensor]:
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in values if isinstance(value, Tensor)}

    def _map(self: Self, change: Callable[[Tensor], Tensor]) -> Self:
        changed = {name: change(tensor) for name, tensor in self._tensors().items()}
        return dataclasses.replace(self, **changed)


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    if tensors[0].ndim == 1:
        return torch.cat(list(tensors))
    width = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([F.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])


@dataclass(frozen=True, eq=False)
class DenseTargets(_Positions):
    """All logits of each position.

    Attributes:
        logits: float32 [positions, vocabulary], as the teacher gave them: not divided by the
            temperature, not normalised.
        temperature: T at which a loss compares them.
    """

    logits: Tensor
    temperature: float

    exact: ClassVar[bool] = True


@dataclass(frozen=True, eq=False)
class HiddenTargets(_Positions):
    """What the logits of each position are made of.

    Attributes:
        stored: [positions, D], the output layer's input: of any float dtype, or uint8 levels.
        layer: the teacher's output layer, the same object for all positions of a run.
        temperature: T at which a loss compares the logits.
        steps: uint8 [positions, blocks], of levels; None of floats.
    """

    stored: Tensor
    layer: OutputLayer
    temperature: float
    steps: Tensor | None = None

    exact: ClassVar[bool] = True

    @property
    def states(self) -> Tensor:
        """The output layer's input as floats; of levels they are made anew, a few at a time."""
        if self.steps is None:
            return self.stored
        return self.layer.from_levels(self.stored, self.steps)

    def dense(self, dtype: torch.dtype = torch.float32, ids: slice = slice(None)) -> DenseTargets:
        """The logits of some ids (default: of all), rebuilt at this precision: V numbers a
        position, so of a few at a time.
        """
        return DenseTargets(self.layer.logits(self.states.to(dtype), ids), self.temperature)


@dataclass(frozen=True, eq=False)
class SparseTargets(_Positions):
    """A few weighted ids of each position.

    Attributes:
        ids: int64 [positions, K]; 0 in unused slots.
        weights: float32 [positions, K]; 0 in unused slots.
        tail: float32 [positions], the teacher's mass outside `ids`: the tail of top-k, 0 for
            samples (their weights stand for the whole distribution).
        exact: True where `weights` are the teacher's probabilities of distinct ids (top-k); False
            where they are an unbiased sample, right on average only.
        temperature: T of the distribution that the weights are of.
    """

    ids: Tensor
    weights: Tensor
    tail: Tensor
    exact: bool
    temperature: float


@dataclass(frozen=True, eq=False)
class AnchoredTargets(SparseTargets):
    """A sample with noise that a student can take off with its own distribution; see
    `kdcache.loss.anchor`.

    Attributes:
        inverse: float32 [positions, K], inverse inclusion probability of the ids that were drawn,
            right on average; 0 in slots of the head and in unused ones.
        heads: int64 [positions], how many slots, the first ones, are ids that were kept for
            certain. Their weights may be 0.
    """

    inverse: Tensor
    heads: Tensor


@dataclass(frozen=True, eq=False)
class LabelTargets(_Positions):
    """What two models say of each position's label: for the policy gradient, `policy_gradient`.

    Attributes:
        teacher: float32 [positions], the teacher's log-probability of the label at T = 1; minus
            infinity for none.
        writer: float32 [positions], that of the model which drew the label from its own
            distribution at T = 1, for importance weights; None takes a weight of 1.
        baseline: float32 [positions], taken off the advantage in the gradient; None for 0.
        clip: the largest importance weight.
        temperature: 1.
    """

    teacher: Tensor
    writer: Tensor | None = None
    baseline: Tensor | None = None
    clip: float = math.inf
    temperature: float = 1.0

    exact: ClassVar[bool] = True


Targets: TypeAlias = DenseTargets | HiddenTargets | SparseTargets


def with_logits(targets: Targets) -> DenseTargets | SparseTargets:
    """Hidden states as logits; other targets as they are."""
    return targets.dense() if isinstance(targets, HiddenTargets) else targets


def no_targets(n: int, device: torch.device) -> SparseTargets:
    """Targets of n positions without entries: with alpha 1, hard labels alone."""
    nothing = torch.zeros((n, 0), device=device)
    return SparseTargets(nothing.long(), nothing, nothing.sum(-1), False, 1.0)


def check_number(targets: Sized, n: int) -> None:
    """Refuse targets of another number of positions than n."""
    if len(targets) != n:
        raise UsageError(
            f"the batch has {len(targets)} soft targets for {n} positions: targets and labels "
            "are not of the same rows."
        )
