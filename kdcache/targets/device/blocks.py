"""Logits by blocks of ids: one pass over all of them, then only the blocks that matter.

Shapes: n positions, V ids, b blocks of B ids, m temperatures.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Ids in a block: with so many, statistics of all blocks cost about what opening some does."""


class Blocks(NamedTuple):
    """The result of one pass over the logits.

    Attributes:
        top: float32 [n, b], largest logit of each block.
        mass: float32 [n, b, m], the block's probability at each temperature.
        peak: float32 [n, 1], largest logit of all.
        normalizer: float32 [n, m], sum over all ids of exp((z - peak) / T).
    """

    top: Tensor
    mass: Tensor
    peak: Tensor
    normalizer: Tensor


def read_blocks(logits: Tensor, temperatures: tuple[float, ...]) -> Blocks:
    """The one pass over all logits: maximum and mass of each block.

    Masses are sums of exp((z - block maximum) / T) brought to one scale afterwards. No logarithm is
    taken, so the error stays at float32's rounding whatever the size of the logits.
    """
    whole = logits.shape[-1] // BLOCK
    parts = [_block_sums(_whole_blocks(logits), temperatures)]
    if logits.shape[-1] % BLOCK:
        # The last, shorter block is read by itself: padding would copy all logits.
        parts.append(_block_sums(logits[:, None, whole * BLOCK :], temperatures))
    top = torch.cat([part[0] for part in parts], 1)
    sums = torch.cat([part[1] for part in parts], 1)
    peak = top.amax(1, keepdim=True)
    scale = torch.stack([((top - peak) / t).exp() for t in temperatures], -1)
    # A block far below the peak underflows to 0 here, which is its probability in float32.
    sums = sums * scale
    normalizer = sums.sum(1)
    return Blocks(top, sums / normalizer[:, None], peak, normalizer)


def _whole_blocks(logits: Tensor) -> Tensor:
    """View [n, V // B, B] of the logits, without the last, shorter block."""
    whole = logits.shape[-1] // BLOCK
    return logits[:, : whole * BLOCK].view(len(logits), whole, BLOCK)


def _block_sums(blocks: Tensor, temperatures: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    x = blocks.float()
    top = x.amax(-1)
    # A block of masked ids has the maximum -inf, and -inf - -inf would be NaN.
    x = x - top.clamp_min(torch.finfo(torch.float32).min)[..., None]
    return top, torch.stack(_power_sums(x, temperatures), -1)


def _power_sums(x: Tensor, temperatures: tuple[float, ...]) -> list[Tensor]:
    """Sums of exp(x / T) over the last axis, for each T; overwrites x.

    The exponential is most of a CPU's work here: where all temperatures are one another's doubles,
    squaring the hottest one's serves the others.
    """
    hottest = max(temperatures)
    doublings = [round(math.log2(hottest / t)) for t in temperatures]
    exact = all(hottest == t * 2**d for t, d in zip(temperatures, doublings, strict=True))
    if exact and max(doublings) <= 3:
        weights = (x if hottest == 1 else x.div_(hottest)).exp_()
        sums = {}
        for d in range(max(doublings) + 1):
            weights = weights.square_() if d else weights
            if d in doublings:
                sums[d] = weights.sum(-1)
        return [sums[d] for d in doublings]
    return [(x / t).exp_().sum(-1) for t in temperatures]


def open_blocks(logits: Tensor, which: Tensor) -> Tensor:
    """Logits of the blocks `which` int64 [n, k]: float32 [n, k, B], -inf beyond the vocabulary."""
    whole, left = divmod(logits.shape[-1], BLOCK)
    blocks = _whole_blocks(logits)
    row = torch.arange(len(logits), device=logits.device)[:, None]
    # The last, shorter block is not a row of the view; any row stands for it until it is replaced.
    opened = blocks[row, which.clamp_max(whole - 1) if left else which].float()
    if left:
        last = F.pad(logits[:, whole * BLOCK :].float(), (0, BLOCK - left), value=-torch.inf)
        opened = torch.where((which == whole)[..., None], last[:, None], opened)
    return opened


def probabilities(
    z: Tensor, peak: Tensor, normalizer: Tensor, temperatures: tuple[float, ...]
) -> list[Tensor]:
    """Probability at each temperature of logits z [n, ...]."""
    shape = (-1,) + (1,) * (z.ndim - 1)
    z = z - peak.view(shape)
    return [
        (z / t if t != 1 else z).exp() / normalizer[:, i].view(shape)
        for i, t in enumerate(temperatures)
    ]


def largest(x: Tensor, k: int, *, ordered: bool = True) -> tuple[Tensor, Tensor]:
    """`x.topk(k)` along the last axis; in any order on a GPU if `ordered` is False.

    On one or two threads of a CPU numpy's partition, which is vectorised, takes less than half of
    the time; with more, PyTorch's runs on all of them.
    """
    if x.is_cuda or torch.compiler.is_compiling() or torch.get_num_threads() > 2:
        values, indices = x.topk(k, -1, sorted=ordered or not x.is_cuda)
        return values, indices
    least = x.shape[-1] - k
    found = torch.from_numpy(np.argpartition(x.numpy(), max(0, least - 1), -1)[..., least:])
    values, order = x.gather(-1, found).sort(-1, descending=True)
    return values, found.gather(-1, order)


class Largest(NamedTuple):
    """The k largest logits of each position, and the blocks they were looked for in.

    Attributes:
        blocks: int64 [n, c], the candidates: the k blocks with the largest maxima.
        opened: float32 [n, c, B], their logits.
        values: float32 [n, k], the largest logits, falling.
        indices: int64 [n, k], their indices in the flattened `opened`.
        ids: int64 [n, k].
    """

    blocks: Tensor
    opened: Tensor
    values: Tensor
    indices: Tensor
    ids: Tensor


def find_largest(logits: Tensor, blocks: Blocks, k: int) -> Largest:
    """The k largest logits: they are inside the k blocks with the largest maxima.

    The k ids are different ones of the vocabulary, also where fewer than k logits are finite.
    """
    # A GPU finds the largest by passes over the bits: logits of 16 need half as many.
    dtype = logits.dtype if logits.is_cuda else torch.float32
    count = min(k, blocks.top.shape[1])
    candidates = largest(blocks.top.to(dtype), count, ordered=False)[1]
    opened = open_blocks(logits, candidates)
    # Masked ids come before the positions of the last block that are not ids.
    inside = candidates[..., None] * BLOCK + torch.arange(BLOCK, device=logits.device)
    ranked = torch.where(
        inside < logits.shape[-1], opened.to(dtype).clamp_min(torch.finfo(dtype).min), -torch.inf
    )
    indices = largest(ranked.flatten(1), k)[1]
    values = opened.flatten(1).gather(1, indices)
    ids = candidates.gather(1, indices // BLOCK) * BLOCK + indices % BLOCK
    return Largest(candidates, opened, values, indices, ids)
