"""Hidden states as levels of 8 bits: a byte a number, and one for the step of each block.

    state = mean[c] + unit[c] * (level - 128) * 2 ** (step / 16 - 14)

A block has about 32 channels c, and its step is 1/127 of its largest number, rounded up to a power
of 2 to the 1/16: an outlier costs its own block.

Cost: a few passes over the numbers; on a CPU in slices that stay in its cache, a fifth of the time.
Guarantee: numbers are made of levels by the same float32 operations on any device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 32  # channels that share a step: 1 byte for 32
_LARGEST = 127
_ZERO = 128  # the level of 0
_FINEST = 2.0**-14
_SLICE = 64  # rows with numbers that stay in a CPU's cache


def blocks_of(width: int) -> tuple[int, int]:
    """Number of blocks that share a step, and their channels; the last one may have fewer."""
    blocks = max(1, width // _BLOCK)
    return blocks, -(-width // blocks)


def to_levels(states: Tensor, mean: Tensor, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round states.

    Args:
        states: [n, D] of any float dtype.
        mean: float32 [D], of the channels.
        unit: float32 [D], above 0.

    Returns:
        uint8 levels [n, D] and steps [n, blocks], and bool [n]: whether all numbers of a row fit.
    """
    width = states.shape[1]
    blocks, length = blocks_of(width)
    z = F.pad((states.float() - mean) / unit, (0, blocks * length - width))
    z = z.view(-1, blocks, length)
    least = z.abs().amax(-1) / _LARGEST
    steps = (16 * (least.clamp_min(_FINEST).log2() + 14)).ceil()
    fits = (steps < 256).all(-1)
    steps = steps.nan_to_num(0).clamp(0, 255)
    levels = (z / (steps / 16 - 14).exp2()[..., None]).round().clamp(-_LARGEST, _LARGEST) + _ZERO
    finite = states.isfinite().all(-1)
    levels = torch.where((fits & finite)[:, None, None], levels, _ZERO).flatten(1)
    return levels[:, :width].to(torch.uint8), steps.to(torch.uint8), fits


def from_levels(levels: Tensor, steps: Tensor, mean: Tensor, unit: Tensor) -> Tensor:
    """The numbers that levels stand for, float32 [n, D]; arguments as `to_levels` has them."""
    width = levels.shape[1]
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
