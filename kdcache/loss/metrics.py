"""Metrics of classifiers and language models; NaN where one is not defined.

Of distributions they are made from sums over positions, so a `Tally` of a billion positions is as
small as one of ten. Cross-entropy and KL are not computed here: they are the loss's own
(`kdcache.loss`), so that evaluation reports the very quantity that training minimises. Those of
labels each by itself, and of scores, may need all answers of a set in order, and cost a sort.

Entities of tagged sequences: their F1 as conlleval and seqeval's default mode define it.

A tag is a prefix and a type: B begins an entity, I continues it, E ends one, S is one by itself,
O is none. BIO, IO, IOE and IOBES need no telling apart: an entity begins at B and S, where the type
changes, and at an I or E with no entity before it; it ends before the next such tag, at O, E and S.
The prefixes of BILOU and BMES are read as those of IOBES. Where all entities are of one type, tags
may be prefixes alone, as in B, I, O of key phrases and B, M, E, S of words. An entity is right if
its first word, its last one and its type are.

Cost: some numpy calls a batch. Guarantee: counts of parts add up to those of the whole, as long as
no sequence is divided.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

_TAG = re.compile(r"([BIESLUM])(?:-(.+))?")
_O, _B, _I, _E, _S = range(5)
_CODES = {"B": _B, "I": _I, "M": _I, "E": _E, "L": _E, "S": _S, "U": _S}


def are_entities(names: Sequence[str]) -> bool:
    """Whether classes are the tags of entities: O, and a prefix with a type, such as B-PER.

    Or prefixes alone, with B and an end of them: other letters may be sizes, or parts of speech.
    """
    tags = [_TAG.fullmatch(name) for name in names if name != "O"]
    if len(names) < 2 or not all(tags):
        return False
    bare = [name for name in names if "-" not in name]
    return set(bare) <= {"O"} or ("B" in bare and bool({"O", "E", "L"} & set(bare)))


@dataclass
class Entities:
    """Counts of entities.

    Attributes:
        names: the tags in the order of their numbers, see `are_entities`.
        true: entities of the labels.
        predicted: those of the predictions.
        right: those that are both.
    """

    names: Sequence[str]
    true: int = 0
    predicted: int = 0
    right: int = 0

    def __post_init__(self) -> None:
        tags = [_TAG.fullmatch(name) for name in self.names]
        types = sorted({tag[2] or "" for tag in tags if tag})
        self._codes = np.array([_CODES[tag[1]] if tag else _O for tag in tags])
        self._types = np.array([1 + types.index(tag[2] or "") if tag else 0 for tag in tags])

    def add(self, labels: Array, predictions: Array, lengths: Array) -> None:
        """Count the entities of some sequences.

        Args:
            labels: int [n], the tags of all sequences, one after another.
            predictions: int [n], the predicted ones.
            lengths: int [sequences], words of each.
        """
        ours, theirs = (self._found(tags, lengths) for tags in (labels, predictions))
        self.true += len(ours)
        self.predicted += len(theirs)
        self.right += len(ours & theirs)

    def merge(self, other: Entities) -> None:
        """Add the counts of other sequences."""
        self.true += other.true
        self.predicted += other.predicted
        self.right += other.right

    def _found(self, tags: Array, lengths: Array) -> set[tuple[int, int, int]]:
        """First word, word after the last, and type of each entity; words count over all sequences,
        with one of no entity behind each.
        """
        tags = np.asarray(tags, np.int64)
        lengths = np.asarray(lengths, np.int64)
        ends = np.cumsum(lengths)
        at = np.arange(len(tags)) + np.repeat(np.arange(len(lengths)), lengths) + 1
        codes = np.zeros(len(tags) + len(lengths) + 2, np.int64)
        types = np.zeros(len(codes), np.int64)
        assert not len(ends) or ends[-1] == len(tags), "lengths are those of the sequences"
        codes[at], types[at] = self._codes[tags], self._types[tags]
        before, now = codes[:-1], codes[1:]
        changed = types[:-1] != types[1:]
        begins = np.isin(now, (_B, _S)) | (
            np.isin(now, (_I, _E)) & (changed | np.isin(before, (_O, _E, _S)))
        )
        over = np.isin(before, (_E, _S)) | (
            np.isin(before, (_B, _I)) & (changed | np.isin(now, (_O, _B, _S)))
        )
        (first,) = np.nonzero(begins)
        (after,) = np.nonzero(over)
        kinds = types[1:][first]
        return set(zip(first.tolist(), after.tolist(), kinds.tolist(), strict=True))

    @property
    def precision(self) -> float:
        """Share of the predicted entities that are right; NaN where there are none."""
        return ratio(self.right, self.predicted)

    @property
    def recall(self) -> float:
        """Share of the true entities that were found; NaN where there are none."""
        return ratio(self.right, self.true)

    @property
    def f1(self) -> float:
        """Micro F1, `2 TP / (2 TP + FP + FN)`; NaN where there are no entities at all."""
        return ratio(2 * self.right, self.true + self.predicted)


def ratio(part: float, whole: float) -> float:
    """`part / whole`, NaN if the whole is 0."""
    return part / whole if whole else math.nan


Array: TypeAlias = npt.NDArray[Any]

BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017."""


