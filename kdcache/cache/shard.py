"""One shard: an immutable HDF5 file with the rows of one span and their soft targets.

Ragged data is stored as flat columns with counts or offsets. Every column is chunked and passes
through shuffle + gzip + fletcher32, filters that each HDF5 build has, so a flipped bit raises an
error instead of giving wrong numbers. `docs/format.md` specifies the layout. `kdcache.cache.hdf5`
checks what may be in a file at all; this module checks the columns' contents.

Cost: a shard is written and read whole, in one pass over its columns; memory is the shard's decoded
size.
Guarantee: the same content gives the same bytes (no times, no machine names inside).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from kdcache.cache.columns import (
    join_rows,
    label_columns,
    narrow,
    read_labels,
    read_texts,
    read_words,
    write_labels,
    write_texts,
    write_words,
)
from kdcache.cache.hdf5 import attribute, columns_of, open_file, write_text
from kdcache.cache.hdf5 import read_column as _read
from kdcache.cache.hdf5 import write_column as _write
from kdcache.errors import CorruptCacheError
from kdcache.rows import Row
from kdcache.targets import Codec, SoftTargets
from kdcache.tasks import IGNORE, TASKS, positions

FORMAT = 1
_REQUIRED = ("lengths", "input_ids")
_TEXTS = ("text_bytes", "text")
_WORDS = ("first_tokens", "words_bytes", "words")
_OPTIONAL = ("type_ids", "text_pair_bytes", "text_pair")
_LABEL_LOGPROB = ("label_logprob",)
_STARTS = ("starts",)
_SOURCES = ("source_lengths", "source_ids")
_MEMORY = 1 << 30  # that reading any shard may take
_MEMORY_PER_BYTE = 64  # of the file, for those that need more; real ones take at most 27
_U1, _U2, _U4, _I4 = ("|u1",), ("<u2",), ("<u4",), ("<i4",)
_IDS = (*_U1, *_U2, *_U4)


@dataclass
class ShardData:
    """The rows of one shard in memory, columnar.

    Attributes:
        task: one of `kdcache.tasks.TASKS`.
        offsets: int64 [rows + 1], where each row's tokens begin.
        input_ids: int32 [tokens].
        labels: aligned with the logits: int32 [tokens] or [rows], as the task has them, -100 where
            there is none; of several labels a row int32 [rows, classes], 1, 0 or -100 where it is
            not known; of scores float32 [rows], NaN where there is none.
        targets: the soft targets of all positions, in row-major order.
        type_ids: uint8 [tokens] (BERT's sentence A/B), or None.
        texts: the text of each row, or None where the task keeps none.
        text_pairs: the second text of each row, or None.
        label_logprob: uint16 [positions], codes of the teacher's log-probability of each label (see
            `kdcache.targets.label_logprob`), or None where the cache keeps none.
        starts: bool [tokens], where a document begins that attends to no other one of its row, or
            None where rows are not divided.
        words: the words of each row, or None where the task keeps none.
        first: bool [tokens], the first token of each word, or None likewise.
        source: int32 [source tokens], what an encoder reads, row by row; None where the task has
            no source.
        source_offsets: int64 [rows + 1], where each row's source begins, or None likewise.
    """

    task: str
    offsets: np.ndarray
    input_ids: np.ndarray
    labels: np.ndarray
    targets: SoftTargets
    type_ids: np.ndarray | None = None
    texts: list[str] | None = None
    text_pairs: list[str] | None = None
    label_logprob: np.ndarray | None = None
    starts: np.ndarray | None = None
    words: list[tuple[str, ...]] | None = None
    first: np.ndarray | None = None
    source: np.ndarray | None = None
    source_offsets: np.ndarray | None = None

    @classmethod
    def from_rows(
        cls,
        task: str,
        rows: Sequence[Row],
        targets: SoftTargets,
        label_logprob: np.ndarray | None = None,
    ) -> ShardData:
        """Gather rows into columns; `targets` and `label_logprob` have their positions in order."""
        lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int64)
        data = cls(
            task=task,
            offsets=_offsets(lengths),
            input_ids=_concatenate([row.input_ids for row in rows], np.int32),
            labels=join_rows([row.labels for row in rows], task, targets.codec.vocab_size),
            targets=targets,
            label_logprob=label_logprob,
        )
        typed = [row.type_ids for row in rows if row.type_ids is not None]
        if typed:
            assert len(typed) == len(rows), "either every row has type ids or none"
            data.type_ids = _concatenate(typed, np.uint8)
        divided = [row.starts for row in rows if row.starts is not None]
        if divided:
            assert len(divided) == len(rows), "either every row is divided or none"
            data.starts = _concatenate(divided, np.bool_)
        if TASKS[task].texts:
            data.texts = [row.text or "" for row in rows]
            if any(row.text_pair is not None for row in rows):
                data.text_pairs = [row.text_pair or "" for row in rows]
        if TASKS[task].words:
            data.words = [row.words or () for row in rows]
            data.first = _concatenate(
                [row.first for row in rows if row.first is not None], np.bool_
            )
        if TASKS[task].source:
            sources = [row.source for row in rows if row.source is not None]
            assert len(sources) == len(rows), "every row has a source"
            data.source = _concatenate(sources, np.int32)
            data.source_offsets = _offsets(np.array([len(ids) for ids in sources], np.int64))
        assert len(targets) == data.position_offsets[-1], "one soft target a position"
        assert label_logprob is None or len(label_logprob) == len(targets), "one a position"
        return data

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def position_offsets(self) -> np.ndarray:
        """int64 [rows + 1]: where each row's positions begin in `targets`."""
        if not TASKS[self.task].per_token:
            return np.arange(len(self) + 1, dtype=np.int64)
        before = np.zeros(len(self.labels) + 1, np.int64)
        np.cumsum(positions(self.labels, self.task), out=before[1:])
        return np.asarray(before[self.offsets])

    @cached_property
    def item_offsets(self) -> dict[str, np.ndarray]:
        """int64 [rows + 1] by axis of the targets: where each row's items begin in its columns."""
        return self.targets.offsets(self.position_offsets)

    def row(self, index: int) -> Row:
        """One row as the encoder made it."""
        tokens = slice(self.offsets[index], self.offsets[index + 1])
        per_token = TASKS[self.task].per_token
        return Row(
            input_ids=self.input_ids[tokens],
            labels=self.labels[tokens] if per_token else self.labels[index : index + 1],
            type_ids=None if self.type_ids is None else self.type_ids[tokens],
            text=None if self.texts is None else self.texts[index],
            text_pair=None if self.text_pairs is None else self.text_pairs[index],
            starts=None if self.starts is None else self.starts[tokens],
            words=None if self.words is None else self.words[index],
            first=None if self.first is None else self.first[tokens],
            source=self._source_of(index),
        )

    def _source_of(self, index: int) -> np.ndarray | None:
        if self.source is None or self.source_offsets is None:
            return None
        return self.source[self.source_offsets[index] : self.source_offsets[index + 1]]


