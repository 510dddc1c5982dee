"""`kdcache gc`: removes what crashed builds left beside a cache.

`kdcache repair`: removes the damaged files of a cache; the same build makes only those again.
"""

from __future__ import annotations

from kdcache.cache.repair import GcResult, RepairResult
from kdcache.cache.repair import gc as gc_cache
from kdcache.cache.repair import repair as repair_cache
from kdcache.commands.options import GcOptions, RepairOptions


def gc(options: GcOptions) -> GcResult:
    """Remove what crashed builds have left; see `kdcache.cache.repair.gc`."""
    return gc_cache(options.cache, dry_run=options.dry_run)


def repair(options: RepairOptions) -> RepairResult:
    """Remove damaged files, so that the same build makes them again; see `kdcache.cache.repair`."""
    return repair_cache(options.cache, reseal=options.reseal)
