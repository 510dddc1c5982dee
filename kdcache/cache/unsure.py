"""Soft targets of the positions alone at which the teacher is unsure.

A cache with `positions` in its spec keeps the targets where the code of the teacher's entropy is at
least `entropy_code`. Its other labels keep their ids and log-probabilities: they are hard labels.

Cost: a copy of the columns that are kept. Guarantee: the choice looks at the stored code alone,
whose rounding has random numbers of its own, so a target that is unbiased stays so where it is
kept.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kdcache.cache.shard import ShardData
from kdcache.targets import SoftTargets
from kdcache.tasks import IGNORE


def only_unsure(data: ShardData, least: int) -> ShardData:
    """Rows without the targets of positions whose entropy has a code below `least`."""
    assert data.entropy is not None, "language models have it"
    assert data.label_logprob is not None, "language models have it"
    kept = data.entropy >= least
    at = np.flatnonzero(data.labels != IGNORE)
    labels, hard = data.labels.copy(), np.full_like(data.labels, IGNORE)
    labels[at[~kept]], hard[at[~kept]] = IGNORE, data.labels[at[~kept]]
    writer = data.writer_logprob
    return replace(
        data,
        labels=labels,
        hard_labels=hard,
        targets=data.targets.take(np.flatnonzero(kept)),
        entropy=data.entropy[kept],
        label_logprob=data.label_logprob[kept],
        hard_logprob=data.label_logprob[~kept],
        writer_logprob=None if writer is None else writer[kept],
    )


def every_label(data: ShardData) -> ShardData:
    """Rows with all of their labels as positions, and without targets."""
    if data.hard_labels is None:
        return data
    return replace(
        data,
        labels=data.every_label,
        hard_labels=None,
        targets=SoftTargets.empty(data.targets.codec),
        entropy=None,
        label_logprob=data.every_logprob,
        hard_logprob=None,
        writer_logprob=None,
    )


def code_of_share(codes: np.ndarray, share: float) -> int:
    """The code that the share of some codes nearest to `share` reaches; of two the larger one, but
    0 for all of them.
    """
    if share >= 1:
        return 0
    least = np.arange(256)
    reached = 1 - np.searchsorted(np.sort(codes), least) / max(len(codes), 1)
    return int(255 - np.argmin(abs(reached - share)[::-1]))
