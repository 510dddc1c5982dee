"""Record: one item of a corpus, the errors about it, and filters by the values of columns.

`lang=en` keeps records with `en` in the column `lang`. Conditions on one column are alternatives;
those on different columns must all hold. A value is compared as text, a number by its value (3 is
3.0), true and false by these words, a missing one (null) as empty text. A list equals none of them.

Cost: a record's position in a file cut by bytes is kept as an offset. Its line number is counted
only when a message needs it, by a pass over the file up to there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from kdcache.corpus.files import open_bytes
from kdcache.errors import UsageError
from kdcache.tasks import OnError

_BLOCK = 1 << 20
_KEPT_REASONS = 5
_SHOWN_NAMES = 12


class RecordError(ValueError):
    """Why one record can't be used; becomes a `UsageError` or a count (`ReadStats`)."""


# Not frozen, nor is `Record`: to make a frozen one takes three times as long, for each record.
@dataclass(slots=True)
class LineAt:
    """The line that starts at byte `offset` of `file`; printing it finds its number."""

    file: str
    offset: int

    def __str__(self) -> str:
        left = self.offset
        number = 1
        with open_bytes(self.file) as stream:
            while left > 0 and (block := stream.read(min(left, _BLOCK))):
                number += block.count(b"\n")
                left -= len(block)
        return f"line {number}"


Location = str | LineAt


@dataclass(frozen=True, slots=True)
class FileColumns:
    """What all records of one file share.

    Attributes:
        columns: Names of all columns of the file, read or not; empty where each record has its own
            keys.
        header: True if `columns` was taken from the file's first line.
        delimiter: What probably separates the fields, where the header has it and was read as a
            single name.
    """

    columns: tuple[str, ...] = ()
    header: bool = False
    delimiter: str | None = None


_OWN_KEYS = FileColumns()


