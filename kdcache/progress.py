"""What a long command shows: a live bar on a terminal, a plain line every so often elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TypeVar

from kdcache.driver import Progress
from kdcache.text import duration
from kdcache.training import TrainProgress

D = TypeVar("D", bound="_Display")

_LINE_EVERY = 10.0


class _Display:
    """A bar or lines on standard error; used as a context."""

    name: str
    unit: str

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._last = 0.0

    def __enter__(self: D) -> D:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn(f"[bold]{self.name}[/]"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(f"{self.unit}  {{task.fields[facts]}}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(self.name, total=None, facts="starting")
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

    def show(self, done: int, total: int, facts: str, *, now: bool) -> None:
        """Show a state; as a line only if the last one is some time ago, or `now`."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, total=total, completed=done, facts=facts)
        elif now or time.monotonic() - self._last >= _LINE_EVERY:
            self._last = time.monotonic()
            line = f"{self.name}: {done}/{total} {self.unit}  {facts}"
            print(line, file=sys.stderr)  # noqa: T201


class BuildDisplay(_Display):
    """Shows the progress of a build."""

    name, unit = "build", "spans"

    def __call__(self, state: Progress) -> None:
        """Show a new state."""
        over = state.done + state.failed >= state.spans
        self.show(state.done, state.spans, _facts(state), now=over)


class TrainDisplay(_Display):
    """Shows the progress of a training run."""

    name, unit = "train", "steps"
    _losses = ""

    def __call__(self, state: TrainProgress) -> None:
        """Show a new state."""
        figures = {k: v for k, v in state.logs.items() if "loss" in k or "accuracy" in k}
        self._losses = "  ".join(f"{k} {v:.4f}" for k, v in figures.items()) or self._losses
        left = (state.steps - state.step) * state.seconds / max(1, state.step)
        evaluated = any(name.startswith("eval") for name in state.logs)
        facts = f"{self._losses}  {duration(left)} left"
        self.show(state.step, state.steps, facts, now=evaluated)


def _facts(now: Progress) -> str:
    """The figures of a build in a few words."""
    if not now.workers:
        return "starting the workers"
    rate = now.positions / max(now.seconds, 1e-9)
    words = [f"{now.workers} worker{'s' if now.workers > 1 else ''}", f"{rate:,.0f} positions/s"]
    words.append(f"teacher busy {now.teacher_seconds / max(now.seconds * now.workers, 1e-9):.0%}")
    if now.positions:
        words.append(f"{now.bytes / now.positions:.1f} B/position")
    if now.made and now.done < now.spans:
        left = (now.spans - now.done) * now.seconds / now.made
        words.append(f"{duration(left)} left")
    if now.failed:
        words.append(f"{now.failed} failed")
    return "  ".join(words)
