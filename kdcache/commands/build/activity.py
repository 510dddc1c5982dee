"""What a worker is at, from its first record on: counts that its threads keep and anybody may read.

Cost: a few additions a record or batch. Reading takes no lock: figures may be a step old.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class SpanFigures:
    """What is done of a span in flight.

    Attributes:
        span: its number.
        records: read so far.
        batches: of the whole span; 0 while it is read.
        batches_done: answered so far.
        positions: in them.
        teacher_seconds: spent on them so far, none of it counted for another span.
    """

    span: int
    records: int = 0
    batches: int = 0
    batches_done: int = 0
    positions: int = 0
    teacher_seconds: float = 0.0

    @property
    def share(self) -> float:
        """Share of the span that is answered, 0 to 1."""
        return self.batches_done / max(1, self.batches)


@dataclass(frozen=True)
class Pulse:
    """A worker's heartbeat.

    Attributes:
        idle: seconds without progress in the slowest span; 0 while there is none. A span that waits
            for its turn with the teacher does not count; the one that has it does.
        spans: those in flight.
    """

    idle: float = 0.0
    spans: tuple[SpanFigures, ...] = ()


class Steps:
    """The steps of a span: call it, or one of its methods, after each.

    Attributes:
        last: `time.monotonic()` of the last step; None while the span waits for its turn.
        answering: `time.perf_counter()` since which the source answers; None if it does not.
        teacher_seconds: of the answers, once they are there.
    """

    def __init__(self, span: int, check: Callable[[], None]) -> None:
        """Begin.

        Args:
            span: its number.
            check: raises in a worker that was stopped.
        """
        self._span, self._check = span, check
        self._records = self._batches = self._done = self._positions = 0
        self.last: float | None = time.monotonic()
        self.answering: float | None = None
        self.teacher_seconds = 0.0

    def __call__(self) -> None:
        """A step of any kind."""
        self._check()
        self.last = time.monotonic()

    def record(self) -> None:
        """A record was read."""
        self._records += 1
        self()

    def begin(self, batches: int) -> None:
        """So many batches are left to be answered."""
        self._batches = self._done + batches
        self()

    def batch(self, positions: int) -> None:
        """A batch with so many positions was answered."""
        self._done += 1
        self._positions += positions

    def figures(self, running: float = 0.0) -> SpanFigures:
        """The counts; `running` are the seconds of an answer that has not ended."""
        return SpanFigures(
            self._span,
            self._records,
            self._batches,
            self._done,
            self._positions,
            self.teacher_seconds + running,
        )
