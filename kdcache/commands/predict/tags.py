"""Tags of sentences: words in, one JSON line a sentence out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kdcache.corpus import Record
from kdcache.errors import UsageError
from kdcache.humanize import printable
from kdcache.rows import WordReader
from kdcache.rows.batches import batches
from kdcache.rows.text import checked_text
from kdcache.rows.words import tagged_row, words_of
from kdcache.student.saved import LoadedModel
from kdcache.tasks import UNLABELLED


@dataclass(frozen=True)
class TaggedSentence:
    """A tagger's prediction for a sentence.

    Attributes:
        tokens: its words, unchanged from the input.
        tags: the most probable class of each; None of words beyond what the model reads.
        probabilities: of these, None likewise.
    """

    tokens: tuple[str, ...]
    tags: tuple[str | None, ...]
    probabilities: tuple[float | None, ...]

    def to_json(self) -> str:
        """One line."""
        values = {"tokens": self.tokens, "tags": self.tags, "probabilities": self.probabilities}
        return printable(json.dumps(values, ensure_ascii=False))

    @property
    def cut(self) -> int:
        """How many words have no tag."""
        return self.tags.count(None)


def sentence_of(record: Record, words_column: str, text_column: str) -> tuple[str, ...]:
    """The words of a record: a list of them, or a text that is divided at blanks.

    Raises:
        UsageError: it has neither column.
        RecordError: the column holds something else.
    """
    if words_column not in record.values and text_column in record.values:
        return tuple(checked_text(record.values[text_column], text_column).split())
    return tuple(words_of(record, words_column))


@torch.inference_mode()
def tagged(
    model: LoadedModel, sentences: Sequence[Sequence[str]], *, batch_tokens: int = 4096
) -> list[TaggedSentence]:
    """A loaded tagger's predictions for sentences, in their order.

    Raises:
        UsageError: the model has no tokenizer, or cannot read a word.
    """
    saved = model.saved
    if saved.tokenizer is None:
        raise UsageError(
            f"{saved.who} has no tokenizer to read words with. Copy its tokenizer's "
            "files into its folder."
        )
    names = saved.label_names
    bounds = [n for n in (saved.reach, saved.tokenizer.model_max_length) if n is not None]
    filled = [i for i, words in enumerate(sentences) if words]
    read = WordReader(saved.tokenizer).read([sentences[i] for i in filled], min([1 << 20, *bounds]))
    rows = []
    for i, one in zip(filled, read, strict=True):
        if isinstance(one, str):
            raise UsageError(f"{saved.who} cannot read {sentences[i][:20]}: {one}.")
        labels = np.full(len(sentences[i]), UNLABELLED, np.int32)
        rows.append(tagged_row(sentences[i], labels, one))
    found = [TaggedSentence(tuple(words), (), ()) for words in sentences]
    for chosen in batches([len(row.input_ids) for row in rows], batch_tokens):
        some = [rows[i] for i in chosen]
        p, best = torch.cat(list(model.run(some))).double().softmax(-1).max(-1)
        done = 0
        for i, row in zip(chosen, some, strict=True):
            words = tuple(sentences[filled[i]])
            kept = len(row.words or ())
            own = slice(done, done + kept)
            rest = (None,) * (len(words) - kept)
            tags = (*(names[tag] for tag in best[own].tolist()), *rest)
            found[filled[i]] = TaggedSentence(words, tags, (*p[own].tolist(), *rest))
            done += kept
    return found
