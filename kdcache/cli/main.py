"""The `kdcache` program: maps arguments to commands, and errors to one line and an exit code.

Exit codes: 0 done; 2 wrong usage or input; 3 incomplete (run the same command again); 1 any other.

The commands are a table, `kdcache.cli.commands`; what they need is loaded on first use.
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import click

from kdcache import __version__
from kdcache.cli.commands import COMMANDS, load
from kdcache.cli.options import Volume, set_volume, volume_options
from kdcache.errors import KdcacheError, UnexpectedError
from kdcache.humanize import printable, redacted


def _safe(text: str) -> str:
    """A text from anywhere, without secrets and control characters."""
    return printable(redacted(text))


@contextlib.contextmanager
def _safely() -> Iterator[None]:
    """What click reports of arguments and files, as all that is printed."""
    try:
        yield
    except click.ClickException as error:
        error.message = _safe(error.message)  # type: ignore[misc]
        raise


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return load(name) if name in COMMANDS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
            hint = f" Did you mean {near[0]}?" if near else f" There are: {', '.join(COMMANDS)}."
            raise click.UsageError(f"there is no command {name}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, row.help) for name, row in COMMANDS.items()])

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        with _safely():
            return super().make_context(*args, **more)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _safely():
                return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except BrokenPipeError:
            # The reader of our output went away (`| head`): nothing is wrong.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        except Exception as error:
            known = error if isinstance(error, KdcacheError) else UnexpectedError.of(error)
            if not known.reported:
                more = f" {_keep(known.trace)}" if known.trace else ""
                click.echo(f"Error: {_safe(str(known))}{more}", err=True)
            ctx.exit(known.exit_code)


def _keep(trace: str) -> str:
    """Show a traceback with `-v`, or keep it in a file; returns where it is, in words."""
    if logging.getLogger().isEnabledFor(logging.INFO):
        click.echo(_safe(trace), err=True)
        return "The traceback is above."
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="kdcache-", suffix=".txt", delete=False
        ) as file:
            file.write(_safe(trace))
    except OSError:  # of the same full disk, perhaps
        return "With -v it shows its traceback."
    return f"The traceback is in {file.name}; -v shows it."


class _Log(logging.Handler):
    """Lines on standard error, without secrets: what libraries say may name a signed address."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # Looked up each time: a live display stands in for it, and makes room for the line.
            sys.stderr.write(_safe(self.format(record)) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def _hyphens(word: str) -> str:
    """`--max_steps` is `--max-steps`."""
    return word.replace("_", "-")


@click.group(
    cls=_Commands,
    params=volume_options(),
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": _hyphens,
        "auto_envvar_prefix": "KDCACHE",
        "max_content_width": 100,
    },
    epilog="Every option can come from the environment too: KDCACHE_BUILD_OUT is --out of build.",
)
@click.version_option(__version__, prog_name="kdcache")
def cli() -> None:
    """Pay for the teacher once, train many students from its cached soft targets.

    Start with `kdcache demo`, or with `kdcache build` on a teacher and a corpus of yours.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", handlers=[_Log()])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    set_volume(Volume.NORMAL)


def main() -> None:
    """Entry point of the `kdcache` program."""
    try:
        cli()
    finally:  # Python's last search for cycles takes a second among the objects of torch
        gc.freeze()
