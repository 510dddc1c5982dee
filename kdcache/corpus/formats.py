"""Readers: one span's raw records, format by format.

Each reader yields `(location, payload)` in file order; `parse` turns a payload into values or
raises `RecordError` with the reason. The same readers count records for `limit`, so both agree on
what a record is: a line that is not blank, a CSV row that is not empty, a row of a table.

Cost: one pass; a table is decoded in batches of 1,024 rows and only in the requested columns.
"""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from kdcache.corpus.files import is_remote, open_bytes, open_plain
from kdcache.corpus.records import LineAt, RecordError, Source, shorten
from kdcache.errors import UsageError

if TYPE_CHECKING:
    from kdcache.corpus.corpus import Span

Location = str | LineAt
Raw = tuple[Location, Any]
Raws = Generator[Raw, None, None]

_BOM = b"\xef\xbb\xbf"
_BATCH_ROWS = 1024
_ARROW_FILE_MAGIC = b"ARROW1"
# What a cut-short or foreign compressed stream raises; Arrow's zstd says plain OSError.
DECOMPRESSION_ERRORS = (EOFError, OSError, zlib.error)


def open_span(span: Span, columns: Sequence[str] | None) -> tuple[Source, Raws]:
    """Open a span for reading.

    Args:
        span: What to read. The caller applies `limit` (but to tables) and deals the parts of a
            dealt file (see `is_dealt`).
        columns: Columns wanted of a table; None is all. Text formats give all they have.

    Returns:
        What the file says about itself, and its raw records.

    Raises:
        UsageError: The file can't be opened or its frame (header, footer) is not what its name
            says.
    """
    if span.kind == "parquet":
        return _parquet(span, columns)
    if span.kind == "arrow":
        return _arrow(span, columns)
    if span.kind == "csv":
        return _csv(span)
    source = Source()
    if span.kind == "txt":
        source = Source((span.columns or ("text",))[:1])
    elif span.kind == "tsv":
        source = _tsv_source(span)
    lines = _dealt_lines(span) if span.compression else _byte_lines(span)
    return source, lines


def parse(payload: Any, kind: str, source: Source) -> dict[str, Any]:
    """Values of one raw record.

    Raises:
        RecordError: It is not UTF-8, not JSON, not an object, or has another number of fields.
    """
    if isinstance(payload, RecordError):
        raise payload
    if isinstance(payload, dict):
        return payload
    if isinstance(payload, list):
        return _fields(payload, source)
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(_not_utf8(error)) from None
    if kind == "jsonl":
        return _json(text)
    if kind == "tsv":
        return _fields(text.split("\t"), source)
    return {source.columns[0]: text}


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not valid UTF-8 (byte 0x{error.object[error.start]:02x} in column {error.start + 1})"


def _json(text: str) -> dict[str, Any]:
    if text.startswith("["):
        raise RecordError("a JSON list where one object a line was expected (try jq -c '.[]')")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        # The record's own line is in the message already; the parser would say "line 1".
        raise RecordError(f"not valid JSON ({error.msg} in column {error.pos + 1})") from None
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not JSON that can be read ({shorten(error)})") from None
    if not isinstance(values, dict):
        raise RecordError(
            f"a JSON {type(values).__name__} where an object was expected (one object a line)"
        )
    return values


def _fields(fields: list[str], source: Source) -> dict[str, Any]:
    if len(fields) != len(source.columns):
        named = "the header names" if source.header else "--columns names"
        raise RecordError(
            f"{len(fields)} fields where {named} {len(source.columns)} "
            f"({shorten(', '.join(source.columns))})"
        )
    return dict(zip(source.columns, fields, strict=True))


# -- lines --------------------------------------------------------------------------------


def _byte_lines(span: Span) -> Raws:
    """Lines that start in [start, stop) of a plain file."""
    with open_bytes(span.file) as stream:
        offset = span.start
        if offset > 0:
            # From one byte before: a line that starts exactly at `start` is ours.
            stream.seek(offset - 1)
            offset += len(stream.readline()) - 1
        elif (first := stream.readline()) and span.start < span.stop:
            if not _is_header(span) and (line := first.removeprefix(_BOM).rstrip(b"\r\n")).strip():
                yield LineAt(span.file, 0), line
            offset = len(first)
        while offset < span.stop and (line := stream.readline()):
            if (stripped := line.rstrip(b"\r\n")) and not stripped.isspace():
                yield LineAt(span.file, offset), stripped
            offset += len(line)


def _dealt_lines(span: Span) -> Raws:
    """All lines of a compressed file."""
    with open_plain(span.file, span.compression) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                if _is_header(span):
                    continue
                line = line.removeprefix(_BOM)
            if line.strip():
                yield f"line {number}", line.rstrip(b"\r\n")


def _is_header(span: Span) -> bool:
    return span.kind in ("tsv", "csv") and span.columns is None


