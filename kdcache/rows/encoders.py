"""What the encoders of all tasks share, and rows of causal language models.

See `kdcache.rows` for the algorithm and its cost.

A document is a record as text plus the parts of it that have labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from kdcache.corpus import ReadStats, Record, RecordError
from kdcache.errors import UsageError
from kdcache.rows.spec import Row, RowSpec
from kdcache.rows.tokens import Document, checked_text, encoded, frame, need_offsets, tokens_of
from kdcache.tasks import IGNORE

if TYPE_CHECKING:
    from kdcache.rows.chats import Chats


_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 22  # a batch of books must not be a batch of 256 books

Item = TypeVar("Item")


class Encoder(ABC):
    """Turns records into rows, counting what it leaves out.

    Attributes:
        stats: Records taken, records skipped because of `RowSpec.on_error` and the first reasons.
        empty: Records without anything to learn: empty text, no answer of the assistant.
        truncated: Documents cut short at `RowSpec.max_length`: texts to classify (where a fast
            tokenizer tells), and under `packing="none"`.
    """

    def __init__(self, spec: RowSpec, tokenizer: Any) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.stats = ReadStats()
        self.empty = 0
        self.truncated = 0

    def _need_room(self, added: int, least: int = 1) -> None:
        """Refuse rows without room for the tokenizer's own tokens and at least so many of text."""
        if self.spec.max_length < added + least:
            raise UsageError(
                f"max_length is {self.spec.max_length}, but the tokenizer itself adds {added} "
                f"tokens. Set --max-length to {added + least} or more."
            )

    def _text(self, record: Record, column: str, name: str) -> str:
        """The text of a column that must be there, named `name` in `--columns`; null is empty."""
        if column not in record.values:
            raise record.missing([column], f"--columns {name}=THEIRS", self.spec.columns)
        return checked_text(record.values[column], column)

    @property
    def skipped(self) -> int:
        """Records skipped because they could not be encoded."""
        return self.stats.skipped

    @abstractmethod
    def encode(self, records: Iterable[Record], *, span: int = 0) -> Iterator[Row]:
        """Encode the records of one span.

        Args:
            records: In order; read as needed.
            span: Its number, where rows are drawn by it.

        Yields:
            The rows, in the records' order.

        Raises:
            UsageError: A column is missing, a label is not a class, or (`on_error="fail"`) a
                value can't be used.
        """

    def _batches(
        self,
        records: Iterable[Record],
        make: Callable[[Record], Item | None],
        size: Callable[[Item], int],
    ) -> Iterator[list[Item]]:
        """The results of `make` for the records, in batches; None is counted as empty."""
        batch: list[Item] = []
        characters = 0
        for record in records:
            try:
                item = make(record)
            except RecordError as problem:
                self.stats.reject(self.spec.on_error, record.file, record.location, problem)
                continue
            self.stats.records += 1
            if item is None:
                self.empty += 1
                continue
            batch.append(item)
            characters += size(item)
            if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch


class DocumentMaker:
    """Makes documents of records by a `RowSpec`; one per encoder."""

    def __init__(self, spec: RowSpec, tokenizer: Any, *, prompts: bool = False) -> None:
        """Begin; of `prompts` no completion is asked for."""
        self._spec = spec
        self._tokenizer = tokenizer
        self._columns: dict[str, tuple[str, ...]] = {
            "text": (spec.text_column,),
            "messages": (spec.messages_column,),
            "prompt": (spec.prompt_column, *([] if prompts else [spec.completion_column])),
        }
        # The forms that find all their columns among some names: most files have one set of names.
        self._there = lru_cache(64)(
            lambda given: [form for form, own in self._columns.items() if {*own} <= {*given}]
        )

    @cached_property
    def _chats(self) -> Chats:
        from kdcache.rows.chats import Chats

        return Chats(self._spec, self._tokenizer)

    def make(self, record: Record) -> Document:
        """The document of a record; empty text where there is nothing to read.

        Raises:
            RecordError: The values can't be used.
            UsageError: The columns or the tokenizer can't serve this kind of record.
        """
        form = self._form(record)
        spec, values = self._spec, record.values
        if form == "text":
            return Document(checked_text(values[spec.text_column], spec.text_column))
        if form == "messages":
            return self._chats.document(values[spec.messages_column], values.get(spec.tools_column))
        prompt, completion = (
            _plain(values[column], column)
            for column in (spec.prompt_column, spec.completion_column)
        )
        need_offsets(self._tokenizer, "prompt and completion")
        if not completion:
            return Document("")
        text = prompt + completion
        return Document(text, [(len(prompt), len(text))])

    def prompt(self, record: Record) -> Document:
        """What a model continues of a record; empty text where there is nothing to read.

        Raises:
            RecordError: The values can't be used.
            UsageError: The columns or the tokenizer can't serve this kind of record.
        """
        form = self._form(record)
        spec, values = self._spec, record.values
        if form == "messages":
            return self._chats.prompt(values[spec.messages_column], values.get(spec.tools_column))
        column = spec.text_column if form == "text" else spec.prompt_column
        return Document(_plain(values[column], column))

    def _form(self, record: Record) -> str:
        spec, values, columns = self._spec, record.values, self._columns
        if spec.record_form != "auto":
            for column in columns[spec.record_form]:
                if column not in values:
                    completion = column == spec.completion_column
                    option = "completion" if completion else spec.record_form
                    raise record.missing([column], f"--columns {option}=THEIRS")
            return spec.record_form
        there = self._there(tuple(values))
        if len(there) == 1:
            return there[0]
        filled = [form for form in there if all(values[name] is not None for name in columns[form])]
        if len(filled) > 1:
            raise UsageError(
                f"{record.where} holds {' and '.join('+'.join(columns[form]) for form in filled)}, "
                f"more than one form of record. Choose one with --record-form {'|'.join(filled)}."
            )
        if filled or there:
            return (filled or there)[0]
        if "input_ids" in record.columns:
            raise UsageError(
                f"{record.where} has a column 'input_ids' and none of text. If its ids are to be "
                "the rows, add --record-form ids."
            )
        alternatives = [spec.text_column, spec.messages_column, "+".join(columns["prompt"])]
        raise record.missing(alternatives, "--columns text=THEIRS", [spec.text_column])


