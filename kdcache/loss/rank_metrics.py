"""Figures of labels each by itself, and of scores.

Some need all answers in order, so unlike those of `kdcache.loss.metrics` they are not sums: a
caller keeps the answers of a set. Cost: a sort. Where a figure is not defined it is NaN.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kdcache.loss.entities import ratio

Array: TypeAlias = npt.NDArray[Any]


def micro_f1(truth: Array, chosen: Array) -> float:
    """`2 TP / (2 TP + FP + FN)` over all rows and classes.

    Args:
        truth: [rows, classes], 1 where the class is a label, 0 where not, negative where that is
            not known, which takes no part.
        chosen: bool [rows, classes], the predictions.
    """
    hits, both = _counts(truth, chosen)
    return ratio(2.0 * float(hits.sum()), float(both.sum()))


def macro_f1(truth: Array, chosen: Array) -> float:
    """The mean over classes of their F1; see `micro_f1`.

    A class that is neither a label nor a prediction has no F1 and takes no part.
    """
    hits, both = _counts(truth, chosen)
    present = both > 0
    return float(np.mean(2 * hits[present] / both[present])) if present.any() else math.nan


def _counts(truth: Array, chosen: Array) -> tuple[Array, Array]:
    """TP, and 2 TP + FP + FN, of each class."""
    there, picked = truth == 1, chosen & (truth >= 0)
    return (there & picked).sum(0), there.sum(0) + picked.sum(0)


def average_precision(truth: Array, scores: Array) -> float:
    """`sum_n (R_n - R_(n-1)) P_n` over the falling thresholds (Manning et al. 2008, section 8.4).

    Equal scores are one threshold, so their order has no part.

    Args:
        truth: [n], 1 of what is to be found, 0 of others, negative of what takes no part.
        scores: float [n], larger of what is found first.

    Returns:
        0 to 1; NaN where there is nothing to be found.
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


def micro_average_precision(truth: Array, scores: Array) -> float:
    """Average precision over all rows and classes together, [rows, classes]."""
    return average_precision(truth.reshape(-1), scores.reshape(-1))


def macro_average_precision(truth: Array, scores: Array) -> float:
    """The mean over classes of their average precision; one that is no row's takes no part."""
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