@dataclass(frozen=True)
class ShardCounts:
    """A shard's counts in the manifest; checked before memory is allocated for its columns."""

    rows: int
    tokens: int
    positions: int


def write_shard(path: Path, data: ShardData, *, attributes: Mapping[str, Any]) -> None:
    """Write one shard file at `path` (a scratch name: commit it afterwards).

    Args:
        path: the file to create.
        data: rows and targets.
        attributes: JSON-able facts of the span, kept in the file's `span` attribute.

    Raises:
        OSError: the disk refused.
    """
    path.write_bytes(shard_bytes(data, attributes=attributes))


def shard_bytes(data: ShardData, *, attributes: Mapping[str, Any]) -> bytes:
    """The content of one shard file.

    HDF5 composes it in memory: where a disk is full, HDF5 itself cannot close its file any more and
    takes the process down when it exits.
    """
    # The name never meets a disk, but two open files of one process may not share it.
    with h5py.File(uuid.uuid4().hex, "w", driver="core", backing_store=False) as file:
        write_text(file, "format", "kdcache-shard")
        file.attrs["version"] = FORMAT
        write_text(file, "task", data.task)
        write_text(file, "codec", str(data.targets.codec))
        write_text(file, "span", json.dumps(attributes, sort_keys=True))
        file.attrs["rows"] = len(data)
        file.attrs["tokens"] = len(data.input_ids)
        file.attrs["positions"] = len(data.targets)
        rows = file.create_group("rows")
        _write(rows, "lengths", np.diff(data.offsets).astype(np.uint32))
        _write(rows, "input_ids", narrow(data.input_ids))
        if data.type_ids is not None:
            _write(rows, "type_ids", data.type_ids)
        if data.source is not None and data.source_offsets is not None:
            _write(rows, "source_lengths", np.diff(data.source_offsets).astype(np.uint32))
            _write(rows, "source_ids", narrow(data.source))
        write_labels(rows, data.task, data.labels, data.offsets, data.input_ids)
        if data.label_logprob is not None:
            _write(rows, "label_logprob", data.label_logprob)
        if data.starts is not None:
            _write(rows, "starts", data.starts.astype(np.uint8))
        for name, texts in (("text", data.texts), ("text_pair", data.text_pairs)):
            if texts is not None:
                write_texts(rows, name, texts)
        if data.words is not None and data.first is not None:
            write_words(rows, data.words, data.first)
        targets = file.create_group("targets")
        for column in data.targets.codec.columns:
            _write(targets, column.name, data.targets.columns[column.name])
        file.flush()
        return bytes(file.id.get_file_image())


