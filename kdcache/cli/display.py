"""The progress of a long command: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from kdcache.cli.volume import is_quiet
from kdcache.commands.build.driver import Progress
from kdcache.commands.build.workers import WorkerFigures
from kdcache.commands.sweep.sweep import SweepProgress
from kdcache.commands.train.result import TrainProgress
from kdcache.humanize import duration, printable

D = TypeVar("D", bound="_Display")

_LINE_EVERY = 10.0
_WORKERS_SHOWN = 8


class _Display:
    """A bar or lines on standard error; used as a context."""

    name: str
    unit: str

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet or is_quiet()
        self._live: Live | None = None
        self._last = 0.0

    def __enter__(self: D) -> D:
        if not self._quiet and sys.stderr.isatty():
            self._bar = Bar(TextColumn(f"[bold]{self.name}[/]"), BarColumn(), MofNCompleteColumn())
            self._task = self._bar.add_task(self.name, total=None)
            self._live = Live(Text("starting"), console=Console(stderr=True))
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(
        self, done: int, total: int, facts: str, *, now: bool, details: Sequence[str] = ()
    ) -> None:
        """Show a state; as a line only if the last one is some time ago, or with `now`.

        Args:
            done: units.
            total: units.
            facts: everything else in a few words.
            now: show it in any case.
            details: lines that only a terminal has room for.
        """
        if self._quiet:
            return
        facts, details = printable(facts), [printable(line) for line in details]
        if self._live is not None:
            self._bar.update(self._task, total=total, completed=done)
            lines = [Text(f"  {line}") for line in (facts, *details)]
            self._live.update(Group(self._bar, *lines))
        elif now or time.monotonic() - self._last >= _LINE_EVERY:
            self._last = time.monotonic()
            line = f"{self.name}: {done}/{total} {self.unit}  {facts}"
            print(line, file=sys.stderr)  # noqa: T201


class BuildDisplay(_Display):
    """Shows the progress of a build."""

    name, unit = "build", "spans"
    busy = "teacher"

    def __call__(self, state: Progress) -> None:
        """Show a new state."""
        over = state.done + state.failed >= state.spans
        shown = sorted(state.workers, key=lambda worker: worker.name)[:_WORKERS_SHOWN]
        details = [_worker(worker, self.busy) for worker in shown]
        if len(state.workers) > len(shown):
            details.append(f"and {len(state.workers) - len(shown)} more")
        self.show(state.done, state.spans, _facts(state, self.busy), now=over, details=details)


class TranscodeDisplay(BuildDisplay):
    """Shows the progress of a transcoding."""

    name, busy = "transcode", "codec"


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


class SweepDisplay(_Display):
    """Shows the progress of a sweep."""

    name, unit = "sweep", "steps"
    _settled = 0

    def __call__(self, state: SweepProgress) -> None:
        """Show a new state; a line for every run that ends."""
        words = [f"{state.done} of {state.runs} runs finished"]
        if state.failed:
            words.append(f"{state.failed} failed")
        if state.step > state.before:
            left = (state.steps - state.step) * state.seconds / (state.step - state.before)
            words.append(f"{duration(left)} left")
        settled = state.done + state.failed
        self.show(state.step, state.steps, "  ".join(words), now=settled > self._settled)
        self._settled = settled


def _facts(now: Progress, busy: str) -> str:
    """The figures of a build, briefly."""
    if not now.workers:
        return "waiting for workers"
    words = [f"{len(now.workers)} worker{'s' if len(now.workers) > 1 else ''}"]
    words.append(f"{now.positions_per_second:,.0f} positions/s")
    words.append(f"{busy} busy {now.teacher_busy:.0%}")
    if now.positions:
        words.append(f"{now.bytes_per_position:.1f} B/position")
    left = now.spans - now.done - now.failed
    if left:
        end = f", {duration(now.seconds_left)}" if now.seconds_left else ""
        words.append(f"{left:,} span{'s' if left > 1 else ''} left{end}")
    if now.failed:
        words.append(f"{now.failed} failed")
    if now.lost:
        words.append(f"{now.lost} worker{'s' if now.lost > 1 else ''} lost")
    return "  ".join(words)


def _worker(figures: WorkerFigures, busy: str) -> str:
    """The figures of one worker."""
    return (
        f"{figures.name}  {figures.spans} spans  "
        f"{figures.positions_per_second:,.0f} positions/s  {busy} busy {figures.teacher_busy:.0%}"
    )
