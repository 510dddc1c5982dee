"""One shard: an immutable HDF5 file with the rows of one span and their soft targets.

Ragged data is stored as flat columns with counts or offsets; every column is chunked and passes
through shuffle + gzip + fletcher32, filters that each HDF5 build has, so one flipped bit raises
instead of giving wrong numbers. `docs/format.md` specifies the layout. This module alone imports
h5py.

Cost: a shard is written and read whole, in one pass over its columns; memory is the shard's decoded
size.
Guarantee: the same content gives the same bytes (no times, no names of machines inside).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from kdcache.errors import CorruptCacheError
from kdcache.rows import IGNORE, Row
from kdcache.targets import Codec, SoftTargets

FORMAT = 1
_CHUNK_BYTES = 1 << 19
_DEFLATE_LIMIT = 1100
_CAUSAL = "causal-lm"


@dataclass
class ShardData:
    """The rows of one shard in memory, columnar.

    Attributes:
        task: `causal-lm` or `sequence-classification`.
        offsets: int64 [rows + 1], where each row's tokens begin.
        input_ids: int32 [tokens].
        labels: int32, aligned with the logits: [tokens] for causal-lm, [rows] for classification;
            -100 where there is none.
        targets: the soft targets of all positions, in row-major order.
        type_ids: uint8 [tokens] (BERT's sentence A/B), or None.
        texts: the text of each row (classification only), or None.
        text_pairs: the second text of each row, or None.
    """

    task: str
    offsets: np.ndarray
    input_ids: np.ndarray
    labels: np.ndarray
    targets: SoftTargets
    type_ids: np.ndarray | None = None
    texts: list[str] | None = None
    text_pairs: list[str] | None = None

    @classmethod
    def from_rows(cls, task: str, rows: Sequence[Row], targets: SoftTargets) -> ShardData:
        """Gather rows, whose positions `targets` holds in the same order, into columns."""
        lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int64)
        data = cls(
            task=task,
            offsets=_offsets(lengths),
            input_ids=_concatenate([row.input_ids for row in rows], np.int32),
            labels=_concatenate([row.labels for row in rows], np.int32),
            targets=targets,
        )
        typed = [row.type_ids for row in rows if row.type_ids is not None]
        if typed:
            assert len(typed) == len(rows), "either every row has type ids or none"
            data.type_ids = _concatenate(typed, np.uint8)
        if task != _CAUSAL:
            data.texts = [row.text or "" for row in rows]
            if any(row.text_pair is not None for row in rows):
                data.text_pairs = [row.text_pair or "" for row in rows]
        assert len(targets) == data.position_offsets[-1], "one soft target a position"
        return data

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def position_offsets(self) -> np.ndarray:
        """int64 [rows + 1]: where each row's positions begin in `targets`."""
        if self.task != _CAUSAL:
            return np.arange(len(self) + 1, dtype=np.int64)
        before = np.concatenate([[0], np.cumsum(self.labels != IGNORE, dtype=np.int64)])
        return np.asarray(before[self.offsets])

    def row(self, index: int) -> Row:
        """One row as the encoder made it."""
        tokens = slice(self.offsets[index], self.offsets[index + 1])
        causal = self.task == _CAUSAL
        return Row(
            input_ids=self.input_ids[tokens],
            labels=self.labels[tokens] if causal else self.labels[index : index + 1],
            type_ids=None if self.type_ids is None else self.type_ids[tokens],
            text=None if self.texts is None else self.texts[index],
            text_pair=None if self.text_pairs is None else self.text_pairs[index],
        )


@dataclass(frozen=True)
class ShardCounts:
    """What a manifest promises of a shard; checked before memory is taken for its columns."""

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
        file.attrs["format"] = "kdcache-shard"
        file.attrs["version"] = FORMAT
        file.attrs["task"] = data.task
        file.attrs["codec"] = str(data.targets.codec)
        file.attrs["span"] = json.dumps(attributes, sort_keys=True)
        file.attrs["rows"] = len(data)
        file.attrs["tokens"] = len(data.input_ids)
        file.attrs["positions"] = len(data.targets)
        rows = file.create_group("rows")
        _write(rows, "lengths", np.diff(data.offsets).astype(np.uint32))
        largest = int(data.input_ids.max(initial=0))
        _write(rows, "input_ids", data.input_ids.astype(np.min_scalar_type(largest)))
        if data.type_ids is not None:
            _write(rows, "type_ids", data.type_ids)
        if data.task == _CAUSAL:
            has_label, next_ids = _split_labels(data)
            _write(rows, "has_label", has_label)
            _write(rows, "next_ids", next_ids)
        else:
            _write(rows, "labels", data.labels.astype(np.int32))
        for name, texts in (("text", data.texts), ("text_pair", data.text_pairs)):
            if texts is not None:
                encoded = [text.encode() for text in texts]
                _write(rows, f"{name}_bytes", np.array([len(t) for t in encoded], np.uint32))
                _write(rows, name, np.frombuffer(b"".join(encoded), np.uint8))
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
    with_targets: bool = True,
) -> ShardData:
    """Read one shard whole.

    Args:
        path: a committed shard file.
        codec: the cache's codec; the file must have been written with it.
        counts: what the manifest says; compared before any column is read.
        ranks: the cache's table from frequency rank to id, where it has one.
        with_targets: False reads no column of the targets and leaves them empty.

    Raises:
        CorruptCacheError: not a shard, other counts than promised, or a failing checksum.
    """
    with _open(path) as file:
        if _attribute(path, file, "format") != "kdcache-shard":
            raise CorruptCacheError(f"{path} is not a kdcache shard.")
        version = _attribute(path, file, "version")
        if version != FORMAT:
            raise CorruptCacheError(
                f"{path} has format version {version}; this kdcache reads version {FORMAT}."
            )
        if _attribute(path, file, "codec") != str(codec):
            found = _attribute(path, file, "codec")
            raise CorruptCacheError(
                f"{path} was written with codec {found}, the cache has {codec}."
            )
        found_counts = shard_counts(path, file)
        if counts is not None and counts != found_counts:
            raise CorruptCacheError(f"{path} holds {found_counts}, the manifest says {counts}.")
        task = _attribute(path, file, "task")
        n = found_counts
        rows = file["rows"]
        offsets = _offsets(_read(path, rows, "lengths", n.rows).astype(np.int64))
        if offsets[-1] != n.tokens:
            raise CorruptCacheError(f"{path}: row lengths add up to {offsets[-1]}, not {n.tokens}.")
        input_ids = _read(path, rows, "input_ids", n.tokens).astype(np.int32)
        if task == _CAUSAL:
            labels = _join_labels(
                offsets,
                input_ids,
                _read(path, rows, "has_label", n.tokens),
                _read(path, rows, "next_ids", n.rows),
            )
        else:
            labels = _read(path, rows, "labels", n.rows)
        targets = SoftTargets.empty(codec)
        if with_targets:
            columns = _read_targets(path, file["targets"], codec, n.positions)
            targets = SoftTargets(codec, columns, ranks)
        data = ShardData(
            task=task,
            offsets=offsets,
            input_ids=input_ids,
            labels=labels,
            targets=targets,
            type_ids=_read(path, rows, "type_ids", n.tokens) if "type_ids" in rows else None,
            texts=_read_texts(path, rows, "text", n.rows),
            text_pairs=_read_texts(path, rows, "text_pair", n.rows),
        )
    if data.position_offsets[-1] != n.positions:
        raise CorruptCacheError(
            f"{path}: its labels make {data.position_offsets[-1]} positions, not {n.positions}."
        )
    return data


