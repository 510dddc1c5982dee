"""Columns of rows, each declared once: `Annotated[type, Column]` at a field of a dataclass.

A column declares its axis (what it has a value for each of), the encoder's field it comes from, how
a shard's file stores it, and its value in rows without it. Gathering rows into columns, writing and
reading a file, and picking rows of several parts (`kdcache.stream.shard_rows`) are loops over these
declarations.

Labels of a causal language model are the row's next ids, so only whether a token has one, and each
row's last label, are stored. Other labels that are ids are stored with the tokens that have one;
classes, several labels of a row and scores as they are. Texts, and words of each first token, are
UTF-8 bytes end to end with a column of their lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from kdcache.cache.hdf5 import read_column, write_column
from kdcache.errors import CorruptCacheError
from kdcache.tasks import IGNORE, TASKS, TaskType

IDS = ("|u1", "<u2", "<u4")
"""Types of ids in a file: the smallest that holds them."""

_TYPES = {"ids": "<i4", "classes": "<i4", "labels": "|u1", "score": "<f4"}
_NOT_KNOWN = 255  # whether a class of several is one of a row's labels
_U1, _U4, _I4 = ("|u1",), ("<u4",), ("<i4",)


@dataclass(frozen=True)
class OpenRows:
    """The rows of a shard's file, while their columns are read.

    Attributes:
        width: classes of a row that may have several labels.
        items: how many each axis has, as far as that is known.
    """

    path: Path
    group: Any
    task: str
    width: int
    items: dict[str, int]
    found: dict[str, Any]

    def read(self, name: str, kinds: Sequence[str], axis: str, *shape: int) -> np.ndarray:
        """A column of as many values of a shape as the axis has; see `read_column`."""
        return read_column(self.path, self.group, name, kinds, self.items[axis], *shape)


@dataclass(frozen=True)
class Column:
    """How rows have a column.

    Attributes:
        axis: what it has a value for each of: `row`, `token` or another that a column of `Offsets`
            divides among the rows, or one that the dataclass knows (`Columns.ends`).
        row: the attribute of a single row that has its values.
        name: in a file; None where it is not stored.
        when: whether files have it: True if all do, None if each decides for itself; or the name of
            what decides that, an attribute of the task or one of the columns that a cache keeps.
        fill: stands for each value in a part that lacks the column, next to parts that have it; or
            a function from that part to all of them. None: rows of such parts together lack it.
    """

    axis: str
    row: str | None = None
    name: str | None = None
    when: bool | str | None = True
    fill: Any = None

    def wanted(self, kind: TaskType, kept: Collection[str] | None = None) -> bool | None:
        """Whether rows have it; None if they may.

        Args:
            kind: what their task is.
            kept: the columns that their cache keeps; None where that is open.
        """
        if not isinstance(self.when, str):
            return self.when
        if hasattr(kind, self.when):
            return bool(getattr(kind, self.when))
        return None if kept is None else self.when in kept

    def of_rows(self, rows: Sequence[Any], task: str, width: int) -> Any:
        """The values of rows as their encoder made them; None if they have none."""
        values = [getattr(row, str(self.row)) for row in rows]
        wanted = self.wanted(TASKS[task])
        if wanted is None:
            wanted = any(value is not None for value in values)
        return self.of_values(values) if wanted else None

    def of_values(self, values: Sequence[Any]) -> Any:
        """The column, from what each row has of it."""
        return [self.fill if value is None else value for value in values]

    def filled(self, part: Columns) -> Any:
        """What stands for it in a part that lacks it."""
        return self.fill(part) if callable(self.fill) else [self.fill] * len(part)

    def joined(self, pieces: Sequence[Any]) -> Any:
        """The column, from slices of it."""
        return [value for piece in pieces for value in piece]

    def names(self, task: str) -> tuple[str, ...]:
        """Of the columns in a file that store it."""
        return () if self.name is None else (self.name,)

    def write(self, group: Any, data: Any, values: Any) -> None:
        """Store it."""
        raise NotImplementedError

    def read(self, rows: OpenRows) -> Any:
        """Read what `write` stored.

        Raises:
            CorruptCacheError: it does not fit the columns that were read before.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Numbers(Column):
    """A column of numbers.

    Attributes:
        dtype: numpy name of their type in memory.
        shape: of each value.
        kinds: the types they may have in a file; the smallest of several is written. Empty for the
            type in memory.
        check: refuses values that were read.
    """

    dtype: str = "int32"
    shape: tuple[int, ...] = ()
    kinds: tuple[str, ...] = ()
    check: Callable[[OpenRows, np.ndarray], None] | None = None

    def of_values(self, values: Sequence[Any]) -> np.ndarray:
        """See `Column.of_values`."""
        there = [np.atleast_1d(value) for value in values if value is not None]
        assert len(there) in (0, len(values)), f"either every row has {self.row} or none"
        return np.concatenate([np.zeros((0, *self.shape), self.dtype), *there]).astype(self.dtype)

    def filled(self, part: Columns) -> np.ndarray:
        """See `Column.filled`."""
        if callable(self.fill):
            return np.asarray(self.fill(part))
        return np.full(int(part.ends(self.axis)[-1]), self.fill, self.dtype)

    def joined(self, pieces: Sequence[Any]) -> np.ndarray:
        """See `Column.joined`."""
        return np.concatenate(pieces)

    @property
    def _kinds(self) -> tuple[str, ...]:
        return self.kinds or (np.dtype(self.dtype).str.replace("|b1", "|u1"),)

    def write(self, group: Any, data: Any, values: np.ndarray) -> None:
        """See `Column.write`."""
        kinds = self._kinds
        stored = narrow(values) if len(kinds) > 1 else values.astype(kinds[0], copy=False)
        write_column(group, str(self.name), stored)

    def read(self, rows: OpenRows) -> np.ndarray:
        """See `Column.read`."""
        values = rows.read(str(self.name), self._kinds, self.axis)
        if self.check is not None:
            self.check(rows, values)
        return values.astype(self.dtype, copy=False)


