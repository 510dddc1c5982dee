"""Seals a finished build with its manifest; receipts make the seal of a resumed build fast.

A receipt is a shard's manifest entry, which the driver notes when a worker reports the shard. A
local cache has a file of one line a shard for each run; an object store cannot append, so there a
run writes a file for every 64 shards, or every 30 s. Sealing removes the files.

Cost: 300 bytes a shard; a shard without a receipt is read and hashed whole. A driver that is killed
loses 64 receipts at most.
Guarantee: nothing depends on a receipt. Each line carries its own checksum, and counts only for a
listed shard of the same size and name, which holds a hash of the shard's bytes.
"""

from __future__ import annotations

import concurrent.futures as futures
import contextlib
import functools
import hashlib
import json
import logging
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kdcache.cache.manifest import SPAN_FACTS, Manifest, ShardEntry, missing_shard
from kdcache.cache.store import ShardStore
from kdcache.errors import CorruptCacheError, IncompleteError, KdcacheError
from kdcache.storage import LocalStorage, Storage, sha256_file

logger = logging.getLogger(__name__)

_FOLDER = "events"  # not a part of the cache
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


_READERS = 16  # shards of earlier runs that are read at once


def prepare_manifest(cache: ShardStore[Any], entries: Iterable[ShardEntry] = ()) -> Manifest:
    """The manifest of all spans, once every one is committed; nothing is written.

    Args:
        entries: what this process committed. Of shards of earlier runs the receipts are
            taken; those without one are read and hashed.

    Raises:
        IncompleteError: spans are missing.
        CorruptCacheError: a shard's bytes are not what its name states.
        KdcacheError: the cache was sealed before, with other bytes than those of `entries`.
    """
    known = {entry.name: entry for entry in entries}
    if cache.manifest_or_none is not None:
        for entry in known.values():
            _refuse_change(cache, entry)
    committed = cache.committed()
    missing = [span for span in range(cache.spec.spans) if span not in committed]
    if missing:
        raise IncompleteError(
            f"{len(missing)} of {cache.spec.spans} spans have no shard yet (first: "
            f"{missing[0]}). Run the same command again to make them."
        )
    if cache.manifest_or_none is not None:
        return cache.manifest
    left = {s: n for s, n in committed.items() if n not in known}
    if left:
        sizes = cache.storage.sizes("shards")
        known |= matching(read_receipts(cache.storage), left.values(), sizes)
        left = {s: n for s, n in left.items() if n not in known}
        if left and cache.storage.exists("manifest.json"):  # the seal removed the receipts
            with contextlib.suppress(FileNotFoundError):
                return cache.read_manifest()
        known |= _look_into(cache, left)
    shards = tuple(known[committed[span]] for span in range(cache.spec.spans))
    return Manifest(cache.spec.fingerprint, shards, cache.files)


def seal(cache: ShardStore[Any], manifest: Manifest) -> Manifest:
    """Write the manifest: from now on the cache can be read, and is never changed.

    Where another build has sealed the cache meanwhile, its manifest stands and is returned.
    """
    if not cache.storage.create("manifest.json", manifest.to_json()):
        manifest = cache.read_manifest()
    cache.manifest_or_none = manifest
    return manifest


def shard_entry(cache: ShardStore[Any], span: int, name: str) -> ShardEntry:
    """The manifest's entry of a committed shard; its file is hashed and opened.

    Raises:
        CorruptCacheError: its bytes are not what its name states, or of another build.
    """
    with cache.storage.hold(f"shards/{name}") as path:
        try:
            sha256, size = sha256_file(path), path.stat().st_size
        except FileNotFoundError:  # a repair has removed it since it was listed
            raise missing_shard(name) from None
        if not name.endswith(f"-{sha256[:16]}.{cache.suffix}"):
            raise CorruptCacheError(
                f"{name}: its bytes have sha256 {sha256[:16]}…. Delete the file and run the "
                "same build again: only this shard is made again."
            )
        counts, facts = cache.read_facts(path)
    said = tuple(map(facts.get, ("fingerprint", "index", "domain")))
    if said != (cache.spec.fingerprint, span, cache.spec.domain_of(span)):
        raise CorruptCacheError(
            f"{name} belongs to another build. Delete it and run the build again."
        )
    values = {"span": span, "name": name, **vars(counts), "bytes": size, "sha256": sha256}
    values |= {key: facts.get(key) for key in SPAN_FACTS}
    try:
        return ShardEntry.from_dict(values, span)
    except ValueError as error:
        raise CorruptCacheError(f"{name} cannot be listed: {error}.") from error


def _look_into(cache: ShardStore[Any], names: Mapping[int, str]) -> dict[str, ShardEntry]:
    """Manifest entries of shards (name by span) that this process has not written, by name.

    Each is read whole. A store is mostly waited for, so several are read at once.
    """
    pool = futures.ThreadPoolExecutor(_READERS, thread_name_prefix="kdcache-seal")
    try:
        found = pool.map(functools.partial(shard_entry, cache), names, names.values())
        return {entry.name: entry for entry in found}
    finally:
        pool.shutdown(cancel_futures=True)


def _refuse_change(cache: ShardStore[Any], entry: ShardEntry) -> None:
    said = cache.manifest.shards[entry.span]
    if entry != said:
        raise KdcacheError(
            f"shard {entry.span} was made again as {entry.name}, but the manifest has "
            f"{said.name}: another kind of machine, or other versions of the libraries, round "
            f"differently. Make it again on a machine like the first, restore the file from a "
            f"copy, or accept the new shard, and a new digest of the cache, with `kdcache "
            "repair --reseal`."
        )
