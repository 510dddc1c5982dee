"""Rows of some shards, to be picked in any order.

Cost: a row is a stretch of each column, and a pick copies stretches: long rows cost what copying
their memory costs, short ones some microseconds each.
Guarantee: a pick has the columns of a shard, its positions in the order of its rows.

Rows of a cache as a student of another tokenizer reads them, columnar.

The text of a batch in chunks: what figures that no tokenizer enters are made of.

A chunk is text that models of different tokenizers are asked about alike (`kdcache.align`): for a
student that reads the cached rows as they are, one token; special tokens are in none.

Rows of a shard as `kdcache.align` takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from kdcache.align import Alignment, CachedRow, TokenBytes, label_bytes
from kdcache.cache import Cache
from kdcache.cache.shard import ShardData
from kdcache.targets import SoftTargets
from kdcache.targets.label_logprob import decode_logprobs
from kdcache.tasks import IGNORE, TASKS, labelled


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


class RowKind(NamedTuple):
    """What rows hold; see `kdcache.align.CachedRow`.

    Attributes:
        opens: whether each begins with a document.
        single: whether each is of one document.
    """

    opens: bool
    single: bool

    @classmethod
    def of(cls, packing: str, record_form: str) -> RowKind:
        """The kind of rows that a `RowSpec` makes.

        Args:
            packing: of the spec.
            record_form: likewise. Records of ids may be several documents end to end.
        """
        return cls(packing in ("none", "whole"), packing != "concat" and record_form != "ids")

    @classmethod
    def of_cache(cls, cache: Cache) -> RowKind:
        """The kind of a cache's rows."""
        return cls.of(cache.spec.packing, str(cache.spec.rows.get("record_form")))


def cached_rows(cache: Cache, data: ShardData) -> list[CachedRow]:
    """The rows of a shard of a language model, to be aligned with those of a student.

    Args:
        cache: whose shard it is.
        data: its rows; their targets may be missing.
    """
    kind = RowKind.of_cache(cache)
    rows = (data.row(index) for index in range(len(data)))
    return [CachedRow(row.input_ids, row.labels, row.starts, *kind) for row in rows]


@dataclass(frozen=True, eq=False)
class TextChunks:
    """Chunks of text of a batch.

    Attributes:
        begin: int64 [C], the first of the student's positions in the batch that each chunk has.
        end: int64 [C], the one after its last.
        sizes: int64 [C], bytes of text.
        likelihood: float64 [C], the teacher's log-likelihood, minus infinity if it gives a chunk no
            probability; None where the cache does not know it.
    """

    begin: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    likelihood: npt.NDArray[np.float64] | None

    def pin_memory(self) -> TextChunks:
        """Itself: all of it stays on the host."""
        return self


@dataclass
class TextShard(ShardData):
    """Rows of a cache beside the text of their labels.

    Attributes:
        label_bytes: int64 [positions], bytes of text of each label, -1 of one that is no text.
    """

    label_bytes: npt.NDArray[np.int64] | None = None


class RowsText:
    """The text of rows whose student has the caches' tokenizer."""

    def __init__(self, cache: Cache) -> None:
        """Read the tokenizer.

        Args:
            cache: one of a stream's, which all have its tokenizer.

        Raises:
            UsageError: a tokenizer that loses bytes of a text.
        """
        self._tokens = TokenBytes(cache.tokenizer(), "the cache's tokenizer")

    def label_bytes(self, cache: Cache, data: ShardData) -> npt.NDArray[np.int64]:
        """What a `TextShard` has of a shard; caches of a stream may differ in what rows hold.

        Args:
            cache: whose shard it is.
            data: its rows.
        """
        found = [label_bytes(self._tokens, row) for row in cached_rows(cache, data)]
        sizes = [np.where(is_text, size, -1) for size, is_text in found]
        joined = np.concatenate([np.zeros(0, np.int64), *sizes])
        assert len(joined) == np.count_nonzero(data.labels != IGNORE), (
            "a label has bytes or is none"
        )
        return joined

    def __call__(self, data: ShardData) -> TextChunks:
        """The chunks of some rows.

        Args:
            data: rows of a batch, in order.
        """
        sizes = data.label_bytes if isinstance(data, TextShard) else None
        assert sizes is not None, "a stream with text knows the bytes of all its labels"
        at = np.flatnonzero(sizes >= 0)
        known = None
        if data.label_logprob is not None:
            known = decode_logprobs(data.label_logprob).astype(np.float64)[at]
        return TextChunks(at, at + 1, sizes[at], known)


Text = TypeVar("Text")


