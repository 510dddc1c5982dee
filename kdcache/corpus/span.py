"""Span: a unit of work, and the options by which its file is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from kdcache.choices import MAX_RECORD_BYTES, Documents
from kdcache.corpus.files import LINE_KINDS, InputFile, is_stream
from kdcache.errors import UsageError
from kdcache.storage import redact


@dataclass(frozen=True, slots=True)
class Reading:
    """How the files of a corpus are read.

    Attributes:
        columns: Names of a headerless table's columns; None means that the first line names them.
        renames: Pairs of the name that a column gets and the one that it has in the files.
        filters: Columns, and the texts that each may hold: other records are left out.
        documents: What one record of a `.txt` file is: all of it, a paragraph (up to a blank
            line), or a line.
        delimiter: What separates the fields of a CSV file.
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
                f"--documents is {self.documents!r}; expected one of "
                f"{', '.join(get_args(Documents))}."
            )
        if len(self.delimiter) != 1 or self.delimiter in '"\r\n' or not self.delimiter.isascii():
            raise UsageError(
                f"--delimiter is {self.delimiter!r}; expected one ASCII character other than a "
                "quote or a line break, such as ';'."
            )
        if self.max_record_bytes < 1:
            raise UsageError(f"--max-record-bytes is {self.max_record_bytes}; expected 1 or more.")


@dataclass(frozen=True, slots=True)
class Span:
    """A unit of work: a stretch of one file, which becomes exactly one shard.

    Attributes:
        index: Its place among the corpus's spans.
        file: The file.
        start: First byte; the span owns the records that start in [start, stop). 0 where parts
            count.
        stop: Byte after the last; the file's size where parts count.
        part: Which of `parts` of a table or of a file that can't be cut by bytes.
        parts: 1 for files cut by bytes.
        limit: If not None, only the first `limit` records of [start, stop), before parts are
            dealt.
        reading: How the file is read.
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
        dealt = self.file.dealt or (self.file.kind == "arrow" and is_stream(self.file))
        return self.file.url if dealt else ""

    @property
    def records(self) -> str:
        """Where its records are, for a person who looks for them."""
        if self.file.dealt or self.group:
            which = f"every {self.parts}th record from record {self.part + 1} on"
        elif self.file.kind in LINE_KINDS:
            which = f"the lines that start in bytes {self.start}-{self.stop}"
        else:
            which = f"rows: stretch {self.part + 1} of {self.parts} even ones"
        within = "" if self.limit is None else f", of the first {self.limit}"
        return f"{redact(self.file.url)}: {which}{within}"
