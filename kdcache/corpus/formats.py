"""Format: how the records of one span of one file are read; one class for each format.

A format yields `(location, payload)` in file order, cheaply, and makes a `Record` of a payload or
raises `RecordError` with the reason. The same records are counted for `limit`, so that both agree
about what a record is: a line that is not blank, a paragraph, a text file that is not blank, a CSV
row that is not empty, a sentence of CoNLL, a row of a table.

Cost: one pass; memory of one record, which is never longer than `Reading.max_record_bytes`, or of
1,024 rows of a table, decoded only in the requested columns.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from kdcache.corpus.records import FileColumns, Location, Record, RecordError, shorten
from kdcache.corpus.span import Span
from kdcache.errors import UsageError

Raw = tuple[Location, Any]

# What a cut-short or foreign compressed stream raises; Arrow's zstd says plain OSError.
DECOMPRESSION_ERRORS = (EOFError, OSError, zlib.error)


class Format(ABC):
    """The records of one span of a file; a context manager that closes the file.

    Attributes:
        source: What the file says about its columns.
        progress: Called once in a while by what takes long before the first record.
    """

    source = FileColumns()
    progress: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, span: Span, columns: Sequence[str] | None = None) -> None:
        """Open the file.

        Args:
            span: What to read.
            columns: Columns wanted of a table; None is all. Text formats give all they have.

        Raises:
            UsageError: The file can't be opened or its frame (header, footer) is not what its name
                says.
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
        """Whether an error says that the file is damaged; those of a disk have a number."""
        compressed = bool(self._span.file.compression)
        kinds = DECOMPRESSION_ERRORS if compressed else pa.ArrowInvalid
        return isinstance(error, kinds) and getattr(error, "errno", None) is None

    def unreadable(self, error: BaseException) -> UsageError:
        """The error for a file that is not what its name says."""
        file = self._span.file
        return UsageError(
            f"{file.url}: can't be read as {file.full_kind} ({shorten(error, 80)}). "
            f"The file is damaged or misnamed: fetch it again or name its --format."
        )

    def _too_long(self) -> RecordError:
        return RecordError(f"longer than --max-record-bytes, {self._most:,} bytes")


def not_utf8(error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that are not UTF-8, and where in the record."""
    before = error.object[: error.start]
    line = before.count(b"\n")
    within = f" of its line {line + 1}" if line else ""
    column = error.start - before.rfind(b"\n")
    return f"not valid UTF-8 (byte 0x{error.object[error.start]:02x} in column {column}{within})"
