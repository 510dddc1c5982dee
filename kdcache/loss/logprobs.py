"""Log-probabilities of labels, from logits or from the states below a linear head."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.loss.reference import soft_capped

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
        cap: the logits are ``cap * tanh(x / cap)`` of the layer's x.
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
