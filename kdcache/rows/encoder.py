"""Encoder: a stream of records in, rows out; what the encoders of all tasks share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from kdcache.corpus import ReadStats, Record, RecordError
from kdcache.rows.spec import Row, RowSpec

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 22  # a batch of books must not be a batch of 256 books

Item = TypeVar("Item")


class Encoder(ABC):
    """Turns records into rows, counting what it leaves out.

    Attributes:
        spec: The options.
        tokenizer: A Hugging Face tokenizer.
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