def read_shard(
    path: Path,
    codec: Codec,
    *,
    counts: ShardCounts | None = None,
    ranks: np.ndarray | None = None,
    label_logprob: bool = False,
    starts: bool = False,
    with_targets: bool = True,
) -> ShardData:
    """Read one shard whole.

    Args:
        path: a committed shard file.
        codec: the cache's codec; the file must have been written with it.
        counts: what the manifest says; compared before any column is read.
        ranks: the cache's table from frequency rank to id, where it has one.
        label_logprob: whether the cache keeps the log-probability of each label.
        starts: whether the documents of its rows do not attend to each other.
        with_targets: False reads no column of the targets and leaves them empty.

    Raises:
        CorruptCacheError: not a shard, other counts than promised, or a failing checksum.
    """
    with open_file(path) as file:
        n, task = _check_head(path, file, codec, counts)
        _check_memory(path, file, n)
        kind = TASKS[task]
        required = (
            *(_REQUIRED + label_columns(task) + _TEXTS * kind.texts),
            *(_WORDS * kind.words + _SOURCES * kind.source),
            *(_LABEL_LOGPROB * label_logprob + _STARTS * starts),
        )
        rows = columns_of(path, file, "rows", required, _OPTIONAL)
        lengths = _read(path, rows, "lengths", _U4, n.rows)
        offsets = _offsets(lengths.astype(np.int64))
        if offsets[-1] != n.tokens:
            raise CorruptCacheError(f"{path}: row lengths add up to {offsets[-1]}, not {n.tokens}.")
        if kind.per_token and not lengths.all():
            raise CorruptCacheError(f"{path}: it has rows without tokens.")
        input_ids = _read(path, rows, "input_ids", _IDS, n.tokens).astype(np.int32)
        labels = read_labels(path, rows, task, offsets, input_ids, n.positions, codec.vocab_size)
        logprobs = None
        if label_logprob:
            logprobs = _read(path, rows, "label_logprob", _U2, n.positions)
        words, first = None, None
        if kind.words:
            words, first = read_words(path, rows, offsets, labels)
        source, source_offsets = _read_source(path, rows, n.rows) if kind.source else (None, None)
        targets = SoftTargets.empty(codec)
        if with_targets:
            group = columns_of(path, file, "targets", [c.name for c in codec.columns])
            columns = _read_targets(path, group, codec, n.positions)
            targets = SoftTargets(codec, columns, ranks)
        data = ShardData(
            task=task,
            offsets=offsets,
            input_ids=input_ids,
            labels=labels,
            targets=targets,
            type_ids=_read(path, rows, "type_ids", _U1, n.tokens) if "type_ids" in rows else None,
            texts=read_texts(path, rows, "text", n.rows),
            text_pairs=read_texts(path, rows, "text_pair", n.rows),
            label_logprob=logprobs,
            starts=_read_starts(path, rows, offsets, labels) if starts else None,
            words=words,
            first=first,
            source=source,
            source_offsets=source_offsets,
        )
    if data.position_offsets[-1] != n.positions:
        raise CorruptCacheError(
            f"{path}: its labels make {data.position_offsets[-1]} positions, not {n.positions}."
        )
    if with_targets:
        _check_items(path, data)
    return data


