"""Threshold sampling: a few weighted ids, on average over the noise the whole distribution.

For one position let p_i(T) be the teacher's probability of id i at temperature T, and give id i the
size `s_i = sum over the declared T of p_i(T)`. The sizes sum to |T|. With the threshold tau = 1/N:

1. *Head.* The h largest ids are kept for certain, h the smallest number for which, with
   S the sum of all other sizes and n = ceil(S / tau), no other size exceeds tau' = S / n.
2. *Tail.* The others lie end to end on a line of length S; the n points (u + j) tau', u uniform,
   each keep the id they fall on (systematic sampling, Madow 1949). Since no size exceeds tau', no
   id is met twice and id i is kept with probability exactly pi_i = s_i / tau'.
3. *Weights.* p_i(T) in the head, p_i(T) / pi_i = tau' p_i(T) / s_i in the tail (Horvitz-Thompson,
   with the threshold of Duffield, Lund and Thorup 2007): unbiased at every declared T at once. At a
   single T all tail weights are tau', and all weights sum to 1.

*Why h exists and the entries stay few.* Start at h0, the number of sizes above tau; then h0 + n <=
|T| N + 1, because h0 tau + S <= |T|. If some size s with tau' < s <= tau is left, move it to the
head: the rest has (S - s) / tau < (S / tau)(1 - 1/n) <= n - 1, so n falls by at least the one that
h rose by. The bound survives, tau' does not grow (what left was above the average draw), and n = 0
ends it at the latest.

*Why a sum of sizes.* The largest p_i(T) would serve as well, and keeps slightly fewer ids at equal
N; but a sum of block masses is the block mass of the sum, so one pass over the logits gives every
block's size before any normaliser is known, and the tail's shares p_i(T) / s_i sum to 1 and need
one number less.

*Quantisation is a second sample of the same kind.* The head's masses become whole multiples of 1/M
by rounding their cumulative sums, `floor(M c_k + v)` with v uniform: each is unbiased and off by
less than 1/M, and what is left of M units at each T is the tail's rounded mass. With U the tail's
units, summed over T, the number of draws is made n = ceil(U N / M) and each stands for the size U /
(M n): both follow from the head's units, so neither is stored. Given v, id i is met n s_i / S times
on average and adds U s_i / (M S); the mean of U / M over v is S, which makes it s_i: unbiased for
any n, even where rounding made n one larger than in step 1 and an id of size above S / n is met
twice (it then takes two entries). With M >= |T| N, U / M < S + |T| / M costs at most one more draw:
|T| N + 1 entries at most. The tail's shares p_i(T) / s_i become multiples of 1/R by the same
rounding. u, v and the rounding of shares use separate bits of one 53-bit number; shares, for which
16 are left, have 8 more from a hash of u and the id.

*Inverse inclusion probabilities* (for anchored samples). Given v, id i is met pi_i = n s_i / S
times on average, so 1 / pi_i = S / (n s_i) is what an entry must weigh to count a function of the
head and the student for each tail id once, on average. It is rounded to a neighbouring power of B,
up or down at random, so that the mean over the rounding is 1 / pi_i itself. That takes other bits
of that hash. float32 puts the borders between ids to a few millionths of a draw, so ids of a
smaller pi_i are met so often only on average over positions, and inverses end at 2^24. Ids of size
0 are never met: they have no inverse that could count them.

Cost: the logits are read once (per-block maximum and masses, blocks of 128 ids); then only the
blocks that can hold a head id or that a draw fell on are opened, 2 |T| N at most.
`reference_sample` does the same with a cumulative sum over the whole vocabulary; it is also the
faster one for small vocabularies. Nothing waits for the host, so the whole of it compiles into a
few kernels on CUDA.

Shapes: n positions, V ids, b blocks of B ids, K slots, m temperatures.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.targets.device.blocks import (
    BLOCK,
    find_largest,
    largest,
    open_blocks,
    probabilities,
    read_blocks,
)
from kdcache.targets.device.run import all_finite, run_encoding

_SLACK = 1e-5
"""Relative rounding error allowed in float32 sums of sizes: S / tau = 20.0000002 is 20 draws."""

LARGEST_INVERSE = 2.0**24
"""Inverse inclusion probabilities end here; the smallest is above 1/2."""


class Rule(NamedTuple):
    """The constants of a sample.

    Attributes:
        draws: N, the inverse of the threshold.
        temperatures: the declared ones.
        units: M, a head mass is a multiple of 1/M.
        share_units: R, a tail share is a multiple of 1/R.
        base: B, inverse inclusion probabilities are powers of B; 0: none are kept.
    """

    draws: int
    temperatures: tuple[float, ...]
    units: int
    share_units: int
    base: float = 0.0

    def slots(self, vocabulary: int) -> int:
        """Most entries a position can have."""
        return min(self.draws * len(self.temperatures), vocabulary) + 1


def sample_entries(logits: Tensor, u: Tensor, rule: Rule) -> dict[str, Tensor]:
    """Sample and quantise by the rule; see the module's text.

    Args:
        logits: [n, V], any float dtype, or [n, m, V], those of each temperature. Ids that must
            never be met hold -inf.
        u: float64 [n], uniform in [0, 1).
        rule: N, temperatures, M and R.

    Returns:
        "ids" int32 [n, K], K = `rule.slots(V)`: first `heads` ids kept for certain, then `draws`
        sampled ones in vocabulary order. "values" uint8 (int32 where M or R needs it) [n, K, m]:
        head slots hold units of 1/M at each T, tail slots shares in 1/R. With B, "inverse" uint8
        [n, K]: tail slots hold 2 + log_B of the inverse inclusion probability. "heads", "draws"
        int32 [n]. "finite" bool [n]: False where a logit is NaN or plus infinity, or all are minus
        infinity. Of logits [n, V] with T = 1 among the temperatures also "peak" and "normalizer",
        float32 [n], see `label_logprobs`.
    """
    # Opening up to 2 K blocks costs more than reading a small vocabulary outright.
    blocked = logits.ndim == 2 and logits.shape[-1] > 4 * rule.slots(logits.shape[-1]) * BLOCK
    run = blocked_sample if blocked else reference_sample
    return run_encoding(run, (logits, u), rule)


def split(top: Tensor, outside: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """The number of ids kept for certain, and the size of all others.

    Args:
        top: [n, K] the largest sizes, falling.
        outside: [n] the sum of all other sizes.
        draws: N.

    Returns:
        h int64 [n] and S [n].
    """
    # Sums from the small end: exact to rounding however little the head leaves.
    left = F.pad(top.flip(1).cumsum(1).flip(1), (0, 1)) + outside[:, None]
    # A rounding error above a whole number of draws must not cost one more.
    count = (left * (draws * (1 - _SLACK))).ceil()
    fits = F.pad(top, (0, 1)) * count <= left * (1 + _SLACK)
    # The first that fits is the smallest h. The padded last one always does: its size is 0.
    heads = fits.int().argmax(1, keepdim=True)
    return heads.squeeze(1), left.gather(1, heads).squeeze(1)


def _round_head(
    p: Tensor, head: Tensor, left: Tensor, u: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Head masses in whole units, and the number of draws that the tail's units make.

    Args:
        p: [n, K, m] probabilities of the largest ids.
        head: bool [n, K], which of them are kept for certain.
        left: [n] size of the tail.
        u: float64 [n].
        rule: the constants.

    Returns:
        units [n, K, m] (0 outside the head), draws int64 [n].
    """
    dither = (u * 2.0**21).frac().float()[:, None, None]  # bits 22 to 53
    mass = torch.where(head[..., None], p, 0).cumsum(1)
    # Without a tail the head is everything, and the rounding error of its sum is spread over it.
    mass = torch.where(left[:, None, None] > 0, mass, mass / mass[:, -1:].clamp_min(1e-30))
    # Edges of cumulative sums are rounded, not masses: the units then add up without a correction.
    edges = (mass * rule.units + dither).floor().clamp(0, rule.units)
    # In whole numbers, since a reader computes the number of draws from the units again.
    tail_units = (rule.units - edges[:, -1]).sum(-1).long()
    draws = (tail_units * rule.draws + rule.units - 1) // rule.units
    units = edges - F.pad(edges, (0, 0, 1, 0))[:, :-1]
    # Rounding may add a draw, and a small vocabulary leaves few slots.
    room = p.shape[1] - head.sum(1)
    return units, draws.clamp_min(0).minimum(room)


