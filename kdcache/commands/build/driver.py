"""The driver of a build: hands out missing spans until each is committed or set aside.

The way an attempt failed decides what follows:

| the attempt ended because | the span is retried | counts as a failure |
|---|---|---|
| the span raised an error | alone on a worker | yes |
| its worker died or hung, with no other span in it | alone on a worker | yes |
| its worker died or hung, with another span in it | alone on a worker | no |
| its node went away (preempted, unreachable) | like any other | no |
| its shard is missing from the listing after the commit | alone on a worker | yes |

A span with three counted failures is set aside, and the others complete. Wrong input stops the
build at once, and so do twenty failed spans before the first success: then the cause is not the
spans.

Cost: a queue of span numbers and one entry a shard; the driver touches no row and no target.
Guarantee: a build ends only when the listing shows every shard, or it names the spans without one.

Spans left: which of the waiting spans a worker gets.

Spans of one group (the parts of a compressed file) share what a worker makes for the first of them,
so a worker is given the group that it has begun, until that is used up; then the next span or group
in the corpus's order that nobody has begun; and at last a part of what others are at.

Cost: constant a span while groups are left that nobody has begun; then one look at each begun one.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any, NoReturn

from kdcache.cache import ShardEntry
from kdcache.commands.build.source import Work
from kdcache.commands.build.workers import (
    EventSink,
    Outcome,
    SpanReport,
    WorkerFigures,
    Workers,
    ignore_events,
)
from kdcache.commands.interrupt import Interrupt
from kdcache.errors import IncompleteError, KdcacheError, UnexpectedError
from kdcache.storage import redact


class SpansLeft:
    """A queue of span numbers."""

    def __init__(self, group_of: Callable[[int], str]) -> None:
        """Begin empty; `group_of` gives the group of a span, empty for none."""
        self._group_of = group_of
        self._line: deque[int | str] = deque()  # spans of no group, and groups nobody has begun
        self._groups: dict[str, deque[int]] = {}  # those with spans left
        self._workers: dict[str, int] = {}  # how many have begun each group
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, span: int) -> None:
        """Put a span at the end."""
        self._add(span, first=False)

    def appendleft(self, span: int) -> None:
        """Put a span at the beginning, or at that of its group."""
        self._add(span, first=True)

    def take(self, group: str) -> int:
        """The next span, of that group as long as it has any."""
        self._count -= 1
        if group in self._groups:
            return self._next(group)
        while self._line:
            first = self._line.popleft()
            if isinstance(first, int):
                return first
            if first in self._groups:
                return self._begin(first)
        return self._begin(max(self._groups, key=self._share))

    def _add(self, span: int, *, first: bool) -> None:
        self._count += 1
        group = self._group_of(span)
        queue: deque[int] | deque[int | str] = self._line
        if group:
            if group not in self._groups and group not in self._workers:
                self._line.append(group)
            queue = self._groups.setdefault(group, deque())
        (queue.appendleft if first else queue.append)(span)

    def _share(self, group: str) -> float:
        """How many of its spans a further worker would make."""
        return len(self._groups[group]) / (1 + self._workers.get(group, 0))

    def _begin(self, group: str) -> int:
        self._workers[group] = self._workers.get(group, 0) + 1
        return self._next(group)

    def _next(self, group: str) -> int:
        spans = self._groups[group]
        span = spans.popleft()
        if not spans:
            del self._groups[group]
        return span


logger = logging.getLogger(__name__)

_TRIES = 3
_FUSE = 20  # spans that may fail before the first succeeds
_NAMED = 20  # spans that were set aside, in the error's text; the events name them all
_EXPLAINED = 5  # skipped records shown as warnings; the events have some of every span
_PROGRESS_EVERY = 0.2
_EVENT_EVERY = 10.0
_DIGITS = {  # of figures in the events
    **{"seconds": 3, "teacher_seconds": 3, "positions_per_second": 1, "teacher_busy": 4},
    **{"bytes_per_position": 2, "seconds_left": 1},
}
GO_ON = "Run the same command to continue."


@dataclass(frozen=True)
class Progress:
    """The progress of a build.

    Attributes:
        spans: spans of the cache, or of this run's share of it.
        done: spans with a committed shard, those of earlier runs included.
        made: those of them that this run committed.
        failed: spans set aside after three tries.
        lost: workers that died, hung or went with their node.
        stored: bytes of all shards, those of earlier runs included.
        seconds: since the command began to work: planning and the workers' start are part of it.
        teacher_seconds: spent in the teacher, summed over workers.
    """

    spans: int
    done: int
    made: int
    failed: int
    workers: tuple[WorkerFigures, ...]
    lost: int
    positions: int
    bytes: int
    stored: int
    seconds: float
    teacher_seconds: float

    @property
    def positions_per_second(self) -> float:
        """Of the present workers, since each was ready."""
        return sum(worker.positions_per_second for worker in self.workers)

    @property
    def teacher_busy(self) -> float:
        """Share of the present workers' time in which their teachers computed."""
        ready = sum(worker.seconds for worker in self.workers)
        busy = sum(worker.teacher_busy * worker.seconds for worker in self.workers)
        return busy / max(ready, 1e-9)

    @property
    def bytes_per_position(self) -> float:
        """Shard bytes, rows included, a position."""
        return self.bytes / max(1, self.positions)

    @property
    def seconds_left(self) -> float | None:
        """Until the last span, at the present rate; None before a batch is answered.

        What is answered of spans in flight counts.
        """
        in_flight = [span for worker in self.workers for span in worker.in_flight]
        answered = sum(span.share for span in in_flight)
        rate = self.positions_per_second
        if not rate or not self.made + answered:
            return None
        left = max(0.0, self.spans - self.done - self.failed - answered)
        positions = self.positions + sum(span.positions for span in in_flight)
        return left * positions / (self.made + answered) / rate

    def figures(self) -> dict[str, Any]:
        """The same as JSON-able values, without the single workers."""
        counts = {one.name: getattr(self, one.name) for one in fields(self)}
        counts |= {"workers": len(self.workers), "left": self.spans - self.done - self.failed}
        values = ((name, getattr(self, name), digits) for name, digits in _DIGITS.items())
        return counts | {n: None if v is None else round(v, digits) for n, v, digits in values}


