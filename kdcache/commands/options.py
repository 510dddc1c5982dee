"""The options of `gc`.

The options of `repair`.

The options of `inspect`.

The options of `verify`.

The options of `export`.

The options of `transcode`.

The options of `env`.

The options of `report`.

The options of `sweep`.

The options of `demo`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal

from kdcache.commands.build.options import WorkerOptions
from kdcache.commands.groups import EngineRunOptions
from kdcache.files import file_problems
from kdcache.options import Options, option


@dataclass(frozen=True)
class GcOptions(Options):
    """What `kdcache gc` takes: fields have the names of its options."""

    cache: str = option(help="folder or URL, finished or not.", metavar="CACHE", positional=True)
    dry_run: bool = option(False, help="list what would be removed, and remove nothing.")


@dataclass(frozen=True)
class RepairOptions(Options):
    """What `kdcache repair` takes: fields have the names of its options."""

    cache: str = option(help="folder or URL, finished or not.", metavar="CACHE", positional=True)
    reseal: bool = option(
        False,
        help="accept shards that were made again with other bytes than in the manifest. This "
        "changes the digest of the cache.",
    )


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


@dataclass(frozen=True)
class VerifyOptions(EngineRunOptions):
    """What `kdcache verify` takes: fields have the names of its options."""

    cache: str = option(help="folder or URL of a finished cache.", metavar="CACHE", positional=True)
    teacher: tuple[str, ...] = option(
        (),
        help="folder, URL or hub id of each teacher, in the order of the build, to run again on a "
        "few rows (optional).",
        metavar="DIR_OR_HUB_ID",
    )
    sample: int = option(32, help="number of rows to run again.", metavar="ROWS", at_least=1)
    seed: int = option(0, help="seed that chooses these rows.", at_least=0)
    trust_remote_code: bool = option(False, help="let code that ships with a teacher run.")

    def conflicts(self) -> Sequence[str]:
        """See `Options.conflicts`."""
        return self.engine_conflicts(default="vllm")


@dataclass(frozen=True)
class ExportOptions(Options):
    """What `kdcache export` takes: fields have the names of its options."""

    cache: str = option(help="folder or URL of a finished cache.", metavar="CACHE", positional=True)
    out: str = option(help="folder of the files.", metavar="DIR", output=True)
    to: Literal["parquet"] = option("parquet", help="the format of the files.", hidden=True)
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


@dataclass(frozen=True)
class EnvOptions(Options):
    """`kdcache env` takes none."""


_MOST_PATHS = 200


@dataclass(frozen=True)
class ReportOptions(Options):
    """What `kdcache report` takes: fields have the names of its options."""

    paths: tuple[str, ...] = option(
        help="caches (folders or URLs), and folders of runs and sweeps.",
        metavar="PATH",
        positional=True,
    )
    _: KW_ONLY
    out: str = option("report.html", help="the page.", metavar="FILE.html", output=True)
    rows: int = option(3, help="rows of each cache to show as text.", at_least=0, at_most=20)
    top: int = option(3, help="predictions to show at each position.", at_least=1, at_most=20)

    def conflicts(self) -> Sequence[str]:
        """See `Options.conflicts`."""
        problems = []
        if not 0 < len(self.paths) <= _MOST_PATHS:
            problems.append(f"{len(self.paths)} paths, expected 1 to {_MOST_PATHS}.")
        return [*problems, *file_problems(self.out, "--out")]


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


@dataclass(frozen=True)
class DemoOptions(Options):
    """What `kdcache demo` takes: fields have the names of its options."""

    out: str = option(
        "kdcache-demo", help="folder of everything the demo makes.", metavar="DIR", output=True
    )
    workers: int = option(2, help="Ray workers that run the teacher.", at_least=0)
    codec: str = option(
        "sample:20",
        help="codec of the caches: what is stored of each distribution of the teacher.",
        metavar="dense|topk:K|sample:N|anchored:N",
    )
    alpha: float = option(
        0.1, help="weight of the hard loss of the distilled students.", at_least=0, below=1
    )
    teacher_epochs: float = option(
        6.0, help="passes of the teacher over the corpus.", above=0, hidden=True
    )
    student_epochs: float = option(3.0, help="passes of each student.", above=0, hidden=True)
    documents: int | None = option(
        None, help="use only the first documents of the corpus. Default: all.", at_least=10
    )
    seed: int = option(0, help="seed of weights, orders and samples.", at_least=0)
