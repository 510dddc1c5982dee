"""`kdcache gc`: removes what crashed builds left beside a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcache.cache import repair as mending
from kdcache.cache.repair import GcResult

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class GcOptions:
    """What `kdcache gc` is asked for; fields bear the names of its options.

    Attributes:
        cache: folder or URL, finished or not.
        dry_run: say what would be removed, and remove nothing.
    """

    cache: str
    dry_run: bool = False


def gc(options: GcOptions) -> GcResult:
    """Remove what crashed builds have left; see `kdcache.cache.repair.gc`."""
    return mending.gc(options.cache, dry_run=options.dry_run)
