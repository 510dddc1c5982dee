"""A test of bias that sparse, correlated samples can be held to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcache.targets import Sample, SoftTargets


def packed(run: Any, codec: Sample, row: Tensor, u: Tensor) -> SoftTargets:
    """Many draws of one position's logits [1, ...] by a sampler of the device, as stored."""
    parts = [run(row.expand(len(some), *row.shape[1:]), some, codec.rule) for some in u.split(2000)]
    encoded = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    return SoftTargets(codec, codec.pack(encoded))


def excess(weights: Tensor, p: Tensor, met: Tensor | None = None) -> float:
    """How many standard errors the chi-square over ids lies above its mean if `weights` [n, V] is
    unbiased.

    Ids of one position are drawn at fixed distances, so they are correlated: the spread of the
    chi-square comes from their correlation matrix. Ids that never vary must be right to rounding.
    `met` bool [n, V] says where chance met an id, if weights are not 0 elsewhere.
    """
    mean, deviation = weights.mean(0), weights.std(0)
    # An id met a handful of times has no usable estimate of its variance: those are pooled.
    rare = (weights != 0 if met is None else met).sum(0) < 100
    pooled = torch.cat([weights[:, ~rare], weights[:, rare].sum(-1, keepdim=True)], 1)
    want = torch.cat([p[~rare], p[rare].sum()[None]])
    mean, deviation = pooled.mean(0), pooled.std(0)
    fixed = deviation < 1e-9
    assert torch.allclose(mean[fixed], want[fixed], atol=1e-6)
    z = (mean - want)[~fixed] / (deviation[~fixed] / len(weights) ** 0.5)
    correlation = torch.corrcoef(pooled[:, ~fixed].T)
    return float((z.square().sum() - z.numel()) / (2 * correlation.square().sum()).sqrt())
