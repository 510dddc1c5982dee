"""Rows of some shards, to be picked in any order.

Cost: a pick copies one stretch of each column for each run of neighbouring rows: long rows cost
what copying their memory costs, short ones some microseconds each.
Guarantee: a pick has the columns of a shard, its positions in the order of its rows.

A student of another tokenizer has the same rows in its own tokens next to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Annotated, Any, Generic, TypeVar

import numpy as np

from kdcache.cache.columns import (
    Column,
    Columns,
    Nested,
    Numbers,
    Offsets,
    first_of_rows,
    offsets_of,
)
from kdcache.cache.shard import ShardData
from kdcache.targets import SoftTargets
from kdcache.tasks import IGNORE, TASKS, labelled


@dataclass(kw_only=True)
class AlignedRows(Columns):
    """Rows as the student reads them, columnar.

    Attributes:
        offsets: int64 [rows + 1], where each row's tokens begin.
        input_ids: int32 [tokens].
        labels: int32 [tokens], aligned with the logits.
        starts: bool [tokens], where documents begin that do not attend to each other, or None.
        chunk_offsets: int64 [rows + 1], where each row's chunks begin.
        chunks: int32 [chunks, 4]: the first position of the teacher in the cached row and the one
            after its last, and the student's two in its row.
        chunk_bytes: int32 [chunks], bytes of text of each; 0 of special tokens.
        lost: int32 [rows], stretches of text of each row that have no labels, because the student's
            tokens do not give their bytes.
        cut: int32 [rows], labels left out of each row, because it would be too long.
    """

    offsets: Annotated[np.ndarray, Offsets("token", "input_ids")]
    input_ids: Annotated[np.ndarray, Numbers("token", "input_ids")]
    labels: Annotated[np.ndarray, Numbers("token", "labels")]
    starts: Annotated[
        np.ndarray | None,
        Numbers("token", "starts", when=None, fill=first_of_rows, dtype="bool"),
    ] = None
    chunk_offsets: Annotated[np.ndarray, Offsets("chunk", "chunks")]
    chunks: Annotated[np.ndarray, Numbers("chunk", "chunks", shape=(4,))]
    chunk_bytes: Annotated[np.ndarray, Numbers("chunk", "chunk_bytes")]
    lost: Annotated[np.ndarray, Numbers("row", "lost")]
    cut: Annotated[np.ndarray, Numbers("row", "cut")]

    @property
    def positions(self) -> np.ndarray:
        """int64 [rows]: labels of each row."""
        return np.asarray(np.diff(offsets_of(self.labels != IGNORE)[self.offsets]))

    @property
    def bytes(self) -> int:
        """What they take in memory."""
        return sum(values.nbytes for _, _, values in self.present())


@dataclass(kw_only=True)
class AlignedShard(ShardData):
    """Rows of a cache next to the same rows as the student reads them."""

    aligned: Annotated[AlignedRows | None, Nested("row", when=False)] = None

    @classmethod
    def of(cls, data: ShardData, aligned: AlignedRows) -> AlignedShard:
        """Rows of a cache, and as the student reads them."""
        known = {field.name: getattr(data, field.name) for field in fields(data)}
        return cls(**known, aligned=aligned)


def undivided(data: ShardData) -> ShardData:
    """Rows without their documents, as if these attended to each other."""
    changed: dict[str, Any] = {"starts": None}
    if isinstance(data, AlignedShard) and data.aligned is not None:
        changed["aligned"] = replace(data.aligned, starts=None)
    return replace(data, **changed)


def by_document(data: ShardData) -> ShardData:
    """The documents of rows that do not attend to each other, each as a row of its own."""
    if data.starts is None:
        return data
    begins = np.append(np.flatnonzero(data.starts), len(data.input_ids))
    return replace(data, offsets=begins.astype(np.int64), starts=None, answer_logprob=None)


Part = TypeVar("Part", bound=Columns)


class RowPool(Generic[Part]):
    """Rows of some parts, numbered one part after another, to be picked in any order.

    Attributes:
        parts: of one class.
        first: int64 [parts + 1], the number of each part's first row.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        """Number the rows; no column is copied."""
        self.parts = parts
        self.first = np.cumsum([0, *map(len, parts)])
        self._columns: dict[str, tuple[Column, Any]] = {}
        self._ends: dict[str, np.ndarray] = {}
        for name, column in parts[0].columns().items():
            values = [getattr(part, name) for part in parts]
            there = sum(value is not None for value in values)
            if there == len(parts) or (there and column.fill is not None):
                pairs = zip(parts, values, strict=True)
                self._add(name, column, [column.filled(p) if v is None else v for p, v in pairs])
            else:
                self._columns[name] = column, None

    def _add(self, name: str, column: Column, values: list[Any]) -> None:
        nested = isinstance(column, Nested)
        self._columns[name] = column, RowPool(values) if nested else values

    def __len__(self) -> int:
        return int(self.first[-1])

    def gather(self, rows: np.ndarray | None) -> dict[str, Any]:
        """Columns of some rows, in the given order; repetition is fine.

        Args:
            rows: int64 [n]; None for all.
        """
        picked = _Picked(self, np.arange(len(self)) if rows is None else rows)
        found: dict[str, Any] = {}
        for name, (column, values) in self._columns.items():
            if values is None:
                found[name] = None
            elif isinstance(values, RowPool):
                found[name] = type(values.parts[0])(**values.gather(rows))
            elif isinstance(column, Offsets):
                found[name] = offsets_of(picked.sizes(column.axis))
            else:
                stretches = picked.stretches(column.axis)
                found[name] = column.joined([values[part][a:b] for part, a, b in stretches])
        return found

    def ends(self, axis: str) -> np.ndarray:
        """Where rows begin on an axis, part after part; each part has one end more than rows."""
        if axis not in self._ends:
            self._ends[axis] = np.concatenate([part.ends(axis) for part in self.parts])
        return self._ends[axis]


