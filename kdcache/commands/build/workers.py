"""The interface of a build's workers: they take spans and return outcomes."""

from __future__ import annotations

import queue
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from kdcache.commands.build.activity import SpanFigures
from kdcache.commands.build.source import Work
from kdcache.commands.build.worker import SpanReport

IN_FLIGHT = 2  # spans of a worker: one is read or written while the other is in the teacher

Fault = Literal["span", "worker", "node"]
T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a span on a worker: a report, or the error that ended it.

    Attributes:
        span: which one.
        report: of the committed shard.
        error: instead of a report.
        fault: what the error was of: `span` raised it, the `worker` died or hung with the span in
            it, or the `node` went away.
        alone: the span was handed out with `alone`.
        worker: name of the worker.
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
        spans: that it committed.
        positions: in them.
        teacher_seconds: in its teacher, for them.
        in_flight: the spans that it has.
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
        backlog: spans that are left and that no worker has, as the driver says.
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
