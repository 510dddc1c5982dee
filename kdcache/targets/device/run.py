"""How an encoding runs: compiled on CUDA, a slice of the positions at a time on a CPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

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
