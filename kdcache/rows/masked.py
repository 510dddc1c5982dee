"""Masked LM: rows of text in which some positions are masked, with their own ids as labels.

Algorithm: the rule of BERT (Devlin et al. 2019, section 3.1 and its code). Of the n tokens of a row
that are not special, `round(mask_share · n)` are chosen, at least one. Of these 80 % become the
mask token, 10 % any id of the vocabulary, 10 % stay; each has its own id as label. By words
(`mask_unit="word"`), whole words are chosen in random order as long as they fit that number, at
least one; the fate of each of their tokens is its own.

Rows are framed as in pre-training: what the tokenizer puts around one text (`[CLS] … [SEP]`,
`<s> … </s>`) stands around each row, whatever the packing. Under `concat` documents share rows, and
what the tokenizer puts after a text stands between two of them (FULL-SENTENCES of Liu et al. 2019,
section 4.2). Special tokens, also those spelt out in a text, are never masked and never replace
another: in RoBERTa a padding id inside a row would move all positions after it.

Cost: the tokenizer's, and some numpy calls a row; by words a Python step a chosen word.
Guarantee: what is masked is a pure function of (mask_seed, span, row of the span, position), not of
batches, workers or the order of spans. A row without a token that can be masked is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kdcache.corpus import Record
from kdcache.errors import UsageError
from kdcache.rows.encoders import Encoder
from kdcache.rows.spec import Row, RowSpec
from kdcache.rows.tokens import encoded, frame, need_offsets
from kdcache.targets import Stream, position_uniform
from kdcache.tasks import IGNORE

MASKED, RANDOM = 0.8, 0.1  # shares of the chosen positions; the others stay as they are

Ids = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.int64]


class _Text(NamedTuple):
    """A document, or a piece of one: its ids, and the number of the word that each belongs to."""

    record: Record
    ids: Ids
    words: Numbers


class MaskedEncoder(Encoder):
    """Masked LM: texts, packed into rows, with some positions masked."""

    def __init__(self, spec: RowSpec, tokenizer: Any) -> None:
        super().__init__(spec, tokenizer)
        if tokenizer.mask_token_id is None:
            raise UsageError(
                "the tokenizer has no mask token, so its model is no masked language model. Name "
                "another teacher, or another --task."
            )
        self._mask_id = int(tokenizer.mask_token_id)
        self._before, self._after = (np.array(ids, np.int32) for ids in frame(tokenizer))
        self._need_room(len(self._before) + len(self._after))
        self._text_tokens = spec.max_length - len(self._before) - len(self._after)
        self._words = spec.mask_unit == "word"
        if self._words:
            self._check_words()
        known = np.array(sorted(set(tokenizer.get_vocab().values())), np.int32)
        added = tokenizer.added_tokens_decoder
        special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        self._special = np.zeros(int(known.max()) + 1, np.bool_)
        self._special[[i for i in special if i < len(self._special)]] = True
        # Added tokens may be more than a model has ids for; the tokenizer's own are its vocabulary.
        self._usual = known[~np.isin(known, [*special, *added])]
        if not len(self._usual):
            raise UsageError("the tokenizer has no token that is not special: nothing to mask.")
        assert spec.mask_share is not None, "a masked LM's spec has it"
        self._share = spec.mask_share

    def encode(self, records: Iterable[Record], *, span: int = 0) -> Iterator[Row]:
        """See `Encoder.encode`."""
        batches = self._batches(records, self._make, lambda item: len(item[1]))
        texts = chain.from_iterable(map(self._tokenise, batches))
        pieces = self._joined(texts) if self.spec.packing == "concat" else self._apart(texts)
        number = 0
        for ids, words in pieces:
            if self._special[ids].all():
                continue
            yield self._masked(ids, words, span, number)
            number += 1

    def _make(self, record: Record) -> tuple[Record, str] | None:
        text = self._text(record, self.spec.text_column, "text")
        return (record, text) if text.strip() or not record.whole else None

    def _tokenise(self, batch: Sequence[tuple[Record, str]]) -> Iterator[_Text]:
        found = encoded(self.tokenizer, [text for _, text in batch])
        for i, (record, _) in enumerate(batch):
            ids = np.asarray(found["input_ids"][i], np.int32)
            if self._special[ids].all():
                self.empty += record.whole
                continue
            words = np.arange(len(ids))
            if self._words:
                of = found.word_ids(i)
                # A token outside the words is one by itself.
                words = np.array([len(ids) + j if w is None else w for j, w in enumerate(of)])
            yield _Text(record, ids, words)

    def _joined(self, texts: Iterable[_Text]) -> Iterator[tuple[Ids, Numbers]]:
        """Stretches of documents end to end."""
        parts: list[tuple[Ids, Numbers]] = []
        size = words = 0
        for text in texts:
            parts.append((text.ids, text.words + words))
            words = int(parts[-1][1].max()) + 1
            size += len(text.ids)
            if text.record.closes:
                parts.append((self._after, np.full(len(self._after), -1)))
                size += len(self._after)
            if size > 64 * self._text_tokens:
                joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
                full = len(joined[0]) // self._text_tokens * self._text_tokens
                yield from self._blocks(joined[0][:full], joined[1][:full])
                parts = [(joined[0][full:], joined[1][full:])]
                size = len(joined[0]) - full
        if parts:
            ids, numbers = (np.concatenate(column) for column in zip(*parts, strict=True))
            yield from self._blocks(ids, numbers)

    def _blocks(self, ids: Ids, words: Numbers) -> Iterator[tuple[Ids, Numbers]]:
        """Rows of full length, without what separates documents at their ends."""
        for start in range(0, len(ids), self._text_tokens):
            own = words[start : start + self._text_tokens]
            inside = np.flatnonzero(own >= 0)
            if len(inside):
                part = slice(start + inside[0], start + inside[-1] + 1)
                yield ids[part], words[part]

    def _apart(self, texts: Iterable[_Text]) -> Iterator[tuple[Ids, Numbers]]:
        """Documents that do not share rows."""
        text_tokens, packing = self._text_tokens, self.spec.packing
        for record, ids, words in texts:
            over = len(ids) > text_tokens
            if over and packing == "whole":
                cause = (
                    f"{len(ids):,} tokens do not fit one row of {text_tokens:,} and the "
                    f"tokenizer's own, --max-length is {self.spec.max_length:,} (--packing "
                    "none cuts it, split continues it in further rows)"
                )
                self.stats.reject(self.spec.on_error, record.file, record.location, cause)
                continue
            if packing == "split":
                for start in range(0, len(ids), text_tokens):
                    yield ids[start : start + text_tokens], words[start : start + text_tokens]
                continue
            self.truncated += over
            if self._special[ids[:text_tokens]].all():
                cause = f"its first {text_tokens} tokens (--max-length) contain none to mask"
                self.stats.reject("skip", record.file, record.location, cause)
                continue
            yield ids[:text_tokens], words[:text_tokens]

    def _masked(self, ids: Ids, words: Numbers, span: int, row: int) -> Row:
        """A row of some tokens, of which at least one is not special."""
        positions = np.flatnonzero(~self._special[ids])
        at = positions + len(self._before)  # in the row
        choice, fate, other = (
            position_uniform(self.spec.mask_seed, span, row, at, stream=stream)
            for stream in (Stream.MASK_CHOICE, Stream.MASK_FATE, Stream.MASK_OTHER)
        )
        count = max(1, int(self._share * len(positions) + 0.5))
        if self._words:
            chosen = _by_words(choice, words[positions], count)
        else:
            chosen = np.sort(np.argsort(choice, kind="stable")[:count])
        ids = np.concatenate([self._before, ids, self._after])
        labels = np.full(len(ids), IGNORE, np.int32)
        at, fate, other = at[chosen], fate[chosen], other[chosen]
        labels[at] = ids[at]
        random = self._usual[(other * len(self._usual)).astype(np.int64)]
        ids[at] = np.where(
            fate < MASKED, self._mask_id, np.where(fate < MASKED + RANDOM, random, ids[at])
        )
        return Row(ids, labels)

    def _check_words(self) -> None:
        """Refuse a tokenizer that does not tell words apart: each row would be one word.

        Raises:
            UsageError: it does not.
        """
        need_offsets(self.tokenizer, "--mask unit=word")
        words = self.tokenizer(["one two three"], add_special_tokens=False).word_ids(0)
        if len({word for word in words if word is not None}) < 3:
            raise UsageError(
                "the tokenizer does not divide a text into words before it divides words into "
                "tokens, so whole words cannot be masked. Use --mask unit=token."
            )


def _by_words(choice: npt.NDArray[np.float64], words: Numbers, count: int) -> Numbers:
    """Indices of the tokens of words that together have at most `count`, but for a single one.

    Args:
        choice: [n], a random number of each token; a word has that of its first.
        words: [n], the number of each token's word.
        count: tokens that are wanted.
    """
    _, first, which, sizes = np.unique(
        words, return_index=True, return_inverse=True, return_counts=True
    )
    taken, left = [], count
    fits = bool(sizes.min() <= count)
    for word in np.argsort(choice[first], kind="stable").tolist():
        if left <= 0:
            break
        if sizes[word] <= left or (left == count and not fits):
            taken.append(word)
            left -= int(sizes[word])
    return np.flatnonzero(np.isin(which, taken))
