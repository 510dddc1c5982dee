"""Splits a file that can't be entered in the middle into its parts, in one pass.

These are compressed files, CSV, and Arrow streams. Record `i` of such a file is of part
`i mod parts`, so to read one part is to read the whole file. The first part that a process reads
reads it for all: records go to blocks of their parts, which are compressed and appended to one
temporary file. The parts after it read their own blocks. The file has no name, so the system frees
it however the process ends. It lies next to the folder of copies (`KDCACHE_DISK`), and is dropped
once every part was read, or when a part of another file is.

Cost: one pass over the file, and disk of about its compressed size, for each process that reads
parts of it; memory of 256 KiB a part while it is split, and of one block while one is read. A
second thread waits for the pass of the first.
Guarantee: a part has the records that reading the whole file for it would give, in order and with
the same errors. Where the disk has no room the whole file is read for each part, with a warning.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from kdcache.corpus.formats import Raw
from kdcache.corpus.records import RecordError
from kdcache.storage.disk import DiskCache

logger = logging.getLogger(__name__)

_BLOCK = 1 << 18
_RECORD = 100  # bytes that a record takes in addition to its content
_STEPS = 1 << 10  # records between two words of progress
_SHARE = 0.5  # of the free disk, at most
_BYTES, _ERROR, _FIELDS = range(3)  # what a payload is
_COLUMNS = {"where": pa.string(), "kind": pa.uint8(), "data": pa.large_binary()}
_SCHEMA = pa.schema(list(_COLUMNS.items()))

Progress = Callable[[], None]


class _NoRoomError(Exception):
    """The disk does not take the parts."""


class _Block:
    """Records of one part that are not written yet."""

    def __init__(self) -> None:
        self.empty()

    def empty(self) -> None:
        self.records: list[tuple[str, int, bytes]] = []
        self.size = 0

    def add(self, where: str, payload: Any) -> None:
        kind, data = _packed(payload)
        self.records.append((where, kind, data))
        self.size += len(data) + _RECORD

    def serialized(self) -> Any:
        """An Arrow batch of the records."""
        columns = zip(zip(*self.records, strict=True), _COLUMNS.values(), strict=True)
        batch = pa.record_batch([pa.array(*column) for column in columns], schema=_SCHEMA)
        return batch.serialize()


def _packed(payload: Any) -> tuple[int, bytes]:
    if isinstance(payload, bytes):
        return _BYTES, payload
    if isinstance(payload, RecordError):
        return _ERROR, str(payload).encode()
    return _FIELDS, json.dumps(payload).encode()


def _records(block: Any) -> Iterator[Raw]:
    batch = pa.ipc.read_record_batch(block, _SCHEMA)
    for where, kind, data in zip(*(column.to_pylist() for column in batch.columns), strict=True):
        if kind == _BYTES:
            yield where, data
        else:
            yield where, RecordError(data.decode()) if kind == _ERROR else json.loads(data)


class Parts:
    """One file's records by the part that they are of."""

    def __init__(
        self,
        records: Iterator[Raw],
        parts: int,
        size: int,
        progress: Progress,
        damage: Callable[[BaseException], bool],
    ) -> None:
        """Read the file and write the records of each part.

        Args:
            records: All of the file, or blocks of them as bytes, one for each part in turn.
            damage: Whether an error states that the file is damaged.

        Raises:
            _NoRoomError: The disk does not take them.
        """
        try:
            folder = Path(f"{DiskCache.of_environment().folder}-parts")
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._free_bytes = int(_SHARE * shutil.disk_usage(folder).free)
            if self._free_bytes < size:
                raise _NoRoomError(f"{folder}: {self._free_bytes:,} bytes for {size:,}")
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise _NoRoomError(str(error)) from error
        weakref.finalize(self, self._file.close)
        self._blocks: list[list[tuple[int, int, int]]] = [[] for _ in range(parts)]
        self._end = 0
        self._damage: Exception | None = None
        self.unread = set(range(parts))
        blocks = [_Block() for _ in range(parts)]
        try:
            for number, (where, payload) in enumerate(records):
                block = blocks[number % parts]
                block.add(str(where), payload)
                if block.size >= _BLOCK:
                    self._write(number % parts, block)
                if number % _STEPS == 0:
                    progress()
        except Exception as error:
            if not damage(error):
                raise
            self._damage = error  # every part meets it behind the records before it
        for part, block in enumerate(blocks):
            if block.records:
                self._write(part, block)

    def _write(self, part: int, block: _Block) -> None:
        data = block.serialized()
        packed = pa.compress(data, "zstd", asbytes=True)
        block.empty()
        try:
            if self._end + len(packed) > self._free_bytes:
                raise _NoRoomError(f"more than {self._free_bytes:,} bytes")
            written = 0
            while written < len(packed):
                written += os.pwrite(self._file.fileno(), packed[written:], self._end + written)
        except OSError as error:
            raise _NoRoomError(str(error)) from error
        self._blocks[part].append((self._end, len(packed), len(data)))
        self._end += len(packed)

    def records(self, part: int) -> Iterator[Raw]:
        """The records of a part; raises the file's own error behind them if it is damaged."""
        for at, size, whole in self._blocks[part]:
            packed = os.pread(self._file.fileno(), size, at)
            yield from _records(pa.decompress(packed, whole, "zstd"))
        self.unread.discard(part)
        if self._damage is not None:
            raise self._damage


class _Kept:
    """The parts that this process keeps: those of the last file of which a part was read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: Hashable = None
        self._parts: Parts | None = None

    def parts_of(
        self, key: Hashable, make: Callable[[], Parts], progress: Progress
    ) -> Parts | None:
        """The parts of a file; None where the disk has no room."""
        while not self._lock.acquire(timeout=1.0):
            progress()
        try:
            if key != self._key:
                self._key = self._parts = None
                try:
                    self._parts = make()
                except _NoRoomError as error:
                    logger.warning(
                        "no room for the parts of a file that cannot be entered in the middle "
                        "(%s): it is read again for each of them. Free some space, or name "
                        "another disk with KDCACHE_DISK",
                        error,
                    )
                self._key = key
            return self._parts
        finally:
            self._lock.release()

    def forget(self, key: Hashable) -> None:
        """Drop the parts of a file that all were read."""
        with self._lock:
            if key == self._key:
                self._key = self._parts = None


_KEPT = _Kept()


def records_of_part(
    key: Hashable,
    part: int,
    make: Callable[[Progress], Parts],
    whole: Callable[[], Iterator[Raw]],
    progress: Progress,
) -> Iterator[Raw]:
    """The records of one part of a file.

    Args:
        whole: Reads all its records for this part, where the disk has no room.
        progress: Called while the file is split, here or by another thread.
    """
    parts = _KEPT.parts_of(key, lambda: make(progress), progress)
    if parts is None:
        yield from whole()
        return
    try:
        yield from parts.records(part)
    finally:
        if not parts.unread:
            _KEPT.forget(key)
