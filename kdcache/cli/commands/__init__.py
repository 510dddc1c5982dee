"""The commands: options in, one function of the package called, its outcome printed. No logic.

A function _NAME makes the command NAME. It imports the command's options when it is called, and
what does the work when the command runs: a help or a wrong option needs no torch.
"""

from __future__ import annotations

import click

from kdcache.cli.commands import caches, looking, students


def load(name: str) -> click.Command:
    """The command of that name."""
    maker = f"_{name}"
    (home,) = (module for module in (caches, students, looking) if hasattr(module, maker))
    command: click.Command = getattr(home, maker)()
    return command
