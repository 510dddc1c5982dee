"""A cache's certificate: against an optimum by brute force, for biased and unbiased targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.commands.fidelity import Fidelity, fidelity
from kdcache.targets import Codec, SoftTargets, SparseTargets, TargetWriter

V, N = 64, 400


def teacher(seed: int = 0) -> Tensor:
    return 3 * torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def top(probs: Tensor, k: int, scaled: bool) -> SparseTargets:
    weights, ids = probs.topk(k)
    tail = 1 - weights.sum(-1)
    if scaled:
        weights, tail = weights / weights.sum(-1, keepdim=True), torch.zeros_like(tail)
    return SparseTargets(ids, weights, tail, True, 1.0)


def brute(probs: Tensor, targets: SparseTargets, found: Fidelity) -> float:
    """KL to the student that a descent finds, over all ids, on the loss as training has it."""
    ranks = probs.argsort(-1, descending=True).argsort(-1)
    starts = torch.tensor([band.first - 1 for band in found.bands])
    bands = torch.bucketize(ranks, starts, right=True) - 1
    tilt = torch.zeros(int(bands.max()) + 1, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS([tilt], max_iter=500, tolerance_grad=1e-12, tolerance_change=0,
                                line_search_fn="strong_wolfe")  # fmt: skip
    named = torch.zeros_like(probs).scatter_add_(1, targets.ids, (targets.weights > 0).double()) > 0

    def student() -> Tensor:
        return (probs.log() + tilt[bands]).log_softmax(-1)

    def loss() -> Tensor:
        descent.zero_grad()
        log = student()
        left = log.masked_fill(named, -torch.inf).logsumexp(-1)
        value = -(targets.weights * log.gather(1, targets.ids)).sum(-1) - targets.tail * left
        value.mean().backward()
        return value.mean()

    descent.step(loss)
    return float((probs * (probs.log() - student().detach())).sum(-1).mean())


@pytest.mark.parametrize("bias", ["none", "tail halved", "flattened", "of another teacher"])
def test_the_perfect_student_is_that_of_a_descent(bias: str) -> None:
    logits = teacher()
    probs = logits.softmax(-1)
    targets = top(probs, 9, scaled=False)
    weights, tail = targets.weights, targets.tail
    if bias == "tail halved":
        weights, tail = weights * ((1 - tail / 2) / (1 - tail))[:, None], tail / 2
    elif bias == "flattened":
        weights = weights.sqrt() / weights.sqrt().sum(-1, keepdim=True) * (1 - tail)[:, None]
    elif bias == "of another teacher":
        targets = top(teacher(1).softmax(-1), 9, scaled=False)
        weights, tail = targets.weights, targets.tail
    targets = SparseTargets(targets.ids, weights, tail, True, 1.0)
    found = fidelity(logits, targets)
    assert found.kl == pytest.approx(brute(probs, targets, found), rel=1e-6, abs=1e-9)
    assert found.lost == 0
    if bias == "none":
        assert found.kl < 1e-12
        assert all(abs(band.targets - band.teacher) < 1e-12 for band in found.bands)
    else:
        assert found.kl > 1e-4


def test_scaled_top_k_ends_at_an_infinite_kl_and_says_what_is_lost() -> None:
    logits = teacher()
    probs = logits.softmax(-1)
    found = fidelity(logits, top(probs, 9, scaled=True))
    lost = 1 - probs.topk(9).values.sum(-1).mean()
    assert found.kl is None
    assert found.lost == pytest.approx(float(lost))
    assert "infinite KL" in found.line


@pytest.mark.parametrize("name", ["sample:10", "anchored:5", "topk:9", "dense"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_our_own_codecs_are_within_their_noise(name: str, temperature: float) -> None:
    logits = teacher().float()
    codec = Codec.parse(name, (1.0, 2.0), V)
    noise = torch.from_numpy(np.random.default_rng(0).random(N))
    held: SoftTargets = TargetWriter(codec, None).write(logits, noise)
    found = fidelity(logits, held.at(temperature))
    assert found.kl is not None
    assert found.kl < 10 * found.floor + 1e-4
    assert all(abs(b.targets - b.teacher) < 5 * b.error + 5e-3 for b in found.bands)