def extra(
    name: str,
    axis: str,
    dtype: str,
    check: Callable[[OpenRows, np.ndarray], None] | None = None,
) -> Numbers:
    """A column that a cache keeps besides those of its task, and no single row has."""
    return Numbers(axis, name=name, when=name, dtype=dtype, check=check)


@dataclass(frozen=True)
class Offsets(Column):
    """Where each row begins on the axis, int64 [rows + 1]; files have the length of each row.

    Attributes:
        noun: what a row without any lacks, for messages.
    """

    noun: str = "tokens"

    def of_values(self, values: Sequence[Any]) -> np.ndarray:
        """See `Column.of_values`."""
        return offsets_of([len(value) for value in values])

    def write(self, group: Any, data: Any, values: np.ndarray) -> None:
        """See `Column.write`."""
        write_column(group, str(self.name), np.diff(values).astype(np.uint32))

    def read(self, rows: OpenRows) -> np.ndarray:
        """See `Column.read`."""
        lengths = rows.read(str(self.name), _U4, "row")
        offsets = offsets_of(lengths)
        total = int(offsets[-1])
        expected = rows.items.setdefault(self.axis, total)
        if total != expected:
            raise CorruptCacheError(f"{rows.path}: row lengths add up to {total}, not {expected}.")
        if TASKS[rows.task].per_token and not lengths.all():
            raise CorruptCacheError(f"{rows.path}: it has rows without {self.noun}.")
        return offsets