def _points(u: Tensor, heads: Tensor, draws: Tensor, slots: int, line: Tensor) -> Tensor:
    """Where each slot's draw falls on a line of length `line` [n, 1]; slot h + j holds draw j."""
    j = torch.arange(slots, device=u.device) - heads[:, None]
    step = line / draws.clamp_min(1)[:, None]
    # Rounding must not push the last point past the last id.
    return ((u[:, None].float() + j.clamp_min(0)) * step).minimum(line * (1 - 1e-6))


def _round_shares(p: Tensor, ids: Tensor, u: Tensor, units: int) -> Tensor:
    """Shares of the temperatures in each id's size p [n, K, m], in whole units, `units` in all."""
    # Bits 38 to 53, and 8 more by hash: 16 alone give nothing to shares below 2^-16 of a unit.
    dither = (u * 2.0**37).frac().float()[:, None] + (_hashed(u, ids) * 2.0**16).frac() / 2.0**16
    # A Weyl step per id, in whole numbers, keeps the entries of a position from rounding alike.
    step = ((ids * 40503) & 0xFFFF).float() / 0x10000
    share = p.cumsum(-1) / p.sum(-1, keepdim=True).clamp_min(1e-38)
    edges = (share[..., :-1] * units + (dither + step).frac()[..., None]).floor().clamp(0, units)
    return F.pad(edges, (0, 1), value=units) - F.pad(edges, (1, 0))


