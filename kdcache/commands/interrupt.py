"""Ctrl-C and SIGTERM while a command works."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator


class Interrupt:
    """What Ctrl-C and SIGTERM do: at once outside of `patient`, within a grace period inside."""

    def __init__(self) -> None:
        self.asked: float | None = None  # `time.monotonic()` of the first signal
        self._patient = False

    def signal(self, *_: object) -> None:
        """The handler. A second signal never waits."""
        if self.asked is not None or not self._patient:
            raise KeyboardInterrupt
        self.asked = time.monotonic()

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Meanwhile the first signal is only noted in `asked`."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupt]:
    """SIGTERM acts like Ctrl-C meanwhile, so that preempted drivers end in order, and both may be
    made to wait."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt  # only the main thread may handle signals
        return
    before = {s: signal.signal(s, interrupt.signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
