"""The results of a sweep: figures of its runs, and of its settings over seeds.

A *setting* is the combination of the grid's options without the seed; its figures are means over
seeds, with the sample standard deviation for two or more.

Settings are ranked by the figure of their task (`kdcache.student.figures`), such as accuracy, or by
the loss with hard labels where there is none: these compare between all students. `loss` does not:
it is weighted by the alpha and T of its own run. A setting with a run that diverged comes last.

The teacher's figures cost nothing for a language model, whose cross-entropy is in the manifest; of
a classifier its evaluation caches are read once.

The plot has the ranking figure against each of the options that the grid crosses. One chart an
option. At each value a line joins the best settings of the others, so it shows what that value can
reach; all other settings are faint points behind. Lines are told apart by one more option: the
student, or the first that has a few values. Bars are sample standard deviations over seeds. A
setting without the option, such as the temperature at alpha 1, is a dashed level.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kdcache.cache import Cache
from kdcache.commands.run_folder import TrainResult
from kdcache.commands.sweep.grid import ANY, option_name
from kdcache.errors import install_command, installed
from kdcache.files import write_json, write_text
from kdcache.loss import INDEPENDENT
from kdcache.metrics import METRICS, RANKED, run_title
from kdcache.plots import Chart, Level, Line, plot_charts
from kdcache.student.figures import SUMS, figure, figure_sums, hard_labels
from kdcache.targets import DenseTargets
from kdcache.tasks import TASKS, labelled, positions

SEED = "seed"


@dataclass(frozen=True)
class RunScore:
    """The figures of one run.

    Attributes:
        setting: value of each crossed option but the seed; `-` where it has no part.
        seed: its seed, where seeds are crossed.
        figures: that of the task, such as `accuracy`, `hard_loss`, `soft_loss` or
            `soft_cross_entropy`, and `loss`, as far as they are known: of the best checkpoint on
            the evaluation caches; without such, the last logged of training.
        best_step: of the checkpoint that became the student, where there were evaluations.
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
        deviation: of each figure, over seeds; empty for a single run.
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
        made: runs that were trained now.
        combinations: of values in the grid; several may be one run.
        evaluated: whether figures are of evaluation caches, or of training.
        ranked_by: the figure that orders the settings, best first.
        runs: all runs, in the order of the grid.
        teacher: figures of the teacher that are known without running it.
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
        settings = [_over_seeds(group) for group in groups.values()]
        rank = next(name for name in RANKED if all(name in s.mean for s in settings))
        sign = -1 if METRICS[rank].higher else 1
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
        return f"{run_title(self.ranked_by)}{unit}"

    @property
    def higher(self) -> bool:
        """Whether more of that figure is better."""
        return METRICS[self.ranked_by].higher

    def name_of(self, figure: str) -> str:
        """A figure for people."""
        return run_title(figure, self.task)

    @property
    def source(self) -> str:
        """What the figures are of."""
        return "on the evaluation caches" if self.evaluated else "of training, as last logged"

    def _csv(self) -> str:
        text = io.StringIO()
        options = list(self.runs[0].setting)
        seeds = [SEED] if self.runs[0].seed is not None else []
        rest = ["parameters", "steps", "best_step", "seconds", "out"]
        header = ["name", *options, *seeds, *RANKED, *rest]
        writer = csv.DictWriter(text, header, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for run in self.runs:
            writer.writerow({**dataclasses.asdict(run), **run.setting, **run.figures})
        return text.getvalue()


def _over_seeds(runs: Sequence[RunScore]) -> SettingScore:
    known = [name for name in RANKED if all(name in run.figures for run in runs)]
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


def teacher_figures(
    caches: Sequence[Cache],
    results: Sequence[TrainResult],
    *,
    evaluated: bool,
    deltas: Collection[float | None] = (None,),
) -> dict[str, float]:
    """What the teacher has of the figures that rank students.

    Args:
        caches: the evaluation caches of all runs; empty where they have none or different ones.
        evaluated: whether figures are of evaluation caches, or of training.
        deltas: `huber_delta` of all runs, None of those whose error of scores is the squared one:
            the teacher's error is theirs, or left out where they have several.

    Returns:
        The figure of the task, such as `accuracy`, and `hard_loss`, as far as they are known and
        the same for all runs.
    """
    if caches and not TASKS[caches[0].spec.task].over_ids:
        found = _of_rows(caches, next(iter(deltas)))
        several = len(deltas) > 1
        return {name: v for name, v in found.items() if name != "hard_loss" or not several}
    known = {
        result.eval_teacher_cross_entropy if evaluated else result.teacher_cross_entropy
        for result in results
    }
    (nats,) = known if len(known) == 1 else (None,)
    return {} if nats is None else {"hard_loss": nats}


def _of_rows(caches: Sequence[Cache], delta: float | None) -> dict[str, float]:
    counted, nats, task = 0.0, 0.0, caches[0].spec.task
    sums = torch.zeros(SUMS, dtype=torch.float64)
    for cache in caches:
        codec = cache.codec()
        if not codec.keeps_logits or not (codec.any_temperature or 1.0 in codec.temperatures):
            return {}
        for shard in range(cache.spec.spans):
            data = cache.read(shard)
            targets = data.targets.at(1.0)
            assert isinstance(targets, DenseTargets), "it keeps all logits"
            marked = positions(data.labels, data.task)
            labels, logits = torch.from_numpy(data.labels[marked]), targets.logits.double()
            has = labelled(labels, task)
            counted += float(hard_labels(task, labels))
            nats += _hard_loss(task, logits[has], labels[has], delta)
            sums += figure_sums(task, logits, labels)
    if not counted:
        return {}
    return {**figure(task, sums), "hard_loss": nats / counted}


def _hard_loss(task: str, logits: Tensor, labels: Tensor, delta: float | None) -> float:
    """The loss with the hard labels, summed over rows."""
    independent = INDEPENDENT.get(TASKS[task].answers)
    if independent is None:
        return float(functional.cross_entropy(logits, labels.long(), reduction="sum"))
    how: dict[str, Any] = {} if delta is None else {"divergence": "huber", "huber_delta": delta}
    return float(independent.loss(logits, labels, None, alpha=1.0, count=1, **how).total)


logger = logging.getLogger(__name__)

_MOST_LINES = 6
Point = tuple[dict[str, str], float, float]  # setting, mean and deviation of the figure


def plot_sweep(path: Path, result: SweepResult) -> None:
    """Draw the figure that ranks the settings; without matplotlib a line states what it needs."""
    if not installed("plot"):
        logger.warning("no %s without matplotlib (%s)", path.name, install_command("plot"))
        return
    charts = charts_of(result)
    lines = [line for chart in charts for line in chart.lines]
    notes = []
    if any(line.faint for line in lines):
        notes.append("lines: the best setting at each value; faint: the others")
    if any(any(line.error) for line in lines):
        notes.append("bars: standard deviation over seeds")
    better = "higher" if result.higher else "lower"
    title = f"{result.figure_name} {result.source}, {better} is better"
    plot_charts(path, charts, title=title, note="; ".join(notes))


def charts_of(result: SweepResult) -> list[Chart]:
    """A chart for each option of several values; where there is none, the seeds."""
    figure = result.ranked_by
    points: list[Point] = [
        (setting.setting, setting.mean[figure], setting.deviation.get(figure, 0.0))
        for setting in result.settings  # best first
    ]
    teacher = result.teacher.get(figure)
    levels = [] if teacher is None else [Level("teacher", teacher)]
    values = _values(result)
    seeds = result.runs[0].seed is not None
    charts = [
        _chart(name, points, values, result.figure_name, levels, seeds=seeds)
        for name, found in values.items()
        if len(found) > 1
    ]
    return charts or [_seeds(result, result.figure_name, levels)]


def _values(result: SweepResult) -> dict[str, list[str]]:
    """The values of each crossed option, numbers in their order; without `-`."""
    found: dict[str, list[str]] = {name: [] for name in result.settings[0].setting}
    for run in result.runs:  # in the order of the grid
        for name, value in run.setting.items():
            if value != ANY and value not in found[name]:
                found[name].append(value)
    return {name: _sorted(values) for name, values in found.items()}


def _sorted(values: list[str]) -> list[str]:
    try:
        return sorted(values, key=float)
    except ValueError:
        return values


def _chart(
    name: str,
    points: Sequence[Point],
    values: Mapping[str, list[str]],
    y_label: str,
    levels: Sequence[Level],
    *,
    seeds: bool,
) -> Chart:
    ticks = values[name]
    by = _told_apart_by(name, values)
    best: dict[str, dict[int, Point]] = {}
    others: dict[str, list[tuple[int, float]]] = {}
    without: dict[str, float] = {}
    for point in points:
        setting, mean, _ = point
        label = _label(by, setting) if by else "students"
        if setting[name] == ANY:
            without.setdefault(_words(setting, name), mean)
            continue
        place = ticks.index(setting[name])
        if place in best.setdefault(label, {}):
            others.setdefault(label, []).append((place, mean))
        else:
            best[label][place] = point
    lines = []
    order = values[by] if by else []
    for label in sorted(best, key=lambda one: _rank(one, order)):
        found = sorted(best[label].items())
        bars = [deviation for _, (_, _, deviation) in found] if seeds else []
        lines.append(Line(label, [x for x, _ in found], [y for _, (_, y, _) in found], bars))
    for label, behind in others.items():
        lines.append(Line(label, [x for x, _ in behind], [y for _, y in behind], faint=True))
    dashed = [Level(f"{words}, without {option_name(name)}", y) for words, y in without.items()][:2]
    return Chart("", option_name(name), y_label, lines, [*levels, *dashed], ticks)


def _told_apart_by(name: str, values: Mapping[str, list[str]]) -> str | None:
    """The option that gives a chart its lines."""
    others = [other for other in values if other != name]
    fit = [other for other in others if 1 < len(values[other]) <= _MOST_LINES]
    return "student" if "student" in fit else next(iter(fit), None)


def _label(name: str, setting: Mapping[str, str]) -> str:
    value = setting[name]
    if value == ANY:
        return f"without {option_name(name)}"
    return value if name == "student" else f"{option_name(name)} {value}"


def _rank(label: str, order: Sequence[str]) -> int:
    value = label.rpartition(" ")[2]
    return order.index(value) if value in order else len(order)


def _words(setting: Mapping[str, str], name: str) -> str:
    """What is known of a setting without an option: where it has one value only, that value."""
    alpha = setting.get("alpha")
    return f"alpha {alpha}" if alpha and alpha != ANY and name != "alpha" else "best"


def _seeds(result: SweepResult, y_label: str, levels: Sequence[Level]) -> Chart:
    """Where nothing but seeds is crossed: each of them."""
    runs = result.runs
    y = [run.figures[result.ranked_by] for run in runs]
    names = [run.seed or run.name for run in runs]
    mean = Level("mean of the students", fmean(y))
    dots = Line("students", range(len(y)), y, joined=False)
    return Chart("", SEED, y_label, [dots], [*levels, mean], names)
