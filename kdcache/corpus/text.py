"""Formats of text: JSON lines, TSV, CSV, CoNLL, and plain text by lines, paragraphs or files.

A CoNLL file (Tjong Kim Sang and De Meulder 2003) has a line a word, with its tags in further
columns, separated by tabs where a line has one, else by blanks, and an empty line after a sentence.
`-DOCSTART-` lines are left out. CoNLL-U has ten columns and comments. A sentence belongs to the
span in which its first line starts, as a paragraph does.

Cost: memory of one record. The part of a record beyond its limit is read in small blocks and
dropped.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, BinaryIO

from kdcache.corpus.files import open_plain
from kdcache.corpus.formats import DECOMPRESSION_ERRORS, Format, Raw, not_utf8
from kdcache.corpus.parts import Parts, Progress, records_of_part
from kdcache.corpus.records import (
    FileColumns,
    LineAt,
    Location,
    Record,
    RecordError,
    kind_of,
    shorten,
    shown_delimiter,
)
from kdcache.errors import UsageError

_BOM = b"\xef\xbb\xbf"
_BLOCK = 1 << 16
_DELIMITERS = ",;\t|"


class _Text(Format):
    """What formats of text share: a stream of decompressed bytes, and its lines."""

    _stream: BinaryIO
    _header = False

    def _open(self, columns: Sequence[str] | None) -> None:
        self._stream = open_plain(self._span.file)

    def records(self) -> Iterator[Raw]:
        """See `Format.records`."""
        span = self._span
        # What has no version could be another file by now.
        if span.parts == 1 or not span.file.versions.strip():
            return self._own()
        key = (span.file, span.parts, span.limit, span.reading)
        return records_of_part(key, span.part, self._make_parts, self._own, self.progress)

    def _own(self) -> Iterator[Raw]:
        """Records of the part, found by reading all of the file."""
        first = islice(self._rows(), self._span.limit)
        return islice(first, self._span.part, None, self._span.parts)

    def _make_parts(self, progress: Progress) -> Parts:
        span = self._span
        with type(self)(replace(span, part=0, parts=1)) as whole:
            return Parts(whole.records(), span.parts, span.file.size, progress, whole.damage)

    def size(self, limit: int) -> tuple[int, int]:
        """See `Format.size`."""
        seen = size = 0
        try:
            for _, payload in islice(self._rows(), limit):
                seen += 1
                size += _length(payload)
        except DECOMPRESSION_ERRORS:
            # Reading meets the same damage, and shows it or skips what is behind it.
            if not self._span.file.compression:
                raise
        return seen, size

    def _lines(self) -> Iterator[tuple[int, int, bytes | None]]:
        """Offset, number and bytes of the lines from the first that starts in the span, to the end.

        Those longer than a record may be are None. Numbers count from where the reading began.
        """
        offset = number = 0
        if self._span.start:
            # From one byte before: a line that starts exactly at `start` is ours.
            self._stream.seek(self._span.start - 1)
            offset = self._span.start - 1 + _skip_line(self._stream)
        while line := self._stream.readline(self._most + 1):
            size = len(line)
            own: bytes | None = line
            if size > self._most:
                own, size = None, size + (0 if line.endswith(b"\n") else _skip_line(self._stream))
            number += 1
            if offset or not self._header:
                yield offset, number, own if offset or own is None else own.removeprefix(_BOM)
            offset += size

    def _at(self, offset: int, number: int) -> Location:
        file = self._span.file
        return f"line {number}" if file.compression else LineAt(file.url, offset)

    def _ended(self, offset: int) -> bool:
        """Whether what starts at an offset belongs to a later span."""
        return not self._span.file.compression and offset >= self._span.stop

    def _rows(self) -> Iterator[Raw]:
        """Records of the span, before limit and dealing."""
        for offset, number, line in self._lines():
            if self._ended(offset):
                return
            if line is None:
                yield self._at(offset, number), self._too_long()
            elif (stripped := line.rstrip(b"\r\n")) and not stripped.isspace():
                yield self._at(offset, number), stripped

    def _named(self, fields: list[str]) -> FileColumns:
        """The columns that a first line names."""
        twice = sorted({name for name in fields if fields.count(name) > 1})
        if twice:
            shown = ", ".join(repr(shorten(name)) for name in twice)
            raise UsageError(
                f"{self._span.file.url}: the header names {shown} more than once. Rename one, or, "
                f"if the first line is not a header, name its {len(fields)} columns with --columns."
            )
        return FileColumns(tuple(fields), header=True)

    def _fields(self, fields: list[str]) -> dict[str, Any]:
        source = self.source
        if len(fields) != len(source.columns):
            named = "the header names" if source.header else "--columns names"
            problem = (
                f"{len(fields)} fields where {named} {len(source.columns)} "
                f"({shorten(', '.join(source.columns))})"
            )
            if source.delimiter is not None:
                problem += (
                    f"; perhaps --read delimiter={shown_delimiter(source.delimiter)} is missing"
                )
            raise RecordError(problem)
        return dict(zip(source.columns, fields, strict=True))


def _length(payload: Any) -> int:
    if isinstance(payload, bytes):
        return len(payload)
    return sum(map(len, payload)) if isinstance(payload, list) else 0


def _skip_line(stream: BinaryIO) -> int:
    """Read to the end of a line without holding it; returns its bytes."""
    size = 0
    while chunk := stream.readline(_BLOCK):
        size += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return size


def decoded(data: bytes) -> str:
    """Text of bytes in UTF-8; `RecordError` where they are not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(not_utf8(error)) from None