def _check_head(
    path: Path, file: h5py.File, codec: Codec, counts: ShardCounts | None
) -> tuple[ShardCounts, str]:
    """Compare the file's attributes with the expected ones; returns its counts and its task."""
    if attribute(path, file, "format", str) != "kdcache-shard":
        raise CorruptCacheError(f"{path} is not a kdcache shard.")
    version = attribute(path, file, "version", int)
    if version != FORMAT:
        raise CorruptCacheError(
            f"{path} has format version {version}; this kdcache reads version {FORMAT}."
        )
    found = attribute(path, file, "codec", str)
    if found != str(codec):
        raise CorruptCacheError(f"{path} was written with codec {found}, the cache has {codec}.")
    found_counts = shard_counts(path, file)
    if counts is not None and counts != found_counts:
        raise CorruptCacheError(f"{path} holds {found_counts}, the manifest says {counts}.")
    task = attribute(path, file, "task", str)
    if task not in TASKS:
        raise CorruptCacheError(f"{path} has rows of the unknown task {task!r}.")
    return found_counts, task


def _check_memory(path: Path, file: h5py.File, n: ShardCounts) -> None:
    """Refuse a shard whose columns, once decoded, take memory out of proportion to its file.

    Deflate packs a thousand zeros into a byte, and a reader widens each to several numbers.
    """
    decoded = sum(size for _, size in _columns(file, lambda item: int(item.nbytes)))
    need = 64 * (n.tokens + n.positions) + 256 * n.rows + 16 * decoded
    allowed = max(_MEMORY, _MEMORY_PER_BYTE * path.stat().st_size)
    if need > allowed:
        raise CorruptCacheError(
            f"{path} needs up to {need} bytes of memory, a shard of its size may need {allowed}. "
            "Do not use it."
        )


def read_counts(path: Path) -> tuple[ShardCounts, dict[str, Any]]:
    """Counts and span attributes of a shard file, without reading a column."""
    with open_file(path) as file:
        facts = json.loads(attribute(path, file, "span", str))
        if not isinstance(facts, dict):
            raise CorruptCacheError(f"{path}: its attribute 'span' is not a JSON object.")
        return shard_counts(path, file), facts


def column_bytes(path: Path) -> dict[str, int]:
    """Stored (compressed) bytes of each dataset, by its name such as `targets/ids`."""
    with open_file(path) as file:
        return dict(_columns(file, lambda item: int(item.id.get_storage_size())))


def _columns(file: h5py.File, measure: Callable[[Any], int]) -> list[tuple[str, int]]:
    """Name and measure of each dataset of an open file."""
    found: list[tuple[str, int]] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape is not None:
            found.append((name, measure(item)))

    file.visititems(visit)
    return found


def shard_counts(path: Path, file: Any) -> ShardCounts:
    """The counts an open shard file declares."""
    return ShardCounts(
        *(attribute(path, file, name, int) for name in ("rows", "tokens", "positions"))
    )


def _read_targets(path: Path, group: Any, codec: Codec, positions: int) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {}
    for stored in codec.columns:
        kinds = (np.dtype(stored.dtype).str,)
        length = positions if stored.per == "position" else None
        columns[stored.name] = _read(path, group, stored.name, kinds, length, *stored.shape)
    return columns


def _check_items(path: Path, data: ShardData) -> None:
    """Compare the ragged columns with the counts of the positions."""
    try:
        ends = {axis: int(offsets[-1]) for axis, offsets in data.item_offsets.items()}
    except IndexError as error:
        raise CorruptCacheError(
            f"{path}: the counts of its targets do not match the columns that they count."
        ) from error
    for stored in data.targets.codec.columns:
        found = len(data.targets.columns[stored.name])
        if found != ends[stored.per]:
            raise CorruptCacheError(
                f"{path}: column {stored.name} has {found} values, expected {ends[stored.per]} by "
                f"its counts."
            )


def _read_starts(path: Path, rows: Any, offsets: np.ndarray, labels: np.ndarray) -> np.ndarray:
    flags = _read(path, rows, "starts", _U1, len(labels))
    if flags.max(initial=0) > 1 or not flags[offsets[:-1]].all():
        raise CorruptCacheError(f"{path}: column starts does not mark the first token of each row.")
    starts = flags.astype(np.bool_)
    within = starts.copy()
    within[offsets[:-1]] = False
    if (labels[:-1][within[1:]] != IGNORE).any():
        raise CorruptCacheError(f"{path}: a document's last token has a label of the next one.")
    return starts


def _read_source(path: Path, rows: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the sources, row by row, and int64 [rows + 1], where each begins."""
    lengths = _read(path, rows, "source_lengths", _U4, count)
    if not lengths.all():
        raise CorruptCacheError(f"{path}: it has rows without a source.")
    offsets = _offsets(lengths.astype(np.int64))
    ids = _read(path, rows, "source_ids", _IDS, int(offsets[-1]))
    return ids.astype(np.int32), offsets


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _concatenate(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype)
