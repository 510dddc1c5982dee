"""A teacher's output layer: what turns its last hidden states into logits.

    logits = capped(scale * (states @ weight.T + bias)),   capped(x) = cap * tanh(x / cap)

A cache that keeps hidden states keeps this once. The weight has a row for each id of the cache's
vocabulary: a teacher's padding beyond it is cut off before it is stored.

Cost: one matrix product [n, D] x [D, V]. Guarantee: none about where the numbers come from; see
`kdcache.teacher.output_layer`, which proves them on the teacher's own forward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class OutputLayer:
    """What turns hidden states into logits.

    Attributes:
        weight: float [V, D], in the teacher's own dtype.
        bias: float [V], or None.
        scale: what the projected states, bias included, are multiplied by.
        cap: the logits are ``cap * tanh(x / cap)`` of these x; None: x itself.
        mean: float32 [D], mean of each channel of the states; None where no codec needs it.
        deviation: float32 [D], above 0: the spread of each channel; with `mean` only.

    Raises:
        ValueError: shapes, dtypes or numbers that cannot be.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None
    mean: Tensor | None = None
    deviation: Tensor | None = None
    _copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor | None]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or not self.weight.is_floating_point() or not self.weight.numel():
            raise ValueError(f"its weight is {self.weight.dtype} {list(self.weight.shape)}")
        vocab_size, width = self.weight.shape
        for name, size in (("bias", vocab_size), ("mean", width), ("deviation", width)):
            values = getattr(self, name)
            if values is not None and (values.shape != (size,) or not values.is_floating_point()):
                raise ValueError(
                    f"its {name} is {values.dtype} {list(values.shape)}, expected [{size}]"
                )
        if not (math.isfinite(self.scale) and self.scale != 0):
            raise ValueError(f"its scale is {self.scale:g}")
        if self.cap is not None and not (math.isfinite(self.cap) and self.cap > 0):
            raise ValueError(f"its cap is {self.cap:g}")
        if (self.mean is None) != (self.deviation is None):
            raise ValueError("it has only one of mean and deviation")
        if self.deviation is not None and not bool((self.deviation > 0).all()):
            raise ValueError("a deviation is not above 0")

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.weight)

    @property
    def width(self) -> int:
        """D, numbers of a state."""
        return self.weight.shape[1]

    def on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias on a device; the copy is made once."""
        key = (device, dtype)
        if key not in self._copies:
            bias = None if self.bias is None else self.bias.to(device, dtype)
            self._copies[key] = self.weight.to(device, dtype), bias
        return self._copies[key]

    def logits(self, states: Tensor) -> Tensor:
        """The logits of some positions: a slice's, as many as fit the memory.

        Args:
            states: [n, D] of any float dtype.

        Returns:
            [n, V] on the device of `states`; in float64 if these are, else in float32.
        """
        dtype = torch.promote_types(states.dtype, torch.float32)
        weight, bias = self.on(states.device, dtype)
        projected = torch.nn.functional.linear(states.to(dtype), weight, bias)
        return finish_(projected, self.scale, self.cap)


def finish_(projected: Tensor, scale: float, cap: float | None) -> Tensor:
    """Scale and cap projected states [n, V] in place; returns them."""
    if scale != 1:
        projected.mul_(scale)
    if cap is not None:
        projected.div_(cap).tanh_().mul_(cap)
    return projected
