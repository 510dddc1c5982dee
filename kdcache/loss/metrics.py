"""Metrics of classifiers and language models, as sums over positions.

Every figure is made from sums, so a `Tally` of a billion positions is as small as one of ten:
batches are added, nothing is kept. Cross-entropy and KL are not computed here: they are the loss's
own (`kdcache.loss`), so that evaluation reports the very quantity that training minimises.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kdcache.loss.entities import Entities, ratio

Array: TypeAlias = npt.NDArray[Any]

BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017."""


def confusion_matrix(labels: Array, predictions: Array, classes: int) -> Array:
    """Counts of predictions: rows are true classes, columns predicted ones.

    Args:
        labels: int [n], the true classes, 0 to classes - 1.
        predictions: int [n], the predicted ones.
        classes: their number C.

    Returns:
        int64 [C, C]: true class down, predicted class across. Matrices of parts add up to that of
        the whole.
    """
    cells = np.asarray(labels, np.int64) * classes + np.asarray(predictions, np.int64)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def accuracy(confusion: Array) -> float:
    """Share of right predictions; NaN if there are none.

    Args:
        confusion: from `confusion_matrix`.
    """
    return ratio(int(np.trace(confusion)), int(confusion.sum()))


def f1(confusion: Array) -> float:
    """Harmonic mean of precision and recall, `2 TP / (2 TP + FP + FN)` (van Rijsbergen 1979).

    Of class 1 where there are two classes. With more of them the unweighted mean over classes
    (macro F1); a class that is neither a label nor a prediction has no F1 and takes no part.

    Args:
        confusion: from `confusion_matrix`.

    Returns:
        0 to 1; NaN where nothing was counted.
    """
    hits = np.diag(confusion).astype(np.float64)
    both = confusion.sum(0) + confusion.sum(1)  # 2 TP + FP + FN of each class
    if len(confusion) == 2:
        # A set without a positive, in which none was predicted, has no F1 either.
        return float(2 * hits[1] / both[1]) if both[1] else math.nan
    present = both > 0
    return float(np.mean(2 * hits[present] / both[present])) if present.any() else math.nan


@dataclass
class Calibration:
    """Counts for the expected calibration error, in bins of equal width over the confidence.

    Attributes:
        bins: their number; bin i holds confidences in (i / bins, (i + 1) / bins].
    """

    bins: int = BINS
    counts: Array = field(init=False)
    confidence: Array = field(init=False)
    correct: Array = field(init=False)

    def __post_init__(self) -> None:
        self.counts = np.zeros(self.bins, np.int64)
        self.confidence = np.zeros(self.bins, np.float64)
        self.correct = np.zeros(self.bins, np.int64)

    def add(self, confidence: Array, correct: Array) -> None:
        """Count predictions.

        Args:
            confidence: float [n], probability of the predicted class.
            correct: bool [n], whether it was the label.
        """
        confidence = np.asarray(confidence, np.float64)
        which = np.clip(np.ceil(confidence * self.bins).astype(np.int64) - 1, 0, self.bins - 1)
        self.counts += np.bincount(which, minlength=self.bins)
        self.confidence += np.bincount(which, confidence, self.bins)
        self.correct += np.bincount(which[np.asarray(correct, bool)], minlength=self.bins)

    def merge(self, other: Calibration) -> None:
        """Add the counts of other predictions."""
        self.counts += other.counts
        self.confidence += other.confidence
        self.correct += other.correct

    @property
    def error(self) -> float:
        """Mean over predictions of |accuracy - confidence| of their bin (Guo et al. 2017, equation
        3)."""
        return ratio(float(np.abs(self.correct - self.confidence).sum()), int(self.counts.sum()))

    def filled(self) -> Iterator[tuple[float, float, int]]:
        """Mean confidence, accuracy and number of predictions of each bin that has some."""
        for count, confidence, correct in zip(
            self.counts, self.confidence, self.correct, strict=True
        ):
            if count:
                yield float(confidence / count), float(correct / count), int(count)


@dataclass
class Tally:
    """Sums over the positions that a model has answered.

    Attributes:
        classes: number of classes where F1 is wanted, else None (a vocabulary has no confusion
            matrix).
        bins: of the calibration error.
        entities: counts of entities, where the classes are their tags.
        positions: positions counted.
        labelled: those of them with a hard label.
        correct: those whose most probable id is the label.
        hard: summed cross-entropy with the labels, nats.
        soft: summed divergence from the teacher, nats.
        soft_positions: positions in `soft`.
        agreed: positions whose most probable id is the teacher's.
        known: positions where the teacher's most probable id is known.
        calibrated: positions with a label and a known confidence.
    """

    classes: int | None = None
    bins: int = BINS
    entities: Entities | None = None
    positions: int = 0
    labelled: int = 0
    correct: int = 0
    hard: float = 0.0
    soft: float = 0.0
    soft_positions: int = 0
    agreed: int = 0
    known: int = 0
    confusion: Array = field(init=False)
    calibration: Calibration = field(init=False)

    def __post_init__(self) -> None:
        self.confusion = np.zeros((self.classes or 0,) * 2, np.int64)
        self.calibration = Calibration(self.bins)

    def add_predictions(self, labels: Array, predictions: Array, confidence: Array | None) -> None:
        """Count predictions against hard labels.

        Args:
            labels: int [n], negative where there is none.
            predictions: int [n].
            confidence: float [n], probability of each prediction at T = 1, or None where it is not
                known.
        """
        has_label = labels >= 0
        labels, predictions = labels[has_label], predictions[has_label]
        right = labels == predictions
        self.positions += len(has_label)
        self.labelled += len(labels)
        self.correct += int(right.sum())
        if self.classes is not None:
            self.confusion += confusion_matrix(labels, predictions, self.classes)
        if confidence is not None:
            self.calibration.add(confidence[has_label], right)

    def add_entities(
        self, labels: Array, predictions: Array, counts: Array, words: Array | None = None
    ) -> None:
        """Count entities of whole rows, if they are to be counted.

        Args:
            labels: int [n], of the positions of all rows, negative where there is none.
            predictions: int [n].
            counts: int [rows], positions of each.
            words: bool [n], which positions begin a word; the others are left out. Default: all.
        """
        if self.entities is None:
            return
        keep = labels >= 0 if words is None else (labels >= 0) & words
        before = np.concatenate([[0], np.cumsum(keep)])
        ends = np.concatenate([[0], np.cumsum(counts)])
        self.entities.add(labels[keep], predictions[keep], np.diff(before[ends]))

    def add_agreement(self, predictions: Array, teacher: Array) -> None:
        """Count agreement with the teacher.

        Args:
            predictions: int [n].
            teacher: int [n], the teacher's most probable id, -1 where it is not known.
        """
        known = teacher >= 0
        self.known += int(known.sum())
        self.agreed += int((predictions == teacher)[known].sum())

    def merge(self, other: Tally) -> None:
        """Add the sums over other positions."""
        self.positions += other.positions
        self.labelled += other.labelled
        self.correct += other.correct
        self.hard += other.hard
        self.soft += other.soft
        self.soft_positions += other.soft_positions
        self.agreed += other.agreed
        self.known += other.known
        self.confusion += other.confusion
        self.calibration.merge(other.calibration)
        if self.entities is not None and other.entities is not None:
            self.entities.merge(other.entities)


def perplexity(nats: float | None) -> float | None:
    """The exponential of a cross-entropy; None where there is none, or it is beyond a float."""
    return math.exp(nats) if nats is not None and nats < 700 else None


def known(value: float) -> float | None:
    """The value, or None for NaN, as JSON needs it."""
    return None if math.isnan(value) else value