def _header(span: Span, fields: list[str]) -> Source:
    if span.columns is not None:
        return Source(span.columns)
    twice = sorted({name for name in fields if fields.count(name) > 1})
    if twice:
        shown = ", ".join(repr(shorten(name)) for name in twice)
        raise UsageError(
            f"{span.file}: the header names {shown} more than once. Rename one, or, if the first "
            f"line is no header, name its {len(fields)} columns with --columns."
        )
    return Source(tuple(fields), header=True)


def _tsv_source(span: Span) -> Source:
    if span.columns is not None:
        return Source(span.columns)
    try:
        with open_plain(span.file, span.compression) as stream:
            line = stream.readline().removeprefix(_BOM).rstrip(b"\r\n")
        return _header(span, line.decode("utf-8").split("\t"))
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{span.file}: line 1: {_not_utf8(error)}. Save the file as UTF-8."
        ) from None
    except DECOMPRESSION_ERRORS as error:
        raise _unreadable(span, error) from error


def _csv(span: Span) -> tuple[Source, Raws]:
    # The default of 128 KiB a field is less than one long document.
    csv.field_size_limit((1 << 31) - 1)
    stream = open_plain(span.file, span.compression)
    reader = csv.reader(_text_lines(stream), strict=True)
    if span.columns is not None:
        return Source(span.columns), _csv_rows(stream, reader)
    try:
        fields = next(reader, [])
        _check_text(fields)
        return _header(span, fields), _csv_rows(stream, reader)
    except (csv.Error, RecordError) as error:
        stream.close()
        raise UsageError(
            f"{span.file}: line 1: {error}. The header must be valid CSV in UTF-8."
        ) from None
    except DECOMPRESSION_ERRORS as error:
        stream.close()
        raise _unreadable(span, error) from error


def _text_lines(stream: Iterable[bytes]) -> Iterator[str]:
    """Lines as text; bytes that are not UTF-8 pass as lone surrogates, found field by field."""
    for number, line in enumerate(stream):
        yield (line if number else line.removeprefix(_BOM)).decode("utf-8", "surrogateescape")


def _csv_rows(stream: BinaryIO, reader: Any) -> Raws:
    with stream:
        while True:
            location = f"line {reader.line_num + 1}"
            try:
                fields = next(reader)
                if not fields:
                    continue
                _check_text(fields)
            except StopIteration:
                return
            except csv.Error as error:
                yield location, RecordError(f"not valid CSV ({error})")
            except RecordError as error:
                yield location, error
            else:
                yield location, fields


def _check_text(fields: Iterable[str]) -> None:
    try:
        "".join(fields).encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(error.object[error.start]) & 0xFF
        raise RecordError(f"not valid UTF-8 (byte 0x{byte:02x})") from None


def _unreadable(span: Span, error: Exception) -> UsageError:
    kind = f"{span.kind}.{span.compression}".rstrip(".")
    return UsageError(
        f"{span.file}: can't be read as {kind} ({shorten(error, 80)}). "
        f"The file is damaged or misnamed: fetch it again or name its --format."
    )


# -- tables --------------------------------------------------------------------------------


def _cut(rows: int, part: int, parts: int) -> int:
    """First row of a part when `rows` rows are cut into `parts` even parts."""
    return rows * part // parts


def _chosen(schema: Any, columns: Sequence[str] | None) -> list[str]:
    return [name for name in schema.names if columns is None or name in columns]


def _batch_rows(batch: Any, names: Sequence[str]) -> Iterator[Any]:
    """Rows of an Arrow batch as payloads."""
    if not names:
        yield from ({} for _ in range(batch.num_rows))
        return
    batch = batch.select(list(names))
    # One batch may be a whole file: never more of it as Python objects than a few rows.
    for first in range(0, batch.num_rows, _BATCH_ROWS):
        rows = batch.slice(first, _BATCH_ROWS)
        try:
            yield from rows.to_pylist()
        except UnicodeDecodeError:
            yield from (_one_row(rows, i) for i in range(rows.num_rows))


