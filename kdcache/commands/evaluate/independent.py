"""Figures of a model whose answers are no distribution: labels each by itself, or scores.

Average precision and Spearman's correlation need all answers in order, so these are kept: 4 bytes a
class and row for each model, and as many for the hard labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.loss import label_loss, score_loss
from kdcache.loss.entities import ratio
from kdcache.loss.metrics import known
from kdcache.loss.rank_metrics import (
    macro_average_precision,
    macro_f1,
    micro_average_precision,
    micro_f1,
    pearson,
    spearman,
)
from kdcache.targets import DenseTargets
from kdcache.tasks import IGNORE, TASKS, labelled


class IndependentTally:
    """The answers of one model, and how far they are from the teacher's.

    Attributes:
        positions: rows.
        labelled: rows with a hard label.
        known: rows, or classes of rows, of which the teacher's answer is known.
    """

    def __init__(self, task: str, threshold: float) -> None:
        """Start empty.

        Args:
            task: of the model.
            threshold: probability from which a class is predicted.
        """
        self.task, self.scores = task, TASKS[task].answers == "score"
        self.logit = float(np.log(threshold) - np.log1p(-threshold))
        self.positions = self.labelled = self.known = 0
        self.hard = self.soft = self.agreed = 0.0
        self._labels: list[np.ndarray] = []
        self._answers: list[np.ndarray] = []

    def add(self, logits: Tensor, labels: np.ndarray, targets: DenseTargets | None) -> None:
        """Add rows.

        Args:
            logits: [n, classes], or [n, 1] of scores.
            labels: as `kdcache.stream.Batch` has them.
            targets: the teacher's answers, or None.
        """
        z, hard = logits.double(), torch.from_numpy(labels).to(logits.device)
        loss = score_loss if self.scores else label_loss
        parts = loss(z, hard, targets, alpha=0.5, count=1)
        self.hard += float(parts.hard)
        self.positions += len(labels)
        self.labelled += int(labelled(labels, self.task).sum())
        if targets is not None:
            self.soft += float(parts.soft) / targets.temperature**2
            self.known += logits.numel()
            mine, theirs = z >= self.logit, targets.logits >= self.logit
            self.agreed += float((mine == theirs).sum())
        self._labels.append(labels)
        self._answers.append(logits.float().cpu().numpy())

    def merge(self, other: IndependentTally) -> None:
        """Add the rows of another tally."""
        for name in ("positions", "labelled", "known", "hard", "soft", "agreed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._labels += other._labels
        self._answers += other._answers

    def figures(self, *, soft: bool) -> dict[str, Any]:
        """The figures by their names in `ModelScores`; those against the teacher where `soft`."""
        if not self._labels:
            return {}
        labels, answers = np.concatenate(self._labels), np.concatenate(self._answers)
        there = labelled(labels, self.task)
        labels, answers = labels[there], answers[there]
        soft_mean = known(ratio(self.soft, self.positions)) if soft else None
        if self.scores:
            return {
                "mse": known(ratio(self.hard, self.labelled)),
                "pearson": known(pearson(answers[:, 0], labels)),
                "spearman": known(spearman(answers[:, 0], labels)),
                "teacher_mse": soft_mean,
            }
        chosen = answers >= self.logit
        return {
            "cross_entropy": known(self._per_class(labels)),
            "micro_f1": known(micro_f1(labels, chosen)),
            "macro_f1": known(macro_f1(labels, chosen)),
            "micro_average_precision": known(micro_average_precision(labels, answers)),
            "macro_average_precision": known(macro_average_precision(labels, answers)),
            "kl": soft_mean,
            "agreement": known(ratio(self.agreed, self.known)) if soft else None,
        }

    def _per_class(self, labels: np.ndarray) -> float:
        """Binary cross-entropy a class that is known: the loss divides by all classes of a row."""
        classes = labels.shape[-1]
        return ratio(self.hard * classes, int((labels != IGNORE).sum()))
