"""The teacher's log-probability of each label in two bytes, its entropy at each position in one,
and each position's random number.

Let x >= 0 be minus the log-probability at T = 1, in nats. It is stored as a code c that stands for
c^2 / 8192, and x between two such values is rounded to one of both by the position's random number:
the mean over the noise is x exactly, so sums over a corpus (cross-entropy) are unbiased. The values
lie closer where x is small: neighbours of x are sqrt(x) / 45 apart.

Noise must not depend on how positions were batched or which worker computed them: the same build
gives the same bytes. So each position's number is a hash of its coordinates, not the next value of
a generator.

Cost: two bytes a position, 1.1 after shuffle + gzip (the high byte is nearly always 0 or 1); four
rounds of integer mixing a position, vectorised.
Guarantee: a value is off by less than sqrt(x) / 45 + 1 / 8192 nats, its standard deviation is a
half of that at most, and 0.018 nats over the positions of a small model on novels (3.8 nats on
average). So the cross-entropy of a million positions is off by 2e-5 nats.

An entropy of x nats is stored as a code c that stands for c^2 / 4096, rounded in the same way. It
is off by less than sqrt(x) / 32 + 1 / 4096. Over V ids it is ln V at most: 15.8 nats are 7 million
ids; more would be stored as 15.875.
"""

from __future__ import annotations

import enum

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint16]

SCALE = 8192
"""A code c stands for c^2 / SCALE nats: part of the format."""

IMPOSSIBLE = 2**16 - 1
"""The code of a label that the teacher gives no probability."""

ENTROPY_SCALE = 4096
"""A code c of an entropy stands for c^2 / ENTROPY_SCALE nats: part of the format."""

_LARGEST_ENTROPY = 255


@enum.unique
class Stream(enum.IntEnum):
    """Which random number of a position: each use has its own, since a number that chose a position
    is not uniform there, and what it rounds would be biased."""

    CODEC = 0
    LABEL_LOGPROB = 1
    MASK_CHOICE = 2
    MASK_FATE = 3
    MASK_OTHER = 4
    ENTROPY = 5
    ANSWERS = 1 << 16  # of the first sample of a prompt; the others have the next ones


def encode_logprobs(logprobs: npt.ArrayLike, u: npt.ArrayLike) -> Codes:
    """Codes of log-probabilities, rounded without bias.

    Args:
        logprobs: [n], at most 0 but for rounding, or minus infinity; none is NaN.
        u: [n], uniform in [0, 1).
    """
    x = np.maximum(-np.asarray(logprobs, np.float64), 0) * SCALE
    return rounded_roots(x, u, IMPOSSIBLE).astype(np.uint16)


def rounded_roots(
    x: npt.NDArray[np.float64], u: npt.ArrayLike, largest: int
) -> npt.NDArray[np.float64]:
    """Whole numbers whose squares are x on average over u, uniform in [0, 1), `largest` at most."""
    below = np.floor(np.sqrt(x))
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        share = (x - below**2) / (2 * below + 1)  # of the step to the next code
    return np.asarray(np.minimum(below + (np.asarray(u) < share), largest))


def decode_logprobs(codes: Codes) -> npt.NDArray[np.float32]:
    """Log-probabilities at T = 1, in nats: minus infinity where the teacher gives none."""
    values = -(codes.astype(np.float64) ** 2) / SCALE
    return np.where(codes == IMPOSSIBLE, -np.inf, values).astype(np.float32)


def sum_logprobs(codes: Codes) -> tuple[float, int]:
    """Minus the sum of the finite ones, in nats and exact, and the number of the others."""
    finite = codes[codes != IMPOSSIBLE].astype(np.int64)
    return int((finite**2).sum()) / SCALE, len(codes) - len(finite)


def encode_entropies(entropies: npt.ArrayLike, u: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Codes of entropies, rounded without bias.

    Args:
        entropies: [n], at least 0 but for rounding.
        u: [n], uniform in [0, 1).
    """
    x = np.clip(np.asarray(entropies, np.float64) * ENTROPY_SCALE, 0, _LARGEST_ENTROPY**2)
    return rounded_roots(x, u, _LARGEST_ENTROPY).astype(np.uint8)


def decode_entropies(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Entropies at T = 1, in nats."""
    return (codes.astype(np.float64) ** 2 / ENTROPY_SCALE).astype(np.float32)


def position_uniform(
    seed: int,
    span: int,
    row: npt.ArrayLike,
    position: npt.ArrayLike,
    *,
    stream: int = Stream.CODEC,
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
        stream: which number of each position, see `Stream`.

    Returns:
        float64 in [0, 1) with 53 random bits, of the broadcast shape.
    """
    with np.errstate(over="ignore"):  # the hash is arithmetic modulo 2**64
        state = np.zeros((), np.uint64)
        for word in (_words(seed), _words(span), _words(row), _words(position)):
            state = _mix(state ^ word)
        if stream:
            state = _mix(state ^ _words(stream))
    return np.asarray((state >> np.uint64(11)) * 2.0**-53)


def _words(values: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    return np.asarray(values, np.int64).astype(np.uint64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return x
