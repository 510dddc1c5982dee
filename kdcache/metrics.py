"""The metrics that commands report, each declared once.

Tables, plots, reports, rankings and `--best` read this list: a field of `ModelScores` is shown
wherever its answers are. How one is computed stands in `kdcache.loss.metrics`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from kdcache.tasks import TASKS, Answers


@dataclass(frozen=True)
class Metric:
    """How a metric is shown, and what it is for.

    Attributes:
        unit: in words; empty of shares and correlations.
        share: whether it is between 0 and 1, and shown in percent.
        higher: whether more is better.
        at_temperature: whether it depends on the temperature.
        answers: what the models of an evaluation answer that has it; empty where only trainings do.
        optional: left out of an evaluation where no model has it, instead of shown as a dash.
        replaces: the metric of which it takes the place where a model has it.
        by_domain: whether an evaluation has a table of its domains.
        plotted: whether an evaluation draws it.
    """

    title: str
    unit: str = ""
    share: bool = False
    higher: bool = False
    at_temperature: bool = False
    answers: tuple[Answers, ...] = ()
    optional: bool = False
    replaces: str | None = None
    by_domain: bool = True
    plotted: bool = False


_IDS: Final = ("ids",)
_CLASSES: Final = ("classes",)
_DISTRIBUTIONS: Final = ("ids", "classes")
_LABELS: Final = ("labels",)
_SCORE: Final = ("score",)


def _figure(title: str, unit: str = "", **others: Any) -> Any:
    return field(default=None, metadata={"metric": Metric(title, unit, **others)})


def _share(title: str, answers: tuple[Answers, ...], **others: Any) -> Any:
    return _figure(title, share=True, higher=True, answers=answers, **others)


@dataclass(frozen=True)
class Bin:
    """Predictions of about one confidence.

    Attributes:
        confidence: mean probability of the predicted id or class.
        accuracy: share of them that is right.
    """

    confidence: float
    accuracy: float
    positions: int


@dataclass(frozen=True)
class ModelScores:
    """The figures of one model; None where one has no meaning or is not known.

    Attributes:
        role: `teacher`, `student`, or `baseline` of one answer for all.
        parameters: numbers in its weights; None for cached targets.
        accuracy: share of hard labels that are the most probable id or class.
        f1: of class 1 with two classes, else macro (classification only).
        cross_entropy: with the hard labels, nats per position, T = 1; of several labels a row
            the mean over classes.
        perplexity: its exponential (language models only; of a masked one at the masked
            positions, a pseudo-perplexity).
        kl: KL(teacher || student) at the result's temperature, nats per position; of several
            labels a row the mean over classes.
        soft_cross_entropy: where KL is not known: that plus the teacher's entropy.
        agreement: share of positions with the most probable id of the teacher; of several
            labels a row the share of rows and classes on which both decide alike.
        calibration_error: expected calibration error of the most probable id, T = 1.
        micro_f1: of several labels a row, over all rows and classes at the threshold.
        macro_f1: their mean over classes.
        micro_average_precision: the same without a threshold, over all rows and classes.
        macro_average_precision: its mean over classes.
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
    accuracy: float | None = _share("accuracy", _DISTRIBUTIONS)
    perplexity: float | None = _figure("perplexity", answers=_IDS, by_domain=False)
    entity_f1: float | None = _share("entity F1", _CLASSES, optional=True, replaces="f1")
    entity_precision: float | None = _share(
        "entity precision", _CLASSES, optional=True, by_domain=False
    )
    entity_recall: float | None = _share("entity recall", _CLASSES, optional=True, by_domain=False)
    f1: float | None = _share("F1", _CLASSES)
    micro_f1: float | None = _share("micro F1", _LABELS)
    macro_f1: float | None = _share("macro F1", _LABELS)
    micro_average_precision: float | None = _share("micro average precision", _LABELS)
    macro_average_precision: float | None = _share("macro average precision", _LABELS)
    pearson: float | None = _figure("Pearson correlation", higher=True, answers=_SCORE)
    spearman: float | None = _figure("Spearman correlation", higher=True, answers=_SCORE)
    mse: float | None = _figure("mean squared error", answers=_SCORE)
    teacher_mse: float | None = _figure("mean squared difference from the teacher", answers=_SCORE)
    cross_entropy: float | None = _figure(
        "cross-entropy", "nats", answers=(*_DISTRIBUTIONS, *_LABELS), plotted=True
    )
    soft_cross_entropy: float | None = _figure(
        "soft cross-entropy", "nats", at_temperature=True, answers=_DISTRIBUTIONS,
        optional=True, replaces="kl", plotted=True,
    )  # fmt: skip
    kl: float | None = _figure(
        "KL to the teacher", "nats", at_temperature=True, answers=(*_DISTRIBUTIONS, *_LABELS),
        plotted=True,
    )  # fmt: skip
    agreement: float | None = _share(
        "agreement with the teacher", (*_DISTRIBUTIONS, *_LABELS), plotted=True
    )
    chunk_kl: float | None = _figure(
        "chunk KL to the teacher", "nats", answers=_IDS, optional=True, by_domain=False,
        plotted=True,
    )  # fmt: skip
    chunk_agreement: float | None = _share(
        "agreement on chunks", _IDS, optional=True, by_domain=False
    )
    bits_per_byte: float | None = _figure(
        "bits per byte", answers=_IDS, optional=True, plotted=True
    )
    calibration_error: float | None = _figure(
        "calibration error", share=True, answers=_DISTRIBUTIONS, by_domain=False
    )
    calibration: tuple[Bin, ...] = ()


METRICS: Mapping[str, Metric] = {
    **{f.name: f.metadata["metric"] for f in fields(ModelScores) if f.metadata},
    # Of trainings alone:
    "hard_loss": Metric("cross-entropy", "nats"),
    "soft_loss": Metric("soft loss", "nats"),
    "loss": Metric("loss", "nats"),
    "average_precision": Metric("average precision", share=True, higher=True),
}
"""Metrics by the names of their fields, in the order in which an evaluation shows them."""

LOSS_PARTS = ("hard_loss", "soft_loss", "soft_cross_entropy")
RANKED = ("accuracy", "f1", "micro_f1", "pearson", *LOSS_PARTS, "loss")
"""What a training logs, from the figure that ranks students first."""


def run_title(name: str, task: str | None = None) -> str:
    """A figure of a training for people: its F1 is of entities, and scores have an error."""
    if name == "hard_loss" and task is not None:
        return TASKS[task].hard[0]
    return "F1 of entities" if name == "f1" else METRICS[name].title
