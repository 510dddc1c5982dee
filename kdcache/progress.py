"""What a long command shows: a live bar on a terminal, a plain line every so often elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from kdcache.driver import Progress
from kdcache.text import duration
from kdcache.training import TrainProgress

_LINE_EVERY = 10.0


class BuildDisplay:
    """Shows the progress of a build on standard error; use as a context."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._last = 0.0
        self._done = -1

    def __enter__(self) -> BuildDisplay:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("[bold]build[/]"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("spans  {task.fields[facts]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("build", total=None, facts="starting the workers")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, now: Progress) -> None:
        """Show a new state."""
        if self._bar is not None:
            self._bar.update(self._task, total=now.spans, completed=now.done, facts=facts(now))
        elif not self._quiet and now.done != self._done:
            finished = now.done + now.failed >= now.spans
            if finished or time.monotonic() - self._last >= _LINE_EVERY:
                self._last, self._done = time.monotonic(), now.done
                print(f"build: {now.done}/{now.spans} spans  {facts(now)}", file=sys.stderr)  # noqa: T201


def facts(now: Progress) -> str:
    """The figures of a build in a few words."""
    if not now.workers:
        return "starting the workers"
    rate = now.positions / max(now.seconds, 1e-9)
    words = [f"{now.workers} worker{'s' if now.workers > 1 else ''}", f"{rate:,.0f} positions/s"]
    words.append(f"teacher busy {now.teacher_seconds / max(now.seconds * now.workers, 1e-9):.0%}")
    if now.positions:
        words.append(f"{now.bytes / now.positions:.1f} B/position")
        left = (now.spans - now.done) * now.seconds / max(1, now.done)
        words.append(f"{duration(left)} left")
    if now.failed:
        words.append(f"{now.failed} failed")
    return "  ".join(words)


class TrainDisplay:
    """Shows the progress of a training run on standard error; use as a context."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._last = 0.0
        self._losses = ""

    def __enter__(self) -> TrainDisplay:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("[bold]train[/]"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("steps  {task.fields[facts]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("train", total=None, facts="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, now: TrainProgress) -> None:
        """Show a new state."""
        if self._quiet:
            return
        figures = {k: v for k, v in now.logs.items() if "loss" in k or "accuracy" in k}
        self._losses = "  ".join(f"{k} {v:.4f}" for k, v in figures.items()) or self._losses
        left = (now.steps - now.step) * now.seconds / max(1, now.step)
        facts = f"{self._losses}  {duration(left)} left"
        if self._bar is not None:
            self._bar.update(self._task, total=now.steps, completed=now.step, facts=facts)
        elif any(k.startswith("eval") for k in now.logs) or (
            time.monotonic() - self._last >= _LINE_EVERY
        ):
            self._last = time.monotonic()
            print(f"train: step {now.step}/{now.steps}  {facts}", file=sys.stderr)  # noqa: T201
