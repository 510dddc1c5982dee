"""Format: how the records of one span of one file are read; one class for each format.

A `Span` is a unit of work: a part of a file, and the options by which it is read. A format yields
`(location, payload)` in file order, cheaply, and makes a `Record` of a payload or raises
`RecordError` with the reason. `limit` counts the same records: a line that is not blank, a
paragraph, a text file that is not blank, a CSV row that is not empty, a sentence of CoNLL, a row of
a table.

Cost: one pass; memory of one record, which is never longer than `Reading.max_record_bytes`, or of
1,024 rows of a table, decoded only in the requested columns.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from kdcache.corpus.files import LINE_KINDS, InputFile, is_stream
from kdcache.corpus.records import FileColumns, Location, Record, RecordError, shorten
from kdcache.errors import UsageError
from kdcache.storage import redact
from kdcache.tasks import MAX_RECORD_BYTES, Documents


@dataclass(frozen=True, slots=True)
class Reading:
    """How the files of a corpus are read.

    Attributes:
        columns: Names of a headerless table's columns; None means that the first line names them.
        renames: Pairs of the name that a column gets and the one that it has in the files.
        filters: Columns, and the texts that each may hold: other records are left out.
        documents: What one record of a `.txt` file is: all of it, a paragraph (up to a blank
            line), or a line.
        max_record_bytes: Longest record, in bytes of decompressed text. What is longer is never
            held in memory whole.

    Raises:
        UsageError: Options that can't be.
    """

    columns: tuple[str, ...] | None = None
    documents: Documents = "file"
    delimiter: str = ","
    max_record_bytes: int = MAX_RECORD_BYTES
    renames: tuple[tuple[str, str], ...] = ()
    filters: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __post_init__(self) -> None:
        names = self.columns
        if names is not None and (not names or not all(names) or len(set(names)) < len(names)):
            raise UsageError(
                f"--columns is {','.join(names)!r}; expected different names, such as text,label."
            )
        sides = [[pair[i] for pair in self.renames] for i in (0, 1)]
        if any(not all(side) or len(set(side)) < len(side) for side in sides):
            shown = ",".join("=".join(pair) for pair in self.renames)
            raise UsageError(
                f"--columns is {shown!r}; expected different names, such as text=body,label=class."
            )
        if self.documents not in get_args(Documents):
            raise UsageError(
                f"--read documents is {self.documents!r}; expected one of "
                f"{', '.join(get_args(Documents))}."
            )
        if len(self.delimiter) != 1 or self.delimiter in '"\r\n' or not self.delimiter.isascii():
            raise UsageError(
                f"--read delimiter is {self.delimiter!r}; expected an ASCII character other than a "
                "quote or a line break, such as ';'."
            )
        if self.max_record_bytes < 1:
            raise UsageError(
                f"--read max-record-bytes is {self.max_record_bytes}; expected 1 or more."
            )


@dataclass(frozen=True, slots=True)
class Span:
    """A unit of work: a stretch of one file, which becomes exactly one shard.

    Attributes:
        start: First byte; the span owns the records that start in [start, stop). 0 where parts
            count.
        part: Which of `parts` of a table or of a file that can't be cut by bytes.
        parts: 1 for files cut by bytes.
        limit: If not None, only the first `limit` records of [start, stop), before it is
            split into parts.
    """

    index: int
    file: InputFile
    start: int
    stop: int
    part: int = 0
    parts: int = 1
    limit: int | None = None
    reading: Reading = Reading()

    @property
    def group(self) -> str:
        """The file that a worker reads once for all its parts; empty where there is none."""
        if self.parts == 1:
            return ""
        sequential = self.file.sequential or (self.file.kind == "arrow" and is_stream(self.file))
        return self.file.url if sequential else ""

    @property
    def records(self) -> str:
        """Where its records are, for a person who looks for them."""
        if self.file.sequential or self.group:
            which = f"every {self.parts}th record from record {self.part + 1} on"
        elif self.file.kind in LINE_KINDS:
            which = f"the lines that start in bytes {self.start}-{self.stop}"
        else:
            which = f"rows: stretch {self.part + 1} of {self.parts} even ones"
        limited = "" if self.limit is None else f", of the first {self.limit}"
        return f"{redact(self.file.url)}: {which}{limited}"


Raw = tuple[Location, Any]

# What a cut-short or foreign compressed stream raises; Arrow's zstd raises plain OSError.
DECOMPRESSION_ERRORS = (EOFError, OSError, zlib.error)


class Format(ABC):
    """The records of one span of a file; a context manager that closes the file.

    Attributes:
        progress: Called once in a while by what takes long before the first record.
    """

    source = FileColumns()
    progress: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, span: Span, columns: Sequence[str] | None = None) -> None:
        """Open the file.

        Args:
            columns: Columns wanted of a table; None is all. Text formats give all they have.

        Raises:
            UsageError: The file can't be opened or its frame (header, footer) is not what its name
                states.
        """
        self._span = span
        self._most = span.reading.max_record_bytes
        self._stream: Any = None
        try:
            self._open(columns)
        except BaseException as error:
            self.close()
            if self.damage(error):
                raise self.unreadable(error) from error
            raise

    def __enter__(self) -> Format:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()

    @abstractmethod
    def _open(self, columns: Sequence[str] | None) -> None:
        """Open `_stream` and find `source`."""

    @abstractmethod
    def records(self) -> Iterator[Raw]:
        """The span's records, not parsed yet."""

    @abstractmethod
    def size(self, limit: int) -> tuple[int, int]:
        """How many records there are up to `limit`, and about how many bytes they take."""

    def record(self, location: Location, payload: Any) -> Record:
        """Parse one of `records`.

        Raises:
            RecordError: It is not UTF-8, not JSON, not an object, too long, or has another number
                of fields.
        """
        if isinstance(payload, RecordError):
            raise payload
        return Record(self._values(payload), self._span.file.url, location, self.source)

    def _values(self, payload: Any) -> dict[str, Any]:
        return dict(payload)

    def damage(self, error: BaseException) -> bool:
        """Whether an error states that the file is damaged; those of a disk have a number."""
        damaged = self._span.file.compression and isinstance(error, DECOMPRESSION_ERRORS)
        return bool(damaged) and getattr(error, "errno", None) is None

    def unreadable(self, error: BaseException) -> UsageError:
        """The error for a file that is not what its name states."""
        file = self._span.file
        return UsageError(
            f"{file.url}: can't be read as {file.full_kind} ({shorten(error, 80)}). "
            f"The file is damaged or misnamed: fetch it again or name its --format."
        )

    def _too_long(self) -> RecordError:
        return RecordError(f"longer than --read max-record-bytes, {self._most:,} bytes")


def not_utf8(error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that are not UTF-8, and where in the record."""
    before = error.object[: error.start]
    line = before.count(b"\n")
    in_line = f" of its line {line + 1}" if line else ""
    column = error.start - before.rfind(b"\n")
    return f"not valid UTF-8 (byte 0x{error.object[error.start]:02x} in column {column}{in_line})"