def _plain(value: Any, column: str) -> str:
    if isinstance(value, list):
        raise RecordError(
            f"column {column!r} holds a list where text was expected; a conversation goes into one "
            f"column, messages"
        )
    return checked_text(value, column)


Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
# Ids end to end, which of them are learnt, each sequence's record and length, and where documents
# begin (None: with each sequence).
Sequences = tuple[Ids, Mask, list[tuple[Record, int]], Mask | None]


class SequenceEncoder(Encoder):
    """Causal LM: sequences of ids, packed into rows."""

    def _rows(self, sequences: Iterable[Sequences]) -> Iterator[Row]:
        """Rows of batches of sequences, in order."""
        length = self.spec.max_length
        packed = self.spec.packing == "concat"
        apart = self.spec.attend == "document"
        carried: Ids = np.empty(0, np.int32)
        carried_mask: Mask = np.empty(0, np.bool_)
        carried_starts: Mask | None = np.empty(0, np.bool_) if apart else None
        for ids, loss_mask, records, inside in sequences:
            if not packed:
                yield from self._apart(ids, loss_mask, records, inside if apart else None)
                continue
            if carried_starts is not None:
                starts = _starts(records) if inside is None else inside
                loss_mask = loss_mask & ~starts  # a document does not tell how the next one begins
                carried_starts = np.concatenate([carried_starts, starts])
            carried = np.concatenate([carried, ids])
            carried_mask = np.concatenate([carried_mask, loss_mask])
            # A full row needs one id more than its tokens: the last label.
            full = max(len(carried) - 1, 0) // length * length
            yield from _cut(carried[: full + 1], carried_mask[: full + 1], length, carried_starts)
            carried, carried_mask = carried[full:], carried_mask[full:]
            carried_starts = None if carried_starts is None else carried_starts[full:]
        yield from _cut(carried, carried_mask, length, carried_starts)

    def _apart(
        self,
        ids: Ids,
        loss_mask: Mask,
        records: Sequence[tuple[Record, int]],
        starts: Mask | None,
    ) -> Iterator[Row]:
        """Rows of documents that do not share rows."""
        length = self.spec.max_length
        start = 0
        for record, size in records:
            stop = start + size
            if self.spec.packing == "whole" and not self._fits(record, loss_mask[start:stop]):
                start = stop
                continue
            if self.spec.packing == "none" and size > length + 1:
                self.truncated += 1
                stop = start + length + 1
                if not loss_mask[start + 1 : stop].any():
                    cause = f"its first {length} tokens (--max-length) contain no label"
                    self.stats.reject("skip", record.file, record.location, cause)
            inside = None if starts is None else starts[start:stop]
            yield from _cut(ids[start:stop], loss_mask[start:stop], length, inside)
            start += size

    def _fits(self, record: Record, loss_mask: Mask) -> bool:
        """Whether a sequence is one row up to its last label; if it is not, that is reported."""
        size = int(np.flatnonzero(loss_mask)[-1]) + 1 if loss_mask.any() else 0
        length = self.spec.max_length
        if size > length + 1:
            cause = (
                f"{size:,} tokens do not fit one row, --max-length is {length:,} (--packing none "
                "cuts it, split continues it in further rows)"
            )
            self.stats.reject(self.spec.on_error, record.file, record.location, cause)
        return size <= length + 1


