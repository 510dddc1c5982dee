"""Figures of an evaluation during training that no tokenizer enters: sums over chunks of text.

The same as `kdcache evaluate` gives a single student of a cache, whose rows it reads as they are or
in tokens of its own: see `kdcache.commands.evaluate.in_bytes`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdcache.loss.chunks import compared
from kdcache.stream.text import TextChunks

SUMS = 6


def text_sums(text: TextChunks, logprobs: Tensor) -> Tensor:
    """What the figures of a batch are made of: float64 [SUMS], which adds up over batches.

    Args:
        text: of the batch.
        logprobs: float64 [P], the student's log-probability of each label.
    """
    begin, end = (torch.from_numpy(edge).to(logprobs.device) for edge in (text.begin, text.end))
    before = torch.cat([logprobs.new_zeros(1), logprobs.cumsum(0)])
    mine = before[end] - before[begin]
    sizes = torch.from_numpy(text.sizes).to(mine)
    if text.likelihood is None:
        unknown = mine.new_tensor(math.nan)
        known = (mine.sum(), sizes.sum(), torch.ones_like(mine).sum())
        return torch.stack([*known, unknown, unknown, unknown])
    theirs = torch.from_numpy(text.likelihood).to(mine)
    kept = theirs.isfinite()
    mine, theirs, sizes = mine[kept], theirs[kept], sizes[kept]
    kl, agreed = compared(theirs, mine)
    number = torch.ones_like(mine).sum()
    return torch.stack([mine.sum(), sizes.sum(), number, kl, agreed.to(mine), theirs.sum()])


def text_figures(sums: Tensor, *, across: bool) -> dict[str, float]:
    """The figures by name; empty where there is no text.

    Args:
        sums: of `text_sums`.
        across: whether the student has another tokenizer than its teacher, so that chunks are what
            both can be asked about.
    """
    nats, size, chunks, kl, agreed, teacher = sums.tolist()
    if not size:
        return {}
    found = {"bits_per_byte": -nats / math.log(2) / size}
    if math.isfinite(teacher):
        found["teacher_bits_per_byte"] = -teacher / math.log(2) / size
        if across:
            found |= {"chunk_kl": kl / chunks, "chunk_agreement": agreed / chunks}
    return {name: value for name, value in found.items() if math.isfinite(value)}