def _round_inverse(expected: Tensor, ids: Tensor, u: Tensor, base: float) -> Tensor:
    """Code of 1 / pi for entries that are met `expected` [n, K] times on average, uint8."""
    octaves = math.log2(base)
    # At least base^-2: that has code 0.
    inverse = (1 / expected.clamp_min(1 / LARGEST_INVERSE)).clamp_min(base**-2)
    power = (inverse.log2() / octaves).floor()
    low, high = (power * octaves).exp2(), ((power + 1) * octaves).exp2()
    # Up with the probability that makes the mean of both powers the inverse itself.
    up = _hashed(u, ids) * (high - low) < inverse - low
    return (power + 2 + up).clamp_min(0).to(torch.uint8)


def _hashed(u: Tensor, ids: Tensor) -> Tensor:
    """A number in [0, 1) for each id [n, K] of a position: all bits of u [n], mixed anew."""
    # Multiply and xor-shift as in splitmix64; factors are below 2^63, since int64 has a sign.
    state = (u * 2.0**53).long()[:, None] ^ (ids.long() * 0x1E3779B97F4A7C15)
    for factor in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        state = (state ^ (state >> 31)) * factor
    return ((state >> 40) & 0xFFFFFF).float() / 2.0**24


def _entries(
    ids: Tensor,
    p: Tensor,
    head: Tensor,
    units: Tensor,
    left: Tensor,
    draws: Tensor,
    u: Tensor,
    finite: Tensor,
    rule: Rule,
) -> dict[str, Tensor]:
    """The result of `sample_entries`; p [n, K, m] are the probabilities of ids [n, K]."""
    small = max(rule.units, rule.share_units) < 256
    values = torch.where(head[..., None], units, _round_shares(p, ids, u, rule.share_units))
    found = {
        "ids": ids.int(),
        "values": values.to(torch.uint8 if small else torch.int32),
        "heads": head.sum(1).int(),
        "draws": draws.int(),
        "finite": finite,
    }
    if rule.base:
        expected = p.sum(-1) * draws[:, None] / left.clamp_min(1e-38)[:, None]
        found["inverse"] = _round_inverse(expected, ids, u, rule.base)
    return found


def reference_sample(logits: Tensor, u: Tensor, rule: Rule) -> dict[str, Tensor]:
    """Threshold sampling by a cumulative sum over the whole vocabulary; see `sample_entries`."""
    z = logits.float()
    temperatures, slots = rule.temperatures, rule.slots(z.shape[-1])
    peak = z.amax(-1, keepdim=True)
    x = z - peak
    each = x.unbind(1) if x.ndim == 3 else (x,) * len(temperatures)
    weights = [
        part.exp() if t == 1 else (part / t).exp_()
        for part, t in zip(each, temperatures, strict=True)
    ]
    normalizer = torch.stack([w.sum(-1) for w in weights], -1)
    # In inside: a copy of [n, V] would double the memory of the reference.
    size = weights[0].div_(normalizer[:, :1])
    for i, w in enumerate(weights[1:], 1):
        size.addcdiv_(w, normalizer[:, i, None])
    top, top_ids = largest(size, slots - 1)
    outside = size.scatter_(1, top_ids, 0).sum(-1)
    heads, left = split(top, outside, rule.draws)

    head = torch.arange(slots, device=z.device) < heads[:, None]
    # The line on which the draws fall: the tail's sizes end to end, the head taken out.
    line = size.scatter_(1, top_ids, torch.where(head[:, :-1], 0, top)).cumsum_(-1)
    top_ids = F.pad(top_ids, (0, 1))  # the last slot is never a head: K - 1 were looked for

    def of(ids: Tensor) -> Tensor:
        parts = [
            (part.gather(1, ids) / t).exp() for part, t in zip(each, temperatures, strict=True)
        ]
        return torch.stack(parts, -1) / normalizer[:, None]

    p_top = of(top_ids)
    units, draws = _round_head(p_top, head, left, u, rule)
    points = _points(u, heads, draws, slots, line[:, -1:])
    drawn = torch.searchsorted(line, points, right=True).clamp_max(z.shape[-1] - 1)
    ids = torch.where(head, top_ids, drawn)
    finite = all_finite(peak.flatten(1), normalizer)
    entries = _entries(ids, of(ids), head, units, left, draws, u, finite, rule)
    return entries if z.ndim == 3 else {**entries, **_at_one(peak, normalizer, temperatures)}


