"""Random numbers that belong to positions.

Sampling noise must not depend on how positions were batched or which worker computed them: the same
build gives the same bytes. So each position's number is a hash of its coordinates, not the next
value of a generator. Cost: four rounds of integer mixing a position, vectorised.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def position_uniform(
    seed: int,
    span: int,
    row: npt.ArrayLike,
    position: npt.ArrayLike,
    *,
    of_label: bool = False,
    stream: int = 0,
) -> npt.NDArray[np.float64]:
    """Uniform numbers that belong to positions, not to the order in which they are computed.

    A counter-based generator: key words are absorbed one by one and mixed by the finaliser of
    SplitMix64 (Steele, Lea and Flood 2014), so the same position has the same number in any batch
    and on any worker.

    Args:
        seed: the build's seed.
        span: index of the span.
        row: integers, the rows' indices in the span; broadcasts with `position`.
        position: integers, the token indices in their rows.
        of_label: another number of each position: not the codec's, but the one that rounds the
            log-probability of its label.
        stream: a further number of each position, for other purposes; 0 is the codec's, 1 that of
            the label.

    Returns:
        float64 in [0, 1) with 53 random bits, of the broadcast shape.
    """
    with np.errstate(over="ignore"):  # the hash is arithmetic modulo 2**64
        state = np.zeros((), np.uint64)
        for word in (_words(seed), _words(span), _words(row), _words(position)):
            state = _mix(state ^ word)
        if of_label or stream:
            state = _mix(state ^ _words(stream or 1))
    return np.asarray((state >> np.uint64(11)) * 2.0**-53)


def _words(values: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    return np.asarray(values, np.int64).astype(np.uint64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return x
