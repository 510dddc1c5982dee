"""Hard labels of rows: from a record's values to numbers.

=========  ================================  =============================================
answers    a record                          labels of its row
=========  ================================  =============================================
classes    a name or a number                int32 `[1]`, the class or `IGNORE`
labels     names, numbers, a vector of 0     int32 `[1, C]`, 1, 0 or `IGNORE` of each class
           and 1, or a column a class
score      a number                          float32 `[1]`, NaN where there is none
=========  ================================  =============================================

A record without a label (an empty value, null in JSON) belongs to a transfer set. A value that
could mean two things is refused.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.corpus import Record
from kdcache.errors import UsageError
from kdcache.rows.encoders import Encoder
from kdcache.rows.spec import Row, RowSpec, no_label
from kdcache.rows.tokens import tokens_of
from kdcache.tasks import IGNORE, TASKS

_NUMBER = re.compile(r"[+-]?\d{1,18}(\.\d{1,18})?", re.ASCII)


class Classes:
    """A teacher's classes, by which hard labels are read.

    Attributes:
        numbers_are_names: whether 1 is the class named "1", and not the second one.
    """

    def __init__(self, names: Sequence[str] | None, noun: str = "label") -> None:
        """Keep the names in the teacher's order; None takes any class number."""
        self._names = names
        self._noun = noun
        self._index = {name: i for i, name in enumerate(names or ())}
        # One rule for all formats: 1 is the class named "1" if any class's name is a number, and
        # the second class if none is. A class may also be named as a table of floats or of truth
        # values writes it: "1.0", "True".
        self._numbers = _unambiguous({name: _number(name) for name in self._index})
        self._truths = _unambiguous({name: _truth(name) for name in self._index})
        self.numbers_are_names = any(_number(name) is not None for name in self._index)

    def index(self, value: Any, record: Record) -> int:
        """The class that a value names, or `IGNORE` where it is empty.

        Args:
            value: a name or a number, as the file holds it.
            record: where it stands, for messages.

        Raises:
            UsageError: it names none of the classes.
        """
        if isinstance(value, str):
            value = value.strip()
            if value in self._index:
                return self._index[value]
        if value is None or value == "" or value != value:  # NaN is pandas' null
            return IGNORE
        number = whole(value)
        if isinstance(value, (bool, np.bool_)) and self._truths:
            if bool(value) not in self._truths:
                raise self._unknown(value, record)
            return self._index[self._truths[bool(value)]]
        if self.numbers_are_names:
            if str(number) in self._index:
                return self._index[str(number)]
            worth = _number(value)
            if worth is not None and worth in self._numbers:
                return self._index[self._numbers[worth]]
        if number == IGNORE:
            return IGNORE
        known = (
            number is not None
            and number >= 0
            and (self._names is None or number < len(self._names))
        )
        # Where names are numbers, an index could mean either.
        if number is None or not known or self.numbers_are_names:
            raise self._unknown(value, record)
        return number

    def _unknown(self, value: Any, record: Record) -> UsageError:
        known = "0, 1, 2, ..."
        if self._names is not None:
            each = "{1}" if self.numbers_are_names else "{0} ({1})"
            shown = ", ".join(each.format(i, name) for i, name in enumerate(self._names[:10]))
            known = shown + (f" and {len(self._names) - 10} more" if len(self._names) > 10 else "")
        return UsageError(
            f"{record.where}: {self._noun} is {value!r}, which is not one of the teacher's "
            f"classes: {known}. "
            f"Correct it; leave it empty (null in JSON) where a record has no label."
        )


def _number(value: Any) -> float | None:
    """What a number, or a text that is one, is worth; None of anything else."""
    if isinstance(value, str):
        return float(value) if _NUMBER.fullmatch(value) else None
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        return float(value)
    return None


def _truth(name: str) -> bool | None:
    return {"true": True, "false": False}.get(name.lower())


def _unambiguous(worths: dict[str, Any]) -> dict[Any, str]:
    """The names by what each is worth, without those that share it."""
    values = list(worths.values())
    return {
        worth: name
        for name, worth in worths.items()
        if worth is not None and values.count(worth) == 1
    }


