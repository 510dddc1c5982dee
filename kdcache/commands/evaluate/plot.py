"""`evaluate --plot`: how sure the models are against how often they are right, and their losses."""

from __future__ import annotations

import os
from collections.abc import Sequence

from kdcache.commands.evaluate.scores import EvaluateResult, ModelScores
from kdcache.metrics import METRICS
from kdcache.plots import Chart, Line, plot_charts


def plot_evaluation(path: str, result: EvaluateResult) -> None:
    """Draw a calibration curve of each model, and their figures side by side.

    Args:
        path: the PNG file.
        result: of the evaluation.
    """
    plot_charts(path, charts_of(result), title=result.source)


def charts_of(result: EvaluateResult) -> list[Chart]:
    """The charts whose figures are known."""
    names = _names(result.models)
    curves = [
        Line(
            name, [b.confidence for b in model.calibration], [b.accuracy for b in model.calibration]
        )
        for name, model in zip(names, result.models, strict=True)
        if model.calibration
    ]
    charts = []
    if curves:
        x_label = "probability of the predicted class (mean of a bin)"
        charts.append(Chart("", x_label, "share that is right", curves, diagonal=True))
    for figure in (name for name, metric in METRICS.items() if metric.plotted):
        found = [
            (name, value)
            for name, model in zip(names, result.models, strict=True)
            if (value := getattr(model, figure)) is not None
        ]
        if found:
            ticks = [name for name, _ in found]
            dots = [Line(name, [i], [value]) for i, (name, value) in enumerate(found)]
            charts.append(Chart("", "", result.title(figure), dots, ticks=ticks))
    return charts


def _names(models: Sequence[ModelScores]) -> list[str]:
    """Short names that tell the models apart: what their paths do not share."""
    paths = [model.name.rstrip("/") for model in models]
    short = [os.path.basename(path) or path for path in paths]
    names = short if len(set(short)) == len(short) else paths
    return [
        f"teacher: {name}" if model.role == "teacher" and not name.startswith("teacher") else name
        for name, model in zip(names, models, strict=True)
    ]
