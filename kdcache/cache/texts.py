"""Columns of what was tokenised: the text of each row, or its words.

A text is bytes of UTF-8, one after another, and their number in a column of its own. Words are the
same, one for each first token of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.cache.hdf5 import read_column, write_column
from kdcache.errors import CorruptCacheError
from kdcache.tasks import IGNORE

_U1, _U4 = ("|u1",), ("<u4",)


def write_texts(rows: Any, name: str, texts: Sequence[str]) -> None:
    """Write texts as the columns `name` and `name_bytes`."""
    encoded = [text.encode() for text in texts]
    write_column(rows, f"{name}_bytes", np.array([len(text) for text in encoded], np.uint32))
    write_column(rows, name, np.frombuffer(b"".join(encoded), np.uint8))


def read_texts(path: Path, rows: Any, name: str, count: int) -> list[str] | None:
    """Read `count` texts; None where there is no such column.

    Raises:
        CorruptCacheError: the columns do not fit each other.
    """
    if name not in rows and f"{name}_bytes" not in rows:
        return None
    lengths = read_column(path, rows, f"{name}_bytes", _U4, count)
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).tolist()
    blob = read_column(path, rows, name, _U1, ends[-1]).tobytes()
    return [blob[a:b].decode() for a, b in pairwise(ends)]


def write_words(rows: Any, words: Sequence[Sequence[str]], first: np.ndarray) -> None:
    """Write the words of rows.

    Args:
        rows: group of the file.
        words: of each row.
        first: bool [tokens], the first token of each.
    """
    write_column(rows, "first_tokens", first.astype(np.uint8))
    write_texts(rows, "words", [word for row in words for word in row])


def read_words(
    path: Path, rows: Any, offsets: np.ndarray, labels: np.ndarray
) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """Words of each row, and bool [tokens], the first token of each.

    Raises:
        CorruptCacheError: the columns do not fit each other, or a first token is no position.
    """
    flags = read_column(path, rows, "first_tokens", _U1, len(labels))
    first = flags.astype(np.bool_)
    if flags.max(initial=0) > 1 or (labels[first] == IGNORE).any():
        raise CorruptCacheError(f"{path}: a first token of column first_tokens has no label.")
    before = np.concatenate([[0], np.cumsum(first)])
    texts = read_texts(path, rows, "words", int(before[-1])) or []
    ends = before[offsets].tolist()
    return [tuple(texts[a:b]) for a, b in pairwise(ends)], first