def whole(value: Any) -> int | None:
    """A class number given as int, bool, whole float or digits; None if it is none of these."""
    if isinstance(value, str):
        digits = value.removeprefix("-")
        return int(value) if digits.isascii() and digits.isdigit() and len(digits) < 19 else None
    if isinstance(value, (float, np.floating)):
        return int(value) if float(value).is_integer() else None
    return int(value) if isinstance(value, (int, np.integer, np.bool_)) else None


Labels = npt.NDArray[Any]

_EMPTY = "leave it empty (null in JSON) where a record has no label"


class LabelReader(ABC):
    """Reads the label of a record."""

    def __init__(self, spec: RowSpec) -> None:
        self.spec, self._classes = spec, Classes(spec.label_names)

    @abstractmethod
    def read(self, record: Record) -> Labels:
        """The labels of a record's row, see the module.

        Raises:
            UsageError: a value that is not one, or a named column that is missing.
        """

    def _value(self, record: Record) -> Any:
        """What the record states; None where it states nothing."""
        there = filled_column(record, self.spec.label_columns)
        if there is None:
            missing = list(self.spec.label_columns)
            if self.spec.label_column is None:
                return None
            # A name that the user chose and that is not there is a slip, not a transfer set.
            if self.spec.label_by_default and not almost_there(record, self.spec, missing):
                return None
            raise record.missing(missing, "--label-column", self.spec.columns)
        value = record.values[there]
        return None if _missing(value) else value


class ClassReader(LabelReader):
    """One class a text: its name, or its number."""

    def read(self, record: Record) -> Labels:
        """See `LabelReader.read`."""
        return np.array([self._classes.index(self._value(record), record)], np.int32)


class ManyClassReader(LabelReader):
    """Any number of classes a text: their names or numbers, 0 or 1 of each, or a column of each."""

    def __init__(self, spec: RowSpec) -> None:
        super().__init__(spec)
        self._columns = spec.label_columns if spec.label_by_class else ()
        if self._columns and set(self._columns) != set(spec.label_names or ()):
            raise UsageError(
                f"--label-column names the columns {', '.join(self._columns)}, expected one for "
                f"each class of the teacher: {', '.join(spec.label_names or ())}."
            )

    def read(self, record: Record) -> Labels:
        """See `LabelReader.read`."""
        names = self.spec.label_names or ()
        if self._columns:
            missing = [name for name in names if name not in record.values]
            if missing:
                raise record.missing(missing, "--label-column", self.spec.columns)
            return self._vector(record, [record.values[name] for name in names])
        value = self._value(record)
        if value is None:
            return no_label(self.spec.task, len(names))
        if isinstance(value, str):
            one = value.strip()
            value = [one] if one in names else names_in(record, value)
        if not isinstance(value, (list, tuple, np.ndarray)):
            value = [value]
        return self._of_list(record, list(value))

    def _of_list(self, record: Record, values: list[Any]) -> Labels:
        width = len(self.spec.label_names or ())
        if any(isinstance(value, (list, dict)) for value in values):
            raise self._no_list(record, values)
        vector = len(values) == width and all(_flag(value) is not None for value in values)
        # Truth values, fractions and nulls are of a vector, not numbers of classes.
        flags = any(isinstance(v, (bool, np.bool_, float)) or v is None for v in values)
        repeated = len(set(map(whole, values))) < len(values)
        if vector and (flags or repeated or values in ([1], ["1"])):
            return self._vector(record, values)
        named = self._classes.numbers_are_names and all(isinstance(value, str) for value in values)
        if flags or (vector and not named):
            raise self._no_list(record, values)
        found = np.zeros((1, width), np.int32)
        for value in values:
            number = self._classes.index(value, record)
            if number == IGNORE or found[0, number]:
                raise self._no_list(record, values)
            found[0, number] = 1
        return found

    def _no_list(self, record: Record, values: list[Any]) -> UsageError:
        width = len(self.spec.label_names or ())
        return UsageError(
            f"{record.where}: labels are {values!r}, expected either different classes, best by "
            f"name, or {width} values of true and false, one for each class."
        )

    def _vector(self, record: Record, values: Sequence[Any]) -> Labels:
        flags = [IGNORE if _missing(value) else _flag(value) for value in values]
        if None in flags:
            wrong = values[flags.index(None)]
            name = (self.spec.label_names or ())[flags.index(None)]
            raise UsageError(
                f"{record.where}: label {name} is {wrong!r}, expected 0 or 1; {_EMPTY}."
            )
        return np.array([flags], np.int32)


