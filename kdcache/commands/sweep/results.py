"""The results of a sweep: figures of its runs, and of its settings over seeds.

A *setting* is the combination of the grid's options without the seed; its figures are means over
seeds, with the sample standard deviation for two or more.

Settings are ranked by accuracy, or by the cross-entropy with hard labels where there is none: these
compare between all students. `loss` does not: it is weighted by the alpha and T of its own run.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdcache.extras import installed
from kdcache.files import write_json, write_text
from kdcache.plots import DotRow, plot_dots

logger = logging.getLogger(__name__)

SEED = "seed"
_NAMES = {
    "accuracy": "accuracy",
    "hard_loss": "cross-entropy",
    "soft_loss": "soft loss",
    "soft_cross_entropy": "soft cross-entropy",
    "loss": "loss",
}
_MOST_DRAWN = 40


@dataclass(frozen=True)
class RunScore:
    """The figures of one run.

    Attributes:
        name: its folder below `runs/`.
        out: its folder.
        setting: value of each crossed option but the seed; `-` where it has no part.
        seed: its seed, where seeds are crossed.
        figures: `accuracy`, `hard_loss`, `soft_loss` or `soft_cross_entropy`, and `loss`, as far as
            they are known: of the best checkpoint on the evaluation caches; without such, the last
            logged of training.
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
    """

    out: str
    made: int
    combinations: int
    evaluated: bool
    ranked_by: str
    settings: tuple[SettingScore, ...]
    runs: tuple[RunScore, ...]

    @classmethod
    def of(
        cls, out: Path, runs: Sequence[RunScore], *, made: int, combinations: int, evaluated: bool
    ) -> SweepResult:
        """Group runs and rank their settings; `runs` is not empty."""
        groups: dict[tuple[str, ...], list[RunScore]] = {}
        for run in runs:
            groups.setdefault(tuple(run.setting.values()), []).append(run)
        settings = [_together(group) for group in groups.values()]
        rank = next(name for name in _NAMES if all(name in s.mean for s in settings))
        sign = -1 if rank == "accuracy" else 1
        settings.sort(key=lambda s: (sign * s.mean[rank], s.mean.get("hard_loss", 0.0)))
        return cls(str(out), made, combinations, evaluated, rank, tuple(settings), tuple(runs))

    def write(self, folder: Path) -> None:
        """Write `results.json`, `results.csv` (a line a run) and, if it can, `results.png`."""
        write_json(folder / "results.json", dataclasses.asdict(self))
        write_text(folder / "results.csv", self._csv())
        if not installed("matplotlib"):
            logger.warning("no results.png: it needs matplotlib (pip install 'kdcache[plot]')")
            return
        best = self.settings[:_MOST_DRAWN]
        shown = "" if len(best) == len(self.settings) else f"best {len(best)} settings: "
        better = "higher" if self.ranked_by == "accuracy" else "lower"
        unit = "" if self.ranked_by == "accuracy" else ", nats per position"
        seeds = "" if self.runs[0].seed is None else " (small: seeds, large: their mean)"
        by_name = {run.name: run for run in self.runs}
        plot_dots(
            folder / "results.png",
            [
                DotRow(
                    label=_words(setting.setting),
                    group=_kind(setting.setting),
                    values=[by_name[name].figures[self.ranked_by] for name in setting.runs],
                )
                for setting in best
            ],
            title=f"{shown}{_NAMES[self.ranked_by]} {self._source}",
            x_label=f"{_NAMES[self.ranked_by]}{unit}, {better} is better{seeds}",
        )

    @property
    def _source(self) -> str:
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
        deviation={name: statistics.stdev(v) for name, v in values.items() if len(v) > 1},
        parameters=runs[0].parameters,
        seconds=statistics.fmean(run.seconds for run in runs),
    )


def _words(setting: dict[str, str]) -> str:
    """A setting on one line: `tiny  alpha 0.5  temperature 2`."""
    shown = (
        value if name == "student" else f"{name} {value}"
        for name, value in setting.items()
        if value != "-"
    )
    return "  ".join(shown) or "all seeds"


def _kind(setting: dict[str, str]) -> str:
    """The option that colours a setting: the student, or else the first option of the grid."""
    if "student" in setting or not setting:
        return setting.get("student", "")
    name, value = next(iter(setting.items()))
    return f"{name} {value}"
