"""The order of training as a pure function: which row comes when, and the cursor of a run.

Cost: one sort of 64-bit words a group and epoch; memory for one group's row numbers.
Guarantee: a permutation of all rows, the same on every machine, numpy version and world size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kdcache.cache import Cache

_SHARDS, _ROWS, _KEEP = 0, 1, 2  # one stream of random numbers for each use


def order(
    seed: int,
    epoch: int,
    shard_rows: Sequence[int],
    group: int,
    *,
    start: int = 0,
    shuffle: bool = True,
) -> Iterator[np.ndarray]:
    """The global order of one epoch, a group of shards at a time.

    A pure function of its arguments: it reads raw words of Philox, whose stream numpy keeps stable,
    at a counter of their own for each (seed, epoch, group), and no global state.

    Args:
        seed: of the run, 0 or more.
        epoch: counted from 0.
        shard_rows: rows of each shard.
        group: shards whose rows are shuffled together.
        start: rows to leave out at the beginning.
        shuffle: False gives the stored order.

    Yields:
        int64 [n, 2], (shard, row): the next n rows of the order, one array a group.
    """
    count = len(shard_rows)
    shards = _permutation(seed, epoch, _SHARDS, 0, count) if shuffle else np.arange(count)
    done = 0
    for index, first in enumerate(range(0, count, group)):
        members = shards[first : first + group]
        sizes = np.array([shard_rows[s] for s in members], dtype=np.int64)
        total = int(sizes.sum())
        if total and done + total > start:
            rows = np.stack(
                [np.repeat(members, sizes), ranges(np.zeros_like(sizes), sizes)], axis=1
            )
            if shuffle:
                rows = rows[_permutation(seed, epoch, _ROWS, index, total)]
            yield rows[max(0, start - done) :]
        done += total


def _permutation(seed: int, epoch: int, use: int, index: int, length: int) -> np.ndarray:
    words = np.random.Philox(key=[seed, epoch], counter=[0, 0, index, use]).random_raw(length)
    return np.argsort(words, kind="stable")


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenation of `arange(start, start + length)` of all pairs, int64."""
    total = int(lengths.sum())
    shift = np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
    return shift.astype(np.int64) + np.arange(total, dtype=np.int64)


def slices(rows: int, pieces: int) -> np.ndarray:
    """int64 [pieces + 1]: bounds that cut `rows` into pieces whose sizes differ by one at most."""
    return np.arange(pieces + 1, dtype=np.int64) * rows // pieces


@dataclass(frozen=True)
class Cursor:
    """A point in the endless order, the same for all ranks.

    Attributes:
        epoch: epoch of the next row.
        rows_seen: rows of that epoch already handed out, over all ranks.
        step: global batches handed out since the run began: what schedules count.
    """

    epoch: int = 0
    rows_seen: int = 0
    step: int = 0

    def to_dict(self) -> dict[str, int]:
        """As JSON-able values."""
        return {"epoch": self.epoch, "rows_seen": self.rows_seen, "step": self.step}

    @classmethod
    def from_dict(cls, values: Mapping[str, int]) -> Cursor:
        """From `to_dict`'s values; `step` may be missing."""
        return cls(int(values["epoch"]), int(values["rows_seen"]), int(values.get("step", 0)))


@dataclass(frozen=True)
class EpochShard:
    """One shard of one cache as an epoch sees it: `rows` of its `stored` rows."""

    cache: int
    shard: int
    stored: int
    rows: int

    def keep(self, seed: int, epoch: int, rows: np.ndarray) -> np.ndarray:
        """Stored row of each row of the epoch: epochs take turns, so all are used equally often."""
        if self.rows == self.stored:
            return rows
        fixed = _permutation(seed, self.cache, _KEEP, self.shard, self.stored)
        kept: np.ndarray = fixed[(epoch * self.rows + rows) % self.stored]
        return kept


def sources(caches: Sequence[Cache], weights: Sequence[float]) -> list[EpochShard]:
    """The shards an epoch uses, of all caches.

    Args:
        caches: sealed caches.
        weights: how often an epoch uses the rows of each: a whole part and a share.
    """
    found = []
    for index, (cache, weight) in enumerate(zip(caches, weights, strict=True)):
        stored = [entry.rows for entry in cache.manifest.shards]
        whole = int(weight)
        for _ in range(whole):
            found += [EpochShard(index, i, n, n) for i, n in enumerate(stored)]
        # Rounded on the running total: however small the shards, the cache's share is exact to
        # one row.
        bounds = np.floor(np.cumsum([0, *stored]) * (weight - whole) + 0.5).astype(np.int64)
        part = np.diff(bounds)
        found += [
            EpochShard(index, i, n, int(k))
            for i, (n, k) in enumerate(zip(stored, part, strict=True))
            if k
        ]
    return found