def blocked_sample(logits: Tensor, u: Tensor, rule: Rule) -> dict[str, Tensor]:
    """Threshold sampling in one pass over the logits: the reference's draws, up to rounding."""
    temperatures, slots = rule.temperatures, rule.slots(logits.shape[-1])
    blocks = read_blocks(logits, temperatures)
    peak, normalizer = blocks.peak, blocks.normalizer

    candidates, opened, values, indices, top_ids = find_largest(logits, blocks, slots - 1)
    p_top = torch.stack(probabilities(values, peak, normalizer, temperatures), -1)
    top = p_top.sum(-1)
    inner = _add(probabilities(opened, peak, normalizer, temperatures)).flatten(1)
    # Subtracting the head from its blocks' masses would leave rounding noise of the head's size:
    # the candidate blocks are open anyway, so what is left in them is summed afresh.
    remaining = inner.scatter(1, indices, 0).view_as(opened).sum(-1)
    mass = blocks.mass.sum(-1).scatter(1, candidates, remaining)
    heads, left = split(top, mass.sum(-1), rule.draws)

    head = torch.arange(slots, device=logits.device) < heads[:, None]
    inner = inner.scatter(1, indices, torch.where(head[:, :-1], 0, top)).view_as(opened)
    mass = mass.scatter(1, candidates, inner.sum(-1))
    line = mass.cumsum(-1)
    units, draws = _round_head(F.pad(p_top, (0, 0, 0, 1)), head, left, u, rule)
    points = _points(u, heads, draws, slots, line[:, -1:])
    block = torch.searchsorted(line, points, right=True).clamp_max(mass.shape[1] - 1)

    # Where each block sits among the candidates, without their head ids; -1: nowhere.
    seats = torch.arange(candidates.shape[1], device=logits.device).expand_as(candidates)
    # A table over all blocks, because comparing each draw with each candidate would be [n, K, K].
    seat = torch.full_like(mass, -1, dtype=torch.int64).scatter(1, candidates, seats)
    seat = seat.gather(1, block)
    row = torch.arange(len(logits), device=logits.device)[:, None]
    known = inner[row, seat.clamp_min(0)]
    # Also opened where the block is known: a branch by data would make the host wait.
    fresh = _add(probabilities(open_blocks(logits, block), peak, normalizer, temperatures))
    cumulative = torch.where((seat >= 0)[..., None], known, fresh).cumsum(-1)
    # The point's offset inside its block, on the scale of the block's own sum.
    block_mass = mass.gather(1, block)
    offset = (points - (line.gather(1, block) - block_mass)) / block_mass.clamp_min(1e-38)
    point = offset.clamp(0, 1 - 1e-6) * cumulative[..., -1]
    inside = torch.searchsorted(cumulative, point[..., None], right=True).squeeze(-1)
    drawn = (block * BLOCK + inside.clamp_max(BLOCK - 1)).clamp_max(logits.shape[-1] - 1)

    ids = torch.where(head, F.pad(top_ids, (0, 1)), drawn)
    # From the logits again, since heads and draws come from different tensors.
    z = logits.gather(1, ids).float()
    p = torch.stack(probabilities(z, peak, normalizer, temperatures), -1)
    finite = all_finite(peak, normalizer)
    entries = _entries(ids, p, head, units, left, draws, u, finite, rule)
    return {**entries, **_at_one(peak, normalizer, temperatures)}


def _at_one(peak: Tensor, normalizer: Tensor, temperatures: tuple[float, ...]) -> dict[str, Tensor]:
    """What a label's log-probability needs of the pass over all logits."""
    if 1.0 not in temperatures:
        return {}
    return {"peak": peak[:, 0], "normalizer": normalizer[:, temperatures.index(1.0)]}


def _add(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
