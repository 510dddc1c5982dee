"""Two pieces of work at once: the second runs whole at one moment of the first, for every moment.

A moment is just before a file or folder is looked at, opened, made, renamed, locked or removed. The
second runs inside an audit hook of this very process, so nothing depends on speed.
Locks of the kernel keep the two apart as they keep processes apart: each opens its own handle.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from kdcache.errors import KdcacheError

_MOMENTS = {
    *("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.link", "os.remove"),
    *("os.rmdir", "fcntl.flock", "os.stat"),
}


@dataclass(frozen=True)
class Both:
    """The outcomes of two pieces of work: a value, or the error for the user.

    Attributes:
        moment: of the first, at which the second ran.
        first: its outcome.
        second: its outcome; None as well where it would have waited for the first.
    """

    moment: str
    first: Any
    second: Any


class _WouldWaitError(BaseException):
    """The second would wait for a lock of the first, which waits for it."""


class _Hook:
    """Counts moments below a folder, and calls `act` before the wanted one."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.left = 0
        self.moment = ""
        self.act: Callable[[], None] = lambda: None
        self.acting = False
        sys.addaudithook(self)  # for as long as the process lives

    def __call__(self, event: str, facts: tuple[Any, ...]) -> None:
        if self.folder is None or event not in _MOMENTS:
            return
        if self.acting:
            if event == "fcntl.flock" and facts[1] in (fcntl.LOCK_SH, fcntl.LOCK_EX):
                self.acting = False
                try:
                    fcntl.flock(facts[0], facts[1] | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise _WouldWaitError from None
                finally:
                    self.acting = True
            return
        path = _path(event, facts)
        if path.startswith(self.folder):
            self.left -= 1
            if self.left == 0:
                self.moment, self.acting = f"{event} {path}", True
                try:
                    self.act()
                finally:
                    self.acting = False


_HOOKS: list[_Hook] = []
_STAT = os.stat


def _stat(path: Any, *args: Any, **options: Any) -> os.stat_result:
    """What Python does not audit."""
    if not isinstance(path, int):
        _HOOKS[0]("os.stat", (path,))
    return _STAT(path, *args, **options)


def _path(event: str, facts: tuple[Any, ...]) -> str:
    """The absolute path that an event is about, as far as it is known."""
    where = facts[0]
    if event in ("os.remove", "os.rmdir") and facts[1] not in (-1, None):
        return os.path.join(os.readlink(f"/proc/self/fd/{facts[1]}"), os.fsdecode(where))
    if event == "fcntl.flock" or isinstance(where, int):
        return os.readlink(f"/proc/self/fd/{where}")
    return os.fsdecode(where)


def at_each_moment(
    folder: Path,
    first: Callable[[], Any],
    second: Callable[[], Any],
    prepare: Callable[[], Any] = lambda: None,
) -> Iterator[Both]:
    """Run two pieces of work together, once for each moment of the first.

    Args:
        folder: whose moments count; it is emptied each time.
        first: is paused.
        second: runs to its end meanwhile.
        prepare: what the folder holds before.
    """
    if not _HOOKS:
        _HOOKS.append(_Hook())
    hook, moment = _HOOKS[0], 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        prepare()
        moment += 1
        ends: list[Any] = []
        hook.left, hook.act = moment, lambda ends=ends: ends.append(_outcome(second))  # type: ignore[misc]
        hook.folder = str(folder)
        try:
            with mock.patch.object(os, "stat", _stat):
                outcome = _outcome(first)
        finally:
            hook.folder = None
        if not ends:
            assert moment > 1, "the first piece of work has no moment"
            return
        for end in (outcome, *ends):
            if isinstance(end, BaseException) and not isinstance(end, KdcacheError):
                raise AssertionError(f"at {hook.moment}") from end
        yield Both(hook.moment, outcome, ends[0])


def _outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except _WouldWaitError:
        return None
    except Exception as error:
        return error