class JsonLines(_Text):
    """One JSON object a line."""

    def _values(self, payload: bytes) -> dict[str, Any]:
        text = decoded(payload)
        if text.startswith("["):
            raise RecordError("a JSON list where one object a line was expected (try jq -c '.[]')")
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            # The record's own line is in the message already; the parser would say "line 1".
            raise RecordError(f"not valid JSON ({error.msg} in column {error.pos + 1})") from None
        if not isinstance(values, dict):
            raise RecordError(
                f"{kind_of(values)} where a JSON object was expected (one object a line)"
            )
        return values


class Tsv(_Text):
    """One record a line, its fields separated by tabs; quotes have no meaning."""

    def _open(self, columns: Sequence[str] | None) -> None:
        super()._open(columns)
        given = self._span.reading.columns
        self._header = given is None
        if given is not None:
            self.source = FileColumns(given)
            return
        line = self._stream.readline(self._most)
        try:
            self.source = self._named(decoded(line.removeprefix(_BOM).rstrip(b"\r\n")).split("\t"))
        except RecordError as error:
            raise UsageError(
                f"{self._span.file.url}: line 1: {error}. Save the file as UTF-8."
            ) from None
        self._stream.close()
        super()._open(columns)

    def _values(self, payload: bytes) -> dict[str, Any]:
        return self._fields(decoded(payload).split("\t"))


class TextLines(_Text):
    """Plain text: each line that is not blank is a record."""

    def _open(self, columns: Sequence[str] | None) -> None:
        super()._open(columns)
        self.source = FileColumns((self._span.reading.columns or ("text",))[:1])

    def _values(self, payload: bytes) -> dict[str, Any]:
        return {self.source.columns[0]: decoded(payload)}


