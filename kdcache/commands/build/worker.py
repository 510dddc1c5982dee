"""The work on one span, in an actor or in this process: read, answer, pack, commit.

Where rows and targets come from is the `Source`'s: a corpus and its teacher, or another cache. Two
spans are in flight in a worker and a lock admits one to the answering, so that one span is read,
packed or compressed while the other computes: a pipeline without queues. On a GPU the lock is
released once everything is launched, so that the device goes from one span to the next without a
pause. A source that takes no turns (a teacher in an engine) answers both spans at once.

Cost: memory of two spans' rows and encoded targets, plus what the source holds.
Guarantee: a span's shard is a pure function of (spec, span): batches never mix spans and sampling
noise is keyed by (seed, span, row, position).
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from kdcache.cache import Cache, ShardEntry
from kdcache.commands.build.activity import Pulse, Steps
from kdcache.commands.build.packer import Packer, in_row_order, packing_threads
from kdcache.commands.build.source import SourceOptions, Work
from kdcache.targets import TargetWriter


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know about a build; sent to each actor once.

    Attributes:
        url: the cache, already created.
        source: where its rows and targets come from.
        threads: CPU threads of this worker's arithmetic.
    """

    url: str
    source: SourceOptions
    threads: int | None = None


@dataclass(frozen=True)
class SpanReport:
    """The report of a committed span.

    Attributes:
        entry: its shard.
        seconds: that it took.
        teacher_seconds: of them in the source's answers (the teacher's) and the codec; on a GPU
            until all was launched.
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
    """An open source whose spans become committed shards. Safe to call from two threads."""

    def __init__(self, job: Job) -> None:
        """Open the cache and its source."""
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        self.job = job
        self.cache = Cache.resume(job.url)
        self.writer = TargetWriter(self.cache.codec(), self.cache.rank_to_id)
        self.source = job.source.open(self.cache)
        self._turn = threading.Lock()
        self._stop = threading.Event()
        self._counted, self._counting = 0.0, threading.Lock()
        self._steps: dict[int, Steps] = {}  # of the spans in flight

    def stop(self) -> None:
        """Abandon the spans in flight at the next batch."""
        self._stop.set()

    def close(self) -> None:
        """End what the source runs beside this process."""
        self.source.close()

    def run(self, span: Work) -> SpanReport:
        """Make one span's shard and commit it.

        Raises:
            UsageError: the input or the teacher's logits are unusable.
            IncompleteError: no space left.
            Stopped: `stop` was called.
        """
        steps = self._steps[span.index] = Steps(span.index, self._check)
        try:
            return self._make(span, steps)
        finally:
            self._steps.pop(span.index, None)

    def pulse(self) -> Pulse:
        """What is done of the spans in flight."""
        now, seconds, counted = time.monotonic(), time.perf_counter(), self._counted
        spans = sorted(self._steps.values(), key=lambda steps: steps.answering or seconds)
        figures = []
        for steps in spans:
            begin = max(counted, steps.answering or seconds)
            figures.append(steps.figures(max(0.0, seconds - begin)))
            if steps.answering is not None:  # what another one spends meanwhile is the same time
                counted = seconds
        # Looked at once: the span's own thread may begin to wait.
        last = [at for steps in spans if (at := steps.last) is not None]
        return Pulse(max(0.0, now - min(last, default=now)), tuple(figures))

    def _check(self) -> None:
        """Raises in a stopped worker."""
        if self._stop.is_set():
            raise Stopped

    def _count(self, start: float) -> float:
        """Seconds of answering since `start` that no other span has counted."""
        with self._counting:
            now = time.perf_counter()
            start, self._counted = max(start, self._counted), now
        return now - start

    def _make(self, span: Work, steps: Steps) -> SpanReport:
        begin = time.perf_counter()
        steps()
        rows = self.source.read(span, steps)
        threads = packing_threads(self.source.device, self.job.threads or os.cpu_count() or 1)
        with Packer(self.writer, self.cache.spec.seed, span.index, threads) as packer:
            steps.last = None
            with self._turn if self.source.takes_turns else nullcontext():
                steps()
                steps.answering = start = time.perf_counter()
                packing, places = self.source.answer(rows, packer, steps)
                steps.teacher_seconds = self._count(start)
                steps.answering = None
            # The next span has its turn while the last slices of this one are copied and packed.
            steps()
            packed = [part.result() for part in packing]
            targets, logprobs = in_row_order(self.writer.codec, packed, places)
        steps()
        data = rows.shard(targets, logprobs if self.cache.spec.label_logprob else None)
        clipped = np.float32(0)
        for part in packed:
            clipped += part.clipped
        entry = self.cache.commit(
            span.index,
            data,
            skipped=rows.skipped,
            filtered=rows.filtered,
            clipped_mass=float(clipped) if rows.clipped_mass is None else rows.clipped_mass,
        )
        seconds = time.perf_counter() - begin
        return SpanReport(entry, seconds, steps.teacher_seconds, rows.truncated, rows.reasons)
