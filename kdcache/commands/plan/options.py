"""The options of `plan`: those of a build, with several codecs and temperatures to compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields

from kdcache.commands.build.options import BuildOptions
from kdcache.commands.groups import PlotOptions, TeacherRunOptions
from kdcache.commands.row_options import MaskedRowOptions
from kdcache.domains import Named
from kdcache.options import again, option, problems_of
from kdcache.tasks import CAUSAL_LM, TASKS, Task


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