class ScoreReader(LabelReader):
    """One number a text."""

    def read(self, record: Record) -> Labels:
        """See `LabelReader.read`."""
        value = self._value(record)
        if value is None:
            return no_label(self.spec.task)
        number = _number(value)
        if isinstance(value, str):
            with suppress(ValueError):
                number = float(value)
        with np.errstate(over="ignore"):
            found = np.array([math.nan if number is None else number], np.float32)
        if not np.isfinite(found[0]):
            raise UsageError(
                f"{record.where}: the score is {value!r}, expected a finite number. Correct it; "
                f"{_EMPTY}."
            )
        return found


def filled_column(record: Record, names: Sequence[str]) -> str | None:
    """The column that holds a record's labels: where it has several of them, the filled one.

    None where it has none of these columns; several that are filled are refused.
    """
    there = [name for name in names if name in record.values]
    filled = [name for name in there if not _missing(record.values[name])]
    if len(filled) > 1:
        raise UsageError(
            f"{record.where}: it has labels in the columns {' and '.join(filled)}. Name the "
            "right one with --label-column."
        )
    return next(iter([*filled, *there]), None)


def almost_there(record: Record, spec: RowSpec, names: Sequence[str]) -> bool:
    """Whether a record has a column with one of some names but for case and blanks: ` Label`."""
    read = (spec.text_column, spec.pair_column, spec.words_column)
    return any(one.strip().lower() in names for one in record.columns if one not in read)


def names_in(record: Record, text: str) -> list[Any]:
    """The classes in a cell of a table: names with commas between, or a list as JSON."""
    if not text.lstrip().startswith("["):
        return [name.strip() for name in text.split(",") if name.strip()]
    try:
        return list(json.loads(text))
    except ValueError as error:
        raise UsageError(
            f"{record.where}: labels are {text!r}, which is not JSON: {error}. Give a list of "
            "names of classes."
        ) from None


_READERS: dict[str, type[ClassReader | ManyClassReader | ScoreReader]] = {
    "classes": ClassReader,
    "labels": ManyClassReader,
    "score": ScoreReader,
}


def make_reader(spec: RowSpec) -> LabelReader:
    """The reader of a task's labels."""
    return _READERS[TASKS[spec.task].answers](spec)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _flag(value: Any) -> int | None:
    """0 or 1 given as int, bool, float or digit, `IGNORE` of null; None if it is none of these."""
    if value is None:
        return IGNORE
    number = whole(value)
    return number if number in (0, 1) else None


class ClassificationEncoder(Encoder):
    """Tasks of whole texts: a text or a pair of texts, and its label."""

    def __init__(self, spec: RowSpec, tokenizer: Any) -> None:
        super().__init__(spec, tokenizer)
        pair = spec.pair_column is not None
        self._need_room(int(tokenizer.num_special_tokens_to_add(pair=pair)), 1 + pair)
        self._labels = make_reader(spec)

    def encode(self, records: Iterable[Record], *, span: int = 0) -> Iterator[Row]:
        """See `Encoder.encode`."""
        spec = self.spec
        for batch in self._batches(records, self._make, lambda item: len(item[0]) + len(item[1])):
            texts, pairs, labels = zip(*batch, strict=True)
            found = tokens_of(
                self.tokenizer,
                texts,
                pairs if spec.pair_column is not None else None,
                add_special_tokens=True,
                truncation=True,
                max_length=spec.max_length,
            )
            for text, pair, label, (ids, types, cut) in zip(
                texts, pairs, labels, found, strict=True
            ):
                self.truncated += cut
                yield Row(
                    np.array(ids, np.int32),
                    label,
                    None if types is None else np.array(types, np.uint8),
                    text,
                    pair if spec.pair_column is not None else None,
                )

    def _make(self, record: Record) -> tuple[str, str, Labels] | None:
        column = self.spec.pair_column
        text = self._text(record, self.spec.text_column, "text")
        pair = "" if column is None else self._text(record, column, "pair")
        label = self._labels.read(record)
        return (text, pair, label) if text.strip() or pair.strip() else None