@dataclass
class Driver:
    """Hands out missing spans until each is committed or set aside.

    Attributes:
        share: numbers of those that this run makes. Default: all.
        grace: seconds that spans in flight are given to finish once a signal came. Below the 30
            seconds that clouds and schedulers give a process between SIGTERM and SIGKILL.
        stored: bytes of shards that earlier runs committed.
        started: `time.perf_counter()` when the command began to work.
        made: entry of each shard this run committed, by span.
        teacher_seconds: spent in the teacher so far, summed over workers.
        truncated: documents that were cut at `max_length`, in them.
        redone: attempts that did not end in a shard and were, or will be, made again.
        lost: workers that died, hung or went with their node.
    """

    spans: Sequence[Work]
    on_progress: Callable[[Progress], None] | None = None
    tell: EventSink = ignore_events
    keep: Callable[[ShardEntry], None] = lambda entry: None
    share: range = range(1 << 62)
    grace: float = 20.0
    stored: int = 0
    started: float = field(default_factory=time.perf_counter)
    made: dict[int, ShardEntry] = field(default_factory=dict)
    positions: int = 0
    bytes: int = 0
    teacher_seconds: float = 0.0
    truncated: int = 0
    redone: int = 0
    lost: int = 0
    _explained: int = 0
    _fresh: SpansLeft = field(init=False)
    _suspects: deque[int] = field(default_factory=deque)
    _in_flight: int = 0
    _before: int = 0
    _failures: dict[int, list[UnexpectedError]] = field(default_factory=dict)
    _set_aside: dict[int, str] = field(default_factory=dict)
    _told: float = 0.0
    _event_told: float = 0.0

    def __post_init__(self) -> None:
        self._fresh = SpansLeft(lambda span: self.spans[span].group)

    def run(
        self,
        missing: Callable[[], Sequence[int]],
        start: Callable[[], Workers],
        interrupt: Interrupt | None = None,
    ) -> None:
        """Make the missing spans with workers that are started now and stopped at the end.

        Args:
            missing: the spans without a shard, from the listing: asked at the start, and again when
                all is done, because a file system may have lost one.
            start: makes the workers.
            interrupt: the signals that may come; default none.

        Raises:
            UsageError: wrong input; nothing more is tried.
            IncompleteError: interrupted, no space left, or spans set aside.
        """
        interrupt = interrupt or Interrupt()
        self._event_told = time.perf_counter()
        for span in missing():
            if span in self.share:
                self._fresh.append(span)
        self._before = self._total - len(self._fresh)
        if not self._fresh:
            return
        workers: Workers | None = None
        try:
            workers = start()
            with interrupt.patient():
                self._work(workers, missing, interrupt)
        except KeyboardInterrupt:
            done = self._before + len(self.made)
            raise IncompleteError(
                f"interrupted: {done} of {self._total} shards are committed. {GO_ON}"
            ) from None
        finally:
            if workers is not None:
                self.lost = workers.lost
                workers.stop()
        self._report_set_aside()

    def _work(
        self, workers: Workers, missing: Callable[[], Sequence[int]], interrupt: Interrupt
    ) -> None:
        """Hand out spans and process outcomes until none is left or the grace period is over.

        Raises:
            KeyboardInterrupt: it is over.
        """
        deadline: float | None = None
        while self._left():
            if interrupt.asked is None:
                self._hand_out(workers)
            elif deadline is None:
                deadline = interrupt.asked + self.grace
                logger.warning(
                    "stopping: spans in flight (%d) have %.0f s to finish; "
                    "a second signal stops at once",
                    self._in_flight,
                    self.grace,
                )
            if deadline and (not self._in_flight or time.monotonic() > deadline):
                raise KeyboardInterrupt
            for outcome in workers.collect(1.0):
                self._settle(outcome)
            if not self._left():
                self._look_again(missing())
            self._show(workers)

    @property
    def _total(self) -> int:
        """Spans of this run's share, made or not."""
        return len(range(len(self.spans))[self.share.start :: self.share.step])

    def _left(self) -> bool:
        return bool(self._fresh or self._suspects or self._in_flight)

    def _hand_out(self, workers: Workers) -> None:
        while self._fresh and workers.has_room():
            workers.submit(self.spans[self._fresh.take(workers.group())])
            self._in_flight += 1
        while not self._fresh and self._suspects and workers.has_room(alone=True):
            workers.submit(self.spans[self._suspects.popleft()], alone=True)
            self._in_flight += 1
        workers.backlog = len(self._fresh) + len(self._suspects)

    def _settle(self, outcome: Outcome) -> None:
        """Record what was made; queue what should be retried."""
        self._in_flight -= 1
        if outcome.report is not None:
            self._book(outcome.report, outcome.worker)
            return
        span, error = outcome.span.index, outcome.error
        assert error is not None
        if isinstance(error, KdcacheError) and not isinstance(error, UnexpectedError):
            raise error
        self.redone += 1
        if outcome.fault == "span":
            logger.warning("span %d failed: %s", span, UnexpectedError.of(error).line)
        if outcome.fault == "span" or (outcome.fault == "worker" and outcome.alone):
            self._fail(span, error, raised=outcome.fault == "span")
        elif outcome.alone or outcome.fault == "worker":
            self._suspects.append(span)
        else:
            self._fresh.appendleft(span)

    def _book(self, report: SpanReport, worker: str) -> None:
        entry = report.entry
        self.made[entry.span] = entry
        self.keep(entry)
        self.positions += entry.positions
        self.bytes += entry.bytes
        self.teacher_seconds += report.teacher_seconds
        self.truncated += report.truncated
        reasons = [redact(reason) for reason in report.reasons]
        losses = {"skipped": entry.skipped, "truncated": report.truncated, "reasons": reasons}
        self.tell(
            "span",
            span=entry.span,
            worker=worker,
            rows=entry.rows,
            positions=entry.positions,
            bytes=entry.bytes,
            seconds=round(report.seconds, 3),
            teacher_seconds=round(report.teacher_seconds, 3),
            **{name: loss for name, loss in losses.items() if loss},
        )
        for reason in reasons[: _EXPLAINED - self._explained]:
            logger.warning("skipped: %s", reason)
            self._explained += 1

    def _fail(self, span: int, error: BaseException, *, raised: bool = False) -> None:
        """Count a failure against a span, which may have `raised` it; set it aside at the third."""
        found = UnexpectedError.of(error)
        if not raised:  # by a worker that died, or a listing
            found.exit_code = IncompleteError.exit_code
        reason = redact(found.line)
        tries = self._failures.setdefault(span, [])
        tries.append(found)
        self.tell("span failed", span=span, tries=len(tries), error=reason)
        if len(self._failures) >= _FUSE and not self.made and not self._before:
            self._end(
                f"{len(self._failures)} spans failed and none succeeded; the last: {reason}. "
                "Correct the cause. "
            )
        if len(tries) < _TRIES:
            self._suspects.append(span)
            return
        self._set_aside[span] = reason
        self.tell("span set aside", span=span, records=self._records(span), error=reason)

    def _look_again(self, missing: Sequence[int]) -> None:
        """Queue committed spans that are missing from the listing."""
        for span in missing:
            if span in self._set_aside or span not in self.share:
                continue
            entry = self.made.pop(span, None)
            if entry is None:  # it was there when this run began
                self._before -= 1
                self._fresh.append(span)
                continue
            self.redone += 1
            self.positions -= entry.positions
            self.bytes -= entry.bytes
            lost = f"{entry.name} was committed but is not in the listing"
            logger.warning("span %d: %s; making it again", span, lost)
            self._fail(span, OSError(lost))

    def _show(self, workers: Workers) -> None:
        now = time.perf_counter()
        over = not self._left()
        if now - self._told < _PROGRESS_EVERY and not over:
            return
        self._told = now
        progress = Progress(
            spans=self._total,
            done=self._before + len(self.made),
            made=len(self.made),
            failed=len(self._set_aside),
            workers=tuple(workers.figures()),
            lost=workers.lost,
            positions=self.positions,
            bytes=self.bytes,
            stored=self.stored + self.bytes,
            seconds=now - self.started,
            teacher_seconds=self.teacher_seconds,
        )
        if now - self._event_told >= _EVENT_EVERY or over:
            self._event_told = now
            self.tell("progress", **progress.figures())
        if self.on_progress is not None:
            self.on_progress(progress)

    def _records(self, span: int) -> str:
        return self.spans[span].records

    def _report_set_aside(self) -> None:
        if not self._set_aside:
            return
        lines = [
            f"  span {span} ({self._records(span)}): {reason}"
            for span, reason in sorted(self._set_aside.items())[:_NAMED]
        ]
        if len(self._set_aside) > _NAMED:
            lines.append(f"  and {len(self._set_aside) - _NAMED} more, listed in the events")
        self._end(
            f"{len(self._set_aside)} of {self._total} spans failed {_TRIES} times and were set "
            "aside; the others are committed:\n" + "\n".join(lines) + "\n"
        )

    def _end(self, text: str) -> NoReturn:
        """Raise for spans that failed, and say whether it helps to run the same command again.

        It does not where the last two tries of each, alone on a worker, raised the same exception,
        and it is not of the machine. Their tracebacks may differ in the frames that waited for it.
        """
        tries = [self._failures[span] for span in self._set_aside or self._failures]
        same = all(one[-1].exit_code == 1 and one[-1].line == one[-2:][0].line for one in tries)
        if same and self._set_aside:
            ended = KdcacheError(
                f"{text}Tried again, each ended in the same exception. Correct what it names, the "
                "teacher or the record; then the same command continues."
            )
        else:
            ended = IncompleteError(f"{text}Run the same command to try them again.")
        traces = dict.fromkeys(one[-1].trace for one in tries)
        ended.trace = "\n".join(islice(traces, _EXPLAINED))
        raise ended
