"""What the threads of a stream hand to each other: groups of decoded shards, and their batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from kdcache.cache.shard import ShardData
from kdcache.stream.batch import Batch
from kdcache.stream.order import Cursor
from kdcache.stream.shard_rows import ShardRows


@dataclass
class Group:
    """Decoded shards of one group of a stream.

    Attributes:
        stream: whose.
        first: row of the stream that the first of `rows` is.
        rows: rows of `pool` in the stream's order, all of one epoch.
        pool: the shards.
    """

    stream: int
    first: int
    rows: np.ndarray
    pool: ShardRows

    @property
    def end(self) -> int:
        """Row of the stream after the last."""
        return self.first + len(self.rows)


@dataclass
class Made:
    """A batch of a slice, and what the thread that takes it does with it.

    Attributes:
        batch: without the count of all workers, where that has to be summed.
        positions: what this worker adds to the count; None where the batch has its count.
        empty: whether its one row has the weight zero.
        first: whether it is the first slice of its step.
        after: the cursor after it; None unless it is the last slice of its step.
        left_out: int64 [2], see `TargetStream.left_out`, of its rows.
    """

    batch: Batch
    positions: int | None
    empty: bool
    first: bool
    after: Cursor | None
    left_out: np.ndarray


@dataclass
class Walk:
    """How far the groups of a stream have been planned.

    Attributes:
        groups: those that come next: (source, row) of each of their rows.
        end: row of the stream after the last planned one.
    """

    groups: Iterator[np.ndarray]
    end: int


@dataclass
class Parts:
    """Rows of one step as they are read.

    Attributes:
        bounds: of this worker's slices among the rows of the step.
        slices: of each slice its rows so far, a pool at a time.
        done: rows of the step so far.
        positions: in them, those of all workers.
    """

    bounds: np.ndarray
    slices: list[list[ShardData]] = field(init=False)
    done: int = 0
    positions: int = 0

    def __post_init__(self) -> None:
        self.slices = [[] for _ in self.bounds[1:]]

    def add(self, pool: ShardRows, rows: np.ndarray) -> None:
        """Take in the next rows, and pick those that are in a slice."""
        self.positions += int(pool.positions[rows].sum())
        bounds = np.maximum(self.bounds - self.done, 0)
        for i, part in enumerate(self.slices):
            mine = rows[bounds[i] : bounds[i + 1]]
            if len(mine):
                part.append(pool.take(mine))
        self.done += len(rows)
