"""Faults at chosen moments of a worker's life: Ray's `worker_process_setup_hook` puts them into
worker processes, so that the package itself knows nothing of them.

A file in the folder KDCACHE_TEST_FAULTS that is named after a moment strikes the next worker that
comes by there, once; what it says is done: `kill` (SIGKILL), `stop` (SIGSTOP) or `hang`. While
there is a file `gate`, no shard is committed, but for one for each file `ticket-*`; what waits
there leaves a file `waiting-*`. A file `poison` names an input that kills whoever opens it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOMENTS = ("read", "forward", "write", "rename", "renamed")


def install() -> None:
    """The hook: called in every worker process when it starts."""
    folder = Path(os.environ["KDCACHE_TEST_FAULTS"])
    fsync = os.fsync

    def strike(moment: str) -> None:
        try:
            what = (folder / moment).read_text()
            (folder / moment).unlink()
        except FileNotFoundError:
            return
        if what == "hang":
            threading.Event().wait()
        os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)

    def watched(event: str, facts: tuple[Any, ...]) -> None:
        if event == "open" and str(facts[0]).endswith(".jsonl"):
            patch_teacher(strike)
            strike("read")
            if (folder / "poison").exists() and (folder / "poison").read_text() == str(facts[0]):
                os.kill(os.getpid(), signal.SIGKILL)
        elif event == "os.rename" and Path(str(facts[1])).parent.name == "shards":
            strike("rename")
            while (folder / "gate").exists() and not any(map(taken, folder.glob("ticket-*"))):
                (folder / f"waiting-{Path(str(facts[1])).name}").touch()
                time.sleep(0.05)

    def synced(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}")
        if name.endswith(".tmp"):
            strike("write")
        elif name.endswith("/shards"):
            strike("renamed")
        fsync(handle)

    os.fsync = synced
    sys.addaudithook(watched)


def taken(ticket: Path) -> bool:
    """Whether this call took it."""
    try:
        ticket.unlink()
    except FileNotFoundError:
        return False
    return True


def patch_teacher(strike: Callable[[str], None]) -> None:
    """Put the moment `forward` before the teacher's own forward.

    Done when a process opens its first input: importing it at start would cost every process of Ray
    the import of torch.
    """
    teacher = sys.modules["kdcache.teacher"].Teacher
    original = teacher.slices
    if getattr(original, "patched", False):
        return

    def slices(self: Any, rows: Any) -> Any:
        strike("forward")
        return original(self, rows)

    slices.patched = True  # type: ignore[attr-defined]
    teacher.slices = slices
