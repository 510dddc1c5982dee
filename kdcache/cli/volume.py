"""How much a command says beside its result: `-v` for more, `-q` for nothing but errors.

Both work before and after the name of a command.
"""

from __future__ import annotations

import enum
import logging
import warnings
from typing import Any, Literal

import click


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
