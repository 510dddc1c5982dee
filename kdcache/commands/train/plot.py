"""`train --plot`: the curves of a run, from its `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcache.commands.train.log import read_metrics
from kdcache.commands.train.result import TrainResult
from kdcache.plots import Chart, Level, Line, plot_charts
from kdcache.tasks import CAUSAL_LM, TASKS

_FIGURES = (  # of the log, as charts in their order
    ("loss", "loss (what is minimised)"),
    ("hard_loss", ""),
    ("soft_loss", "divergence from the teacher, times T²"),
    ("soft_cross_entropy", "cross-entropy with the teacher, times T²"),
    ("accuracy", "accuracy"),
    ("f1", "F1 of entities"),
    ("micro_f1", "micro F1"),
    ("pearson", "Pearson correlation"),
)


def plot_run(path: str, result: TrainResult) -> None:
    """Draw what a run logged, training and evaluation, beside its teacher's cross-entropy.

    Args:
        path: the PNG file.
        result: of the run, whose folder has its log.
    """
    charts = charts_of(read_metrics(Path(result.out)), result)
    note = "" if result.best_step is None else f"the student is that of step {result.best_step}"
    plot_charts(path, charts, title=Path(result.out).name, note=note)


def charts_of(lines: Sequence[dict[str, Any]], result: TrainResult) -> list[Chart]:
    """One chart for each figure that was logged."""
    levels = {
        "teacher, training": result.teacher_cross_entropy,
        "teacher, evaluation": result.eval_teacher_cross_entropy,
    }
    charts = []
    hard, unit = TASKS[result.task or CAUSAL_LM].hard
    for figure, said in _FIGURES:
        y_label = said or f"{hard} with the labels ({unit})"
        drawn = [
            line
            for label, key in (("training", figure), ("evaluation", f"eval_{figure}"))
            if (line := _line(label, key, lines)).x
        ]
        if drawn:
            beside = levels.items() if figure == "hard_loss" else ()
            known = [Level(label, value) for label, value in beside if value is not None]
            charts.append(Chart("", "step", y_label, drawn, known))
    if len(charts) == 2 and charts[0].lines == charts[1].lines:
        del charts[0]  # hard labels alone: the loss is the cross-entropy
    return charts


def _line(label: str, key: str, lines: Sequence[dict[str, Any]]) -> Line:
    found = [(line["step"], line[key]) for line in lines if key in line]
    return Line(label, [step for step, _ in found], [value for _, value in found])