def confusion_matrix(labels: Array, predictions: Array, classes: int) -> Array:
    """Counts of predictions: rows are true classes, columns predicted ones.

    Args:
        labels: int [n], the true classes, 0 to C - 1.
        predictions: int [n], the predicted ones.
        classes: C.

    Returns:
        int64 [C, C]. Matrices of parts add up to that of the whole.
    """
    cells = np.asarray(labels, np.int64) * classes + np.asarray(predictions, np.int64)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def accuracy(confusion: Array) -> float:
    """Share of right predictions of a `confusion_matrix`; NaN if there are none."""
    return ratio(int(np.trace(confusion)), int(confusion.sum()))


def f1(confusion: Array) -> float:
    """Harmonic mean of precision and recall, `2 TP / (2 TP + FP + FN)` (van Rijsbergen 1979).

    Of class 1 where there are two classes. With more of them the unweighted mean over classes
    (macro F1); a class that is neither a label nor a prediction has no F1 and takes no part.

    NaN where nothing was counted.
    """
    hits, both = np.diag(confusion), confusion.sum(0) + confusion.sum(1)
    return _mean_f1(hits[1:], both[1:]) if len(confusion) == 2 else _mean_f1(hits, both)


def _mean_f1(hits: Array, both: Array) -> float:
    """The mean F1 of the classes that have one, of TP and 2 TP + FP + FN of each."""
    present = both > 0
    return float(np.mean(2 * hits[present] / both[present])) if present.any() else math.nan


