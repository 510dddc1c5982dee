"""Tables: Parquet and Arrow, read in batches and only in the requested columns.

Cost: memory of a batch of 1,024 rows as Python objects, and of what Arrow decodes at a time. An
Arrow stream in several parts is read once for all of them (see `kdcache.corpus.parts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
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
    """Of each part in turn: its first row of some batches, and all of them as an Arrow stream.

    Args:
        batches: One or more.
        parts: Of the file.
        first: The file's rows before them.
    """
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
