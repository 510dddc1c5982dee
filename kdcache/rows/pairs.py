"""Sequence to sequence: a source that an encoder reads, and a target that a decoder writes.

A row is that of a causal language model and a source: the decoder reads its start and all labels
but the last (`input_ids`), and the labels are the ids of the target. So the first label is
predicted, too, and a row with n labels has n positions.

The tokenizer frames both, the target as `text_target`. A target ends with the end-of-sequence
token, also where the tokenizer adds none. What the decoder reads first depends on the model
(`kdcache.teacher.quirks`); models of one cache may differ in it.

A source longer than `max_source_length` is cut, and keeps the tokenizer's own tokens. A target
longer than `max_length` is cut without an end, since it does not end there. Where the decoder
begins with the last label, such as the code of a language, this label is kept as the last.

Cost: the tokenizer's, and some numpy calls a row.
Guarantee: one row a record that has both texts, in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.corpus import Record, RecordError
from kdcache.corpus.records import field_of
from kdcache.errors import UsageError
from kdcache.rows.encoders import Encoder
from kdcache.rows.spec import LAST_LABEL, Row, RowSpec
from kdcache.rows.tokens import checked_text, frame, tokens_of

Pair = tuple[Record, str, str]


class PairEncoder(Encoder):
    """Sequence to sequence: a source and its target."""

    def __init__(self, spec: RowSpec, tokenizer: Any) -> None:
        super().__init__(spec, tokenizer)
        assert spec.decoder_start is not None, "whoever has the model knows its start"
        self._start = spec.decoder_start
        set_languages(tokenizer, spec.source_lang, spec.target_lang)
        self._source_length = spec.max_source_length or 0
        least = len([*frame(tokenizer)[0], *frame(tokenizer)[1]]) + 1
        if self._source_length < least:
            raise UsageError(
                f"max_source_length is {self._source_length}, but the tokenizer itself adds "
                f"{least - 1} tokens. Set --seq2seq max-source-length={least} or more."
            )
        self._end = _end(tokenizer)

    def encode(self, records: Iterable[Record], *, span: int = 0) -> Iterator[Row]:
        """See `Encoder.encode`."""
        whole = self.spec.packing == "whole"
        how: dict[str, Any] = {} if whole else {"max_length": self._source_length}
        for batch in self._batches(records, self._make, lambda item: len(item[1]) + len(item[2])):
            sources = tokens_of(
                self.tokenizer,
                [source for _, source, _ in batch],
                add_special_tokens=True,
                truncation=not whole,
                **how,
            )
            targets = target_ids(self.tokenizer, [target for *_, target in batch], self._end)
            for (record, *_), (ids, _, cut), labels in zip(batch, sources, targets, strict=True):
                if whole and not self._fits(record, len(ids), len(labels)):
                    continue
                self.truncated += cut or len(labels) > self.spec.max_length
                yield pair_row(ids, labels, self._start, self.spec.max_length)

    def _make(self, record: Record) -> Pair | None:
        texts = []
        columns = self.spec.source_column, self.spec.target_column
        for column, name in zip(columns, ("source", "target"), strict=True):
            texts.append(text_of(record, column, name, self.spec.columns))
        blank = [name for name, text in zip(columns, texts, strict=True) if not text.strip()]
        if len(blank) == 1:
            raise RecordError(
                f"column {blank[0]!r} is empty: a row needs a source and its target (kdcache "
                "predict makes a teacher's targets of sources alone)"
            )
        return None if blank else (record, texts[0], texts[1])

    def _fits(self, record: Record, source: int, target: int) -> bool:
        """Whether a row fits; if it does not, that is reported."""
        over = [
            f"its {name} has {size:,} tokens, {flag} is {most:,}"
            for name, size, flag, most in (
                ("source", source, "--seq2seq max-source-length", self._source_length),
                ("target", target, "--max-length", self.spec.max_length),
            )
            if size > most
        ]
        if over:
            cause = f"{' and '.join(over)} (--packing none cuts it)"
            self.stats.reject(self.spec.on_error, record.file, record.location, cause)
        return not over


def text_of(record: Record, column: str, name: str, columns: Sequence[str]) -> str:
    """The text of a column, or of a field of one: `translation.en`; missing is empty.

    Raises:
        UsageError: there is no such column or field; it is `name` in `--columns`.
        RecordError: it does not hold a text.
    """
    for value in field_of(record.values, column):
        return checked_text(value, column)
    raise record.missing([column], f"--columns {name}=THEIRS", columns)


def target_ids(
    tokenizer: Any, texts: Sequence[str], end: Sequence[int] = ()
) -> list[npt.NDArray[np.int32]]:
    """Ids of whole targets, int32 each, with those of `end` behind."""
    encoded = tokenizer(
        text_target=list(texts),
        add_special_tokens=True,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,  # no warning about the model's length: rows are cut to it here
    )
    return [np.array([*ids, *end], np.int32) for ids in encoded["input_ids"]]


def pair_row(
    source: Sequence[int], labels: npt.NDArray[np.int32], start: int, max_length: int
) -> Row:
    """The row of a source and a target.

    Args:
        source: ids.
        labels: int32 [n], ids of the whole target.
        start: id that the decoder reads first, or `LAST_LABEL`.
        max_length: labels that are kept.
    """
    if len(labels) > max_length:
        kept = labels[:max_length].copy()
        if start == LAST_LABEL:
            kept[-1] = labels[-1]
        labels = kept
    first = labels[-1] if start == LAST_LABEL else start
    decoder = np.concatenate([np.array([first], np.int32), labels[:-1]])
    return Row(decoder, labels, source=np.array(source, np.int32))


def set_languages(tokenizer: Any, source: str | None, target: str | None) -> None:
    """Set the languages of a tokenizer that marks them.

    Raises:
        UsageError: it marks none, or does not know one.
    """
    for name, flag, language, is_target in (
        ("src_lang", "--seq2seq source-lang", source, False),
        ("tgt_lang", "--seq2seq target-lang", target, True),
    ):
        if language is None:
            continue
        if not hasattr(tokenizer, name):
            raise UsageError(
                f"{flag} is {language}, but {type(tokenizer).__name__} marks no languages. Leave "
                "it out."
            )
        try:
            setattr(tokenizer, name, language)
            marks = frame(tokenizer, target=is_target)
        except KeyError:
            marks = None
        if marks is None or tokenizer.unk_token_id in (*marks[0], *marks[1]):
            raise UsageError(
                f"{flag} is {language}, which {type(tokenizer).__name__} does not know. Use one of "
                "its codes, such as en_XX."
            )


def _end(tokenizer: Any) -> list[int]:
    """What a target lacks of an end.

    Raises:
        UsageError: there is no token that could be one.
    """
    _, after = frame(tokenizer, target=True)
    end = tokenizer.eos_token_id
    if end is None and not after:
        raise UsageError(
            "the tokenizer has no end-of-sequence token, which ends a target. Set eos_token in its "
            "tokenizer_config.json, or use a sequence-to-sequence model's tokenizer."
        )
    return [] if end is None or end in after else [int(end)]
