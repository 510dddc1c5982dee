"""Prompts: the ids that a model continues, of any record that `build` reads.

A text, or the prompt of a pair, is tokenised with what the tokenizer puts before a text, and
nothing after it. A conversation is rendered up to the answer that is wanted, without the last one
if it ends in an answer. Of ids all are the prompt, or those before the first that is learnt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from kdcache.corpus import Record, RecordError
from kdcache.rows.encoders import DocumentMaker, Encoder
from kdcache.rows.ids import SequenceMaker
from kdcache.rows.spec import Row, RowSpec
from kdcache.rows.tokens import Document, frame, tokens_of

_NO_LABELS = np.zeros(0, np.int32)


class PromptEncoder(Encoder):
    """Turns records into prompts: rows without labels."""

    def __init__(
        self, spec: RowSpec, tokenizer: Any, longest: int, tokens: int | None = None
    ) -> None:
        """Begin.

        Args:
            spec: how records are read.
            tokenizer: the model's.
            longest: tokens of a prompt that leave room for an answer; a longer one is an error.
            tokens: tokens of each record that are its prompt; None for all.
        """
        super().__init__(spec, tokenizer)
        self._longest, self._tokens = longest, tokens
        self._prefix, _ = frame(tokenizer)
        ids = spec.record_form == "ids"
        self._ids = SequenceMaker(spec, tokenizer) if ids else None
        self._documents = None if ids else DocumentMaker(spec, tokenizer, prompts=True)

    def encode(self, records: Iterable[Record], *, span: int = 0) -> Iterator[Row]:
        """See `Encoder.encode`."""
        for batch in self._batches(records, self._prompt, len):
            for ids in batch:
                yield Row(np.asarray(ids, np.int32), _NO_LABELS)

    def _prompt(self, record: Record) -> list[int] | None:
        ids = self._own(record)
        if not ids:
            return None
        if self._tokens is not None:
            ids = ids[: self._tokens]
        if len(ids) > self._longest:
            raise RecordError(
                f"a prompt of {len(ids):,} tokens leaves no room for an answer: at most "
                f"{self._longest:,} do (--max-length less --max-new-tokens). --prompt-tokens cuts "
                "prompts"
            )
        return ids

    def _own(self, record: Record) -> list[int] | None:
        if self._ids is not None:
            found = self._ids.make(record)
            if found is None:
                return None
            marked = self.spec.labels in ("token", "next") and not found.mask.all()
            stop = int(found.mask.argmax()) if marked else len(found.ids)
            return list(map(int, found.ids[:stop]))
        assert self._documents is not None, "one of the two is there"
        document: Document = self._documents.prompt(record)
        if not document.text or document.text.isspace():
            return None
        ids, _, _ = next(tokens_of(self.tokenizer, [document.text], add_special_tokens=False))
        return [*(self._prefix if document.framed else ()), *ids]
