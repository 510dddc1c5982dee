"""Sequences that are ids already: a record's columns become ids and a loss mask.

`input_ids` alone has every next id as its label. `labels` and `loss_mask`, or TRL's
`completion_mask` and `assistant_masks`, mark the ids that are learnt; which id a label belongs to
is never guessed (`RowSpec.labels`): the id itself, as in transformers, or the one that follows, as
in Megatron. A label is the next id or none, since a teacher's distribution is over what follows the
ids that it has read. `attention_mask` cuts padding off, and may number documents from 1 on;
documents of a row begin where `position_ids` and `segment_ids` do, or after each of `seq_lengths`.

Cost: a few numpy passes over the ids; those of tables come as arrays, without Python objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.corpus import Record, RecordError, kind_of
from kdcache.errors import UsageError
from kdcache.pretrained import UnreadableError, read_tokenizer, tokenizer_of
from kdcache.rows.encoders import SequenceEncoder, Sequences
from kdcache.rows.spec import ID_COLUMNS, ID_MASKS, LOGPROBS, Row, RowSpec
from kdcache.storage import open_storage
from kdcache.targets.label_logprob import encode_logprobs
from kdcache.tasks import IGNORE

_ATTENTION = "attention_mask"
_LENGTHS = "seq_lengths"

Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class IdSequence:
    """A record of ids.

    Attributes:
        ids: int64 [L].
        mask: bool [L], which of them are learnt.
        starts: bool [L], where a document begins, the first id always.
    """

    ids: Numbers
    mask: Mask
    starts: Mask


class SequenceMaker:
    """Makes sequences of records by a `RowSpec`; one per encoder."""

    def __init__(self, spec: RowSpec, tokenizer: Any) -> None:
        self._labels, self._divided = spec.labels, spec.attend == "document"
        # Where rows are apart, nothing comes before a first id, so it is never learnt.
        self._first = 0 if spec.packing == "concat" else 1
        self._known = max(tokenizer.get_vocab().values()) + 1

    def make(self, record: Record) -> IdSequence | None:
        """The ids of a record, and which of them are learnt; None where there are none.

        Labels of the next id may name one more than the row has: it is joined to the ids. The first
        id of a document that attends to no other one is not learnt.

        Raises:
            RecordError: The values can't be used.
            UsageError: The columns can't serve, or nothing tells which id a label belongs to.
        """
        values = record.values
        if ID_COLUMNS[0] not in values:
            raise record.missing(ID_COLUMNS[:1], "--columns input_ids=NAME")
        ids = _numbers(values[ID_COLUMNS[0]], ID_COLUMNS[0])
        given = {name: values[name] for name in ID_COLUMNS[1:] if values.get(name) is not None}
        columns = {name: _numbers(value, name) for name, value in given.items()}
        if _LENGTHS in columns:
            numbers = _numbered(columns.pop(_LENGTHS))
            columns.setdefault("segment_ids", numbers[: len(ids)] if record.cut else numbers)
        for name, column in columns.items():
            if len(column) != len(ids):
                raise RecordError(f"{name} has {len(column)} numbers for {len(ids)} input_ids")
        attention = columns.pop(_ATTENTION, None)
        real = _real(attention)
        if attention is not None and (attention > 1).any():
            columns.setdefault("segment_ids", attention)
        ids = ids[real]
        starts = _divisions(columns, real, len(ids)) if len(ids) else np.zeros(0, np.bool_)
        if starts[1:].any() and not self._divided:
            raise UsageError(
                f"{record.where}: segment_ids or position_ids divide the row into documents that "
                "do not see each other. Build it so with --attend document, or leave the columns "
                "out."
            )
        self._check_range(ids, ID_COLUMNS[0])
        ids, mask = self._learnt(
            record, ids, {name: values[real] for name, values in columns.items()}
        )
        starts = np.concatenate([starts, np.zeros(len(ids) - len(starts), np.bool_)])
        if starts[1:].any():
            mask[1:] &= ~starts[1:]
        return IdSequence(ids, mask, starts) if mask[self._first :].any() else None

    def _learnt(
        self, record: Record, ids: Numbers, columns: dict[str, Numbers]
    ) -> tuple[Numbers, Mask]:
        """Ids, and which of them are learnt, by labels and loss mask."""
        if columns and self._labels is None:
            name = next(iter(columns))
            raise UsageError(
                f"{record.where} has a column {name!r}, which may stand beside the id that it is "
                "about (--labels token, as in transformers) or one before it (--labels next, as in "
                "Megatron). Say which; --labels none learns every id."
            )
        if not columns or self._labels == "none":
            return ids, np.ones(len(ids), np.bool_)
        mask = np.ones(len(ids), np.bool_)
        for name in ID_MASKS:
            if name in columns:
                mask = mask & columns[name].astype(np.bool_)
        labels = columns.get("labels")
        if labels is not None:
            mask = mask & (labels != IGNORE)
            self._check_range(labels[mask], "labels")
            self._check_labels(record, ids, labels, mask)
        if self._labels == "token":
            return ids, mask
        if labels is not None and len(ids) and mask[-1]:
            ids = np.append(ids, labels[-1])
        return ids, np.concatenate([[False], mask])[: len(ids)]

    def _check_range(self, ids: Numbers, column: str) -> None:
        wrong = np.flatnonzero((ids < 0) | (ids >= self._known))
        if len(wrong):
            raise RecordError(
                f"{column} holds {ids[wrong[0]]}, which is not an id of the tokenizer (0 to "
                f"{self._known - 1})"
            )

    def _check_labels(self, record: Record, ids: Numbers, labels: Numbers, mask: Mask) -> None:
        """Refuse labels that are not the ids that follow."""
        same, following = _differing(ids, labels, mask), _differing(ids[1:], labels[:-1], mask[:-1])
        wrong, other = (same, following) if self._labels == "token" else (following, same)
        if wrong is None:
            return
        if other is None:
            instead = "next" if self._labels == "token" else "token"
            raise UsageError(
                f"{record.where}: the labels do not agree with --labels {self._labels}, but with "
                f"--labels {instead}. Correct the option."
            )
        raise RecordError(
            f"labels[{wrong}] is {labels[wrong]}, which is not the id that follows there: a "
            "teacher's target is of what follows the ids that it has read"
        )


def _differing(ids: Numbers, labels: Numbers, mask: Mask) -> int | None:
    """The first position where a label that counts is not the id."""
    wrong = np.flatnonzero((ids != labels) & mask)
    return int(wrong[0]) if len(wrong) else None


def _numbers(value: Any, column: str) -> Numbers:
    """Whole numbers of a column of a record; a missing one is empty.

    Masks may be true and false, or 0.0 and 1.0 as Megatron's are.
    """
    if value is None:
        return np.zeros(0, np.int64)
    if not isinstance(value, (list, np.ndarray)):
        raise RecordError(
            f"{column} holds {kind_of(value)} where a list of whole numbers was expected"
        )
    try:
        array = np.asarray(value) if len(value) else np.zeros(0, np.int64)
    except ValueError:  # lists of different lengths
        array = np.zeros(0, object)
    mask = column in ID_MASKS
    flags = mask or column == _ATTENTION
    if array.ndim != 1 or array.dtype.kind not in ("iubf" if flags else "iu"):
        raise RecordError(f"{column} holds something else than whole numbers in its list")
    if mask and not np.isin(array, (0, 1)).all():
        raise RecordError(f"{column} holds other numbers than 0 and 1")
    if column == _ATTENTION and not ((array >= 0) & (array % 1 == 0)).all():
        raise RecordError(f"{column} holds other numbers than 0, 1 and those of documents")
    return array.astype(np.int64)


def _numbered(lengths: Numbers) -> Numbers:
    """Which document each id is of, from how many ids each has."""
    if (lengths < 1).any():
        raise RecordError(f"{_LENGTHS} holds a document without ids")
    return np.repeat(np.arange(len(lengths)), lengths)


def _real(attention: Numbers | None) -> slice:
    """Where a row's own ids are, its padding on either side left out."""
    if attention is None:
        return slice(None)
    attended = np.flatnonzero(attention)
    if not len(attended):
        return slice(0, 0)
    own = slice(int(attended[0]), int(attended[-1]) + 1)
    if own.stop - own.start != len(attended):
        raise RecordError(f"{_ATTENTION} hides ids in the middle of a row")
    return own


