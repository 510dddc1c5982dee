"""Caches as a stream of batches: order, cursor, read-ahead, and random access by row number."""

from __future__ import annotations

from kdcache.stream.batch import (
    Batch,
    Collator,
    LabelReading,
    TargetDataset,
    Tokenize,
    collate,
)
from kdcache.stream.checks import check_caches, open_caches
from kdcache.stream.order import Cursor, order, share
from kdcache.stream.parallel import SumOverRanks
from kdcache.stream.reader import TargetStream
from kdcache.stream.shard_rows import ShardRows, join

__all__ = [
    "Batch",
    "Collator",
    "Cursor",
    "LabelReading",
    "ShardRows",
    "SumOverRanks",
    "TargetDataset",
    "TargetStream",
    "Tokenize",
    "check_caches",
    "collate",
    "join",
    "open_caches",
    "order",
    "share",
]
