"""How far a cache's targets are from its teacher's, and where a perfect student of them would end.

The ids of each position are put into bands of the teacher's own rank: 1, 2-3, 4-7, 8-15 and so on.
P[t, b] is the teacher's mass in band b at position t, W[t, b] what the targets give to it by id,
tail[t] what they give to ids that they do not name, and O[t, b] the teacher's mass in the band that
they do not name.

A student that is perfect but for these targets knows the teacher's distribution inside a band, and
of the bands what the targets tell it on average: s(i) = p(i) exp(a[b(i)]) / Z[t]. Of all students
with the same mean mass in each band it is the one nearest to the teacher (least KL(s | p), and so
of most entropy where the teacher is flat), since that is what an exponential family is. It
minimises the loss of training, as a mean over positions,

    L(a) = mean_t  w[t] log Z[t] - sum_b W[t,b] a[b] - tail[t] log sum_b O[t,b] e^a[b]

with w[t] = sum_b W[t,b] + tail[t], 1 but for samples of several temperatures. Where its slope is 0,
the student's mean mass in each band is that of the targets, the tail divided over bands as the
student divides it:

    mean_t w[t] s[t,b] = mean_t W[t,b] + tail[t] O[t,b] e^a[b] / sum_c O[t,c] e^a[c]

Found by descent (L-BFGS) from the teacher on, a = 0. Expectation and iterative scaling in turn give
the same, too slowly.

Bands are joined until the teacher gives each at least one position's mass: of fewer, a sample says
nothing.

Its KL is mean_t KL(p | s) = log Z[t] - sum_b P[t,b] a[b]: 0 for unbiased targets but for noise, and
infinite where the targets give nothing to ids that the teacher does.

Cost: V numbers a position, then a few hundred rounds over [positions, bands]. Guarantee: float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdcache.targets import DenseTargets, SparseTargets, Targets
from kdcache.targets.decoded import with_logits

_ROUNDS = 500
_CLOSE = 1e-12
_TINY = 1e-300
_ROUNDING = 1e-6  # of float32 weights that sum to 1: no tail
_NUMBERS = 1 << 22  # logits at a time


@dataclass(frozen=True)
class Band:
    """The ids of some ranks of the teacher.

    Attributes:
        first: their first rank, from 1 on.
        last: their last one.
        teacher: mean mass that the teacher gives them.
        targets: mean mass that the targets give them, the tail as the student divides it.
        error: standard error of the difference, of the positions that were looked at.
    """

    first: int
    last: int
    teacher: float
    targets: float
    error: float


@dataclass(frozen=True)
class Fidelity:
    """The certificate of a cache's targets at one temperature.

    Attributes:
        positions: how many were looked at.
        kl: KL, in nats, from the teacher to a perfect student of these targets; None if infinite.
        floor: of it what noise of so few positions would make of unbiased targets, roughly.
        lost: the teacher's mass in bands to which the targets give nothing.
    """

    temperature: float
    positions: int
    bands: tuple[Band, ...]
    kl: float | None
    floor: float
    lost: float

    @property
    def line(self) -> str:
        """In a sentence."""
        worst = max(self.bands, key=lambda band: abs(band.targets - band.teacher))
        where = f"rank {worst.first}" + (f" to {worst.last}" if worst.last > worst.first else "")
        ends = (
            f"KL {self.kl:.2g} (noise alone: {self.floor:.1g})"
            if self.kl is not None
            else f"an infinite KL: {self.lost:.2%} of the teacher's mass has no target"
        )
        return (
            f"at T = {self.temperature:g} the targets' mean is off by up to "
            f"{worst.targets - worst.teacher:+.2g} ({where}, of {worst.teacher:.2g}); a perfect "
            f"student of them ends at {ends}."
        )


def band_starts(size: int, targets: Targets) -> np.ndarray:
    """First rank, from 0 on, of each band of a vocabulary; one of them begins after a top-k."""
    starts = (1 << np.arange(size.bit_length())) - 1
    k = targets.ids.shape[1] if isinstance(targets, SparseTargets) and targets.exact else 0
    return np.union1d(starts[starts < size], [k] if k < size else [])


def fidelity(
    read: Tensor, targets: Targets, logits_of: Callable[[Tensor], Tensor] = lambda read: read
) -> Fidelity:
    """The certificate of some positions.

    Args:
        read: what the teacher gave, [n, ...].
        logits_of: its logits [n, V] of that, not divided by T.
    """
    first = logits_of(read[:1])
    size, rows = first.shape[1], max(1, _NUMBERS // first.shape[1])
    slices = [slice(a, a + rows) for a in range(0, len(read), rows)]
    starts = band_starts(size, targets).astype(np.int64)
    parts = [_banded(logits_of(read[at]).cpu(), with_logits(targets[at]), starts) for at in slices]
    mass, given, outside, tail = (np.concatenate(some) for some in zip(*parts, strict=True))
    return certificate(mass, given, outside, tail, targets.temperature, [*starts.tolist(), size])


def _banded(
    logits: Tensor, targets: DenseTargets | SparseTargets, firsts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """P, W, O and tail of some positions; see the module."""
    probs = (logits.double() / targets.temperature).softmax(-1)
    n, size = probs.shape
    order = probs.argsort(dim=-1, descending=True, stable=True)
    starts = torch.from_numpy(firsts)
    band = torch.empty_like(order)
    ranks = torch.bucketize(torch.arange(size), starts, right=True) - 1
    band.scatter_(1, order, ranks.expand(n, -1))

    def summed(bands: Tensor, weights: Tensor) -> np.ndarray:
        sums = torch.zeros(n, len(starts), dtype=torch.float64)
        return np.asarray(sums.scatter_add_(1, bands, weights.double()))

    mass = summed(band, probs)
    if isinstance(targets, DenseTargets):
        own = (targets.logits.double() / targets.temperature).softmax(-1)
        return mass, summed(band, own), np.zeros_like(mass), np.zeros(n)
    given = summed(band.gather(1, targets.ids), targets.weights)
    named = torch.zeros(n, size, dtype=torch.float64)
    named.scatter_add_(1, targets.ids, (targets.weights > 0).double())
    return mass, given, summed(band, probs * (named == 0)), targets.tail.double().numpy()


def certificate(
    mass: np.ndarray,
    given: np.ndarray,
    outside: np.ndarray,
    tail: np.ndarray,
    temperature: float,
    edges: list[int],
) -> Fidelity:
    """The perfect student of masses by band.

    Args:
        mass: P [n, bands], float64.
        tail: [n].
        edges: ranks, from 0 on, at which bands begin, and V.
    """
    firsts = _joined(mass)
    mass, given, outside = (np.add.reduceat(one, firsts, axis=1) for one in (mass, given, outside))
    tail = np.where((outside.sum(1) > 0) & (tail > _ROUNDING), tail, 0)
    live = (given + tail[:, None] * outside).sum(0) > 0
    teacher = mass.mean(0)
    lost = float(teacher[~live].sum())
    tilt = np.zeros(len(live))
    tilt[live] = _tilts(mass[:, live], given[:, live], outside[:, live], tail)
    tilted = outside * np.exp(tilt)
    target = given + tail[:, None] * tilted / np.maximum(tilted.sum(1, keepdims=True), _TINY)
    means = target.mean(0)
    kl = None
    if not lost:
        kl = max(float((np.log((mass * np.exp(tilt)).sum(1)) - mass @ tilt).mean()), 0.0)
    errors = (target - mass).std(0) / math.sqrt(len(mass))
    seen = teacher > 0
    floor = float((errors[seen] ** 2 / teacher[seen]).sum() / 2)
    starts = [*(edges[band] for band in firsts), edges[-1]]
    numbers = zip(starts[:-1], starts[1:], teacher, means, errors, strict=True)
    bands = tuple(
        Band(int(a) + 1, int(b), float(p), float(w), float(e)) for a, b, p, w, e in numbers
    )
    return Fidelity(temperature, len(mass), bands, kl, floor, lost)


def _joined(mass: np.ndarray) -> np.ndarray:
    """Where bands begin that have a position's mass each, the last ones joined first."""
    firsts: list[int] = []
    left = 0.0
    for band, mean in reversed([*enumerate(mass.sum(0))]):
        left += mean
        if left >= 1 or not band:
            firsts, left = [band, *firsts], 0.0
    return np.array(firsts)


def _tilts(
    mass: np.ndarray, given: np.ndarray, outside: np.ndarray, tail: np.ndarray
) -> np.ndarray:
    """The a at which L is least, from the teacher on."""
    mass_, given_ = torch.from_numpy(mass).log(), torch.from_numpy(given)
    some = tail > 0
    outside_, tail_ = torch.from_numpy(outside[some]).log(), torch.from_numpy(tail[some])
    weights = torch.from_numpy(given.sum(1) + tail)
    tilt = torch.zeros(mass.shape[1], dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS(
        [tilt], max_iter=_ROUNDS, tolerance_grad=_CLOSE, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        descent.zero_grad()
        value = (weights * (mass_ + tilt).logsumexp(1) - given_ @ tilt).sum()
        value = (value - (tail_ * (outside_ + tilt).logsumexp(1)).sum()) / len(mass)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    descent.step(loss)  # type: ignore[no-untyped-call]
    return tilt.detach().numpy()
