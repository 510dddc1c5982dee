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

import hashlib
import json
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import h5py
import numpy as np

from kdcache.cache.columns import (
    IDS,
    Columns,
    HardLabels,
    LabelColumn,
    Numbers,
    Offsets,
    OpenRows,
    Texts,
    Words,
    answer_sums,
    check_first,
    check_starts,
    check_sums,
    extra,
    first_of_rows,
    offsets_of,
)
from kdcache.cache.hdf5 import (
    EARLIER,
    attribute,
    columns_of,
    open_file,
    write_text,
    written_as,
)
from kdcache.cache.hdf5 import read_column as _read
from kdcache.cache.hdf5 import write_column as _write
from kdcache.errors import CorruptCacheError
from kdcache.rows import Row
from kdcache.targets import Codec, SoftTargets
from kdcache.tasks import IGNORE, TASKS, labelled, positions

if TYPE_CHECKING:
    from kdcache.cache.spec import CacheSpec

FORMAT = 1
_MEMORY = 1 << 30  # that reading any shard may take
_MEMORY_PER_BYTE = 64  # of the file, for those that need more; real ones take at most 27


@dataclass(kw_only=True)
class ShardData(Columns):
    """The rows of one shard in memory, columnar. Columns are in the order of the file.

    Attributes:
        targets: the soft targets of all positions, in row-major order.
        offsets: int64 [rows + 1], where each row's tokens begin.
        input_ids: int32 [tokens].
        type_ids: uint8 [tokens] (BERT's sentence A/B), or None.
        source_offsets: int64 [rows + 1], where each row's source begins; None where the task has
            no source.
        source: int32 [source tokens], what an encoder reads, row by row, or None likewise.
        labels: aligned with the logits: int32 [tokens] or [rows], as the task has them, -100 where
            there is none; of several labels a row int32 [rows, classes], 1, 0 or -100 where it is
            not known; of scores float32 [rows], NaN where there is none.
        label_logprob: uint16 [positions], codes of the teacher's log-probability of each label (see
            `kdcache.targets.label_logprob`), or None where the cache keeps none.
        writer_logprob: uint16 [positions], codes of the log-probability of each label by the model
            that drew it, or None where that is not known.
        entropy: uint8 [positions], codes of the teacher's entropy (see
            `kdcache.targets.label_logprob`), or None where the cache keeps none.
        hard_labels: int32 [tokens], labels of tokens that have no soft target since their teacher
            was sure, -100 elsewhere; None of a cache that keeps the targets of all.
        hard_logprob: uint16, their `label_logprob`, or None likewise.
        answer_logprob: float32 [rows], the sum of the teacher's log-probabilities of each row's
            answer, see `answer_sums`, before they became codes; None where the cache keeps none.
        starts: bool [tokens], where a document begins that attends to no other one of its row, or
            None where rows are not divided.
        first: bool [tokens], the first token of each word; None where the task keeps no words.
        words: the words of each row, or None likewise.
        label_bytes: int64 [positions], bytes of text of each label, -1 where it is not text; None
            but in a stream that counts them.
    """

    task: str
    targets: SoftTargets
    offsets: Annotated[np.ndarray, Offsets("token", "input_ids", "lengths")]
    input_ids: Annotated[np.ndarray, Numbers("token", "input_ids", "input_ids", kinds=IDS)]
    type_ids: Annotated[
        np.ndarray | None,
        Numbers("token", "type_ids", "type_ids", when=None, fill=0, dtype="uint8"),
    ] = None
    source_offsets: Annotated[
        np.ndarray | None,
        Offsets("source", "source", "source_lengths", when="source", noun="a source"),
    ] = None
    source: Annotated[
        np.ndarray | None, Numbers("source", "source", "source_ids", when="source", kinds=IDS)
    ] = None
    labels: Annotated[np.ndarray, LabelColumn("label", "labels", "labels")]
    label_logprob: Annotated[np.ndarray | None, extra("label_logprob", "position", "uint16")] = None
    writer_logprob: Annotated[
        np.ndarray | None,
        Numbers("position", *["writer_logprob"] * 2, when=None, dtype="uint16"),
    ] = None
    entropy: Annotated[np.ndarray | None, extra("entropy", "position", "uint8")] = None
    hard_labels: Annotated[
        np.ndarray | None, HardLabels("token", name="hard_label", when="hard_labels", fill=IGNORE)
    ] = None
    hard_logprob: Annotated[
        np.ndarray | None,
        Numbers("hard", name="hard_logprob", when="hard_labels", fill=0, dtype="uint16"),
    ] = None
    answer_logprob: Annotated[
        np.ndarray | None, extra("answer_logprob", "row", "float32", check_sums)
    ] = None
    starts: Annotated[
        np.ndarray | None,
        Numbers(
            *("token", "starts", "starts"),
            when="starts",
            fill=first_of_rows,
            dtype="bool",
            check=check_starts,
        ),
    ] = None
    texts: Annotated[list[str] | None, Texts("row", "text", "text", when="texts", fill="")] = None
    text_pairs: Annotated[
        list[str] | None, Texts("row", "text_pair", "text_pair", when=None, fill="")
    ] = None
    first: Annotated[
        np.ndarray | None,
        Numbers("token", "first", "first_tokens", when="words", dtype="bool", check=check_first),
    ] = None
    words: Annotated[
        list[tuple[str, ...]] | None, Words("row", "words", "words", when="words", fill=())
    ] = None
    label_bytes: Annotated[np.ndarray | None, Numbers("position", when=False, dtype="int64")] = None

    @classmethod
    def from_rows(
        cls,
        task: str,
        rows: Sequence[Row],
        targets: SoftTargets,
        label_logprob: np.ndarray | None = None,
        entropy: np.ndarray | None = None,
        answer_logprob: np.ndarray | None = None,
    ) -> ShardData:
        """Gather rows into columns; targets and what is of positions have these in order, as has
        `answer_logprob` the log-probabilities whose sums are kept."""
        columns = cls.of_rows(rows, task, targets.codec.vocab_size)
        columns |= {"label_logprob": label_logprob, "entropy": entropy}
        data = cls(task=task, targets=targets, **columns)
        for values in (targets, label_logprob, entropy, answer_logprob):
            assert values is None or len(values) == data.position_offsets[-1], "one a position"
        if answer_logprob is not None:
            exact = np.minimum(answer_logprob, 0)  # but for rounding
            data.answer_logprob = answer_sums(data.labels, data.offsets, exact).astype(np.float32)
        return data

    @cached_property
    def position_offsets(self) -> np.ndarray:
        """int64 [rows + 1]: where each row's positions begin in `targets`."""
        if not TASKS[self.task].per_token:
            return np.arange(len(self) + 1, dtype=np.int64)
        before = offsets_of(positions(self.labels, self.task))
        return np.asarray(before[self.offsets])

    @cached_property
    def item_offsets(self) -> dict[str, np.ndarray]:
        """int64 [rows + 1] by axis of the targets: where each row's items begin in its columns.

        All are 0 where the targets were not read.
        """
        if len(self.targets):
            return self.targets.offsets(self.position_offsets)
        none = np.zeros(len(self) + 1, np.int64)
        return {column.per: none for column in self.targets.codec.columns}

    def ends(self, axis: str) -> np.ndarray:
        """See `Columns.ends`; `targets/AXIS` is an axis of the targets."""
        if axis == "label":
            axis = "token" if TASKS[self.task].per_token else "row"
        if axis == "position":
            return self.position_offsets
        if axis == "hard":
            if self.hard_labels is None:
                return np.zeros(len(self) + 1, np.int64)
            return np.asarray(offsets_of(self.hard_labels != IGNORE)[self.offsets])
        of_targets = axis.removeprefix("targets/")
        return self.item_offsets[of_targets] if of_targets != axis else super().ends(axis)

    @property
    def every_label(self) -> np.ndarray:
        """`labels`, with those of tokens without a soft target."""
        if self.hard_labels is None:
            return self.labels
        return np.where(self.hard_labels == IGNORE, self.labels, self.hard_labels)

    @property
    def every_logprob(self) -> np.ndarray | None:
        """Codes of the teacher's log-probabilities of all these labels, in their order."""
        if self.hard_labels is None or self.label_logprob is None:
            return self.label_logprob
        assert self.hard_logprob is not None, "both are there, or neither"
        found: np.ndarray = np.zeros(len(self.labels), np.uint16)
        found[self.labels != IGNORE] = self.label_logprob
        found[self.hard_labels != IGNORE] = self.hard_logprob
        return np.asarray(found[self.every_label != IGNORE])

    def row(self, index: int) -> Row:
        """One row as the encoder made it."""
        found: dict[str, Any] = {}
        for _, column, values in self.present():
            if column.row is not None and not isinstance(column, Offsets):
                begin, end = self.ends(column.axis)[index : index + 2]
                stretch = values[begin:end]
                found[column.row] = stretch[0] if isinstance(values, list) else stretch
        return Row(**found)


