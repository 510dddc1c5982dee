"""Streaming a cache into training: a global order that is a pure function, batches, and a cursor.

Order: see `kdcache.stream.order`. A global batch is the next `batch_size` rows of it; the last one
of an epoch may be shorter, and none spans two epochs. Its workers divide the rows into equal parts
(give or take a row), and each of them its part into `accumulation` slices. The global batches
depend on the number of streams, which a run keeps, and on nothing else; so a position in the order
(`Cursor`) is all that resuming needs, on any number of workers. A slice that would be empty holds
one row of weight zero (`count` = infinity): every rank takes the same number of steps,
nothing is dropped and nothing counts twice.

Cost: one thread reads groups, a second cuts, decodes and collates batches, both ahead of the
training step and mostly without Python's global lock: half a microsecond of CPU time a position at
`sample:20` (`benchmarks/stream.py`). With as many streams as workers, or a multiple, a rank reads
its own streams: 1/world_size of the cache, and the shards at the ends of its stretches, which
another rank reads too. With one stream each rank reads the whole cache. Memory holds, for each
stream that a rank reads, the group being cut and the next one, and `prefetch` batches, however
large the cache.
Guarantee: every row exactly once an epoch (weights aside), whatever the world size, accumulation,
streams, group size and restart point.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from kdcache.cache import Cache
from kdcache.cache.shard import ShardData
from kdcache.domains import Weights
from kdcache.errors import UsageError
from kdcache.stream.batch import Batch, Reading, Tokenize, reading_of, shared_columns
from kdcache.stream.checks import check_caches, check_mix, checked_weights, open_caches
from kdcache.stream.order import Cursor, EpochShard, Share, order, rows_by_domain, share, sources
from kdcache.stream.parallel import Background, Group, Made, Parts, SumOverRanks
from kdcache.stream.shard_rows import ShardRows, join

_GROUP_BYTES = 1 << 25
_GROUP_SHARDS = 3


class TargetStream(IterableDataset[Batch]):
    """Batches of one rank, read ahead of the training step.

    Iterating gives the rest of the current epoch and leaves the cursor at the next one, so
    `for epoch in range(3): for batch in stream: ...` trains three epochs. It is a loader itself,
    with the protocol of torchdata's `StatefulDataLoader`: `state_dict` after a step is where to go
    on. A `DataLoader` around it, without worker processes, adds nothing and keeps no state.

    Attributes:
        left_out: int64 [2], of the rows of the batches that were handed out, for a student of
            another tokenizer: stretches of text that have no labels, because its tokens do not give
            their bytes, and labels left out, because its rows would be too long.
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
        streams: int | None = None,
        sum_over: Callable[[int], Tensor | int] | None = None,
        weights: Weights | Mapping[str, float] | Sequence[float | str] | None = None,
        group: int | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        cursor: Cursor | Mapping[str, int] | None = None,
        tokenize: Tokenize | None = None,
        cross: Reading | None = None,
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
            accumulation: slices into which each rank cuts its part of a global batch.
            streams: stretches of the cache that are read side by side: the global batches depend
                on them, and a rank reads its own. Default: those of the cursor, or one a worker.
            sum_over: adds up a number over all ranks: called for each step by the thread that takes
                the batches, where there are several ranks and several streams. Default:
                `SumOverRanks()`, by torch.distributed.
            weights: how often an epoch uses rows: of each cache a number, or of domains by their
                names (`{"code": 0.5}`). 2 repeats them, 0.5 takes another half each epoch, 0 leaves
                a domain out. Default: 1 for all.
            group: shards whose rows are shuffled together; decides the memory taken and how soon
                the first batch comes. Default: as many as make 32 MiB of stored bytes, but 3 at
                least; divided by the number of streams.
            shuffle: False keeps the stored order (evaluation).
            drop_last: leave a shorter last batch of an epoch out.
            tokenize: text to tensors, for classifiers with a tokenizer of their own.
            cross: how the student reads, such as a `CrossTokenizer` for language models with a
                tokenizer of their own. Default: by `tokenize`, or else the cached ids.
            prefetch: batches ready in advance.
            pin_memory: put batches in page-locked memory, for copies to a GPU that do not wait.

        Raises:
            UsageError: all that is wrong with caches and options, in one message.
        """
        super().__init__()
        self.caches = open_caches(caches)
        self.task = self.caches[0].spec.task if self.caches else ""
        self.batch_size, self.seed, self.temperature = batch_size, seed, temperature
        self.rank, self.world_size, self.accumulation = rank, world_size, accumulation
        self.shuffle, self.drop_last = shuffle, drop_last
        self.prefetch, self.pin_memory = prefetch, pin_memory
        self.reading = reading_of(self.caches[0].spec.pad_id, tokenize, cross)
        self._streams, self._group = streams, group
        self._sum_over = sum_over
        self.cursor = cursor if isinstance(cursor, Cursor) else Cursor()
        self.start = self.cursor  # where it was set to begin, however far it has been read
        self.left_out = np.zeros(2, np.int64)
        problems: list[str] = []
        self.weights = checked_weights(weights, self.caches, problems)
        numbers = {"batch_size": batch_size, "world_size": world_size, "seed": seed}
        numbers |= {"accumulation": accumulation, "prefetch": prefetch}
        numbers |= {
            name: n for name, n in (("group", group), ("streams", streams)) if n is not None
        }
        for name, number in numbers.items():
            if number < (low := int(name != "seed")):
                problems.append(f"{name} is {number}, expected at least {low}.")
        if not 0 <= rank < max(1, world_size):
            problems.append(f"rank {rank} is not one of {world_size} ranks.")
        tried = temperature(0) if callable(temperature) else temperature
        asked = () if tried is None else (tried,)
        check_caches(self.caches, asked if self.reading.reads_targets else (), problems)
        check_mix(self.weights, self.caches, self.domain_rows)
        if self.rows == 0 or len(self) == 0:
            raise UsageError(
                f"an epoch has {self.rows} rows, fewer than one batch of {batch_size}. Use a "
                "larger cache, a smaller batch size, or keep the last batch."
            )
        self.kept = shared_columns(self.caches)
        if cursor is not None and not isinstance(cursor, Cursor):
            self.load_state_dict(cursor)

    @cached_property
    def domain_rows(self) -> dict[tuple[int, str | None], int]:
        """Rows of an epoch, by cache (its number) and domain (None where it has no name)."""
        return rows_by_domain(self.caches, self._sources)

    def by_domain(self) -> dict[str | None, TargetStream]:
        """Of each domain that an epoch has rows of, a stream of these alone, from its first row.

        The streams together have the rows of this one. Rows of caches without names are under None.
        """
        found = {}
        for domain in dict.fromkeys(name for (_, name), rows in self.domain_rows.items() if rows):
            stream = copy.copy(self)
            for known in ("domain_rows", "rows", "_usual_group"):
                stream.__dict__.pop(known, None)
            stream._sources = [
                source
                for source in self._sources
                if self.caches[source.cache].manifest.shards[source.shard].domain == domain
            ]
            # A copy shares the opened caches and nothing that depends on which rows an epoch has.
            stream.cursor = stream.start = Cursor()
            found[domain] = stream
        return found

    @property
    def streams(self) -> int:
        """Stretches of the cache that are read side by side."""
        return self._streams or self.world_size

    @property
    def group(self) -> int:
        """Shards of a stream whose rows are shuffled together."""
        # A rank holds two groups of each of its streams: memory must not grow with their number.
        return self._group or -(-self._usual_group // self.streams)

    @cached_property
    def _usual_group(self) -> int:
        """Of all streams together."""
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
        """The cursor after the last global batch that was handed out whole, and the streams."""
        return {**self.cursor.to_dict(), "streams": self.streams}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a cursor: the next iteration begins there, with the streams it counts.

        Raises:
            UsageError: it counts rows of other streams than this stream was made with.
        """
        streams = state.get("streams", self._streams)
        if self._streams not in (None, streams):
            raise UsageError(
                f"the state is of {streams} streams, and this stream was made with "
                f"{self._streams}: their order differs. Leave `streams` out to continue."
            )
        # Another number of streams would be another order, in which the cursor counts other rows.
        self._streams = streams
        self.cursor = self.start = Cursor.from_dict(state)

    def __iter__(self) -> Iterator[Batch]:
        if get_worker_info() is not None:
            raise UsageError(
                "a TargetStream reads in threads of its own: worker processes would repeat it. "
                "Iterate the stream itself, without a DataLoader."
            )
        return self.batches(self.cursor.epoch + 1)

    def batches(self, epochs: int) -> Iterator[Batch]:
        """Batches from the cursor on until `epochs` epochs are done, read ahead across epochs."""
        sum_over = self._sum_over or SumOverRanks()
        if self._summed and isinstance(sum_over, SumOverRanks):
            sum_over.check(self.world_size)
        cursor = self._settled(self.cursor)
        # A stream's next group is read while its present one is cut.
        groups = Background(self._groups(cursor, epochs), self._read_at_once, "kdcache-decode")
        ready = Background(self._collated(groups, cursor, epochs), self.prefetch, "kdcache-collate")
        count: Tensor | None = None
        try:
            for made in ready:
                # Summed here, not by the threads: collectives of a process must come in one order.
                if made.positions is not None:
                    if made.first:
                        total = torch.as_tensor(sum_over(made.positions))
                        # A step of rows without any position has the loss 0 and not NaN.
                        count = total.clamp_min(1).float()
                    made.batch["count"] = torch.tensor(math.inf) if made.empty else count
                # Only with a step's last slice: a resume begins with whole steps.
                if made.after is not None:
                    self.cursor = made.after
                self.left_out = self.left_out + made.left_out
                yield made.batch
        finally:
            # The reader first: the thread that collates may be waiting for it.
            groups.close()
            ready.close()

    @property
    def _summed(self) -> bool:
        """Whether a rank does not read all rows of a batch, and cannot count their positions."""
        return self.streams > 1 and self.world_size > 1

    @property
    def _read_at_once(self) -> int:
        """Streams of a rank."""
        return -(-self.streams // self.world_size)

    def _steps(self, cursor: Cursor, epochs: int) -> Iterator[tuple[Cursor, int, Share]]:
        """Of each global batch: the cursor before it, its rows, and which this rank reads."""
        while cursor.epoch < epochs:
            size = min(self.batch_size, self.rows - cursor.rows_seen)
            mine = share(
                cursor.rows_seen,
                size,
                streams=self.streams,
                rank=self.rank,
                world_size=self.world_size,
                slices=self.accumulation,
            )
            yield cursor, size, mine
            cursor = self._after(cursor, size)

    def _groups(self, cursor: Cursor, epochs: int) -> Iterator[Group]:
        coming: deque[tuple[int, int, np.ndarray, int]] = deque()
        plan = self._plan(cursor, epochs)
        while True:
            # One group ahead for each stream: more would be fetched sooner than it is needed.
            while len(coming) <= self._read_at_once and (planned := next(plan, None)) is not None:
                coming.append(planned)
            if not coming:
                return
            # Shards in an object store are fetched while those before them are read.
            shards = [s for *_, pairs, _ in coming for s in self._shards(pairs)]
            for index, cache in enumerate(self.caches):
                cache.prefetch(dict.fromkeys(s for c, s in shards if c == index))
            stream, first, pairs, epoch = coming.popleft()
            yield Group(stream, first, *self._decode(pairs, epoch))

    def _plan(self, cursor: Cursor, epochs: int) -> Iterator[tuple[int, int, np.ndarray, int]]:
        """The groups this rank reads, in the order in which its batches need them.

        Yields:
            The stream, the row of it that comes first, (source, row) of each row, and the epoch.
        """
        sizes = [source.rows for source in self._sources]
        # Made when a stream is first needed: most ranks read few of many streams.
        groups: dict[int, Iterator[np.ndarray]] = {}
        ends: dict[int, int] = {}  # rows of each stream after the last that is planned
        epoch = cursor.epoch
        for now, _, mine in self._steps(cursor, epochs):
            if now.epoch != epoch:
                epoch, groups, ends = now.epoch, {}, {}
            for stream, low, high in mine.reads:
                if stream not in ends:
                    ends[stream] = low
                    groups[stream] = order(
                        self.seed,
                        epoch,
                        sizes,
                        self.group,
                        start=low,
                        shuffle=self.shuffle,
                        streams=self.streams,
                        stream=stream,
                    )
                while ends[stream] < high:
                    pairs, first = next(groups[stream]), ends[stream]
                    ends[stream] += len(pairs)
                    if ends[stream] > low:  # else another rank's
                        yield stream, first, pairs, epoch

    def _shards(self, pairs: np.ndarray) -> dict[tuple[int, int], int]:
        """Cache and shard of what a group needs, in the order it is read, and its place there.

        A repeated cache may have one shard twice in a group.
        """
        chosen = [self._sources[i] for i in np.unique(pairs[:, 0])]
        shards = dict.fromkeys((source.cache, source.shard) for source in chosen)
        return {shard: place for place, shard in enumerate(shards)}

    def _decode(self, pairs: np.ndarray, epoch: int) -> tuple[np.ndarray, ShardRows]:
        """Rows of an epoch, (source, row), as rows of a pool of their shards."""
        # Each shard is read once, however many rows of it a group has.
        members, which = np.unique(pairs[:, 0], return_inverse=True)
        chosen = [self._sources[member] for member in members]
        shards = self._shards(pairs)
        soft = self.temperature is not None and self.reading.reads_targets
        parts = [
            self.reading.read(self.caches[c], shard, targets=soft, kept=self.kept)
            for c, shard in shards
        ]
        pool = ShardRows(parts, soft=soft)
        rows = pairs[:, 1].copy()
        for index, source in enumerate(chosen):
            # A weighted source has rows of an epoch, of which `keep` tells the stored ones.
            if source.rows != source.stored:
                here = which == index
                rows[here] = source.keep(self.seed, epoch, rows[here])
        rows += pool.first[[shards[c.cache, c.shard] for c in chosen]][which]
        return rows, pool

    def _collated(self, groups: Iterator[Group], cursor: Cursor, epochs: int) -> Iterator[Made]:
        held: dict[int, Group] = {}
        spare: ShardData | None = None
        epoch = cursor.epoch
        for now, size, mine in self._steps(cursor, epochs):
            if now.epoch != epoch:
                epoch, held = now.epoch, {}
            parts = Parts(mine.bounds)
            for read in mine.reads:
                self._take(parts, read, held, groups)
            slices, count = parts.slices, max(parts.positions, 1)
            # Made once and only if needed: it costs reading a shard where nothing is held.
            if spare is None and not all(slices):
                spare = self._spare(held, epoch)
            for i, part in enumerate(slices):
                # A rank without a row still takes part in the step, with weight zero.
                data = join(part) if part else spare
                assert data is not None
                batch = self._collate(data, now.step, count if part else math.inf)
                after = self._after(now, size) if i == len(slices) - 1 else None
                summed = parts.positions if self._summed else None
                yield Made(batch, summed, not part, i == 0, after, self.reading.left_out(part))
            del parts, slices, part, data, batch  # their memory goes before more is waited for

    @staticmethod
    def _take(
        parts: Parts,
        read: tuple[int, int, int],
        held: dict[int, Group],
        groups: Iterator[Group],
    ) -> None:
        """Rows of one stream, which other groups may follow; a group goes when it is used up."""
        stream, low, high = read
        while low < high:
            if stream not in held or held[stream].end <= low:
                held.pop(stream, None)
                held[stream] = next(groups)
                assert held[stream].stream == stream, "groups come in the order of their need"
            group = held[stream]
            rows = group.rows[low - group.first : high - group.first]
            parts.add(group.pool, rows)
            low += len(rows)
            if group.end == low:
                del held[stream]
            # Its rows go before the next group is waited for, or two would be held.
            del group

    def _spare(self, held: Mapping[int, Group], epoch: int) -> ShardData:
        """Any row, for slices without one."""
        for group in held.values():
            return group.pool.take(group.rows[:1])
        source = next(i for i, source in enumerate(self._sources) if source.rows)
        rows, pool = self._decode(np.array([[source, 0]]), epoch)
        return pool.take(rows)

    def _after(self, cursor: Cursor, size: int) -> Cursor:
        return self._settled(Cursor(cursor.epoch, cursor.rows_seen + size, cursor.step + 1))

    def _settled(self, cursor: Cursor) -> Cursor:
        """The cursor, or the beginning of the next epoch if this one has no batch left."""
        # A cursor at an end is the next beginning, so that one state has one form.
        left = self.rows - cursor.rows_seen
        if left <= 0 or (self.drop_last and left < self.batch_size):
            return Cursor(cursor.epoch + 1, 0, cursor.step)
        return cursor

    def _collate(self, data: ShardData, step: int, count: float) -> Batch:
        temperature = self.temperature(step) if callable(self.temperature) else self.temperature
        batch = self.reading.collate(data, temperature=temperature, count=count)
        return {k: v.pin_memory() for k, v in batch.items()} if self.pin_memory else batch