def read_counts(path: Path) -> tuple[ShardCounts, dict[str, Any]]:
    """Counts and span attributes of a shard file, without reading a column."""
    with _open(path) as file:
        return shard_counts(path, file), json.loads(_attribute(path, file, "span"))


def column_bytes(path: Path) -> dict[str, int]:
    """Stored (compressed) bytes of each dataset, by its name such as `targets/ids`."""
    sizes: dict[str, int] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            sizes[name] = int(item.id.get_storage_size())

    with _open(path) as file:
        file.visititems(visit)
    return sizes


def shard_counts(path: Path, file: Any) -> ShardCounts:
    """The counts an open shard file declares."""
    values = (_attribute(path, file, name) for name in ("rows", "tokens", "positions"))
    return ShardCounts(*(int(v) for v in values))


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        # Readers on network file systems must not depend on file locks.
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except FileNotFoundError as error:
        raise CorruptCacheError(
            f"{path} is missing. Run the same build again to make it anew."
        ) from error
    except (OSError, KeyError, RuntimeError) as error:
        raise CorruptCacheError(
            f"{path} cannot be read ({error}). Delete the file and run the same build again: "
            "only this shard is made anew."
        ) from error


def _attribute(path: Path, file: Any, name: str) -> Any:
    if name not in file.attrs:
        raise CorruptCacheError(f"{path} has no attribute {name!r}: it is not a kdcache shard.")
    return file.attrs[name]