def _divisions(columns: dict[str, Numbers], real: slice, length: int) -> Mask:
    """Where documents of a row begin, by its segments and positions."""
    starts = np.zeros(length, np.bool_)
    starts[:1] = True
    segments, positions = (
        columns.pop(name, np.zeros(0, np.int64))[real] for name in ("segment_ids", "position_ids")
    )
    if len(segments):
        starts[1:] |= segments[1:] != segments[:-1]
        if starts.sum() != len(np.unique(segments)):
            raise RecordError(
                "segment_ids come back to a document after another one, expected the ids of each "
                "side by side"
            )
    if len(positions):
        begins = positions == 0
        if not begins[0] or (np.diff(positions)[~begins[1:]] != 1).any():
            raise RecordError("position_ids do not count from 0 in each document")
        if len(segments) and (begins != starts).any():
            raise RecordError("segment_ids and position_ids divide the row differently")
        starts |= begins
    return starts


def own_ids(record: Record) -> tuple[int, int]:
    """How many ids a record's columns have, padding included, and where its own begin."""
    real = _real(_numbers(record.values[_ATTENTION], _ATTENTION) if _padded(record) else None)
    return len(record.values[ID_COLUMNS[0]]), real.start or 0


def _padded(record: Record) -> bool:
    return record.values.get(_ATTENTION) is not None