@dataclass(slots=True)
class Record:
    """One record of a corpus.

    Attributes:
        values: Column name to value, as the file holds it (`str` for text formats).
        location: Where in the file: prints as `line 17` or `row 12`, both counted from 1.
        opens: Whether a document begins here; False for the later pieces of a long text file.
        closes: Whether it ends here.
        cut: Whether only the beginnings of its values were kept.
    """

    values: dict[str, Any]
    file: str
    location: Location
    source: FileColumns = _OWN_KEYS
    opens: bool = True
    closes: bool = True
    cut: bool = False

    @property
    def whole(self) -> bool:
        """Whether it is all of its document, and not a piece of one."""
        return self.opens and self.closes

    @property
    def where(self) -> str:
        """File and location, to open a message with."""
        return f"{self.file}: {self.location}"

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns, including those that were not read."""
        return self.source.columns or tuple(self.values)

    def renamed(self, names: Mapping[str, str]) -> Record:
        """The record with some columns under other names.

        Args:
            names: The names in its file, by the new ones, or those of fields: see `field_of`. A
                column that has a new name already gives way.
        """
        if not names:
            return self
        old = set(names.values())
        values = {k: v for k, v in self.values.items() if k not in old and k not in names}
        values |= {new: one for new, name in names.items() for one in field_of(self.values, name)}
        return replace(self, values=values)

    def missing(self, wanted: Sequence[str], option: str, named: Sequence[str] = ()) -> UsageError:
        """The error for a missing column.

        Args:
            wanted: The column that was looked for, or several of which one was needed.
            option: The option that names it, as the cure.
            named: Names to propose for a headerless table's columns; default `wanted`.
        """
        there = ", ".join(repr(shorten(name)) for name in self.columns[:_SHOWN_NAMES]) or "none"
        if len(self.columns) > _SHOWN_NAMES:
            there += f" and {len(self.columns) - _SHOWN_NAMES} more"
        what = " or ".join(repr(name) for name in wanted)
        message = f"{self.where} has no column {what}; its columns are {there}."
        if self.source.delimiter is not None:
            return UsageError(
                f"{message} Its fields seem to be separated by another character: name it with "
                f"--read delimiter={shown_delimiter(self.source.delimiter)}."
            )
        if self.source.header:
            proposal = list(named or wanted)[: len(self.columns)]
            proposal += [f"column{i + 1}" for i in range(len(proposal), len(self.columns))]
            return UsageError(
                f"{message} Name the right one with {option}; if the file has no header line, name "
                f"all its columns in order, such as --columns {','.join(proposal)}."
            )
        return UsageError(f"{message} Name the right one with {option}.")


def field_of(values: Mapping[str, Any], name: str) -> list[Any]:
    """The value of a column, or of a field of one: `translation.en`; none where it is missing."""
    if name in values:
        return [values[name]]
    outer, _, inner = name.partition(".")
    fields = values.get(outer)
    return [fields[inner]] if isinstance(fields, dict) and inner in fields else []


@dataclass
class ReadStats:
    """Counts of records, and the first few reasons for leaving some out.

    `filtered` are those that a filter left out, which are not `skipped`.
    """

    records: int = 0
    filtered: int = 0
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)

    def reject(
        self, on_error: OnError, file: str, location: object, problem: object, count: int = 1
    ) -> None:
        """Raise for a bad record, or count it as skipped.

        Args:
            on_error: `fail` raises, `skip` counts.
            file: Path or URL of the file.
            location: Where in the file; formatted only if a message is made.
            problem: A phrase without a full stop.
            count: What it adds to `skipped`; 0 where another part of the file counts it.

        Raises:
            UsageError: With `on_error="fail"`.
        """
        if on_error == "fail":
            raise UsageError(
                f"{file}: {location}: {problem}. Correct it, or leave such records out with "
                "--on-error skip (they are counted)."
            )
        self.skipped += count
        if count and len(self.reasons) < _KEPT_REASONS:
            # Not the line's number: finding it may mean reading gigabytes, time and again.
            rough = f"byte {location.offset}" if isinstance(location, LineAt) else location
            self.reasons.append(f"{file}: {rough}: {problem}")


def shown_delimiter(character: str) -> str:
    """A delimiter as a shell takes it."""
    return "$'\\t'" if character == "\t" else f"'{character}'"


def kind_of(value: object) -> str:
    """What a value of a record is, in a message's words: `text`, `a number`, `a list`, `null`."""
    if value is None:
        return "null"
    # First true and false, which are whole numbers to Python.
    kinds: dict[str, type | tuple[type, ...]] = {
        "true or false": bool,
        "a number": (int, float),
        "text": str,
        "a list": (list, tuple, np.ndarray),
        "an object": dict,
    }
    found = (name for name, types in kinds.items() if isinstance(value, types))
    return next(found, f"a value of type {type(value).__name__}")


def shorten(text: object, width: int = 40) -> str:
    """`text` on one line of at most `width` characters, for messages."""
    line = " ".join(str(text).split())
    return line if len(line) <= width else line[: width - 1] + "…"


Filters = tuple[tuple[str, tuple[str, ...]], ...]


def parse_filters(texts: Sequence[str]) -> Filters:
    """Columns, and the texts that each may hold.

    Raises:
        UsageError: One is not `column=value`.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        column, equals, value = text.partition("=")
        if not (column and equals):
            raise UsageError(f"--filter is {text!r}, expected COLUMN=VALUE, such as lang=en.")
        found.setdefault(column, []).append(value)
    return tuple((column, tuple(values)) for column, values in found.items())


def passes(record: Record, filters: Filters) -> bool:
    """Whether a record is kept.

    Raises:
        UsageError: It has no such column, or the column holds lists or objects.
    """
    for column, values in filters:
        if column not in record.values:
            raise record.missing([column], "--filter")
        if isinstance(record.values[column], (list, dict, np.ndarray)):
            raise UsageError(
                f"{record.where}: column {column!r} holds a list or an object, and --filter "
                "compares single values. Name a column of texts, numbers, or true and false."
            )
        if not any(_equal(record.values[column], value) for value in values):
            return False
    return True


def _equal(value: Any, text: str) -> bool:
    if value is None:
        return text == ""
    if isinstance(value, bool):
        return text == str(value).lower()
    if isinstance(value, (int, float, Decimal)):
        try:
            return bool(value == (float(text) if isinstance(value, float) else Decimal(text)))
        except (ValueError, InvalidOperation):
            return False
    return str(value) == text
