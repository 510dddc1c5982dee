"""Figures of a report against their definitions and scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from textbook import naive_ece

from kdcache.loss.metrics import BINS, Calibration, Tally, accuracy, confusion_matrix, f1
from kdcache.teacher import aligned


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    calibration = Calibration()
    for half in np.array_split(np.arange(len(confidence)), 2):
        calibration.add(confidence[half], correct[half])
    return calibration.error


@pytest.mark.parametrize("classes", [2, 5])
def test_accuracy_and_f1_equal_scikit_learns(classes: int) -> None:
    rng = np.random.default_rng(classes)
    for size in (3, 40, 500):
        labels, predictions = rng.integers(0, classes, (2, size))
        matrix = confusion_matrix(labels, predictions, classes)
        average = "binary" if classes == 2 else "macro"
        want = metrics.f1_score(labels, predictions, average=average, zero_division=0.0)
        assert f1(matrix) == pytest.approx(want)
        assert accuracy(matrix) == pytest.approx(metrics.accuracy_score(labels, predictions))
        assert np.array_equal(
            matrix, metrics.confusion_matrix(labels, predictions, labels=range(classes))
        )


def test_figures_of_nothing_are_not_numbers() -> None:
    empty = confusion_matrix(np.zeros(0, int), np.zeros(0, int), 3)
    assert math.isnan(f1(empty))
    assert math.isnan(accuracy(empty))
    assert math.isnan(calibration_error(np.zeros(0), np.zeros(0, bool)))
    assert math.isnan(f1(confusion_matrix(np.zeros(4, int), np.zeros(4, int), 2)))


def test_calibration_error_equals_the_definition() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(1000) * 0.999 + 1e-6
    correct = rng.random(1000) < confidence**2
    every_other = np.ceil(confidence * BINS) % 2 == 0  # neighbouring bins are off in opposite ways
    for right in (correct, every_other):
        want = naive_ece(confidence, right, BINS)
        assert calibration_error(confidence, right) == pytest.approx(want)
    assert calibration_error(np.ones(5), np.ones(5, bool)) == 0
    assert calibration_error(np.ones(4), np.array([1, 0, 0, 0], bool)) == 0.75


@given(st.integers(0, 2**32), st.lists(st.integers(0, 30), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_a_tally_does_not_depend_on_the_batches(seed: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    labels, predictions, teacher = rng.integers(-1, 4, (3, n))
    predictions = np.abs(predictions)
    confidence = rng.random(n)
    whole, parts = Tally(4), Tally(4)
    whole.add_predictions(labels, predictions, confidence)
    whole.add_agreement(predictions, teacher)
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        parts.add_predictions(labels[part], predictions[part], confidence[part])
        parts.add_agreement(predictions[part], teacher[part])
        start += size
    assert np.array_equal(whole.confusion, parts.confusion)
    assert (whole.positions, whole.labelled, whole.correct, whole.agreed, whole.known) == (
        parts.positions,
        parts.labelled,
        parts.correct,
        parts.agreed,
        parts.known,
    )
    assert whole.labelled == (labels >= 0).sum()
    if whole.labelled:
        assert whole.calibration.error == pytest.approx(parts.calibration.error)


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=3).filter(
        lambda cuts: all(sum(c) for c in cuts)
    )
)
@settings(max_examples=50, deadline=None)
def test_aligned_streams_meet_position_by_position(cuts: list[list[int]]) -> None:
    n = min(sum(c) for c in cuts)

    def stream(sizes: list[int]) -> Iterator[torch.Tensor]:
        values = torch.arange(n)[:, None]
        start = 0
        for size in sizes:
            yield values[start : start + size]
            start += size

    seen = []
    for pieces in aligned([stream(sizes) for sizes in cuts]):
        assert all(torch.equal(pieces[0], piece) for piece in pieces)
        seen.append(pieces[0])
    assert torch.equal(torch.cat(seen), torch.arange(n)[:, None])
