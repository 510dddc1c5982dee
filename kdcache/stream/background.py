"""Runs an iterable in a thread, a bounded number of items ahead of its consumer.

Guarantee: items in order, errors raised where the items are taken, no thread left after `close`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Runs an iterable in a thread, at most `ahead` items before the consumer."""

    def __init__(self, items: Iterable[T], ahead: int, name: str) -> None:
        self._change = threading.Condition()
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._done = self._closed = False
        self._ahead = ahead
        self._thread = threading.Thread(target=self._work, args=(items,), name=name, daemon=True)
        self._thread.start()

    def _work(self, items: Iterable[T]) -> None:
        iterator = iter(items)
        try:
            while True:
                with self._change:
                    self._change.wait_for(lambda: self._closed or len(self._ready) < self._ahead)
                    if self._closed:
                        return
                item = next(iterator, self)
                if item is self:
                    return
                with self._change:
                    self._ready.append(item)  # type: ignore[arg-type]
                    self._change.notify_all()
                del item  # the consumer alone decides how long it lives
        except BaseException as error:
            self._error = error
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()
            with self._change:
                self._done = True
                self._change.notify_all()

    def __iter__(self) -> Background[T]:
        return self

    def __next__(self) -> T:
        with self._change:
            self._change.wait_for(lambda: self._ready or self._done)
            if self._ready:
                item = self._ready.popleft()
                self._change.notify_all()
                return item
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        raise StopIteration

    def close(self) -> None:
        """End the thread and drop the items that are ready."""
        with self._change:
            self._closed = True
            self._ready.clear()
            self._change.notify_all()
        self._thread.join()
