"""The figures of an evaluation, what they are called, and their plot."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from kdcache.metrics import METRICS, ModelScores
from kdcache.plots import Chart, Line, plot_charts
from kdcache.tasks import TASKS


@dataclass(frozen=True)
class DomainScores:
    """Figures of all models over the rows of one domain.

    Attributes:
        labelled: positions with a hard label.
    """

    name: str
    rows: int
    positions: int
    labelled: int
    models: tuple[ModelScores, ...]


@dataclass(frozen=True)
class EvaluateResult:
    """Figures of all models over one set.

    Attributes:
        positions: positions (one a row for classification).
        labelled: positions with a hard label.
        temperature: of KL.
        agreement_positions: positions where the teacher's most probable id is known.
        bytes: of text that bits per byte are over; 0 where there are none.
        chunks: of text between byte boundaries that the tokens of all models share; 0 where all
            models share a tokenizer.
        models: the teacher, if there is one, then the students.
        notes: what a reader must know about figures that are missing or not exact.
        domains: the same over the rows of each domain, where corpora have names.
        threshold: of several labels a row, the probability from which one is predicted.
        one_answer: what one answer for all reaches (`kdcache.student.one_answer`); None without
            labels.
        little_learnt: names of the students that are hardly better.
    """

    source: str
    task: str
    label_names: tuple[str, ...] | None
    rows: int
    positions: int
    labelled: int
    temperature: float
    agreement_positions: int
    calibration_bins: int
    bytes: int
    chunks: int
    models: tuple[ModelScores, ...]
    notes: tuple[str, ...]
    domains: tuple[DomainScores, ...] = ()
    threshold: float | None = None
    one_answer: ModelScores | None = None
    little_learnt: tuple[str, ...] = ()

    def has(self, name: str) -> bool:
        """Whether any model has a figure."""
        return any(getattr(model, name) is not None for model in self.models)

    def shown(self) -> Sequence[str]:
        """The figures that its table has, in their order."""
        answers = TASKS[self.task].answers
        of_task = [name for name, metric in METRICS.items() if answers in metric.answers]
        known = [name for name in of_task if self.has(name) or not METRICS[name].optional]
        replaced = {METRICS[name].replaces for name in known}
        return [name for name in known if name not in replaced]

    def title(self, name: str) -> str:
        """A figure for people, with its unit, temperature or threshold."""
        metric, task = METRICS[name], TASKS[self.task]
        title, about = metric.title, metric.unit
        if name == "perplexity" and task.perplexity is not None:
            title = task.perplexity
        if name == "f1":
            names = self.label_names or ()
            title = f"F1 of {names[1]}" if len(names) == 2 else "macro F1"
        if task.answers == "labels" and about:
            about += " a class"
        if metric.at_temperature:
            about += f", T = {self.temperature:g}"
        if name in ("micro_f1", "macro_f1"):
            about = f"from {self.threshold:g}"
        if name == "calibration_error":
            about = f"{self.calibration_bins} bins"
        return f"{title} ({about})" if about else title


def plot_evaluation(path: str, result: EvaluateResult) -> None:
    """Draw a calibration curve of each model, and their figures side by side."""
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
