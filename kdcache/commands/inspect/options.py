"""The options of `inspect`."""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.options import Options, option


@dataclass(frozen=True)
class InspectOptions(Options):
    """What `kdcache inspect` takes."""

    cache: str = option(help="folder or URL, finished or not.", metavar="CACHE", positional=True)
    row: int | None = option(
        None, help="number of a row to show, counted from 0 over all shards (optional).", at_least=0
    )
    temperature: float | None = option(
        None,
        help="of the shown probabilities. Default: 1 where the cache declares it, else the first.",
        above=0,
    )
    top: int = option(5, help="predictions to show at each position.", at_least=1)
