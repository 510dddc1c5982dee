"""What others keep of a teacher, written as plainly as possible, for benchmarks to compare with.

* Random sampling knowledge distillation (RS-KD, ACL 2025): N draws with replacement; ids and
  counts, 3 bytes an entry.
* Top-k: the k largest probabilities as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor


def random_sampling(p: Tensor, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`draws` ids of each position with replacement; ids and weights count / draws, [n, draws].

    A repeated id keeps its count in its first place and weight zero in the others.
    """
    ids = torch.multinomial(p, draws, replacement=True, generator=generator).sort(-1).values
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    counts = torch.zeros(ids.shape).scatter_add_(1, new.cumsum(-1) - 1, torch.ones(ids.shape))
    first = torch.zeros_like(ids).scatter_(1, new.cumsum(-1) - 1, ids)
    return first, counts / draws


def random_draws_for(p: Tensor, entries: float) -> int:
    """How many random draws leave so many different ids a position; `p` float64 [n, V]."""
    low, high = 1, 4096
    while high - low > 1:
        middle = (low + high) // 2
        found = float((1 - (1 - p) ** middle).sum(-1).mean())
        low, high = (middle, high) if found < entries else (low, middle)
    return high


def top_k(p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest probabilities as they are."""
    weights, ids = p.topk(k, -1)
    return ids, weights
