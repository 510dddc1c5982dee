"""Lines and tables on a terminal, in a file or in a pipe, and how much is printed.

Guarantee: control characters in what is printed (names, texts and errors may come from anybody's
data) never reach the terminal. In a file or a pipe tables are whole lines of plain text. `-v` shows
more and `-q` nothing but results and errors, before and after the name of a command.
"""

from __future__ import annotations

import enum
import logging
import shlex
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

from kdcache.humanize import printable

if TYPE_CHECKING:
    from rich.console import Console, JustifyMethod


class Volume(enum.Enum):
    """What is said, and from which level on log messages are shown."""

    QUIET = logging.ERROR
    NORMAL = logging.WARNING
    VERBOSE = logging.INFO


_KEY = "kdcache.volume"


def set_volume(chosen: Volume) -> None:
    """Take a volume for the running command, unless one was chosen already."""
    meta = click.get_current_context().meta
    if chosen is Volume.NORMAL:
        chosen = meta.get(_KEY, chosen)
    meta[_KEY] = chosen
    logging.getLogger().setLevel(chosen.value)
    shown: Literal["default", "ignore"] = "default" if chosen is Volume.VERBOSE else "ignore"
    warnings.filterwarnings(shown, module=r"(torch|transformers|ray|accelerate)\b")


def is_quiet() -> bool:
    """Whether the running command shows nothing but its result and errors."""
    context = click.get_current_context(silent=True)
    return context is not None and context.meta.get(_KEY) is Volume.QUIET


def volume_options() -> list[click.Option]:
    """`-v` and `-q`."""

    def take(chosen: Volume) -> Any:
        def callback(ctx: click.Context, param: click.Parameter, given: bool) -> None:
            if given:
                set_volume(chosen)

        return callback

    words = {
        Volume.VERBOSE: "Show the log messages of the libraries used.",
        Volume.QUIET: "Show nothing but the result and errors.",
    }
    return [
        click.Option(
            [f"-{name[0]}", f"--{name}"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=take(chosen),
            help=words[chosen],
        )
        for chosen in words
        for name in [chosen.name.lower()]
    ]


def terminal() -> Console:
    """Where tables of a command are printed: standard output."""
    from rich.console import Console

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
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

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
    from rich.cells import cell_len

    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = []
        for i, (cell, width) in enumerate(zip(line, widths, strict=True)):
            blank = " " * (width - cell_len(cell))
            cells.append(cell + blank if i < left else blank + cell)
        yield "  ".join(cells).rstrip()


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """Print one line of text as it is: no markup, no colours guessed from its content."""
    from rich.text import Text

    console.print(Text(printable(text), style=style or ""), soft_wrap=True)


def tell(line: str) -> None:
    """What a command reports on its way: on standard error, and nothing with --quiet."""
    if not is_quiet():
        echo(line, err=True)


def echo(text: str, *, err: bool = False) -> None:
    """Print a line on standard output, or on standard error."""
    click.echo(printable(text), err=err)


def echo_next(*words: str) -> None:
    """Say on standard error what to type next; words in capitals are for the user to fill in."""
    if not is_quiet():
        echo(f"Next: {shlex.join(words)}", err=True)
