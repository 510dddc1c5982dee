"""The readable loss of a student with another tokenizer: plain autograd over whole logits.

    loss = alpha * CE + (1 - alpha) * (likelihood + groups)

summed over the student's positions and divided by one count, whatever part a term has: CE with the
student's own labels, and

* likelihood: for each chunk with the teacher's likelihood p and the student's q, ``tau *
  KL(Bernoulli(p ** (1 / tau)) || Bernoulli(q ** (1 / tau)))``. This is approximate likelihood
  matching (Minixhofer, Vulić and Ponti 2025, arXiv 2503.20083: a binarised f-divergence, here with
  the f of KL, of likelihoods to the power of 1 / tau), times tau: the gradient shrinks as 1 / tau,
  and with the factor its size is that of CE at any tau, so `alpha` means the same. For large tau it
  tends to ``a * log(a / b) + b - a`` of the surprisals a = -log p and b = -log q.
* groups: at positions with a distribution over groups of ids, the forward KL of
  `kdcache.loss.reference` between groups; all groups without an entry are one more outcome, the
  tail.

With one tokenizer on both sides each chunk is one token and each group one id: the first is the
binarised KL of the labels, the second the usual loss on sparse targets.

`kdcache.loss.chunks` on slices of logits: the gradient in place of the logits.

A chunk's likelihood joins several positions, so a slice holds whole chunks: then all of it is known
before its gradient is made, and the loss needs the three matrix products of cross-entropy. The
likelihood's derivative by a chunk's log-likelihood, ``1 - (1 - p') / (1 - q')`` with primes for the
power 1 / tau, is a weight of the cross-entropy of its tokens: besides plain cross-entropy it costs
nothing but sums over positions. Groups cost, at their positions, one addition of each probability
to its group and one look-up of its group's factor; on a CPU, where few ids are in groups that the
targets list, these alone, and one more sum over all ids.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.loss.reference import LossParts, scalar_count
from kdcache.targets import SparseTargets
from kdcache.targets.chunks import ChunkTargets, Groups
from kdcache.tasks import IGNORE

# Log-likelihoods this near to 0 count as this: what is left of 1 - p must not vanish altogether.
NEAREST = 1e-30


def chunk_loss(
    logits: Tensor,
    labels: Tensor,
    targets: ChunkTargets,
    *,
    alpha: float | Tensor,
    vocab_size: int | None = None,
    count: float | Tensor | None = None,
) -> LossParts:
    """The readable reference: hard and soft loss of a student with a tokenizer of its own.

    Args:
        logits: [P, V'] of the student's positions; for the rest see `distillation_loss`.
        labels: int [P], the student's own next ids.
        targets: chunks of the P positions.
        alpha: weight of the hard loss, 0 to 1.
        vocab_size: V, the student's ids. Default: all.
        count: divisor of all sums. Default: P.
    """
    z = logits[:, :vocab_size]
    z = z if z.dtype == torch.float64 else z.float()
    logprobs = F.log_softmax(z, -1)
    valid = labels != IGNORE
    own = logprobs.gather(1, labels.long().masked_fill(~valid, 0)[:, None])[:, 0]
    hard = -(own * valid).sum()
    chunks = len(targets.begin)
    sums = own.new_zeros(chunks + 1).index_add(0, targets.chunk_of(own.device), own)[:chunks]
    soft = binary_divergence(targets.likelihood.to(own), sums, targets.tau).sum()
    if targets.soft is not None and targets.groups is not None and targets.positions is not None:
        positions = torch.from_numpy(targets.positions).to(own.device)
        group = targets.groups.student_on(own.device)
        soft = soft + _groups(logprobs[positions], group, targets.groups.count, targets.soft).sum()
    scale = 1 / scalar_count(own, count, None)
    hard, soft = hard * scale, soft * scale
    return LossParts(alpha * hard + (1 - alpha) * soft, hard.detach(), soft.detach())


def binary_divergence(teacher: Tensor, student: Tensor, tau: float) -> Tensor:
    """``tau * KL`` between "this text" and "any other", both probabilities to the power 1 / tau.

    Both are log-likelihoods, at most 0; tau is above 0.
    """
    p, q = teacher / tau, (student / tau).clamp_max(-NEAREST)
    certain = p > -NEAREST
    # Nothing is left of 1 - p there, not even a NaN for the gradient.
    other = torch.where(certain, -1, p)
    rest = -other.expm1() * (log1mexp(other) - log1mexp(q))
    return tau * (p.exp() * (p - q) + torch.where(certain, 0, rest))


def compared(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over chunks: of the KL between "this text" and "any other", and of the chunks on whose
    more probable outcome both agree.

    Args:
        teacher: log-likelihoods, at most 0, finite.
        student: likewise; may be minus infinity.
    """
    half = -math.log(2)
    agreed = (teacher > half) == (student > half)
    return binary_divergence(teacher, student, 1.0).sum(), agreed.sum()


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` of x below 0, exact near both ends (Mächler 2012, "Accurately computing
    log(1 - exp(-|a|))").
    """
    near = x > -math.log(2)
    # Each branch gets numbers at which its own derivative is finite.
    low, high = torch.where(near, -1, x), torch.where(near, x, -1)
    return torch.where(near, (-high.expm1()).log(), (-low.exp()).log1p())


def _groups(logprobs: Tensor, group: Tensor, count: int, targets: SparseTargets) -> Tensor:
    """Forward KL over groups of each position; cross-entropy of a sample."""
    shape = (len(logprobs), count)
    weights = logprobs.new_zeros(shape).scatter_add(1, targets.ids, targets.weights.to(logprobs))
    mass = logprobs.new_zeros(shape).scatter_add(1, group.expand_as(logprobs), logprobs.exp())
    listed = weights > 0
    log_mass = torch.where(listed, mass, 1).log()
    loss = -(weights * log_mass).sum(-1)
    if not targets.exact:
        return loss
    outside = (mass * ~listed).sum(-1)
    has_tail = outside > 0
    rest = torch.where(has_tail, targets.tail.to(logprobs), 0)
    loss = loss + torch.xlogy(weights, weights).sum(-1) + torch.xlogy(rest, rest)
    return loss - rest * torch.where(has_tail, outside, 1).log()


# On a CPU an id by itself costs what this many next to each other do.
_FEW = 8


def chunk_gradient_(
    z: Tensor, label: Tensor, valid: Tensor, targets: ChunkTargets, alpha: Tensor
) -> Tensor:
    """Replace logits [n, V] of whole chunks by the gradient of their summed loss.

    Args:
        z: [n, V]; overwritten.
        label: int64 [n, 1].
        valid: [n] 1 where there is a label, else 0; losses are made in its dtype.
        targets: of the n positions.
        alpha: weight of the hard loss.

    Returns:
        [2] hard and soft sums.
    """
    wide = valid.dtype
    x = z.gather(1, label).to(wide)
    top = z.amax(-1, keepdim=True).to(wide)
    # Without the label, so that 1 minus its probability is a sum and not a difference.
    z.scatter_(1, label, -torch.inf)
    e = z.to(wide).sub_(top).exp_()  # z itself where no wider dtype is needed
    own = (x - top).exp()
    others = e.sum(-1, keepdim=True)
    total = others + own
    sure = own > others
    logprob = torch.where(sure, -(others / own.clamp_min(1e-30)).log1p(), x - top - total.log())
    hard = -(valid * logprob[:, 0]).sum()

    chunks = len(targets.begin)
    chunk = targets.chunk_of(z.device)
    sums = valid.new_zeros(chunks + 1).index_add_(0, chunk, logprob[:, 0])[:chunks]
    teacher, tau = targets.likelihood.to(wide), targets.tau
    soft = binary_divergence(teacher, sums, tau).sum()
    p, q = teacher / tau, (sums / tau).clamp_max(-NEAREST)
    pull = torch.cat([1 - p.expm1() / q.expm1(), p.new_zeros(1)])[chunk]
    factor = ((alpha * valid + (1 - alpha) * pull)[:, None]) / total
    d_label = -factor * others
    if targets.soft is None or targets.groups is None or targets.positions is None:
        e.mul_(factor)
    else:
        positions = torch.from_numpy(targets.positions).to(z.device)
        listed = _Listed.of(e, positions, targets.groups, targets.soft)
        mine, given = own[positions], (label[positions], total[positions])
        if listed is not None:
            found, pull, own_pull = listed.derivative_(e, mine, *given, targets.soft)
            d_own = mine * own_pull * (1 - alpha)
            every_id = factor.index_add(0, positions, pull * (1 - alpha))
            listed.write_(e.mul_(every_id), factor, 1 - alpha)
        else:
            some = e if len(positions) == len(z) else e[positions]
            group = targets.groups.student_on(z.device)
            at = group[label[positions]]
            found, pull = _group_gradients(
                some, group, targets.groups.count, mine, at, targets.soft
            )
            pull *= 1 - alpha
            d_own, by_id = mine * pull.gather(1, at), pull.index_select(1, group)
            if some is e:
                e.mul_(by_id.add_(factor))
            else:
                by_id.mul_(some)
                e.mul_(factor).index_add_(0, positions, by_id)
        soft = soft + found
        d_label[positions] += d_own
    if e is not z:
        z.copy_(e)
    z.scatter_(1, label, d_label.to(z.dtype))
    return torch.stack([hard, soft])


class _Listed:
    """The student's ids in groups that targets list, one by one: a few of all on most caches.

    Attributes:
        at: int64 [t], where each is in the flat probabilities; several times where its group is.
        entry: int64 [t], the entry of its group in the flat targets.
    """

    def __init__(self, at: Tensor, entry: Tensor, positions: Tensor, groups: Groups) -> None:
        self.at, self.entry = at, entry
        self._positions, self._groups = positions, groups
        self._values = self._pull = at

    @classmethod
    def of(
        cls, e: Tensor, positions: Tensor, groups: Groups, targets: SparseTargets
    ) -> _Listed | None:
        """Those of m positions; None where all ids of each position at once are less work: on a
        GPU, whose host would wait for their number, and where they are many.

        Args:
            e: [n, V], which they are ids of.
            positions: int64 [m].
            groups: that the ids of `targets` are.
            targets: of the m positions.
        """
        if e.is_cuda or not e.is_contiguous():
            return None
        members, first = groups.members
        ids = targets.ids.reshape(-1)
        sizes = (first[ids + 1] - first[ids]) * (targets.weights.reshape(-1) > 0)
        ends = sizes.cumsum(0)
        number = int(ends[-1]) if len(ends) else 0
        if number > len(positions) * e.shape[1] // _FEW:
            return None
        entry = torch.repeat_interleave(torch.arange(len(ids)), sizes, output_size=number)
        member = torch.arange(number) - (ends - sizes)[entry]
        rows = positions.repeat_interleave(targets.ids.shape[1])[entry]
        return cls(
            rows * e.shape[1] + members[first[ids][entry] + member], entry, positions, groups
        )

    def derivative_(
        self, e: Tensor, own: Tensor, label: Tensor, total: Tensor, targets: SparseTargets
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Summed loss over groups, and its derivative.

        Args:
            e: [n, V] the student's probabilities without the label's, each row by one factor; the
                same afterwards.
            own: [m, 1] the label's, by the same factor.
            label: int64 [m, 1].
            total: [m, 1] their sum.
            targets: of the positions.

        Returns:
            The sum, and [m, 1] the derivative by an id's logit, divided by its number in `e`: of
            ids in no listed group, and of the label.
        """
        flat, shape = e.view(-1), targets.ids.shape
        w = targets.weights.to(e)
        # A group that is there several times has the weight of all of them.
        by_group = w.new_zeros((len(own), self._groups.count)).scatter_add_(1, targets.ids, w)
        weights = by_group.gather(1, targets.ids)
        mine = (targets.ids == self._groups.student[label]) & (targets.weights > 0)
        self._values = flat[self.at]
        inside = w.new_zeros(shape.numel()).index_add_(0, self.entry, self._values).view(shape)
        outside = None
        if targets.exact:
            flat[self.at] = 0
            outside = e.sum(-1, keepdim=True)[self._positions] + own * ~mine.any(-1, keepdim=True)
            flat[self.at] = self._values
        loss, base, pull = _coarse_kl(targets, weights, inside + own * mine, outside, total)
        self._pull = pull.reshape(-1)
        first = mine.to(torch.uint8).argmax(-1, keepdim=True)  # equal groups have equal values
        return loss, base, torch.where(mine.any(-1, keepdim=True), pull.gather(1, first), base)

    def write_(self, gradient: Tensor, factor: Tensor, share: Tensor) -> None:
        """Put their gradient in its place.

        Args:
            gradient: [n, V].
            factor: [n, 1] of the rest of the loss.
            share: of the loss over groups.
        """
        rows = torch.div(self.at, gradient.shape[1], rounding_mode="floor")
        values = self._values * (factor[rows, 0] + share * self._pull[self.entry])
        gradient.view(-1)[self.at] = values  # written, not added: equal ids have equal values


def _group_gradients(
    e: Tensor, group: Tensor, count: int, own: Tensor, owns: Tensor, targets: SparseTargets
) -> tuple[Tensor, Tensor]:
    """Summed loss of m positions over groups, and its derivative by each id of each group.

    Args:
        e: [m, V] the student's probabilities without the label's, all by one factor.
        group: int64 [V], of `count` groups.
        count: G.
        own: [m, 1] the label's, by the same factor.
        owns: int64 [m, 1] its group.
        targets: of the positions.

    Returns:
        The sum, and [m, G + 1] the derivative by an id's logit, divided by the id's number in `e`;
        the last column has no meaning.
    """
    used = targets.weights > 0
    ids = torch.where(used, targets.ids, count)
    mass = e.new_zeros((len(e), count + 1)).scatter_add_(1, group.expand(len(e), -1), e)
    mass.scatter_add_(1, owns, own)
    total = mass.sum(-1, keepdim=True)
    whole = torch.zeros_like(mass).scatter_add_(1, ids, targets.weights.to(e))
    inside = mass.gather(1, ids)
    outside = mass.scatter_(1, ids, 0).sum(-1, keepdim=True) if targets.exact else None
    loss, base, listed = _coarse_kl(targets, whole.gather(1, ids), inside, outside, total)
    # Written, not added: equal ids have equal values.
    return loss, mass.copy_(base.expand_as(mass)).scatter_(1, ids, listed)


def _coarse_kl(
    targets: SparseTargets, weights: Tensor, inside: Tensor, outside: Tensor | None, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss over groups, and its derivative by a logit, divided by the id's probability.

    Args:
        targets: over groups; a group may be there several times.
        weights: [m, K] of the whole group of each entry.
        inside: [m, K] the student's probability of each entry's group, by any factor.
        outside: [m, 1] of all other groups, by the same factor; None of a sample, without a tail.
        total: [m, 1] of all groups.

    Returns:
        The sum, and the derivative by ids in no listed group, [m, 1], and in each listed one.
    """
    used, w = targets.weights > 0, targets.weights.to(inside)
    # An id's probability below the smallest number is not a reason for infinities.
    least = torch.finfo(inside.dtype).tiny
    inside = torch.where(used, inside.clamp_min(least), 1)
    known = w.sum(-1, keepdim=True)
    loss = (known * total.log()).sum() - (w * inside.log()).sum()
    base = known / total
    listed = base - weights / inside
    if outside is not None:
        has_tail = outside > 0
        rest = torch.where(has_tail, targets.tail.to(inside)[:, None], 0)
        outside = torch.where(has_tail, outside.clamp_min(least), 1)
        loss += (w * torch.where(used, weights, 1).log()).sum() + torch.xlogy(rest, rest).sum()
        loss += (rest * (total.log() - outside.log())).sum()
        listed = listed + rest / total
        base = base + rest / total - rest / outside
    return loss, base, listed
