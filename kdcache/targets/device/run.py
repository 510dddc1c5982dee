"""How an encoding runs, compiled on CUDA and in slices on a CPU; top-k and its tail; what is
computed besides a codec.

Finite flags (NaN, plus infinity and nothing but minus infinity are unusable), probability on the
columns of a padded output layer that are not ids, log-probabilities of hard labels, and entropies.

Cost: nothing but a few numbers a position where the codec has read all logits at T = 1, as `topk`
does always and `sample` where it declares that temperature. Otherwise one read of the logits on
CUDA, by the blocks that sampling uses (0.2 ms for 2,048 positions of 128k ids in bfloat16 at an
H100's rate); plain operations would move 30 bytes a logit. Entropies take one more read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, MutableMapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kdcache.targets.device.blocks import (
    BLOCK,
    find_largest,
    largest,
    probabilities,
    read_blocks,
)

logger = logging.getLogger(__name__)

_CPU_SLICE = 1 << 22
"""Logits handled at once on a CPU: 16 MB of float32; fewer pay in calls, more in cache misses."""

_CPU_ROWS = 1024
"""Positions handled at once on a CPU, where the vocabulary is small."""

Encoding = Callable[..., dict[str, Tensor]]
"""From tensors with a row per position, then constants, to named tensors with such rows."""


def run_encoding(run: Encoding, tensors: tuple[Tensor, ...], *constants: Any) -> dict[str, Tensor]:
    """`run(*tensors, *constants)`, in the way that is fastest on the tensors' device.

    Args:
        run: treats each position by itself.
        tensors: one row per position; the first are the logits [n, V] or [n, m, V].
        constants: the same for all positions.
    """
    if tensors[0].is_cuda:
        return (_compiled(run) if compiles() else run)(*tensors, *constants)
    # As many positions at once as keep temporaries in the processor's caches.
    n, numbers = len(tensors[0]), tensors[0][0].numel() if len(tensors[0]) else 1
    rows = max(1, min(_CPU_ROWS, _CPU_SLICE // numbers))
    if n <= rows:
        return run(*tensors, *constants)
    parts = [run(*(x[a : a + rows] for x in tensors), *constants) for a in range(0, n, rows)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def compiles() -> bool:
    """Whether CUDA code goes through `torch.compile`; a compiler that fails is reported once.

    `KDCACHE_COMPILE=0` turns it off; the plain operations give the same results several times
    slower.
    """
    return os.environ.get("KDCACHE_COMPILE", "1") != "0" and _compiler_works()


@cache
def _compiler_works() -> bool:
    """Compile one small kernel and run it."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device="cuda"))
    except Exception as error:  # Triton, C compiler, Python.h, driver: each fails in its own way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning(
            "torch.compile does not work here (%s): sampler and loss run several times slower. "
            "Install Triton, a C compiler and the Python headers (python3-dev); KDCACHE_COMPILE=0 "
            "chooses the slow way without this warning.",
            reason,
        )
        return False
    return True


@cache
def _compiled(run: Encoding) -> Encoding:
    return torch.compile(run)


def all_finite(peak: Tensor, normalizer: Tensor) -> Tensor:
    """The flags "finite" [n], from what is computed anyway.

    NaN and plus infinity spread to the peak or the sums; minus infinity everywhere makes the peak
    minus infinity.
    """
    return (peak.isfinite() & normalizer.isfinite()).all(-1)


def top_entries(logits: Tensor, k: int, temperatures: tuple[float, ...]) -> dict[str, Tensor]:
    """The K largest logits of each position and the mass of the others at each temperature.

    Args:
        logits: [n, V].
        k: entries, at most V.
        temperatures: where the tail's mass is wanted.

    Returns:
        "ids" int32 [n, K] and "logprobs" float32 [n, K] (T = 1), largest first;
        "tail" float32 [n, m]; "finite" bool [n]; "peak" and "normalizer" float32 [n], see
        `label_logprobs`.
    """
    run = _top_blocked if logits.shape[-1] > 4 * k * BLOCK else _top_plain
    return run_encoding(run, (logits,), k, temperatures)


def _top_plain(logits: Tensor, k: int, temperatures: tuple[float, ...]) -> dict[str, Tensor]:
    z = logits.float()
    values, ids = largest(z, k)
    peak = values[:, :1]
    normalizer = torch.stack([((z - peak) / t).exp().sum(-1) for t in (1.0, *temperatures)], -1)
    return _top_result(ids, values, peak, normalizer, temperatures, k == z.shape[-1])


def _top_blocked(logits: Tensor, k: int, temperatures: tuple[float, ...]) -> dict[str, Tensor]:
    blocks = read_blocks(logits, (1.0, *temperatures))
    best = find_largest(logits, blocks, k)
    everything = k == logits.shape[-1]
    return _top_result(
        best.ids, best.values, blocks.peak, blocks.normalizer, temperatures, everything
    )