class TextParagraphs(TextLines):
    """Plain text: lines up to a blank one are a record, which belongs to the span of its first."""

    def _rows(self) -> Iterator[Raw]:
        lines: list[bytes] = []
        size, at = 0, (0, 0)
        # What a paragraph of an earlier span continues with is not ours.
        inside = skipping = self._span.start > 0 and not self._after_blank()
        for offset, number, line in self._lines():
            if line is not None and (not line or line.isspace()):
                if inside and not skipping:
                    yield self._at(*at), self._paragraph(lines, size)
                inside = skipping = False
                if self._ended(offset):
                    return
                continue
            if not inside:
                if self._ended(offset):
                    return
                inside, lines, size, at = True, [], 0, (offset, number)
            size += self._most + 1 if line is None else len(line)
            if line is not None and size <= self._most and not skipping:
                lines.append(line)
            elif size > self._most:
                lines = []
        if inside and not skipping:
            yield self._at(*at), self._paragraph(lines, size)

    def _paragraph(self, lines: Sequence[bytes], size: int) -> bytes | RecordError:
        return self._too_long() if size > self._most else b"".join(lines).rstrip(b"\r\n")

    def _after_blank(self) -> bool:
        """Whether the line before the first that starts in the span is blank."""
        stream = self._stream
        stream.seek(self._span.start - 1)
        while chunk := stream.readline(_BLOCK):
            if not chunk.isspace():
                return False
            if chunk.endswith(b"\n"):
                break
        stop = self._span.start - 1
        while stop:
            start = max(0, stop - _BLOCK)
            stream.seek(start)
            _, newline, tail = stream.read(stop - start).rpartition(b"\n")
            if tail.strip():
                return False
            if newline:
                return True
            stop = start
        return True


class TextFiles(TextLines):
    """Plain text: the whole file is one document.

    A file that is cut by bytes comes as the pieces of that document, each of the lines that start
    in its span.
    """

    def _rows(self) -> Iterator[Raw]:
        span, stream = self._span, self._stream
        first_byte, left = 0, self._most + 1
        if not span.file.compression:
            if span.start:
                stream.seek(span.start - 1)
                first_byte = span.start - 1 + _skip_line(stream)
            left = min(left, span.stop - first_byte)
        if left <= 0:
            return
        data = stream.read(left)
        if len(data) <= self._most and not data.endswith(b"\n"):
            data += stream.readline(self._most + 1 - len(data))
        if not first_byte:
            data = data.removeprefix(_BOM)
        closes = self._blank_until_end()
        where = LineAt(span.file.url, first_byte) if first_byte else "the document"
        if len(data) > self._most:
            yield where, self._too_long()
        elif data.strip() or not closes:  # a blank piece is part of its document
            yield where, (data.rstrip(b"\r\n") if closes else data, not first_byte, closes)

    def _blank_until_end(self) -> bool:
        return all(not block.strip() for block in iter(lambda: self._stream.read(_BLOCK), b""))

    def record(self, location: Location, payload: Any) -> Record:
        """See `Format.record`."""
        if isinstance(payload, RecordError):
            raise payload
        text, opens, closes = payload
        return Record(self._values(text), self._span.file.url, location, self.source, opens, closes)

    def size(self, limit: int) -> tuple[int, int]:
        """See `Format.size`: one document, unless the file is blank."""
        begins = next(self._rows(), None) is not None
        return int(begins), self._span.file.size


class Csv(_Text):
    """Rows of comma-separated fields; quotes may hold line breaks."""

    def _open(self, columns: Sequence[str] | None) -> None:
        super()._open(columns)
        # The default of 128 KiB a field is less than one long document.
        csv.field_size_limit((1 << 31) - 1)
        self._text = _RowText(self._stream, self._most, self._too_long)
        self._reader = csv.reader(self._text, delimiter=self._span.reading.delimiter, strict=True)
        given = self._span.reading.columns
        if given is not None:
            self.source = FileColumns(given)
            return
        try:
            fields = next(self._reader, [])
            _check_text(fields)
        except (csv.Error, RecordError) as error:
            raise UsageError(
                f"{self._span.file.url}: line 1: {error}. The header must be valid CSV in UTF-8."
            ) from None
        self.source = self._named(fields)
        if len(fields) == 1:
            other = next((c for c in _DELIMITERS if c in fields[0]), None)
            self.source = replace(self.source, delimiter=other)

    def _rows(self) -> Iterator[Raw]:
        while True:
            location = f"line {self._text.begin_row()}"
            try:
                fields = next(self._reader)
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

    def _values(self, payload: list[str]) -> dict[str, Any]:
        return self._fields(payload)