class Calibration:
    """Counts for the expected calibration error, in bins of equal width over the confidence.

    Bin i holds confidences in (i / BINS, (i + 1) / BINS].
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.confidence = np.zeros(BINS, np.float64)
        self.correct = np.zeros(BINS, np.int64)

    def add(self, confidence: Array, correct: Array) -> None:
        """Count predictions.

        Args:
            confidence: float [n], probability of the predicted class.
            correct: bool [n], whether it was the label.
        """
        confidence = np.asarray(confidence, np.float64)
        which = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
        self.counts += np.bincount(which, minlength=BINS)
        self.confidence += np.bincount(which, confidence, BINS)
        self.correct += np.bincount(which[np.asarray(correct, bool)], minlength=BINS)

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


_SUMS = (
    *("positions", "labelled", "correct", "hard", "soft"),
    *("soft_positions", "agreed", "known", "confusion"),
)


@dataclass
class Tally:
    """Sums over the positions that a model has answered.

    Attributes:
        classes: number of classes where F1 is wanted, else None (a vocabulary has no confusion
            matrix).
        entities: counts of entities, where the classes are their tags.
        positions: positions counted.
        labelled: those of them with a hard label.
        correct: those whose most probable id is the label.
        hard: summed cross-entropy with the labels, nats.
        soft: summed divergence from the teacher, nats.
        soft_positions: positions in `soft`.
        agreed: positions whose most probable id is the teacher's.
        known: positions where the teacher's most probable id is known.
    """

    classes: int | None = None
    entities: Entities | None = None
    positions: int = 0
    labelled: int = 0
    correct: int = 0
    hard: float = 0.0
    soft: float = 0.0
    soft_positions: int = 0
    agreed: int = 0
    known: int = 0
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        self.confusion = np.zeros((self.classes or 0,) * 2, np.int64)

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
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.calibration.merge(other.calibration)
        if self.entities is not None and other.entities is not None:
            self.entities.merge(other.entities)


def perplexity(nats: float | None) -> float | None:
    """The exponential of a cross-entropy; None where there is none, or it is beyond a float."""
    return math.exp(nats) if nats is not None and nats < 700 else None


def known(value: float) -> float | None:
    """The value, or None for NaN, as JSON needs it."""
    return None if math.isnan(value) else value


def micro_f1(truth: Array, chosen: Array) -> float:
    """`2 TP / (2 TP + FP + FN)` over all rows and classes.

    Args:
        truth: [rows, classes], 1 where the class is a label, 0 where not, negative where that is
            not known, which takes no part.
        chosen: bool [rows, classes], the predictions.
    """
    hits, both = f1_counts(truth, chosen)
    return ratio(2.0 * float(hits.sum()), float(both.sum()))


def macro_f1(truth: Array, chosen: Array) -> float:
    """The mean over classes of their F1; see `micro_f1`.

    A class that is neither a label nor a prediction has no F1 and takes no part.
    """
    return _mean_f1(*f1_counts(truth, chosen))


def f1_counts(truth: Any, chosen: Any) -> tuple[Any, Any]:
    """TP, and 2 TP + FP + FN, of each class, of numpy arrays or tensors; see `micro_f1`."""
    there, picked = truth == 1, chosen & (truth >= 0)
    return (there & picked).sum(0), there.sum(0) + picked.sum(0)


def average_precision(truth: Array, scores: Array) -> float:
    """`sum_n (R_n - R_(n-1)) P_n` over the falling thresholds (Manning et al. 2008, section 8.4).

    Equal scores are one threshold, so their order has no part. Of [rows, classes] it is that over
    all of them together.

    Args:
        truth: 1 of what is to be found, 0 of others, negative of what takes no part.
        scores: float, in the same shape, larger of what is found first.

    Returns:
        NaN where there is nothing to be found.
    """
    known = truth >= 0
    truth, scores = truth[known], scores[known]
    order = np.argsort(-scores, kind="stable")
    truth, scores = truth[order] == 1, scores[order]
    if not truth.any():
        return math.nan
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    hits = np.cumsum(truth)[last].astype(np.float64)
    recall = hits / hits[-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * hits / (last + 1)))


def macro_average_precision(truth: Array, scores: Array) -> float:
    """The mean over classes of their average precision; one that is not a row's takes no part."""
    found = [average_precision(*pair) for pair in zip(truth.T, scores.T, strict=True)]
    known = [value for value in found if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def pearson(one: Array, other: Array) -> float:
    """The linear correlation of two columns of numbers; NaN where one of them is constant."""
    x, y = (np.asarray(values, np.float64) for values in (one, other))
    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    # Of the largest, so that squares stay within what a float holds.
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    return float(np.clip((x @ y) / math.sqrt((x @ x) * (y @ y)), -1, 1))


def spearman(one: Array, other: Array) -> float:
    """The correlation of ranks (Spearman 1904); equal numbers have the mean of their ranks."""
    return pearson(_ranks(one), _ranks(other))


def _ranks(values: Array) -> Array:
    """Ranks from 1, float64; equal numbers share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[which])
