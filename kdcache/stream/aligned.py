"""Rows of a cache as a student of another tokenizer reads them, columnar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from kdcache.align import Alignment
from kdcache.cache.shard import ShardData
from kdcache.tasks import IGNORE


@dataclass
class AlignedRows:
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

    offsets: np.ndarray
    input_ids: np.ndarray
    labels: np.ndarray
    starts: np.ndarray | None
    chunk_offsets: np.ndarray
    chunks: np.ndarray
    chunk_bytes: np.ndarray
    lost: np.ndarray
    cut: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Alignment]) -> AlignedRows:
        """Gather rows."""
        divided = [row.starts for row in rows if row.starts is not None]
        chunks = [np.concatenate([row.teacher_spans, row.student_spans], 1) for row in rows]
        return cls(
            offsets_of([len(row.input_ids) for row in rows]),
            _joined([row.input_ids for row in rows], np.int32),
            _joined([row.labels for row in rows], np.int32),
            _joined(divided, np.bool_) if divided else None,
            offsets_of([len(row.teacher_spans) for row in rows]),
            np.concatenate([np.zeros((0, 4)), *chunks]).astype(np.int32),
            _joined([row.chunk_bytes for row in rows], np.int32),
            np.array([row.lost for row in rows], np.int32),
            np.array([row.cut for row in rows], np.int32),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def positions(self) -> np.ndarray:
        """int64 [rows]: labels of each row."""
        before = np.zeros(len(self.labels) + 1, np.int64)
        np.cumsum(self.labels != IGNORE, out=before[1:])
        return np.asarray(np.diff(before[self.offsets]))

    @property
    def bytes(self) -> int:
        """What they take in memory."""
        columns = (getattr(self, field.name) for field in fields(self))
        return sum(column.nbytes for column in columns if column is not None)

    def take(self, row: int) -> AlignedRows:
        """One row, as views."""
        tokens = slice(self.offsets[row], self.offsets[row + 1])
        chunks = slice(self.chunk_offsets[row], self.chunk_offsets[row + 1])
        return AlignedRows(
            self.offsets[row : row + 2] - self.offsets[row],
            self.input_ids[tokens],
            self.labels[tokens],
            None if self.starts is None else self.starts[tokens],
            self.chunk_offsets[row : row + 2] - self.chunk_offsets[row],
            self.chunks[chunks],
            self.chunk_bytes[chunks],
            self.lost[row : row + 1],
            self.cut[row : row + 1],
        )

    @classmethod
    def concat(cls, parts: Sequence[AlignedRows]) -> AlignedRows:
        """Join rows of one or several caches."""
        divided = any(part.starts is not None for part in parts)
        return cls(
            offsets_of(np.concatenate([np.diff(part.offsets) for part in parts])),
            np.concatenate([part.input_ids for part in parts]),
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part._starts for part in parts]) if divided else None,
            offsets_of(np.concatenate([np.diff(part.chunk_offsets) for part in parts])),
            np.concatenate([part.chunks for part in parts]),
            np.concatenate([part.chunk_bytes for part in parts]),
            np.concatenate([part.lost for part in parts]),
            np.concatenate([part.cut for part in parts]),
        )

    @property
    def _starts(self) -> np.ndarray:
        if self.starts is not None:
            return self.starts
        starts = np.zeros(len(self.input_ids), np.bool_)
        starts[self.offsets[:-1]] = True
        return starts


@dataclass
class AlignedShard(ShardData):
    """Rows of a cache beside the same rows as the student reads them.

    Attributes:
        aligned: the same rows, in this order.
    """

    aligned: AlignedRows | None = None


def undivided(data: ShardData) -> ShardData:
    """Rows without their documents, as if these attended to each other."""
    changed: dict[str, Any] = {"starts": None}
    if isinstance(data, AlignedShard) and data.aligned is not None:
        changed["aligned"] = replace(data.aligned, starts=None)
    return replace(data, **changed)


def offsets_of(sizes: Any) -> np.ndarray:
    """int64 [n + 1]: the sum of the sizes before each, and of all."""
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def _joined(columns: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *columns]).astype(dtype)
