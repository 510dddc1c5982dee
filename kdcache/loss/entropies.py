"""The student's entropy at each position, without gradient.

Cost: the product with the output layer, one of the three that a loss has, and a pass over each
block of logits while it is in a processor's cache. Memory: one slice of logits, as large as that of
`kdcache.loss.fused`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcache.loss.fused import EAGER, slice_rows
from kdcache.loss.passes import cap_, compiled
from kdcache.targets.device import compiles

# Logits of a slice, and of a block of it, on a CPU: the product wants many positions, and fresh
# memory costs as much as the passes, which want a block in the cache.
_SLICE, _BLOCK = 2**22, 2**17


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
        cap: the logits are ``cap * tanh(x / cap)`` of the layer's x.
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
            if b is None:
                torch.mm(part, w.T, out=z)
            else:
                torch.addmm(b, part, w.T, out=z)
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
