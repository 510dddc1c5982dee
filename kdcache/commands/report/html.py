"""HTML as values: whatever is not `Html` is a text, and is escaped.

Guarantee: a page is well-formed XML too, whatever the texts are. Control characters are written as
`\u0007`, so that what came from a corpus is seen and does nothing.

Charts as inline SVG: curves and histograms that need no script.

Cost: at most `_POINTS` points a curve. Colours come from the page's style sheet, and dashes tell
curves apart without them.
"""

from __future__ import annotations

import html
import math
import re
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from kdcache.humanize import counted, printable

_NOT_XML = re.compile("[\ud800-\udfff\ufffe\uffff]")
_VOID = {"meta", "br", "hr"}


class Html(str):
    """Markup: every text in it is escaped."""

    __slots__ = ()


def text(value: str) -> Html:
    """A text from anywhere, as markup."""
    shown = _NOT_XML.sub(lambda found: f"\\u{ord(found.group()):04x}", printable(value))
    return Html(html.escape(shown.replace("\r", "\n"), quote=True))


def element(tag: str, *children: str | None, **attributes: str | float | None) -> Html:
    """An element.

    Args:
        tag: its name.
        children: texts, which are escaped, and markup; None is left out.
        attributes: `class_` for `class`, `aria_label` for `aria-label`; None is left out.
    """
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{text(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Html(f"<{tag}{given}/>")
    return Html(f"<{tag}{given}>{join(children)}</{tag}>")


def join(parts: Iterable[str | None]) -> Html:
    """Texts and markup, one after the other."""
    given = (part for part in parts if part is not None)
    return Html("".join(part if isinstance(part, Html) else text(part) for part in given))


def table(
    caption: str,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    texts: Collection[int] = (0,),
) -> Html:
    """A table in a box that scrolls by itself, for narrow screens.

    Args:
        caption: what it is.
        header: names of the columns.
        rows: their cells; the first one names its row.
        texts: the columns of texts; the others are numbers, aligned to the right.
    """
    kinds = ["text" if i in texts else "number" for i in range(len(header))]
    head = [
        element("th", name, scope="col", class_=kind)
        for name, kind in zip(header, kinds, strict=True)
    ]
    body = [
        element(
            "tr",
            element("th", cells[0], scope="row", class_="text"),
            *(
                element("td", cell, class_=kind)
                for cell, kind in zip(cells[1:], kinds[1:], strict=True)
            ),
        )
        for cells in rows
    ]
    whole = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *head)),
        element("tbody", *body),
    )
    return element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)


def facts(pairs: Iterable[tuple[str, str]]) -> Html:
    """Names and values."""
    return element(
        "dl",
        *(element("div", element("dt", name), element("dd", value)) for name, value in pairs),
    )


def details(summary: str, *children: str | None) -> Html:
    """A part that opens on demand, by keyboard too."""
    return element("details", element("summary", summary), *children)


_WIDTH, _HEIGHT = 520, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 12, 12, 46
_POINTS = 200
COLOURS = 6


@dataclass(frozen=True)
class Curve:
    """Points in the order of x, with a name."""

    name: str
    points: tuple[tuple[float, float], ...]


def curves(title: str, x_label: str, y_label: str, given: Sequence[Curve]) -> Html | None:
    """Curves in one pair of axes; None where there is nothing finite to draw."""
    drawn = [c for c in (Curve(c.name, _finite(c.points)) for c in given) if c.points]
    if not drawn:
        return None
    xs = _ticks([x for c in drawn for x, _ in c.points])
    ys = _ticks([y for c in drawn for _, y in c.points])
    lines = []
    for i, curve in enumerate(drawn):
        points = [(_x(x, xs), _y(y, ys)) for x, y in curve.points]
        look = f"curve c{i % COLOURS}"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        lines.append(element("polyline", points=path, class_=look))
        if len(points) <= 12:
            lines += [
                element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3, class_=look) for x, y in points
            ]
    last = [f"{c.name} ends at {c.points[-1][1]:.4g}" for c in drawn]
    picture = _figure(f"{title}: {'; '.join(last)}.", x_label, y_label, xs, ys, lines)
    keys = [
        element(
            "li",
            element(
                "svg",
                element("line", x1=0, y1=6, x2=28, y2=6, class_=f"curve c{i % COLOURS}"),
                viewBox="0 0 28 12",
                class_="key",
                aria_hidden="true",
            ),
            f" {c.name}: {c.points[-1][1]:.4g} at {c.points[-1][0]:,.10g}",
        )
        for i, c in enumerate(drawn)
    ]
    caption = element("figcaption", title)
    return element("figure", caption, picture, element("ul", *keys, class_="keys"))


def histogram(title: str, x_label: str, values: Sequence[float], bins: int = 24) -> Html | None:
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
    xs, ys = _ticks([low, low + bins * width]), _ticks([0.0, max(shares)])
    bars = []
    for i, share in enumerate(shares):
        left, right = _x(low + i * width, xs), _x(low + (i + 1) * width, xs)
        top, bottom = _y(share, ys), _y(0.0, ys)
        bars.append(
            element(
                "rect",
                x=f"{left:.1f}",
                y=f"{top:.1f}",
                width=f"{max(1.0, right - left - 1):.1f}",
                height=f"{bottom - top:.1f}",
                class_="bar",
            )
        )
    number, median = counted(len(finite), "position"), statistics.median(finite)
    about = f"{title}: {number}, median {median:.3g}."
    picture = _figure(about, x_label, "% of positions", xs, ys, bars)
    return element("figure", element("figcaption", about), picture)


def _finite(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Points without NaN, thinned out; the last one stays."""
    kept = [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
    step = max(1, math.ceil(len(kept) / _POINTS))
    return tuple(kept[:-1][::step] + kept[-1:])


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers around the values: at least two."""
    low, high = min(values), max(values)
    room = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(room))
    for factor in (0.2, 0.25, 0.5, 1.0, 2.0):
        if room / (factor * step) <= 5:
            step *= factor
            break
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _x(value: float, ticks: Sequence[float]) -> float:
    share = (value - ticks[0]) / (ticks[-1] - ticks[0])
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, ticks: Sequence[float]) -> float:
    share = (value - ticks[0]) / (ticks[-1] - ticks[0])
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _figure(
    about: str,
    x_label: str,
    y_label: str,
    xs: Sequence[float],
    ys: Sequence[float],
    drawn: Sequence[Html],
) -> Html:
    """A picture with axes; a reader of screens hears `about`."""
    parts = []
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for tick in ys:
        y = f"{_y(tick, ys):.1f}"
        parts.append(element("line", x1=_LEFT, x2=right, y1=y, y2=y, class_="grid"))
        parts.append(
            element("text", f"{tick:.5g}", x=_LEFT - 6, y=y, dy="0.35em", text_anchor="end")
        )
    for i, tick in enumerate(xs):
        anchor = "end" if i == len(xs) - 1 else "middle"
        x = f"{_x(tick, xs):.1f}"
        parts.append(element("text", f"{tick:,.10g}", x=x, y=bottom + 18, text_anchor=anchor))
    middle = (_LEFT + right) / 2
    parts.append(element("text", x_label, x=middle, y=_HEIGHT - 6, text_anchor="middle"))
    turn = f"translate(13 {(_TOP + bottom) / 2:.0f}) rotate(-90)"
    parts.append(element("text", y_label, transform=turn, text_anchor="middle"))
    return element(
        "svg",
        element("title", about),
        *parts,
        *drawn,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=about,
        class_="chart",
    )