def _one_row(batch: Any, i: int) -> Any:
    try:
        return batch.slice(i, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return RecordError(_not_utf8(error))


def _parquet(span: Span, columns: Sequence[str] | None) -> tuple[Source, Raws]:
    handle = open_bytes(span.file)
    try:
        file = pq.ParquetFile(handle)
    except pa.ArrowInvalid as error:
        handle.close()
        raise _unreadable(span, error) from error
    source = Source(tuple(file.schema_arrow.names))
    return source, _parquet_rows(span, handle, file, _chosen(file.schema_arrow, columns))


def _parquet_rows(span: Span, handle: BinaryIO, file: Any, names: list[str]) -> Raws:
    with handle:
        meta = file.metadata
        rows = meta.num_rows if span.limit is None else min(meta.num_rows, span.limit)
        start, stop = (_cut(rows, part, span.parts) for part in (span.part, span.part + 1))
        if not names:
            yield from ((f"row {row + 1}", {}) for row in range(start, stop))
            return
        first = 0
        for group in range(meta.num_row_groups):
            after = first + meta.row_group(group).num_rows
            if first < stop and after > start:
                yield from _group_rows(file, group, names, first, start, stop)
            first = after


def _group_rows(file: Any, group: int, names: list[str], first: int, start: int, stop: int) -> Raws:
    """Rows [start, stop) of the file that are in one row group, whose first row is `first`."""
    for batch in file.iter_batches(
        _BATCH_ROWS, row_groups=[group], columns=names, use_threads=False
    ):
        after = first + batch.num_rows
        if first >= stop:
            return
        if after > start:
            skip = max(start - first, 0)
            part = batch.slice(skip, min(stop, after) - first - skip)
            for number, payload in enumerate(_batch_rows(part, names), first + skip + 1):
                yield f"row {number}", payload
        first = after


def _arrow_handle(span: Span) -> Any:
    # A memory map decodes nothing of the batches that belong to other spans.
    return open_bytes(span.file) if is_remote(span.file) else pa.memory_map(span.file)


def _arrow_reader(handle: Any) -> Any:
    """Reader of the Arrow file format (also Feather's) or the stream format, whichever it is."""
    magic = handle.read(len(_ARROW_FILE_MAGIC))
    handle.seek(0)
    return (pa.ipc.open_file if magic == _ARROW_FILE_MAGIC else pa.ipc.open_stream)(handle)


def _arrow_batches(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):
        return (reader.get_batch(i) for i in range(reader.num_record_batches))
    return iter(reader)


def _arrow(span: Span, columns: Sequence[str] | None) -> tuple[Source, Raws]:
    handle = _arrow_handle(span)
    try:
        reader = _arrow_reader(handle)
    except pa.ArrowInvalid as error:
        handle.close()
        raise _unreadable(span, error) from error
    names = _chosen(reader.schema, columns)
    is_file = hasattr(reader, "num_record_batches")
    rows = (_arrow_file_rows if is_file else _arrow_stream_rows)(span, handle, reader, names)
    return Source(tuple(reader.schema.names)), rows


def _arrow_file_rows(span: Span, handle: Any, reader: Any, names: list[str]) -> Raws:
    """Rows of the part: a batch is a unit of length 1, and parts are even stretches of the units.

    The footer gives the number of batches but not their lengths; so only own batches are read.
    """
    with handle:
        batches, last_rows = reader.num_record_batches, None
        if span.limit is not None:
            batches, last_rows = _until(reader, span.limit)
        for index in range(
            span.part * batches // span.parts, -(-(span.part + 1) * batches // span.parts)
        ):
            batch = reader.get_batch(index)
            if last_rows is not None and index == batches - 1:
                batch = batch.slice(0, last_rows)
            lo, hi = (
                min(max(cut * batches - index * span.parts, 0), span.parts)
                * batch.num_rows
                // span.parts
                for cut in (span.part, span.part + 1)
            )
            own = batch.slice(lo, hi - lo)
            for number, payload in enumerate(_batch_rows(own, names), lo + 1):
                yield f"batch {index + 1}, row {number}", payload


def _until(reader: Any, limit: int) -> tuple[int, int]:
    """How many batches hold the first `limit` rows, and how many of these are in the last."""
    rows = 0
    for index in range(reader.num_record_batches):
        own = min(reader.get_batch(index).num_rows, limit - rows)
        rows += own
        if rows == limit:
            return index + 1, own
    raise AssertionError("a limit is planned only where the file has as many rows")


def _arrow_stream_rows(span: Span, handle: Any, reader: Any, names: list[str]) -> Raws:
    """Rows of a stream, which has no footer with its batches: row i is of part i mod parts."""
    with handle:
        first = 0
        for batch in reader:
            rows = batch.num_rows
            if span.limit is not None:
                rows = min(rows, span.limit - first)
            own = range((span.part - first) % span.parts, rows, span.parts)
            taken = batch.take(pa.array(own, pa.int64()))
            for row, payload in zip(own, _batch_rows(taken, names), strict=True):
                yield f"row {first + row + 1}", payload
            first += rows
            if first == span.limit:
                return


def table_size(span: Span) -> tuple[int, int]:
    """How many rows of a table are within `span.limit`, and about how many bytes they take."""
    limit = span.limit
    assert limit is not None
    try:
        if span.kind == "parquet":
            with open_bytes(span.file) as handle:
                rows = pq.ParquetFile(handle).metadata.num_rows
            return min(rows, limit), span.stop * min(rows, limit) // max(rows, 1)
        rows = size = 0
        with _arrow_handle(span) as handle:
            reader = _arrow_reader(handle)
            for batch in _arrow_batches(reader):
                own = min(batch.num_rows, limit - rows)
                size += batch.nbytes * own // max(batch.num_rows, 1)
                rows += own
                if rows == limit:
                    break
        return rows, size
    except pa.ArrowInvalid as error:
        raise _unreadable(span, error) from error
