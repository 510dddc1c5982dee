"""One slice of logits and its targets in, the gradient of their loss out, in the same memory.

The passes over [n, V] of `kdcache.loss.fused`, one for each kind of target: each replaces a slice
of the student's logits by the gradient of the loss with respect to them, and returns the sums of
the losses. In place throughout: on a CPU a pass over the logits costs more than its arithmetic.
Compiled, each is one kernel or two.

Entropies of a student's logits need no gradient: with the product with the output layer, one of the
three that a loss has, they take a pass over each block while it is in a processor's cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.loss.anchor import control_of_entries, weighted
from kdcache.loss.vocabulary import WHOLE, Vocabulary
from kdcache.targets.device import compiles

Pass = Callable[..., Any]

EAGER = 2**26  # logits of a block on a GPU without a compiler

# Logits of a slice, and of a block of it, for entropies on a CPU: the product wants many positions,
# and fresh memory costs as much as the passes, which want a block in the cache.
_SLICE, _BLOCK = 2**22, 2**17


def slice_rows(
    n: int, width: int, size: int, device: torch.device, rows: int | None, over: Vocabulary = WHOLE
) -> int:
    """Positions in a slice, evened out so that the last slice is not a sliver."""
    if rows is None:
        # A GPU wants large products. On a CPU the buffer has 64 MiB, or a quarter of the weight: a
        # slice's products read the weight three times, which costs more than a larger buffer.
        budget, most = (2**29, 16384) if device.type == "cuda" else (2**24, 1024)
        if over.cut and device.type == "cuda" and not compiles():
            budget = EAGER  # a slice is one block
        least = 64 if device.type == "cuda" else max(64, size // 4)
        rows = min(max(budget // max(width, 1), least), most)
    slices = max(-(-n // rows), 1)
    return max(-(-n // slices), 1)


def project_(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Fill a buffer with ``hidden @ weight.T + bias``."""
    if bias is None:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.addmm(bias, hidden, weight.T, out=out)


def cap_(z: Tensor, cap: float) -> Tensor:
    """Replace x by ``cap * tanh(x / cap)``; returns the slope at x, in the dtype of x."""
    share = (z.to(torch.promote_types(z.dtype, torch.float32)) / cap).tanh()
    z.copy_(share * cap)
    return (1 - share.square()).to(z.dtype)


