"""Entity F1: beside a slow one that reads tags from left to right, and seqeval if installed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.loss.metrics import Entities, are_entities
from kdcache.stream.batch import Reading
from kdcache.student.figures import Totals
from kdcache.tasks import TOKEN_CLASSIFICATION

SCHEMES = {
    "BIO": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"],
    "IO": ["I-LOC", "O", "I-PER"],
    "IOBES": ["S-A", "B-A", "I-A", "E-A", "O", "B-B-C", "E-B-C", "I-B-C", "S-B-C"],
    "IOE": ["O", "I-PER", "E-PER", "E-LOC"],
    "bare BIO": ["I", "O", "B"],
    "bare BMES": ["B", "M", "E", "S"],
    "BILOU": ["O", "B-A", "I-A", "L-A", "U-A", "U-B"],
}


def slow(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Entities (first word, last word, type), by reading the tags from left to right."""
    found = set()
    open_at, kind = None, ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, type_ = tag.partition("-")
        prefix = {"L": "E", "U": "S", "M": "I"}.get(prefix, prefix)
        fresh = prefix in ("B", "S", "O") or type_ != kind
        if open_at is not None and fresh:
            found.add((open_at, i - 1, kind))
            open_at = None
        if prefix != "O" and open_at is None:
            open_at, kind = i, type_
        if prefix in ("E", "S"):
            found.add((open_at, i, kind))
            open_at, kind = None, ""
    return found


@st.composite
def tagged(draw: st.DrawFn) -> tuple[list[str], list[list[int]], list[list[int]]]:
    names = SCHEMES[draw(st.sampled_from(sorted(SCHEMES)))]
    lengths = draw(st.lists(st.integers(0, 9), max_size=6))
    tag = st.integers(0, len(names) - 1)
    ours, theirs = (
        [draw(st.lists(tag, min_size=n, max_size=n)) for n in lengths] for _ in range(2)
    )
    return names, ours, theirs


def counted(
    names: Sequence[str], labels: Sequence[Sequence[int]], found: Sequence[Sequence[int]]
) -> Entities:
    entities = Entities(names)
    flat = [np.array([tag for row in rows for tag in row], np.int32) for rows in (labels, found)]
    entities.add(*flat, np.array([len(row) for row in labels], np.int64))
    return entities


@settings(max_examples=300, deadline=None)
@given(tagged())
def test_counts_are_those_of_the_definition(
    case: tuple[list[str], list[list[int]], list[list[int]]],
) -> None:
    names, labels, predictions = case
    true, found, right = 0, 0, 0
    for ours, theirs in zip(labels, predictions, strict=True):
        mine, other = (slow([names[tag] for tag in row]) for row in (ours, theirs))
        true, found, right = true + len(mine), found + len(other), right + len(mine & other)
    whole = counted(names, labels, predictions)
    assert (whole.true, whole.predicted, whole.right) == (true, found, right)
    assert math.isnan(whole.f1) == (true + found == 0)
    if true and found and right:
        precision, recall = right / found, right / true
        assert whole.f1 == pytest.approx(2 * precision * recall / (precision + recall))
        assert (whole.precision, whole.recall) == (precision, recall)


@settings(max_examples=200, deadline=None)
@given(tagged())
def test_figures_are_seqevals(case: tuple[list[str], list[list[int]], list[list[int]]]) -> None:
    reason = "seqeval is no dependency: its last version is of 2020"
    seqeval = pytest.importorskip("seqeval.metrics.sequence_labeling", reason=reason)
    names, labels, predictions = case
    if any(name[0] in "LUM" for name in names):  # prefixes that its default mode does not know
        return
    for rows in (labels, predictions):
        for row in rows:
            tags = [names[tag] for tag in row]
            found = seqeval.get_entities(tags)  # of no type: "_"
            want = {(start, end, kind.strip("_")) for kind, start, end in found}
            assert slow(tags) == want


def test_a_known_case() -> None:
    """The example of seqeval's README: one of two entities is right."""
    names = ["O", "B-MISC", "I-MISC", "B-PER", "I-PER"]
    labels = [[0, 0, 0, 1, 2, 2, 0], [3, 4, 0]]
    predictions = [[0, 0, 1, 2, 2, 2, 0], [3, 4, 0]]
    assert counted(names, labels, predictions).f1 == 0.5


@pytest.mark.parametrize(
    ("counts", "want"), [((0, 0, 0), None), ((0, 2, 0), 0.0), ((2, 1, 1), 2 / 3)]
)
def test_a_training_has_no_f1_where_there_is_no_entity(
    counts: tuple[int, int, int], want: float | None
) -> None:
    """As `evaluate`; where some were found, all of them wrong, it is 0."""
    spec = SimpleNamespace(label_names=("O", "B-A", "I-A"))
    caches = [SimpleNamespace(spec=spec)]
    stream: Any = SimpleNamespace(task=TOKEN_CLASSIFICATION, caches=caches, reading=Reading())
    (values,) = Totals.zeros(1, torch.device("cpu"))
    values[2:5] = 4.0  # words
    values[5:8] = torch.tensor(counts)
    assert Totals(values).figures(stream, 1.0, "").get("f1") == want


@pytest.mark.parametrize("names", SCHEMES.values())
def test_tags_of_entities_are_known(names: list[str]) -> None:
    assert are_entities(names)


def test_parts_of_speech_are_no_entities() -> None:
    assert not are_entities(["NOUN", "VERB", "X"])
    assert not are_entities(["O", "NN", "B-PER"])
    assert not are_entities(["S", "M", "L"])  # sizes
    assert not are_entities(["B", "I"])
