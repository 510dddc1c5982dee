"""Tables: Parquet and Arrow, read in batches and only in the requested columns; indexed ids.

Cost: memory of a batch of 1,024 rows as Python objects, and of what Arrow decodes at a time. An
Arrow stream in several parts is read once for all of them (see `kdcache.corpus.parts`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kdcache.corpus.files import ARROW_FILE_MAGIC, is_remote, open_bytes
from kdcache.corpus.formats import Format, Raw, not_utf8
from kdcache.corpus.parts import Parts, Progress, records_of_part
from kdcache.corpus.records import FileColumns, RecordError
from kdcache.errors import UsageError
from kdcache.storage import redact

_BATCH_ROWS = 1024
_BLOCK_ROWS, _BLOCK_BYTES = 16, 1 << 23  # rows of each part, or bytes of all, split at a time


class _Table(Format):
    """What tables share: batches of rows in some of their columns."""

    _names: Sequence[str]

    def _take_schema(self, schema: Any, columns: Sequence[str] | None) -> None:
        self.source = FileColumns(tuple(schema.names))
        self._names = [name for name in schema.names if columns is None or name in columns]
        twice = sorted({name for name in self._names if self._names.count(name) > 1})
        if twice:
            raise UsageError(
                f"{redact(self._span.file.url)} has several columns named "
                f"{', '.join(map(repr, twice))}. Rename all but one of each."
            )

    def damage(self, error: BaseException) -> bool:
        """See `Format.damage`; of a local file Arrow may raise a plain OSError without a number."""
        plain = type(error) is OSError and not is_remote(self._span.file.url)
        damaged = isinstance(error, pa.ArrowException) or plain
        return damaged and getattr(error, "errno", None) is None

    def _payloads(self, batch: Any) -> Iterator[Any]:
        """Rows of an Arrow batch as payloads."""
        if not self._names:
            yield from ({} for _ in range(batch.num_rows))
            return
        batch = batch.select(list(self._names))
        # One batch may be a whole file: never more of it as Python objects than a few rows.
        for first in range(0, batch.num_rows, _BATCH_ROWS):
            rows = batch.slice(first, _BATCH_ROWS)
            try:
                if rows.nbytes <= self._most:
                    yield from _values(rows)
                    continue
            except UnicodeDecodeError:
                pass
            yield from (self._one(rows.slice(i, 1)) for i in range(rows.num_rows))

    def _one(self, row: Any) -> Any:
        try:
            values = _values(row)[0]
        except UnicodeDecodeError as error:
            return RecordError(not_utf8(error))
        return values if _bytes(values) <= self._most else self._too_long()


def _values(rows: Any) -> list[dict[str, Any]]:
    """Rows as dictionaries; lists of numbers stay arrays."""
    numbers = [i for i, kind in enumerate(rows.schema.types) if _numeric_list(kind)]
    if not numbers:
        return list(rows.to_pylist())
    names = rows.schema.names
    others = rows.select([name for i, name in enumerate(names) if i not in numbers])
    found = others.to_pylist() if others.num_columns else [{} for _ in range(rows.num_rows)]
    for i in numbers:
        for values, cell in zip(found, _cells(rows.column(i)), strict=True):
            values[names[i]] = cell
    return found


def _numeric_list(kind: Any) -> bool:
    """Whether a type is lists of numbers, or lists of such lists."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    inner = kind.value_type
    return bool(pa.types.is_integer(inner) or pa.types.is_floating(inner) or _numeric_list(inner))


