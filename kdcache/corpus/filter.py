"""Filters: records are kept by the values of columns.

`lang=en` keeps records whose column `lang` holds `en`. Conditions on one column are alternatives;
those on different columns must all hold. A value is compared as text, a number by its value (3 is
3.0), true and false by these words, a missing one (null) as empty text. A list is none of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from kdcache.corpus.records import Record
from kdcache.errors import UsageError

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
                f"{record.place}: column {column!r} holds a list or an object, and --filter "
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
