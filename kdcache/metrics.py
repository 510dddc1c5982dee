"""The metrics that commands report, each declared once.

Tables, plots, reports, rankings and `--best` read this list: a metric that is added here is shown
wherever its answers are. How one is computed is said where it is (`kdcache.loss.metrics`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kdcache.tasks import TASKS, Answers


@dataclass(frozen=True)
class Metric:
    """How a metric is shown, and what it is for.

    Attributes:
        title: its name for people.
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


def _share(title: str, answers: tuple[Answers, ...] = (), **others: object) -> Metric:
    return Metric(title, share=True, higher=True, answers=answers, **others)  # type: ignore[arg-type]


METRICS: Mapping[str, Metric] = {
    "accuracy": _share("accuracy", _DISTRIBUTIONS),
    "perplexity": Metric("perplexity", answers=_IDS, by_domain=False),
    "entity_f1": _share("entity F1", _CLASSES, optional=True, replaces="f1"),
    "entity_precision": _share("entity precision", _CLASSES, optional=True, by_domain=False),
    "entity_recall": _share("entity recall", _CLASSES, optional=True, by_domain=False),
    "f1": _share("F1", _CLASSES),
    "micro_f1": _share("micro F1", _LABELS),
    "macro_f1": _share("macro F1", _LABELS),
    "micro_average_precision": _share("micro average precision", _LABELS),
    "macro_average_precision": _share("macro average precision", _LABELS),
    "pearson": Metric("Pearson correlation", higher=True, answers=_SCORE),
    "spearman": Metric("Spearman correlation", higher=True, answers=_SCORE),
    "mse": Metric("mean squared error", answers=_SCORE),
    "teacher_mse": Metric("mean squared difference from the teacher", answers=_SCORE),
    "cross_entropy": Metric(
        "cross-entropy", "nats", answers=(*_DISTRIBUTIONS, *_LABELS), plotted=True
    ),
    "soft_cross_entropy": Metric(
        "soft cross-entropy", "nats", at_temperature=True, answers=_DISTRIBUTIONS,
        optional=True, replaces="kl", plotted=True,
    ),
    "kl": Metric(
        "KL to the teacher", "nats", at_temperature=True, answers=(*_DISTRIBUTIONS, *_LABELS),
        plotted=True,
    ),
    "agreement": _share(
        "agreement with the teacher", (*_DISTRIBUTIONS, *_LABELS), plotted=True
    ),
    "chunk_kl": Metric(
        "chunk KL to the teacher", "nats", answers=_IDS, optional=True, by_domain=False,
        plotted=True,
    ),
    "chunk_agreement": _share("agreement on chunks", _IDS, optional=True, by_domain=False),
    "bits_per_byte": Metric("bits per byte", answers=_IDS, optional=True, plotted=True),
    "calibration_error": Metric(
        "calibration error", share=True, answers=_DISTRIBUTIONS, by_domain=False
    ),
    "hard_loss": Metric("cross-entropy", "nats"),
    "soft_loss": Metric("soft loss", "nats"),
    "loss": Metric("loss", "nats"),
    "average_precision": _share("average precision"),
}  # fmt: skip
"""Metrics by the names of their fields, in the order in which an evaluation shows them."""

LOSS_PARTS = ("hard_loss", "soft_loss", "soft_cross_entropy")
RANKED = ("accuracy", "f1", "micro_f1", "pearson", *LOSS_PARTS, "loss")
"""What a training logs, from the figure that ranks students first."""


def run_title(name: str, task: str | None = None) -> str:
    """A figure of a training for people: its F1 is of entities, and scores have an error.

    Args:
        name: of the figure.
        task: of the run; None where it is not known.
    """
    if name == "hard_loss" and task is not None:
        return TASKS[task].hard[0]
    return "F1 of entities" if name == "f1" else METRICS[name].title
