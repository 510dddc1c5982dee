"""Anchored samples: noise that vanishes as the student nears its teacher.

A stored sample estimates the teacher's probability p_i by a weight w_i where id i was met, else by
0, and its noise never ends, however good the student. But the student's own q is known in full at
every step. Let r_i be 1 / pi_i where id i was drawn, else 0: the inverse of its probability of
being drawn, 1 on average. Then for any c that does not look at the draw

    t_i = w_i + c_i (1 - r_i)

has the mean of w_i: c is a control variate (Saerndal, Swensson and Wretman 1992, chapter 6, call it
a difference estimator). Its noise is sum_i (p_i - c_i)^2 (1 - pi_i) / pi_i, where a sample's has
c = 0. What is certain of a position is its head, and so the mass m_p of its tail. With m_q the
student's mass on the tail and o their overlap, sum_head min(p, q) + min(m_p, m_q),

    c_i = theta o^2 f (m_p / m_q) q_i    in the tail, 0 in the head,

is the student's tail on the teacher's scale, trusted as far as the head shows that the two agree.
No p_i of the tail is above m_p / n, n being the number of ids drawn (at one declared temperature).
Where the largest c_i is, the student contradicts its teacher, and all c of the position shrink by
f = min(1, (5/4 m_p / (n max c))^2).
theta = B / C minimises the noise, where B = sum w c (r - 1) and C = sum c^2 r (r - 1) over what was
drawn, c being that of theta = 1. It comes from the sums of past steps, which the present draw has
no part in, so every target stays unbiased. theta = 0 is the sample as it is.

A student that is sure of ids which are hardly ever drawn would be missed by B and C. Its share of c
is known, D = o^2 f m_p, and what was drawn of it, sum c r, falls short of D. Where the shortfall
over all past positions exceeds three of its standard deviations, its square, the least noise that
it can stand for, joins C: the ids concerned were met less than once. The deviation comes from the
squares of the positions' shortfalls. C would overstate it for a student near its teacher: the
draws of a position are so many for certain, and c r is nearly the same for each.

An id that cannot be drawn (p_i = 0) falls short in every draw. Nothing stored tells it from an id
that was missed by chance, so no c can leave it out. With a share phi of D on such ids the mean of
t_i is (1 - phi) c_i there, and p_i - phi c_i on the other ids of the tail: the student's mass there
falls at 1 - (1 - phi) c_i / q_i of the rate of the full gradient.

C is a sum with a heavy tail, and what matters most may never have been met. It rests on about
k = C^2 / C2 draws, C2 being the sum of the squares of its terms (the effective size of a sample,
Kong 1992). Few draws are doubted, and a small theta, which gains little, more than a large one:
with d = 0.3 / (1 + k / 300), (1 + d) theta^3 / (theta^2 + d) is taken. Near its teacher a student's
terms are much alike, and the doubt is gone after some hundred positions; a far one's C may rest on
some dozen draws out of thousands, and the doubt stays.

The loss's value stays that of the sample; only its gradient, (q - t) by the logits, has the
variate, and t is a constant in it. The mass that c (1 - r) adds to t by chance is taken off again
in proportion to the student's tail, so that t sums to what w sums to.

Cost: some operations on the entries; none on the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.loss.vocabulary import WHOLE, Vocabulary
from kdcache.targets import AnchoredTargets

FIGURES = 5
"""What theta is estimated from: B, C, what the draws fell short of, C2, squared shortfalls."""

_POWERS = (2, 2, 1, 4, 2)
"""Powers of a position's weight in each: noise is a sum of squares, the shortfall one of c."""

_KEPT = 0.99
"""Share of the sums that a step leaves: they are about those of the last hundred steps."""

_DOUBT, _DRAWS = 0.3, 300.0
"""d where C rests on nothing, and how many draws under C halve it."""

_DEVIATIONS = 3.0
"""A shortfall below so many standard deviations is taken for chance."""


