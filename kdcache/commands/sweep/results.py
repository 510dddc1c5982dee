"""The results of a sweep: figures of its runs, and of its settings over seeds.

A *setting* is the combination of the grid's options without the seed; its figures are means over
seeds, with the sample standard deviation for two or more.

Settings are ranked by the figure of their task (`kdcache.student.figures`), such as accuracy, or by
the loss with hard labels where there is none: these compare between all students. `loss` does not:
it is weighted by the alpha and T of its own run. A setting with a run that diverged comes last.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdcache.files import write_json, write_text
from kdcache.tasks import CAUSAL_LM, TASKS

SEED = "seed"
SHARES = ("accuracy", "f1", "micro_f1")  # figures from 0 to 1
HIGHER = (*SHARES, "pearson")  # those of which more is better
_NAMES = {
    "accuracy": "accuracy",
    "f1": "F1 of entities",
    "micro_f1": "micro F1",
    "pearson": "Pearson correlation",
    "hard_loss": "cross-entropy",
    "soft_loss": "soft loss",
    "soft_cross_entropy": "soft cross-entropy",
    "loss": "loss",
}


@dataclass(frozen=True)
class RunScore:
    """The figures of one run.

    Attributes:
        name: its folder below `runs/`.
        out: its folder.
        setting: value of each crossed option but the seed; `-` where it has no part.
        seed: its seed, where seeds are crossed.
        figures: that of the task, such as `accuracy`, `hard_loss`, `soft_loss` or
            `soft_cross_entropy`, and `loss`, as far as they are known: of the best checkpoint on
            the evaluation caches; without such, the last logged of training.
        parameters: of the student.
        steps: of the run.
        best_step: of the checkpoint that became the student, where there were evaluations.
        seconds: training time.
    """

    name: str
    out: str
    setting: dict[str, str]
    seed: str | None
    figures: dict[str, float]
    parameters: int
    steps: int
    best_step: int | None
    seconds: float


@dataclass(frozen=True)
class SettingScore:
    """The runs of one setting together.

    Attributes:
        setting: value of each crossed option but the seed.
        runs: their names.
        mean: of each figure.
        deviation: of each figure, over seeds; empty for a single run.
        parameters: of the student.
        seconds: mean training time.
    """

    setting: dict[str, str]
    runs: tuple[str, ...]
    mean: dict[str, float]
    deviation: dict[str, float]
    parameters: int
    seconds: float


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    Attributes:
        out: folder of the sweep.
        made: runs that were trained now.
        combinations: of values in the grid; several may be one run.
        evaluated: whether figures are of evaluation caches, or of training.
        ranked_by: the figure that orders the settings, best first.
        settings: the settings.
        runs: all runs, in the order of the grid.
        teacher: figures of the teacher that are known without running it.
        task: of the caches.
    """

    out: str
    made: int
    combinations: int
    evaluated: bool
    ranked_by: str
    settings: tuple[SettingScore, ...]
    runs: tuple[RunScore, ...]
    teacher: dict[str, float] = field(default_factory=dict)
    task: str | None = None

    @classmethod
    def of(
        cls,
        out: Path,
        runs: Sequence[RunScore],
        *,
        made: int,
        combinations: int,
        evaluated: bool,
        teacher: Mapping[str, float] = {},
        task: str | None = None,
    ) -> SweepResult:
        """Group runs and rank their settings; `runs` is not empty."""
        groups: dict[tuple[str, ...], list[RunScore]] = {}
        for run in runs:
            groups.setdefault(tuple(run.setting.values()), []).append(run)
        settings = [_together(group) for group in groups.values()]
        rank = next(name for name in _NAMES if all(name in s.mean for s in settings))
        sign = -1 if rank in HIGHER else 1
        settings.sort(
            key=lambda s: (_last(sign * s.mean[rank]), _last(s.mean.get("hard_loss", 0.0)))
        )
        groups_of = (tuple(settings), tuple(runs), dict(teacher), task)
        return cls(str(out), made, combinations, evaluated, rank, *groups_of)

    def write(self, folder: Path) -> None:
        """Write `results.json` and `results.csv` (a line a run)."""
        write_json(folder / "results.json", dataclasses.asdict(self))
        write_text(folder / "results.csv", self._csv())

    @property
    def figure_name(self) -> str:
        """Name and unit of the figure that orders the settings."""
        unit = "" if self.higher else " (nats per position)"
        if self.ranked_by == "hard_loss" and self.task is not None:
            name, unit = TASKS[self.task].hard
            return f"{name} ({unit} per position)"
        return f"{_NAMES[self.ranked_by]}{unit}"

    @property
    def higher(self) -> bool:
        """Whether more of that figure is better."""
        return self.ranked_by in HIGHER

    def name_of(self, figure: str) -> str:
        """A figure for people."""
        hard = figure == "hard_loss" and self.task is not None
        return TASKS[self.task or CAUSAL_LM].hard[0] if hard else _NAMES[figure]

    @property
    def source(self) -> str:
        """What the figures are of."""
        return "on the evaluation caches" if self.evaluated else "of training, as last logged"

    def _csv(self) -> str:
        text = io.StringIO()
        options = list(self.runs[0].setting)
        seeds = [SEED] if self.runs[0].seed is not None else []
        rest = ["parameters", "steps", "best_step", "seconds", "out"]
        header = ["name", *options, *seeds, *_NAMES, *rest]
        writer = csv.DictWriter(text, header, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for run in self.runs:
            writer.writerow({**dataclasses.asdict(run), **run.setting, **run.figures})
        return text.getvalue()


def _together(runs: Sequence[RunScore]) -> SettingScore:
    known = [name for name in _NAMES if all(name in run.figures for run in runs)]
    values = {name: [run.figures[name] for run in runs] for name in known}
    return SettingScore(
        setting=runs[0].setting,
        runs=tuple(run.name for run in runs),
        mean={name: statistics.fmean(v) for name, v in values.items()},
        deviation={name: _deviation(v) for name, v in values.items() if len(v) > 1},
        parameters=runs[0].parameters,
        seconds=statistics.fmean(run.seconds for run in runs),
    )


def _deviation(values: Sequence[float]) -> float:
    """The sample standard deviation; NaN where a run diverged, on which `statistics` fails."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def _last(value: float) -> float:
    """A key to sort by, with NaN, which compares with nothing, behind all numbers."""
    return math.inf if math.isnan(value) else value
