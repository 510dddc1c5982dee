"""The events of a build, as JSON lines beside the cache, for programs and for people.

A local cache has them in `events.jsonl`, appended one line at a time by all its builds. An object
store cannot append: there the lines of one run are kept in memory and written when it ends, under
`events/` with a name of their own. They are no part of the cache: nothing reads them back.

Cost: about 200 bytes a span. Guarantee: the log never stops the build; if it cannot be written (a
full disk), it is given up with one warning. URLs are written without credentials.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from typing import Any, Protocol

from kdcache.humanize import redacted
from kdcache.storage import LocalStorage, Storage

logger = logging.getLogger(__name__)

FILE = "events.jsonl"


class EventSink(Protocol):
    """A function that takes an event: its name and its facts."""

    def __call__(self, event: str, /, **facts: Any) -> None:
        """Record the event, with the current time."""


def ignore_events(event: str, /, **facts: Any) -> None:
    """Ignore events."""


class EventLog:
    """The events of one run of `build`; call it to add one, `close` it at the end.

    Every line has `time` (seconds since 1970), `run` (the same for all lines of a run) and `event`.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._local = storage if isinstance(storage, LocalStorage) else None
        self._run = uuid.uuid4().hex[:8]
        self._begin = time.time()
        self._kept: list[str] = []
        self._broken = False
        self._lock = threading.Lock()

    def __call__(self, event: str, /, **facts: Any) -> None:
        """Add one line."""
        told = {"time": round(time.time(), 3), "run": self._run, "event": event, **facts}
        line = json.dumps(redacted(told))
        with self._lock:
            if self._local is None:
                self._kept.append(line)
            elif not self._broken:
                try:
                    self._local.append(FILE, line + "\n")
                except OSError as error:
                    self._give_up(error)

    def close(self) -> None:
        """Write the lines kept in memory."""
        if self._kept:
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self._begin))
            try:
                content = "".join(line + "\n" for line in self._kept).encode()
                self._storage.write(f"events/{stamp}-{self._run}.jsonl", content)
            except Exception as error:  # stores raise errors of many classes
                self._give_up(error)
            self._kept.clear()

    def _give_up(self, error: Exception) -> None:
        self._broken = True
        logger.warning("the events of this run are not recorded: %s", error)
