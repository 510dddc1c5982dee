"""The options of `build`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kdcache.commands.groups import TeacherRunOptions, form_problems, worker_range
from kdcache.commands.row_options import MaskedRowOptions
from kdcache.domains import Named
from kdcache.options import Options, option, problems_of
from kdcache.tasks import CAUSAL_LM, TASKS, Task


@dataclass(frozen=True, kw_only=True)
class WorkerOptions(Options):
    """The workers of a build."""

    heading = "Workers (many processes or machines)"

    workers: int | str | None = option(
        None,
        help="number of Ray workers; 0 for this process without Ray; `1:16` for as many as fit, "
        "and on a cluster for more while all are busy, 16 at most; `auto` for this process where "
        "one shard or less than a minute of work is left, else as `1:` without a bound.",
        auto=True,
        metavar="N|MIN:MAX",
    )
    max_workers: int | None = option(None, instead=("workers", "1:{}"), at_least=1)
    part: str | None = option(
        None,
        help="make only this share of the shards, such as `3/16`: for an array of jobs without a "
        "common Ray. The part that ends last seals the cache.",
        metavar="I/N",
    )
    worker: tuple[str, ...] = option(
        (),
        help="what a worker has: `gpus` (default: one on a cluster; on this machine, one where "
        "there are any) and, of Ray, `cpus` (its share of its node, 8 at most); seconds without "
        "progress (no record read, no batch finished) after which it is replaced, "
        "`hang-seconds=600`; and `wait-minutes` until a build without a ready worker gives up "
        "(default: it waits for nodes as long as it takes).",
        comma=True,
        keys=True,
        metavar="KEY=VALUE",
    )
    gpus_per_worker: float | None = option(None, instead=("worker", "gpus"), at_least=0)
    cpus_per_worker: int | None = option(None, instead=("worker", "cpus"), at_least=1)
    address: str | None = option(
        None,
        help="Ray address. Default: RAY_ADDRESS, else a Ray of this process.",
        metavar="RAY_ADDRESS",
    )
    hang_seconds: float = option(600.0, instead=("worker", "hang-seconds"), above=0)
    wait_minutes: float | None = option(None, instead=("worker", "wait-minutes"), above=0)

    def conflicts(self) -> Sequence[str]:
        """See `Options.conflicts`."""
        problems = problems_of(lambda: self.worker_range)
        if self.part is not None and not _is_part(self.part):
            problems.append(
                f"--part is {self.part!r}, expected I/N with I from 1 to N, as in 3/16."
            )
        return problems

    @property
    def worker_range(self) -> tuple[int, int | None]:
        """The smallest and the largest number of workers; None for no bound."""
        if self.workers is None:
            return 1, None
        return worker_range("--workers", self.workers, 0)

    @property
    def without_ray(self) -> bool:
        """Whether this process is to do all the work."""
        return self.worker_range == (0, 0)

    @property
    def share(self) -> range:
        """Numbers of the spans that this run makes, were the corpus endless: every Nth."""
        part, parts = map(int, (self.part or "1/1").split("/"))
        return range(part - 1, 1 << 62, parts)


@dataclass(frozen=True)
class BuildOptions(MaskedRowOptions, TeacherRunOptions, WorkerOptions):
    """What `kdcache build` takes: fields have the names of its options."""

    first = (
        *("teacher", "corpus", "out", "task", "codec", "temperatures", "max_length", "columns"),
        *("workers", "dry_run"),
    )

    teacher: tuple[str, ...] = option(
        help="folder, URL or hub id of each teacher; several make an ensemble.",
        metavar="DIR_OR_HUB_ID",
    )
    corpus: tuple[str | Named, ...] = option(
        help="files, folders, globs or fsspec URLs; with a name in front of each, its rows are "
        "one domain of the cache.",
        metavar="[NAME=]PATH_OR_URL_OR_GLOB",
        named=True,
    )
    out: str = option(help="folder or URL of the cache.", metavar="CACHE", output=True)
    task: Task = option(CAUSAL_LM, help="the task: what the teacher predicts.")
    codec: str | None = option(
        None,
        help="`dense`, `dense:float16`, `hidden:float16`, `hidden:bfloat16`, `hidden:int8`, "
        "`topk:K`, `sample:N` or `anchored:N`. Default: `sample:20` for "
        "a language model, else `dense`.",
        metavar="dense|hidden:TYPE|topk:K|sample:N|anchored:N",
    )
    temperatures: tuple[float, ...] = option(
        (1.0,),
        help="the temperatures a student may train at (`dense` and `hidden` allow any).",
        metavar="T",
        comma=True,
        above=0,
    )
    shard_tokens: int | None = option(
        None,
        help="target size of a shard in tokens. Default: by corpus and codec.",
        metavar="TOKENS",
        at_least=1,
    )
    positions: float | None = option(
        None,
        help="keep soft targets of about this share of the positions, those where the teacher's "
        "entropy is largest; the others train on their hard labels. For causal and "
        "sequence-to-sequence language models. Default: of all.",
        metavar="SHARE",
        above=0,
        at_most=1,
    )
    seed: int = option(0, help="seed of the noise of `sample` and `anchored`.")
    dry_run: bool = option(
        False,
        help="print what would be built, with rough bytes and hours; nothing is written and no "
        "teacher is loaded.",
    )

    def conflicts(self) -> Sequence[str]:
        """See `Options.conflicts`."""
        problems = [*form_problems(self.record_form, self.task), *WorkerOptions.conflicts(self)]
        if self.positions is not None and not TASKS[self.task].causal:
            problems.append(
                f"--positions is for causal and sequence-to-sequence language models, not for "
                f"{self.task}. Leave it out."
            )
        if self.teacher_weight and len(self.teacher_weight) != len(self.teacher):
            given = len(self.teacher_weight)
            problems.append(f"{given} --teacher-weight for {len(self.teacher)} --teacher.")
        problems += [*self.ids_problems(), *self.engine_conflicts()]
        if self.engine == "vllm":
            wrong = {
                "several --teacher": len(self.teacher) > 1,
                f"--task {self.task}": self.task != CAUSAL_LM,
                "--compile": self.compile,
                f"--attention {self.attention}": self.attention != "auto",
            }
            problems += [
                f"--engine vllm runs one causal language model its own way: not with {name}."
                for name, given in wrong.items()
                if given
            ]
        if self.codec is not None and not _CODEC.fullmatch(self.codec.strip()):
            known = "dense, dense:float16, hidden:int8, topk:64, sample:20 or anchored:10"
            problems.append(f"--codec is {self.codec!r}, expected such as {known}.")
        if not self.temperatures:
            problems.append("--temperatures is empty, expected positive numbers.")
        return problems

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each teacher, summing to 1."""
        given = self.teacher_weight or (1.0,) * len(self.teacher)
        return tuple(w / sum(given) for w in given)


_CODEC = re.compile(r"dense(:float(16|32))?|hidden:(b?float16|int8)|(topk|sample|anchored):[0-9]+")


def _is_part(text: str) -> bool:
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    return found is not None and 1 <= int(found[1]) <= int(found[2])
