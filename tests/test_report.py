"""evaluate, predict and inspect against formulas and forwards that share no code with them."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny_lm
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from kdcache.builder import BuildOptions, build
from kdcache.cache import Cache
from kdcache.errors import IncompleteError, UsageError
from kdcache.report import (
    EvaluateOptions,
    EvaluateResult,
    InspectOptions,
    ModelScores,
    PredictOptions,
    Tally,
    accuracy,
    confusion_matrix,
    evaluate,
    expected_calibration_error,
    f1,
    inspect,
    predict,
    render_evaluation,
    render_inspection,
)
from kdcache.report.models import aligned
from kdcache.rows import IGNORE
from kdcache.student import (
    BiLstmClassifier,
    BiLstmConfig,
    DistilledStudent,
    StudentInfo,
    Vocabulary,
    load_student,
)

CLASSES = ("bad", "neutral", "good")


# Models and caches


@pytest.fixture(scope="module")
def student_classifier(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of one layer with the teacher's classes."""
    return save_classifier(tiny_tokenizer, tmp_path_factory.mktemp("student"), CLASSES, seed=7)


def save_classifier(tokenizer: Path, folder: Path, names: tuple[str, ...], *, seed: int) -> Path:
    config = BertConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        initializer_range=0.3,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    torch.manual_seed(seed)
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student_lm(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose output layer is 20 ids wider than the teacher's vocabulary."""
    folder = tmp_path_factory.mktemp("student-lm")
    return make_tiny_lm(tiny_tokenizer, folder, vocab_size=320, seed=5)


def build_classes(teacher: Path, corpus: Path, out: Path) -> str:
    build(
        BuildOptions(
            teacher=(str(teacher),),
            corpus=(str(corpus),),
            out=str(out),
            task="sequence-classification",
            max_length=64,
            workers=0,
        )
    )
    return str(out)


def build_lm(teacher: Path, corpus: Path, out: Path, codec: str) -> str:
    build(
        BuildOptions(
            teacher=(str(teacher),),
            corpus=(str(corpus),),
            out=str(out),
            codec=codec,
            temperatures=(1.0, 2.0),
            max_length=48,
            limit=60,
            workers=0,
        )
    )
    return str(out)


@pytest.fixture(scope="module")
def class_cache(
    tiny_classifier: Path, labelled_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    return build_classes(tiny_classifier, labelled_corpus, tmp_path_factory.mktemp("c") / "cache")


@pytest.fixture(scope="module")
def lm_caches(
    tiny_lm: Path, text_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The same corpus with each codec."""
    folder = tmp_path_factory.mktemp("lm")
    return {
        codec: build_lm(tiny_lm, text_corpus, folder / codec.partition(":")[0], codec)
        for codec in ("dense", "topk:8", "sample:20")
    }


def logprobs_of(logits: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
    z = logits.double().numpy() / temperature
    z = z - z.max(-1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(-1, keepdims=True)))


@torch.no_grad()
def class_logits(folder: Path, cache: str) -> torch.Tensor:
    """A classifier's logits, one text at a time: no padding, no batches."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    data = Cache.open(cache).read(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert data.texts is not None
    parts = [
        model(**tokenizer(t, truncation=True, max_length=64, return_tensors="pt")).logits
        for t in data.texts
    ]
    return torch.cat(parts)


@lru_cache
@torch.no_grad()
def lm_logits(folder: Path, cache: str, width: int = 300) -> tuple[torch.Tensor, np.ndarray]:
    """A causal LM's logits and labels of every position of a cache, a row at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    opened = Cache.open(cache)
    logits, labels = [], []
    for span in range(opened.spec.spans):
        data = opened.read(span)
        for i in range(len(data)):
            row = data.row(i)
            wanted = row.labels != IGNORE
            out = model(torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0]
            logits.append(out[torch.from_numpy(wanted)][:, :width])
            labels.append(row.labels[wanted])
    return torch.cat(logits), np.concatenate(labels)


def student_of(result: EvaluateResult) -> ModelScores:
    return next(m for m in result.models if m.role == "student")


def teacher_of(result: EvaluateResult) -> ModelScores:
    return next(m for m in result.models if m.role == "teacher")


# Metrics


@pytest.mark.parametrize("classes", [2, 5])
def test_accuracy_and_f1_equal_scikit_learns(classes: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(classes)
    for size in (3, 40, 500):
        labels, predictions = rng.integers(0, classes, (2, size))
        matrix = confusion_matrix(labels, predictions, classes)
        average = "binary" if classes == 2 else "macro"
        want = sklearn.f1_score(labels, predictions, average=average, zero_division=0.0)
        assert f1(matrix) == pytest.approx(want)
        assert accuracy(matrix) == pytest.approx(sklearn.accuracy_score(labels, predictions))
        assert np.array_equal(
            matrix, sklearn.confusion_matrix(labels, predictions, labels=range(classes))
        )


def test_figures_of_nothing_are_not_numbers() -> None:
    empty = confusion_matrix(np.zeros(0, int), np.zeros(0, int), 3)
    assert math.isnan(f1(empty))
    assert math.isnan(accuracy(empty))
    assert math.isnan(expected_calibration_error(np.zeros(0), np.zeros(0, bool)))
    assert math.isnan(f1(confusion_matrix(np.zeros(4, int), np.zeros(4, int), 2)))


def naive_ece(confidence: np.ndarray, correct: np.ndarray, bins: int) -> float:
    total = 0.0
    for i in range(bins):
        low, high = i / bins, (i + 1) / bins
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            total += inside.sum() / len(confidence) * gap
    return total


def test_calibration_error_equals_the_definition() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(1000) * 0.999 + 1e-6
    correct = rng.random(1000) < confidence**2
    for bins in (1, 10, 15):
        want = naive_ece(confidence, correct, bins)
        assert expected_calibration_error(confidence, correct, bins) == pytest.approx(want)
    assert expected_calibration_error(np.ones(5), np.ones(5, bool)) == 0
    assert expected_calibration_error(np.ones(4), np.array([1, 0, 0, 0], bool)) == 0.75


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


# evaluate: classification


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_classifier_is_judged_by_the_textbook(
    temperature: float, class_cache: str, student_classifier: Path, tiny_classifier: Path
) -> None:
    result = evaluate(
        EvaluateOptions((str(student_classifier),), cache=class_cache, temperature=temperature)
    )
    data = Cache.open(class_cache).read(0)
    z, teacher = (
        class_logits(student_classifier, class_cache),
        class_logits(tiny_classifier, class_cache),
    )
    labelled = data.labels != IGNORE
    labels = data.labels[labelled]
    log_p = logprobs_of(z)
    top = log_p.argmax(-1)
    got = student_of(result)
    assert got.accuracy == pytest.approx((top[labelled] == labels).mean())
    assert got.cross_entropy == pytest.approx(
        -log_p[labelled][np.arange(len(labels)), labels].mean(), abs=1e-5
    )
    q, p = logprobs_of(teacher, temperature), logprobs_of(z, temperature)
    assert got.kl == pytest.approx((np.exp(q) * (q - p)).sum(-1).mean(), abs=1e-5)
    assert got.agreement == pytest.approx((top == teacher.argmax(-1).numpy()).mean())
    confidence = np.exp(log_p.max(-1))[labelled]
    assert got.calibration_error == pytest.approx(
        naive_ece(confidence, top[labelled] == labels, 15), abs=1e-5
    )
    scores = []
    for k in range(3):
        hit = ((top[labelled] == k) & (labels == k)).sum()
        scores.append(2 * hit / max(1, (top[labelled] == k).sum() + (labels == k).sum()))
    assert got.f1 == pytest.approx(np.mean(scores))
    assert (result.rows, result.positions, result.labelled) == (200, 200, labelled.sum())
    own = teacher_of(result)
    assert own.accuracy == pytest.approx((teacher.argmax(-1).numpy()[labelled] == labels).mean())
    assert own.cross_entropy == pytest.approx(
        -logprobs_of(teacher)[labelled][np.arange(len(labels)), labels].mean(), abs=1e-5
    )
    assert any("no hard label" in note for note in result.notes)


def test_the_teacher_as_a_student_is_perfect_and_live_equals_cached(
    class_cache: str, tiny_classifier: Path, student_classifier: Path
) -> None:
    names = (str(tiny_classifier), str(student_classifier))
    cached = evaluate(EvaluateOptions(names, cache=class_cache))
    live = evaluate(EvaluateOptions(names, cache=class_cache, teacher=str(tiny_classifier)))
    twin = cached.models[1]
    assert twin.kl == pytest.approx(0, abs=1e-9)
    assert twin.agreement == 1
    for a, b in zip(cached.models[1:], live.models[1:], strict=True):
        assert a.kl == pytest.approx(b.kl, abs=1e-6)
        assert a.cross_entropy == pytest.approx(b.cross_entropy, abs=1e-6)
    assert live.models[0].accuracy == cached.models[0].accuracy
    assert cached.models[0].parameters is None
    want = sum(
        p.numel()
        for p in AutoModelForSequenceClassification.from_pretrained(tiny_classifier).parameters()
    )
    assert twin.parameters == live.models[0].parameters == want


def test_corpus_and_cache_give_the_same_figures(
    class_cache: str, labelled_corpus: Path, tiny_classifier: Path, student_classifier: Path
) -> None:
    on_cache = evaluate(EvaluateOptions((str(student_classifier),), cache=class_cache))
    common: dict[str, Any] = {
        "student": (str(student_classifier),),
        "corpus": (str(labelled_corpus),),
    }
    with_teacher = evaluate(EvaluateOptions(**common, teacher=str(tiny_classifier), max_length=64))
    alone = evaluate(EvaluateOptions(**common, max_length=64, batch_tokens=100))
    for result in (with_teacher, alone):
        a, b = student_of(on_cache), student_of(result)
        assert b.accuracy == a.accuracy
        assert b.f1 == pytest.approx(a.f1)
        assert b.cross_entropy == pytest.approx(a.cross_entropy, abs=1e-5)
    assert student_of(with_teacher).kl == pytest.approx(student_of(on_cache).kl, abs=1e-5)
    assert student_of(alone).kl is None
    assert [m.role for m in alone.models] == ["student"]


def test_classes_in_another_order_are_matched_by_name(
    class_cache: str, student_classifier: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(student_classifier, other)
    model = AutoModelForSequenceClassification.from_pretrained(student_classifier)
    order = [2, 0, 1]
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight[order].clone())
        model.classifier.bias.copy_(model.classifier.bias[order].clone())
    model.config.id2label = {i: CLASSES[k] for i, k in enumerate(order)}
    model.config.label2id = {CLASSES[k]: i for i, k in enumerate(order)}
    model.save_pretrained(other)
    straight, turned = (
        student_of(evaluate(EvaluateOptions((str(f),), cache=class_cache)))
        for f in (student_classifier, other)
    )
    assert turned.accuracy == straight.accuracy
    assert turned.kl == pytest.approx(straight.kl, abs=1e-6)


@pytest.fixture(scope="module")
def word_student(class_cache: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a biLSTM over words in `student/`."""
    data = Cache.open(class_cache).read(0)
    assert data.texts is not None
    vocabulary = Vocabulary.build(data.texts)
    torch.manual_seed(3)
    config = BiLstmConfig(
        len(vocabulary), 3, CLASSES, embedding_size=8, hidden_size=6, dense_size=5
    )
    run = tmp_path_factory.mktemp("run")
    BiLstmClassifier(config, vocabulary).save_pretrained(run / "student")
    return run


@torch.no_grad()
def word_logits(run: Path, texts: list[str]) -> torch.Tensor:
    model = BiLstmClassifier.from_pretrained(run / "student").eval()
    assert model.vocabulary is not None
    return torch.cat([model(**model.vocabulary([t])).logits for t in texts])


def test_a_bilstm_reads_the_texts_itself(
    class_cache: str, labelled_corpus: Path, word_student: Path, tiny_classifier: Path
) -> None:
    data = Cache.open(class_cache).read(0)
    assert data.texts is not None
    top = word_logits(word_student, data.texts).argmax(-1).numpy()
    labelled = data.labels != IGNORE
    want = (top[labelled] == data.labels[labelled]).mean()
    student = (str(word_student),)
    on_cache = evaluate(EvaluateOptions(student, cache=class_cache))
    alone = evaluate(EvaluateOptions(student, corpus=(str(labelled_corpus),)))
    with_teacher = evaluate(
        EvaluateOptions(
            student, corpus=(str(labelled_corpus),), teacher=str(tiny_classifier), max_length=64
        )
    )
    for result in (on_cache, alone, with_teacher):
        assert student_of(result).accuracy == pytest.approx(want)
    assert student_of(on_cache).kl == pytest.approx(student_of(with_teacher).kl, abs=1e-5)


def test_a_student_of_a_users_function(
    class_cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_student.py").write_text(
        "import torch\n"
        "class Bag(torch.nn.Module):\n"
        "    def __init__(self, info):\n"
        "        super().__init__()\n"
        "        self.bag = torch.nn.Embedding(300, info.num_labels)\n"
        "    def forward(self, input_ids, attention_mask):\n"
        "        return (self.bag(input_ids) * attention_mask[..., None]).sum(1)\n"
        "def make(info):\n"
        "    return Bag(info)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    info = StudentInfo("sequence-classification", 300, num_labels=3, label_names=CLASSES)
    student = load_student("my_student:make", info)
    DistilledStudent(student, info.task, codec="dense").save_pretrained(tmp_path / "saved")
    data = Cache.open(class_cache).read(0)
    table = student.get_parameter("bag.weight").detach()
    top = [int(table[data.row(i).input_ids.astype(np.int64)].sum(0).argmax()) for i in range(200)]
    labelled = data.labels != IGNORE
    want = (np.array(top)[labelled] == data.labels[labelled]).mean()
    result = evaluate(EvaluateOptions((str(tmp_path / "saved"),), cache=class_cache))
    assert student_of(result).accuracy == pytest.approx(want)
    sys.modules.pop("my_student")


def test_real_teacher_on_sst2(minilm_sst2: Path, sst2: Path) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    result = evaluate(
        EvaluateOptions(
            (str(minilm_sst2),),
            corpus=(str(sst2 / "dev.tsv"),),
            columns=("text", "label"),
            limit=60,
        )
    )
    lines = (sst2 / "dev.tsv").read_text().splitlines()[:60]
    texts, labels = zip(*(line.split("\t") for line in lines), strict=True)
    model = AutoModelForSequenceClassification.from_pretrained(minilm_sst2).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(minilm_sst2)
    with torch.no_grad():
        top = model(**tokenizer(list(texts), padding=True, return_tensors="pt")).logits.argmax(-1)
    truth = [int(label) for label in labels]
    assert student_of(result).accuracy == pytest.approx(
        sklearn.accuracy_score(truth, top), abs=1 / 59
    )
    assert student_of(result).f1 == pytest.approx(sklearn.f1_score(truth, top), abs=1 / 59)


# evaluate: language models


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_language_model_is_judged_by_the_textbook(
    temperature: float, lm_caches: dict[str, str], student_lm: Path, tiny_lm: Path
) -> None:
    cache = lm_caches["dense"]
    result = evaluate(EvaluateOptions((str(student_lm),), cache=cache, temperature=temperature))
    z, labels = lm_logits(student_lm, cache)
    teacher, _ = lm_logits(tiny_lm, cache)
    got = student_of(result)
    log_p = logprobs_of(z)
    hard = -log_p[np.arange(len(labels)), labels].mean()
    assert result.positions == len(labels)
    assert got.cross_entropy == pytest.approx(hard, abs=1e-4)
    assert got.perplexity == pytest.approx(math.exp(hard), rel=1e-4)
    q, p = logprobs_of(teacher, temperature), logprobs_of(z, temperature)
    assert got.kl == pytest.approx((np.exp(q) * (q - p)).sum(-1).mean(), abs=1e-4)
    top = log_p.argmax(-1)
    assert got.agreement == pytest.approx((top == teacher.argmax(-1).numpy()).mean(), abs=1e-3)
    assert got.calibration_error == pytest.approx(
        naive_ece(np.exp(log_p.max(-1)), top == labels, 15), abs=1e-3
    )
    assert got.f1 is None
    assert result.notes == ()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_topk_gives_the_coarsened_kl(
    temperature: float, lm_caches: dict[str, str], student_lm: Path, tiny_lm: Path
) -> None:
    cache = lm_caches["topk:8"]
    result = evaluate(EvaluateOptions((str(student_lm),), cache=cache, temperature=temperature))
    z, labels = lm_logits(student_lm, cache)
    teacher, _ = lm_logits(tiny_lm, cache)
    q, p = np.exp(logprobs_of(teacher, temperature)), np.exp(logprobs_of(z, temperature))
    ids = np.argsort(-q, -1)[:, :8]
    head_q, head_p = np.take_along_axis(q, ids, -1), np.take_along_axis(p, ids, -1)
    rest_q, rest_p = 1 - head_q.sum(-1), 1 - head_p.sum(-1)
    coarse = (head_q * np.log(head_q / head_p)).sum(-1) + rest_q * np.log(rest_q / rest_p)
    got = student_of(result)
    assert got.kl == pytest.approx(coarse.mean(), abs=0.01)
    assert got.kl < (q * np.log(q / p)).sum(-1).mean()
    assert got.soft_cross_entropy is None
    own = teacher_of(result)
    assert own.accuracy == pytest.approx((q.argmax(-1) == labels).mean(), abs=1e-3)
    assert own.cross_entropy is None
    assert (own.calibration_error is None) == (temperature != 1)
    assert any("top ids" in note for note in result.notes)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_give_an_unbiased_soft_cross_entropy(
    temperature: float, lm_caches: dict[str, str], student_lm: Path, tiny_lm: Path
) -> None:
    cache = lm_caches["sample:20"]
    options = EvaluateOptions((str(student_lm),), cache=cache, temperature=temperature)
    result = evaluate(options)
    z, _ = lm_logits(student_lm, cache)
    teacher, _ = lm_logits(tiny_lm, cache)
    q, p = logprobs_of(teacher, temperature), logprobs_of(z, temperature)
    want = -(np.exp(q) * p).sum(-1)
    got = student_of(result)
    assert got.kl is None
    # A few thousand positions: the noise of the mean is far below one percent.
    assert got.soft_cross_entropy == pytest.approx(want.mean(), rel=0.01)
    assert any("entropy" in note for note in result.notes)
    live = evaluate(dataclasses.replace(options, teacher=str(tiny_lm)))
    exact = student_of(live)
    assert exact.kl == pytest.approx((np.exp(q) * (q - p)).sum(-1).mean(), abs=1e-4)
    assert exact.soft_cross_entropy is None


def test_a_sample_claims_only_the_top_ids_it_knows(
    lm_caches: dict[str, str], tiny_lm: Path
) -> None:
    """The teacher as its own student agrees wherever its best id counts as known."""
    for temperature in (1.0, 2.0):
        result = evaluate(
            EvaluateOptions((str(tiny_lm),), cache=lm_caches["sample:20"], temperature=temperature)
        )
        assert student_of(result).agreement == 1
        assert 0 < result.agreement_positions < result.positions
        assert any(note.startswith("Agreement is over") for note in result.notes)


def test_figures_do_not_depend_on_the_batches(
    lm_caches: dict[str, str], student_lm: Path, tiny_lm: Path
) -> None:
    results = [
        evaluate(
            EvaluateOptions(
                (str(student_lm), str(tiny_lm)), cache=lm_caches["dense"], batch_tokens=n
            )
        )
        for n in (48, 4096)
    ]
    for a, b in zip(results[0].models, results[1].models, strict=True):
        assert a.cross_entropy == pytest.approx(b.cross_entropy, abs=1e-5)
        assert a.kl == pytest.approx(b.kl, abs=1e-5)


def test_a_corpus_is_judged_as_its_cache(
    lm_caches: dict[str, str], text_corpus: Path, student_lm: Path, tiny_lm: Path
) -> None:
    on_cache = evaluate(EvaluateOptions((str(student_lm),), cache=lm_caches["dense"]))
    on_corpus = evaluate(
        EvaluateOptions(
            (str(student_lm),),
            corpus=(str(text_corpus),),
            teacher=str(tiny_lm),
            max_length=48,
            limit=60,
        )
    )
    assert on_corpus.task == "causal-lm"
    # A cache's spans begin rows anew where the corpus goes on: a few positions differ.
    assert on_corpus.positions == pytest.approx(on_cache.positions, rel=0.02)
    assert student_of(on_corpus).kl == pytest.approx(student_of(on_cache).kl, rel=0.05)


def test_limit_takes_the_first_rows_of_a_cache(lm_caches: dict[str, str], student_lm: Path) -> None:
    result = evaluate(EvaluateOptions((str(student_lm),), cache=lm_caches["dense"], limit=3))
    data = Cache.open(lm_caches["dense"]).read(0)
    assert result.rows == 3
    assert result.positions == data.position_offsets[3]


# evaluate: wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student": ()}, "--student is missing"),
        ({"cache": None}, "either --cache or --corpus"),
        ({"corpus": ("x",)}, "either --cache or --corpus"),
        ({"task": "translation"}, "--task is 'translation'"),
        ({"temperature": 0.0}, "--temperature"),
        ({"limit": 0}, "--limit is 0"),
        ({"dtype": "int8"}, "--dtype"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EvaluateOptions(**{"student": ("s",), "cache": "c", **options})


def test_wrong_students(
    class_cache: str,
    lm_caches: dict[str, str],
    tiny_tokenizer: Path,
    tiny_lm: Path,
    student_classifier: Path,
    tmp_path: Path,
) -> None:
    def fails(message: str, student: Path | str, cache: str, **more: Any) -> None:
        with pytest.raises(UsageError, match=message):
            evaluate(EvaluateOptions((str(student),), cache=cache, **more))

    fails("student .* was saved for causal-lm", tiny_lm, class_cache)
    fails("saved for sequence-classification", student_classifier, lm_caches["dense"])
    fails("student .*nowhere", tmp_path / "nowhere", class_cache)
    two = save_classifier(tiny_tokenizer, tmp_path / "two", ("no", "yes"), seed=0)
    fails("knows 2 classes, the targets are over 3", two, class_cache)
    narrow = make_tiny_lm(tiny_tokenizer, tmp_path / "narrow", vocab_size=200)
    fails("knows 200 ids, the targets are over 300", narrow, lm_caches["dense"])
    fails("temperature 3 is not declared", tiny_lm, lm_caches["topk:8"], temperature=3.0)
    fails("a cache for causal-lm", tiny_lm, lm_caches["dense"], task="sequence-classification")
    shutil.copytree(tiny_lm, tmp_path / "mixed")
    file = tmp_path / "mixed" / "tokenizer.json"
    swapped = json.loads(file.read_text())
    vocab = swapped["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(swapped))
    fails("another vocabulary than the cache: 2 tokens", tmp_path / "mixed", lm_caches["dense"])


def test_nothing_to_compare_with(student_classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("one\ntwo\n")
    with pytest.raises(UsageError, match=r"has no labels .* and there is no teacher"):
        evaluate(EvaluateOptions((str(student_classifier),), corpus=(str(tmp_path / "plain.txt"),)))


def test_an_unfinished_cache_is_not_judged(
    lm_caches: dict[str, str], student_lm: Path, tmp_path: Path
) -> None:
    shutil.copytree(lm_caches["dense"], tmp_path / "cache")
    (tmp_path / "cache" / "manifest.json").unlink()
    with pytest.raises(IncompleteError):
        evaluate(EvaluateOptions((str(student_lm),), cache=str(tmp_path / "cache")))


def plain(render: Any, result: Any) -> str:
    out = io.StringIO()
    render(result, Console(file=out, width=40))
    return out.getvalue()


def test_the_table_is_plain_lines_in_a_file_and_the_result_is_json(
    class_cache: str, student_classifier: Path
) -> None:
    result = evaluate(EvaluateOptions((str(student_classifier),), cache=class_cache))
    text = plain(render_evaluation, result)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[1].split(maxsplit=2) == ["teacher", "(cached)", str(student_classifier)]
    kl = student_of(result).kl
    assert f"KL to the teacher (nats, T = 1)  {'-':>16}  {kl:.4f}".split() in [
        line.split() for line in lines
    ]
    again = json.loads(json.dumps(dataclasses.asdict(result), allow_nan=False))
    assert again["models"][1]["kl"] == student_of(result).kl
    out = io.StringIO()
    render_evaluation(result, Console(file=out, force_terminal=True, width=120))
    assert "\x1b[1m" in out.getvalue()


# predict


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("window", [1, 7, 1024])
def test_predictions_come_in_order_whatever_the_batches(
    window: int,
    labelled_corpus: Path,
    student_classifier: Path,
    class_cache: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(sys.modules["kdcache.report.predict"], "_WINDOW", window)
    out = tmp_path / "new" / "out.jsonl"
    result = predict(
        PredictOptions(
            str(student_classifier), (str(labelled_corpus),), str(out), batch_tokens=64 + window
        )
    )
    found = lines_of(out.read_text())
    data = Cache.open(class_cache).read(0)
    assert [record["text"] for record in found] == data.texts
    assert result.records == len(found) == 200
    want = np.exp(logprobs_of(class_logits(student_classifier, class_cache)))
    got = np.array([[record["probabilities"][name] for name in CLASSES] for record in found])
    # The cache cut its rows at 64 tokens, prediction reads all that the model can.
    tokenizer = AutoTokenizer.from_pretrained(student_classifier)
    short = [len(tokenizer(record["text"])["input_ids"]) <= 64 for record in found]
    assert sum(short) > 50
    np.testing.assert_allclose(got[short], want[short], atol=1e-5)
    for record, p in zip(found, got, strict=True):
        assert record["label"] == CLASSES[p.argmax()]
        assert "text_pair" not in record
    assert sorted(p.name for p in out.parent.iterdir()) == ["out.jsonl"]


def test_lines_of_standard_input_each_get_an_answer(word_student: Path) -> None:
    output = io.StringIO()
    texts = ["an object", "", "das Wetter für morgen", "the  value "]
    result = predict(
        PredictOptions(str(word_student), ("-",)),
        lines=(f"{text}\n" for text in texts),
        output=output,
    )
    found = lines_of(output.getvalue())
    assert [record["text"] for record in found] == texts
    assert "für" in output.getvalue()
    assert result.records == 4
    want = word_logits(word_student, texts).softmax(-1)
    got = [[record["probabilities"][name] for name in CLASSES] for record in found]
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert all(math.isclose(sum(p), 1, rel_tol=1e-6) for p in got)


def test_prediction_streams(student_classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than one window is read ahead of what is written."""
    monkeypatch.setattr(sys.modules["kdcache.report.predict"], "_WINDOW", 10)
    output = io.StringIO()
    ahead = []

    def texts() -> Iterator[str]:
        for i in range(45):
            ahead.append(i + 1 - output.getvalue().count("\n"))
            yield f"text {i}\n"

    predict(PredictOptions(str(student_classifier), ("-",)), lines=texts(), output=output)
    assert max(ahead) == 10
    assert output.getvalue().count("\n") == 45


def test_pairs_and_limit(student_classifier: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    records = [{"a": f"first {i}", "b": f"second {i}"} for i in range(5)]
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    output = io.StringIO()
    options = PredictOptions(
        str(student_classifier), (str(file),), text_column="a", pair_column="b", limit=4
    )
    predict(options, output=output)
    found = lines_of(output.getvalue())
    assert [(r["text"], r["text_pair"]) for r in found] == [(r["a"], r["b"]) for r in records[:4]]
    model = AutoModelForSequenceClassification.from_pretrained(student_classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(student_classifier)
    with torch.no_grad():
        z = model(**tokenizer("first 2", "second 2", return_tensors="pt")).logits
    got = [found[2]["probabilities"][name] for name in CLASSES]
    np.testing.assert_allclose(got, z.softmax(-1)[0], atol=1e-5)


def test_wrong_prediction_input_leaves_nothing(
    student_classifier: Path, tiny_lm: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="predict is for classifiers"):
        predict(PredictOptions(str(tiny_lm), ("-",)), lines=[])
    with pytest.raises(UsageError, match="stands alone"):
        PredictOptions("s", ("-", "file"))
    with pytest.raises(UsageError, match="--corpus is missing"):
        PredictOptions("s", ())
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": \n')
    out = tmp_path / "out" / "out.jsonl"
    with pytest.raises(UsageError, match="line 2"):
        predict(PredictOptions(str(student_classifier), (str(bad),), str(out)))
    assert list(out.parent.iterdir()) == []
    result = predict(
        PredictOptions(str(student_classifier), (str(bad),), str(out), on_error="skip")
    )
    assert (result.records, result.skipped) == (1, 1)
    with pytest.raises(UsageError, match="no column 'body'"):
        predict(
            PredictOptions(str(student_classifier), (str(bad),), text_column="body"),
            output=io.StringIO(),
        )
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        predict(
            PredictOptions(str(student_classifier), ("-",), str(tmp_path / "file" / "o")), lines=[]
        )


# inspect


@pytest.mark.parametrize("codec", ["dense", "topk:8", "sample:20"])
def test_inspection_counts_what_is_there(codec: str, lm_caches: dict[str, str]) -> None:
    cache = Cache.open(lm_caches[codec])
    result = inspect(InspectOptions(lm_caches[codec]))
    manifest = cache.manifest
    assert result.finished
    assert (result.rows, result.tokens, result.positions, result.bytes) == (
        manifest.rows,
        manifest.tokens,
        manifest.positions,
        manifest.bytes,
    )
    assert result.bytes_per_position is not None
    assert result.bytes_per_position == pytest.approx(manifest.bytes / manifest.positions)
    assert result.target_bytes_per_position is not None
    assert result.target_bytes_per_position < result.bytes_per_position
    names = {f"targets/{column.name}" for column in cache.codec().columns}
    assert names <= {column.name for column in result.columns}
    sizes = [column.bytes_per_position for column in result.columns]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) <= result.bytes_per_position
    assert result.temperatures == (1.0, 2.0)
    assert result.digest == cache.digest
    assert json.loads(json.dumps(dataclasses.asdict(result), allow_nan=False))["codec"] == codec
    text = plain(render_inspection, result)
    assert f"{manifest.positions:,}" in text
    assert result.fingerprint in text


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("codec", ["dense", "topk:8", "sample:20"])
def test_a_row_shows_the_teachers_best_guesses(
    codec: str, temperature: float, lm_caches: dict[str, str], tiny_lm: Path
) -> None:
    result = inspect(InspectOptions(lm_caches[codec], row=2, temperature=temperature, top=3))
    view = result.row
    assert view is not None
    data = Cache.open(lm_caches[codec]).read(0)
    row = data.row(2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    assert view.text == tokenizer.decode(row.input_ids.tolist())
    assert "".join(p.token or "" for p in view.positions) == view.text
    assert len(view.positions) == (row.labels != IGNORE).sum()
    assert [p.label for p in view.positions] == row.labels.tolist()
    logits, _ = lm_logits(tiny_lm, lm_caches[codec])
    q = np.exp(logprobs_of(logits, temperature))[data.position_offsets[2] :]
    assert view.exact == (codec != "sample:20")
    for position, p in zip(view.positions, q, strict=False):
        shown = [guess.probability for guess in position.guesses]
        assert shown == sorted(shown, reverse=True)
        assert len({guess.id for guess in position.guesses}) == len(shown) <= 3
        if view.exact:
            assert [guess.id for guess in position.guesses] == np.argsort(-p)[:3].tolist()
            np.testing.assert_allclose(shown, np.sort(p)[::-1][:3], atol=0.01)
            assert position.rest == pytest.approx(1 - np.sort(p)[::-1][:3].sum(), abs=0.02)
    text = plain(render_inspection, result)
    assert f"Row 2 (shard 0, {view.tokens} tokens), T = {temperature:g}" in text
    assert repr(view.positions[0].token) in text


def test_a_classified_row(class_cache: str, tiny_classifier: Path) -> None:
    z = class_logits(tiny_classifier, class_cache)
    data = Cache.open(class_cache).read(0)
    assert data.texts is not None
    for number in (3, 4):
        view = inspect(InspectOptions(class_cache, row=number, temperature=5.0)).row
        assert view is not None
        assert view.text == data.texts[number]
        (position,) = view.positions
        label = data.labels[number]
        assert position.label_text == (None if label == IGNORE else CLASSES[label])
        found = {guess.text: guess.probability for guess in position.guesses}
        want = np.exp(logprobs_of(z, 5.0))[number]
        assert found == pytest.approx(dict(zip(CLASSES, want, strict=True)), abs=1e-5)
        assert position.rest == pytest.approx(0, abs=1e-9)
    result = inspect(InspectOptions(class_cache, row=3))
    assert data.texts[3] in plain(render_inspection, result)


@pytest.fixture
def many_shards(tiny_classifier: Path, labelled_corpus: Path, tmp_path: Path) -> Cache:
    """A classification cache of several shards."""
    out = tmp_path / "cache"
    build(
        BuildOptions(
            teacher=(str(tiny_classifier),),
            corpus=(str(labelled_corpus),),
            out=str(out),
            task="sequence-classification",
            shard_tokens=1024,
            workers=0,
        )
    )
    cache = Cache.open(str(out))
    assert cache.spec.spans > 3
    return cache


def test_rows_are_found_across_shards(many_shards: Cache, class_cache: str) -> None:
    texts = Cache.open(class_cache).read(0).texts
    assert texts is not None
    first = many_shards.manifest.shards[0].rows
    for number in (0, first - 1, first, 120, 199):
        view = inspect(InspectOptions(many_shards.url, row=number)).row
        assert view is not None
        assert view.text == texts[number]
        assert (view.shard == 0) == (number < first)


def test_an_unfinished_cache_shows_what_it_has(many_shards: Cache) -> None:
    url, shards = many_shards.url, many_shards.manifest.shards
    gone = shards[1]
    want = inspect(InspectOptions(url, row=199)).row
    assert want is not None
    Path(url, "manifest.json").unlink()
    Path(url, "shards", gone.name).unlink()
    last = 199 - gone.rows
    result = inspect(InspectOptions(url, row=last))
    assert (result.finished, result.done, result.spans) == (False, len(shards) - 1, len(shards))
    assert result.rows == 200 - gone.rows
    assert result.bytes == sum(shard.bytes for shard in shards) - gone.bytes
    assert result.digest is None
    assert result.row == dataclasses.replace(want, row=last)
    text = plain(render_inspection, result)
    assert f"unfinished: {len(shards) - 1} of {len(shards)} shards" in text
    with pytest.raises(UsageError, match=f"unfinished cache has so far {result.rows} rows"):
        inspect(InspectOptions(url, row=result.rows))
    for path in Path(url, "shards").iterdir():
        path.unlink()
    empty = inspect(InspectOptions(url))
    assert (empty.done, empty.bytes_per_position, empty.columns) == (0, None, ())
    assert "unfinished: 0 of" in plain(render_inspection, empty)


def test_wrong_inspections(tmp_path: Path, lm_caches: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="not a kdcache cache"):
        inspect(InspectOptions(str(tmp_path)))
    rows = Cache.open(lm_caches["topk:8"]).manifest.rows
    with pytest.raises(UsageError, match=f"the cache has {rows} rows, numbered from 0"):
        inspect(InspectOptions(lm_caches["topk:8"], row=rows))
    with pytest.raises(UsageError, match="temperature 4 is not declared"):
        inspect(InspectOptions(lm_caches["topk:8"], row=0, temperature=4.0))
    with pytest.raises(UsageError, match="--row is -1"):
        InspectOptions("c", row=-1)
    with pytest.raises(UsageError, match="--top is 0"):
        InspectOptions("c", top=0)
    with pytest.raises(UsageError, match="--temperature is 0"):
        InspectOptions("c", temperature=0.0)


def test_stories_read_as_they_are_written(stories260k: Path, tmp_path: Path) -> None:
    """A SentencePiece vocabulary: the spaces between words are shown."""
    (tmp_path / "story.txt").write_text("Once upon a time, there was a little girl named Lily.\n")
    build_lm(stories260k, tmp_path / "story.txt", tmp_path / "cache", "topk:8")
    view = inspect(InspectOptions(str(tmp_path / "cache"), row=0)).row
    assert view is not None
    shown = "".join(p.token or "" for p in view.positions)
    assert " upon a time, there was a" in shown
    best = [p.guesses[0].text for p in view.positions]
    assert " time" in best