class ShardRows:
    """Rows of some shards, numbered one shard after another.

    Attributes:
        first: int64 [shards + 1], the number of each shard's first row.
        positions: int64 [rows], what the loss of each row is a sum over; see `positions_of`.
    """

    def __init__(
        self,
        parts: Sequence[ShardData],
        *,
        soft: bool = True,
        labels: bool = True,
        aligned: Sequence[AlignedRows] | None = None,
        label_bytes: Sequence[np.ndarray] | None = None,
    ) -> None:
        """Number the rows; no column is copied.

        Args:
            parts: shards of one task and codec.
            soft: False leaves the soft targets out of every pick.
            labels: False leaves `label_logprob` out of every pick.
            aligned: the rows of each shard as a student of another tokenizer reads them.
            label_bytes: of each shard what its picks have of it as a `TextShard`.
        """
        if soft:
            alike = SoftTargets.alike([part.targets for part in parts])
            parts = [
                part if targets is part.targets else replace(part, targets=targets)
                for part, targets in zip(parts, alike, strict=True)
            ]
        self._parts, self._soft, self._labels = parts, soft, labels
        self.first = np.cumsum([0, *(len(part) for part in parts)])
        self._aligned, self._label_bytes = aligned, label_bytes
        self.positions = (
            np.concatenate([positions_of(part, soft=soft) for part in parts])
            if aligned is None
            else np.concatenate([rows.positions for rows in aligned])
        )
        self._owner = np.repeat(np.arange(len(parts)), np.diff(self.first))
        offsets = [
            {"token": part.offsets, "row": np.arange(len(part) + 1)}
            | ({} if part.source_offsets is None else {"source": part.source_offsets})
            | (part.item_offsets if soft else {"position": part.position_offsets})
            for part in parts
        ]
        self._begin = {a: np.concatenate([o[a][:-1] for o in offsets]) for a in offsets[0]}
        self._end = {a: np.concatenate([o[a][1:] for o in offsets]) for a in offsets[0]}

    def __len__(self) -> int:
        return len(self._owner)

    def take(self, rows: np.ndarray) -> ShardData:
        """Some rows, in the given order; repetition is fine.

        Args:
            rows: int64 [n], n being 1 or more.
        """
        owner = self._owner[rows].tolist()
        runs = {
            axis: list(zip(owner, begin[rows].tolist(), end[rows].tolist(), strict=True))
            for (axis, begin), end in zip(self._begin.items(), self._end.values(), strict=True)
        }

        def pick(columns: Sequence[np.ndarray], axis: str) -> np.ndarray:
            return np.concatenate([columns[part][a:b] for part, a, b in runs[axis]])

        def pick_texts(columns: Sequence[list[Text] | None], none: Text) -> list[Text] | None:
            if all(column is None for column in columns):
                return None
            chosen = ((columns[part], row) for part, row, _ in runs["row"])
            return [column[row] if column else none for column, row in chosen]

        parts = self._parts
        targets = SoftTargets.empty(SoftTargets.codec_of([part.targets for part in parts]))
        if self._soft:
            for column in targets.codec.columns:
                targets.columns[column.name] = pick(
                    [part.targets.columns[column.name] for part in parts], column.per
                )
            targets.rank_to_id = parts[0].targets.rank_to_id
        typed = any(part.type_ids is not None for part in parts)
        divided = any(part.starts is not None for part in parts)
        kept = [part.label_logprob for part in parts if part.label_logprob is not None]
        firsts = [part.first for part in parts if part.first is not None]
        keeps = self._labels and len(kept) == len(parts)
        sources = [part.source for part in parts if part.source is not None]
        of_sources = None
        if sources:
            of_sources = np.cumsum([0, *(self._end["source"][rows] - self._begin["source"][rows])])
        lengths = self._end["token"][rows] - self._begin["token"][rows]
        data = ShardData(
            task=parts[0].task,
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            input_ids=pick([part.input_ids for part in parts], "token"),
            labels=pick(
                [part.labels for part in parts],
                "token" if TASKS[parts[0].task].per_token else "row",
            ),
            targets=targets,
            type_ids=pick([types_of(part) for part in parts], "token") if typed else None,
            texts=pick_texts([part.texts for part in parts], ""),
            text_pairs=pick_texts([part.text_pairs for part in parts], ""),
            label_logprob=pick(kept, "position") if keeps else None,
            starts=pick([starts_of(part) for part in parts], "token") if divided else None,
            words=pick_texts([part.words for part in parts], ()),
            first=pick(firsts, "token") if firsts else None,
            source=pick(sources, "source") if sources else None,
            source_offsets=of_sources,
        )
        if self._label_bytes is not None:
            return TextShard(**vars(data), label_bytes=pick(self._label_bytes, "position"))
        if self._aligned is None:
            return data
        chosen = [self._aligned[part].take(row) for part, row, _ in runs["row"]]
        return AlignedShard(**vars(data), aligned=AlignedRows.concat(chosen))


def positions_of(data: ShardData, *, soft: bool) -> np.ndarray:
    """How many soft targets, or else hard labels, each row has: what its loss is a sum over.

    Returns:
        int64 [rows].
    """
    there = labelled(data.labels, data.task)
    if not TASKS[data.task].per_token:
        return np.ones(len(data), np.int64) if soft else there.astype(np.int64)
    if soft or TASKS[data.task].causal:
        return np.diff(data.position_offsets)
    before = np.concatenate([[0], np.cumsum(there)])
    return np.asarray(np.diff(before[data.offsets]))


def types_of(data: ShardData) -> np.ndarray:
    """uint8 [tokens]: sentence A or B, all A if the shard has no types."""
    if data.type_ids is None:
        return np.zeros(len(data.input_ids), np.uint8)
    return data.type_ids


def starts_of(data: ShardData) -> np.ndarray:
    """bool [tokens]: where documents begin, at the first token of each row if it is not divided."""
    if data.starts is not None:
        return data.starts
    starts = np.zeros(len(data.input_ids), np.bool_)
    starts[data.offsets[:-1]] = True
    return starts
