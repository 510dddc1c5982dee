"""`kdcache.plots`: names in a plot can be read."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from kdcache.plots import Cloud, Panel, draw_clouds


@pytest.mark.parametrize("together", [False, True])
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
