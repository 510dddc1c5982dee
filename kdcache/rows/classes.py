"""Classes: which class a hard label of a record is, by name or by number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdcache.corpus import Record
from kdcache.errors import UsageError
from kdcache.tasks import IGNORE

_NUMBER = re.compile(r"[+-]?\d{1,18}(\.\d{1,18})?", re.ASCII)


class Classes:
    """A teacher's classes, by which hard labels are read.

    Attributes:
        numbers_are_names: whether 1 is the class named "1", and not the second one.
    """

    def __init__(self, names: Sequence[str] | None, noun: str = "label") -> None:
        """Keep the names.

        Args:
            names: of the classes in the teacher's order; None takes any class number.
            noun: what a label is called in messages.
        """
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
        # An index beside names that are numbers could mean either.
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
            f"{record.place}: {self._noun} is {value!r}, which is not one of the teacher's "
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
