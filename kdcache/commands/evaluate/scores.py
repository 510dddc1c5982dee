"""The figures of an evaluation, what they are called, and their plot."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from kdcache.metrics import METRICS
from kdcache.plots import Chart, Line, plot_charts
from kdcache.tasks import TASKS


@dataclass(frozen=True)
class Bin:
    """Predictions of about one confidence.

    Attributes:
        confidence: mean probability of the predicted id or class.
        accuracy: share of them that is right.
        positions: how many there are.
    """

    confidence: float
    accuracy: float
    positions: int


@dataclass(frozen=True)
class ModelScores:
    """The figures of one model; None where one has no meaning or is not known.

    Attributes:
        name: as the user gave it, or `teacher` for cached targets.
        role: `teacher`, `student`, or `baseline` of one answer for all.
        parameters: numbers in its weights; None for cached targets.
        accuracy: share of hard labels that are the most probable id or class.
        f1: of class 1 with two classes, else macro (classification only).
        cross_entropy: with the hard labels, nats per position, T = 1; of several labels a row
            the mean over classes.
        perplexity: its exponential (language models only; of a masked one at the masked
            places, a pseudo-perplexity).
        kl: KL(teacher || student) at the result's temperature, nats per position; of several
            labels a row the mean over classes.
        soft_cross_entropy: where KL is not known: that plus the teacher's entropy.
        agreement: share of positions whose most probable id is also the teacher's; of several
            labels a row the share of rows and classes on which both decide alike.
        calibration_error: expected calibration error of the most probable id, T = 1.
        micro_f1: of several labels a row, over all rows and classes at the threshold.
        macro_f1: their mean over classes.
        micro_average_precision: the same without a threshold, over all rows and classes.
        macro_average_precision: its mean over classes.
        mse: mean squared error of scores.
        pearson: their linear correlation with the hard labels.
        spearman: the correlation of their ranks.
        teacher_mse: mean squared difference from the teacher's scores.
        calibration: the bins that it is made of, those with predictions; empty where not known.
        entity_f1: micro F1 of entities (tags of entities only, see `kdcache.loss.metrics`).
        entity_precision: share of the entities found that are right.
        entity_recall: share of the true entities that were found.
        bits_per_byte: minus the log2 of its probability of the text, a byte of text (causal LM
            only): comparable between any two models of one evaluation.
        chunk_kl: KL between "this text" and "any other" of teacher and student, nats per chunk, at
            T = 1. None where all models share a tokenizer.
        chunk_agreement: share of chunks where both find the text more probable than not, or both
            do not. None where all models share a tokenizer.
    """

    name: str
    role: str
    parameters: int | None
    accuracy: float | None = None
    f1: float | None = None
    cross_entropy: float | None = None
    perplexity: float | None = None
    kl: float | None = None
    soft_cross_entropy: float | None = None
    agreement: float | None = None
    calibration_error: float | None = None
    calibration: tuple[Bin, ...] = ()
    entity_f1: float | None = None
    entity_precision: float | None = None
    entity_recall: float | None = None
    bits_per_byte: float | None = None
    chunk_kl: float | None = None
    chunk_agreement: float | None = None
    micro_f1: float | None = None
    macro_f1: float | None = None
    micro_average_precision: float | None = None
    macro_average_precision: float | None = None
    mse: float | None = None
    pearson: float | None = None
    spearman: float | None = None
    teacher_mse: float | None = None


@dataclass(frozen=True)
class DomainScores:
    """Figures of all models over the rows of one domain.

    Attributes:
        name: of the domain.
        rows: rows.
        positions: positions.
        labelled: positions with a hard label.
        models: as in `EvaluateResult`.
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
        source: the cache or the corpus.
        task: one of `kdcache.tasks.TASKS`.
        label_names: the classes, or None.
        rows: rows in the set.
        positions: positions (one a row for classification).
        labelled: positions with a hard label.
        temperature: of KL.
        agreement_positions: positions where the teacher's most probable id is known.
        calibration_bins: bins of the calibration error.
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
