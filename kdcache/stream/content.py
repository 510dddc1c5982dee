"""Rows of a cache by what they say: an index of their ids, and one row without the rest of a shard.

The key of a row is a hash of its ids up to its last label, that label included. An index is a file:
a header with the cache's digest, and of each key 24 bytes, sorted by key. It is made in sorted runs
of some million keys, which are then merged by ranges of keys. Rows whose documents do not attend to
each other are indexed by document. Rows of one key have the same ids, so the first stands for all.

Decoded rows are a shard's columns as they are in memory, in a file of the folder of local copies,
with where each row begins in each. So one row is a few slices of mapped memory, which the processes
of a machine share.

Cost: an index is made in one pass over the rows of a cache, targets left out, in bounded memory. To
open one is a look at its header; to find a key takes log2(keys) looks. A shard is decoded once a
machine, to two or three times its bytes, as long as `KDCACHE_DISK_BYTES` has room for all of them.
Guarantee: an index only proposes a row. Nothing in it is believed: the caller compares ids.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors.numpy import save

from kdcache.cache import Cache
from kdcache.cache.shard import ShardData
from kdcache.errors import CorruptCacheError, IncompleteError, UsageError
from kdcache.storage import LocalStorage
from kdcache.storage.disk import DiskCache, once_here
from kdcache.stream.shard_rows import by_document
from kdcache.targets import Codec, SoftTargets
from kdcache.tasks import IGNORE

logger = logging.getLogger(__name__)

KEY_BYTES = 16
RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("span", "<u4"), ("row", "<u4")])
_MAGIC = b"kdcache-index-1\n"
_HEADER = struct.Struct(
    "<16s32s32sQ8x"
)  # digest of the cache, SHA-256 of the records, their number
_RUN = 1 << 22  # keys that are sorted at once
_FOLDER = "lookup"
_DTYPES = {"U8": "u1", "U16": "<u2", "U32": "<u4", "I32": "<i4", "I64": "<i8"}
_DTYPES |= {"F16": "<f2", "F32": "<f4"}


def hashed(ids: np.ndarray) -> hashlib.blake2b:
    """The hash of some ids, to which others may be added; its digest is a key."""
    return hashlib.blake2b(np.ascontiguousarray(ids, "<i4").data, digest_size=KEY_BYTES)


def keys_of(data: ShardData) -> Iterator[tuple[int, bytes]]:
    """Number and key of each row, or document, that has a label."""
    labels, there = data.labels, np.flatnonzero(data.labels != IGNORE)
    last = np.append(-1, there)[np.searchsorted(there, data.offsets[1:])]
    for row, (begin, at) in enumerate(zip(data.offsets[:-1].tolist(), last.tolist(), strict=True)):
        if at >= begin:
            found = hashed(data.input_ids[begin : at + 1])
            found.update(np.ascontiguousarray(labels[at : at + 1], "<i4").data)
            yield row, found.digest()


class RowIndex:
    """The keys of a cache, in a file that is mapped into memory."""

    def __init__(self, path: Path, digest: str) -> None:
        """Open it.

        Raises:
            ValueError: it is not an index, or not the one of this cache.
        """
        self._file = np.memmap(path, np.uint8, "r")
        magic, of, self._sha256, count = _HEADER.unpack(self._file[: _HEADER.size].tobytes())
        size = _HEADER.size + count * RECORD.itemsize
        if (magic, of.hex(), len(self._file)) != (_MAGIC, digest, size):
            raise ValueError(f"{path} is not the index of this cache")
        self.records = self._file[_HEADER.size :].view(RECORD)

    @classmethod
    def of_cache(cls, cache: Cache, *, fresh: bool = False) -> RowIndex:
        """The index of a cache; made where there is none, or another one.

        It is kept with a local cache that can be written to, else with the local copies of remote
        files. Of processes that need it at once one makes it, and the others wait.

        Args:
            fresh: make it anew.
        """
        storage, name = cache.storage, f"{cache.digest[:32]}.index"
        if isinstance(storage, LocalStorage) and not (storage.root / _FOLDER).is_symlink():
            with contextlib.suppress(UsageError, IncompleteError, OSError):
                return cls._kept(cache, DiskCache(storage.root / _FOLDER, 1 << 62), name, fresh)
        return cls._kept(cache, DiskCache.of_environment(), name, fresh)

    @classmethod
    def _kept(cls, cache: Cache, disk: DiskCache, name: str, fresh: bool) -> RowIndex:
        making = _Making(cache, disk.folder)
        usual = contextlib.suppress(ValueError, struct.error)
        with disk.hold(name, making.begin, fresh=fresh) as path, usual:
            return cls(path, cache.digest)
        with disk.hold(name, making.begin, fresh=True) as path:
            return cls(path, cache.digest)

    def __len__(self) -> int:
        return len(self.records)

    def intact(self) -> bool:
        """Whether its checksum is right; reads all of it."""
        return bool(hashlib.sha256(self._file[_HEADER.size :].data).digest() == self._sha256)

    def find(self, keys: Sequence[bytes]) -> list[tuple[int, int] | None]:
        """Span and row of each key, as the index has them; None where it has none."""
        wanted = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
        found: list[tuple[int, int] | None] = [None] * len(keys)
        for i, at in enumerate(_first(self.records, wanted).tolist()):
            if at < len(self.records):
                record = self.records[at]
                if (record["high"], record["low"]) == tuple(wanted[i]):
                    found[i] = int(record["span"]), int(record["row"])
        return found


class _Making:
    """Makes the file of an index."""

    def __init__(self, cache: Cache, folder: Path) -> None:
        self._cache, self._folder = cache, folder

    def begin(self) -> tuple[int, _Making]:
        """Read the cache into sorted runs; see `kdcache.storage.disk.Download`."""
        logger.info("indexing the rows of %s", self._cache.url)
        self._scratch = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 closed by __call__
        self._ends, held, waiting = [0], 0, list[np.ndarray]()
        for span in range(self._cache.spec.spans):
            waiting.append(_records(span, by_document(self._cache.read(span, targets=False))))
            held += len(waiting[-1])
            if held >= _RUN:
                self.add(np.concatenate(waiting))
                held, waiting = 0, []
        self.add(np.concatenate([np.zeros(0, RECORD), *waiting]))
        return _HEADER.size + self._ends[-1] * RECORD.itemsize, self

    def add(self, records: np.ndarray) -> None:
        """Keep a run."""
        self._scratch.write(_sorted(records).tobytes())
        self._ends.append(self._ends[-1] + len(records))

    def __call__(self, file: BinaryIO) -> None:
        """Merge the runs into the file."""
        self._scratch.flush()
        total = self._ends[-1]
        whole = np.memmap(self._scratch, RECORD, "r") if total else np.zeros(0, RECORD)
        runs = [whole[a:b] for a, b in zip(self._ends, self._ends[1:], strict=False)]
        parts = -(-total // _RUN)
        bounds = [(part << 64) // parts for part in range(1, parts)]
        limits = np.array([[bound, 0] for bound in bounds], "<u8").reshape(-1, 2)
        cuts = [[0, *_first(run, limits).tolist(), len(run)] for run in runs]
        digest, count = hashlib.sha256(), 0
        file.seek(_HEADER.size)
        for part in range(parts):
            found = _sorted(
                np.concatenate(
                    [run[cut[part] : cut[part + 1]] for run, cut in zip(runs, cuts, strict=True)]
                )
            )
            new = np.ones(len(found), np.bool_)
            new[1:] = (found["high"][1:] != found["high"][:-1]) | (
                found["low"][1:] != found["low"][:-1]
            )
            data = found[new].tobytes()
            digest.update(data)
            file.write(data)
            count += int(new.sum())
        file.truncate(_HEADER.size + count * RECORD.itemsize)
        file.seek(0)
        of = bytes.fromhex(self._cache.digest)
        file.write(_HEADER.pack(_MAGIC, of, digest.digest(), count))
        self._scratch.close()


def _records(span: int, data: ShardData) -> np.ndarray:
    found = list(keys_of(data))
    records = np.zeros(len(found), RECORD)
    keys = np.frombuffer(b"".join(key for _, key in found), "<u8").reshape(-1, 2)
    records["high"], records["low"] = keys.T
    records["span"], records["row"] = span, [row for row, _ in found]
    return records


def _sorted(records: np.ndarray) -> np.ndarray:
    """By key; those of one key stay in their order."""
    return np.asarray(records[np.lexsort((records["low"], records["high"]))])


def _first(records: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where keys, <u8 [n, 2], are among sorted records, or would be: int64 [n]."""
    high, low = keys.T
    begin = np.zeros(len(keys), np.int64)
    end = np.full(len(keys), len(records))
    while (open_ := begin < end).any():
        middle = (begin + end) // 2
        met = records[np.minimum(middle, len(records) - 1)]
        below = (met["high"] < high) | ((met["high"] == high) & (met["low"] < low))
        begin = np.where(open_ & below, middle + 1, begin)
        end = np.where(open_ & ~below, middle, end)
    return begin


