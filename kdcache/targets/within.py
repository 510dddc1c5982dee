"""The teacher's distribution at a student's tokens within one of the teacher's.

Where a student reads " category" as " cat", "e" and "gory", and the teacher as one token, the
teacher's answer before the word still says what comes after " cat": of its entries, those that the
student would also begin with " cat" are left, and their next tokens of the student have their
weights, divided by the sum. An entry that ends there is followed by something that the teacher was
not asked about: its weight is the tail's.

The entries must be the teacher's probabilities (top-k): of a sample a quotient of two sums is
biased. What the top-k leaves out is taken to be as the entries are; the label is always among them,
by its own probability.

Cost: a few passes over [chunks, K] for each further token of the longest one; rows that have no
further one drop out.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from kdcache.targets.chunks import Integers
from kdcache.targets.decoded import SparseTargets


def within(
    targets: SparseTargets,
    labels: Integers,
    logprobs: np.ndarray,
    spans: Integers,
    read: Integers,
    paths: np.ndarray,
) -> Iterator[tuple[Integers, SparseTargets]]:
    """Distributions over the student's ids at the second, third, … token of chunks.

    Args:
        targets: over the teacher's ids where each of C chunks begins; exact.
        labels: int64 [C], the teacher's token that is there.
        logprobs: [C], its log-probability.
        spans: int64 [C, 2], the student's positions of each chunk.
        read: int64 [P], the student's labels.
        paths: int [V, n], the student's tokens of each of the teacher's ids, then -1 at least once.

    Yields:
        int64 [m] positions, and m targets over the student's ids, for one token after the other.
        Positions at which the student's tokens are not those of the label's path have none.
    """
    assert targets.exact, "quotients of a sample's weights are biased"
    ids, weights = targets.ids.numpy(), targets.weights.numpy()
    known = ((ids == labels[:, None]) & (weights > 0)).any(1)
    # Not below what float32 holds: a sum of weights is never 0.
    own = np.where(known, 0, np.exp(np.maximum(logprobs, -80.0)))
    ids = np.concatenate([ids, labels[:, None]], 1)
    weights = np.concatenate([weights, own[:, None]], 1)
    chunks = np.arange(len(spans))
    for depth in range(1, paths.shape[1]):
        at = spans[chunks, 0] + depth
        goes_on = (at < spans[chunks, 1]) & (paths[labels[chunks], depth] >= 0)
        chunks, at, ids, weights = (x[goes_on] for x in (chunks, at, ids, weights))
        before = read[at - 1]
        same = paths[labels[chunks], depth - 1] == before
        chunks, at, before, ids, weights = (x[same] for x in (chunks, at, before, ids, weights))
        if not len(chunks):
            return
        weights = np.where(paths[ids, depth - 1] == before[:, None], weights, 0)
        following = paths[ids, depth]
        over = following < 0
        total = weights.sum(1)
        yield (
            at,
            SparseTargets(
                torch.from_numpy(np.where(over, 0, following).astype(np.int64)),
                torch.from_numpy((np.where(over, 0, weights) / total[:, None]).astype(np.float32)),
                torch.from_numpy(((weights * over).sum(1) / total).astype(np.float32)),
                True,
                targets.temperature,
            ),
        )
