"""`kdcache repair`: removes the damaged files of a cache; the same build makes only those again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcache.cache import repair as mending
from kdcache.cache.repair import RepairResult

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class RepairOptions:
    """What `kdcache repair` is asked for; fields bear the names of its options.

    Attributes:
        cache: folder or URL, finished or not.
        reseal: accept shards that were made anew with other bytes than the manifest says. The cache
            gets another digest.
    """

    cache: str
    reseal: bool = False


def repair(options: RepairOptions) -> RepairResult:
    """Remove what is broken, so that the same build makes it anew; see `kdcache.cache.repair`."""
    return mending.repair(options.cache, reseal=options.reseal)
