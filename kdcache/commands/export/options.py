"""The options of `export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kdcache.options import Options, option


@dataclass(frozen=True)
class ExportOptions(Options):
    """What `kdcache export` takes: fields have the names of its options."""

    cache: str = option(help="folder or URL of a finished cache.", metavar="CACHE", positional=True)
    out: str = option(help="folder of the files.", metavar="DIR", output=True)
    to: Literal["parquet"] = option("parquet", help="the format of the files.")
    temperature: float | None = option(
        None,
        help="of the probabilities. Default: 1 where the cache declares it, else the first "
        "declared.",
        above=0,
    )
    top: int | None = option(
        None,
        help="write only the most probable ids and what the others weigh together. Needed of "
        "`dense` and `hidden` targets of more than 4,096 ids.",
        metavar="K",
        at_least=1,
    )
