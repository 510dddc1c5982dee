"""`kdcache.loss.chunks` on slices of logits: the gradient in place of the logits.

A chunk's likelihood joins several positions, so a slice holds whole chunks: then all of it is known
before its gradient is made, and the loss needs the three matrix products of cross-entropy. The
likelihood's derivative by a chunk's log-likelihood, ``1 - (1 - p') / (1 - q')`` with primes for the
power 1 / tau, is a weight of the cross-entropy of its tokens: beside plain cross-entropy it costs
nothing but sums over positions. Groups cost, at their positions, one addition of each probability
to its group and one look-up of its group's factor; on a CPU, where few ids are in groups that the
targets list, these alone, and one more sum over all ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.loss.chunks import NEAREST, binary_divergence
from kdcache.targets import SparseTargets
from kdcache.targets.chunks import ChunkTargets, Groups

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
    if targets.soft is None or targets.groups is None or targets.places is None:
        z.copy_(e.mul_(factor))
    else:
        places = torch.from_numpy(targets.places).to(z.device)
        listed = _Listed.of(e, places, targets.groups, targets.soft)
        if listed is not None:
            given = own[places], label[places], total[places], targets.soft
            found, pull, own_pull = listed.derivative_(e, *given)
            soft = soft + found
            d_label[places] += own[places] * own_pull * (1 - alpha)
            every_id = factor.index_add(0, places, pull * (1 - alpha))
            listed.write_(e.mul_(every_id), factor, 1 - alpha)
            if e is not z:
                z.copy_(e)
            z.scatter_(1, label, d_label.to(z.dtype))
            return torch.stack([hard, soft])
        every = len(places) == len(z)
        some = e if every else e[places]
        group = targets.groups.student_on(z.device)
        found, by_group = _groups(
            some, group, targets.groups.count, own[places], group[label[places]], targets.soft
        )
        soft = soft + found
        by_group *= 1 - alpha
        d_label[places] += own[places] * by_group.gather(1, group[label[places]])
        by_id = by_group.index_select(1, group)
        if every:
            z.copy_(e.mul_(by_id.add_(factor)))
        else:
            by_id.mul_(some)
            e.mul_(factor)
            e.index_add_(0, places, by_id)
            z.copy_(e)
    z.scatter_(1, label, d_label.to(z.dtype))
    return torch.stack([hard, soft])


class _Listed:
    """The student's ids in groups that targets list, one by one: a few of all on most caches.

    Attributes:
        at: int64 [t], where each is in the flat probabilities; several times where its group is.
        entry: int64 [t], the entry of its group in the flat targets.
    """

    def __init__(self, at: Tensor, entry: Tensor, places: Tensor, groups: Groups) -> None:
        self.at, self.entry = at, entry
        self._places, self._groups = places, groups
        self._values = self._pull = at

    @classmethod
    def of(
        cls, e: Tensor, places: Tensor, groups: Groups, targets: SparseTargets
    ) -> _Listed | None:
        """Those of m positions; None where all ids of each position at once are less work: on a
        GPU, whose host would wait for their number, and where they are many.

        Args:
            e: [n, V], which they are ids of.
            places: int64 [m].
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
        if number > len(places) * e.shape[1] // _FEW:
            return None
        entry = torch.repeat_interleave(torch.arange(len(ids)), sizes, output_size=number)
        within = torch.arange(number) - (ends - sizes)[entry]
        rows = places.repeat_interleave(targets.ids.shape[1])[entry]
        return cls(rows * e.shape[1] + members[first[ids][entry] + within], entry, places, groups)

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
            targets: over groups; a group may be there several times.

        Returns:
            The sum, and [m, 1] the derivative by an id's logit, divided by its number in `e`: of
            ids in no listed group, and of the label.
        """
        flat, shape = e.view(-1), targets.ids.shape
        used = targets.weights > 0
        w = targets.weights.to(e)
        # A group that is there several times has the weight of all of them.
        by_group = w.new_zeros((len(own), self._groups.count)).scatter_add_(1, targets.ids, w)
        weights = by_group.gather(1, targets.ids)
        mine = (targets.ids == self._groups.student[label]) & used
        self._values = flat[self.at]
        inside = w.new_zeros(shape.numel()).index_add_(0, self.entry, self._values).view(shape)
        # An id's probability below the smallest number is no reason for infinities.
        least = torch.finfo(e.dtype).tiny
        inside = torch.where(used, (inside + own * mine).clamp_min(least), 1)
        known = w.sum(-1, keepdim=True)
        loss = (known * total.log()).sum() - (w * inside.log()).sum()
        base = known / total
        pull = base - weights / inside
        if targets.exact:
            flat[self.at] = 0
            outside = e.sum(-1, keepdim=True)[self._places] + own * ~mine.any(-1, keepdim=True)
            flat[self.at] = self._values
            has_tail = outside > 0
            rest = torch.where(has_tail, targets.tail.to(e)[:, None], 0)
            outside = torch.where(has_tail, outside.clamp_min(least), 1)
            loss += (w * torch.where(used, weights, 1).log()).sum() + torch.xlogy(rest, rest).sum()
            loss += (rest * (total.log() - outside.log())).sum()
            pull = pull + rest / total
            base = base + rest / total - rest / outside
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


def _groups(
    e: Tensor, group: Tensor, count: int, own: Tensor, owns: Tensor, targets: SparseTargets
) -> tuple[Tensor, Tensor]:
    """Summed loss of m positions over groups, and its derivative by each id of each group.

    Args:
        e: [m, V] the student's probabilities without the label's, all by one factor.
        group: int64 [V].
        count: G.
        own: [m, 1] the label's, by the same factor.
        owns: int64 [m, 1] its group.
        targets: over groups; a group may be there several times.

    Returns:
        The sum, and [m, G + 1] the derivative by an id's logit, divided by the id's number in `e`;
        the last column has no meaning.
    """
    used = targets.weights > 0
    ids = torch.where(used, targets.ids, count)
    w = targets.weights.to(e)
    mass = e.new_zeros((len(e), count + 1)).scatter_add_(1, group.expand(len(e), -1), e)
    mass.scatter_add_(1, owns, own)
    total = mass.sum(-1, keepdim=True)
    weights = torch.zeros_like(mass).scatter_add_(1, ids, w).gather(1, ids)  # of whole groups
    # An id's probability below the smallest number is no reason for infinities.
    least = torch.finfo(e.dtype).tiny
    inside = torch.where(used, mass.gather(1, ids).clamp_min(least), 1)
    known = w.sum(-1, keepdim=True)
    loss = (known * total.log()).sum() - (w * inside.log()).sum()
    base = known / total
    listed = base - weights / inside
    if targets.exact:
        outside = mass.scatter_(1, ids, 0).sum(-1, keepdim=True)
        has_tail = outside > 0
        rest = torch.where(has_tail, targets.tail.to(e)[:, None], 0)
        outside = torch.where(has_tail, outside.clamp_min(least), 1)
        loss += (w * torch.where(used, weights, 1).log()).sum() + torch.xlogy(rest, rest).sum()
        loss += (rest * (total.log() - outside.log())).sum()
        listed = listed + rest / total
        base = base + rest / total - rest / outside
    # Written, not added: equal ids have equal values.
    return loss, mass.copy_(base.expand_as(mass)).scatter_(1, ids, listed)
