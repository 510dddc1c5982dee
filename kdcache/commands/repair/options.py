"""The options of `repair`."""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.options import Options, option


@dataclass(frozen=True)
class RepairOptions(Options):
    """What `kdcache repair` takes: fields have the names of its options."""

    cache: str = option(help="folder or URL, finished or not.", metavar="CACHE", positional=True)
    reseal: bool = option(
        False,
        help="accept shards that were made again with other bytes than in the manifest. This "
        "changes the digest of the cache.",
    )
