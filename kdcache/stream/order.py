"""The order of training as a pure function: which row comes when, and who reads it.

The shards are permuted by (seed, epoch) and their rows laid end to end; that line is cut into as
many stretches of equal length (give or take a row) as the run has *streams*. A stream walks its
stretch a group of shards at a time, and the rows of a group are permuted. The global order takes a
row of each stream in turn: its row `t` is the next one of stream `t mod streams`. So it depends on
seed, epoch and streams, and not on the number of workers. `share` has which of those rows a worker
reads: with as many workers as streams, those of one stream.

Cost: one sort of 64-bit words a group, stream and epoch; memory for one group's row numbers.
Guarantee: a permutation of all rows, the same on every machine, numpy version and world size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kdcache.cache import Cache
from kdcache.domains import Weights
from kdcache.targets.base import ragged_items

_SHARDS, _ROWS, _KEEP = 0, 1, 2  # random numbers of their own for each use


def order(
    seed: int,
    epoch: int,
    shard_rows: Sequence[int],
    group: int,
    *,
    start: int = 0,
    shuffle: bool = True,
    streams: int = 1,
    stream: int = 0,
) -> Iterator[np.ndarray]:
    """The order of one stream in one epoch, a group of shards at a time.

    A pure function of its arguments: it reads raw words of Philox, whose stream numpy keeps stable,
    at a counter of their own for each (seed, epoch, stream, group), and no global state.

    Args:
        group: shards whose rows are shuffled together.
        start: rows of the stream to leave out at the beginning.
        streams: stretches into which the epoch is cut.

    Yields:
        int64 [n, 2], (shard, row): the next n rows of the order, one array a group.
    """
    count = len(shard_rows)
    shards = _permutation(seed, epoch, _SHARDS, 0, 0, count) if shuffle else np.arange(count)
    laid = np.asarray(shard_rows, np.int64)[shards]
    ends = np.cumsum(laid)
    total = int(ends[-1]) if count else 0
    low, high = _stretch(total, streams, stream), _stretch(total, streams, stream + 1)
    if start >= high - low:
        return
    # The first stretch begins with the first shard, even where that has no rows.
    first = int(np.searchsorted(ends, low, "right")) if low else 0
    last = int(np.searchsorted(ends, high, "left")) + 1
    begun = max(0, int(np.searchsorted(ends, low + start, "right")) - first) // group
    for index, at in enumerate(range(first + begun * group, last, group), begun):
        here = slice(at, min(at + group, last))
        begins = ends[here] - laid[here]
        lows = np.clip(low - begins, 0, laid[here])
        counts = np.clip(high - begins, 0, laid[here]) - lows
        rows = np.stack([np.repeat(shards[here], counts), ragged_items(lows, counts)], axis=1)
        if shuffle:
            rows = rows[_permutation(seed, epoch, _ROWS, index, stream, len(rows))]
        done = max(0, int(begins[0]) - low)
        if len(rows) and done + len(rows) > start:  # shards may be empty
            yield rows[max(0, start - done) :]


def _stretch(rows: int, streams: int, stream: int) -> int:
    """Where a stream begins: as long as the rows that fall to it in turn."""
    return stream * (rows // streams) + min(stream, rows % streams)


def _permutation(
    seed: int, epoch: int, use: int, index: int, stream: int, length: int
) -> np.ndarray:
    philox = np.random.Philox(key=[seed, epoch], counter=[0, stream, index, use])
    return np.argsort(philox.random_raw(length), kind="stable")


@dataclass(frozen=True)
class Share:
    """The rows of a global batch that one worker reads.

    Attributes:
        reads: (stream, first, end): rows of each stream, counted from that stream's beginning.
        bounds: int64 [slices + 1], where the worker's slices begin and end in those rows, laid end
            to end. With a single stream, all rows of the batch are read and the bounds pick some.
    """

    reads: list[tuple[int, int, int]]
    bounds: np.ndarray


def share(first: int, rows: int, *, streams: int, rank: int, world_size: int, slices: int) -> Share:
    """Which of the rows `first` to `first + rows` of an epoch's order a worker takes.

    Workers and streams form as many classes as the greatest common divisor of their numbers. A
    class's workers cut its rows, stream after stream, into equal parts: each has whole streams if
    the workers divide the streams, and a stream is one class's if the streams divide the workers.

    Args:
        first: rows of the epoch before this batch.
        rows: of the batch.
        slices: pieces into which each worker cuts its rows.
    """
    classes = math.gcd(streams, world_size)
    mine = np.arange(rank % classes, streams, classes)
    lows = -((mine - first) // streams)  # rounded up
    counts = -((mine - first - rows) // streams) - lows
    ends = np.cumsum(counts)
    begin = rank // classes * slices
    pieces = world_size // classes * slices
    bounds = cut(int(ends[-1]), pieces)[begin : begin + slices + 1]
    if streams > 1:
        before = ends - counts
        picked = np.clip(bounds[0] - before, 0, counts), np.clip(bounds[-1] - before, 0, counts)
        lows, counts = lows + picked[0], picked[1] - picked[0]
        bounds = bounds - bounds[0]
    reads = zip(mine.tolist(), lows.tolist(), (lows + counts).tolist(), strict=True)
    return Share([read for read in reads if read[1] < read[2]], bounds)


def cut(rows: int, pieces: int) -> np.ndarray:
    """int64 [pieces + 1]: bounds that cut `rows` into pieces, which differ by a row at most."""
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
        fixed = _permutation(seed, self.cache, _KEEP, self.shard, 0, self.stored)
        kept: np.ndarray = fixed[(epoch * self.rows + rows) % self.stored]
        return kept


def sources(caches: Sequence[Cache], weights: Weights) -> list[EpochShard]:
    """The shards an epoch uses, of all caches.

    A weight is a whole part, so many times all rows, and a share of them. Of a domain with n rows
    in a cache and the share s an epoch takes `floor(s * n + 1/2)` rows more: exact to half a row,
    however small the shards.
    """
    found = []
    for index, cache in enumerate(caches):
        shards = cache.manifest.shards
        stored = np.array([entry.rows for entry in shards], np.int64)
        each = np.array([weights.of(index, entry.domain) for entry in shards], np.float64)
        whole = each.astype(np.int64)
        for repeat in range(int(whole.max(initial=0))):
            there = np.flatnonzero(whole > repeat).tolist()
            found += [EpochShard(index, i, shards[i].rows, shards[i].rows) for i in there]
        part = np.zeros(len(shards), np.int64)
        domains = [entry.domain for entry in shards]
        for domain in dict.fromkeys(domains):
            mine = np.array([name == domain for name in domains])
            share = weights.of(index, domain) % 1
            # Rounded on the running total.
            ends = np.floor(np.cumsum([0, *stored[mine]]) * share + 0.5).astype(np.int64)
            part[mine] = np.diff(ends)
        some = np.flatnonzero(part).tolist()
        found += [EpochShard(index, i, shards[i].rows, int(part[i])) for i in some]
    return found


def rows_by_domain(
    caches: Sequence[Cache], shards: Sequence[EpochShard]
) -> dict[tuple[int, str | None], int]:
    """Rows of an epoch by cache and domain; 0 of those that it leaves out."""
    entries = [cache.manifest.shards for cache in caches]
    found = {(i, entry.domain): 0 for i, mine in enumerate(entries) for entry in mine}
    for shard in shards:
        found[shard.cache, entries[shard.cache][shard.shard].domain] += shard.rows
    return found
