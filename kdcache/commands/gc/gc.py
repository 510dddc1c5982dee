"""`kdcache gc`: removes what crashed builds left beside a cache."""

from __future__ import annotations

from kdcache.cache.repair import GcResult
from kdcache.cache.repair import gc as gc_cache
from kdcache.commands.gc.options import GcOptions


def gc(options: GcOptions) -> GcResult:
    """Remove what crashed builds have left; see `kdcache.cache.repair.gc`."""
    return gc_cache(options.cache, dry_run=options.dry_run)