class DecodedRows:
    """The rows, or documents, of a shard, one by one."""

    def __init__(self, path: Path, codec: Codec, ranks: np.ndarray | None) -> None:
        """Map its columns; a process of this machine hashes them once.

        Raises:
            ValueError, KeyError, CorruptCacheError: the file was changed.
        """
        file = np.memmap(path, np.uint8, "r")
        body, sha256 = file[:-32], file[-32:].tobytes()

        def check() -> None:
            if hashlib.sha256(body.data).digest() != sha256:
                raise CorruptCacheError(f"{path}: checksum mismatch: the file was changed.")

        once_here(path, sha256.hex(), check)
        self._codec, self._ranks = codec, ranks
        first = 8 + int(body[:8].view("<u8")[0])
        self._columns = {
            name: np.ndarray(
                facts["shape"], _DTYPES[facts["dtype"]], body, first + facts["data_offsets"][0]
            )
            for name, facts in json.loads(body[8:first].tobytes()).items()
        }

    @classmethod
    def of_shard(cls, cache: Cache, span: int, codec: Codec) -> DecodedRows:
        """The rows of a shard of a cache, decoded now if no process of this machine has."""

        def begin() -> tuple[int, Callable[[BinaryIO], None]]:
            data = by_document(cache.read(span))
            columns = {"offsets": data.offsets, "input_ids": data.input_ids, "labels": data.labels}
            columns |= {f"ends/{axis}": ends for axis, ends in data.item_offsets.items()}
            columns |= {f"targets/{name}": c for name, c in data.targets.columns.items()}
            blob = save({name: np.ascontiguousarray(c) for name, c in columns.items()})
            blob += hashlib.sha256(blob).digest()
            _warn_of_too_many(cache.url, cache.spec.spans, len(blob))

            def fill(file: BinaryIO) -> None:
                file.write(blob)

            return len(blob), fill

        disk, name = DiskCache.of_environment(), f"{cache.digest[:32]}-{span}.rows"
        usual = contextlib.suppress(ValueError, KeyError, TypeError, CorruptCacheError)
        with disk.hold(name, begin) as path, usual:
            if path.stat().st_uid == os.getuid():  # others' files prove nothing
                return cls(path, codec, cache.rank_to_id)
        with disk.hold(name, begin, fresh=True) as path:
            return cls(path, codec, cache.rank_to_id)

    def __len__(self) -> int:
        return len(self._columns["offsets"]) - 1

    def row(self, number: int) -> ShardData:
        """One row, in views of the file."""
        columns = self._columns

        def of(name: str, ends: str) -> np.ndarray:
            begin, end = columns[ends][number : number + 2].tolist()
            return np.asarray(columns[name][begin:end])

        own = {c.name: of(f"targets/{c.name}", f"ends/{c.per}") for c in self._codec.columns}
        ids = of("input_ids", "offsets")
        return ShardData(
            task="causal-lm",
            targets=SoftTargets(self._codec, own, self._ranks),
            offsets=np.array([0, len(ids)]),
            input_ids=ids,
            labels=of("labels", "offsets"),
        )


_warned: set[str] = set()  # URLs of caches


def _warn_of_too_many(url: str, shards: int, size: int) -> None:
    """Say once of a cache, at the first shard that is decoded, that not all of them have room."""
    if url in _warned:
        return
    _warned.add(url)
    fit = len(DiskCache.of_environment().leading([("", size)] * shards, share=1.0))
    if fit < shards:
        logger.warning(
            "decoded, the rows of %s take about %d bytes: %d of its %d shards fit the folder of "
            "copies, the others are decoded again and again. Set KDCACHE_DISK_BYTES to more.",
            url, size * shards, fit, shards,
        )  # fmt: skip
