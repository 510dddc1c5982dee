"""The readable distillation loss: plain autograd over whole logits; every divergence, every target.

Cost: several [positions, vocabulary] float32 copies. For large vocabularies see
`kdcache.loss.fused`, which is tested against this file. Where the vocabulary is cut over ranks,
each has its slice of these copies, and the ranks exchange some numbers a position.

Log-probabilities of labels, from logits or from the states below a linear head.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdcache.errors import UsageError
from kdcache.loss.anchor import Anchor, applied, control, weighted
from kdcache.loss.vocabulary import WHOLE, Cut, VocabSlice, Vocabulary, gathered, located
from kdcache.targets import (
    AnchoredTargets,
    DenseTargets,
    HiddenTargets,
    LabelTargets,
    SparseTargets,
    Targets,
)
from kdcache.targets.chunks import ChunkTargets
from kdcache.tasks import Answers, Divergence, Tail

DIVERGENCES: tuple[str, ...] = get_args(Divergence)
TAILS: tuple[str, ...] = get_args(Tail)
MAX_ADVANTAGE = 10.0
"""Advantages of `policy_gradient` are clipped to this, nats (Lightning OPD, table 6)."""


class LossParts(NamedTuple):
    """The loss and its two parts: scalars with ``total = alpha * hard + (1 - alpha) * soft``.

    Attributes:
        total: what to call ``backward`` on.
        hard: cross-entropy with the labels, nats, summed over positions and divided by the count.
        soft: T^2 times the divergence (nats; squared logits for "mse"), summed and divided alike.
    """

    total: Tensor
    hard: Tensor
    soft: Tensor


def check_names(divergence: str, tail: str) -> None:
    """Refuse an unknown divergence or tail with a `UsageError`."""
    for what, name, known in (("divergence", divergence, DIVERGENCES), ("tail", tail, TAILS)):
        if name not in known:
            raise UsageError(f"{what} {name!r} is unknown; choose one of {', '.join(known)}.")


def check_loss(
    targets: Targets | LabelTargets, *, divergence: str, tail: str, answers: Answers = "ids"
) -> None:
    """Refuse undefined combinations of options.

    Args:
        targets: the targets; those of no position will do.
        divergence: one of `DIVERGENCES`.
        tail: one of `TAILS`; only read for top-k targets.
        answers: what the targets are over, see `kdcache.tasks.TaskType`.

    Raises:
        UsageError: unknown name, a divergence that is not one of such answers, "mse" without
            dense targets or with T != 1, "reverse-kl" or "jsd" with sampled targets or with a
            renormalised top-k, "policy-gradient" with others than `LabelTargets`.
    """
    dense = isinstance(targets, (DenseTargets, HiddenTargets))
    check_names(divergence, tail)
    _check_answers(targets, divergence, answers)
    if (divergence == "policy-gradient") != isinstance(targets, LabelTargets):
        raise UsageError(
            "divergence policy-gradient is of LabelTargets, the log-probabilities of drawn labels, "
            f"and no other one is; given {divergence} and {type(targets).__name__}. Make batches "
            "with kdcache.stream.LabelReading."
        )
    if divergence == "mse":
        if not dense:
            raise UsageError(
                "divergence mse compares all logits, but this cache holds sparse targets. "
                "Build it with --codec dense or hidden:float16, or train with --divergence "
                "forward-kl."
            )
        if targets.temperature != 1:
            raise UsageError(
                "divergence mse compares raw logits and has no temperature, but "
                f"{targets.temperature:g} was given. Train with --temperature 1."
            )
    if dense or divergence == "forward-kl":
        return
    if not targets.exact:
        raise UsageError(
            f"divergence {divergence} is not linear in the teacher's probabilities, so it would be "
            "biased on sampled targets. Train with --divergence forward-kl, or build the cache "
            "with --codec topk:K or dense."
        )
    if tail == "renormalize":
        raise UsageError(
            f"divergence {divergence} is infinite where a renormalised top-k has no mass. "
            "Train with --tail bucket."
        )


def _check_answers(targets: Targets | LabelTargets, divergence: str, answers: Answers) -> None:
    """Refuse a divergence that is not one of such answers."""
    if answers != "score":
        if divergence == "huber":
            raise UsageError(
                "divergence huber compares scores, and this cache holds targets over "
                f"{'ids' if answers == 'ids' else 'classes'}. Train with --divergence forward-kl."
            )
    elif divergence not in ("mse", "huber"):
        raise UsageError(
            f"divergence {divergence} compares distributions, and this cache holds scores. Train "
            "with --divergence mse or huber."
        )
    elif targets.temperature != 1:
        raise UsageError(
            f"a score has no temperature, but {targets.temperature:g} was given. Leave "
            "--temperature out."
        )
    if answers in ("labels", "score") and not isinstance(targets, DenseTargets):
        raise UsageError(f"targets of {answers} are logits of each. Build with --codec dense.")


def distillation_loss(
    logits: Tensor,
    labels: Tensor,
    targets: Targets | LabelTargets,
    *,
    alpha: float | Tensor,
    divergence: str = "forward-kl",
    tail: str = "bucket",
    vocab_size: int | None = None,
    count: float | Tensor | None = None,
    position_weights: Tensor | None = None,
    anchor: Anchor | None = None,
    group: Cut = None,
) -> LossParts:
    """The readable reference: hard and soft loss from the student's logits.

    Soft part of one position, with q the targets and p = softmax(logits / T):

    * dense, and top-k with its tail: the divergence itself. "bucket" puts everything outside the
      top k into one more outcome, on both sides; "renormalize" (forward-kl only) scales the
      teacher's top k to sum to 1 and leaves p as it is.
    * sampled: cross-entropy form, ``sum_i w_i (logsumexp(z / T) - z_i / T)``. It is unbiased for
      the cross-entropy with the teacher, so its gradient is unbiased for KL's; it exceeds KL by the
      teacher's entropy.
    * anchored, with an anchor: the same value, and a gradient with the control variate of
      `kdcache.loss.anchor`, whose mean is the same too.
    * "mse" (Tang et al. 2019, equation 4): squared error of the logits, mean over classes, no T^2.
    * "policy-gradient": see `policy_gradient`.

    Args:
        logits: [n, V'] of any float dtype; the loss works in float32, or in float64 if they are
            float64. Or this rank's columns of them, as a DTensor with ``Shard(1)`` or with `group`.
        labels: int [n], -100 where there is none.
        targets: n positions, at the temperature T of the soft part.
        alpha: weight of the hard loss, 0 to 1.
        divergence: "forward-kl" KL(q || p), "reverse-kl" KL(p || q), "jsd" (their mean to the
            mixture), "mse"; or "policy-gradient", of `LabelTargets` alone.
        tail: for top-k targets, "bucket" or "renormalize".
        vocab_size: V, the teacher's vocabulary; columns from V on (padding of the student) take no
            part. Default: all, or the dense targets' own width.
        count: divisor of the sums, for normalising over several batches or ranks. Default: n, or
            the sum of `position_weights`.
        position_weights: [n] weight of each position. Default: 1.
        anchor: theta of anchored targets, which also counts this step. Default: theta = 0.
        group: the ranks that the vocabulary is cut over, in their order: a process group, whose
            ranks tell each other how many outputs each has in every call, or a `VocabSlice`, which
            was made once. All of them have the same positions, labels and targets, and get the same
            loss; sums over ranks, such as an anchor's, are those over other positions. Default: the
            vocabulary is whole.

    Raises:
        UsageError: see `check_loss`; also logits narrower than the vocabulary.
    """
    check_loss(targets, divergence=divergence, tail=tail)
    temperature = targets.temperature
    logits, over, size = located(logits, 1, group, len(labels))
    width = student_width(size, targets, vocab_size)
    ids = over.rows(width)
    z = logits[:, : ids.stop - ids.start]
    z = over.widened(z if z.dtype == torch.float64 else z.float())
    if isinstance(targets, HiddenTargets):
        targets = targets.dense(z.dtype, ids)
    elif isinstance(targets, DenseTargets) and over.cut:
        targets = DenseTargets(targets.logits[:, ids], temperature)
    valid = labels >= 0
    label = labels.long().masked_fill(~valid, 0)[:, None]
    hard = -over.pick(over.log_softmax(z), label)[:, 0] * valid
    if isinstance(targets, LabelTargets):
        soft = policy_gradient(-hard, targets) * valid
    elif divergence == "mse":
        assert isinstance(targets, DenseTargets), "check_loss let sparse targets through"
        error = (over.own(z) - targets.logits.to(z)).square().sum(-1, keepdim=True)
        soft = over.total(error)[0][:, 0] / width
    else:
        heated = _heated(z, temperature, over)
        soft = temperature**2 * _divergence(heated, targets, divergence, tail, over)
    anchor = applied(anchor, targets)
    if anchor is not None and isinstance(targets, AnchoredTargets):
        log_q = over.log_softmax(_heated(z, temperature, over))
        added, figures = control(log_q, targets, anchor.theta.to(z.device), over)
        (pull,) = over.total(-(over.own(added) * over.own(log_q)).sum(-1, keepdim=True))
        pull = pull[:, 0]
        soft = soft + temperature**2 * (pull - pull.detach())
        anchor.add(weighted(figures, position_weights), scalar_count(hard, count, position_weights))
    return loss_parts(hard, soft, alpha, count, position_weights)


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


def sliced_linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    targets: Targets | LabelTargets,
    *,
    alpha: float | Tensor,
    divergence: str = "forward-kl",
    tail: str = "bucket",
    vocab_size: int | None = None,
    count: float | Tensor | None = None,
    position_weights: Tensor | None = None,
    cap: float | None = None,
    rows: int = 1024,
    group: Cut = None,
) -> LossParts:
    """`distillation_loss` of ``hidden @ weight.T + bias``, slice by slice, for any divergence.

    Each slice's logits are made again in the backward pass (one more matrix product than the fused
    form), so the logits of all positions never exist together. Anchored targets count as samples.

    Arguments, result and errors are those of `fused_linear_distillation`; any divergence is taken.
    """
    weight, over, _ = located(weight, 0, group, len(hidden))
    if bias is not None:
        bias, *_ = located(bias, 0, None, len(hidden))
    hidden, summed = gathered(hidden, over, group)
    if not summed:
        hidden = over.shared(hidden)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    like = torch.empty((len(hidden), 0), dtype=wide, device=hidden.device)
    divisor = scalar_count(like, count, position_weights)

    def part(start: int, h: Tensor, w: Tensor, b: Tensor | None) -> LossParts:
        piece = slice(start, start + rows)
        return distillation_loss(
            soft_capped(F.linear(h, w, b), cap),
            labels[piece],
            targets[piece],
            alpha=alpha,
            divergence=divergence,
            tail=tail,
            vocab_size=vocab_size,
            count=divisor,
            position_weights=None if position_weights is None else position_weights[piece],
            group=over if isinstance(over, VocabSlice) else None,
        )

    # At least one slice, so that an empty batch is connected to the weight too (DDP waits for it).
    slices = [
        LossParts(*checkpoint(part, a, hidden[a : a + rows], weight, bias, use_reentrant=False))
        for a in range(0, max(len(hidden), 1), rows)
    ]
    return LossParts(*(torch.stack(parts).sum(0) for parts in zip(*slices, strict=True)))


def soft_capped(x: Tensor, cap: float | None) -> Tensor:
    """``cap * tanh(x / cap)``: x near 0, never beyond the cap (Gemma 2); x itself without a cap."""
    return x if cap is None else cap * (x / cap).tanh()


def _heated(z: Tensor, temperature: float, over: Vocabulary) -> Tensor:
    """z [n, V] / T, counted from each row's largest: dividing large logits would round them."""
    if temperature == 1:
        return z
    (top,) = over.most(z.detach().amax(-1, keepdim=True))
    return (z - top) / temperature


