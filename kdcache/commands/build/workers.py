"""The interface of a build's workers: they take spans and return outcomes.

The work on one span, in an actor or in this process: read, answer, pack, commit.

What is read and made is the `Source`'s: rows and targets for a cache, or fresh text. Two
spans are in flight in a worker and a lock admits one to the answering, so that one span is read,
packed or compressed while the other computes: a pipeline without queues. On a GPU the lock is
released once everything is launched, so that the device goes from one span to the next without a
pause. A source that takes no turns (a teacher in an engine) answers both spans at once.

Cost: memory of two spans' rows and encoded targets, plus what the source holds.
Guarantee: a span's shard is a pure function of (spec, span): batches never mix spans and sampling
noise is keyed by (seed, span, row, position).

The events of a build are JSON lines next to the cache, for programs and for people, 200 bytes a
span. A local cache has them in `events.jsonl`, appended one line at a time by all its builds. An
object store cannot append: there the lines of one run are kept in memory and written when it ends,
under `events/` with a name of their own. They are not a part of the cache: nothing reads them back.
The log never stops the build; if it cannot be written (a full disk), it is given up with one
warning. URLs are written without credentials.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import torch

from kdcache.cache import ShardEntry
from kdcache.commands.build.packer import Pulse, SpanFigures, Steps
from kdcache.commands.build.source import SourceOptions, Work
from kdcache.errors import KdcacheError, as_worker
from kdcache.humanize import redacted
from kdcache.storage import LocalStorage, Storage


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know about a build; sent to each actor once.

    Attributes:
        url: the folder of shards, already created.
        threads: CPU threads of this worker's arithmetic.
    """

    url: str
    source: SourceOptions
    threads: int | None = None


@dataclass(frozen=True)
class SpanReport:
    """The report of a committed span.

    Attributes:
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


class Stopped(KdcacheError):  # noqa: N818 - a requested outcome, not an error
    """The worker was asked to stop before the span was committed."""


class SpanWorker:
    """An open source whose spans become committed shards. Safe to call from two threads."""

    @as_worker()
    def __init__(self, job: Job) -> None:
        """Open the source."""
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        self.job = job
        self.source = job.source.open(job.url)
        self.source.cores = job.threads or os.cpu_count() or 1
        self._turn = threading.Lock()
        self._stop = threading.Event()
        self._counted, self._counting = 0.0, threading.Lock()
        self._steps: dict[int, Steps] = {}  # of the spans in flight

    def stop(self) -> None:
        """Abandon the spans in flight at the next batch."""
        self._stop.set()

    def close(self) -> None:
        """End what the source runs outside of this process."""
        self.source.close()

    @as_worker()
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
            started = max(counted, steps.answering or seconds)
            figures.append(steps.figures(max(0.0, seconds - started)))
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
        started = time.perf_counter()
        steps()
        read = self.source.read(span, steps)
        entry = self.source.make(span, read, steps, partial(self._answering, steps))
        seconds = time.perf_counter() - started
        return SpanReport(entry, seconds, steps.teacher_seconds, read.truncated, read.reasons)

    @contextmanager
    def _answering(self, steps: Steps) -> Iterator[None]:
        """The turn of a span."""
        steps.last = None
        with self._turn if self.source.takes_turns else nullcontext():
            steps()
            steps.answering = start = time.perf_counter()
            yield
            steps.teacher_seconds = self._count(start)
            steps.answering = None


IN_FLIGHT = 2  # spans of a worker: one is read or written while the other is in the teacher

Fault = Literal["span", "worker", "node"]
T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a span on a worker: a report, or the error that ended it.

    Attributes:
        report: of the committed shard.
        error: instead of a report.
        fault: what the error was of: `span` raised it, the `worker` died or hung with the span in
            it, or the `node` went away.
        alone: the span was handed out with `alone`.
    """

    span: Work
    report: SpanReport | None = None
    error: BaseException | None = None
    fault: Fault = "span"
    alone: bool = False
    worker: str = ""


@dataclass
class WorkerFigures:
    """Running counts of what one worker has done.

    Attributes:
        name: host and process, such as `node7:4711`.
        since: `time.perf_counter()` when it was ready.
    """

    name: str
    since: float = field(default_factory=time.perf_counter)
    spans: int = 0
    positions: int = 0
    teacher_seconds: float = 0.0
    in_flight: tuple[SpanFigures, ...] = ()

    def book(self, report: SpanReport) -> None:
        """Add one span."""
        self.in_flight = tuple(s for s in self.in_flight if s.span != report.entry.span)
        self.spans += 1
        self.positions += report.entry.positions
        self.teacher_seconds += report.teacher_seconds

    @property
    def seconds(self) -> float:
        """Since it was ready."""
        return time.perf_counter() - self.since

    @property
    def positions_per_second(self) -> float:
        """Since it was ready, with those of spans in flight that are answered."""
        now = self.positions + sum(span.positions for span in self.in_flight)
        return now / max(self.seconds, 1e-9)

    @property
    def teacher_busy(self) -> float:
        """Share of its time in which its teacher computed."""
        now = self.teacher_seconds + sum(span.teacher_seconds for span in self.in_flight)
        return min(1.0, now / max(self.seconds, 1e-9))


