"""Ctrl-C and SIGTERM while a command works.

A signal raises KeyboardInterrupt. Where that happens inside a callback of another library (Cython,
ctypes, a finalizer), it is printed and lost; so the signal is also noted, and long work calls
`check` every now and then.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

_active: Interrupt | None = None


class Interrupt:
    """Handles Ctrl-C and SIGTERM: at once outside of `patient`, within a grace period inside."""

    def __init__(self) -> None:
        self.asked: float | None = None  # `time.monotonic()` of the first signal
        self._patient = False

    def signal(self, *_: object) -> None:
        """The handler. A second signal never waits."""
        waits = self._patient and self.asked is None
        if self.asked is None:
            self.asked = time.monotonic()
        if not waits:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Meanwhile the first signal is only noted in `asked`."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False


def check() -> None:
    """Raise KeyboardInterrupt if a signal came, for where a library has swallowed the first."""
    if _active is not None and _active.asked is not None:
        raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupt]:
    """SIGTERM acts like Ctrl-C meanwhile, so that preempted drivers end in order, and both may be
    made to wait. A command inside another shares the outer one's.
    """
    global _active
    if threading.current_thread() is not threading.main_thread():
        yield Interrupt()  # only the main thread may handle signals
        return
    if _active is not None:
        yield _active
        return
    interrupt = _active = Interrupt()
    before = {s: signal.signal(s, interrupt.signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        _active = None
        for number, handler in before.items():
            signal.signal(number, handler)
