"""A teacher's output layer: what turns its last hidden states into logits.

    logits = capped(scale * (states @ weight.T + bias)),   capped(x) = cap * tanh(x / cap)

A cache that keeps hidden states keeps this once. The weight has a row for each id of the cache's
vocabulary: a teacher's padding beyond it is cut off before it is stored.

Cost: one matrix product [n, D] x [D, V]. Guarantee: none about where the numbers come from; see
`kdcache.teacher.probe`, which proves them on the teacher's own forward.

States may be kept as levels of 8 bits, a byte a number and one for the step of each block:

    state = mean[c] + unit[c] * (level - 128) * 2 ** (step / 16 - 14)

A block has about 32 channels c, and its step is 1/127 of its largest number, rounded up to a power
of 2 to the 1/16: an outlier costs its own block. Cost: a few passes over the numbers; on a CPU in
slices that stay in its cache, a fifth of the time. Guarantee: numbers are made of levels by the
same float32 operations on any device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 32  # channels that share a step: 1 byte for 32
_LARGEST = 127
_ZERO = 128  # the level of 0
_FINEST = 2.0**-14
_SLICE = 64  # rows with numbers that stay in a CPU's cache


@dataclass(frozen=True, eq=False)
class OutputLayer:
    """What turns hidden states into logits.

    Attributes:
        weight: float [V, D], in the teacher's own dtype.
        bias: float [V], or None.
        scale: what the projected states, bias included, are multiplied by.
        cap: the logits are ``cap * tanh(x / cap)`` of these x; None: x itself.
        mean: float32 [D], mean of each channel of the states; None where no codec needs it.
        unit: float32 [D], above 0: what the numbers of each channel are counted in; with `mean`.
        origin: gives this layer in any process, where it comes from a cache. Then it is pickled as
            that: a batch from a worker process does not carry V x D numbers.

    Raises:
        ValueError: shapes, dtypes or numbers that cannot be.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None
    mean: Tensor | None = None
    unit: Tensor | None = None
    origin: Callable[[], OutputLayer] | None = field(default=None, repr=False)
    _copies: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or not self.weight.is_floating_point() or not self.weight.numel():
            raise ValueError(f"its weight is {self.weight.dtype} {list(self.weight.shape)}")
        vocab_size, width = self.weight.shape
        for name, size in (("bias", vocab_size), ("mean", width), ("unit", width)):
            values = getattr(self, name)
            if values is not None and (values.shape != (size,) or not values.is_floating_point()):
                raise ValueError(
                    f"its {name} is {values.dtype} {list(values.shape)}, expected [{size}]"
                )
        if not (math.isfinite(self.scale) and self.scale != 0):
            raise ValueError(f"its scale is {self.scale:g}")
        if self.cap is not None and not (math.isfinite(self.cap) and self.cap > 0):
            raise ValueError(f"its cap is {self.cap:g}")
        if (self.mean is None) != (self.unit is None):
            raise ValueError("it has only one of mean and unit")
        if self.unit is not None and not bool((self.unit > 0).all()):
            raise ValueError("a unit is not above 0")

    def __reduce__(self) -> Any:
        if self.origin is not None:
            return self.origin, ()
        parts = (self.weight, self.bias, self.scale, self.cap, self.mean, self.unit)
        return OutputLayer, parts

    def same(self, other: OutputLayer) -> bool:
        """Whether both make the same logits of the same states, bit by bit."""

        def equal(one: Tensor | None, two: Tensor | None) -> bool:
            if one is None or two is None:
                return one is two
            return one.dtype == two.dtype and torch.equal(one, two)

        numbers = (self.scale, self.cap) == (other.scale, other.cap)
        return numbers and equal(self.weight, other.weight) and equal(self.bias, other.bias)

    def with_channels(self, mean: Tensor, deviation: Tensor) -> OutputLayer:
        """The layer with the means and units of its channels.

        A unit is about the channel's deviation. Of channels that move the logits more it is a
        little smaller: the fourth root of the two's product, over all channels' median, takes a
        third off the error of `hidden:int8` at the same bytes.

        Args:
            mean: [D] of many states.
            deviation: [D] of the same states.
        """
        least = 0.01 * deviation.square().mean().sqrt().clamp_min(1e-30)
        deviation = deviation.clamp_min(least)
        effect = deviation * self.weight.to(deviation.dtype).std(0)
        effect = (effect / effect.median().clamp_min(1e-30)).clamp_min(1e-4)
        unit = deviation * effect.pow(-0.25)
        return replace(self, mean=mean.float(), unit=unit.float())

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.weight)

    @property
    def width(self) -> int:
        """D, numbers of a state."""
        return self.weight.shape[1]

    def on(
        self, device: torch.device, dtype: torch.dtype, ids: slice = slice(None)
    ) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of some ids on a device; the copy is made once."""
        key = (device, dtype, *ids.indices(self.vocab_size))
        if key not in self._copies:
            bias = None if self.bias is None else self.bias[ids].to(device, dtype)
            self._copies[key] = self.weight[ids].to(device, dtype), bias
        copies: tuple[Tensor, Tensor | None] = self._copies[key]
        return copies

    def channels(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Means and units on a device, float32 [D]; the copy is made once."""
        assert self.mean is not None, "a codec that needs them was given such a layer"
        assert self.unit is not None, "it comes with the mean"
        if device not in self._copies:
            self._copies[device] = self.mean.float().to(device), self.unit.float().to(device)
        copies: tuple[Tensor, Tensor] = self._copies[device]
        return copies

    def to_levels(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Round states.

        Args:
            states: [n, D] of any float dtype.

        Returns:
            uint8 levels [n, D] and steps [n, blocks], and bool [n]: whether all numbers of a row
            fit.
        """
        (mean, unit), width = self.channels(states.device), states.shape[1]
        blocks, length = blocks_of(width)
        z = F.pad((states.float() - mean) / unit, (0, blocks * length - width))
        z = z.view(-1, blocks, length)
        least = z.abs().amax(-1) / _LARGEST
        steps = (16 * (least.clamp_min(_FINEST).log2() + 14)).ceil()
        fits = (steps < 256).all(-1)
        steps = steps.nan_to_num(0).clamp(0, 255)
        levels = (z / (steps / 16 - 14).exp2()[..., None]).round()
        levels = levels.clamp(-_LARGEST, _LARGEST) + _ZERO
        finite = states.isfinite().all(-1)
        levels = torch.where((fits & finite)[:, None, None], levels, _ZERO).flatten(1)
        return levels[:, :width].to(torch.uint8), steps.to(torch.uint8), fits

    def from_levels(self, levels: Tensor, steps: Tensor) -> Tensor:
        """The numbers that levels stand for, float32 [n, D]; arguments as `to_levels` has them."""
        (mean, unit), width = self.channels(levels.device), levels.shape[1]
        blocks, length = blocks_of(width)
        numbers = torch.empty(len(levels), blocks * length, device=levels.device)
        rows = _SLICE if levels.device.type == "cpu" else max(len(levels), 1)
        for start in range(0, len(levels), rows):
            part = slice(start, start + rows)
            few = numbers[part]
            few[:, :width].copy_(levels[part]).sub_(_ZERO)
            size = (steps[part].double() / 16 - 14).exp2_().float()
            few.view(-1, blocks, length).mul_(size[..., None])
            few[:, :width].mul_(unit).add_(mean)
        return numbers[:, :width]

    def logits(self, states: Tensor, ids: slice = slice(None)) -> Tensor:
        """The logits of some positions: a slice's, as many as fit the memory.

        Args:
            states: [n, D] of any float dtype.
            ids: consecutive ones. Default: all V.

        Returns:
            [n, ids] on the device of `states`; in float64 if these are, else in float32.
        """
        dtype = torch.promote_types(states.dtype, torch.float32)
        weight, bias = self.on(states.device, dtype, ids)
        projected = F.linear(states.to(dtype), weight, bias)
        return finish_(projected, self.scale, self.cap)


def blocks_of(width: int) -> tuple[int, int]:
    """Number of blocks that share a step, and their channels; the last one may have fewer."""
    blocks = max(1, width // _BLOCK)
    return blocks, -(-width // blocks)


def finish_(projected: Tensor, scale: float, cap: float | None) -> Tensor:
    """Scale and cap projected states [n, V] in place; returns them."""
    if scale != 1:
        projected.mul_(scale)
    if cap is not None:
        projected.div_(cap).tanh_().mul_(cap)
    return projected