@dataclass(frozen=True)
class ShardCounts:
    """A shard's counts in the manifest; checked before memory is allocated for its columns."""

    rows: int
    tokens: int
    positions: int


def write_shard(path: Path, data: ShardData, *, attributes: Mapping[str, Any]) -> None:
    """Write one shard file at `path` (a scratch name: commit it afterwards).

    Args:
        attributes: JSON-able facts of the span, kept in the file's `span` attribute.

    Raises:
        OSError: the disk refused.
    """
    path.write_bytes(shard_bytes(data, attributes=attributes))


def shard_bytes(
    data: ShardData, *, attributes: Mapping[str, Any], sha256: str | None = None
) -> bytes:
    """The content of one shard file.

    HDF5 composes it in memory: where a disk is full, HDF5 itself cannot close its file any more and
    takes the process down when it exits.

    Args:
        sha256: of the content that it had before, perhaps as an earlier version wrote it.
    """
    content = _compose(data, attributes)
    for form in EARLIER if sha256 is not None else ():
        if hashlib.sha256(content).hexdigest() == sha256:
            break
        with written_as(form):
            made = _compose(data, attributes)
        if hashlib.sha256(made).hexdigest() == sha256:
            return made
    return content


def _compose(data: ShardData, attributes: Mapping[str, Any]) -> bytes:
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
        for _, column, values in data.present():
            if column.name is not None:
                column.write(rows, data, values)
        targets = file.create_group("targets")
        for stored in data.targets.codec.columns:
            _write(targets, stored.name, data.targets.columns[stored.name], stored.worth)
        file.flush()
        return bytes(file.id.get_file_image())


