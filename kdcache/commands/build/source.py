"""What a span worker asks of its source: to read a span, and to make its shard.

A build's source is a corpus and a teacher (`kdcache.commands.build.source`), that of `transcode`
another cache, and that of `import` files: each gives rows and targets (`TargetSource`). That of
`generate` writes text. All else of a worker, and all of driver, Ray, faults, resume and seal, is
the same for all.

The source of a build: a corpus, and the teacher that answers its rows.

A teacher in an engine is given the rows of both spans of a worker, some batches ahead, so it always
has rows to compute; a lock admits one span to the output layer and the codec, a batch at a time.

Cost: the teacher in memory, and one slice of its logits; of an engine, the states of six batches.
"""

from __future__ import annotations

import concurrent.futures as futures
import itertools
import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import numpy as np
import torch

from kdcache.cache import Cache, ShardEntry
from kdcache.cache.shard import ShardData
from kdcache.commands.build.packer import (
    Packed,
    Packer,
    Positions,
    Steps,
    in_row_order,
    packing_threads,
)
from kdcache.corpus import Corpus, ReadStats, Record, Span
from kdcache.corpus.records import shorten
from kdcache.errors import KdcacheError, UsageError, doing
from kdcache.rows import Row, RowSpec, make_encoder
from kdcache.rows.batches import batches, documents_of
from kdcache.rows.spec import no_label
from kdcache.targets import Hidden, TargetWriter
from kdcache.tasks import TASKS
from kdcache.teacher import Teacher, TeacherFiles, TeacherOptions, find_batch_tokens, peak_share
from kdcache.teacher.memory import Encoding


class Work(Protocol):
    """A unit of work: it becomes one shard."""

    @property
    def index(self) -> int:
        """The number of the span, and of its shard."""

    @property
    def records(self) -> str:
        """Where its records are, for a person who looks for them."""

    @property
    def group(self) -> str:
        """What else it should share a worker with: units of one group; empty for none."""


@dataclass(kw_only=True)
class SpanRead:
    """What was read of a span, and what was left out.

    Attributes:
        skipped: records that were left out, empty or broken.
        filtered: records that filters left out; None where there are no filters.
        truncated: documents that were cut.
        reasons: why the first few records were left out.
    """

    skipped: int = 0
    filtered: int | None = None
    truncated: int = 0
    reasons: tuple[str, ...] = ()


@dataclass(kw_only=True)
class SpanRows(SpanRead):
    """The rows of a span, read and not yet answered.

    Attributes:
        shard: makes the shard's content of the targets and the codes of what is kept next to them,
            by the column's name; all in row-major order.
        clipped_mass: what is known of it; None where the answers tell.
    """

    shard: Callable[..., ShardData]
    clipped_mass: float | None = None


Answers: TypeAlias = tuple[list[futures.Future[Packed]], list[np.ndarray]]
"""Slices of a span on their way, and which position of the span, counted row by row, each of their
positions is."""

WorkT = TypeVar("WorkT", bound=Work, contravariant=True)
ReadT = TypeVar("ReadT", bound=SpanRead)
RowsT = TypeVar("RowsT", bound=SpanRows)
Turn: TypeAlias = Callable[[], AbstractContextManager[None]]
"""What a source enters where it answers: one span at a time, if it takes turns."""


class Source(ABC, Generic[WorkT, ReadT]):
    """What makes the shards of spans. `read` may run alongside `make`, of another span.

    Attributes:
        device: kind of device that answers.
        batch_tokens: size of a batch, for the events.
        takes_turns: whether it answers one span at a time.
        cores: of the CPU that its worker has.
    """

    device: str = "cpu"
    batch_tokens: int = 0
    takes_turns: bool = True
    cores: int = 1

    @abstractmethod
    def read(self, work: WorkT, steps: Steps) -> ReadT:
        """What a span holds.

        Args:
            steps: counts what is read, and raises in a stopped worker.

        Raises:
            UsageError: its input is unusable.
        """

    @abstractmethod
    def make(self, work: WorkT, read: ReadT, steps: Steps, turn: Turn) -> ShardEntry:
        """Make the shard of a span and commit it.

        Args:
            steps: counts the batches, and raises in a stopped worker.
            turn: entered for as long as it answers.

        Raises:
            UsageError: its input or the teacher's logits are unusable.
            IncompleteError: no space left.
        """

    def close(self) -> None:
        """End what runs outside of this process."""