def _as_bytes(kind: Any) -> Any:
    """A type with bytes in place of text."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = kind.value_field.with_type(_as_bytes(kind.value_type))
        return pa.list_(inner) if pa.types.is_list(kind) else pa.large_list(inner)
    return {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(kind, kind)


def _cells(column: Any) -> Iterator[Any]:
    """Lists as arrays, and lists of lists as lists of arrays; with nulls inside as plain lists."""
    ends = column.offsets.to_numpy()
    inner = column.values.slice(ends[0], ends[-1] - ends[0]) if len(column) else column.values
    if _numeric_list(inner.type):
        values: Any = list(_cells(inner))
    elif inner.null_count:
        yield from column.to_pylist()
        return
    else:
        values = inner.to_numpy()
    ends = ends - ends[0]
    for i, there in enumerate(column.is_valid().to_pylist()):
        yield values[ends[i] : ends[i + 1]] if there else None


def _bytes(value: Any) -> int:
    """Bytes of all text and arrays in a value."""
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    if isinstance(value, dict | list):
        return sum(map(_bytes, value.values() if isinstance(value, dict) else value))
    return len(value.encode()) if isinstance(value, str) else 0


class Parquet(_Table):
    """Parquet: even stretches of the rows; a row group is decoded from its beginning."""

    def _open(self, columns: Sequence[str] | None) -> None:
        self._stream = open_bytes(self._span.file.url)
        self._table = pq.ParquetFile(self._stream)
        self._take_schema(self._table.schema_arrow, columns)

    def size(self, limit: int) -> tuple[int, int]:
        """See `Format.size`; taken from the footer."""
        rows = self._table.metadata.num_rows
        return min(rows, limit), self._span.file.size * min(rows, limit) // max(rows, 1)

    def records(self) -> Iterator[Raw]:
        """See `Format.records`."""
        span, meta = self._span, self._table.metadata
        rows = meta.num_rows if span.limit is None else min(meta.num_rows, span.limit)
        start, stop = (rows * part // span.parts for part in (span.part, span.part + 1))
        if not self._names:
            yield from ((f"row {row + 1}", {}) for row in range(start, stop))
            return
        first = 0
        for group in range(meta.num_row_groups):
            after = first + meta.row_group(group).num_rows
            if first < stop and after > start:
                yield from self._group_rows(group, first, start, stop)
            first = after

    def _group_rows(self, group: int, first: int, start: int, stop: int) -> Iterator[Raw]:
        """Rows [start, stop) of the file that are in one row group, which begins at row `first`."""
        for batch in self._table.iter_batches(
            _BATCH_ROWS, row_groups=[group], columns=self._names, use_threads=False
        ):
            after = first + batch.num_rows
            if first >= stop:
                return
            if after > start:
                skip = max(start - first, 0)
                part = batch.slice(skip, min(stop, after) - first - skip)
                for number, payload in enumerate(self._payloads(part), first + skip + 1):
                    yield f"row {number}", payload
            first = after


class Arrow(_Table):
    """Arrow's file format (also Feather's) or its stream format, whichever it is."""

    def _open(self, columns: Sequence[str] | None) -> None:
        url = self._span.file.url
        # A memory map decodes nothing of the batches that belong to other spans.
        self._stream = open_bytes(url) if is_remote(url) else pa.memory_map(url)
        self._indexed = self._stream.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC
        self._stream.seek(0)
        self._reader = (pa.ipc.open_file if self._indexed else pa.ipc.open_stream)(self._stream)
        self._take_schema(self._reader.schema, columns)

    def _batches(self) -> Iterator[Any]:
        if self._indexed:
            return map(self._batch, range(self._reader.num_record_batches))
        return map(self._checked, self._reader)

    def _batch(self, index: int) -> Any:
        return self._checked(self._reader.get_batch(index))

    def _checked(self, batch: Any) -> Any:
        """The wanted columns of a batch, none of whose offsets and indices leads out of its buffer.

        Arrow would follow them. Text that is not UTF-8 is the matter of its own record.
        """
        batch = batch.select(list(self._names))
        for column in batch.columns:
            column.view(_as_bytes(column.type)).validate(full=True)
        return batch

    def size(self, limit: int) -> tuple[int, int]:
        """See `Format.size`."""
        rows = size = 0
        for batch in self._batches():
            own = min(batch.num_rows, limit - rows)
            size += batch.nbytes * own // max(batch.num_rows, 1)
            rows += own
            if rows == limit:
                break
        return rows, size

    def records(self) -> Iterator[Raw]:
        """See `Format.records`."""
        return self._file_rows() if self._indexed else self._stream_rows()

    def _file_rows(self) -> Iterator[Raw]:
        """Rows of the part: a batch is a unit of length 1, and parts are even stretches of them.

        The footer gives the number of batches but not their lengths; so only own batches are
        read.
        """
        span = self._span
        batches, last_rows = self._reader.num_record_batches, None
        if span.limit is not None:
            batches, last_rows = self._until(span.limit)
        for index in range(
            span.part * batches // span.parts, -(-(span.part + 1) * batches // span.parts)
        ):
            batch = self._batch(index)
            if last_rows is not None and index == batches - 1:
                batch = batch.slice(0, last_rows)
            lo, hi = (
                min(max(cut * batches - index * span.parts, 0), span.parts)
                * batch.num_rows
                // span.parts
                for cut in (span.part, span.part + 1)
            )
            for number, payload in enumerate(self._payloads(batch.slice(lo, hi - lo)), lo + 1):
                yield f"batch {index + 1}, row {number}", payload

    def _until(self, limit: int) -> tuple[int, int]:
        """How many batches hold the first `limit` rows, and how many of these are in the last."""
        rows = 0
        for index, batch in enumerate(self._batches()):
            own = min(batch.num_rows, limit - rows)
            rows += own
            if rows == limit:
                return index + 1, own
        raise AssertionError("a limit is planned only where the file has as many rows")

    def _stream_rows(self) -> Iterator[Raw]:
        """Rows of a stream, which has no footer with its batches: row i is of part i mod parts."""
        span = self._span
        known = span.file.versions.strip() and self._names
        if span.parts == 1 or not known or "dictionary<" in str(self._reader.schema):
            yield from self._own()
            return
        key = (span.file, span.parts, span.limit, span.reading, tuple(self._names))
        for where, payload in records_of_part(
            key, span.part, self._make_parts, self._own, self.progress
        ):
            if isinstance(payload, bytes):
                if payload:
                    yield from self._block_rows(int(str(where)), payload)
            else:
                yield where, payload

    def _batches_until_limit(self) -> Iterator[Any]:
        left = self._span.limit
        for batch in self._batches():
            if left is not None:
                batch = batch.slice(0, left)
                left -= batch.num_rows
            yield batch
            if left == 0:
                return

    def _own(self) -> Iterator[Raw]:
        """Rows of the part, found by reading all of the stream.

        Limit and part are applied batch by batch: no other row becomes Python objects.
        """
        span = self._span
        first = 0
        for batch in self._batches_until_limit():
            own = range((span.part - first) % span.parts, batch.num_rows, span.parts)
            taken = batch.take(pa.array(own, pa.int64()))
            for row, payload in zip(own, self._payloads(taken), strict=True):
                yield f"row {first + row + 1}", payload
            first += batch.num_rows

    def _make_parts(self, progress: Progress) -> Parts:
        span = self._span
        return Parts(self._blocks(), span.parts, span.file.size, progress, self.damage)

    def _blocks(self) -> Iterator[Raw]:
        """The stream in blocks of some batches: of each block the rows of every part in turn."""
        parts, first = self._span.parts, 0
        some: list[Any] = []
        rows = size = 0
        damage: Exception | None = None
        batches = self._batches_until_limit()
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:
                if not self.damage(error):
                    raise
                batch, damage = None, error  # the rows before it are good
            if batch is not None:
                some.append(batch)
                rows, size = rows + batch.num_rows, size + batch.nbytes
            if some and (batch is None or rows >= _BLOCK_ROWS * parts or size >= _BLOCK_BYTES):
                yield from _rows_by_part(some, parts, first)
                first, some, rows, size = first + rows, [], 0, 0
            if batch is None:
                break
        if damage is not None:
            raise damage

    def _block_rows(self, first: int, block: bytes) -> Iterator[Raw]:
        with pa.ipc.open_stream(block) as reader:
            row = first
            for batch in reader:
                for payload in self._payloads(batch):
                    yield f"row {row + 1}", payload
                    row += self._span.parts


def _rows_by_part(batches: list[Any], parts: int, first: int) -> Iterator[Raw]:
    """Of each part in turn: its first row of some batches, and all of them as an Arrow stream."""
    table = pa.Table.from_batches(batches).combine_chunks()
    for part in range(parts):
        first_row = (part - first) % parts
        own = pa.array(range(first_row, table.num_rows, parts), pa.int64())
        if not len(own):
            yield "0", b""
            continue
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.take(own))
        yield str(first + first_row), sink.getvalue().to_pybytes()


_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_HEADER = struct.Struct("<9sQBQQ")
_INDEX_TYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}
_INDEX_BLOCK = 1 << 16  # items of the index read at a time
_IDS_COLUMN = "input_ids"
_TEXT_BYTES = 4  # of an id


class IndexedIds(Format):
    """Indexed ids: the `.bin` and `.idx` files that Megatron-LM's preprocessing writes.

    `NAME.bin` holds the ids of all sequences, end to end. `NAME.idx` holds, little-endian: 9 bytes
    of magic, the version (uint64, 1), a code of the ids' type (uint8), the number of sequences and
    that of the document index (uint64 each); then of each sequence its length in ids (int32) and
    its first byte in the `.bin` (int64), and the document index (int64): the first sequence of each
    document, and their number at the end. A document is a record with `input_ids`. Spans count four
    bytes an id, whatever the type, as for text.

    Cost: reading a part, an even stretch of the documents, costs its share of both files; memory of
    one document and of blocks of the index. Nothing is mapped: a file that shrinks while it is read
    is an error, not a signal.
    """

    source = FileColumns((_IDS_COLUMN,))

    def _open(self, columns: Sequence[str] | None) -> None:
        (index,) = self._span.file.beside
        self._named, self._size = index.url, index.size
        self._index: BinaryIO | None = None
        self._stream = open_bytes(self._span.file.url)
        self._index = open_bytes(index.url)
        header = self._index.read(_INDEX_HEADER.size)
        if len(header) < _INDEX_HEADER.size or not header.startswith(_INDEX_MAGIC):
            self._refuse("does not begin as an index of Megatron-LM does")
        _, version, code, self._sequences, items = _INDEX_HEADER.unpack(header)
        if version != 1 or code not in _INDEX_TYPES:
            known = ", ".join(map(str, _INDEX_TYPES))
            self._refuse(f"has version {version} and type {code}, expected 1 and one of {known}")
        self._type = np.dtype("<" + _INDEX_TYPES[code])
        self._documents = items - 1
        expected = _INDEX_HEADER.size + 12 * self._sequences + 8 * items
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
            yield where, {_IDS_COLUMN: np.frombuffer(data, self._type)}

    def _ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """First sequence of each document [start, stop), and the one after its last."""
        for first in range(start, stop, _INDEX_BLOCK):
            bounds = self._bounds(first, min(_INDEX_BLOCK, stop - first) + 1)
            if (np.diff(bounds) < 0).any() or bounds[0] < 0 or bounds[-1] > self._sequences:
                self._refuse(f"has a document index that is not in order after document {first}")
            yield from zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)

    def _placed(self, first: int) -> Iterator[tuple[int, int]]:
        """First byte of each sequence from one on, and its length in bytes."""
        for at in range(first, self._sequences, _INDEX_BLOCK):
            count = min(_INDEX_BLOCK, self._sequences - at)
            lengths = self._items(_INDEX_HEADER.size + 4 * at, count, "<i4").astype(np.int64)
            begins = self._items(_INDEX_HEADER.size + 4 * self._sequences + 8 * at, count, "<i8")
            sizes = lengths * self._type.itemsize
            largest = self._span.file.size - sizes  # not begins + sizes, which may overflow
            wrong = np.flatnonzero((lengths < 0) | (begins < 0) | (begins > largest))
            if len(wrong):
                self._refuse(
                    f"has sequence {at + wrong[0] + 1} of {lengths[wrong[0]]} ids at byte "
                    f"{begins[wrong[0]]} of a .bin of {self._span.file.size:,} bytes"
                )
            yield from zip(begins.tolist(), sizes.tolist(), strict=True)

    def _bounds(self, first: int, count: int) -> npt.NDArray[np.int64]:
        offset = _INDEX_HEADER.size + 12 * self._sequences + 8 * first
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
