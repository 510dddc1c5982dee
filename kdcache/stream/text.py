"""The text of rows: as `kdcache.align` takes them, and in chunks.

A chunk is text that models of different tokenizers are asked about alike: for a student that reads
the cached rows as they are, one token; special tokens are in none. Figures that no tokenizer enters
are made of chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kdcache.align import CachedRow, TokenBytes, label_bytes
from kdcache.cache import Cache
from kdcache.cache.shard import ShardData
from kdcache.targets.label_logprob import decode_logprobs
from kdcache.tasks import IGNORE


class RowKind(NamedTuple):
    """What rows hold; see `kdcache.align.CachedRow`.

    Attributes:
        opens: whether each begins with a document.
        single: whether each is of one document.
    """

    opens: bool
    single: bool

    @classmethod
    def of(cls, packing: str, record_form: str) -> RowKind:
        """The kind of rows that a `RowSpec` makes.

        Args:
            record_form: likewise. Records of ids may be several documents end to end.
        """
        return cls(packing in ("none", "whole"), packing != "concat" and record_form != "ids")

    @classmethod
    def of_cache(cls, cache: Cache) -> RowKind:
        """The kind of a cache's rows."""
        return cls.of(cache.spec.packing, str(cache.spec.rows.get("record_form")))


def cached_rows(cache: Cache, data: ShardData) -> list[CachedRow]:
    """The rows of a shard of a language model, to be aligned with those of a student.

    Args:
        data: its rows; their targets may be missing.
    """
    kind = RowKind.of_cache(cache)
    rows = (data.row(index) for index in range(len(data)))
    return [CachedRow(row.input_ids, row.labels, row.starts, *kind) for row in rows]


@dataclass(frozen=True, eq=False)
class TextChunks:
    """Chunks of text of a batch.

    Attributes:
        begin: int64 [C], the first of the student's positions in the batch that each chunk has.
        end: int64 [C], the one after its last.
        sizes: int64 [C], bytes of text.
        likelihood: float64 [C], the teacher's log-likelihood, minus infinity if it gives a chunk no
            probability; None where the cache does not know it.
    """

    begin: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    likelihood: npt.NDArray[np.float64] | None

    def pin_memory(self) -> TextChunks:
        """Itself: all of it stays on the host."""
        return self


class RowsText:
    """The text of rows whose student has the caches' tokenizer."""

    def __init__(self, cache: Cache) -> None:
        """Read the tokenizer.

        Raises:
            UsageError: a tokenizer that loses bytes of a text.
        """
        self._tokens = TokenBytes(cache.tokenizer(), "the cache's tokenizer")

    def label_bytes(self, cache: Cache, data: ShardData) -> npt.NDArray[np.int64]:
        """`ShardData.label_bytes` of a shard; caches of a stream may differ in what rows hold."""
        found = [label_bytes(self._tokens, row) for row in cached_rows(cache, data)]
        sizes = [np.where(is_text, size, -1) for size, is_text in found]
        joined = np.concatenate([np.zeros(0, np.int64), *sizes])
        assert len(joined) == np.count_nonzero(data.labels != IGNORE), (
            "a label has bytes or is none"
        )
        return joined

    def __call__(self, data: ShardData) -> TextChunks:
        """The chunks of some rows."""
        sizes = data.label_bytes
        assert sizes is not None, "a stream with text knows the bytes of all its labels"
        at = np.flatnonzero(sizes >= 0)
        known = None
        if data.label_logprob is not None:
            known = decode_logprobs(data.label_logprob).astype(np.float64)[at]
        return TextChunks(at, at + 1, sizes[at], known)
