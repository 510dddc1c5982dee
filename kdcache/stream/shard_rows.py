"""Rows of some shards, to be picked in any order.

Cost: a row is a stretch of each column, and a pick copies stretches: long rows cost what copying
their memory costs, short ones some microseconds each.
Guarantee: a pick has the columns of a shard, its positions in the order of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from kdcache.cache.shard import ShardData
from kdcache.stream.aligned import AlignedRows, AlignedShard
from kdcache.stream.text import TextShard
from kdcache.targets import SoftTargets
from kdcache.tasks import TASKS, labelled

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
