"""Token classification: words that came apart, each with a label, become rows of tokens.

A tokenizer reads the words one by one (`is_split_into_words`). The label of a word belongs to its
first token, or to all of them (`RowSpec.label_tokens`); the other tokens have none. A word without
a label is `UNLABELLED` there: a position with a soft target alone.

Where a tokenizer marks the blank before a word (byte-level BPE), words get that blank, the first
one too: it is what `add_prefix_space` does, and how such taggers are trained. A word to which a
tokenizer gives no token (a lone control character, an empty text) is read as its unknown token. So
each word of a row has a first token, and no label moves to another word.

Cost: the tokenizer's, and some numpy calls a row.
Guarantee: the words of a row are those of its record up to the one that `max_length` cuts off; word
i has the label of word i.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.corpus import Record, RecordError, kind_of
from kdcache.errors import UsageError
from kdcache.rows.encoders import Encoder
from kdcache.rows.labels import Classes, almost_there, filled_column
from kdcache.rows.spec import Row, RowSpec
from kdcache.rows.tokens import checked_text
from kdcache.tasks import IGNORE, TASKS, UNLABELLED

_PROBE = "the"


@dataclass(frozen=True, slots=True, eq=False)
class ReadWords:
    """The tokens of some words.

    Attributes:
        ids: int32 [L].
        word_of: int32 [L], the word that each token is of; -1 for the tokenizer's own tokens.
        type_ids: uint8 [L], where the tokenizer gives them.
        cut: whether tokens were left out, the row being too long.
    """

    ids: npt.NDArray[np.int32]
    word_of: npt.NDArray[np.int32]
    type_ids: npt.NDArray[np.uint8] | None
    cut: bool

    @property
    def first(self) -> npt.NDArray[np.bool_]:
        """bool [L]: which tokens are the first of their words."""
        before = np.concatenate([[-1], self.word_of[:-1]])
        found: npt.NDArray[np.bool_] = (self.word_of >= 0) & (self.word_of != before)
        return found


class WordReader:
    """Reads words with a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Find how a fast tokenizer reads a word by itself; refuse others."""
        if not getattr(tokenizer, "is_fast", False):
            raise UsageError(
                f"{type(tokenizer).__name__} does not tell which word a token is of, which a label "
                "for each word needs. Use a tokenizer with a tokenizer.json."
            )
        self._tokenizer = tokenizer
        self._prefix = _prefix(tokenizer)

    def read(
        self, sentences: Sequence[Sequence[str]], max_length: int | None = None
    ) -> list[ReadWords | str]:
        """Tokens of sentences.

        Args:
            sentences: the words of each, at least one.
            max_length: tokens of the longest row, those that the tokenizer adds included; None for
                no bound.

        Returns:
            The tokens of each, or why it cannot be read.
        """
        found: list[ReadWords | str] = []
        for words, encoding in zip(sentences, self._encode(sentences, max_length), strict=True):
            lost = _lost(encoding, len(words))
            if lost:
                unknown = self._tokenizer.unk_token
                if unknown is None:
                    found.append(f"the tokenizer gives no token to word {lost[0] + 1}")
                    continue
                patched = [unknown if i in lost else word for i, word in enumerate(words)]
                (encoding,) = self._encode([patched], max_length)
                assert not _lost(encoding, len(words)), "an unknown token is a token"
            found.append(_tokens(encoding, "token_type_ids" in self._tokenizer.model_input_names))
        return found

    def _encode(self, sentences: Sequence[Sequence[str]], max_length: int | None) -> Sequence[Any]:
        # Whatever side a tokenizer cuts texts on: words and their labels count from the first.
        side, self._tokenizer.truncation_side = self._tokenizer.truncation_side, "right"
        try:
            return self._encoded(sentences, max_length)
        finally:
            self._tokenizer.truncation_side = side

    def _encoded(self, sentences: Sequence[Sequence[str]], max_length: int | None) -> Sequence[Any]:
        encoded = self._tokenizer(
            [[self._prefix + word for word in words] for words in sentences],
            is_split_into_words=True,
            add_special_tokens=True,
            padding=False,
            truncation=max_length is not None,
            max_length=max_length,
            return_attention_mask=False,
            verbose=False,
        )
        return encoded.encodings  # type: ignore[no-any-return]


def _prefix(tokenizer: Any) -> str:
    """A blank, where a word by itself has the tokens that it has inside a text only with one."""

    def ids(text: str | list[str]) -> list[int]:
        split = isinstance(text, list)
        found = tokenizer(text, add_special_tokens=False, is_split_into_words=split, verbose=False)
        return list(found["input_ids"])

    alone = ids(_PROBE)
    inside = ids(f"{_PROBE} {_PROBE}")[len(alone) :]
    for prefix in ("", " "):
        one = ids([prefix + _PROBE])
        if one == inside:
            return prefix
    return ""


def _lost(encoding: Any, words: int) -> list[int]:
    """Words without a token, those that were cut off not counted."""
    seen = {i for part in (encoding, *encoding.overflowing) for i in part.word_ids if i is not None}
    return [i for i in range(words) if i not in seen]


def _tokens(encoding: Any, typed: bool) -> ReadWords:
    return ReadWords(
        np.asarray(encoding.ids, np.int32),
        np.asarray([-1 if word is None else word for word in encoding.word_ids], np.int32),
        np.asarray(encoding.type_ids, np.uint8) if typed else None,
        bool(encoding.overflowing),
    )


class TokenClassificationEncoder(Encoder):
    """Token classification: words, and a class of each."""

    def __init__(self, spec: RowSpec, tokenizer: Any) -> None:
        super().__init__(spec, tokenizer)
        self._reader = WordReader(tokenizer)
        self._need_room(int(tokenizer.num_special_tokens_to_add(pair=False)))
        self._classes = Classes(spec.label_names, "a tag")

    def encode(self, records: Iterable[Record], *, span: int = 0) -> Iterator[Row]:
        """See `Encoder.encode`."""
        spec = self.spec
        for batch in self._batches(records, self._make, lambda item: sum(map(len, item[1]))):
            found = self._reader.read([words for _, words, _ in batch], spec.max_length)
            for (record, words, labels), read in zip(batch, found, strict=True):
                if isinstance(read, str):
                    self.stats.reject(spec.on_error, record.file, record.location, read)
                    continue
                self.truncated += read.cut
                yield tagged_row(words, labels, read, every=spec.label_tokens == "all")

    def _make(self, record: Record) -> tuple[Record, list[str], npt.NDArray[np.int32]] | None:
        spec = self.spec
        words = words_of(record, spec.words_column)
        if not words:
            return None
        return record, words, self._labels(record, len(words))

    def _labels(self, record: Record, words: int) -> npt.NDArray[np.int32]:
        column = label_column(record, self.spec)
        tags = None if column is None else record.values[column]
        if tags is None:
            return np.full(words, UNLABELLED, np.int32)
        if not isinstance(tags, (list, np.ndarray)):
            raise RecordError(
                f"column {column!r} holds {kind_of(tags)} where a list of tags was expected, one "
                "for each word"
            )
        if len(tags) != words:
            raise RecordError(
                f"{len(tags)} tags in column {column!r} for {words} words in column "
                f"{self.spec.words_column!r}, expected one for each (null where all have none)"
            )
        labels = np.array([self._classes.index(tag, record) for tag in tags], np.int32)
        return np.where(labels == IGNORE, np.int32(UNLABELLED), labels)


def tagged_row(
    words: Sequence[str], labels: npt.NDArray[np.int32], read: ReadWords, *, every: bool = False
) -> Row:
    """A row of words.

    Args:
        words: all of them; those that were cut off are not in the row.
        labels: int32 [words], a class or `UNLABELLED` of each.
        read: the tokens.
        every: whether a label belongs to all tokens of its word, or to the first.
    """
    first = read.first
    marked = read.word_of >= 0 if every else first
    own = np.full(len(read.ids), IGNORE, np.int32)
    own[marked] = labels[read.word_of[marked]]
    kept = tuple(words[i] for i in read.word_of[first])
    return Row(read.ids, own, read.type_ids, words=kept, first=first)


def words_of(record: Record, column: str) -> list[str]:
    """The words of a record.

    Raises:
        UsageError: it has no such column.
        RecordError: the column holds something else.
    """
    if column not in record.values:
        raise record.missing([column], "--columns tokens=THEIRS")
    words = record.values[column]
    if words is None:
        return []
    if not isinstance(words, (list, np.ndarray)):
        raise RecordError(
            f"column {column!r} holds {kind_of(words)} where a list of words was expected"
        )
    odd = next((word for word in words if not isinstance(word, str)), None)
    if odd is not None or any(word is None for word in words):
        raise RecordError(f"column {column!r} holds {kind_of(odd)} where a word was expected")
    return [checked_text(word, column) for word in words]


def label_column(record: Record, spec: RowSpec) -> str | None:
    """The column with the labels of a record; None where it has none.

    Raises:
        UsageError: several are filled, or it has not the one that was named.
    """
    column = spec.label_column
    defaults = TASKS[spec.task].label_columns
    if column is None or column in record.values:
        return column
    if column not in ("label", *defaults):
        # A name that the user chose and that is not there is a slip, not a transfer set.
        raise record.missing([column], "--label-column", spec.columns)
    found = filled_column(record, defaults)
    if found is None and almost_there(record, spec, defaults):
        raise record.missing(list(defaults), "--label-column", spec.columns)
    return found
