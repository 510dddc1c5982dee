"""`kdcache gc`: removes what crashed builds left beside a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcache.cache.repair import GcResult
from kdcache.cache.repair import gc as gc_cache
from kdcache.options import Options, option

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class GcOptions(Options):
    """What `kdcache gc` takes: fields have the names of its options."""

    cache: str = option(help="folder or URL, finished or not.", metavar="CACHE", positional=True)
    dry_run: bool = option(False, help="list what would be removed, and remove nothing.")


def gc(options: GcOptions) -> GcResult:
    """Remove what crashed builds have left; see `kdcache.cache.repair.gc`."""
    return gc_cache(options.cache, dry_run=options.dry_run)
