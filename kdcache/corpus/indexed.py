"""Indexed ids: the `.bin` and `.idx` files that Megatron-LM's preprocessing writes.

`NAME.bin` holds the ids of all sequences, end to end. `NAME.idx` holds, little-endian: 9 bytes of
magic, the version (uint64, 1), a code of the ids' type (uint8), the number of sequences and that of
the document index (uint64 each); then of each sequence its length in ids (int32) and its first byte
in the `.bin` (int64), and the document index (int64): the first sequence of each document, and
their number at the end. A document is a record with `input_ids`. Spans count four bytes an id,
whatever the type, as for text.

Cost: reading a part costs its share of both files; memory of one document and of blocks of the
index. Nothing is mapped: a file that shrinks while it is read is an error, not a signal.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt

from kdcache.corpus.files import open_bytes
from kdcache.corpus.formats import Format, Raw
from kdcache.corpus.records import FileColumns
from kdcache.errors import UsageError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}
_BLOCK = 1 << 16  # items of the index read at a time
_COLUMN = "input_ids"
_TEXT_BYTES = 4  # of an id

Whole = npt.NDArray[np.int64]


class IndexedIds(Format):
    """Documents of ids: even stretches of them."""

    source = FileColumns((_COLUMN,))

    def _open(self, columns: Sequence[str] | None) -> None:
        (index,) = self._span.file.beside
        self._named, self._size = index.url, index.size
        self._index: BinaryIO | None = None
        self._stream = open_bytes(self._span.file.url)
        self._index = open_bytes(index.url)
        header = self._index.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            self._refuse("does not begin as an index of Megatron-LM does")
        _, version, code, self._sequences, items = _HEADER.unpack(header)
        if version != 1 or code not in _TYPES:
            known = ", ".join(map(str, _TYPES))
            self._refuse(f"has version {version} and type {code}, expected 1 and one of {known}")
        self._type = np.dtype("<" + _TYPES[code])
        self._documents = items - 1
        expected = _HEADER.size + 12 * self._sequences + 8 * items
        if self._size == expected + self._sequences != expected:
            self._refuse("marks sequences of other modes than text, which cannot be read")
        if self._size != expected or items < 1:
            self._refuse(
                f"has {self._size:,} bytes, {expected:,} expected by its {self._sequences:,} "
                f"sequences and {items:,} items of its document index"
            )
        first, last = (int(self._bounds(at, 1)[0]) for at in (0, self._documents))
        if (first, last) != (0, self._sequences):
            self._refuse(
                f"has documents of sequences {first} to {last}, expected 0 to {self._sequences}"
            )

    def close(self) -> None:
        """Close both files."""
        super().close()
        if self._index is not None:
            self._index.close()

    def size(self, limit: int) -> tuple[int, int]:
        """See `Format.size`; taken from the header, in bytes of text."""
        most = min(self._documents, limit)
        size = self._span.file.size * _TEXT_BYTES // self._type.itemsize
        return most, size * most // max(self._documents, 1)

    def records(self) -> Iterator[Raw]:
        """See `Format.records`."""
        span = self._span
        count = self._documents if span.limit is None else min(self._documents, span.limit)
        start, stop = (count * part // span.parts for part in (span.part, span.part + 1))
        sequences: Iterator[tuple[int, int]] | None = None
        for document, (begin, end) in enumerate(self._ranges(start, stop), start):
            where = f"document {document + 1}"
            sequences = sequences or self._placed(begin)
            sequences_here = list(islice(sequences, end - begin))
            size = sum(length for _, length in sequences_here)
            if size > self._most:
                yield where, self._too_long()
                continue
            data = b"".join(self._read(where, *place) for place in sequences_here)
            yield where, {_COLUMN: np.frombuffer(data, self._type)}

    def _ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """First sequence of each document [start, stop), and the one after its last."""
        for first in range(start, stop, _BLOCK):
            bounds = self._bounds(first, min(_BLOCK, stop - first) + 1)
            if (np.diff(bounds) < 0).any() or bounds[0] < 0 or bounds[-1] > self._sequences:
                self._refuse(f"has a document index that is not in order after document {first}")
            yield from zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)

    def _placed(self, first: int) -> Iterator[tuple[int, int]]:
        """First byte of each sequence from one on, and its length in bytes."""
        for at in range(first, self._sequences, _BLOCK):
            count = min(_BLOCK, self._sequences - at)
            lengths = self._items(_HEADER.size + 4 * at, count, "<i4").astype(np.int64)
            begins = self._items(_HEADER.size + 4 * self._sequences + 8 * at, count, "<i8")
            sizes = lengths * self._type.itemsize
            largest = self._span.file.size - sizes  # not begins + sizes, which may overflow
            wrong = np.flatnonzero((lengths < 0) | (begins < 0) | (begins > largest))
            if len(wrong):
                self._refuse(
                    f"has sequence {at + wrong[0] + 1} of {lengths[wrong[0]]} ids at byte "
                    f"{begins[wrong[0]]} of a .bin of {self._span.file.size:,} bytes"
                )
            yield from zip(begins.tolist(), sizes.tolist(), strict=True)

    def _bounds(self, first: int, count: int) -> Whole:
        offset = _HEADER.size + 12 * self._sequences + 8 * first
        return np.asarray(self._items(offset, count, "<i8"), np.int64)

    def _items(self, offset: int, count: int, kind: str) -> Any:
        assert self._index is not None
        self._index.seek(offset)
        data = self._index.read(count * np.dtype(kind).itemsize)
        if len(data) < count * np.dtype(kind).itemsize:
            self._refuse("ends too early")
        return np.frombuffer(data, kind)

    def _read(self, where: str, offset: int, size: int) -> bytes:
        self._stream.seek(offset)
        data = bytes(self._stream.read(size))
        if len(data) < size:
            raise UsageError(
                f"{self._span.file.url}: {where}: the file ends too early. Fetch it again."
            )
        return data

    def _refuse(self, what: str) -> NoReturn:
        raise UsageError(
            f"{self._named}: the index {what}. It is damaged, or of another .bin: fetch both again."
        )
