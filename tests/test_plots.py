"""`kdcache.plots`: names in a plot can be read."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import further
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from kdcache.commands.evaluate.scores import EvaluateResult, plot_evaluation
from kdcache.commands.evaluate.scores import charts_of as evaluation_charts
from kdcache.commands.run_folder import TrainResult
from kdcache.commands.train.card import charts_of as run_charts
from kdcache.commands.train.card import plot_run
from kdcache.metrics import Bin, ModelScores
from kdcache.plots import Chart, Cloud, Level, Line, Panel, draw_charts, draw_clouds, plot_charts


def test_plot_is_a_png_whose_pixels_tell_the_lines(tmp_path: Path) -> None:
    from matplotlib.image import imread

    def draw(values: list[float]) -> object:
        path = tmp_path / "plot.png"
        lines = [Line("one", [1, 2, 3], values), Line("two", [1, 2, 3], [3.0, 2.5, 2.2])]
        plot_charts(path, [Chart("", "x", "y", lines, [Level("floor", 1.0)])], title="t")
        return imread(path)

    first, same, other = draw([3.0, 2.0, 1.5]), draw([3.0, 2.0, 1.5]), draw([3.0, 1.0, 1.5])

    assert first.shape == (752, 1120, 4)  # type: ignore[attr-defined]
    assert (first == same).all()  # type: ignore[attr-defined]
    assert (first != other).any()  # type: ignore[attr-defined]
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]


def test_a_panel_of_zeros_alone_says_so() -> None:
    """A plan of scores, or of `dense` alone: a logarithmic axis has no place for any of them."""
    zeros, some = (Cloud("dense", ((4.0, y, "dense"), (2.0, y, "float16"))) for y in (0.0, 0.5))
    panels = [Panel("one", "y", [some]), Panel("two", "y", [zeros])]
    one, two = draw_clouds(panels, title="t", x_label="x").axes
    assert {text.get_text() for text in one.texts} == {"dense", "float16"}
    assert [text.get_text() for text in two.texts] == ["all are 0"]


@pytest.mark.parametrize("together", [*further(False), True])
def test_no_name_in_a_plot_covers_another_or_a_point(together: bool) -> None:
    numbers = np.random.default_rng(0)
    names = ("10", "20", "40", "int8", "bfloat16")
    clouds = []
    for k in range(12):
        # As a plan's grid is: half of the clouds have points where others have them too.
        place = numbers.uniform(0, 3, 2) if k % 2 else np.array([1.0, 1.0])
        spread = 0.02 if together else 0.7
        points = 10 ** (place + spread * numbers.standard_normal((3, 2)))
        points[0] = 10.0
        some = tuple((float(x), float(y), names[(i + k) % 5]) for i, (x, y) in enumerate(points))
        clouds.append(Cloud(f"cloud {k}", some, hollow=k % 3 == 0))
    figure = draw_clouds(
        [Panel("one", "y", clouds), Panel("two", "y", clouds)], title="t", x_label="x"
    )
    figure.canvas.draw()
    looks = set()
    for axes in figure.axes:
        boxes = [Text.get_window_extent(text) for text in axes.texts]
        assert len(boxes) == 36
        for one, other in combinations(boxes, 2):
            assert not one.overlaps(other)
        half = 3 * figure.dpi / 72  # of a marker of 6 points
        for line in axes.lines:
            if line.get_marker() in ("None", None):
                continue
            looks.add((line.get_color(), line.get_marker()))
            for centre in axes.transData.transform(line.get_xydata()):
                marker = Bbox.from_extents(*(centre - half), *(centre + half))
                assert not marker.count_overlaps(boxes)
        for box in boxes:
            assert axes.bbox.count_contains([box.min, box.max]) == 2
    assert len(looks) == 12  # no two clouds look alike


def test_an_axis_names_its_values_and_no_offset() -> None:
    line = Line("a", [0, 1], [5.170001, 5.17002])
    figure = draw_charts([Chart("", "step", "loss", [line])], title="")
    figure.canvas.draw()
    (axes,) = figure.axes
    assert axes.yaxis.get_offset_text().get_text() == ""


def test_all_lines_and_levels_of_a_chart_look_different() -> None:
    def looks(count: int, points: int) -> set[object]:
        x = list(range(points))
        lines = [Line(f"line {k}", x, [float(k)] * points) for k in range(count)]
        levels = [Level(label, 0.5) for label in ("teacher, training", "teacher, evaluation")]
        (axes,) = draw_charts([Chart("", "step", "loss", lines, levels)], title="").axes
        named = [line for line in axes.lines if line.get_marker() not in ("|", "_")]
        assert len(named) == count + 2
        return {(one.get_color(), str(one._unscaled_dash_pattern)) for one in named}

    assert len({colour for colour, _ in looks(2, 9)}) == 4  # type: ignore[misc]
    assert len(looks(14, 99)) == 16  # too many points for markers, too many lines for colours


def test_a_run_is_drawn_beside_its_teacher(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"step": 1, "loss": 2.0, "hard_loss": 3.0, "soft_loss": 1.0},
        {"step": 2, "loss": 1.0, "hard_loss": 2.0, "soft_loss": 0.5},
        {"step": 2, "eval_loss": 1.5, "eval_hard_loss": 2.5, "eval_soft_loss": 0.7},
    ]
    result = TrainResult(str(tmp_path), 2, 1.0, 8, 1.0, teacher_cross_entropy=1.5, best_step=2)
    loss, hard, soft = run_charts(lines, result)
    assert [line.label for line in hard.lines] == ["training", "evaluation"]
    assert (hard.lines[0].x, hard.lines[0].y) == ([1, 2], [3.0, 2.0])
    assert hard.levels == [Level("teacher, training", 1.5)]
    assert (loss.levels, soft.levels) == ([], [])
    alone = [{"step": 1, "loss": 2.0, "hard_loss": 2.0}]
    assert len(run_charts(alone, result)) == 1  # hard labels alone: one figure under two names
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_run(str(tmp_path / "run.png"), result)
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"


def test_an_evaluation_is_drawn_with_what_is_known_of_each_model(tmp_path: Path) -> None:
    none = dict.fromkeys(("accuracy", "f1", "perplexity", "agreement", "calibration_error"))
    rest: dict[str, Any] = {**none, "parameters": 1, "soft_cross_entropy": None}
    bins = (Bin(0.3, 0.2, 5), Bin(0.9, 0.8, 3))
    models = (
        ModelScores(name="teacher", role="teacher", cross_entropy=1.0, kl=None, **rest),
        ModelScores(
            name="runs/a/", role="student", cross_entropy=2.0, kl=0.5, **rest, calibration=bins
        ),
        ModelScores(name="more/a", role="student", cross_entropy=3.0, kl=0.7, **rest),
    )
    result = EvaluateResult("c", "causal-lm", None, 1, 8, 8, 2.0, 8, 15, 0, 0, models, ())
    curve, hard, kl = evaluation_charts(result)
    assert [(line.label, line.x, line.y) for line in curve.lines] == [
        ("runs/a", [0.3, 0.9], [0.2, 0.8])
    ]
    assert hard.ticks == ["teacher", "runs/a", "more/a"]
    assert [line.y for line in kl.lines] == [[0.5], [0.7]]
    assert "T = 2" in kl.y_label
    plot_evaluation(str(tmp_path / "e.png"), result)
    assert (tmp_path / "e.png").read_bytes()[:4] == b"\x89PNG"
