"""The text of a batch in chunks: what figures that no tokenizer enters are made of.

A chunk is text that models of different tokenizers are asked about alike (`kdcache.align`): for a
student that reads the cached rows as they are, one token; special tokens are in none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kdcache.align import CachedRow, TokenBytes, label_bytes
from kdcache.cache import Cache
from kdcache.cache.shard import ShardData
from kdcache.stream.cached_rows import RowKind
from kdcache.targets.label_logprob import decode_logprobs
from kdcache.tasks import IGNORE


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
    """The text of rows whose student has the cache's tokenizer."""

    def __init__(self, caches: Sequence[Cache]) -> None:
        """Read the tokenizer.

        Args:
            caches: of one tokenizer; what begins a text is as in the first one's packing.

        Raises:
            UsageError: a tokenizer that loses bytes of a text.
        """
        self._tokens = TokenBytes(caches[0].tokenizer(), "the cache's tokenizer")
        self._kind = RowKind.of_cache(caches[0])

    def __call__(self, data: ShardData) -> TextChunks:
        """The chunks of some rows.

        Args:
            data: rows of a batch, in order.
        """
        rows = (data.row(index) for index in range(len(data)))
        found = [
            label_bytes(self._tokens, CachedRow(row.input_ids, row.labels, row.starts, *self._kind))
            for row in rows
        ]
        sizes = np.concatenate([size for size, _ in found])
        at = np.flatnonzero(np.concatenate([text for _, text in found]))
        known = None
        if data.label_logprob is not None:
            known = decode_logprobs(data.label_logprob).astype(np.float64)[at]
        assert len(sizes) == np.count_nonzero(data.labels != IGNORE), "a label has bytes or is none"
        return TextChunks(at, at + 1, sizes[at], known)
