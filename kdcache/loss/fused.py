"""The distillation loss of a linear head, without the [positions, vocabulary] logits.

Works in slices of positions: project, turn the slice of logits into its own gradient in place,
multiply that gradient with the weight and with the hidden states, continue. Guarantee: loss and
gradients of `kdcache.loss.distillation_loss` on ``hidden @ weight.T + bias``, up to the rounding of
the compute dtype. A model that caps its logits (Gemma 2: ``cap * tanh(x / cap)``) has them capped
in their slice, and the gradient multiplied by the cap's slope.

Cost: the three matrix products that plain cross-entropy needs too, and per slice one read of the
logits for the maximum, one for the sums and one read and write for the gradient (compiled into one
kernel on CUDA, in cache-sized blocks on a CPU). Memory: one slice of logits and one float32 matrix
of the weight's shape. A cap costs two more passes and one more slice; targets that are hidden
states cost one more product, with the teacher's output layer, and one more slice.

Where the vocabulary is cut over W ranks, each does its W-th of this. A slice of positions exchanges
two all-reduces, of the largest logits with those of the entries, and of the sums: E + 2 numbers a
position for a target of E - 1 entries and a label, E + 3 where T is not 1, 7 for hidden states. The
backward pass has one, of the hidden states' gradient in their dtype.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.loss.anchor import FIGURES, Anchor, applied
from kdcache.loss.chunks import chunk_gradient_
from kdcache.loss.passes import (
    EAGER,
    Pass,
    cap_,
    compiled,
    dense_pass,
    project_,
    scratch_pass,
    slice_rows,
    sparse_pass,
)
from kdcache.loss.reference import LossParts, check_loss, scalar_count, student_width
from kdcache.loss.vocabulary import WHOLE, Cut, Vocabulary, gathered, located
from kdcache.targets import (
    AnchoredTargets,
    DenseTargets,
    HiddenTargets,
    SparseTargets,
    Targets,
)
from kdcache.targets.chunks import ChunkTargets
from kdcache.targets.device import compiles
from kdcache.targets.output_layer import finish_


class _Options(NamedTuple):
    """What a slice needs besides its tensors.

    Numbers that a schedule may change each step are tensors: they never recompile anything.
    """

    alpha: Tensor
    inverse_t: Tensor  # 1 / T
    unit: bool  # T = 1: hard and soft parts share one softmax
    exact: bool  # targets are probabilities: report KL, not cross-entropy


def fused_linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    targets: Targets | ChunkTargets,
    *,
    alpha: float | Tensor,
    divergence: str = "forward-kl",
    tail: str = "bucket",
    vocab_size: int | None = None,
    count: float | Tensor | None = None,
    position_weights: Tensor | None = None,
    anchor: Anchor | None = None,
    cap: float | None = None,
    rows: int | None = None,
    group: Cut = None,
) -> LossParts:
    """`distillation_loss` of ``hidden @ weight.T + bias`` without ever holding these logits.

    Runs in the autocast dtype where autocast is on, else in the weight's dtype; losses and
    everything that decides the gradient are float32 (float64 for float64). Gradients are made in
    the forward pass without `count` and without the gradient that arrives from above; both are
    applied in the backward pass in float32, so neither a long batch nor float16 with a gradient
    scaler underflows. Only `total` can be differentiated; it has no second derivative.

    Args:
        hidden: [n, H] last hidden states of the positions; with `group` the same on all ranks, or
            a DTensor, whose positions may be cut over them.
        weight: [V', H] output projection; or this rank's rows of it, as a DTensor with ``Shard(0)``
            or with `group`.
        bias: [V'] or None; cut as the weight is.
        labels: see `distillation_loss`, as for the other arguments that are not here.
        divergence: must be "forward-kl".
        cap: the logits are ``cap * tanh(x / cap)`` of the layer's x. Default: x.
        rows: positions in a slice. Default: about 2^29 logits on a GPU; on a CPU 2^24, or a
            quarter of `weight`.
        group: the ranks that the output layer is cut over; see `distillation_loss`.

    Raises:
        UsageError: see `distillation_loss`; also any other divergence.
    """
    if not isinstance(targets, ChunkTargets):
        check_loss(targets, divergence=divergence, tail=tail)
    if divergence != "forward-kl":
        raise UsageError(
            f"the fused loss knows forward-kl, not {divergence}; use sliced_linear_distillation."
        )
    weight, over, size = located(weight, 0, group, len(hidden))
    if bias is not None:
        bias, *_ = located(bias, 0, None, len(hidden))
    hidden, summed = gathered(hidden, over, group)
    if over.cut and isinstance(targets, ChunkTargets):
        raise UsageError(
            "targets of chunks need the whole output layer on each rank: a student of another "
            "tokenizer cannot train with a vocabulary that is cut."
        )
    width = student_width(size, targets, vocab_size)
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def scalar(value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().to(hidden.device, wide).reshape(())
        return torch.full((), value, dtype=wide, device=hidden.device)

    t = targets.temperature
    options = _Options(scalar(alpha), scalar(1 / t), t == 1, targets.exact)
    if isinstance(targets, SparseTargets):
        targets = _prepare(targets, tail, wide)
    each = (
        torch.ones(len(hidden), dtype=wide, device=hidden.device)
        if position_weights is None
        else position_weights.detach().to(wide)
    )
    divisor = scalar_count(each, count, position_weights)
    grad = torch.is_grad_enabled()
    anchor = applied(anchor, targets)
    theta = None if anchor is None else scalar(anchor.theta)
    arguments = (each, divisor, options, width, dtype, theta, cap, rows, grad, over, summed)
    *parts, figures = _eagerly(hidden, weight, bias, labels, targets, *arguments)
    if anchor is not None:
        anchor.add(figures, divisor)
    return LossParts(*parts)


def _prepare(targets: SparseTargets, tail: str, wide: torch.dtype) -> SparseTargets:
    """Weights as they enter the loss, and a `rest` that is 0 without a bucket."""
    w, rest = targets.weights.to(wide), targets.tail.to(wide)
    if targets.exact and tail == "renormalize":
        w = w / w.sum(-1, keepdim=True).clamp_min(torch.finfo(wide).tiny)
    if not targets.exact or tail == "renormalize":
        rest = torch.zeros_like(rest)
    return replace(targets, weights=w, tail=rest)


class _Fused(torch.autograd.Function):
    """Forward: loss and unscaled gradients. Backward: scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        targets: Targets | ChunkTargets,
        each: Tensor,
        divisor: Tensor,
        options: _Options,
        width: int,
        dtype: torch.dtype,
        theta: Tensor | None,
        cap: float | None,
        rows: int | None,
        grad: bool,
        over: Vocabulary = WHOLE,
        summed: bool = False,
    ) -> tuple[Tensor, ...]:
        want_hidden, want_weight, want_bias = (grad and want for want in ctx.needs_input_grad[:3])
        n, size = hidden.shape
        step = slice_rows(n, over.share(width), size, hidden.device, rows, over)
        ids = over.rows(width)
        width = ids.stop - ids.start  # of this rank
        h, w = hidden.to(dtype), weight.detach()[:width].to(dtype)
        b = None if bias is None else bias.detach()[:width].to(dtype)
        wide = options.alpha.dtype
        padded = torch.zeros if width < len(weight) or n == 0 else torch.empty
        d_hidden = torch.empty_like(h) if want_hidden else None
        # A low-precision sum over slices would round once a slice (bfloat16: 2^-9 of the running
        # sum each time, so small contributions of late slices vanish). One float32 buffer makes the
        # result as exact as one product over all positions, and where the matrix product itself can
        # accumulate into it (`_accumulate_`) it costs no extra pass.
        d_weight = (
            padded((len(weight), size), dtype=wide, device=weight.device) if want_weight else None
        )
        d_bias = torch.zeros(len(weight), dtype=wide, device=weight.device) if want_bias else None
        sums = torch.zeros(_sums(theta), dtype=wide, device=hidden.device)
        parts = _slices(targets, n, step)
        most = max((part.stop - part.start for part in parts), default=0)
        # Spare columns: of a whole vocabulary none. As many as keep rows of logits aligned.
        columns = -(-(width + 1) // _ALIGNED) * _ALIGNED if over.cut else width
        buffer = torch.empty((most, columns), dtype=dtype, device=hidden.device)
        rebuilt = _Rebuilt(buffer, wide, ids) if isinstance(targets, HiddenTargets) else None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in parts:
                whole = buffer[: part.stop - part.start]
                z = whole[:, :width]
                project_(h[part], w, b, z)
                some = targets[part]
                if isinstance(some, HiddenTargets):
                    assert rebuilt is not None, "all slices are of one kind"
                    some = rebuilt(some)
                given = labels[part], some, each[part]
                sums += _logits_to_gradient_(whole, *given, options, cap, theta, over, ids)
                if d_hidden is not None:
                    torch.mm(z, w, out=d_hidden[part])
                if d_weight is not None:
                    _accumulate_(d_weight[:width], z, h[part], first=part.start == 0)
                if d_bias is not None:
                    d_bias[:width] += z.sum(0, dtype=wide)
        ctx.save_for_backward(d_hidden, d_weight, d_bias, divisor)
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype if bias is not None else None
        ctx.over = WHOLE if summed else over
        hard, soft = sums[:2] / divisor
        total = options.alpha * hard + (1 - options.alpha) * soft
        figures = sums[2:]
        ctx.mark_non_differentiable(hard, soft, figures)
        return total, hard, soft, figures

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *saved, divisor = ctx.saved_tensors
        scale = d_total.to(divisor) / divisor
        # `.to(scale)` first: a low-precision tensor times a scalar tensor would round the scalar to
        # low precision.
        gradients = [
            None if d is None else (d.to(scale.dtype) * scale).to(dtype)
            for d, dtype in zip(saved, ctx.dtypes, strict=True)
        ]
        if gradients[0] is not None:
            (gradients[0],) = ctx.over.total(gradients[0])
        return (*gradients, *[None] * 13)


_ALIGNED = 64  # logits: rows of a buffer begin where matrix products are fast
_NOTHING = -1e30  # a logit of probability 0 with finite differences from others


class _Scratch(DenseTargets):
    """Logits that nobody needs afterwards: they may be overwritten."""


class _Rebuilt:
    """Makes the teacher's logits of a slice of hidden states, in a buffer of its own.

    In float32 on a CPU and where a card adds low-precision products up in it: rounding the logits
    themselves to 16 bits would move them by more than storing the states has. Elsewhere in the
    compute dtype.
    """

    def __init__(self, like: Tensor, wide: torch.dtype, ids: slice) -> None:
        """Allocate like the student's buffer, for ids of this rank; losses are `wide`."""
        self._ids = ids
        gpu = like.is_cuda
        self._dtype = like.dtype if gpu else wide
        self._mixed = self._dtype != wide and _mixed_addmm(like.device, like.dtype)
        self._buffer = torch.empty_like(like, dtype=wide if self._mixed else self._dtype)

    def __call__(self, targets: HiddenTargets) -> _Scratch:
        states, layer = targets.states.to(self._dtype), targets.layer
        weight, bias = layer.on(states.device, self._dtype, self._ids)
        whole = self._buffer[: len(states)]
        out = whole[:, : len(weight)]
        if self._mixed:
            mm: Any = torch.mm
            mm(states, weight.T, out_dtype=out.dtype, out=out)
        else:
            torch.mm(states, weight.T, out=out)
        finish_(out if bias is None else out.add_(bias), layer.scale, layer.cap)
        _fill_spare_(whole, len(weight), _NOTHING)
        return _Scratch(whole, targets.temperature)


def _fill_spare_(z: Tensor, width: int, value: float) -> None:
    """Columns of no id have no probability."""
    if width < z.shape[1]:
        least = torch.finfo(z.dtype).min
        z[:, width:] = value if value == -torch.inf else max(value, least)


def _apply(*arguments: Any) -> tuple[Tensor, ...]:
    apply: Any = _Fused.apply
    return cast("tuple[Tensor, ...]", apply(*arguments))


# A student under torch.compile must not trace the slices: they bring their own compiled pass.
_disable: Any = torch.compiler.disable
_eagerly: Any = _disable(_apply)


def _sums(theta: Tensor | None) -> int:
    """Sums of a slice: hard and soft loss, and with theta an anchor's figures."""
    return 2 if theta is None else 2 + FIGURES


def _slices(targets: Targets | ChunkTargets, n: int, step: int) -> list[slice]:
    """Consecutive positions; those of a chunk stay together."""
    if isinstance(targets, ChunkTargets):
        return list(targets.cuts(step))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _logits_to_gradient_(
    z: Tensor,
    labels: Tensor,
    targets: DenseTargets | SparseTargets | ChunkTargets,
    each: Tensor,
    options: _Options,
    cap: float | None = None,
    theta: Tensor | None = None,
    over: Vocabulary = WHOLE,
    own: slice = slice(None),
) -> Tensor:
    """Replace what the layer gives, [n, V], by the gradient of the summed loss with respect to it.

    Of a vocabulary that is cut, z are the logits of this rank's own ids, and spare columns.

    Returns:
        [2] hard and soft sums; with theta, of anchored targets, [7]: and an anchor's figures.
    """
    valid = labels >= 0
    ids = labels.long().masked_fill(~valid, 0)[:, None]
    valid_each = valid * each
    fast = z.is_cuda and compiles()
    # Eager passes are cheap on a CPU only while a block stays in its cache. On a GPU a block must
    # outlast the launches of its operations. A compiled pass takes the whole slice, and so does one
    # that waits for other ranks.
    whole = fast or over.cut
    block = len(z) if whole else max((EAGER if z.is_cuda else 2**20) // z.shape[1], 1)
    more: dict[str, Any] = {"over": over} if over.cut else {}
    sums = torch.zeros(_sums(theta), dtype=each.dtype, device=z.device)
    tensors: tuple[Tensor, ...]
    for part in _slices(targets, len(z), block):
        zs, label = z[part], ids[part]
        width = zs.shape[1] if not over.cut else own.stop - own.start
        slope = None if cap is None else (compiled(cap_) if fast else cap_)(zs, cap)
        if over.cut:
            sparse = isinstance(targets, SparseTargets)
            _fill_spare_(zs, width, -torch.inf if sparse else _NOTHING)
        if isinstance(targets, ChunkTargets):
            sums += chunk_gradient_(zs, label, valid_each[part], targets[part], options.alpha)
            if slope is not None:
                zs.mul_(slope)
            continue
        if isinstance(targets, DenseTargets):
            at = over.columns(label, zs.shape[1])
            x = zs.gather(1, at).to(each.dtype)
            teacher = targets.logits[part].to(each.dtype)
            scratch = isinstance(targets, _Scratch)
            if over.cut and not scratch:
                teacher = F.pad(
                    teacher[:, own].clamp_min(_NOTHING), (0, zs.shape[1] - width), value=_NOTHING
                )
            tensors = (zs, x, teacher, at, valid_each[part], each[part])
            in_place = over.cut or (scratch and not fast)
            function: Pass = scratch_pass if in_place else dense_pass
        else:
            entries = torch.cat([targets.ids[part], label], 1)
            at = over.columns(entries, zs.shape[1])
            x = zs.gather(1, at).to(each.dtype)
            zs.scatter_(1, at, -torch.inf)
            w, rest = targets.weights[part], targets.tail[part]
            tensors = (zs, x, entries, w, rest, valid_each[part], each[part])
            function = sparse_pass
            if theta is not None:
                assert isinstance(targets, AnchoredTargets), "theta is of anchored targets"
                inverse = targets.inverse[part].to(each.dtype)
                more |= {"inverse": inverse, "heads": targets.heads[part], "theta": theta}
        losses, d_entries = (compiled(function) if fast else function)(*tensors, *options, **more)
        # Written, not added: these values were made in float32 (softmax minus target cancels), and
        # equal ids carry equal values, so the result does not depend on the order of the writes.
        zs.scatter_(1, at, d_entries.to(zs.dtype))
        if slope is not None:
            zs.mul_(slope)
        sums += losses
    return sums


@functools.cache
def _mixed_addmm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of `dtype` can be added to a float32 matrix (PyTorch 2.8 on CUDA).

    Tried rather than looked up: it depends on PyTorch, the BLAS library and the card.
    """
    if device.type != "cuda":
        return False
    a = torch.full((16, 16), 2.0**-7, dtype=dtype, device=device)
    total = torch.ones((16, 16), dtype=torch.float32, device=device)
    addmm: Any = torch.addmm
    try:
        addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 1 + 2.0**-10).all())


def _accumulate_(total: Tensor, gradient: Tensor, hidden: Tensor, *, first: bool) -> None:
    """``total += gradient.T @ hidden``, or ``=`` if `first`; the operands may be narrower."""
    beta = 0 if first else 1
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.T, hidden, beta=beta)
    elif _mixed_addmm(gradient.device, gradient.dtype):
        addmm: Any = torch.addmm
        addmm(total, gradient.T, hidden, out_dtype=total.dtype, beta=beta, out=total)
    else:
        # The product is rounded once to low precision, as in any linear layer's backward pass; the
        # sum is not. float16 also overflows: a frequent token sums its hidden states thousands of
        # times. Powers of two are exact.
        shrink = 2.0**-6 if gradient.dtype == torch.float16 else 1.0
        product = gradient.T @ (hidden * shrink if shrink != 1 else hidden)
        if first:
            torch.mul(product, 1 / shrink, out=total)
        else:
            total.add_(product, alpha=1 / shrink)