class TextEncoder(SequenceEncoder):
    """Causal LM: documents, conversations, and prompts with completions."""

    def __init__(self, spec: RowSpec, tokenizer: Any) -> None:
        super().__init__(spec, tokenizer)
        self._documents = DocumentMaker(spec, tokenizer)
        self._prefix, self._end = _frame(tokenizer)

    def encode(self, records: Iterable[Record], *, span: int = 0) -> Iterator[Row]:
        """See `Encoder.encode`."""
        batches = self._batches(records, self._make, lambda item: len(item[1].text))
        yield from self._rows(map(self._tokenise, batches))

    def _make(self, record: Record) -> tuple[Record, Document] | None:
        document = self._documents.make(record)
        if document.tokens is not None:
            return (record, document) if any(document.tokens[1]) else None
        blank = document.text.isspace() and record.whole
        if not document.text or blank or document.loss_ranges == []:
            return None
        return record, document

    def _tokenise(self, batch: Sequence[tuple[Record, Document]]) -> Sequences:
        """Ids of all documents end to end, which are to be learnt, and the documents' lengths."""
        offsets = any(document.loss_ranges is not None for _, document in batch)
        texts = [document.text for _, document in batch if document.tokens is None]
        bodies, spans = self._encoded(texts, offsets) if texts else (iter(()), iter(()))
        pieces: list[list[int]] = []
        records: list[tuple[Record, int]] = []
        masked: list[tuple[int, Mask]] = []
        total = 0
        for record, document in batch:
            body = next(bodies) if document.tokens is None else document.tokens[0]
            characters = next(spans) if offsets and document.tokens is None else None
            prefix = self._prefix if document.framed and record.opens else []
            end = self._end if document.framed and record.closes else []
            mark = _learnt(document, characters, len(prefix), len(end))
            nothing = not (body if record.whole else prefix + body + end)
            if nothing or (mark is not None and not mark.any()):
                self.empty += record.whole
                continue
            if mark is not None:
                masked.append((total, mark))
            pieces += (prefix, body, end)
            records.append((record, len(prefix) + len(body) + len(end)))
            total += records[-1][1]
        ids = np.fromiter(chain.from_iterable(pieces), np.int32, total)
        loss_mask = np.ones(total, np.bool_)
        for start, mark in masked:
            loss_mask[start : start + len(mark)] = mark
        return ids, loss_mask, records, None

    def _encoded(self, texts: list[str], offsets: bool) -> tuple[Iterator[Any], Iterator[Any]]:
        """Ids of texts, and the characters of each token if they are needed."""
        if not offsets:
            found = tokens_of(self.tokenizer, texts, add_special_tokens=False, truncation=False)
            return (ids for ids, _, _ in found), iter(())
        found = encoded(self.tokenizer, texts, offsets=True)
        return iter(found["input_ids"]), iter(found["offset_mapping"])


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that go before and after a document: what the tokenizer itself adds, and one EOS.

    Raises:
        UsageError: There is no EOS.
    """
    if tokenizer.eos_token_id is None:
        raise UsageError(
            "the tokenizer has no end-of-sequence token, which ends a document. "
            "Set eos_token in its tokenizer_config.json, or use a causal LM's tokenizer."
        )
    before, after = frame(tokenizer)
    end = [int(tokenizer.eos_token_id)]
    # A tokenizer that adds EOS itself must not get a second one.
    return before, after if after[-1:] == end else after + end


def _learnt(
    document: Document, characters: Sequence[tuple[int, int]] | None, before: int, after: int
) -> Mask | None:
    """Which tokens of a document are to be learnt, the EOS after it included; None is all.

    A token across the border of a stretch belongs to it.
    """
    if document.tokens is not None:
        return np.asarray(document.tokens[1], np.bool_)
    if document.loss_ranges is None:
        return None
    assert characters is not None
    bounds = np.asarray(characters, np.int64).reshape(-1, 2)
    body = np.zeros(len(bounds), np.bool_)
    for start, stop in document.loss_ranges:
        body |= (bounds[:, 1] > start) & (bounds[:, 0] < stop)
    ended = np.full(after, bool(body.any()))
    return np.concatenate([np.zeros(before, np.bool_), body, ended])


def _starts(records: Sequence[tuple[Record, int]]) -> Mask:
    """Where documents begin, of their tokens end to end."""
    sizes = np.array([size for _, size in records], np.int64)
    starts = np.zeros(sizes.sum(), np.bool_)
    opens = np.array([record.opens for record, _ in records], np.bool_)
    starts[(np.cumsum(sizes) - sizes)[opens]] = True
    return starts


def _cut(ids: Ids, loss_mask: Mask, length: int, starts: Mask | None = None) -> Iterator[Row]:
    """Rows of at most `length` tokens of one sequence, each up to its last label."""
    labels = np.where(loss_mask[1:], ids[1:], np.int32(IGNORE))
    for start in range(0, len(labels), length):
        own = labels[start : start + length]
        if own[-1] == IGNORE:
            (labelled,) = np.nonzero(own != IGNORE)
            if not len(labelled):
                continue
            own = own[: labelled[-1] + 1]
        # Copies: a view would keep the whole batch alive as long as one of its rows.
        row = Row(ids[start : start + len(own)].copy(), own.copy())
        if starts is not None:
            begins = starts[start : start + len(own)].copy()
            begins[0] = True  # a document that continues in a further row has nothing before it
            row = replace(row, starts=begins)
        yield row