class Workers(ABC):
    """Workers that make shards.

    Attributes:
        lost: workers that died, hung or went with their node so far.
        backlog: spans that are left and that no worker has, as the driver has it.
    """

    lost = 0
    backlog = 1

    @abstractmethod
    def has_room(self, *, alone: bool = False) -> bool:
        """Whether a span can be given now; `alone` asks for a worker that has nothing else."""

    def group(self) -> str:
        """Group of the last span of the worker that the next one goes to; empty for none."""
        return ""

    @abstractmethod
    def submit(self, span: Work, *, alone: bool = False) -> None:
        """Give a span to the least busy worker; with `alone` no other span runs in that worker."""

    @abstractmethod
    def collect(self, seconds: float) -> list[Outcome]:
        """Outcomes that arrived; waits for the first one, `seconds` at most."""

    @abstractmethod
    def stop(self) -> None:
        """Abandon the spans in flight and stop the workers."""

    @abstractmethod
    def figures(self) -> Sequence[WorkerFigures]:
        """The workers that are ready now."""


def arrived(source: queue.SimpleQueue[T], seconds: float) -> list[T]:
    """All items of a queue; waits for the first one, `seconds` at most."""
    try:
        items = [source.get(timeout=seconds)]
    except queue.Empty:
        return []
    while not source.empty():
        items.append(source.get())
    return items


_LEAVE = 5.0  # seconds that threads are given to end


class LocalWorkers(Workers):
    """One worker in this process: `--workers 0`."""

    def __init__(self, job: Job) -> None:
        self._worker = SpanWorker(job)
        self._figures = WorkerFigures("this process")
        self._given: queue.SimpleQueue[tuple[Work, bool] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._in_flight, self._group = 0, ""
        # Daemons: one that hangs (a dead network drive) must not keep the process from ending.
        self._threads = [
            threading.Thread(target=self._work, name=f"kdcache-span-{i}", daemon=True)
            for i in range(IN_FLIGHT)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while (task := self._given.get()) is not None:
            span, alone = task
            try:
                report = self._worker.run(span)
            except BaseException as error:  # whatever it is, the driver decides
                self._done.put(Outcome(span, error=error, alone=alone))
            else:
                self._done.put(Outcome(span, report, alone=alone, worker=self._figures.name))

    def has_room(self, *, alone: bool = False) -> bool:
        """See `Workers.has_room`."""
        return self._in_flight < (1 if alone else IN_FLIGHT)

    def group(self) -> str:
        """See `Workers.group`."""
        return self._group

    def submit(self, span: Work, *, alone: bool = False) -> None:
        """See `Workers.submit`."""
        self._in_flight, self._group = self._in_flight + 1, span.group
        self._given.put((span, alone))

    def collect(self, seconds: float) -> list[Outcome]:
        """See `Workers.collect`."""
        outcomes = arrived(self._done, seconds)
        self._in_flight -= len(outcomes)
        for outcome in outcomes:
            if outcome.report is not None:
                self._figures.book(outcome.report)
        return outcomes

    def stop(self) -> None:
        """See `Workers.stop`."""
        self._worker.stop()
        for _ in self._threads:
            self._given.put(None)
        deadline = time.monotonic() + _LEAVE
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._worker.close()

    def figures(self) -> Sequence[WorkerFigures]:
        """See `Workers.figures`."""
        self._figures.in_flight = self._worker.pulse().spans
        return [self._figures]


logger = logging.getLogger(__name__)

FILE = "events.jsonl"


class EventSink(Protocol):
    """A function that takes an event: its name and its facts."""

    def __call__(self, event: str, /, **facts: Any) -> None:
        """Record the event, with the current time."""


def ignore_events(event: str, /, **facts: Any) -> None:
    """Ignore events."""


class EventLog:
    """The events of one run of `build`; call it to add one, `close` it at the end.

    Every line has `time` (seconds since 1970), `run` (the same for all lines of a run) and `event`.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._local = storage if isinstance(storage, LocalStorage) else None
        self._run = uuid.uuid4().hex[:8]
        self._started = time.time()
        self._kept: list[str] = []
        self._broken = False
        self._lock = threading.Lock()

    def __call__(self, event: str, /, **facts: Any) -> None:
        """Add one line."""
        told = {"time": round(time.time(), 3), "run": self._run, "event": event, **facts}
        line = json.dumps(redacted(told))
        with self._lock:
            if self._local is None:
                self._kept.append(line)
            elif not self._broken:
                try:
                    self._local.append(FILE, line + "\n")
                except OSError as error:
                    self._give_up(error)

    def close(self) -> None:
        """Write the lines kept in memory."""
        if self._kept:
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self._started))
            try:
                content = "".join(line + "\n" for line in self._kept).encode()
                self._storage.write(f"events/{stamp}-{self._run}.jsonl", content)
            except Exception as error:  # stores raise errors of many classes
                self._give_up(error)
            self._kept.clear()

    def _give_up(self, error: Exception) -> None:
        self._broken = True
        logger.warning("the events of this run are not recorded: %s", error)
