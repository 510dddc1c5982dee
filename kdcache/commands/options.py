"""The options of commands that have few; those of others are in their own folders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, MISSING, dataclass, fields
from typing import Literal

from kdcache.commands.build.options import BuildOptions, WorkerOptions
from kdcache.commands.groups import (
    EngineRunOptions,
    InferenceOptions,
    PlotOptions,
    RecordOptions,
    TeacherRunOptions,
    form_problems,
)
from kdcache.commands.row_options import MaskedRowOptions, SourceOptions
from kdcache.domains import Named
from kdcache.files import file_problems
from kdcache.options import Options, again, option, problems_of
from kdcache.tasks import CAUSAL_LM, SEQUENCE_CLASSIFICATION, TASKS, Task


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
class PushOptions(Options):
    """What `kdcache push` takes."""

    cache: str = option(help="folder or URL of a finished cache.", metavar="CACHE", positional=True)
    to: str = option(
        help="the repository, hf://datasets/OWNER/NAME; made where there is none, private.",
        metavar="REPOSITORY",
        positional=True,
    )
    measured: tuple[str, ...] = option(
        (),
        help="what `verify --teacher` or `plan` printed with --json, for the card (optional).",
        metavar="FILE.json",
    )


@dataclass(frozen=True)
class PullOptions(Options):
    """What `kdcache pull` takes."""

    cache: str = option(help="URL of a finished cache.", metavar="URL", positional=True)
    to: str = option(help="folder of the copy.", metavar="CACHE", positional=True, output=True)


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

    cache: tuple[str, ...] = option(
        help="folder or URL of a finished cache; two with --layout dpo (of the chosen and of the "
        "rejected answers) and documents (of two teachers).",
        metavar="CACHE",
        positional=True,
    )
    out: str = option(help="folder of the files.", metavar="DIR", output=True)
    to: Literal["parquet"] = option("parquet", help="the format of the files.", hidden=True)
    layout: Literal["kdcache", "axolotl", "dpo", "documents"] = option(
        "kdcache",
        help="columns of the files: kdcache's own; those that axolotl's KD plugin trains on; pairs "
        "with reference log-probabilities for TRL's DPOTrainer; or documents, with the mean "
        "difference of two teachers' log-probabilities.",
    )
    select: float | None = option(
        None,
        help="with --layout documents: write only this share, those of the largest difference.",
        metavar="SHARE",
        above=0,
        at_most=1,
    )
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

    def conflicts(self) -> Sequence[str]:
        """See `Options.conflicts`."""
        problems = []
        pair = self.layout in ("dpo", "documents")
        if len(self.cache) != 1 + pair:
            needed = "two caches" if pair else "one cache"
            problems.append(f"--layout {self.layout} takes {needed}, not {len(self.cache)}.")
        if self.select is not None and self.layout != "documents":
            problems.append("--select chooses documents: it needs --layout documents.")
        if pair and (self.temperature, self.top) != (None, None):
            problems.append(
                f"--layout {self.layout} is about labels at T = 1: leave --temperature and --top "
                "out."
            )
        return problems


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
        hidden=True,
    )
    alpha: float = option(
        0.1,
        help="weight of the hard loss of the distilled students.",
        at_least=0,
        below=1,
        hidden=True,
    )
    teacher_epochs: float = option(
        6.0, help="passes of the teacher over the corpus.", above=0, hidden=True
    )
    student_epochs: float = option(3.0, help="passes of each student.", above=0, hidden=True)
    documents: int | None = option(
        None, help="use only the first documents of the corpus. Default: all.", at_least=10
    )
    seed: int = option(0, help="seed of weights, orders and samples.", at_least=0)


@dataclass(frozen=True)
class PlanOptions(MaskedRowOptions, TeacherRunOptions, PlotOptions):
    """What `kdcache plan` takes: fields have the names of its options."""

    first = (
        *("teacher", "corpus", "task", "codec", "temperatures", "rows", "max_length", "columns"),
        *("plot", "all"),
    )

    teacher: tuple[str, ...] = again(BuildOptions, "teacher", MISSING)
    corpus: tuple[str | Named, ...] = again(BuildOptions, "corpus", MISSING)
    task: Task = again(BuildOptions, "task", CAUSAL_LM)
    codec: tuple[str, ...] | None = option(
        None,
        help="codecs to compare. Default: `anchored:10`, `anchored:20`, `sample:10`, `sample:20`, "
        "`sample:40`, `topk:64` for a language model, else `dense` and `dense:float16`.",
        metavar="dense|topk:K|sample:N|anchored:N|hidden:DTYPE",
    )
    temperatures: tuple[str, ...] | None = option(
        None,
        help="sets of declared temperatures to compare. Default: `1` and `1,2`.",
        metavar="T[,T...]",
    )
    rows: int = option(64, help="rows of the sample.", at_least=1)
    all: bool = option(False, help="print all figures, with what they mean.")

    def conflicts(self) -> Sequence[str]:
        """See `Options.conflicts`."""
        problems = self.plot_problems()
        try:
            _ = self.temperature_sets
        except ValueError:
            given = " ".join(self.temperatures or ())
            problems.append(
                f"--temperatures are {given}, expected positive numbers, "
                "several of one set with commas: --temperatures 1 --temperatures 1,2."
            )
        return [*problems, *problems_of(self.build_options)]

    @property
    def codecs(self) -> tuple[str, ...]:
        """The codecs to compare."""
        return self.codec or TASKS[self.task].plans

    @property
    def temperature_sets(self) -> tuple[tuple[float, ...], ...]:
        """The sets of declared temperatures; ValueError if one is not such a set."""
        plain = ("1", "1,2") if TASKS[self.task].has_temperature else ("1",)
        texts = self.temperatures or plain
        sets = tuple(tuple(float(t) for t in text.split(",")) for text in texts)
        if not all(math.isfinite(t) and t > 0 for one in sets for t in one):
            raise ValueError(self.temperatures)
        return sets

    def build_options(self) -> BuildOptions:
        """The build of which this is a plan; its codec is the default one."""
        shared = {field.name for field in fields(BuildOptions)} - {"codec", "temperatures"}
        same = {f.name: getattr(self, f.name) for f in fields(self) if f.name in shared}
        return BuildOptions(out="-", workers=0, **same)


@dataclass(frozen=True)
class EvaluateOptions(MaskedRowOptions, InferenceOptions, PlotOptions):
    """What `kdcache evaluate` takes: fields have the names of its options."""

    first = (
        *("student", "cache", "corpus", "teacher", "task", "temperature", "limit", "threshold"),
        *("batch_tokens", "plot"),
    )

    student: tuple[str, ...] = option(
        help="folders of models or of runs, or hub ids.",
        metavar="RUN_OR_DIR",
    )
    cache: str | None = option(
        None, help="a sealed cache whose rows and targets are used (optional).", metavar="CACHE"
    )
    corpus: tuple[str | Named, ...] = option(
        (),
        help="files, folders, globs or URLs whose rows are used if there is no cache; those of a "
        "name have figures of their own.",
        metavar="[NAME=]PATH_OR_URL_OR_GLOB",
        named=True,
    )
    teacher: str | None = option(
        None,
        help="folder or hub id of a teacher that runs live; with a cache it replaces the cached "
        "targets.",
        metavar="DIR_OR_HUB_ID",
    )
    task: Task | None = option(
        None, help="the task of the models. Default: the cache's or the first student's."
    )
    _: KW_ONLY
    limit: int | None = option(
        None,
        help="use only the first records of a corpus, or the first rows of a cache; of each of its "
        "domains, where they have names.",
        metavar="ROWS",
        at_least=1,
    )
    temperature: float | None = option(
        None,
        help="of KL. Default: 1 where the cache declares it, else the first declared.",
        above=0,
    )

    def conflicts(self) -> list[str]:
        """See `Options.conflicts`."""
        problems = form_problems(self.record_form, self.task) + self.ids_problems()
        problems += self.plot_problems()
        if bool(self.cache) == bool(self.corpus):
            problems.append("name either --cache or --corpus: what to evaluate on.")
        return problems


@dataclass(frozen=True)
class PredictOptions(SourceOptions, RecordOptions, InferenceOptions):
    """What `kdcache predict` takes: fields have the names of its options."""

    first = (
        *("student", "corpus", "out", "task", "columns", "threshold", "max_length", "beams"),
        *("batch_tokens", "device"),
    )

    student: str = option(
        help="folder of a run, of a classifier or of a sequence-to-sequence model, or hub id.",
        metavar="RUN_OR_DIR",
    )
    corpus: tuple[str, ...] = option(
        help="files, folders, globs or URLs; `-` alone reads plain lines from standard input.",
        metavar="PATH_OR_URL_OR_GLOB|-",
    )
    out: str | None = option(
        None,
        help="file for the JSON lines. Default: standard output.",
        metavar="FILE",
        output=True,
    )

    task: Task | None = option(
        None, help="the task of the model. Default: what its configuration says."
    )
    max_length: int = option(
        128, help="seq2seq: tokens of the longest target that is written.", at_least=1
    )
    beams: int = option(1, help="seq2seq: beams of the search; 1 is greedy.", at_least=1)
    _: KW_ONLY
    seq2seq: tuple[str, ...] = again(
        SourceOptions,
        "seq2seq",
        (),
        help="tokens of the longest source, such as `max-source-length=512` (default: what the "
        "model reads), and for tokenizers that mark languages `source-lang=en_XX` and "
        "`target-lang`.",
    )

    def conflicts(self) -> list[str]:
        """See `Options.conflicts`."""
        problems = form_problems(self.record_form, self.task or SEQUENCE_CLASSIFICATION)
        if "-" in self.corpus and len(self.corpus) > 1:
            problems.append("--corpus - reads standard input and cannot be combined with files.")
        if "-" in self.corpus and self.pair_column is not None:
            problems.append("--corpus - reads one text per line and has no pair (--columns).")
        return problems
