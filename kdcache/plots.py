"""Plots as PNG files: charts side by side, and clouds of named points.

Figures are made without pyplot: no global state, no window system, safe in any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from kdcache.files import local_path, output_errors, whole_file

_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito 2008
_MARKERS = ("o", "s", "^", "D", "v", "P")
_MARKER_POINTS = 6
_RINGS = 12
_AROUND = ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
"""Sides of a point on which its name is tried: right (or left), up (or down)."""
_INK, _FAINT = "#222222", "#d9d9d9"


@dataclass(frozen=True)
class Level:
    """A dashed horizontal line to compare with."""

    label: str
    value: float


@dataclass(frozen=True)
class Cloud:
    """Points of one kind.

    Attributes:
        label: its name in the legend.
        points: x, y and a short name of each; only those above zero can be shown.
        hollow: drawn with hollow markers and a dashed line.
    """

    label: str
    points: Sequence[tuple[float, float, str]]
    hollow: bool = False


@dataclass(frozen=True)
class Panel:
    """One of the plots side by side.

    Attributes:
        y_label: name and unit of the y axis.
    """

    title: str
    y_label: str
    clouds: Sequence[Cloud]


def plot_clouds(path: str | Path, panels: Sequence[Panel], *, title: str, x_label: str) -> None:
    """Draw points with their names into a PNG, panels side by side, all axes logarithmic.

    Args:
        panels: with the same clouds in all of them.
    """
    _save(draw_clouds(panels, title=title, x_label=x_label), path)


def draw_clouds(panels: Sequence[Panel], *, title: str, x_label: str) -> Any:
    """The figure of `plot_clouds`: no name covers another, or a point."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = _new_figure(6.5 * len(panels), 5.5, dpi=160)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for k, cloud in enumerate(panel.clouds):
            points = _shown(cloud)
            axes.plot(
                [x for x, _, _ in points],
                [y for _, y, _ in points],
                color=_colour(k),
                # Another pairing in each round, so that 36 clouds differ.
                marker=_MARKERS[(k + k // len(_COLOURS)) % len(_MARKERS)],
                markersize=_MARKER_POINTS,
                markerfacecolor="white" if cloud.hollow else None,
                linestyle="--" if cloud.hollow else "-",
                linewidth=1.2,
                label=cloud.label,
            )
        known = any(map(_shown, panel.clouds))
        if not known:  # as of scores, whose mean gradient has the full one's direction
            axes.text(0.5, 0.5, "all are 0", transform=axes.transAxes, ha="center", color=_INK)
        else:
            axes.set_xscale("log")
            axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis) if known else ():
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(x_label, color=_INK)
        axes.set_ylabel(panel.y_label, color=_INK)
        axes.set_title(panel.title, loc="left", color=_INK, fontsize=10)
        _style(axes)
        axes.margins(x=0.1, y=0.1)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", color=_INK, fontsize=12, fontweight="bold")
    figure.canvas.draw()  # the layout: from here on a point's pixels are known
    for axes, panel in zip(figure.axes, panels, strict=True):
        _name_points(axes, panel.clouds)
    return figure


def _shown(cloud: Cloud) -> list[tuple[float, float, str]]:
    return sorted(p for p in cloud.points if p[0] > 0 and p[1] > 0)


def _name_points(axes: Any, clouds: Sequence[Cloud]) -> None:
    """Write the names next to their points, in their colours, each at the nearest free place.

    Places are tried on growing rings around the point; from the second ring on, a thin line leads
    to the name. What is taken: all markers, the names so far, and all outside of the axes.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    axes.autoscale(False)  # names and lines must not move what is drawn
    renderer, pixels = axes.figure.canvas.get_renderer(), axes.figure.dpi / 72
    named = [(p, _colour(k)) for k, cloud in enumerate(clouds) for p in _shown(cloud)]
    centres = axes.transData.transform([(x, y) for (x, y, _), _ in named])
    half = _MARKER_POINTS * pixels / 2
    taken = [Bbox.from_extents(*(centre - half), *(centre + half)) for centre in centres]
    for ((x, y, name), colour), centre in zip(named, centres, strict=True):
        label = axes.annotate(
            name, (x, y), (0, 0), textcoords="offset points", ha="center", va="center",
            fontsize=8, color=colour, path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip
        label.set_in_layout(False)
        own = label.get_window_extent(renderer).padded(pixels)
        for ring, (right, up) in product(range(1, _RINGS + 1), _AROUND):
            gap = ring * (half + pixels)
            dx, dy = right * (gap + own.width / 2), up * (gap + own.height / 2)
            box = own.translated(dx, dy)
            inside = all(axes.bbox.contains(*corner) for corner in (box.min, box.max))
            if inside and not box.count_overlaps(taken):
                break
        else:
            label.remove()  # the tables have it; one name over another shows neither
            continue
        label.set_position((dx / pixels, dy / pixels))
        taken.append(box)
        if ring > 1:
            end = axes.transData.inverted().transform(centre + gap * np.array([right, up]))
            axes.plot([x, end[0]], [y, end[1]], color=colour, linewidth=0.5, zorder=1)


def _colour(k: int) -> str:
    return _COLOURS[k % len(_COLOURS)]


@dataclass(frozen=True)
class Line:
    """Points of a chart that belong together.

    Attributes:
        label: its name in the legend; equal names in several charts look alike and stand once.
        x: ascending; with ticks, places among them.
        y: what was measured there.
        error: half the length of the bar through each point; empty for none.
        joined: whether a line joins the points.
        faint: whether they are in the background, small and not in the legend.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] = ()
    joined: bool = True
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """One of several plots in a picture.

    Attributes:
        x_label: name and unit of the x axis.
        y_label: name and unit of the y axis.
        levels: dashed lines across the whole width, in colours of their own.
        ticks: names of x = 0, 1, 2, ..., where these are not numbers.
        diagonal: whether a dashed line shows where y equals x.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    levels: Sequence[Level] = ()
    ticks: Sequence[str] = ()
    diagonal: bool = False


_MOST_MARKED = 40  # points of a line that get markers
_MOST_BESIDE = 3  # charts in a row
_DASHES = ("--", ":", "-.", (0, (1, 3)))
_STYLES = ("-", (0, (9, 2)), (0, (6, 1, 1, 1)), (0, (2, 1)))  # of lines, none of them in _DASHES


def plot_charts(path: str | Path, charts: Sequence[Chart], *, title: str, note: str = "") -> None:
    """Draw charts into a PNG, side by side, with one legend below them.

    Args:
        note: above the legend, smaller.
    """
    _save(draw_charts(charts, title=title, note=note), path)


def draw_charts(charts: Sequence[Chart], *, title: str, note: str = "") -> Any:
    """The figure of `plot_charts`: each label stands in the legend once."""
    from matplotlib.ticker import MaxNLocator

    labels = list(dict.fromkeys(line.label for chart in charts for line in chart.lines))
    dashes = list(dict.fromkeys(level.label for chart in charts for level in chart.levels))
    columns = 2 if len(charts) == 4 else min(_MOST_BESIDE, len(charts))
    rows = -(-len(charts) // columns)
    figure = _new_figure(max(7.0, 4.6 * columns), 0.9 + 3.8 * rows, dpi=160)
    for place, chart in enumerate(charts):
        axes = figure.add_subplot(rows, columns, place + 1)
        for line in chart.lines:
            _draw_line(axes, line, labels.index(line.label))
        for level in chart.levels:
            k = dashes.index(level.label)
            axes.axhline(
                level.value, color=_colour(len(labels) + k), linestyle=_DASHES[k % len(_DASHES)],
                linewidth=1.6, label=level.label,
            )  # fmt: skip
        if chart.ticks:
            axes.set_xticks(range(len(chart.ticks)), chart.ticks, fontsize=9)
            axes.set_xlim(-0.4, len(chart.ticks) - 0.6)
            if max(map(len, chart.ticks)) * len(chart.ticks) > 48:
                axes.tick_params(axis="x", labelrotation=30)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        if chart.diagonal:
            axes.axline((0, 0), slope=1, color=_FAINT, linestyle="--", linewidth=1.2, zorder=0)
        axes.set_xlabel(chart.x_label, color=_INK)
        axes.set_ylabel(chart.y_label, color=_INK)
        axes.set_title(chart.title, loc="left", color=_INK, fontsize=10)
        _style(axes)
        axes.ticklabel_format(axis="y", useOffset=False)  # an axis of 1e-5+5.17 cannot be read
        axes.margins(y=0.1)
    named: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    named = {label: named[label] for label in (*labels, *dashes) if label in named}
    if len(named) > 1:
        letters = 15 * figure.get_figwidth()
        beside = max(1, min(len(named), int(letters / (max(map(len, named)) + 6))))
        figure.legend(
            named.values(), named.keys(), loc="outside lower center", ncols=beside, frameon=False,
            title=note, title_fontsize=9,
        )  # fmt: skip
    wrapped = fill(title, int(9 * figure.get_figwidth()))
    figure.suptitle(wrapped, x=0.01, ha="left", color=_INK, fontsize=12, fontweight="bold")
    return figure


def _draw_line(axes: Any, line: Line, k: int) -> None:
    colour, marker = _colour(k), _MARKERS[(k + k // len(_COLOURS)) % len(_MARKERS)]
    if line.faint:
        axes.plot(line.x, line.y, marker, color=colour, markersize=4, alpha=0.35, zorder=1)
        return
    marked = len(line.x) <= _MOST_MARKED
    axes.errorbar(
        line.x,
        line.y,
        yerr=line.error or None,
        color=colour,
        marker=marker if marked else None,
        markersize=_MARKER_POINTS,
        # Without markers, another style in each round of colours tells the lines apart.
        linestyle=_STYLES[k // len(_COLOURS) % len(_STYLES)] if line.joined else "none",
        linewidth=1.6 if marked else 1.0,
        elinewidth=1.2,
        capsize=3,
        label=line.label,
    )


def _new_figure(width: float, height: float, dpi: int) -> Any:
    """An empty figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _style(axes: Any) -> None:
    """A faint grid behind the data, and no frame above and on the right."""
    axes.grid(color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: str | Path) -> None:
    """Write a PNG that appears whole."""
    with output_errors(path), whole_file(local_path(str(path), "--plot")) as file:
        figure.savefig(file, format="png")
