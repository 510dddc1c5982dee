"""The teacher's entropy at each position in one byte.

An entropy of x nats at T = 1 is stored as a code c that stands for c^2 / 4096, rounded to a
neighbour at random as log-probabilities of labels are: the mean over the noise is x, so sums over
a corpus (the constant between a cross-entropy and a KL) are unbiased.

Cost: a byte a position before compression.
Guarantee: an entropy of x nats, at most 15.8, is off by less than sqrt(x) / 32 + 1 / 4096, its
standard deviation is a half of that at most. The entropy over V ids is ln V at most: 15.8 nats are
7 million ids; more would be stored as 15.875.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kdcache.targets.label_logprob import rounded_roots

SCALE = 4096
"""A code c stands for c^2 / SCALE nats: part of the format."""

LARGEST = 255


def encode_entropies(entropies: npt.ArrayLike, u: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Codes of entropies, rounded without bias.

    Args:
        entropies: [n], at least 0 but for rounding.
        u: [n], uniform in [0, 1).
    """
    x = np.clip(np.asarray(entropies, np.float64), 0, LARGEST**2 / SCALE)
    return rounded_roots(x * SCALE, u, LARGEST).astype(np.uint8)


def decode_entropies(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Entropies at T = 1, in nats."""
    return (codes.astype(np.float64) ** 2 / SCALE).astype(np.float32)