def _divergence(
    z: Tensor,
    targets: DenseTargets | SparseTargets,
    divergence: str,
    tail: str,
    over: Vocabulary = WHOLE,
) -> Tensor:
    """Divergence of each position; z [n, V] is already divided by T."""
    student = over.log_softmax(z)
    if isinstance(targets, DenseTargets):
        logits = over.widened(targets.logits.to(z))
        teacher = over.log_softmax(_heated(logits, targets.temperature, over))
        return over.total(coarse_divergence(teacher, student, divergence)[:, None])[0][:, 0]
    w, ids = targets.weights.to(z), targets.ids
    entries = over.pick(student, ids)
    if not targets.exact:
        return -(w * entries).sum(-1)
    used = w > 0
    nothing = torch.full_like(w, -torch.inf)
    teacher = torch.where(used, w.clamp_min(torch.finfo(w.dtype).tiny).log(), nothing)
    chosen = torch.where(used, entries, nothing)
    if tail == "renormalize":
        total = w.sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        return coarse_divergence(teacher - total.log(), chosen, divergence)
    inside = over.spread(z, ids, w) > 0
    # A top-k of the whole vocabulary has no tail: there is no outcome to compare, whatever rounding
    # left in `rest`.
    (left,) = over.most((~over.own(inside)).any(-1, keepdim=True).to(z))
    has_tail = left > 0
    outside = torch.where(
        has_tail,
        over.logsumexp(student.masked_fill(inside & has_tail, -torch.inf)),
        nothing[:, :1],
    )
    # Probabilities were stored as float32: a tail below its resolution is unknown, not impossible.
    rest = targets.tail.to(z)[:, None]
    floor = 0.0 if divergence == "forward-kl" else torch.finfo(torch.float32).eps
    rest = torch.where(has_tail, rest.clamp_min(floor), 0)
    log_rest = torch.where(
        rest > 0, rest.clamp_min(torch.finfo(w.dtype).tiny).log(), nothing[:, :1]
    )
    return coarse_divergence(
        torch.cat([teacher, log_rest], -1), torch.cat([chosen, outside], -1), divergence
    )


