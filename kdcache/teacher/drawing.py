"""Draws the next token of each row: temperature, truncation, and noise that belongs to the row.

The noise of a token is a number of (seed, span, prompt, sample, position), by the generator of
`position_uniform`, so that batches and workers do not matter. The drawn token is where that number
falls in the cumulative distribution.

Cost: one sort of the vocabulary a row with `top_p`, else two passes over it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.rows.spec import Sampling
from kdcache.targets import Stream, position_uniform


def noise(
    seed: int, span: int, prompt: npt.ArrayLike, sample: npt.ArrayLike, position: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """Uniform numbers of tokens.

    Args:
        seed: of the generation.
        span: the prompts' span.
        prompt: integers [n], which prompt of the span.
        sample: integers [n], which of its answers.
        position: integers [n], which token of the answer.
    """
    samples = np.asarray(sample)
    out = np.empty(np.broadcast_shapes(samples.shape, np.shape(prompt), np.shape(position)))
    prompts, positions = np.broadcast_to(prompt, out.shape), np.broadcast_to(position, out.shape)
    for one in np.unique(samples):
        mine = np.broadcast_to(samples == one, out.shape)
        stream = Stream.ANSWERS + int(one)
        out[mine] = position_uniform(seed, span, prompts[mine], positions[mine], stream=stream)
    return out


def draw(logits: Tensor, uniform: Tensor, how: Sampling) -> tuple[Tensor, Tensor]:
    """One token of each row.

    Args:
        logits: [n, V].
        uniform: float64 [n], in [0, 1).
        how: temperature and truncation; `min_p` counts before `top_k`, and that before `top_p`.

    Returns:
        int64 [n], the tokens, and float32 [n], their log-probabilities at temperature 1 over the
        whole vocabulary.
    """
    logits = logits.float()
    if how.temperature == 0:
        ids = logits.argmax(-1)
    else:
        chances = truncated(logits, how)
        total = chances.cumsum_(-1)
        at = (uniform * total[:, -1])[:, None]
        ids = torch.searchsorted(total, at, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
    logprobs = logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(-1)
    return ids, logprobs


def truncated(logits: Tensor, how: Sampling) -> Tensor:
    """The weights from which tokens are drawn, float64 [n, V], not scaled to 1."""
    z = logits / how.temperature
    weights = (z - z.amax(-1, keepdim=True)).exp_().double()  # float32 takes a third of the time
    if how.min_p > 0:  # the largest weight is 1
        weights = weights.masked_fill(weights < how.min_p, 0.0)
    if 0 < how.top_k < weights.shape[-1]:
        least = weights.topk(how.top_k, dim=-1).values[:, -1:]
        weights = weights.masked_fill(weights < least, 0.0)
    if how.top_p < 1:
        ordered, order = weights.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered[before >= how.top_p * ordered.sum(-1, keepdim=True)] = 0.0
        weights = torch.zeros_like(weights).scatter_(-1, order, ordered)
    return weights
