"""What a command shows: progress, as a live bar on a terminal and a plain line now and then
elsewhere; and results, as lines and tables.

Guarantee: control characters in what is printed (names, texts and errors may come from anybody's
data) never reach the terminal. In a file or a pipe tables are whole lines of plain text.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, JustifyMethod
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from kdcache.cli.options import is_quiet
from kdcache.humanize import counted, duration, printable, size

if TYPE_CHECKING:  # a display is there before what it shows is loaded
    from kdcache.commands.build.driver import Progress
    from kdcache.commands.build.packer import SpanFigures
    from kdcache.commands.build.workers import WorkerFigures
    from kdcache.commands.run_folder import TrainProgress
    from kdcache.commands.sweep.sweep import SweepProgress

D = TypeVar("D", bound="_Display")

_LINE_EVERY = 10.0
_WORKERS_SHOWN = 8
_SHOWN = ("loss", "accuracy", "f1", "pearson")  # of what a training logs


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
            name = TextColumn(f"[bold]{self.name}[/]")
            self._bar = Bar(name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._task = self._bar.add_task(self.name, total=None)
            self._live = Live(self._bar, console=Console(stderr=True))
            self._live.start()
        self.report("loading libraries")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def report(self, line: str) -> None:
        """Show what is done now, in words; from where, and by which workers, stays to be read."""
        if self._live is not None:
            self._live.update(Group(self._bar, _line(line)))
            if line.startswith(("resuming", "working in", "starting workers")):
                self._live.console.print(Text(printable(line)), soft_wrap=True)
        elif not self._quiet:
            print(f"{self.name}: {printable(line)}", file=sys.stderr)  # noqa: T201

    def show(
        self, done: int, total: int, facts: Sequence[str], *, now: bool, details: Sequence[str] = ()
    ) -> None:
        """Show a state; as a line only if the last one is some time ago, or with `now`.

        Args:
            facts: everything else in a few words: a line of a terminal each.
            now: show it in any case.
            details: lines that only a terminal has room for.
        """
        if self._quiet:
            return
        if self._live is not None:
            self._bar.update(self._task, total=total, completed=done)
            self._live.update(Group(self._bar, *map(_line, filter(None, (*facts, *details)))))
        elif now or time.monotonic() - self._last >= _LINE_EVERY:
            self._last = time.monotonic()
            line = "  ".join([f"{self.name}: {done}/{total} {self.unit}", *filter(None, facts)])
            print(printable(line), file=sys.stderr)  # noqa: T201


def _line(text: str) -> Text:
    return Text(f"  {printable(text)}", no_wrap=True, overflow="ellipsis")


class BuildDisplay(_Display):
    """Shows the progress of a build."""

    name, unit = "build", "spans"
    busy = "teacher"

    def __call__(self, state: Progress) -> None:
        """Show a new state."""
        over = state.done + state.failed >= state.spans
        shown = sorted(state.workers, key=lambda worker: worker.name)[:_WORKERS_SHOWN]
        details = [_worker(worker, self.busy) for worker in shown if len(shown) > 1]
        if len(state.workers) > len(shown):
            details.append(f"and {len(state.workers) - len(shown)} more")
        self.show(state.done, state.spans, _facts(state, self.busy), now=over, details=details)


class TranscodeDisplay(BuildDisplay):
    """Shows the progress of a transcoding."""

    name, busy = "transcode", "codec"


class ImportDisplay(BuildDisplay):
    """Shows the progress of an import."""

    name, busy = "import", "reading"


class GenerateDisplay(BuildDisplay):
    """Shows the progress of a generation."""

    name, busy = "generate", "model"


class TrainDisplay(_Display):
    """Shows the progress of a training run."""

    name, unit = "train", "steps"
    _losses = ""

    def __call__(self, state: TrainProgress) -> None:
        """Show a new state."""
        whole = {k: v for k, v in state.logs.items() if "/" not in k}  # not those of each domain
        figures = {k: v for k, v in whole.items() if any(word in k for word in _SHOWN)}
        self._losses = "  ".join(f"{k} {v:.4f}" for k, v in figures.items()) or self._losses
        left = (state.steps - state.step) * state.seconds / max(1, state.step)
        evaluated = any(name.startswith("eval") for name in state.logs)
        times = f"{duration(state.seconds)} so far, {duration(left)} left"
        self.show(state.step, state.steps, (self._losses, times), now=evaluated)


class FinetuneDisplay(TrainDisplay):
    """Shows the progress of a fine-tuning."""

    name = "finetune"


class SweepDisplay(_Display):
    """Shows the progress of a sweep."""

    name, unit = "sweep", "steps"
    _settled = 0

    def __call__(self, state: SweepProgress) -> None:
        """Show a new state; a line for every run that ends."""
        words = [f"{state.done} of {counted(state.runs, 'run')} finished"]
        if state.failed:
            words.append(f"{state.failed} failed")
        if state.step > state.before:
            left = (state.steps - state.step) * state.seconds / (state.step - state.before)
            words.append(f"{duration(left)} left")
        settled = state.done + state.failed
        self.show(state.step, state.steps, ["  ".join(words)], now=settled > self._settled)
        self._settled = settled


def _facts(now: Progress, busy: str) -> tuple[str, ...]:
    """The figures of a build, briefly: what is done, what is being done, and the time."""
    words = [counted(len(now.workers), "worker")]
    if not now.workers:
        words = ["waiting for workers"]
    words += _rates(now.positions_per_second, now.teacher_busy, busy)
    if now.positions:
        words.append(f"{now.bytes_per_position:.1f} B/position")
    if now.stored:
        words.append(size(now.stored))
    if now.failed:
        words.append(f"{now.failed} failed")
    if now.lost:
        words.append(f"{counted(now.lost, 'worker')} lost")
    alone = now.workers[0].in_flight if len(now.workers) == 1 else ()
    times = f"{duration(now.seconds)} so far"
    if now.seconds_left:
        times += f", {duration(now.seconds_left)} left"
    return "  ".join(words), _at_work(alone), times


def _rates(positions: float, teacher: float, busy: str) -> list[str]:
    """Rates, as soon as there are some."""
    words = [f"{positions:,.0f} positions/s"] if positions else []
    return [*words, f"{busy} busy {teacher:.0%}"] if teacher else words


def _at_work(spans: Sequence[SpanFigures]) -> str:
    """What is done of the spans that a worker has."""
    words = []
    for span in sorted(spans, key=lambda figures: figures.span):
        done = f"{counted(span.records, 'record')} read"
        if span.batches_done == span.batches > 0:
            done = "writing"
        elif span.batches:
            done = f"batch {span.batches_done + 1:,}/{span.batches:,}"
        words.append(f"span {span.span}: {done}")
    return "  ".join(words)


def _worker(figures: WorkerFigures, busy: str) -> str:
    """The figures of one worker."""
    rates = _rates(figures.positions_per_second, figures.teacher_busy, busy)
    return "  ".join(
        [figures.name, counted(figures.spans, "span"), *rates, _at_work(figures.in_flight)]
    )


# Results


def terminal() -> Console:
    """Where tables of a command are printed: standard output."""
    return Console()


def print_table(
    console: Console,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: int = 1,
    title: str | None = None,
) -> None:
    """Print a table without truncation.

    Where a terminal has no room for it, it comes as plain lines, which wrap. In a file or a pipe
    nothing is wrapped or coloured.

    Args:
        header: names of the columns; all empty for none.
        rows: one text a column; shown as they are, `[` and all.
        left: how many of the first columns are texts, aligned to the left; the others are numbers.
        title: a line above it.
    """
    if title:
        print_line(console, title, style="bold")
    header = [printable(name) for name in header]
    lines = [tuple(map(printable, row)) for row in rows]
    # Headings may fold between words; each column has a frame of three.
    words = [max(name.split() or [""], key=cell_len) for name in header]
    width = sum(3 + max(map(cell_len, cells)) for cells in zip(words, *lines, strict=True)) + 1
    if not console.is_terminal or width > console.width:
        # Rich would wrap or cut here, and a program that reads this wants whole lines.
        for line in _plain([tuple(header), *lines] if any(header) else lines, left):
            print_line(console, line)
        return
    table = Table(box=box.SIMPLE_HEAD, show_header=any(header), header_style="bold")
    for i, name in enumerate(header):
        justify: JustifyMethod = "left" if i < left else "right"
        # A heading may fold, a cell may not.
        least = max((cell_len(line[i]) for line in lines), default=0)
        table.add_column(name, justify=justify, min_width=least, overflow="fold")
    for cells in lines:
        table.add_row(*map(Text, cells))
    console.print(table)


def _plain(lines: Sequence[Sequence[str]], left: int) -> Iterator[str]:
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = []
        for i, (cell, width) in enumerate(zip(line, widths, strict=True)):
            blank = " " * (width - cell_len(cell))
            cells.append(cell + blank if i < left else blank + cell)
        yield "  ".join(cells).rstrip()


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """Print one line of text as it is: no markup, no colours guessed from its content."""
    console.print(Text(printable(text), style=style or ""), soft_wrap=True)