@dataclass(frozen=True)
class LabelColumn(Numbers):
    """The labels of a task, with the task's type, shape and columns in a file."""

    def of_rows(self, rows: Sequence[Any], task: str, width: int) -> np.ndarray:
        """See `Column.of_rows`; [rows, classes] where there are several a row."""
        answers = TASKS[task].answers
        empty = np.zeros((0, width) if answers == "labels" else 0)
        labels = np.concatenate([empty, *(row.labels for row in rows)])
        return labels.astype(np.float32 if answers == "score" else np.int32)

    def names(self, task: str) -> tuple[str, ...]:
        """See `Column.names`."""
        kind = TASKS[task]
        if not kind.over_ids:
            return ("labels",)
        return "has_label", "next_ids" if kind.causal else "label_ids"

    def write(self, group: Any, data: Any, values: np.ndarray) -> None:
        """See `Column.write`."""
        kind, there = TASKS[data.task], values != IGNORE
        if not kind.over_ids:
            if kind.answers == "labels":
                values = np.where(there, values, _NOT_KNOWN)
            write_column(group, "labels", values.astype(_TYPES[kind.answers]))
            return
        write_column(group, "has_label", there.astype(np.uint8))
        if not kind.causal:
            write_column(group, "label_ids", narrow(values[there]))
            return
        last = data.offsets[1:] - 1
        write_column(group, "next_ids", data.every_label[last].astype(np.int32))
        there[last] = False
        inner = np.flatnonzero(there)
        assert np.array_equal(values[inner], data.input_ids[inner + 1]), "labels are the next ids"

    def read(self, rows: OpenRows) -> np.ndarray:
        """See `Column.read`."""
        kind = TASKS[rows.task]
        if not kind.over_ids:
            several = kind.answers == "labels"
            axis, shape = "token" if kind.per_token else "row", (rows.width,) if several else ()
            stored = rows.read("labels", (_TYPES[kind.answers],), axis, *shape)
            labels = stored.astype(stored.dtype if stored.dtype.kind == "f" else np.int32)
            if several:
                labels[labels == _NOT_KNOWN] = IGNORE
            return labels
        there = rows.read("has_label", _U1, "token") != 0
        if kind.causal:
            return np.where(there, _next_ids(rows), np.int32(IGNORE))
        labels = np.full(len(there), IGNORE, np.int32)
        ids = rows.read("label_ids", IDS, "position")
        if there.sum() != len(ids):
            raise CorruptCacheError(
                f"{rows.path}: {there.sum()} of its tokens have a label, but it has {len(ids)} "
                "labels."
            )
        labels[there] = ids
        return labels


def _next_ids(rows: OpenRows) -> np.ndarray:
    """The id after each token, int32 [tokens]; after the last one of a row what the file has."""
    found = np.full(len(rows.found["input_ids"]), IGNORE, np.int32)
    found[:-1] = rows.found["input_ids"][1:]
    found[rows.found["offsets"][1:] - 1] = rows.read("next_ids", _I4, "row")
    return found


@dataclass(frozen=True)
class HardLabels(Numbers):
    """Labels of tokens that have no soft target: their next ids, of which files have the flags."""

    def write(self, group: Any, data: Any, values: np.ndarray) -> None:
        """See `Column.write`."""
        write_column(group, str(self.name), (values != IGNORE).astype(np.uint8))

    def read(self, rows: OpenRows) -> np.ndarray:
        """See `Column.read`."""
        flags = rows.read(str(self.name), _U1, "token")
        if flags.max(initial=0) > 1 or (rows.found["labels"][flags != 0] != IGNORE).any():
            raise CorruptCacheError(f"{rows.path}: column {self.name} marks a token with a target.")
        rows.items["hard"] = int(flags.sum())
        labels = _next_ids(rows)
        if (labels[flags != 0] == IGNORE).any():
            raise CorruptCacheError(
                f"{rows.path}: column {self.name} marks a token without a label."
            )
        return np.where(flags, labels, np.int32(IGNORE))


@dataclass(frozen=True)
class Texts(Column):
    """A text of each row."""

    def names(self, task: str) -> tuple[str, ...]:
        """See `Column.names`."""
        return f"{self.name}_bytes", str(self.name)

    def write(self, group: Any, data: Any, values: Sequence[Any]) -> None:
        """See `Column.write`."""
        encoded = [text.encode() for text in values]
        lengths = np.array([len(text) for text in encoded], np.uint32)
        write_column(group, f"{self.name}_bytes", lengths)
        write_column(group, str(self.name), np.frombuffer(b"".join(encoded), np.uint8))

    def read(self, rows: OpenRows) -> list[Any]:
        """See `Column.read`."""
        return self._texts(rows, rows.items["row"])

    def _texts(self, rows: OpenRows, count: int) -> list[str]:
        path, group = rows.path, rows.group
        lengths = read_column(path, group, f"{self.name}_bytes", _U4, count)
        ends = offsets_of(lengths).tolist()
        blob = read_column(path, group, str(self.name), _U1, ends[-1]).tobytes()
        return [blob[a:b].decode() for a, b in pairwise(ends)]


@dataclass(frozen=True)
class Words(Texts):
    """The words of each row, one for each of its first tokens."""

    def write(self, group: Any, data: Any, values: Sequence[Any]) -> None:
        """See `Column.write`."""
        super().write(group, data, [word for row in values for word in row])

    def read(self, rows: OpenRows) -> list[Any]:
        """See `Column.read`."""
        before = offsets_of(rows.found["first"])
        texts = self._texts(rows, int(before[-1]))
        ends = before[rows.found["offsets"]].tolist()
        return [tuple(texts[a:b]) for a, b in pairwise(ends)]


