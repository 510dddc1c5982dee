"""What one answer for all reaches: figures that a model must beat to have learnt anything.

=========  ==========================  ===========================================================
answers    one answer                  its probabilities
=========  ==========================  ===========================================================
ids        a unigram model             the share of each id
classes    the commonest class         the share of each class
labels     the labels of best F1       the share of each class
score      the mean
=========  ==========================  ===========================================================

The share of an id that n of N labels are is (n - 1 + K / V) / (N - 1 + K), where K of V ids occur:
Witten and Bell's estimate (1991) of each label from the others, so that a few labels of a large
vocabulary are not foreseen by having been counted.

Cost: 8 bytes an output; of scores, and of several labels a row, the labels are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from kdcache.humanize import counted
from kdcache.loss import score_loss
from kdcache.loss.metrics import are_entities, f1
from kdcache.metrics import METRICS
from kdcache.tasks import TASKS, Answers, labelled

ONE_ANSWERS: Final[Mapping[Answers, str]] = {
    "ids": "unigram model",
    "classes": "commonest class",
    "labels": "same labels for all",
    "score": "mean score",
}
"""What one answer is called, by what answers are over."""

_LOSSES: Final = ("cross_entropy", "hard_loss")
_JUDGED: Final[Mapping[Answers, tuple[str, ...]]] = {  # by the first that is known
    "ids": _LOSSES,
    "classes": ("accuracy", *_LOSSES),
    "labels": ("micro_f1", *_LOSSES),
    "score": ("mse", "hard_loss"),
}
_LEAST = 0.2  # of the way from one answer's share to 1, below which little was learnt
ENOUGH_STEPS = 500
"""Steps below which a training that learnt little should be longer."""


@dataclass
class OneAnswer:
    """Counts of hard labels.

    Attributes:
        outputs: ids or classes of an answer.
        count: labels, or rows with some.
    """

    task: str
    outputs: int
    names: Sequence[str] | None = None
    count: int = 0
    _counts: np.ndarray = field(init=False)
    _kept: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        over = TASKS[self.task].distribution
        self._counts = np.zeros(self.outputs if over else 0, np.int64)

    def add(self, labels: np.ndarray) -> None:
        """Count labels, as a batch or a shard has them."""
        known = labels[labelled(labels, self.task)]
        self.count += len(known)
        if TASKS[self.task].distribution:
            self._counts += np.bincount(known, minlength=self.outputs)
        else:
            self._kept.append(known)

    def merge(self, other: OneAnswer) -> None:
        """Add the counts of other labels."""
        self.count += other.count
        self._counts += other._counts
        self._kept += other._kept

    @property
    def mean(self) -> float:
        """The mean score; NaN where there is none."""
        score = self.count and TASKS[self.task].answers == "score"
        return float(np.concatenate(self._kept).mean()) if score else math.nan

    def figures(self, **how: Any) -> dict[str, float]:
        """By the names of `METRICS`, and `hard_loss` as trainings log it; empty without labels.
        `how` is the divergence of the hard loss of scores, see `score_loss`.
        """
        if not self.count:
            return {}
        answers = TASKS[self.task].answers
        if answers == "score":
            scores = torch.from_numpy(np.concatenate(self._kept)).double()
            mean = scores.mean().expand(len(scores), 1)
            loss = float(score_loss(mean, scores, None, alpha=1.0, count=len(scores), **how).hard)
            return {"mse": float(scores.var(correction=0)), "hard_loss": loss}
        found = self._of_labels() if answers == "labels" else self._of_classes()
        return found | {"hard_loss": found["cross_entropy"]}

    def _of_labels(self) -> dict[str, float]:
        truth = np.concatenate(self._kept)
        known, hits = (truth >= 0).sum(0), (truth == 1).sum(0)
        known, hits = known[known > 0], hits[known > 0]
        p = hits / known
        order = np.argsort(-p, kind="stable")  # the best labels are the most frequent ones
        scores = 2 * hits[order].cumsum() / np.maximum(hits.sum() + known[order].cumsum(), 1)
        nats = -sum(known @ (q * np.log(np.where(q > 0, q, 1))) for q in (p, 1 - p))
        return {"micro_f1": float(scores.max()), "cross_entropy": float(nats / known.sum())}

    def _of_classes(self) -> dict[str, float]:
        n, kinds = self._counts, np.count_nonzero(self._counts)
        there, best = n[n > 0], int(n.argmax())
        shares = (there - 1 + kinds / self.outputs) / (self.count - 1 + kinds)
        found = {
            "accuracy": float(n[best] / self.count),
            "cross_entropy": float(-(there @ np.log(shares)) / self.count),
        }
        if TASKS[self.task].named:
            confusion = np.zeros((self.outputs, self.outputs), np.int64)
            confusion[:, best] = n
            if not math.isnan(share := f1(confusion)):
                found["f1"] = share
            if TASKS[self.task].words and are_entities(self.names or ()):
                found["entity_f1"] = 0.0
        return found


def little_learnt(
    task: str,
    found: Mapping[str, float | None],
    one: Mapping[str, float],
    after: str,
    steps: int | None,
) -> str:
    """What is wrong with a model that is hardly better than one answer for all, and what to change;
    empty of others.

    Args:
        found: the model's figures.
        one: those of `OneAnswer.figures` on the same labels.
        after: where they are from, in words.
        steps: of its training, if that is known.
    """
    judged = _JUDGED[TASKS[task].answers]
    both = [name for name in judged if name in one and found.get(name) is not None]
    entities = found.get("entity_f1", found.get("f1") if "entity_f1" in one else None)
    name = "entity_f1" if entities == 0 and "entity_f1" in one else (both or [""])[0]
    if not name or (METRICS[name].share and one[name] == 1):  # nothing can be better
        return ""
    own = 0.0 if name == "entity_f1" else found[name]
    assert own is not None, "it is known"
    share, base = METRICS[name].share, one[name]
    worse = own <= base if share else own >= base
    if not worse and not (share and own - base < _LEAST * (1 - base)):
        return ""
    shown = [f"{value:.1%}" if share else f"{value:.4g}" for value in (own, base)]
    title = TASKS[task].hard[0] if name == "hard_loss" else METRICS[name].title
    return (
        f"{'no' if worse else 'hardly'} better than one answer for all: {title} {shown[0]} "
        f"{after}, and {shown[1]} of the {ONE_ANSWERS[TASKS[task].answers]}. {_cure(steps)}"
    )


def _cure(steps: int | None) -> str:
    if steps is None:
        return "Train it for more steps, on more rows, or with another --learning-rate."
    if steps < ENOUGH_STEPS:
        return f"It had {counted(steps, 'step')}: give it {ENOUGH_STEPS} or more (--epochs)."
    return (
        f"It had {counted(steps, 'step')}: train on more rows or with another --learning-rate, and "
        "look whether the labels belong to the texts."
    )


def begin_at(model: nn.Module, score: float | None) -> None:
    """Let a new head answer about this score at first; None leaves it as it is."""
    heads = (m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1)
    biases = [head.bias for head in heads if head.bias is not None]
    if score is not None and math.isfinite(score) and biases:
        nn.init.constant_(biases[-1], score)
