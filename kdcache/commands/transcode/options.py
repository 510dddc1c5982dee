"""The options of `transcode`."""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.commands.build.options import WorkerOptions
from kdcache.options import option


@dataclass(frozen=True)
class TranscodeOptions(WorkerOptions):
    """What `kdcache transcode` takes: fields have the names of its options."""

    cache: str = option(
        help="folder or URL of a finished cache, whose targets determine the new ones.",
        metavar="CACHE",
        positional=True,
    )
    codec: str = option(
        help="of the new cache. From `dense` and `hidden` any that `build` takes but `hidden`; "
        "from `topk:K` only one of fewer ids.",
        metavar="CODEC",
    )
    out: str = option(help="folder or URL of the new cache.", metavar="CACHE", output=True)
    temperatures: tuple[float, ...] = option(
        (),
        help="the temperatures a student may train at. Default: those of CACHE.",
        metavar="T",
        comma=True,
        above=0,
    )
    seed: int = option(0, help="seed of the `sample` codec.")