def sparse_pass(
    z: Tensor,
    x: Tensor,
    ids: Tensor,
    w: Tensor,
    rest: Tensor,
    valid: Tensor,
    each: Tensor,
    alpha: Tensor,
    inverse_t: Tensor,
    unit: bool,
    exact: bool,
    inverse: Tensor | None = None,
    heads: Tensor | None = None,
    theta: Tensor | None = None,
    over: Vocabulary = WHOLE,
) -> tuple[Tensor, Tensor]:
    """One slice against sparse targets: z becomes the gradient outside the entries.

    The entries (the target's ids and, last, the label) were cut out of z, so that the mass outside
    them is a separate sum and not one minus something, which float32 could not resolve for a
    confident student.

    Args:
        z: [n, V] logits with -inf at the entries; overwritten.
        x: [n, E] logits of the entries.
        ids: [n, E] ids of the entries; repetitions (a label among the targets, padding slots) are
            counted once.
        w: [n, E - 1] weights of the targets.
        rest: [n] teacher's mass of the tail bucket, 0 where there is none.
        valid: [n] weight of the position where it has a label, else 0.
        each: [n] weight of the position.
        alpha: scalar; as are 1 / T, and two static flags (see `kdcache.loss.fused`).
        inverse_t: 1 / T.
        unit: T = 1.
        exact: add the teacher's negative entropy: KL instead of cross-entropy.
        inverse: [n, E - 1] inverse inclusion probabilities of anchored targets.
        heads: [n] entries of their head.
        theta: scalar, see `kdcache.loss.anchor`.
        over: what the logits are summed over; entries of other ranks have the logit -inf.

    Returns:
        [2] summed hard and soft loss (anchored [7]: with an anchor's figures), and [n, E] gradient
        of the entries.
    """
    # The label is an entry without a weight: one path for both, and no second look-up.
    w = F.pad(w, (0, 1))
    rest, valid, each = rest[:, None], valid[:, None], each[:, None]
    # An id may stand twice among the entries: its logit counts once, its weights add up.
    place = torch.arange(ids.shape[1], device=ids.device)
    same = ids[:, :, None] == ids[:, None, :]
    first = ~(same & (place[:, None] > place)).any(-1)
    own = (same * w[:, None, :]).sum(-1)
    # A label that the target does not list belongs to the tail.
    listed = own > 0
    is_label = same[:, :, -1]

    # In place throughout: on a CPU a pass over the logits costs more than its arithmetic; compiled,
    # it makes no difference. `e` is z itself where no wider dtype is needed.
    top, x = over.most(z.amax(-1, keepdim=True).to(x.dtype), x)
    # All logits count from the largest: sums of large ones would be rounded to 1e-7 of their size.
    peak = torch.maximum(top, x.amax(-1, keepdim=True))
    e = z.to(x.dtype).sub_(torch.where(top > -torch.inf, top, 0))
    x, top = x - peak, torch.where(top > -torch.inf, top - peak, 0)
    e_soft = e if unit else e.mul(inverse_t).exp_()
    e.exp_()
    # All sums in one exchange: where the vocabulary is cut, each costs the wait for all ranks.
    inner = over.total(*(s.sum(-1, keepdim=True) for s in ((e,) if unit else (e, e_soft))))
    # The mass outside the entries and theirs are joined as logarithms: either may be tiny.
    others = inner[0].log() + top
    lse = torch.cat([others, torch.where(first, x, -torch.inf)], -1).logsumexp(-1, keepdim=True)
    if unit:
        y, top_t, others_t, lse_t = x, top, others, lse
    else:
        y, top_t = x * inverse_t, top * inverse_t
        others_t = inner[1].log() + top_t
        lse_t = torch.cat([others_t, torch.where(first, y, -torch.inf)], -1).logsumexp(
            -1, keepdim=True
        )
    tail = torch.cat([others_t, torch.where(first & ~listed, y, -torch.inf)], -1).logsumexp(
        -1, keepdim=True
    )
    # Where the entries are the whole vocabulary there is no tail, and 0 times infinity is NaN.
    has_tail = tail > -torch.inf
    tail = torch.where(has_tail, tail, 0)
    rest = torch.where(has_tail, rest, 0)
    mass = w.sum(-1, keepdim=True) + rest

    hard = valid * (lse - x[:, -1:])
    # Weights of a sample sum to their mass and not to 1, so it multiplies the normaliser.
    soft = mass * lse_t - (w * y).sum(-1, keepdim=True) - rest * tail
    if exact:
        soft = soft + torch.xlogy(w, w).sum(-1, keepdim=True) + torch.xlogy(rest, rest)
    soft = each * soft / inverse_t**2

    # Differences of logarithms, whose exponents are at most 0: nothing overflows.
    q, others_q = (y - lse_t).exp(), (others_t - lse_t).exp()
    sums = torch.stack([hard.sum(), soft.sum()])
    mass_outside, added = mass, torch.zeros_like(own)
    if inverse is not None and heads is not None and theta is not None:
        largest = (top_t - lse_t).exp() * others_q.sign()
        outside, added, figures = control_of_entries(
            q, others_q, largest, own, w, same, first, inverse, heads, theta
        )
        mass_outside = mass - outside
        sums = torch.cat([sums, weighted(figures, each[:, 0]).sum(0)])
    c_hard, c_soft = alpha * valid, (1 - alpha) * each / inverse_t
    a_hard = c_hard * (top - lse).exp()
    # exp(top_t - tail) <= 1 where others exist; where none do, z is -inf throughout and the factor
    # must only be finite.
    a_soft = c_soft * (
        mass_outside * (top_t - lse_t).exp() - rest * (top_t - tail).clamp_max(0).exp()
    )
    # At T = 1 both losses have the same probabilities: one product instead of two.
    z.copy_(e.mul_(a_hard + a_soft) if unit else e.mul_(a_hard).addcmul_(e_soft, a_soft))
    d_soft = mass * q - own - torch.where(listed, 0, rest * (y - tail).clamp_max(0).exp()) - added
    d_entries = c_hard * ((x - lse).exp() - is_label.to(x.dtype)) + c_soft * d_soft
    return sums, d_entries


