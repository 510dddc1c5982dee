"""The plot of a sweep: its figure against each of the options that the grid crosses.

One chart an option. At each value a line joins the best settings of the others, so it shows what
that value can reach; all other settings are faint points behind. Lines are told apart by one more
option: the student, or the first that has a few values. Bars are sample standard deviations over
seeds. A setting without the option, such as the temperature at alpha 1, is a dashed level.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from kdcache.commands.sweep.results import SEED, SweepResult
from kdcache.extras import installed
from kdcache.plots import Chart, Level, Line, plot_charts

logger = logging.getLogger(__name__)

_MOST_LINES = 6
_NONE = "-"
Point = tuple[dict[str, str], float, float]  # setting, mean and deviation of the figure


def plot_sweep(path: Path, result: SweepResult) -> None:
    """Draw the figure that ranks the settings; without matplotlib a line says what it needs.

    Args:
        path: the PNG file.
        result: of the sweep.
    """
    if not installed("matplotlib"):
        logger.warning("no %s: it needs matplotlib (pip install 'kdcache[plot]')", path.name)
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
            if value != _NONE and value not in found[name]:
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
        if setting[name] == _NONE:
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
    dashed = [Level(f"{words}, without {_option(name)}", y) for words, y in without.items()][:2]
    return Chart("", _option(name), y_label, lines, [*levels, *dashed], ticks)


def _told_apart_by(name: str, values: Mapping[str, list[str]]) -> str | None:
    """The option that gives a chart its lines."""
    others = [other for other in values if other != name]
    fit = [other for other in others if 1 < len(values[other]) <= _MOST_LINES]
    return "student" if "student" in fit else next(iter(fit), None)


def _label(name: str, setting: Mapping[str, str]) -> str:
    value = setting[name]
    if value == _NONE:
        return f"without {_option(name)}"
    return value if name == "student" else f"{_option(name)} {value}"


def _rank(label: str, order: Sequence[str]) -> int:
    value = label.rpartition(" ")[2]
    return order.index(value) if value in order else len(order)


def _words(setting: Mapping[str, str], name: str) -> str:
    """What is known of a setting without an option: where it has one value only, that value."""
    alpha = setting.get("alpha")
    return f"alpha {alpha}" if alpha and alpha != _NONE and name != "alpha" else "best"


def _seeds(result: SweepResult, y_label: str, levels: Sequence[Level]) -> Chart:
    """Where nothing but seeds is crossed: each of them."""
    runs = result.runs
    y = [run.figures[result.ranked_by] for run in runs]
    names = [run.seed or run.name for run in runs]
    mean = Level("mean of the students", fmean(y))
    dots = Line("students", range(len(y)), y, joined=False)
    return Chart("", SEED, y_label, [dots], [*levels, mean], names)


def _option(name: str) -> str:
    return name.replace("_", "-")