def _write(group: Any, name: str, array: np.ndarray) -> None:
    if array.size == 0:  # HDF5 cannot chunk nothing
        group.create_dataset(name, data=array)
        return
    row_bytes = array.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
    length = min(len(array), max(1, _CHUNK_BYTES // row_bytes))
    group.create_dataset(
        name,
        data=array,
        chunks=(length, *array.shape[1:]),
        compression="gzip",
        compression_opts=4,
        shuffle=True,
        fletcher32=True,
    )


def _read(path: Path, group: Any, name: str, length: int | None) -> np.ndarray:
    dataset = group[name]
    if length is not None and len(dataset) != length:
        raise CorruptCacheError(f"{path}: column {name} has {len(dataset)} values, not {length}.")
    # Deflate cannot shrink below 1/1032: a small file that claims more is lying about its length.
    if dataset.nbytes > _DEFLATE_LIMIT * dataset.id.get_storage_size():
        raise CorruptCacheError(
            f"{path}: column {name} claims {dataset.nbytes} bytes, more than its stored bytes can "
            f"hold."
        )
    return np.asarray(dataset[...])


def _read_targets(path: Path, group: Any, codec: Codec, positions: int) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {}
    for column in codec.columns:
        found = group[column.name].dtype
        if found != column.dtype:
            raise CorruptCacheError(
                f"{path}: column {column.name} is {found}, the codec has {column.dtype}."
            )
        length = positions if column.per == "position" else None
        columns[column.name] = _read(path, group, column.name, length)
    counts = codec.counts(columns)
    for column in codec.columns:
        if column.per == "position":
            continue
        items = int(counts[column.per].sum())
        if items != len(columns[column.name]):
            raise CorruptCacheError(
                f"{path}: column {column.name} has {len(columns[column.name])} values, its counts "
                f"make {items}."
            )
    return columns


def _split_labels(data: ShardData) -> tuple[np.ndarray, np.ndarray]:
    """Causal labels repeat the input ids one place later: store where they are and each row's
    last.
    """
    has_label = data.labels != IGNORE
    last = data.offsets[1:] - 1
    inner = has_label.copy()
    inner[last] = False
    where = np.flatnonzero(inner)
    assert np.array_equal(data.labels[where], data.input_ids[where + 1]), "labels are the next ids"
    return has_label.astype(np.uint8), data.labels[last].astype(np.int32)


def _join_labels(
    offsets: np.ndarray, input_ids: np.ndarray, has_label: np.ndarray, next_ids: np.ndarray
) -> np.ndarray:
    labels = np.full(len(input_ids), IGNORE, np.int32)
    labels[:-1] = input_ids[1:]
    labels[offsets[1:] - 1] = next_ids
    labels[has_label == 0] = IGNORE
    return labels


def _read_texts(path: Path, rows: Any, name: str, count: int) -> list[str] | None:
    if name not in rows:
        return None
    ends = np.cumsum(_read(path, rows, f"{name}_bytes", count), dtype=np.int64)
    blob = _read(path, rows, name, int(ends[-1]) if count else 0).tobytes()
    starts = [0, *ends[:-1]]
    return [blob[a:b].decode() for a, b in zip(starts, ends, strict=True)]


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _concatenate(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype)
