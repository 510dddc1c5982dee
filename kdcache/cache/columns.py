"""How a shard stores the labels of its rows.

Labels of a causal language model are the next ids of the row: of each token whether it has one, and
of each row that of its last token. Other labels that are ids stand at some of the tokens. Classes,
several labels of a row and scores are stored as they are.

Columns of what was tokenised: the text of each row, or its words.

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
from kdcache.tasks import IGNORE, TASKS

_NEXT_IDS = ("has_label", "next_ids")
_PLACES = ("has_label", "label_ids")
_LABELS = ("labels",)
_TYPES = {"ids": "<i4", "classes": "<i4", "labels": "|u1", "score": "<f4"}
_NOT_KNOWN = 255  # whether a class of several is one of a row's labels
_U1, _I4, _IDS = ("|u1",), ("<i4",), ("|u1", "<u2", "<u4")


def label_columns(task: str) -> tuple[str, ...]:
    """Names of the columns that hold a task's labels."""
    kind = TASKS[task]
    return _NEXT_IDS if kind.causal else _PLACES if kind.over_ids else _LABELS


def label_type(task: str) -> type:
    """The type of a task's labels in memory."""
    return np.float32 if TASKS[task].answers == "score" else np.int32


def join_rows(labels: list[np.ndarray], task: str, width: int) -> np.ndarray:
    """The labels of rows, one after another; [rows, classes] where there are several a row."""
    empty = np.zeros((0, width) if TASKS[task].answers == "labels" else 0)
    return np.concatenate([empty, *labels]).astype(label_type(task))


def narrow(ids: np.ndarray) -> np.ndarray:
    """Ids in the smallest unsigned type that holds them."""
    return ids.astype(np.min_scalar_type(int(ids.max(initial=0))))


def write_labels(
    rows: Any, task: str, labels: np.ndarray, offsets: np.ndarray, input_ids: np.ndarray
) -> None:
    """Write the columns of `label_columns` into the group `rows`; arrays as in `ShardData`."""
    kind = TASKS[task]
    if kind.causal:
        has_label, last = _split(labels, offsets, input_ids)
        write_column(rows, "has_label", has_label)
        write_column(rows, "next_ids", last)
    elif kind.over_ids:
        there = labels != IGNORE
        write_column(rows, "has_label", there.astype(np.uint8))
        write_column(rows, "label_ids", narrow(labels[there]))
    else:
        if kind.answers == "labels":
            labels = np.where(labels == IGNORE, _NOT_KNOWN, labels)
        write_column(rows, "labels", labels.astype(_TYPES[kind.answers]))


def read_labels(
    path: Path,
    rows: Any,
    task: str,
    offsets: np.ndarray,
    input_ids: np.ndarray,
    positions: int,
    width: int,
) -> np.ndarray:
    """The labels as `ShardData` has them.

    Args:
        path: of the shard.
        rows: its group.
        task: one of `kdcache.tasks.TASKS`.
        offsets: int64 [rows + 1], where each row's tokens begin.
        input_ids: int32 [tokens].
        positions: those with a soft target.
        width: classes of a row that may have several labels.

    Raises:
        CorruptCacheError: the columns do not fit each other.
    """
    kind, tokens, count = TASKS[task], len(input_ids), len(offsets) - 1
    if kind.causal:
        has_label = read_column(path, rows, "has_label", _U1, tokens)
        last = read_column(path, rows, "next_ids", _I4, count)
        return _join(offsets, input_ids, has_label, last)
    if kind.over_ids:
        has_label = read_column(path, rows, "has_label", _U1, tokens)
        return _spread(path, has_label, read_column(path, rows, "label_ids", _IDS, positions))
    shape = (width,) if kind.answers == "labels" else ()
    length = tokens if kind.per_token else count
    labels = read_column(path, rows, "labels", (_TYPES[kind.answers],), length, *shape)
    labels = labels.astype(label_type(task), copy=False)
    if kind.answers == "labels":
        labels[labels == _NOT_KNOWN] = IGNORE
    return labels


def _split(
    labels: np.ndarray, offsets: np.ndarray, input_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each token has a label, and the label of each row's last token."""
    has_label = labels != IGNORE
    last = offsets[1:] - 1
    inner = has_label.copy()
    inner[last] = False
    where = np.flatnonzero(inner)
    assert np.array_equal(labels[where], input_ids[where + 1]), "labels are the next ids"
    return has_label.astype(np.uint8), labels[last].astype(np.int32)


def _join(
    offsets: np.ndarray, input_ids: np.ndarray, has_label: np.ndarray, last: np.ndarray
) -> np.ndarray:
    labels = np.full(len(input_ids), IGNORE, np.int32)
    labels[:-1] = input_ids[1:]
    labels[offsets[1:] - 1] = last
    labels[has_label == 0] = IGNORE
    return labels


def _spread(path: Path, has_label: np.ndarray, label_ids: np.ndarray) -> np.ndarray:
    """int32 [tokens], from where labels are and what they are."""
    there = has_label != 0
    if there.sum() != len(label_ids):
        raise CorruptCacheError(
            f"{path}: {there.sum()} of its tokens have a label, but it has {len(label_ids)} labels."
        )
    labels = np.full(len(has_label), IGNORE, np.int32)
    labels[there] = label_ids
    return labels


_U4 = ("<u4",)


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