def coarse_divergence(teacher: Tensor, student: Tensor, divergence: str) -> Tensor:
    """Divergence over m outcomes, both sides as log-probabilities [n, m]; -inf: no such outcome."""
    if divergence == "forward-kl":
        return _kl(teacher, student)
    if divergence == "reverse-kl":
        return _kl(student, teacher)
    mixture = torch.logaddexp(
        *(x.clamp_min(torch.finfo(x.dtype).min) for x in (teacher, student))
    ) - torch.log(teacher.new_tensor(2.0))
    return (_kl(teacher, mixture) + _kl(student, mixture)) / 2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities; outcomes with p = 0 add nothing, not even NaN gradients."""
    possible = p > -torch.inf
    p, q = torch.where(possible, p, 0), torch.where(possible, q, 0)
    return torch.where(possible, p.exp() * (p - q), 0).sum(-1)


def loss_parts(
    hard: Tensor,
    soft: Tensor,
    alpha: float | Tensor,
    count: float | Tensor | None,
    position_weights: Tensor | None,
) -> LossParts:
    """The parts of a loss from those of each position, [n]; see `distillation_loss`."""
    if position_weights is not None:
        hard, soft = hard * position_weights.to(hard), soft * position_weights.to(soft)
    scale = 1 / scalar_count(hard, count, position_weights)
    hard, soft = hard.sum() * scale, soft.sum() * scale
    return LossParts(alpha * hard + (1 - alpha) * soft, hard.detach(), soft.detach())


def scalar_count(
    like: Tensor, count: float | Tensor | None, position_weights: Tensor | None
) -> Tensor:
    """The divisor as a scalar tensor like `like`; by default its length, for an empty batch 1."""
    if count is None:
        count = float(max(len(like), 1)) if position_weights is None else position_weights.sum()
    if isinstance(count, Tensor):
        return count.detach().to(like).reshape(())
    return torch.full((), count, dtype=like.dtype, device=like.device)


def student_width(
    columns: int, targets: Targets | ChunkTargets | LabelTargets, vocab_size: int | None
) -> int:
    """Number of the student's columns that take part: the teacher's vocabulary or classes."""
    width = vocab_size or columns
    if isinstance(targets, DenseTargets):
        width = targets.logits.shape[-1]
    if isinstance(targets, HiddenTargets):
        width = targets.layer.vocab_size
    if width > columns:
        raise UsageError(
            f"the student has {columns} outputs, the targets are over {width}. "
            "The student must have the teacher's vocabulary or classes (or a padded vocabulary)."
        )
    return width


_SLICE = 1 << 22  # logits at once


@torch.no_grad()
def label_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """float64 [n]: log-probabilities of labels; 0 where there is none.

    Args:
        logits: [n, V].
        labels: int [n]; below 0 where there is none.
    """
    wide = logits.dtype == torch.float64 or logits.shape[-1] <= 4096
    z = logits.double() if wide else logits.float()
    number = labels.long().clamp_min(0)[:, None]
    found = z.gather(1, number)[:, 0].double() - z.logsumexp(-1).double()
    return found.clamp_max(0).masked_fill(labels < 0, 0)


@torch.no_grad()
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    cap: float | None = None,
) -> Tensor:
    """`label_logprobs` of ``hidden @ weight.T + bias``, a slice of logits at a time.

    Args:
        hidden: [n, H].
        weight: [V, H].
        bias: [V'], of which V are used, or None.
        labels: int [n].
        cap: see `fused_linear_distillation`.
    """
    rows = max(_SLICE // len(weight), 1)
    bias = None if bias is None else bias[: len(weight)]
    found = [
        label_logprobs(
            soft_capped(torch.nn.functional.linear(some, weight.to(some), bias), cap), of_some
        )
        for some, of_some in zip(torch.split(hidden, rows), torch.split(labels, rows), strict=True)
    ]
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float64)