def _top_result(
    ids: Tensor,
    values: Tensor,
    peak: Tensor,
    normalizer: Tensor,
    temperatures: tuple[float, ...],
    everything: bool,
) -> dict[str, Tensor]:
    """`normalizer` has T = 1 first, then the declared temperatures."""
    kept = [p.sum(-1) for p in probabilities(values, peak, normalizer[:, 1:], temperatures)]
    tail = 1 - torch.stack(kept, -1)
    return {
        "ids": ids.int(),
        "logprobs": values - peak - normalizer[:, :1].log(),
        "tail": torch.zeros_like(tail) if everything else tail.clamp_min(0),
        "finite": all_finite(peak, normalizer),
        "peak": peak[:, 0],
        "normalizer": normalizer[:, 0],
    }


def outside_mass(logits: Tensor, width: int) -> Tensor:
    """Probability of the columns from `width` on: float32 [n] for logits [n, V]."""
    run = _outside_by_blocks if logits.is_cuda else _outside
    return run_encoding(run, (logits,), width)["mass"]


def _outside(logits: Tensor, width: int) -> dict[str, Tensor]:
    z = logits.float()
    return {"mass": (torch.logsumexp(z[:, width:], -1) - torch.logsumexp(z, -1)).exp()}


def _outside_by_blocks(logits: Tensor, width: int) -> dict[str, Tensor]:
    blocks = read_blocks(logits, (1.0,))
    outside = (logits[:, width:].float() - blocks.peak).exp().sum(-1)
    return {"mass": outside / blocks.normalizer[:, 0]}


def label_logprobs(
    logits: Tensor, labels: Tensor, encoded: MutableMapping[str, Tensor] | None = None
) -> Tensor:
    """Log-probability of each position's label; see `of_positions`."""
    return of_positions(logits, labels, encoded)["label_logprob"]


def of_positions(
    logits: Tensor,
    labels: Tensor,
    encoded: MutableMapping[str, Tensor] | None = None,
    *,
    entropy: bool = False,
) -> dict[str, Tensor]:
    """What a cache keeps of each position besides its target, never synchronising with the host.

    Args:
        logits: [n, V], or [n, 1, V] where that is the only temperature.
        labels: int64 [n], on any device. Ids from V on have no probability.
        encoded: what `Codec.encode` gave of the same logits. Its "peak", the largest logit, and
            "normalizer", the sum of exp(z - peak), are taken out if they are there: no codec packs
            them.
        entropy: whether with the entropy.

    Returns:
        "label_logprob", the log-probability of the label at T = 1: float32 [n], 0 at most but for
        rounding; minus infinity where there is no probability. "entropy", that of the distribution
        at T = 1 in nats: float32 [n], 0 at least but for rounding. NaN only where `encode` calls
        the position not finite.
    """
    logits = logits[:, 0] if logits.ndim == 3 else logits
    labels = labels.to(logits.device)
    sums = encoded
    if sums is None or "normalizer" not in sums:
        sums = run_encoding(_sums_by_blocks if logits.is_cuda else _sums, (logits,))
    peak, normalizer = sums.pop("peak"), sums.pop("normalizer")
    found = run_encoding(_logprobs, (logits, labels, peak, normalizer))
    if entropy:
        found |= run_encoding(_entropies, (logits, peak, normalizer))
    return found


def _sums(logits: Tensor) -> dict[str, Tensor]:
    z = logits.float()
    peak = z.amax(-1)
    return {"peak": peak, "normalizer": (z - peak[:, None]).exp_().sum(-1)}


def _sums_by_blocks(logits: Tensor) -> dict[str, Tensor]:
    blocks = read_blocks(logits, (1.0,))
    return {"peak": blocks.peak[:, 0], "normalizer": blocks.normalizer[:, 0]}


def _logprobs(
    logits: Tensor, labels: Tensor, peak: Tensor, normalizer: Tensor
) -> dict[str, Tensor]:
    last = logits.shape[-1] - 1
    z = logits.gather(1, labels.clamp(0, last)[:, None])[:, 0].float()
    return {"label_logprob": torch.where(labels <= last, z - peak - normalizer.log(), -torch.inf)}


def _entropies(logits: Tensor, peak: Tensor, normalizer: Tensor) -> dict[str, Tensor]:
    # Of a logit of -inf, exp(x) x would be NaN; from -200 on exp(x) is 0 in float32.
    x = (logits.float() - peak[:, None]).clamp_min_(-200)
    return {"entropy": normalizer.log() - (x.exp() * x).sum(-1) / normalizer}
