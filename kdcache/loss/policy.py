"""Reverse KL as a policy gradient.

Cost: a few operations a position, on the log-probability that cross-entropy has anyway.
"""

from __future__ import annotations

from torch import Tensor

from kdcache.targets import LabelTargets

MAX_ADVANTAGE = 10.0
"""Advantages of `policy_gradient` are clipped to this, nats (Lightning OPD, table 6)."""


def policy_gradient(logprobs: Tensor, targets: LabelTargets) -> Tensor:
    """Reverse KL as a policy gradient, from the drawn labels alone.

    With the advantage ``A = log q(y) - log p(y)`` of a label y, clipped to +-`MAX_ADVANTAGE`, and
    the importance weight ``w = min(p(y) / b(y), clip)`` of what b, the writer, drew:

        value = -w A,   gradient = -w (A - c) grad log p(y);   A, w and c are constants

    With w = 1 and no baseline c that is equation 4 and algorithm 1 of Lightning OPD (Wu, Han and
    Cai 2026, arXiv 2604.13010), which takes the advantage of the student as it is now and no
    importance weights: right as long as p is near b. With an unclipped w, value and gradient are
    unbiased for KL(p || q) after the prefixes that b wrote, whatever c is (Williams 1992); without
    it a student far from its teacher, whose advantages are nearly all negative, is pushed away from
    whatever was drawn. Clipping w bounds the variance (Ionides 2008, "Truncated importance
    sampling"; 1 in V-trace, Espeholt et al. 2018).

    Args:
        logprobs: [n], log p(y), with their gradient.
        targets: log q(y) and log b(y).

    Returns:
        [n], nats.
    """
    now = logprobs.detach()
    pull = (targets.teacher.to(now) - now).clamp(-MAX_ADVANTAGE, MAX_ADVANTAGE)
    moved = pull if targets.baseline is None else pull - targets.baseline.to(now)
    found = pull + moved * (logprobs - now)
    if targets.writer is None:
        return -found
    return -found * (now - targets.writer.to(now)).exp().clamp_max(targets.clip)
