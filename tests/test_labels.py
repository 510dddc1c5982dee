"""Labels each by itself and scores: what a record says, the losses, and the figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from make_caches import word_tokenizer
from scipy import stats
from sklearn import metrics
from transformers import AutoTokenizer

from kdcache.commands.evaluate.tally import make_tally
from kdcache.corpus import Record
from kdcache.errors import UsageError
from kdcache.loss import check_loss, label_loss, score_loss
from kdcache.loss.metrics import (
    average_precision,
    macro_average_precision,
    macro_f1,
    micro_f1,
    pearson,
    spearman,
)
from kdcache.rows import RowSpec, make_encoder
from kdcache.rows.labels import Classes, make_reader
from kdcache.rows.spec import no_label
from kdcache.student.figures import figure, figure_of, figure_sums
from kdcache.targets import DenseTargets, SparseTargets
from kdcache.tasks import IGNORE, Task

MANY: Task = "multi-label-classification"
SCORE: Task = "regression"
NAMES = ("red", "green", "blue")


def read(value: Any, task: Task = MANY, names: tuple[str, ...] = NAMES, **options: Any) -> Any:
    """The labels of a record: those of one value, or of several columns."""
    values = value if isinstance(value, dict) else {"labels" if task == MANY else "label": value}
    spec = RowSpec(task=task, label_names=names if task == MANY else None, **options)
    record = Record({"text": "a", **values}, "rows.jsonl", "line 3")
    return make_reader(spec).read(record).tolist()


# What a record says


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (["red", "blue"], [1, 0, 1]),
        ([], [0, 0, 0]),
        (["green"], [0, 1, 0]),
        ([2, 0], [1, 0, 1]),
        ([1], [0, 1, 0]),
        ([1, 0, 1], [1, 0, 1]),
        ([True, False, None], [1, 0, IGNORE]),
        ([0.0, 1.0, 0.0], [0, 1, 0]),
        ("red", [1, 0, 0]),
        ("red, blue", [1, 0, 1]),
        ('["blue"]', [0, 0, 1]),
        ("[]", [0, 0, 0]),
        ("1,1,0", [1, 1, 0]),
        (2, [0, 0, 1]),
        ({"label": ["red"]}, [1, 0, 0]),
        (None, [IGNORE] * 3),
        ("", [IGNORE] * 3),
        ({}, [IGNORE] * 3),
    ],
)
def test_several_labels_are_read_as_the_field_writes_them(value: Any, want: list[int]) -> None:
    assert read(value) == [want]


def test_a_name_with_a_comma_is_one_name_and_numbers_may_be_names() -> None:
    assert read("a, b", names=("a, b", "c")) == [[1, 0]]
    assert read(["1", "3"], names=("1", "2", "3")) == [[1, 0, 1]]
    assert read([3], names=("1", "2", "3")) == [[0, 0, 1]]


@pytest.mark.parametrize(
    ("value", "names", "reason"),
    [
        (["mauve"], NAMES, "label is 'mauve', which is not one of the teacher's classes: 0 .red"),
        ([5], NAMES, "label is 5, which is not one of"),
        ([0, 1], ("a", "b"), "labels are \\[0, 1\\], expected either different classes"),
        ([0], ("a",), "expected either different classes"),
        (["red", "red"], NAMES, "expected either different classes"),
        ([0, 1, 0, 1], NAMES, "or 3 values of true and false"),
        ([1.0, 0.0], NAMES, "or 3 values of true and false"),
        ([0.5, 1, 0], NAMES, "or 3 values of true and false"),
        ([["red"]], NAMES, "expected either different classes"),
        ('["red"', NAMES, "which is not JSON"),
        ({"labels": ["red"], "label": "blue"}, NAMES, "labels in the columns labels and label"),
    ],
)
def test_labels_that_mean_nothing_or_two_things_are_refused_in_a_line(
    value: Any, names: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        read(value, names=names)
    assert "rows.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


STARS, FACTS = ("1.0", "2.0", "3.0"), ("True", "False")


@pytest.mark.parametrize(
    ("value", "names", "want"),
    [
        (1.0, STARS, 0),
        (3, STARS, 2),
        ("2", STARS, 1),
        (0.5, ("0.0", "0.5", "1.0"), 1),
        (1, ("-1", "+1"), 1),
        (1, ("01", "02"), 0),
        ("1.0", ("1", "2"), 0),
        (True, FACTS, 0),
        (np.False_, FACTS, 1),
        ("True", FACTS, 0),
        (False, ("true", "maybe", "false"), 2),
        (True, ("no", "yes"), 1),
        (True, ("0", "1"), 1),
    ],
)
def test_a_class_is_found_however_a_table_writes_its_name(
    value: Any, names: tuple[str, ...], want: int
) -> None:
    record = Record({"label": value}, "rows.jsonl", "line 3")
    assert Classes(names).index(value, record) == want


@pytest.mark.parametrize(
    ("value", "names"),
    [(0, STARS), (4.0, STARS), (True, ("false", "maybe")), (1, ("1.0", "1.00")), ("1_0", STARS)],
)
def test_a_class_that_no_name_says_is_refused(value: Any, names: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="which is not one of the teacher's classes"):
        Classes(names).index(value, Record({"label": value}, "rows.jsonl", "line 3"))


@pytest.mark.parametrize(
    ("task", "column"),
    [("sequence-classification", " label"), (MANY, "Labels"), (SCORE, "Score "), (SCORE, "LABEL")],
)
def test_a_column_that_is_almost_that_of_labels_is_no_transfer_set(task: Task, column: str) -> None:
    record = Record({"text": "a", column: "1"}, "rows.csv", "line 3")
    names = None if task == SCORE else ("0", "1")
    with pytest.raises(UsageError, match="has no column 'label.*Name the right one"):
        make_reader(RowSpec(task=task, label_names=names)).read(record)
    spec = RowSpec(task=task, label_names=names, text_column=column)
    np.testing.assert_array_equal(make_reader(spec).read(record), no_label(task, 2))


def test_a_column_of_each_class_is_read_in_the_order_of_the_classes() -> None:
    columns = "blue,red,green"
    values = {"red": 1, "green": None, "blue": "0"}
    assert read(values, label_column=columns) == [[1, IGNORE, 0]]
    with pytest.raises(UsageError, match="label red is 2, expected 0 or 1"):
        read({**values, "red": 2}, label_column=columns)
    with pytest.raises(UsageError, match="green"):
        read({"red": 1, "blue": 1}, label_column=columns)
    with pytest.raises(UsageError, match="columns red, mauve, expected one for each class"):
        read(values, label_column="red,mauve")
    with pytest.raises(UsageError, match="several columns are for tasks with several labels"):
        read({"a": 1.0}, SCORE, label_column="a,b")
    with pytest.raises(UsageError, match="'missing'"):
        read({"labels": []}, label_column="missing")


@pytest.mark.parametrize(
    ("value", "want"), [(3.5, 3.5), (2, 2.0), ("-0.5", -0.5), (-100, -100.0), ("1e3", 1000.0)]
)
def test_scores_are_numbers(value: Any, want: float) -> None:
    assert read(value, SCORE) == [want]
    assert read({"score": value}, SCORE) == [want]


@pytest.mark.parametrize("value", [None, "", {}])
def test_a_record_without_a_score_belongs_to_a_transfer_set(value: Any) -> None:
    assert np.isnan(read(value, SCORE)).all()
    assert np.isnan(no_label(SCORE)).all()


@pytest.mark.parametrize(
    "value", ["good", float("nan"), float("inf"), "nan", "-inf", 1e39, True, [1.0], {"a": 1}]
)
def test_scores_that_are_none_are_refused_in_a_line(value: Any) -> None:
    with pytest.raises(UsageError, match=r"rows.jsonl.*: the score is .*expected a finite number"):
        read({"score": value}, SCORE)


def test_an_encoder_makes_rows_of_both(tmp_path: Any) -> None:
    for name, content in word_tokenizer().items():
        (tmp_path / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for task, label, want in ((MANY, ["blue"], [[0, 0, 1]]), (SCORE, 2.5, [2.5])):
        spec = RowSpec(
            task=task,
            pair_column="other",
            label_names=NAMES if task == MANY else None,
            packing="none",
            max_length=16,
        )
        values = {"text": "w1 w2", "other": "w3", "labels" if task == MANY else "score": label}
        (row,) = make_encoder(spec, tokenizer).encode([Record(values, "a.jsonl", "line 1")])
        assert row.labels.tolist() == want
        assert (row.text, row.text_pair) == ("w1 w2", "w3")
        assert row.positions(task).tolist() == [0]


# Losses, against a reference of their formulas in float64


def bernoulli_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    pairs = ((p, q), (1 - p, 1 - q))
    return np.asarray(sum(a * np.log(a / b) for a, b in pairs))


def sigmoid(z: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-z)))


DIVERGENCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "forward-kl": bernoulli_kl,
    "reverse-kl": lambda p, q: bernoulli_kl(q, p),
    "jsd": lambda p, q: (bernoulli_kl(p, (p + q) / 2) + bernoulli_kl(q, (p + q) / 2)) / 2,
}


def label_reference(
    z: np.ndarray, t: np.ndarray, y: np.ndarray, alpha: float, temperature: float, divergence: str
) -> float:
    p = sigmoid(z)
    bce = np.where(y == IGNORE, 0, -np.where(y == 1, np.log(p), np.log(1 - p)))
    if divergence == "mse":
        soft = (z - t) ** 2
    else:
        at = [sigmoid(x / temperature) for x in (t, z)]
        soft = temperature**2 * DIVERGENCES[divergence](*at)
    return float((alpha * bce + (1 - alpha) * soft).mean(-1).sum() / 7)


def numeric_gradient(f: Callable[[np.ndarray], float], z: np.ndarray) -> np.ndarray:
    found = np.zeros_like(z)
    for at in np.ndindex(*z.shape):
        step = np.zeros_like(z)
        step[at] = 1e-6
        found[at] = (f(z + step) - f(z - step)) / 2e-6
    return found


@pytest.mark.parametrize(
    ("divergence", "temperature"),
    [(name, t) for name in DIVERGENCES for t in (1.0, 2.5)] + [("mse", 1.0)],
)
def test_the_loss_of_labels_is_its_formula(divergence: str, temperature: float) -> None:
    rng = np.random.default_rng(3)
    z, t = rng.normal(0, 2, (2, 5, 4))
    y = rng.integers(0, 2, (5, 4))
    y[1, 2], y[3] = IGNORE, IGNORE
    logits = torch.tensor(z, requires_grad=True)
    targets = DenseTargets(torch.tensor(t), temperature)
    parts = label_loss(logits, torch.tensor(y), targets, alpha=0.3, divergence=divergence, count=7)
    parts.total.backward()

    def reference(values: np.ndarray) -> float:
        return label_reference(values, t, y, 0.3, temperature, divergence)

    assert parts.total.item() == pytest.approx(reference(z), rel=1e-9)
    assert parts.total.item() == pytest.approx((0.3 * parts.hard + 0.7 * parts.soft).item())
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), numeric_gradient(reference, z), atol=1e-8)


@pytest.mark.parametrize("divergence", [*DIVERGENCES, "mse"])
def test_a_student_like_its_teacher_has_no_soft_loss_and_extremes_are_finite(
    divergence: str,
) -> None:
    t = torch.tensor([[80.0, -80.0, 0.3]])
    z = t.clone().requires_grad_()
    unknown = torch.full((1, 3), IGNORE)
    parts = label_loss(z, unknown, DenseTargets(t, 1.0), alpha=0.0, divergence=divergence)
    parts.total.backward()
    assert parts.soft.item() == pytest.approx(0, abs=1e-6)
    assert z.grad is not None
    assert z.grad.abs().max() < 1e-6
    far = (-t).requires_grad_()
    label_loss(
        far, torch.ones(1, 3), DenseTargets(t, 1.0), alpha=0.5, divergence=divergence
    ).total.backward()
    assert far.grad is not None
    assert far.grad.isfinite().all()


@pytest.mark.parametrize(("divergence", "delta"), [("mse", 1.0), ("huber", 0.5), ("huber", 2.0)])
def test_the_loss_of_scores_is_its_formula(divergence: str, delta: float) -> None:
    rng = np.random.default_rng(4)
    z, t = rng.normal(0, 2, (2, 6, 1))
    y = rng.normal(0, 2, 6).astype(np.float32)
    y[2] = np.nan

    def error(e: np.ndarray) -> np.ndarray:
        if divergence == "mse":
            return e**2
        a = np.abs(e)
        return np.where(a <= delta, e**2 / 2, delta * (a - delta / 2))

    def reference(values: np.ndarray) -> float:
        hard = np.where(np.isnan(y), 0, error(values[:, 0] - np.nan_to_num(y)))
        return float((0.3 * hard + 0.7 * error(values - t)[:, 0]).sum() / 6)

    logits = torch.tensor(z, requires_grad=True)
    parts = score_loss(
        logits,
        torch.from_numpy(y),
        DenseTargets(torch.tensor(t), 1.0),
        alpha=0.3,
        divergence=divergence,
        huber_delta=delta,
    )
    parts.total.backward()
    assert parts.total.item() == pytest.approx(reference(z), rel=1e-7)
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), numeric_gradient(reference, z), atol=1e-7)


def test_undefined_losses_are_refused() -> None:
    dense = DenseTargets(torch.zeros(2, 1), 1.0)
    for divergence, answers, reason in (
        ("huber", "labels", "huber compares scores"),
        ("huber", "classes", "huber compares scores"),
        ("forward-kl", "score", "compares distributions, and this cache holds scores"),
    ):
        with pytest.raises(UsageError, match=reason):
            check_loss(dense, divergence=divergence, tail="bucket", answers=answers)  # type: ignore[arg-type]
    warm = DenseTargets(torch.zeros(2, 1), 2.0)
    with pytest.raises(UsageError, match="a score has no temperature, but 2 was given"):
        check_loss(warm, divergence="huber", tail="bucket", answers="score")
    none = torch.zeros(2, 0)
    sparse = SparseTargets(none.long(), none, none.sum(-1), False, 1.0)
    with pytest.raises(UsageError, match="Build with --codec dense"):
        check_loss(sparse, divergence="forward-kl", tail="bucket", answers="labels")
    with pytest.raises(UsageError, match="the student has 3 outputs, the targets have 1"):
        label_loss(torch.zeros(2, 3), torch.zeros(2, 3), dense, alpha=0.5)


# Figures, against scikit-learn and SciPy


def with_ties(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.round(rng.normal(size=shape), 1)


@pytest.mark.parametrize("seed", range(5))
def test_figures_of_labels_are_those_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, scores = (rng.random((40, 5)) < 0.4).astype(int), with_ties(rng, 40, 5)
    assert len(np.unique(scores)) < scores.size / 3
    chosen = scores >= 0.2
    for mine, name in ((micro_f1, "micro"), (macro_f1, "macro")):
        assert mine(truth, chosen) == pytest.approx(metrics.f1_score(truth, chosen, average=name))
    for mine, name in ((average_precision, "micro"), (macro_average_precision, "macro")):
        want = metrics.average_precision_score(truth, scores, average=name)
        assert mine(truth, scores) == pytest.approx(want)
    # What is not known of a row takes no part.
    hidden = np.where(rng.random(truth.shape) < 0.3, IGNORE, truth)
    known = hidden != IGNORE
    want = metrics.average_precision_score(hidden[known], scores[known])
    assert average_precision(hidden, scores) == pytest.approx(want)
    assert micro_f1(hidden, chosen) == pytest.approx(metrics.f1_score(hidden[known], chosen[known]))


def test_figures_that_are_not_defined_are_not_numbers() -> None:
    nothing = np.zeros((3, 2), int)
    assert np.isnan(average_precision(nothing[:, 0], np.arange(3.0)))
    assert np.isnan(macro_average_precision(nothing, np.zeros((3, 2))))
    assert np.isnan(micro_f1(nothing, nothing == 1))
    assert np.isnan(pearson(np.ones(4), np.arange(4.0)))
    assert np.isnan(spearman(np.arange(1.0), np.arange(1.0)))
    one_class = np.array([[1, 0], [0, 0]])
    assert macro_f1(one_class, one_class == 1) == 1.0  # the class that is no row's has none


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_those_of_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = with_ties(rng, 50)
    y = x + with_ties(rng, 50)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0])
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])
    assert spearman(1e300 * x, y) == pytest.approx(stats.spearmanr(x, y)[0])


def test_figures_of_a_training_are_those_of_the_whole_set() -> None:
    rng = np.random.default_rng(1)
    z, truth = rng.normal(size=(30, 4)), rng.integers(0, 2, (30, 4))
    truth[3] = IGNORE
    sums = sum(
        figure_sums(MANY, torch.tensor(z[a : a + 10]), torch.tensor(truth[a : a + 10]))
        for a in (0, 10, 20)
    )
    assert isinstance(sums, torch.Tensor)
    assert figure(MANY, sums) == {"micro_f1": pytest.approx(micro_f1(truth, z >= 0))}
    y = rng.normal(3, 1, 30)
    y[4] = np.nan
    parts = [
        figure_sums(SCORE, torch.tensor(z[a : a + 10, :1]), torch.tensor(y[a : a + 10]))
        for a in (0, 10, 20)
    ]
    known = ~np.isnan(y)
    want = pearson(z[known, 0], y[known])
    assert figure(SCORE, torch.stack(parts).sum(0)) == {"pearson": pytest.approx(want)}
    assert figure(SCORE, figure_sums(SCORE, torch.ones(3, 1), torch.arange(3.0))) == {}
    assert figure(SCORE, torch.zeros(6)) == figure(MANY, torch.zeros(6)) == {}
    assert json.dumps(figure(MANY, sums))


@pytest.mark.parametrize("task", ["sequence-classification", MANY, SCORE])
def test_evaluations_by_command_and_in_training_have_one_figure(task: Task) -> None:
    rng = np.random.default_rng(2)
    z = rng.normal(size=(40, 1 if task == SCORE else 4)).astype(np.float32)
    scores = (z[:, 0] + rng.normal(size=40)).astype(np.float32)
    many = rng.integers(0, 2, (40, 4), np.int32)
    labels = {MANY: many, SCORE: scores}.get(task, rng.integers(0, 4, 40, np.int32))
    labels[3] = np.nan if task == SCORE else IGNORE
    whole, merged = (make_tally(task, z.shape[1], None) for _ in range(2))
    whole.add(torch.from_numpy(z), labels, None)
    for part in (slice(0, 15), slice(15, 40)):
        tally = make_tally(task, z.shape[1], None)
        tally.add(torch.from_numpy(z[part]), labels[part], None)
        merged.merge(tally)
    assert merged.figures() == pytest.approx(whole.figures())
    assert whole.labelled == 39
    sums = figure_sums(task, torch.from_numpy(z), torch.from_numpy(labels))
    name = figure_of(task)
    assert name is not None
    assert figure(task, sums) == {name: pytest.approx(whole.figures()[name])}