class Anchor:
    """theta, fixed or estimated, and the sums of the step that is being made.

    Attributes:
        theta: float64 scalar, 0 to 1, on the device of the targets once there were any.
        off: whether theta is 0 for good: anchored targets are samples.
        met: whether targets were anchored.
    """

    def __init__(self, theta: float | None = None) -> None:
        """Begin with a fixed theta, 0 to 1; None estimates it from past steps, beginning at 0."""
        if theta is not None and not 0 <= theta <= 1:
            raise UsageError(f"anchor is {theta:g}; the scale of the control variate is 0 to 1.")
        self.estimated, self.off, self.met = theta is None, theta == 0, False
        self.theta = torch.full((), theta or 0.0, dtype=torch.float64)
        self._past = torch.zeros(FIGURES, dtype=torch.float64)
        self._step = torch.zeros(FIGURES, dtype=torch.float64)

    def add(self, figures: Tensor, count: Tensor) -> None:
        """Count some positions of the present step.

        Args:
            figures: [n, 5], or their sum [5].
            count: what the loss of these positions is divided by; infinity counts nothing.
        """
        total = figures.reshape(-1, FIGURES).sum(0, dtype=torch.float64)
        total = torch.where(count.isfinite(), total, 0)
        if self._step.device != total.device:
            for name in ("theta", "_past", "_step"):
                setattr(self, name, getattr(self, name).to(total.device))
        self._step += total
        self.met = True

    def update(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """End the step: theta becomes that of all steps so far. Nothing waits for the device.

        Args:
            reduce: adds a tensor up over all workers.
        """
        if not (self.estimated and self.met):
            return
        step = self._step if reduce is None else reduce(self._step)
        # A step that overflowed is skipped by whoever scales gradients, and here.
        step = torch.where(step.isfinite().all(), step, 0)
        self._past = _KEPT * self._past + step
        self._step = torch.zeros_like(self._step)
        gain, cost, short, squares, spread = self._past
        tiny = torch.finfo(torch.float64).tiny
        unmet = (short - _DEVIATIONS * spread.sqrt()).clamp_min(0)
        theta = (gain / (cost + unmet.square()).clamp_min(tiny)).clamp(0, 1)
        draws = cost.square() / squares.clamp_min(tiny)
        doubt = _DOUBT / (1 + draws / _DRAWS)
        trusted = (1 + doubt) * theta.square() / (theta.square() + doubt)
        self.theta = (theta * trusted).clamp(0, 1)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` continues from, between two steps; JSON keeps it exactly."""
        return {"theta": self.theta.item(), "past": self._past.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; a fixed theta stays."""
        if self.estimated:
            self.theta = self.theta.new_tensor(state["theta"])
            self._past = self._past.new_tensor(state["past"])
            self._step = torch.zeros_like(self._past)


def weighted(figures: Tensor, each: Tensor | None) -> Tensor:
    """Figures [n, 5] of positions that weigh `each` [n] in the loss; None: 1."""
    if each is None:
        return figures
    each = each.detach().to(figures)
    return torch.stack([f * each**k for f, k in zip(figures.unbind(-1), _POWERS, strict=True)], -1)


def applied(anchor: Anchor | None, targets: object) -> Anchor | None:
    """The anchor, where it changes a gradient that is being computed."""
    if anchor is None or anchor.off or not isinstance(targets, AnchoredTargets):
        return None
    return anchor if torch.is_grad_enabled() else None


def control(
    log_q: Tensor, targets: AnchoredTargets, theta: Tensor, over: Vocabulary = WHOLE
) -> tuple[Tensor, Tensor]:
    """What the control variate adds to the weights of a sample: the readable form.

    Args:
        log_q: [n, V] the student's log-probabilities at the targets' temperature.
        targets: n positions.
        theta: scalar.
        over: what the ids are summed over.

    Returns:
        [n, V], to be added to the weights; and of each position [n, 5] what theta is estimated
        from.
    """
    q = log_q.detach().exp()
    w, r = targets.weights.to(q), targets.inverse.to(q)
    in_head = torch.arange(w.shape[1], device=w.device) < targets.heads[:, None]
    head = over.spread(q, targets.ids, in_head.to(q)) > 0
    p_head = over.spread(q, targets.ids, w * in_head)
    q_tail = q.masked_fill(head, 0)
    common = (torch.minimum(p_head, q) * head).sum(-1, keepdim=True)
    sums = p_head.sum(-1, keepdim=True), q_tail.sum(-1, keepdim=True), common
    in_heads, m_q, common = over.total(*sums)
    (most,) = over.most(q_tail.amax(-1, keepdim=True))
    m_p, m_q = (1 - in_heads).clamp_min(0), m_q.clamp_min(torch.finfo(q.dtype).tiny)
    o = common + torch.minimum(m_p, m_q)
    trusted = o.square() * m_p
    trusted = trusted * _agreed(trusted * most / m_q, m_p, r)
    c = trusted * (q_tail / m_q)
    met = over.pick(c, targets.ids)
    total = (met * r).sum(-1, keepdim=True)
    added = total * (q_tail / m_q) - c * over.spread(q, targets.ids, r)
    return theta.to(q) * added, _figures(w, met, r, trusted - total)


def control_of_entries(
    q: Tensor,
    outside: Tensor,
    largest: Tensor,
    own: Tensor,
    w: Tensor,
    same: Tensor,
    first: Tensor,
    inverse: Tensor,
    heads: Tensor,
    theta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`control` of the fused loss, which knows the entries and one sum over all other ids.

    Args:
        q: [n, E] the student's probabilities of the entries; the last one is the label's.
        outside: [n, 1] its probability of all other ids.
        largest: [n, 1] the largest one of them.
        own: [n, E] weight of each entry's id, and w [n, E] of the entry.
        w: see `own`.
        same: bool [n, E, E], which entries are of one id.
        first: bool [n, E], which are the first of their id.
        inverse: [n, E - 1], see `AnchoredTargets`.
        heads: [n], see there.
        theta: scalar.

    Returns:
        [n, 1] what is added to the weight of each id outside the entries, as a multiple of its q;
        [n, E] what is added to the entries' ids; and [n, 5] the figures.
    """
    r = F.pad(inverse, (0, 1))
    in_head = torch.arange(q.shape[1], device=q.device) < heads[:, None]
    kept = (same & in_head[:, None, :]).any(-1)

    def total(chosen: Tensor, values: Tensor) -> Tensor:
        return torch.where(chosen & first, values, 0).sum(-1, keepdim=True)

    m_p = (1 - total(kept, own)).clamp_min(0)
    m_q = (outside + total(~kept, q)).clamp_min(torch.finfo(q.dtype).tiny)
    trusted = (total(kept, torch.minimum(own, q)) + torch.minimum(m_p, m_q)).square() * m_p
    share = torch.where(kept, 0, q / m_q)
    most = torch.maximum(share.amax(-1, keepdim=True), largest / m_q)
    trusted = trusted * _agreed(trusted * most, m_p, r)
    c = trusted * share
    met = (c * r).sum(-1, keepdim=True)
    added = met * share - c * (same * r[:, None, :]).sum(-1)
    return theta * met / m_q, theta * added, _figures(w, c, r, trusted - met)


def _agreed(most: Tensor, m_p: Tensor, r: Tensor) -> Tensor:
    """f [n, 1] of positions whose largest variate is `most` [n, 1]; r [n, E]."""
    limit = 1.25 * m_p / (r > 0).sum(-1, keepdim=True).clamp_min(1)
    return (limit / most.clamp_min(torch.finfo(most.dtype).tiny)).clamp_max(1).square()


def _figures(w: Tensor, c: Tensor, r: Tensor, short: Tensor) -> Tensor:
    """[n, 5] of entries with weights w, variates c at theta = 1 and inverses r, all [n, E]."""
    gain, cost = w * c * (r - 1) * (r > 0), c.square() * r * (r - 1)
    sums = [x.sum(-1, keepdim=True) for x in (gain, cost, cost.square())]
    return torch.cat([*sums[:2], short, sums[2], short.square()], -1)