class _Picked:
    """Some rows of a pool. Those that follow each other in a part are one stretch."""

    def __init__(self, pool: RowPool[Any], rows: np.ndarray) -> None:
        part = np.searchsorted(pool.first, rows, "right") - 1
        self._pool, self._at = pool, rows + part  # where each row begins, among the ends of all
        begins, stops = np.ones(len(rows), np.bool_), np.ones(len(rows), np.bool_)
        begins[1:] = stops[:-1] = self._at[1:] != self._at[:-1] + 1
        self._parts = part[begins].tolist()
        self._begin, self._end = self._at[begins], self._at[stops] + 1
        self._known: dict[str, list[tuple[int, int, int]]] = {}

    def sizes(self, axis: str) -> np.ndarray:
        """How many items of an axis each row has."""
        ends = self._pool.ends(axis)
        return np.asarray(ends[self._at + 1] - ends[self._at])

    def stretches(self, axis: str) -> list[tuple[int, int, int]]:
        """Where these items are: part, begin, end; an empty one where there are none."""
        if axis not in self._known:
            ends = self._pool.ends(axis)
            bounds = ends[self._begin].tolist(), ends[self._end].tolist()
            self._known[axis] = list(zip(self._parts, *bounds, strict=True)) or [(0, 0, 0)]
        return self._known[axis]


class ShardRows(RowPool[ShardData]):
    """Rows of some shards of one task and codec, in whatever order a pick has them."""

    def __init__(self, parts: Sequence[ShardData], *, soft: bool = True) -> None:
        """Number the rows; no column is copied.

        Args:
            soft: False leaves the soft targets out of every pick.
        """
        self._soft, self._codec = soft, SoftTargets.codec_of([part.targets for part in parts])
        targets = (
            SoftTargets.alike([part.targets for part in parts])
            if soft
            else [SoftTargets.empty(self._codec)] * len(parts)
        )
        parts = [
            part if mine is part.targets else replace(part, targets=mine)
            for part, mine in zip(parts, targets, strict=True)
        ]
        super().__init__(parts)
        for column in self._codec.columns:
            values = [part.targets.columns[column.name] for part in parts]
            self._add(f"targets/{column.name}", Numbers(f"targets/{column.per}"), values)

    @cached_property
    def positions(self) -> np.ndarray:
        """int64 [rows]: what the loss of each row is a sum over; see `positions_of`."""
        return np.concatenate([positions_of(part, soft=self._soft) for part in self.parts])

    def take(self, rows: np.ndarray | None = None) -> ShardData:
        """Some rows, in the given order; repetition is fine.

        Args:
            rows: int64 [n]; None for all.
        """
        part, found = self.parts[0], self.gather(rows)
        columns = {c.name: found.pop(f"targets/{c.name}") for c in self._codec.columns}
        targets = SoftTargets(self._codec, columns, part.targets.rank_to_id)
        return type(part)(task=part.task, targets=targets, **found)


def join(parts: Sequence[ShardData]) -> ShardData:
    """One shard's worth of columns from several."""
    return parts[0] if len(parts) == 1 else ShardRows(parts).take()


def positions_of(data: ShardData, *, soft: bool) -> np.ndarray:
    """How many soft targets, or else hard labels, each row has: what its loss is a sum over. Hard
    labels without a target count in both cases.

    Returns:
        int64 [rows].
    """
    if isinstance(data, AlignedShard) and data.aligned is not None:
        return data.aligned.positions
    there = labelled(data.labels, data.task)
    if not TASKS[data.task].per_token:
        return np.ones(len(data), np.int64) if soft else there.astype(np.int64)
    if soft or TASKS[data.task].causal:
        return np.asarray(np.diff(data.position_offsets) + np.diff(data.ends("hard")))
    return np.asarray(np.diff(offsets_of(there)[data.offsets]))
