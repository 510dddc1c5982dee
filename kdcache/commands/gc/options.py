"""The options of `gc`."""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.options import Options, option


@dataclass(frozen=True)
class GcOptions(Options):
    """What `kdcache gc` takes: fields have the names of its options."""

    cache: str = option(help="folder or URL, finished or not.", metavar="CACHE", positional=True)
    dry_run: bool = option(False, help="list what would be removed, and remove nothing.")
