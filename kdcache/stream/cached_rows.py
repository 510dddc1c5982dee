"""Rows of a shard as `kdcache.align` takes them."""

from __future__ import annotations

from typing import NamedTuple

from kdcache.align import CachedRow
from kdcache.cache import Cache
from kdcache.cache.shard import ShardData


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
            packing: of the spec.
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
        cache: whose shard it is.
        data: its rows; their targets may be missing.
    """
    kind = RowKind.of_cache(cache)
    rows = (data.row(index) for index in range(len(data)))
    return [CachedRow(row.input_ids, row.labels, row.starts, *kind) for row in rows]
