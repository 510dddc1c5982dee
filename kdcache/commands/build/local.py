"""One worker in this process."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence

from kdcache.commands.build.source import Work
from kdcache.commands.build.worker import Job, SpanWorker
from kdcache.commands.build.workers import IN_FLIGHT, Outcome, WorkerFigures, Workers, arrived

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
