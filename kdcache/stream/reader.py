"""Streaming a cache into training: a global order that is a pure function, batches, and a cursor.

Order: the shards of all caches are permuted by (seed, epoch) and dealt into groups; the rows of a
group are permuted together. A global batch is the next `batch_size` rows of that order; the last
one of an epoch may be shorter, and none spans two epochs. Each batch is cut into `world_size *
accumulation` slices of equal size (give or take a row); rank `r` gets the slices `r, r +
world_size, ...`. So every number of workers and every accumulation sees the same global batches,
and a position in the order (`Cursor`) is all that resuming needs. A slice that would be empty
holds one row whose weight is zero (`count` = infinity): every rank takes the same number of steps,
nothing is dropped and nothing counts twice.

Cost: one thread reads groups, a second cuts, decodes and collates batches, both ahead of the
training step and mostly without Python's global lock: half a microsecond of CPU time a position at
`sample:20` (`benchmarks/stream.py`). Each rank reads the whole cache once an epoch, the price of
equal global batches, but decodes only its own slices. Memory holds the group being cut, the next
one, and `prefetch` batches, however large the cache.
Guarantee: every row exactly once an epoch (weights aside), whatever the world size, accumulation,
group size and restart point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from kdcache.cache import Cache
from kdcache.cache.shard import ShardData
from kdcache.errors import UsageError
from kdcache.stream.background import Background
from kdcache.stream.batch import Batch, Tokenize, collate, join
from kdcache.stream.checks import check_caches, open_caches
from kdcache.stream.order import Cursor, EpochShard, order, slices, sources
from kdcache.stream.shard_rows import ShardRows

_GROUP_BYTES = 1 << 25
_GROUP_SHARDS = 3


@dataclass
class _Group:
    """Decoded shards of one group: `rows` of `pool` in the global order, all of one epoch."""

    pool: ShardRows
    rows: np.ndarray
    epoch: int


class TargetStream(IterableDataset[Batch]):
    """Batches of one rank, read ahead of the training step.

    Iterating gives the rest of the current epoch and leaves the cursor at the next one, so
    `for epoch in range(3): for batch in stream: ...` trains three epochs. Works as it is, or in
    `DataLoader(stream, batch_size=None)` (with no worker processes: it has its own threads).
    """

    def __init__(
        self,
        caches: Cache | str | Sequence[Cache | str],
        *,
        batch_size: int,
        seed: int = 0,
        temperature: float | Callable[[int], float] | None = 1.0,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        weights: Sequence[float] | None = None,
        group: int | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        cursor: Cursor | Mapping[str, int] | None = None,
        tokenize: Tokenize | None = None,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        """Describe the stream; nothing is read before the first batch.

        Args:
            caches: sealed caches, opened or by URL; several are mixed row by row.
            batch_size: rows of one global batch, over all ranks and accumulated slices.
            seed: of the order.
            temperature: of the targets, or a function of the step (global batches since the run
                began); None leaves the targets out.
            rank: this worker.
            world_size: number of workers.
            accumulation: slices into which each rank cuts its part of a global batch.
            weights: how often an epoch uses each cache's rows: 2 repeats them, 0.5 takes another
                half each epoch. Default: 1 for all.
            group: shards whose rows are shuffled together; decides the memory taken and how soon
                the first batch comes. Default: as many as make 32 MiB of stored bytes, but 3 at
                least.
            shuffle: False keeps the stored order (evaluation).
            drop_last: leave a shorter last batch of an epoch out.
            cursor: where to begin.
            tokenize: text to tensors, for classifiers with a tokenizer of their own.
            prefetch: batches ready in advance.
            pin_memory: put batches in page-locked memory, for copies to a GPU that do not wait.

        Raises:
            UsageError: all that is wrong with caches and options, in one message.
        """
        super().__init__()
        self.caches = open_caches(caches)
        self.batch_size, self.seed, self.temperature = batch_size, seed, temperature
        self.rank, self.world_size, self.accumulation = rank, world_size, accumulation
        self.weights = tuple(weights) if weights is not None else (1.0,) * len(self.caches)
        self.shuffle, self.drop_last = shuffle, drop_last
        self.tokenize, self.prefetch, self.pin_memory = tokenize, prefetch, pin_memory
        self.cursor = cursor if isinstance(cursor, Cursor) else Cursor.from_dict(cursor or _BEGIN)
        self.start = self.cursor  # where it was set to begin, however far it has been read
        problems = []
        least = {
            "batch_size": 1,
            "world_size": 1,
            "accumulation": 1,
            "prefetch": 1,
            "seed": 0,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                problems.append(f"{name} is {getattr(self, name)}, expected at least {low}.")
        if group is not None and group < 1:
            problems.append(f"group is {group}, expected at least 1.")
        if not 0 <= rank < max(1, world_size):
            problems.append(f"rank {rank} is not one of {world_size} ranks.")
        if len(self.weights) != len(self.caches):
            problems.append(f"{len(self.weights)} weights for {len(self.caches)} caches.")
        elif not all(math.isfinite(w) and w > 0 for w in self.weights):
            problems.append(f"cache weights must be above 0, not {self.weights}.")
        tried = temperature(0) if callable(temperature) else temperature
        check_caches(self.caches, () if tried is None else (tried,), problems)
        if self.rows == 0 or len(self) == 0:
            raise UsageError(
                f"an epoch has {self.rows} rows, fewer than one batch of {batch_size}. Use a "
                "larger cache, a smaller batch size, or keep the last batch."
            )
        self.group = self._usual_group() if group is None else group

    def _usual_group(self) -> int:
        stored = [self.caches[s.cache].manifest.shards[s.shard].bytes for s in self._sources]
        return max(_GROUP_SHARDS, _GROUP_BYTES * len(stored) // sum(stored))

    @cached_property
    def _sources(self) -> list[EpochShard]:
        return sources(self.caches, self.weights)

    @cached_property
    def rows(self) -> int:
        """Rows of an epoch, over all ranks."""
        return sum(source.rows for source in self._sources)

    @property
    def steps(self) -> int:
        """Global batches of an epoch."""
        return self.rows // self.batch_size if self.drop_last else -(-self.rows // self.batch_size)

    def __len__(self) -> int:
        """Batches that a whole epoch gives this rank."""
        return self.steps * self.accumulation

    def state_dict(self) -> dict[str, int]:
        """The cursor after the last global batch that was handed out whole."""
        return self.cursor.to_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a cursor: the next iteration begins there."""
        self.cursor = self.start = Cursor.from_dict(state)

    def __iter__(self) -> Iterator[Batch]:
        if get_worker_info() is not None:
            raise UsageError(
                "a TargetStream reads in threads of its own: worker processes would repeat it. "
                "Use DataLoader(stream, batch_size=None, num_workers=0)."
            )
        return self.batches(self.cursor.epoch + 1)

    def batches(self, epochs: int) -> Iterator[Batch]:
        """Batches from the cursor on until `epochs` epochs are done, read ahead across epochs."""
        begin = self._settled(self.cursor)
        groups = Background(self._groups(begin, epochs), 1, "kdcache-decode")
        ready = Background(self._collated(groups, begin), self.prefetch, "kdcache-collate")
        try:
            for batch, after in ready:
                if after is not None:
                    self.cursor = after
                yield batch
        finally:
            # The reader first: the thread that collates may be waiting for it.
            groups.close()
            ready.close()

    def _groups(self, cursor: Cursor, epochs: int) -> Iterator[_Group]:
        plan = self._plan(cursor, epochs)
        now = next(plan, None)
        while now is not None:
            later = next(plan, None)
            # Shards in an object store are fetched while those before them are read.
            shards = [s for pairs, _ in (now, later or now) for s in self._shards(pairs)]
            for index, cache in enumerate(self.caches):
                cache.prefetch(dict.fromkeys(s for c, s in shards if c == index))
            yield self._decode(*now)
            now = later

    def _plan(self, cursor: Cursor, epochs: int) -> Iterator[tuple[np.ndarray, int]]:
        """The order of each group, (source, row), and its epoch."""
        sizes = [source.rows for source in self._sources]
        for epoch in range(cursor.epoch, epochs):
            start = cursor.rows_seen if epoch == cursor.epoch else 0
            for pairs in order(
                self.seed, epoch, sizes, self.group, start=start, shuffle=self.shuffle
            ):
                yield pairs, epoch

    def _shards(self, pairs: np.ndarray) -> dict[tuple[int, int], int]:
        """Cache and shard of what a group needs, in the order it is read, and its place there.

        A repeated cache may have one shard twice in a group.
        """
        chosen = [self._sources[i] for i in np.unique(pairs[:, 0])]
        shards = dict.fromkeys((source.cache, source.shard) for source in chosen)
        return {shard: place for place, shard in enumerate(shards)}

    def _decode(self, pairs: np.ndarray, epoch: int) -> _Group:
        members, which = np.unique(pairs[:, 0], return_inverse=True)
        chosen = [self._sources[member] for member in members]
        shards, soft = self._shards(pairs), self.temperature is not None
        pool = ShardRows([self.caches[c].read(s, targets=soft) for c, s in shards], soft=soft)
        rows = pairs[:, 1].copy()
        for index, source in enumerate(chosen):
            if source.rows != source.stored:
                here = which == index
                rows[here] = source.keep(self.seed, epoch, rows[here])
        rows += pool.first[[shards[c.cache, c.shard] for c in chosen]][which]
        return _Group(pool, rows, epoch)

    def _collated(
        self, groups: Iterator[_Group], cursor: Cursor
    ) -> Iterator[tuple[Batch, Cursor | None]]:
        pieces = self.world_size * self.accumulation
        parts: list[list[ShardData]] = [[] for _ in range(self.accumulation)]
        positions, filled = 0, 0
        for group in groups:
            done = 0
            # With drop_last the cursor is in the next epoch while rows of this one are left.
            while done < len(group.rows) and cursor.epoch == group.epoch:
                size = min(self.batch_size, self.rows - cursor.rows_seen)
                now = group.rows[done : done + size - filled]
                positions += int(group.pool.positions[now].sum())
                bounds = slices(size, pieces)
                for i, part in enumerate(parts):
                    k = i * self.world_size + self.rank
                    mine = now[max(0, bounds[k] - filled) : max(0, bounds[k + 1] - filled)]
                    if len(mine):
                        part.append(group.pool.take(mine))
                done += len(now)
                filled += len(now)
                if filled < size:
                    break
                after = self._after(cursor, size)
                for i, part in enumerate(parts):
                    # A rank without a row still takes part in the step, with weight zero.
                    count = max(positions, 1) if part else math.inf
                    data = join(part) if part else group.pool.take(now[-1:])
                    batch = self._collate(data, cursor.step, count)
                    yield batch, after if i == len(parts) - 1 else None
                cursor, parts, positions, filled = after, [[] for _ in parts], 0, 0
            del group  # its memory goes before the next one is waited for

    def _after(self, cursor: Cursor, size: int) -> Cursor:
        return self._settled(Cursor(cursor.epoch, cursor.rows_seen + size, cursor.step + 1))

    def _settled(self, cursor: Cursor) -> Cursor:
        """The cursor, or the beginning of the next epoch if this one has no batch left."""
        left = self.rows - cursor.rows_seen
        if left <= 0 or (self.drop_last and left < self.batch_size):
            return Cursor(cursor.epoch + 1, 0, cursor.step)
        return cursor

    def _collate(self, data: ShardData, step: int, count: float) -> Batch:
        temperature = self.temperature(step) if callable(self.temperature) else self.temperature
        batch = collate(
            data,
            pad_id=self.caches[0].spec.pad_id,
            temperature=temperature,
            count=count,
            tokenize=self.tokenize,
        )
        return {k: v.pin_memory() for k, v in batch.items()} if self.pin_memory else batch


_BEGIN = Cursor().to_dict()