class SourceOptions(Protocol):
    """A source that a worker can open: it is sent to each actor once."""

    def open(self, url: str) -> Source[Any, Any]:
        """The source, for the folder that is being made there."""


class TargetSource(Source[WorkT, RowsT]):
    """A source of rows and soft targets, for a cache."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.codec = cache.codec()
        self._writer = TargetWriter(self.codec, cache.rank_to_id)

    @abstractmethod
    def answer(self, rows: RowsT, packer: Packer, steps: Steps) -> Answers:
        """Have the positions of rows encoded, and packed; never synchronises with the device.

        `steps` counts the batches.
        """

    def make(self, work: WorkT, read: RowsT, steps: Steps, turn: Turn) -> ShardEntry:
        """See `Source.make`."""
        threads = packing_threads(self.device, self.cores)
        with Packer(self._writer, self.cache.spec.seed, work.index, threads) as packer:
            with turn():
                packing, places = self.answer(read, packer, steps)
            # The next span has its turn while the last slices of this one are copied and packed.
            steps()
            packed = [part.result() for part in packing]
            targets, kept = in_row_order(self.codec, packed, places)
        steps()
        clipped = np.float32(0)
        for part in packed:
            clipped += part.clipped
        names = kept.keys() & self.cache.spec.kept
        shard = read.shard(targets, **{name: kept[name] for name in names})
        if (unsure := self.cache.spec.positions) is not None and shard.hard_labels is None:
            from kdcache.cache.unsure import only_unsure

            shard = only_unsure(shard, unsure["entropy_code"])
        return self.cache.commit(
            work.index,
            shard,
            skipped=read.skipped,
            filtered=read.filtered,
            clipped_mass=float(clipped) if read.clipped_mass is None else read.clipped_mass,
        )


logger = logging.getLogger(__name__)

_AHEAD = 2  # batches of a span that an engine is given next to the one that is awaited


@dataclass(frozen=True)
class TeacherSourceOptions:
    """A corpus and its teacher.

    Attributes:
        rows: how records become rows.
        teacher: which models to load, and how.
        batch_tokens: padded tokens of a batch, at most (one row may be longer).
        find_batch: whether such a batch is tried first, and halved until it fits the GPU.
    """

    rows: RowSpec
    teacher: TeacherOptions
    batch_tokens: int
    find_batch: bool = False

    def open(self, url: str) -> TeacherSource:
        """Load the teacher."""
        return TeacherSource(self, Cache.resume(url))


@dataclass(kw_only=True)
class TaughtRows(SpanRows):
    """The rows of a span, for a teacher."""

    rows: Sequence[Row] = ()


class TeacherSource(TargetSource[Span, TaughtRows]):
    """A loaded teacher that answers the rows of a corpus."""

    def __init__(self, options: TeacherSourceOptions, cache: Cache) -> None:
        super().__init__(cache)
        self.options, self.spec = options, cache.spec
        self.tokenizer = cache.tokenizer()
        self.teacher = Teacher(_encoding(options.teacher), self.spec.vocab_size)
        self._encode = Encoding(self.codec, self.spec.kept, options.teacher.temperatures)
        self.device = self.teacher.device.type
        self.takes_turns = self.teacher.engine is None  # an engine is given the rows of all
        self._turn = threading.Lock()
        self._probed = False  # on rows of the corpus
        self._inside = False  # whether an engine encodes
        self.batch_tokens = options.batch_tokens
        if options.find_batch and self.device == "cuda":
            self.batch_tokens = self._find_batch_tokens()
        elif options.teacher.compile:
            self._try_batch(self.batch_tokens)  # compiles before the first span

    def _find_batch_tokens(self) -> int:
        found = find_batch_tokens(
            lambda tokens: peak_share(lambda: self._try_batch(tokens), self.teacher.gpus),
            self.options.batch_tokens,
            self.options.rows.max_length + (self.options.rows.max_source_length or 0),
        )
        logger.info("batches have %d tokens", found)
        return found

    def _try_batch(self, tokens: int) -> None:
        """Run teacher and codec over a batch of the longest rows."""
        ids = np.arange(self.options.rows.max_length, dtype=np.int32) % self.spec.vocab_size
        each = TASKS[self.spec.task].per_token
        row = Row(ids, ids if each else no_label(self.spec.task, self.spec.vocab_size))
        if TASKS[self.spec.task].source:
            longest = self.options.rows.max_source_length or 1
            row = replace(row, source=np.arange(longest, dtype=np.int32) % self.spec.vocab_size)
        for piece in self.teacher.slices([row] * max(1, tokens // sum(row.sizes))):
            zeros = torch.zeros(len(piece.logits), dtype=torch.float64)
            self._encode(piece, zeros, zeros.long())
        self.teacher.take_clipped_mass()

    def read(self, work: Span, steps: Steps) -> TaughtRows:
        """See `Source.read`."""
        how = self.options.rows
        stats = ReadStats()
        encoder = make_encoder(how, self.tokenizer)
        records = Corpus.read(
            work, columns=how.columns, on_error=how.on_error, stats=stats, progress=steps
        )
        rows = list(encoder.encode(counted_records(records, steps), span=work.index))
        return TaughtRows(
            shard=partial(ShardData.from_rows, self.options.teacher.task, rows),
            skipped=stats.skipped + encoder.skipped + encoder.empty,
            filtered=stats.filtered if work.reading.filters else None,
            truncated=encoder.truncated,
            reasons=(*stats.reasons, *encoder.stats.reasons),
            rows=rows,
        )

    def answer(self, rows: TaughtRows, packer: Packer, steps: Steps) -> Answers:
        """See `Source.answer`."""
        with self._turn, self._naming(rows.rows):
            if rows.rows and not self._probed:
                self._probe(rows.rows)
        parts = documents_of(rows.rows)
        try:
            return self._ask(parts, Positions.of(rows.rows, self.spec.task), packer, steps)
        finally:
            if self.teacher.engine is not None:
                self.teacher.engine.forget(parts)

    def close(self) -> None:
        """See `Source.close`."""
        self.teacher.close()

    def _probe(self, rows: Sequence[Row]) -> None:
        """Probe the teacher, and compare its output layer with the one that the cache keeps."""
        self.teacher.probe(rows)
        if isinstance(self.codec, Hidden):
            mine, kept = self.teacher.layer, self.codec.layer
            if mine is None or kept is None or not mine.same(kept):
                raise UsageError(
                    "the output layer that this cache keeps is not this teacher's. Build with "
                    "another --out."
                )
        if self.teacher.engine is not None:
            self._inside = self.teacher.engine.encode_inside(self.cache.url, self._encode, rows[0])
            self.teacher.take_clipped_mass()
        self._probed = True

    def _ask(self, rows: Sequence[Row], every: Positions, packer: Packer, steps: Steps) -> Answers:
        """Run all rows of a span through the teacher, or their documents.

        Args:
            rows: what the teacher reads at a time, in order.
            every: the positions of the span, which are theirs one after another.
        """
        counts = [len(row.positions(self.spec.task)) for row in rows]
        offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        packed: list[futures.Future[Packed]] = []
        numbers: list[np.ndarray] = []
        sizes = [row.sizes for row in rows]
        noise = every.noise(packer.seed, packer.span)
        waiting = deque(batches(sizes, self.batch_tokens))

        def keys(some: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
            pieces = [slice(offsets[i], offsets[i + 1]) for i in some]
            return [(noise[piece], every.labels[piece]) for piece in pieces]

        while waiting:
            steps.begin(len(waiting))
            if (engine := self.teacher.engine) is not None:
                for ahead in itertools.islice(waiting, 1 + _AHEAD):
                    engine.expect([rows[i] for i in ahead], keys(ahead) if self._inside else None)
                engine.wait([rows[i] for i in waiting[0]])
            batch = waiting.popleft()
            here = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in batch])
            try:
                parts = self._run([rows[i] for i in batch], every.take(here), noise[here], packer)
            except torch.OutOfMemoryError as error:
                self.teacher.take_clipped_mass()  # all of this batch is asked again
                self._shrink([sum(sizes[i]) for i in batch], error)
                left = [i for rows_of in (batch, *waiting) for i in rows_of]
                cut = batches([sizes[i] for i in left], self.batch_tokens)
                waiting = deque([left[i] for i in smaller] for smaller in cut)
                continue
            steps.batch(len(here))
            packed.extend(parts)
            numbers.append(here)
        return packed, numbers

    def _run(
        self, rows: Sequence[Row], positions: Positions, noise: np.ndarray, packer: Packer
    ) -> list[futures.Future[Packed]]:
        """One batch through teacher and codec."""
        if self._inside and self.teacher.engine is not None:
            encoded = self.teacher.engine.encoded(rows)
            clipped = encoded.pop("clipped").sum()
            return [packer.put(encoded, clipped, positions, 0)]
        uniform, labels = (
            self.teacher.to_device(torch.from_numpy(numbers))
            for numbers in (noise, positions.labels)
        )
        parts = []
        done = 0
        with self._turn, self._naming(rows):
            for piece in self.teacher.slices(rows):
                end = done + len(piece.logits)
                encoded = self._encode(piece, uniform[done:end], labels[done:end])
                parts.append(packer.put(encoded, self.teacher.take_clipped_mass(), positions, done))
                done = end
        assert done == len(positions.rows), "the teacher answers every position"
        return parts

    @contextmanager
    def _naming(self, rows: Sequence[Row]) -> Iterator[None]:
        """Have an exception of the teacher's name the first row that it has by itself, too."""
        try:
            yield
        except (KdcacheError, torch.OutOfMemoryError):
            raise
        except Exception:
            self.teacher.take_clipped_mass()  # all of this batch is asked again
            with doing(f"the teacher answered {self._failing(rows)}"):
                raise

    def _failing(self, rows: Sequence[Row]) -> str:
        """The first row that the teacher cannot answer by itself, in words."""
        for row in rows if self.takes_turns else ():
            try:
                deque(self.teacher.slices([row]), maxlen=0)
            except Exception:
                ids = row.input_ids if row.source is None else row.source
                text = self.tokenizer.decode(ids) if row.text is None else row.text
                return f"the row {shorten(text, 80)!r}"
        return f"{len(rows)} rows, each of which it can answer"

    def _shrink(self, lengths: Sequence[int], error: torch.OutOfMemoryError) -> None:
        """Remember half the size of a batch that did not fit, for this span and later ones."""
        if len(lengths) == 1:
            raise UsageError(
                f"one row of {lengths[0]} tokens does not fit the device together with the "
                "teacher. Use a smaller --max-length, or more GPUs (--worker gpus=…)."
            ) from error
        torch.cuda.empty_cache()
        self.batch_tokens = min(self.batch_tokens, len(lengths) * max(lengths)) // 2
        logger.warning("out of device memory: batches have %d tokens now", self.batch_tokens)


