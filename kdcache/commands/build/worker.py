"""The work on one span, in an actor or in this process: read, tokenise, run the teacher, encode,
commit.

Two spans are in flight in a worker and a lock admits one to the teacher, so that one span is read,
packed or compressed while the other computes: a pipeline without queues. On a GPU the lock is
released once everything is launched, so that the device goes from one span to the next without a
pause.

Cost: memory of two spans' rows and encoded targets, plus the teacher and one slice of its logits.
Guarantee: a span's shard is a pure function of (spec, span): batches never mix spans and sampling
noise is keyed by (seed, span, row, position).
"""

from __future__ import annotations

import concurrent.futures as futures
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdcache.cache import Cache, ShardEntry
from kdcache.cache.shard import ShardData
from kdcache.corpus import Corpus, ReadStats, Record, Span
from kdcache.errors import UsageError
from kdcache.rows import Row, RowSpec, make_encoder
from kdcache.rows.batches import batches
from kdcache.targets import Codec, SoftTargets, TargetWriter, position_uniform
from kdcache.targets.device import label_logprobs
from kdcache.targets.label_logprob import Codes, encode_logprobs
from kdcache.teacher import Teacher, TeacherOptions, find_batch_tokens, logits_at, peak_share

logger = logging.getLogger(__name__)