@dataclass(frozen=True)
class Nested(Column):
    """The same rows read in another way, as `Columns` of their own."""


class Columns:
    """Base of dataclasses with fields that declare columns of rows."""

    offsets: np.ndarray

    @classmethod
    @functools.cache
    def columns(cls) -> dict[str, Column]:
        """The declared columns by their fields, in the order of the fields."""
        hints = get_type_hints(cls, include_extras=True)
        marked = ((name, getattr(hint, "__metadata__", ())) for name, hint in hints.items())
        return {n: mark for n, marks in marked for mark in marks if isinstance(mark, Column)}

    @classmethod
    def of_rows(cls, rows: Sequence[Any], task: str, width: int = 0) -> dict[str, Any]:
        """Columns of single rows, by field."""
        named = {name: column for name, column in cls.columns().items() if column.row is not None}
        return {name: column.of_rows(rows, task, width) for name, column in named.items()}

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def ends(self, axis: str) -> np.ndarray:
        """int64 [rows + 1]: where each row begins on an axis."""
        if axis == "row":
            return self._each
        found = (n for n, c in self.columns().items() if c.axis == axis and isinstance(c, Offsets))
        return np.asarray(getattr(self, next(found)))

    @cached_property
    def _each(self) -> np.ndarray:
        return np.arange(len(self) + 1)

    def present(self) -> Iterator[tuple[str, Column, Any]]:
        """Name, declaration and values of each column that is there."""
        for name, column in self.columns().items():
            if (values := getattr(self, name)) is not None:
                yield name, column, values


def check_starts(rows: OpenRows, flags: np.ndarray) -> None:
    """Refuse flags of documents' beginnings that cannot be."""
    path, offsets, labels = rows.path, rows.found["offsets"], rows.found["labels"]
    if flags.max(initial=0) > 1 or not flags[offsets[:-1]].all():
        raise CorruptCacheError(f"{path}: column starts does not mark the first token of each row.")
    inside_row = flags.astype(np.bool_)
    inside_row[offsets[:-1]] = False
    if (labels[:-1][inside_row[1:]] != IGNORE).any():
        raise CorruptCacheError(f"{path}: a document's last token has a label of the next one.")


def check_first(rows: OpenRows, flags: np.ndarray) -> None:
    """Refuse flags of words' first tokens that cannot be."""
    marked = rows.found["labels"][flags.astype(np.bool_)]
    if flags.max(initial=0) > 1 or (marked == IGNORE).any():
        raise CorruptCacheError(f"{rows.path}: a first token of column first_tokens has no label.")


def check_sums(rows: OpenRows, values: np.ndarray) -> None:
    """Refuse sums of log-probabilities that cannot be."""
    if not (values <= 0).all():  # nor NaN
        raise CorruptCacheError(
            f"{rows.path}: column answer_logprob has a number that is not <= 0."
        )


def first_of_rows(part: Any) -> np.ndarray:
    """bool [tokens]: the first token of each row, where the one document of a row begins."""
    starts = np.zeros(len(part.input_ids), np.bool_)
    starts[part.offsets[:-1]] = True
    return starts


def offsets_of(sizes: Any) -> np.ndarray:
    """int64 [n + 1]: the sum of the sizes before each, and of all."""
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def answer_sums(labels: np.ndarray, offsets: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Of each row the sum over its answer: the last of its labels that follow each other.

    Args:
        labels: int32 [tokens].
        offsets: int64 [rows + 1], where each row's tokens begin.
        values: one of each label.

    Returns:
        float64 [rows], 0 of a row without labels.
    """
    there = np.flatnonzero(labels != IGNORE)
    ends = np.searchsorted(there, offsets)
    begins = np.append(-1, np.flatnonzero(np.diff(there, prepend=-2) > 1))  # after a gap
    last = begins[np.searchsorted(begins, ends[1:]) - 1]
    stretches = zip(np.maximum(last, ends[:-1]).tolist(), ends[1:].tolist(), strict=True)
    return np.array([values[a:b].sum(dtype=np.float64) for a, b in stretches], np.float64)


def narrow(ids: np.ndarray) -> np.ndarray:
    """Ids in the smallest unsigned type that holds them."""
    return ids.astype(np.min_scalar_type(int(ids.max(initial=0))))