def _encoding(options: TeacherOptions) -> TeacherOptions:
    """The same teacher, with an engine that can encode."""
    if options.engine is None:
        return options
    joins = f"{EncodingWorker.__module__}.{EncodingWorker.__name__}"  # what vLLM imports
    return replace(options, engine=replace(options.engine, encoder=joins))


def counted_records(records: Iterator[Record], steps: Steps) -> Iterator[Record]:
    """Records that are counted as they are read."""
    for record in records:
        steps.record()
        yield record


class EncodingWorker:
    """What joins vLLM's worker: it can be told to encode; see `kdcache.teacher.engine.inside`."""

    @torch.inference_mode()
    def kdcache_encode(self, url: str, folder: str, dtype: str, trust_remote_code: bool) -> Any:
        """Begin to encode what requests name.

        Args:
            url: of the cache that is being made.

        Returns:
            The layout of the answers, or why there are none; None of a worker without last layer.
        """
        from kdcache.teacher.engine.head import read_head
        from kdcache.teacher.engine.inside import Encoder, Layout

        worker: Any = self
        groups = import_module("vllm.distributed")
        if not groups.get_pp_group().is_last_rank:
            return None
        pooling = import_module("vllm.model_executor.layers.pooler.tokwise")
        pooler = getattr(worker.model_runner.model, "pooler", None)
        pooler = getattr(pooler, "poolers_by_task", {}).get("token_embed")
        if not isinstance(pooler, pooling.TokenPooler):
            return f"the model has a {type(pooler).__name__} of its own"
        files = TeacherFiles.find(folder, trust_remote_code=trust_remote_code)
        head, cache = read_head(files, dtype), Cache.resume(url)
        encoder = Encoder(
            pooler.head,
            head,
            Encoding(cache.codec(), cache.spec.kept),
            groups.get_tp_group(),
        )
        # A position of zeros: it compiles where that is done, and shows the layout.
        zeros = torch.zeros(1, head.layer.width, device=worker.device, dtype=getattr(torch, dtype))
        layout = Layout.of(encoder.encode(zeros, zeros[:, 0].double(), zeros[:, 0].long())[0])
        pooler.head = encoder
        return layout.parts
