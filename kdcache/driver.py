"""The driver of a build: hands out missing spans until each is committed or set aside.

A span that fails is tried again, alone on a worker (so that a span which kills its worker takes no
other with it), three times in all; then it is set aside and the rest completes. Wrong input stops
at once.

Cost: a queue of span numbers; the driver touches no row and no target.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kdcache.cache import ShardEntry
from kdcache.corpus import Span
from kdcache.crew import Crew, Outcome
from kdcache.errors import IncompleteError, KdcacheError
from kdcache.storage import redact
from kdcache.worker import Stopped

logger = logging.getLogger(__name__)

_TRIES = 3


@dataclass(frozen=True)
class Progress:
    """Where a build stands; given to the caller after every change.

    Attributes:
        spans: spans of the cache.
        done: spans with a committed shard, those of earlier runs included.
        made: those of them that this run committed.
        failed: spans set aside after three tries.
        workers: workers that are ready.
        positions: positions cached by this run.
        bytes: bytes of shards written by this run.
        seconds: since the workers were asked for.
        teacher_seconds: spent in the teacher, summed over workers.
    """

    spans: int
    done: int
    made: int
    failed: int
    workers: int
    positions: int
    bytes: int
    seconds: float
    teacher_seconds: float


@dataclass
class Driver:
    """Hands out missing spans until each is committed or set aside.

    Attributes:
        spans: all spans of the cache.
        on_progress: called after every change and about once a second.
        entries: what was committed so far.
        teacher_seconds: spent in the teacher so far, summed over workers.
    """

    spans: Sequence[Span]
    on_progress: Callable[[Progress], None] | None = None
    entries: list[ShardEntry] = field(default_factory=list)
    teacher_seconds: float = 0.0
    _failures: dict[int, list[BaseException]] = field(default_factory=dict)

    def run(self, missing: Sequence[int], hire: Callable[[], Crew]) -> None:
        """Make the missing spans with a crew that is hired now and let go at the end.

        Raises:
            UsageError: wrong input; nothing more is tried.
            IncompleteError: interrupted, no space left, or spans set aside.
        """
        self._begin = time.perf_counter()
        self._before = len(self.spans) - len(missing)
        fresh, suspects = deque(missing), deque[int]()
        in_flight = 0
        crew: Crew | None = None
        try:
            crew = hire()
            while fresh or suspects or in_flight:
                while fresh and crew.room():
                    crew.give(self.spans[fresh.popleft()])
                    in_flight += 1
                while not fresh and suspects and crew.room(alone=True):
                    crew.give(self.spans[suspects.popleft()], alone=True)
                    in_flight += 1
                for outcome in crew.wait(1.0):
                    in_flight -= 1
                    if self._settle(outcome):
                        suspects.append(outcome.span.index)
                self._tell(crew)
        except KeyboardInterrupt:
            raise IncompleteError(
                f"interrupted: {self._done()} of {len(self.spans)} shards are committed. "
                "Run the same command to go on."
            ) from None
        finally:
            if crew is not None:
                crew.stop()
        self._report_set_aside()

    def _settle(self, outcome: Outcome) -> bool:
        """Book an outcome; whether the span should be tried again."""
        if outcome.report is not None:
            self.entries.append(outcome.report.entry)
            self.teacher_seconds += outcome.report.teacher_seconds
            return False
        error = outcome.error
        assert error is not None
        if isinstance(error, (KdcacheError, Stopped)):
            raise error
        tries = self._failures.setdefault(outcome.span.index, [])
        tries.append(error)
        if not outcome.lost:
            logger.warning("span %d failed: %s", outcome.span.index, error, exc_info=error)
        return len(tries) < _TRIES

    def _done(self) -> int:
        return self._before + len(self.entries)

    def _set_aside(self) -> dict[int, BaseException]:
        made = {entry.span for entry in self.entries}
        return {s: e[-1] for s, e in self._failures.items() if len(e) >= _TRIES and s not in made}

    def _tell(self, crew: Crew) -> None:
        if self.on_progress is None:
            return
        self.on_progress(
            Progress(
                spans=len(self.spans),
                done=self._done(),
                made=len(self.entries),
                failed=len(self._set_aside()),
                workers=crew.workers(),
                positions=sum(e.positions for e in self.entries),
                bytes=sum(e.bytes for e in self.entries),
                seconds=time.perf_counter() - self._begin,
                teacher_seconds=self.teacher_seconds,
            )
        )

    def _report_set_aside(self) -> None:
        failed = self._set_aside()
        if failed:
            lines = [
                f"  span {s} ({redact(self.spans[s].file)}, {self.spans[s].kind} "
                f"{self.spans[s].start}-{self.spans[s].stop}): "
                f"{str(error).strip().splitlines()[-1:]}"
                for s, error in sorted(failed.items())
            ]
            raise IncompleteError(
                f"{len(failed)} of {len(self.spans)} spans failed {_TRIES} times and were set "
                f"aside; "
                "the others are committed:\n"
                + "\n".join(lines)
                + "\nRun the same command to try them again."
            )


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM acts like Ctrl-C meanwhile: preempted drivers end in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