def read_shard(
    path: Path,
    codec: Codec,
    *,
    counts: ShardCounts | None = None,
    ranks: np.ndarray | None = None,
    kept: Collection[str] = (),
    with_targets: bool = True,
) -> ShardData:
    """Read one shard whole.

    Args:
        codec: the cache's codec; the file must have been written with it.
        counts: what the manifest states; compared before any column is read.
        ranks: the cache's table from frequency rank to id, where it has one.
        kept: the columns that the cache keeps besides those of its task; see `CacheSpec.kept`.
        with_targets: False reads no column of the targets and leaves them empty.

    Raises:
        CorruptCacheError: not a shard, other counts than promised, or a failing checksum.
    """
    with open_file(path) as file:
        n, task = _check_head(path, file, codec, counts)
        _check_memory(path, file, n)
        names: dict[bool | None, list[str]] = {True: [], None: [], False: []}
        for column in ShardData.columns().values():
            names[column.wanted(TASKS[task], kept)] += column.names(task)
        rows = columns_of(path, file, "rows", names[True], names[None])
        items = {"row": n.rows, "token": n.tokens, "position": n.positions}
        opened = OpenRows(path, rows, task, codec.vocab_size, items, {})
        for field, column in ShardData.columns().items():
            if any(name in rows for name in column.names(task)):
                opened.found[field] = column.read(opened)
        targets = SoftTargets.empty(codec)
        if with_targets:
            group = columns_of(path, file, "targets", [c.name for c in codec.columns])
            columns = _read_targets(path, group, codec, n.positions)
            targets = SoftTargets(codec, columns, ranks)
        data = ShardData(task=task, targets=targets, **opened.found)
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
    """Refuse a shard if its columns, once decoded, take memory out of proportion to its file.

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
    codec, columns = data.targets.codec, data.targets.columns
    try:
        ends = {axis: int(offsets[-1]) for axis, offsets in data.item_offsets.items()}
    except IndexError as error:
        raise CorruptCacheError(
            f"{path}: the counts of its targets do not match the columns that they count."
        ) from error
    for stored in codec.columns:
        found = len(columns[stored.name])
        if found != ends[stored.per]:
            raise CorruptCacheError(
                f"{path}: column {stored.name} has {found} values, expected {ends[stored.per]} by "
                f"its counts."
            )
    if any(count.min(initial=0) < 0 for count in codec.counts(columns).values()):
        raise CorruptCacheError(f"{path}: negative entry count.")
    if codec.largest_id(columns) >= codec.vocab_size:
        raise CorruptCacheError(f"{path}: an id is outside the vocabulary of {codec.vocab_size}.")


def check_ids(data: ShardData, spec: CacheSpec, known: Callable[[], int | None]) -> None:
    """Check ids and labels of rows, with which readers index.

    Cost: a pass over the rows' columns; the tokenizer is asked where it may have more ids than its
    model can predict.

    Args:
        known: gives the number of the tokenizer's ids; None where that is not known.

    Raises:
        CorruptCacheError: an id or a class is impossible.
    """
    kind = TASKS[spec.task]
    if data.task != spec.task:
        raise CorruptCacheError(f"its rows are for {data.task}, the cache is for {spec.task}.")
    columns: list[tuple[str, np.ndarray, int | None]] = [("input id", data.input_ids, None)]
    if data.source is not None:
        columns.append(("source id", data.source, None))
    if kind.answers == "score":
        if np.isinf(data.labels).any():
            raise CorruptCacheError("it has a score that is infinite.")
    elif kind.answers == "labels":  # whether each class is a label
        columns.append(("label", data.labels[data.labels != IGNORE], 2))
    else:
        classes = None if kind.over_ids else spec.num_labels or 0
        every = data.every_label
        columns.append(("label", every[labelled(every, data.task)], classes))
    for name, column, number in columns:
        least, most = column.min(initial=0), column.max(initial=0)
        if least < 0:
            raise CorruptCacheError(f"it has the {name} {least}.")
        if number is None and most >= (spec.vocab_size if kind.over_ids else 0):
            number = known()
        if number is not None and most >= number:
            raise CorruptCacheError(f"it has the {name} {most}, expected less than {number}.")
