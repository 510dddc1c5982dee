"""Draws KL from the teacher against bytes per position, from the table that `quality.py` keeps.

    python benchmarks/quality_plot.py

Two panels: students that learn at T = 1, and at T = 2. Both axes are logarithmic; the dashed lines
are a student without a teacher, which stores nothing. Writes docs/kl-against-bytes.png.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from results import kept_table

OUT = Path(__file__).resolve().parent.parent / "docs" / "kl-against-bytes.png"
OURS, OTHERS, WHOLE, INK = "#0072b2", "#d55e00", "#009e73", "#222222"
# Where the name of a point stands: right of it, left of it, above or below.
SIDES = {
    "right": ((9, 0), "left", "center"),
    "left": ((-9, 0), "right", "center"),
    "above": ((0, 9), "center", "bottom"),
    "below": ((0, -9), "center", "top"),
}
Panel = dict[str, tuple[str, str, str]]  # row of the table -> name, side, colour
LEARN_AT_1: Panel = {
    "full distribution": ("full distribution", "above", WHOLE),
    "`sample:40`": ("sample:40", "below", OURS),
    "`sample:20`": ("sample:20", "left", OURS),
    "`sample:10`": ("sample:10", "above", OURS),
    "random sampling": ("random sampling", "right", OTHERS),
    "top-k, tail bucket": ("top 17 and the tail's mass", "below", OTHERS),
    "top-k, renormalised": ("top 17, renormalised", "right", OTHERS),
}
LEARN_AT_2: Panel = {
    "full distribution, T = 2": ("full distribution", "above", WHOLE),
    "`sample:20` of T = {1, 2}, T = 2": ("sample:20 at T = 1 and 2", "right", OURS),
    "top-k of T = 1, rescaled to T = 2": ("top 17 of T = 1, rescaled", "right", OTHERS),
}


def main() -> None:
    rows = {row["student learns from"]: row for row in kept_table("quality")}
    figure = Figure(figsize=(11, 4.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    for i, (temperature, panel) in enumerate(((1, LEARN_AT_1), (2, LEARN_AT_2))):
        draw(figure.add_subplot(1, 2, i + 1), rows, temperature, panel)
    figure.suptitle(
        "KL from the teacher to the trained student, against the bytes that are stored",
        x=0.01, ha="left", color=INK, fontsize=12, fontweight="bold",
    )  # fmt: skip
    figure.savefig(OUT)


def draw(axes: Any, rows: dict[str, dict[str, str]], temperature: int, panel: Panel) -> None:
    """One panel: points with their names, and the line of the hard-label student."""
    column = f"KL, T = {temperature}"

    def point(name: str) -> tuple[float, float]:
        return (number(rows[name]["bytes"]), number(rows[name][column]))

    ours = sorted(point(name) for name, (_, _, colour) in panel.items() if colour == OURS)
    axes.plot(*zip(*ours, strict=True), color=OURS, linewidth=1.2)
    for name, (label, side, colour) in panel.items():
        offset, across, along = SIDES[side]
        axes.plot(*point(name), "o", color=colour, markersize=7)
        axes.annotate(
            label, point(name), offset, textcoords="offset points", ha=across, va=along,
            fontsize=9, color=colour,
        )  # fmt: skip
    hard = number(rows["hard labels"][column])
    axes.axhline(hard, color=INK, linestyle="--", linewidth=1.2)
    axes.annotate(
        "hard labels, no teacher", (1, hard), (-4, 4), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", va="bottom", fontsize=9, color=INK,
    )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(3, 9000), ylim=(0.02, 4))
    axes.xaxis.set_major_locator(FixedLocator([10, 100, 1000]))
    axes.yaxis.set_major_locator(FixedLocator([0.03, 0.1, 0.3, 1, 3]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(color="#d9d9d9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"trained at T = {temperature}", loc="left", fontsize=10, color=INK)
    axes.set_xlabel("bytes per position, targets on disk", color=INK)
    axes.set_ylabel(f"KL at T = {temperature}, nats per position", color=INK)


def number(cell: str) -> float:
    """The mean in a cell such as `1,234.5` or `0.158 ± 0.006`."""
    return float(cell.split(" ± ")[0].replace(",", ""))


if __name__ == "__main__":
    main()
