"""A command in a process of its own that kills itself at a chosen step of its output.

The steps are what changes the files below a folder: each file that is opened for writing, each
folder that is made, each rename, link and removal, in the order in which they come.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loaded import CONTEXT

_CHANGES = ("os.mkdir", "os.rename", "os.link", "os.remove", "os.truncate")


def killed_at(step: int | None, folder: Path, work: Callable[[Any], Any], options: Any) -> int:
    """Run a function in a new process, killed before a step; give the steps that it took.

    A run takes a step more or less than another: files that record progress follow the clock. One
    that is over before its step is whole.

    Raises:
        AssertionError: it ended otherwise.
    """
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_run, args=(step, str(folder), work, options, sender))
    process.start()
    sender.close()
    process.join()
    if step is not None and process.exitcode == -signal.SIGKILL:
        return step
    assert process.exitcode == 0
    steps = int(receiver.recv())
    assert step is None or steps <= step
    return steps


def _run(
    step: int | None, folder: str, work: Callable[[Any], Any], options: Any, sender: Any
) -> None:
    steps = 0

    def watch(event: str, facts: tuple[Any, ...]) -> None:
        nonlocal steps
        writes = event == "open" and isinstance(facts[2], int) and facts[2] & os.O_CREAT
        if not (writes or event in _CHANGES) or not str(facts[0]).startswith(folder):
            return
        if steps == step:
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1

    sys.addaudithook(watch)
    work(options)
    sender.send(steps)
