"""Finds positions with unusable logits: NaN, plus infinity, or nothing but minus infinity."""

from __future__ import annotations

import torch
from torch import Tensor


def check_finite(values: Tensor) -> Tensor:
    """Find the first non-finite position, without synchronising with the host.

    Args:
        values: logits [n, ...], or the flags "finite" [n] that every codec's `encode` returns
            (those cost nothing more).

    Returns:
        int64 scalar on the same device: the index of the first bad position, or -1.
    """
    good = values if values.dtype == torch.bool else values.isfinite().flatten(1).all(-1)
    bad = ~good.flatten()
    if bad.numel() == 0:
        return torch.full((), -1, dtype=torch.int64, device=values.device)
    return torch.where(bad.any(), bad.int().argmax(), -1)


def all_finite(peak: Tensor, normalizer: Tensor) -> Tensor:
    """The flags "finite" [n], from what is computed anyway.

    NaN and plus infinity spread to the peak or the sums; minus infinity everywhere makes the peak
    minus infinity.
    """
    return (peak.isfinite() & normalizer.isfinite()).all(-1)
