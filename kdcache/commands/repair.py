"""`kdcache repair`: removes the damaged files of a cache; the same build makes only those again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcache.cache.repair import RepairResult
from kdcache.cache.repair import repair as repair_cache
from kdcache.options import Options, option

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class RepairOptions(Options):
    """What `kdcache repair` takes: fields have the names of its options."""

    cache: str = option(help="folder or URL, finished or not.", metavar="CACHE", positional=True)
    reseal: bool = option(
        False,
        help="accept shards that were made again with other bytes than in the manifest. This "
        "changes the digest of the cache.",
    )


def repair(options: RepairOptions) -> RepairResult:
    """Remove damaged files, so that the same build makes them again; see `kdcache.cache.repair`."""
    return repair_cache(options.cache, reseal=options.reseal)