class _RowText:
    """Lines of a CSV file as text, with a bound on a row.

    Bytes that are not UTF-8 pass as lone surrogates, found field by field. A row that is too long
    raises `RecordError` once it is over, which is where a line ends after an even number of quotes.
    """

    def __init__(self, stream: BinaryIO, most: int, too_long: Callable[[], RecordError]) -> None:
        self._stream, self._most, self._too_long = stream, most, too_long
        self._lines = self._bytes = self._quotes = 0

    def begin_row(self) -> int:
        """A new row begins; returns the number of its first line."""
        self._bytes = self._quotes = 0
        return self._lines + 1

    def __iter__(self) -> _RowText:
        return self

    def __next__(self) -> str:
        line = self._take(self._most + 1 - self._bytes)
        if not line:
            raise StopIteration
        text = line if self._lines > 1 else line.removeprefix(_BOM)
        if self._bytes > self._most:
            while line and (self._quotes % 2 or not line.endswith(b"\n")):
                line = self._take(_BLOCK)
            raise self._too_long()
        return text.decode("utf-8", "surrogateescape")

    def _take(self, most: int) -> bytes:
        line = self._stream.readline(most)
        self._bytes += len(line)
        self._quotes += line.count(b'"')
        self._lines += line.endswith(b"\n")
        return line


def _check_text(fields: Iterable[str]) -> None:
    try:
        "".join(fields).encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(error.object[error.start]) & 0xFF
        raise RecordError(f"not valid UTF-8 (byte 0x{byte:02x})") from None


_DOCUMENT = b"-DOCSTART-"
_CONLLU = ("id", "tokens", "lemma", "tags", "xpos", "feats", "head", "deprel", "deps", "misc")


class Conll(TextParagraphs):
    """Sentences: `tokens` are the first column and `tags` the last, or as `Reading.columns` has it.

    A file of one column holds words without tags.
    """

    def _open(self, columns: Sequence[str] | None) -> None:
        super()._open(columns)
        self._names: tuple[str, ...] | None = self._span.reading.columns
        self.source = FileColumns(self._names or ("tokens", "tags"))

    def _rows(self) -> Iterator[Raw]:
        for location, payload in super()._rows():
            if isinstance(payload, bytes):
                payload = b"\n".join(line for line in payload.splitlines() if self._is_word(line))
                if not payload:
                    continue
            yield location, payload

    def _is_word(self, line: bytes) -> bool:
        """Whether a line is one of a sentence."""
        return not line.startswith(_DOCUMENT)

    def _values(self, payload: bytes) -> dict[str, Any]:
        rows: list[list[str]] = [_fields(line) for line in decoded(payload).split("\n")]
        width = len(rows[0])
        for row in rows:
            if len(row) != width:
                raise RecordError(
                    f"the line {shorten(' '.join(row))!r} has {len(row)} columns, the first of its "
                    f"sentence has {width}"
                )
        columns = [[row[i] for row in rows] for i in range(width)]
        names = self._names
        if names is None:
            return {"tokens": columns[0], **({"tags": columns[-1]} if width > 1 else {})}
        if width != len(names):
            raise RecordError(
                f"{width} columns where --columns names {len(names)} ({shorten(', '.join(names))})"
            )
        return dict(zip(names, columns, strict=True))


class ConllU(Conll):
    """Sentences of Universal Dependencies: `tokens` are the forms, `tags` the universal parts of
    speech; the other columns have their names (`xpos`, `deprel`, ...). Comments, and lines of
    several words or of none (`1-2`, `1.1`), are left out.
    """

    def _open(self, columns: Sequence[str] | None) -> None:
        super()._open(columns)
        self._names = _CONLLU
        self.source = FileColumns(_CONLLU)

    def _is_word(self, line: bytes) -> bool:
        return not line.startswith(b"#") and line.split(b"\t", 1)[0].isdigit()


def _fields(line: str) -> list[str]:
    if "\t" in line:
        return [field.strip(" ") for field in line.split("\t")]
    return [field for field in line.split(" ") if field]