def dense_pass(
    z: Tensor,
    x: Tensor,
    teacher: Tensor,
    label: Tensor,
    valid: Tensor,
    each: Tensor,
    alpha: Tensor,
    inverse_t: Tensor,
    unit: bool,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    """One slice against full teacher logits [n, V]: as `sparse_pass`, with one entry, the label.

    z keeps the label's logit: only its gradient is made apart, in float32.
    """
    assert exact, "dense targets are exact"
    valid, each = valid[:, None], each[:, None]
    logits = z.to(x.dtype)
    student = torch.log_softmax(logits, -1)
    if not unit:  # counted from the largest: a product with 1 / T would round large logits
        logits = (logits - logits.amax(-1, keepdim=True)) * inverse_t
        teacher = (teacher - teacher.amax(-1, keepdim=True)) * inverse_t
    student_t = student if unit else torch.log_softmax(logits, -1)
    # A cache keeps logits as they are, not normalised.
    target = torch.log_softmax(teacher, -1)
    q, p = target.exp(), student.exp()
    p_t = p if unit else student_t.exp()
    # A teacher's logit of -inf (a masked id) is an outcome without mass.
    kl = torch.where(q > 0, q * (target - student_t), 0).sum(-1, keepdim=True)
    hard, soft = -valid * student.gather(1, label), each * kl / inverse_t**2
    c_hard, c_soft = alpha * valid, (1 - alpha) * each / inverse_t
    d_soft = c_soft * (p_t - q)
    d_label = c_hard * (p.gather(1, label) - 1) + d_soft.gather(1, label)
    z.copy_(c_hard * p + d_soft)
    return torch.stack([hard.sum(), soft.sum()]), d_label


def scratch_pass(
    z: Tensor,
    x: Tensor,
    teacher: Tensor,
    label: Tensor,
    valid: Tensor,
    each: Tensor,
    alpha: Tensor,
    inverse_t: Tensor,
    unit: bool,
    exact: bool,
    over: Vocabulary = WHOLE,
) -> tuple[Tensor, Tensor]:
    """`dense_pass` in place, of finite teacher logits that may be overwritten: half its time on a
    CPU, where each new [n, V] tensor leaves the cache. The one of a vocabulary that is cut.
    """
    assert exact, "dense targets are exact"
    valid, each = valid[:, None], each[:, None]
    top, peak = z.amax(-1, keepdim=True).to(x.dtype), teacher.amax(-1, keepdim=True)
    # Of all ranks, so that their sums of exponentials count from one number.
    top, peak, x = over.most(top, peak, x)
    y = z.to(x.dtype).sub_(top)  # z itself where no wider dtype is needed
    t = teacher.sub_(peak)
    y_t = y
    if not unit:
        t.mul_(inverse_t)
        y_t = y * inverse_t
    q = t.exp()
    mass = q.sum(-1, keepdim=True)
    if not over.cut:  # before its sum over ranks, a rank's own may be 0
        q.div_(mass)
    # The teacher's memory becomes the difference: a tensor of [n, V] less.
    gap = t.sub_(y_t)
    p_t = y_t.exp_()
    total_t = p_t.sum(-1, keepdim=True)
    kl = gap.mul_(q).sum(-1, keepdim=True)
    p = p_t if unit else y.exp_()
    total = total_t if unit else p.sum(-1, keepdim=True)
    if over.cut:
        kl, mass, total_t, total = over.total(kl, mass, total_t, total)
        kl = kl / mass
        q.div_(mass)
    # Both sides were counted from their largest and not normalised: the logarithms do it here.
    kl = kl - mass.log() + total_t.log()
    hard, soft = valid * (total.log() - (x - top)), each * kl / inverse_t**2
    c_hard, c_soft = alpha * valid, (1 - alpha) * each / inverse_t
    d_label = c_hard * (p.gather(1, label) / total - 1)
    d_label += c_soft * (p_t.gather(1, label) / total_t - q.gather(1, label))
    if unit:
        p.mul_((c_hard + c_soft) / total)
    else:
        p.mul_(c_hard / total).addcmul_(p_t, c_soft / total_t)
    z.copy_(p.addcmul_(q, -c_soft))
    return torch.stack([hard.sum(), soft.sum()]), d_label


@functools.cache
def compiled(function: Pass) -> Pass:
    """`function` under torch.compile."""
    fast = torch.compile(function)

    def call(z: Tensor, *rest: Any, **more: Any) -> Any:
        # The vocabulary stays a constant of the kernel; the numbers of positions and entries change
        # with every batch.
        for tensor in (z, *rest, *more.values()):
            if isinstance(tensor, Tensor) and tensor.ndim:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
                if tensor.ndim == 2 and tensor.shape[1] != z.shape[1]:
                    torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return fast(z, *rest, **more)

    return call


@torch.no_grad()
def logit_entropies(logits: Tensor) -> Tensor:
    """Entropies of softmax(logits), in nats: float32 [n], or float64 of float64.

    Args:
        logits: [n, V]; -inf has no probability.
    """
    rows = max((EAGER if logits.is_cuda else _BLOCK) // logits.shape[1], 1)
    return torch.cat([entropy_(some.clone()) for some in torch.split(logits, rows)])


@torch.no_grad()
def linear_entropies(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    cap: float | None = None,
    rows: int | None = None,
) -> Tensor:
    """`logit_entropies` of ``hidden @ weight.T + bias``, a slice of logits at a time.

    Args:
        hidden: [n, H].
        weight: [V, H].
        bias: [V'], of which V are used, or None.
        cap: see `fused_linear_distillation`.
        rows: positions in a slice. Default: as the fused loss on a GPU, fewer on a CPU.
    """
    kind, (width, size) = hidden.device.type, weight.shape
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    if rows is None and not hidden.is_cuda:
        rows = max(_SLICE // width, size // 4, 64)
    step = slice_rows(len(hidden), width, size, hidden.device, rows)
    h, w = hidden.to(dtype), weight.to(dtype)
    b = None if bias is None else bias[:width].to(dtype)
    fast = hidden.is_cuda and compiles()
    block = step if fast else max((EAGER if hidden.is_cuda else _BLOCK) // width, 1)
    buffer = torch.empty((min(step, len(h)), width), dtype=dtype, device=h.device)
    wide = torch.promote_types(dtype, torch.float32)
    scratch = (
        None if fast else torch.empty((min(block, len(h)), width), dtype=wide, device=h.device)
    )
    found = [torch.empty(0, dtype=wide, device=h.device)]
    with torch.autocast(kind, enabled=False):
        for part in torch.split(h, step):
            z = buffer[: len(part)]
            project_(part, w, b, z)
            for some in torch.split(z, block):
                if cap is not None:
                    (compiled(cap_) if fast else cap_)(some, cap)
                found.append((compiled(entropy_) if fast else entropy_)(some, scratch))
    return torch.cat(found)


def entropy_(z: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Entropies [n] of softmax(z), z [n, V]; overwrites it, and n rows of the scratch."""
    wide = torch.promote_types(z.dtype, torch.float32)
    x = z.to(wide)  # z itself where no wider dtype is needed
    # Of a logit of -inf, exp(x) x would be NaN; from -200 on exp(x) is as good as 0.
    x = x.sub_(x.amax(-1, keepdim=True)).clamp_min_(-200)
    e = x.exp() if scratch is None else torch.exp(x, out=scratch[: len(x)])
    total = e.sum(-1)
    return total.log() - e.mul_(x).sum(-1) / total


_disable: Any = torch.compiler.disable
logit_entropies, linear_entropies = _disable(logit_entropies), _disable(linear_entropies)