def load_tokenizer(name: str) -> Any:
    """A tokenizer by its folder or hub id.

    Raises:
        UsageError: It can't be loaded.
    """
    try:
        if "://" in name:
            storage = open_storage(name)
            return tokenizer_of({one: storage.read(one) for one in storage.entries()})
        return read_tokenizer(name)
    except UnreadableError as error:
        raise UsageError(
            f"--tokenizer {name} is neither a folder with a tokenizer nor one that the hub gives "
            f"({error}). Check the path or the id."
        ) from error


def check_tokenizer(name: str, teacher: Any) -> None:
    """Refuse ids of another tokenizer than the teacher's.

    Args:
        name: Folder or hub id of the tokenizer that made the ids.
        teacher: The teacher's.

    Raises:
        UsageError: It can't be loaded, has another size, other special ids, or other tokens for its
            ids.
    """
    named = load_tokenizer(name)
    mine, theirs = named.get_vocab(), teacher.get_vocab()
    if len(mine) != len(theirs):
        what = f"has {len(mine):,} ids, the teacher's {len(theirs):,}"
    elif odd := [
        f"{key} {getattr(named, key)} for {getattr(teacher, key)}"
        for key in ("bos_token_id", "eos_token_id", "unk_token_id")
        if getattr(named, key) != getattr(teacher, key)
    ]:
        what = f"has other special ids than the teacher's: {', '.join(odd)}"
    elif mine != theirs:
        token, number = next(item for item in mine.items() if theirs.get(item[0]) != item[1])
        what = f"gives {token!r} the id {number}, the teacher's {theirs.get(token)}"
    else:
        return
    raise UsageError(
        f"--tokenizer {name} {what}: ids of one mean nothing to the other. Tokenise the corpus "
        "with the teacher's, or name the teacher whose ids these are."
    )


class IdsEncoder(SequenceEncoder):
    """Causal LM: sequences that are ids already."""

    def __init__(self, spec: RowSpec, tokenizer: Any) -> None:
        super().__init__(spec, tokenizer)
        self._sequences = SequenceMaker(spec, tokenizer)

    def encode(self, records: Iterable[Record], *, span: int = 0) -> Iterator[Row]:
        """See `Encoder.encode`."""
        batches = self._batches(records, self._make, lambda item: len(item[1].ids))
        yield from self._rows(map(self._joined, batches))

    def _apart(self, *sequences: Any) -> Iterator[Row]:
        """As the base, for one record at a time if a row has more of it than its ids."""
        if not self.spec.writer_logprob:
            yield from super()._apart(*sequences)
            return
        ids, mask, records, starts = sequences
        stop = 0
        for record, size in records:
            own, stop = slice(stop, stop + size), stop + size
            inside = None if starts is None else starts[own]
            for row in super()._apart(ids[own], mask[own], [(record, size)], inside):
                if record.cut:
                    yield row
                    continue
                codes = encode_logprobs(np.asarray(record.values[LOGPROBS], np.float64), 0.5)
                yield replace(row, writer_logprob=codes)

    def _make(self, record: Record) -> tuple[Record, IdSequence] | None:
        found = self._sequences.make(record)
        if found is not None and self.spec.writer_logprob and not record.cut:
            given, learnt = record.values.get(LOGPROBS), found.mask[1:].sum()
            if given is None or len(given) != learnt:
                count = 0 if given is None else len(given)
                raise RecordError(f"{LOGPROBS} holds {count} numbers for {learnt} learnt ids")
        return None if found is None else (record, found)

    def _joined(self, batch: Sequence[tuple[Record, IdSequence]]) -> Sequences:
        records = [(record, len(found.ids)) for record, found in batch]
        ids = np.concatenate([found.ids for _, found in batch]).astype(np.int32)
        mask, starts = (
            np.concatenate([getattr(found, name) for _, found in batch])
            for name in ("mask", "starts")
        )
        return ids, mask, records, starts
