"""Blocks of texts, tables and charts, of which `page.html.jinja` makes a page.

Charts are numbers that the template draws as inline SVG, without a script: curves of at most
`_POINTS` points, and histograms. Colours come from the page's style sheet, and dashes tell curves
apart without them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from kdcache.humanize import counted

WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 72, 12, 12, 46
COLOURS = 6
_POINTS = 200
_MARKED = 12  # points of a curve that are few enough to be marked


@dataclass(frozen=True)
class Curve:
    """Points in the order of x, with a name."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Line:
    """A curve as it is drawn.

    Attributes:
        colour: its number.
        points: in the picture.
        marked: whether each point has a circle.
        key: its name and last value.
    """

    colour: int
    points: tuple[tuple[float, float], ...]
    marked: bool
    key: str


@dataclass(frozen=True)
class Chart:
    """A picture with axes.

    Attributes:
        caption: above it.
        about: what a screen reader says.
        x_ticks: place and text of each.
        y_ticks: place and text of each.
        bars: x, y, width and height of each.
    """

    kind: ClassVar = "chart"
    caption: str
    about: str
    x_label: str
    y_label: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[Line, ...] = ()
    bars: tuple[tuple[float, float, float, float], ...] = ()


class _Axes:
    """Round ticks around some values, and where a value is in the picture."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self._xs, self._ys = _ticks(xs), _ticks(ys)
        self.x_ticks = tuple((self.x(tick), f"{tick:,.10g}") for tick in self._xs)
        self.y_ticks = tuple((self.y(tick), f"{tick:.5g}") for tick in self._ys)

    def x(self, value: float) -> float:
        share = (value - self._xs[0]) / (self._xs[-1] - self._xs[0])
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self._ys[0]) / (self._ys[-1] - self._ys[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def curves(title: str, x_label: str, y_label: str, given: Sequence[Curve]) -> Chart | None:
    """Curves in one pair of axes; None where there is nothing finite to draw."""
    drawn = [c for c in (Curve(c.name, _finite(c.points)) for c in given) if c.points]
    if not drawn:
        return None
    axes = _Axes([x for c in drawn for x, _ in c.points], [y for c in drawn for _, y in c.points])
    lines = tuple(
        Line(
            i % COLOURS,
            tuple((axes.x(x), axes.y(y)) for x, y in curve.points),
            len(curve.points) <= _MARKED,
            f"{curve.name}: {curve.points[-1][1]:.4g} at {curve.points[-1][0]:,.10g}",
        )
        for i, curve in enumerate(drawn)
    )
    last = "; ".join(f"{c.name} ends at {c.points[-1][1]:.4g}" for c in drawn)
    return Chart(
        title, f"{title}: {last}.", x_label, y_label, axes.x_ticks, axes.y_ticks, lines=lines
    )


def histogram(title: str, x_label: str, values: Sequence[float], bins: int = 24) -> Chart | None:
    """Shares of the values in equal bins; None where there is nothing finite to draw."""
    finite = sorted(v for v in values if math.isfinite(v))
    if not finite:
        return None
    # The last bin takes the hundredth beyond, which would leave all others narrow.
    high = finite[min(len(finite) - 1, math.ceil(0.99 * len(finite)))]
    low = min(0.0, finite[0])
    width = max(high - low, 1e-9) / bins
    counts = [0] * bins
    for value in finite:
        counts[min(bins - 1, int((value - low) / width))] += 1
    shares = [100 * count / len(finite) for count in counts]
    axes = _Axes([low, low + bins * width], [0.0, max(shares)])
    bars = []
    for i, share in enumerate(shares):
        left, right = axes.x(low + i * width), axes.x(low + (i + 1) * width)
        top, bottom = axes.y(share), axes.y(0.0)
        bars.append((left, top, max(1.0, right - left - 1), bottom - top))
    number, median = counted(len(finite), "position"), statistics.median(finite)
    about = f"{title}: {number}, median {median:.3g}."
    return Chart(
        about, about, x_label, "% of positions", axes.x_ticks, axes.y_ticks, bars=tuple(bars)
    )


def _finite(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Points without NaN, thinned out; the last one stays."""
    kept = [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
    step = max(1, math.ceil(len(kept) / _POINTS))
    return tuple(kept[:-1][::step] + kept[-1:])


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers around the values: at least two."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span))
    for factor in (0.2, 0.25, 0.5, 1.0, 2.0):
        if span / (factor * step) <= 5:
            step *= factor
            break
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class Paragraph:
    """A text, and how it looks: `lead`, `note`, `row`, or as the others."""

    kind: ClassVar = "paragraph"
    text: str
    look: str = ""


@dataclass(frozen=True)
class Heading:
    """A heading below a section's."""

    kind: ClassVar = "heading"
    text: str


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    kind: ClassVar = "facts"
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Coloured:
    """A cell in the colour of a level of surprise."""

    kind: ClassVar = "coloured"
    text: str
    level: str


@dataclass(frozen=True)
class Guesses:
    """A cell of names with probabilities."""

    kind: ClassVar = "guesses"
    items: Sequence[tuple[str, str]]


Cell = str | Coloured | Guesses


@dataclass(frozen=True)
class Table:
    """A table in a box that scrolls by itself, for narrow screens.

    Attributes:
        caption: what it is.
        header: names of the columns.
        rows: their cells; the first one names its row.
        texts: the columns of texts; the others are numbers, aligned to the right.
    """

    kind: ClassVar = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    texts: Collection[int] = (0,)


LEVELS = (0.5, 1.0, 2.0, 4.0, 6.0)
"""Nats of surprise from which on a token has the next colour."""


def level_of(nats: float | None) -> str:
    """The class of a colour of surprise; empty for none."""
    return "" if nats is None else f"s{sum(nats >= level for level in LEVELS)}"


class Legend:
    """The colours of surprise with their meaning."""

    kind: ClassVar = "legend"
    levels = (
        f"below {LEVELS[0]:g}",
        *(f"{low:g} to {high:g}" for low, high in pairwise(LEVELS)),
        f"{LEVELS[-1]:g} or more",
    )


@dataclass(frozen=True)
class RowText:
    """A row's tokens: texts with the classes of their look, or None for what stands between."""

    kind: ClassVar = "row_text"
    pieces: Sequence[tuple[str, str | None]]


@dataclass(frozen=True)
class Details:
    """A part that opens on demand, by keyboard too."""

    kind: ClassVar = "details"
    summary: str
    blocks: Sequence[Block | None]


@dataclass(frozen=True)
class Article:
    """A row with its title."""

    kind: ClassVar = "article"
    title: str
    blocks: Sequence[Block | None]


Block = Paragraph | Heading | Facts | Table | Chart | Legend | RowText | Details | Article
Blocks = Sequence[Block | None]
