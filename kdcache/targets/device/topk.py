"""Top-k with the mass of the tail, in one pass over the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.targets.device.blocks import BLOCK, find_largest, largest, probabilities, read_blocks
from kdcache.targets.device.run import all_finite, run_encoding


def top_entries(logits: Tensor, k: int, temperatures: tuple[float, ...]) -> dict[str, Tensor]:
    """The K largest logits of each position and the mass of the others at each temperature.

    Args:
        logits: [n, V].
        k: entries, at most V.
        temperatures: where the tail's mass is wanted.

    Returns:
        "ids" int32 [n, K] and "logprobs" float32 [n, K] (T = 1), largest first;
        "tail" float32 [n, m]; "finite" bool [n]; "peak" and "normalizer" float32 [n], see
        `label_logprobs`.
    """
    run = _top_blocked if logits.shape[-1] > 4 * k * BLOCK else _top_plain
    return run_encoding(run, (logits,), k, temperatures)


def _top_plain(logits: Tensor, k: int, temperatures: tuple[float, ...]) -> dict[str, Tensor]:
    z = logits.float()
    values, ids = largest(z, k)
    peak = values[:, :1]
    normalizer = torch.stack([((z - peak) / t).exp().sum(-1) for t in (1.0, *temperatures)], -1)
    return _top_result(ids, values, peak, normalizer, temperatures, k == z.shape[-1])


def _top_blocked(logits: Tensor, k: int, temperatures: tuple[float, ...]) -> dict[str, Tensor]:
    blocks = read_blocks(logits, (1.0, *temperatures))
    best = find_largest(logits, blocks, k)
    everything = k == logits.shape[-1]
    return _top_result(
        best.ids, best.values, blocks.peak, blocks.normalizer, temperatures, everything
    )


def _top_result(
    ids: Tensor,
    values: Tensor,
    peak: Tensor,
    normalizer: Tensor,
    temperatures: tuple[float, ...],
    everything: bool,
) -> dict[str, Tensor]:
    """`normalizer` has T = 1 first, then the declared temperatures."""
    kept = [p.sum(-1) for p in probabilities(values, peak, normalizer[:, 1:], temperatures)]
    tail = 1 - torch.stack(kept, -1)
    return {
        "ids": ids.int(),
        "logprobs": values - peak - normalizer[:, :1].log(),
        "tail": torch.zeros_like(tail) if everything else tail.clamp_min(0),
        "finite": all_finite(peak, normalizer),
        "peak": peak[:, 0],
        "normalizer": normalizer[:, 0],
    }
