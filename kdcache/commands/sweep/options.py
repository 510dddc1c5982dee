"""The options of `sweep`."""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.options import Options, option


@dataclass(frozen=True)
class SweepOptions(Options):
    """What a sweep takes."""

    grid: str = option(
        help="YAML file: options of `kdcache train`, and under `grid` those with several values.",
        metavar="GRID.yaml",
        positional=True,
    )
    out: str = option(help="folder of the sweep.", metavar="SWEEP", output=True)
    workers: int | None = option(
        None,
        help="number of runs at once on Ray; `auto` for as many as fit, 0 for one after another "
        "in this process.",
        auto=True,
        at_least=0,
    )
    gpus_per_run: float | None = option(
        None,
        help="GPUs per run, also a fraction of one. Default: one where there are any.",
        metavar="GPUS",
        at_least=0,
    )
    address: str | None = option(
        None, help="Ray address. Default: a Ray of this process.", metavar="RAY_ADDRESS"
    )
