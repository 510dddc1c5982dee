"""Rows of a shard as `kdcache.align` takes them."""

from __future__ import annotations

from kdcache.align import CachedRow
from kdcache.cache import Cache
from kdcache.cache.shard import ShardData

OPEN_ROWS = ("none", "whole")
"""Packings where each row begins with a document."""


def cached_rows(cache: Cache, data: ShardData) -> list[CachedRow]:
    """The rows of a shard of a language model, to be aligned with those of a student.

    Args:
        cache: whose shard it is.
        data: its rows; their targets may be missing.
    """
    opens = cache.spec.packing in OPEN_ROWS
    rows = (data.row(index) for index in range(len(data)))
    return [CachedRow(row.input_ids, row.labels, row.starts, opens) for row in rows]
