"""`kdcache repair`: removes the damaged files of a cache; the same build makes only those again."""

from __future__ import annotations

from kdcache.cache.repair import RepairResult
from kdcache.cache.repair import repair as repair_cache
from kdcache.commands.repair.options import RepairOptions


def repair(options: RepairOptions) -> RepairResult:
    """Remove damaged files, so that the same build makes them again; see `kdcache.cache.repair`."""
    return repair_cache(options.cache, reseal=options.reseal)