_UNPACKED = 8  # encoded slices on their way to the packer, at most


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know about a build; sent to each actor once.

    Attributes:
        url: the cache, already created.
        rows: how records become rows.
        teacher: which models to load, and how.
        batch_tokens: padded tokens of a batch, at most (one row may be longer).
        find_batch: whether such a batch is tried first, and halved until it fits the GPU.
        threads: CPU threads of this worker's arithmetic.
    """

    url: str
    rows: RowSpec
    teacher: TeacherOptions
    batch_tokens: int
    find_batch: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class SpanReport:
    """The report of a committed span.

    Attributes:
        entry: its shard.
        seconds: that it took.
        teacher_seconds: of them in the teacher and the codec; on a GPU until all was launched.
        truncated: documents that were cut at `max_length`.
        reasons: why the first few records were left out.
    """

    entry: ShardEntry
    seconds: float
    teacher_seconds: float
    truncated: int = 0
    reasons: tuple[str, ...] = ()


class Stopped(Exception):  # noqa: N818 - a requested outcome, not an error
    """The worker was asked to stop before the span was committed."""


class SpanWorker:
    """A loaded teacher that turns spans into committed shards. Safe to call from two threads."""

    def __init__(self, job: Job) -> None:
        """Open the cache and load the teacher."""
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        self.job = job
        self.cache = Cache.resume(job.url)
        self.tokenizer = self.cache.tokenizer()
        self.codec = self.cache.codec()
        self.teacher = Teacher(job.teacher, self.cache.spec.vocab_size)
        self._probed = False  # on rows of the corpus
        self.batch_tokens = job.batch_tokens
        if job.find_batch and self.teacher.device.type == "cuda":
            self.batch_tokens = self._find_batch_tokens()
        elif job.teacher.compile:
            self._try_batch(self.batch_tokens)  # compiles before the first span
        self._turn = threading.Lock()
        self._stop = threading.Event()
        self._last_progress: dict[int, float] = {}  # span -> when something of it was last done

    def _find_batch_tokens(self) -> int:
        found = find_batch_tokens(
            lambda tokens: peak_share(lambda: self._try_batch(tokens), self.teacher.gpus),
            self.job.batch_tokens,
            self.job.rows.max_length,
        )
        logger.info("batches have %d tokens", found)
        return found

    def _try_batch(self, tokens: int) -> None:
        """Run teacher and codec over a batch of the longest rows."""
        length = self.job.rows.max_length
        ids = np.arange(length, dtype=np.int32) % self.cache.spec.vocab_size
        row = Row(ids, ids if self.job.teacher.causal else ids[:1])
        for logits in self.teacher.logits([row] * max(1, tokens // length)):
            zeros = torch.zeros(len(logits), dtype=torch.float64)
            self._encode(logits, zeros, zeros.long())
        self.teacher.take_clipped_mass()

    def _encode(self, logits: Tensor, u: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What is kept of some positions, on their device.

        Args:
            logits: as the teacher yields them.
            u: float64 [n], the codec's noise.
            labels: int64 [n], hard labels.

        Returns:
            What the codec gives, and "label_logprob" float32 [n] if the cache keeps that.
        """
        made_for = self.job.teacher.temperatures
        encoded = self.codec.encode(logits_at(logits, made_for, self.codec.temperatures), u)
        if self.cache.spec.label_logprob:
            at_one = logits_at(logits, made_for, (1.0,))
            read_before = encoded if logits.ndim == 2 else None
            encoded["label_logprob"] = label_logprobs(at_one, labels, read_before)
        return encoded

    def stop(self) -> None:
        """Abandon the spans in flight at the next batch."""
        self._stop.set()

    def run(self, span: Span) -> SpanReport:
        """Make one span's shard and commit it.

        Raises:
            UsageError: the input or the teacher's logits are unusable.
            IncompleteError: no space left.
            Stopped: `stop` was called.
        """
        try:
            return self._make(span)
        finally:
            self._last_progress.pop(span.index, None)

    def idle_seconds(self) -> float:
        """Seconds without progress in the slowest span; 0 while there is none.

        A span that waits for its turn with the teacher does not count; the one that has it does.
        """
        now = time.monotonic()
        return now - min(list(self._last_progress.values()), default=now)

    def _move(self, span: Span) -> None:
        """Records progress of a span; a stopped worker raises here."""
        if self._stop.is_set():
            raise Stopped
        self._last_progress[span.index] = time.monotonic()

    def _make(self, span: Span) -> SpanReport:
        begin = time.perf_counter()
        self._move(span)
        stats = ReadStats()
        encoder = make_encoder(self.job.rows, self.tokenizer)
        records = Corpus.read(
            span, columns=self.job.rows.columns, on_error=self.job.rows.on_error, stats=stats
        )
        rows = list(encoder.encode(self._moving(span, records)))
        threads = packing_threads(self.teacher.device.type, self.job.threads or os.cpu_count() or 1)
        writer = TargetWriter(self.codec, self.cache.rank_to_id)
        with _Packer(writer, self.cache.spec.seed, span.index, threads) as packer:
            del self._last_progress[span.index]
            with self._turn:
                self._move(span)
                if rows and not self._probed:
                    self.teacher.probe(rows)
                    self._probed = True
                start = time.perf_counter()
                packing, places = self._ask(span, rows, packer)
                teacher_seconds = time.perf_counter() - start
            # The next span has its turn while the last slices of this one are copied and packed.
            self._move(span)
            packed = [part.result() for part in packing]
            targets, logprobs = _in_row_order(self.codec, packed, places)
        self._move(span)
        data = ShardData.from_rows(
            self.job.teacher.task,
            rows,
            targets,
            label_logprob=logprobs if self.cache.spec.label_logprob else None,
        )
        left_out = stats.skipped + encoder.skipped + encoder.empty
        clipped = np.float32(0)
        for part in packed:
            clipped += part.clipped
        entry = self.cache.commit(span.index, data, skipped=left_out, clipped_mass=float(clipped))
        return SpanReport(
            entry,
            time.perf_counter() - begin,
            teacher_seconds,
            encoder.truncated,
            (*stats.reasons, *encoder.stats.reasons),
        )

    def _moving(self, span: Span, records: Iterator[Record]) -> Iterator[Record]:
        for record in records:
            self._move(span)
            yield record

    def _ask(
        self, span: Span, rows: Sequence[Row], packer: _Packer
    ) -> tuple[list[futures.Future[_Packed]], list[np.ndarray]]:
        """Run all rows of a span through the teacher; never synchronises with the device.

        Returns:
            Its targets, in the order of batches, and which position of the span, counted row by
            row, each of them is.
        """
        wanted = [row.places(self.job.teacher.task) for row in rows]
        offsets = np.concatenate([[0], np.cumsum([len(w) for w in wanted], dtype=np.int64)])
        packed: list[futures.Future[_Packed]] = []
        places: list[np.ndarray] = []
        lengths = [len(row.input_ids) for row in rows]
        waiting = deque(batches(lengths, self.batch_tokens))
        while waiting:
            self._move(span)
            batch = waiting.popleft()
            place = _Places(batch, wanted, rows)
            try:
                parts = self._run(span.index, [rows[i] for i in batch], place, packer)
            except torch.OutOfMemoryError as error:
                self.teacher.take_clipped_mass()  # all of this batch is asked again
                self._shrink(batch, lengths, error)
                left = [i for rows_of in (batch, *waiting) for i in rows_of]
                cut = batches([lengths[i] for i in left], self.batch_tokens)
                waiting = deque([left[i] for i in smaller] for smaller in cut)
                continue
            packed.extend(parts)
            places.extend(np.arange(offsets[i], offsets[i + 1]) for i in batch)
        return packed, places

    def _run(
        self, span: int, rows: Sequence[Row], place: _Places, packer: _Packer
    ) -> list[futures.Future[_Packed]]:
        """One batch through teacher and codec."""
        uniform, labels = (
            self.teacher.to_device(torch.from_numpy(numbers))
            for numbers in (place.noise(self.cache.spec.seed, span), place.labels)
        )
        parts = []
        done = 0
        for logits in self.teacher.logits(rows):
            piece = slice(done, done + len(logits))
            encoded = self._encode(logits, uniform[piece], labels[piece])
            parts.append(packer.put(encoded, self.teacher.take_clipped_mass(), place, done))
            done = piece.stop
        assert done == len(place.rows), "the teacher answers every position"
        return parts

    def _shrink(
        self, batch: list[int], lengths: Sequence[int], error: torch.OutOfMemoryError
    ) -> None:
        """Remember half the size of a batch that did not fit, for this span and later ones."""
        if len(batch) == 1:
            raise UsageError(
                f"one row of {lengths[batch[0]]} tokens does not fit the device together with the "
                "teacher. Use a smaller --max-length, or more --gpus-per-worker."
            ) from error
        torch.cuda.empty_cache()
        self.batch_tokens = min(self.batch_tokens, len(batch) * lengths[batch[0]]) // 2
        logger.warning("out of device memory: batches have %d tokens now", self.batch_tokens)


