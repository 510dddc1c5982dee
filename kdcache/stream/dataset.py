"""Rows of caches by number, for training loops with their own order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import Dataset

from kdcache.cache import Cache
from kdcache.cache.shard import ShardData
from kdcache.stream.batch import Batch, Reading, Tokenize, reading_of, shared_columns
from kdcache.stream.checks import check_caches, open_caches
from kdcache.stream.shard_rows import ShardRows, join


class TargetDataset(Dataset[ShardData]):
    """Rows of caches by number, for a plain `DataLoader` or HF `Trainer` together with `Collator`.

    An item is one row with its targets. Shards are read when one of their rows is requested and the
    last few are kept: random access over a cache of many shards decodes them again and again, for
    which `TargetStream` is the cure.
    """

    def __init__(
        self,
        caches: Cache | str | Sequence[Cache | str],
        *,
        keep: int = 4,
        cross: Reading | None = None,
    ) -> None:
        """Open the caches.

        Args:
            caches: sealed caches, opened or by URL.
            keep: decoded shards held in memory (by each process).
            cross: how the student reads, such as a `CrossTokenizer` for language models with a
                tokenizer of their own; the `Collator` needs it, too.
        """
        self.cross = cross
        self.caches = open_caches(caches)
        check_caches(self.caches, (), [])
        self._shards = [
            (c, i) for c, cache in enumerate(self.caches) for i in range(cache.spec.spans)
        ]
        sizes = [self.caches[c].manifest.shards[i].rows for c, i in self._shards]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._keep = keep
        self.kept = shared_columns(self.caches)
        self._recent: OrderedDict[int, ShardRows] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> ShardData:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        slot = int(np.searchsorted(self._ends, index, side="right"))
        pool = self._recent.pop(slot, None)
        if pool is None:
            cache, shard = self._shards[slot]
            reading = reading_of(0, None, self.cross)
            pool = ShardRows([reading.read(self.caches[cache], shard, kept=self.kept)])
        self._recent[slot] = pool
        if len(self._recent) > self._keep:
            self._recent.popitem(last=False)
        row = index - (int(self._ends[slot - 1]) if slot else 0)
        return pool.take(np.array([row]))


@dataclass
class Collator:
    """Rows of a `TargetDataset` to a batch: the `collate_fn` or HF `data_collator`.

    Attributes:
        pad_id: id that fills rows up (`cache.spec.pad_id`).
        temperature: of the soft targets, or None to leave them out.
        tokenize: text to tensors, for classifiers with a tokenizer of their own.
        cross: that of the dataset, such as a `CrossTokenizer`.
    """

    pad_id: int
    temperature: float | None = 1.0
    tokenize: Tokenize | None = field(default=None, repr=False)
    cross: Reading | None = field(default=None, repr=False)

    def __call__(self, rows: Sequence[ShardData]) -> Batch:
        """Collate items of the dataset; see `collate` for the keys of a batch."""
        reading = reading_of(self.pad_id, self.tokenize, self.cross)
        return reading.collate(join(rows), temperature=self.temperature)
