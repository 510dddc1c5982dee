"""Receipts: the manifest entries of committed shards, kept while a build runs.

The driver of a build notes the entry of each shard that its workers report, and the seal of a later
run takes it from there instead of reading the shard. A local cache has a file of one line a shard
for each run; an object store cannot append, so there a run writes a file for every 64 shards, or
every 30 s. The files are removed once the cache is sealed.

Cost: 300 bytes a shard. A driver that is killed loses 64 receipts at most.
Guarantee: nothing depends on a receipt. Each line carries its own checksum, and it counts only for
a shard that is listed with its size under its name, which holds a hash of its bytes. A shard
without a receipt is read instead.
"""

from __future__ import annotations

import concurrent.futures as futures
import hashlib
import json
import logging
import time
import uuid
from collections.abc import Iterable, Iterator

from kdcache.cache.manifest import ShardEntry
from kdcache.errors import CorruptCacheError, KdcacheError
from kdcache.storage import LocalStorage, Storage

logger = logging.getLogger(__name__)

_FOLDER = "events"  # which is no part of a cache
_PREFIX = "receipts-"
_AT_ONCE = 64
_EVERY = 30.0
_LIMIT = 1 << 30
_THREADS = 16


class Receipts:
    """The receipts of one run of a build."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._run = uuid.uuid4().hex[:8]
        self._lines: list[str] = []
        self._files = 0
        self._since = 0.0
        self._broken = False

    def add(self, entry: ShardEntry) -> None:
        """Keep the entry of a committed shard."""
        if not self._lines:
            self._since = time.monotonic()
        self._lines.append(_line(entry))
        local = isinstance(self._storage, LocalStorage)
        if local or len(self._lines) >= _AT_ONCE or time.monotonic() - self._since >= _EVERY:
            self.close()

    def close(self) -> None:
        """Write those that are not written yet."""
        text, self._lines = "".join(self._lines), []
        if not text or self._broken:
            return
        name = f"{_FOLDER}/{_PREFIX}{self._run}"
        try:
            if isinstance(self._storage, LocalStorage):
                self._storage.append(f"{name}.jsonl", text)
            else:
                self._storage.write(f"{name}-{self._files:05d}.jsonl", text.encode())
                self._files += 1
        except Exception as error:  # stores raise errors of many classes
            self._broken = True
            logger.warning("no receipts are kept of this run's shards: %s", error)


def read_receipts(storage: Storage) -> Iterator[ShardEntry]:
    """All entries with a receipt, of all runs; lines that are damaged or cut off are left out."""
    with futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="kdcache-receipts") as pool:
        for data in pool.map(lambda name: _read(storage, name), _names(storage)):
            for line in data.decode(errors="replace").splitlines():
                entry = _entry(line)
                if entry is not None:
                    yield entry


def remove_receipts(storage: Storage) -> None:
    """Remove all receipts; what can't be removed stays, with a warning."""
    try:
        with futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="kdcache-receipts") as pool:
            list(pool.map(storage.remove, _names(storage)))
    except (KdcacheError, OSError) as error:
        logger.warning("the receipts of a finished build were not removed: %s", error)


def matching(
    receipts: Iterable[ShardEntry], names: Iterable[str], sizes: dict[str, int]
) -> dict[str, ShardEntry]:
    """The entries by name of those shards that are listed with the size of their receipt."""
    wanted = set(names)
    return {e.name: e for e in receipts if e.name in wanted and sizes.get(e.name) == e.bytes}


def _names(storage: Storage) -> list[str]:
    found = storage.names(_FOLDER)
    return [f"{_FOLDER}/{name}" for name in found if name.startswith(_PREFIX)]


def _read(storage: Storage, name: str) -> bytes:
    try:
        return storage.read(name, _LIMIT)
    except (CorruptCacheError, FileNotFoundError):  # a link; or removed by a seal meanwhile
        return b""


def _line(entry: ShardEntry) -> str:
    text = json.dumps(vars(entry))
    return f"{_checksum(text)} {text}\n"


def _entry(line: str) -> ShardEntry | None:
    checksum, _, text = line.partition(" ")
    if checksum != _checksum(text):
        return None
    try:
        values = json.loads(text)
        return ShardEntry.from_dict(values, values["span"])
    except (ValueError, KeyError, TypeError):
        return None


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