def _in_row_order(
    codec: Codec, packed: Sequence[_Packed], places: Sequence[np.ndarray]
) -> tuple[SoftTargets, Codes | None]:
    """Targets and log-probabilities of a span in row-major order, from those of its batches."""
    if not packed:
        return SoftTargets.empty(codec), np.zeros(0, np.uint16)
    order = np.concatenate(places)
    inverse = np.empty(len(order), np.int64)
    inverse[order] = np.arange(len(order))
    targets = SoftTargets.concat([part.targets for part in packed]).take(inverse)
    codes = [part.label_logprob for part in packed if part.label_logprob is not None]
    return targets, np.concatenate(codes)[inverse] if codes else None


class _Places:
    """The positions of a batch: the row of the span, the token of the row, and the hard label."""

    def __init__(
        self, batch: Sequence[int], wanted: Sequence[np.ndarray], rows: Sequence[Row]
    ) -> None:
        counts = [len(wanted[i]) for i in batch]
        self.rows = np.repeat(np.asarray(batch, np.int64), counts)
        self.within = np.concatenate([wanted[i] for i in batch])
        self.labels = np.concatenate([rows[i].labels[wanted[i]] for i in batch]).astype(np.int64)

    def noise(
        self, seed: int, span: int, piece: slice = slice(None), *, of_label: bool = False
    ) -> np.ndarray:
        """See `position_uniform`."""
        rows, within = self.rows[piece], self.within[piece]
        return position_uniform(seed, span, rows, within, of_label=of_label)


class _Packed(NamedTuple):
    """What is stored of a slice of positions, and the mass that its teacher gave to unknown ids."""

    targets: SoftTargets
    label_logprob: Codes | None
    clipped: np.float32


def packing_threads(device: str, cores: int) -> int:
    """Threads that pack in parallel to the teacher: two if a GPU leaves a core free."""
    return 2 if device == "cuda" and cores > 2 else 1


class _Packer:
    """Packs encoded slices on threads while the device computes the next ones.

    Copies to the host are queued behind the kernels that make them; only the threads wait for them.
    """

    def __init__(self, writer: TargetWriter, seed: int, span: int, threads: int = 1) -> None:
        self._writer, self._seed, self._span = writer, seed, span
        self._pool = futures.ThreadPoolExecutor(threads, thread_name_prefix="kdcache-pack")
        self._room = threading.BoundedSemaphore(_UNPACKED)

    def __enter__(self) -> _Packer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def put(
        self, encoded: dict[str, Tensor], clipped: Tensor, place: _Places, start: int
    ) -> futures.Future[_Packed]:
        encoded = {**encoded, "clipped": clipped}
        host = {name: tensor.to("cpu", non_blocking=True) for name, tensor in encoded.items()}
        # Of a teacher that is spread over GPUs the last one encodes: each copy waits in the stream
        # of its own device.
        copied = []
        for device in {tensor.device for tensor in encoded.values() if tensor.is_cuda}:
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            copied.append(event)
        self._room.acquire()
        return self._pool.submit(self._pack, host, copied, place, start)

    def _pack(
        self,
        host: dict[str, Tensor],
        copied: list[torch.cuda.Event],
        place: _Places,
        start: int,
    ) -> _Packed:
        try:
            for event in copied:
                event.synchronize()
            if not host["finite"].all():
                bad = start + int(host["finite"].int().argmin())
                raise UsageError(
                    f"the teacher gives NaN or infinite logits for span {self._span}, row "
                    f"{place.rows[bad]}, position {place.within[bad]}: nothing of this span is "
                    "cached. Try --dtype float32, or check the model."
                )
            clipped = np.float32(host.pop("clipped"))
            codes = None
            if (logprobs := host.pop("label_logprob", None)) is not None:
                piece = slice(start, start + len(logprobs))
                u = place.noise(self._seed, self._span, piece, of_label=True)
                codes = encode_logprobs(logprobs.numpy(), u)
            return _Packed(self._writer.pack(host), codes, clipped)
        finally:
            self._room.release()
