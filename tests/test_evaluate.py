"""evaluate against formulas and forwards that share no code with it."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from broken_caches import forge
from conftest import CLASSES, make_tiny_classifier, make_tiny_lm
from rich.console import Console
from textbook import (
    class_logits,
    lm_logits,
    logprobs_of,
    naive_ece,
    plain,
    word_logits,
)
from transformers import AutoModelForSequenceClassification

from kdcache.cache import Cache
from kdcache.cache.figures import teacher_entropy
from kdcache.cli.views import render_evaluation
from kdcache.commands.evaluate.evaluate import evaluate
from kdcache.commands.evaluate.scores import DomainScores, EvaluateResult
from kdcache.commands.options import EvaluateOptions
from kdcache.errors import UsageError
from kdcache.metrics import ModelScores
from kdcache.student import DistilledStudent, StudentInfo, load_student
from kdcache.tasks import IGNORE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def student_lm(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose output layer is 20 ids wider than the teacher's vocabulary."""
    folder = tmp_path_factory.mktemp("student-lm")
    return make_tiny_lm(tiny_tokenizer, folder, vocab_size=320, seed=5)


def student_of(result: EvaluateResult) -> ModelScores:
    return next(m for m in result.models if m.role == "student")


def teacher_of(result: EvaluateResult) -> ModelScores:
    return next(m for m in result.models if m.role == "teacher")


# Classification


def test_a_classifier_is_judged_by_the_textbook(
    class_cache: str, student_classifier: Path, tiny_classifier: Path
) -> None:
    options = EvaluateOptions((str(student_classifier),), cache=class_cache, temperature=3.0)
    result = evaluate(options)
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
    q, p = logprobs_of(teacher, 3.0), logprobs_of(z, 3.0)
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
    model = AutoModelForSequenceClassification.from_pretrained(student_classifier)
    assert got.parameters == sum(weight.numel() for weight in model.parameters())
    assert own.parameters is None


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
    DistilledStudent(student, info.task).save_pretrained(tmp_path / "saved")
    data = Cache.open(class_cache).read(0)
    table = student.get_parameter("bag.weight").detach()
    top = [int(table[data.row(i).input_ids.astype(np.int64)].sum(0).argmax()) for i in range(200)]
    labelled = data.labels != IGNORE
    want = (np.array(top)[labelled] == data.labels[labelled]).mean()
    saved = (str(tmp_path / "saved"),)
    result = evaluate(EvaluateOptions(saved, cache=class_cache, trust_remote_code=True))
    assert student_of(result).accuracy == pytest.approx(want)
    sys.modules.pop("my_student")


# Language models


def test_a_language_model_is_judged_by_the_textbook(
    lm_caches: dict[str, str], student_lm: Path, tiny_lm: Path
) -> None:
    cache, temperature = lm_caches["dense"], 2.0
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
    one = result.one_answer
    assert one is not None
    counts = np.bincount(labels)
    assert one.accuracy == pytest.approx(counts.max() / len(labels))
    assert one.perplexity == pytest.approx(np.exp(one.cross_entropy))
    (note,) = result.notes  # random weights
    assert "no better than one answer for all: cross-entropy" in note
    assert result.little_learnt == (str(student_lm),)


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
    given = logprobs_of(teacher)[np.arange(len(labels)), labels]  # kept beside the targets
    assert own.cross_entropy == pytest.approx(-given.mean(), abs=5e-3)
    assert (own.calibration_error is None) == (temperature != 1)
    assert any("top ids" in note for note in result.notes)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_give_an_unbiased_soft_cross_entropy(
    temperature: float, lm_caches: dict[str, str], student_lm: Path, tiny_lm: Path, tmp_path: Path
) -> None:
    """And less the entropies that a cache keeps KL, at T = 1."""
    whole = Cache.open(lm_caches["sample:20"])
    without = forge(
        whole, tmp_path / "older", lambda d: dataclasses.replace(d, entropy=None), entropy=False
    )
    cache = without.url
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
    newer = evaluate(dataclasses.replace(options, cache=whole.url))
    shards = [whole.read(span) for span in range(whole.spec.spans)]
    entropy = np.concatenate([teacher_entropy(data) for data in shards]).astype(float).mean()
    if temperature == 1:
        kl = student_of(newer).kl
        assert kl == pytest.approx(got.soft_cross_entropy - entropy, abs=1e-5)
        assert kl == pytest.approx((np.exp(q) * (q - p)).sum(-1).mean(), abs=0.01 * want.mean())
        assert any("right on average over their draws" in note for note in newer.notes)
    else:
        assert newer.models == result.models
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


def test_limit_takes_the_first_rows_of_a_cache(lm_caches: dict[str, str], student_lm: Path) -> None:
    result = evaluate(EvaluateOptions((str(student_lm),), cache=lm_caches["dense"], limit=3))
    data = Cache.open(lm_caches["dense"]).read(0)
    assert result.rows == 3
    assert result.positions == data.position_offsets[3]


# Wrong input


def test_wrong_students(
    class_cache: str,
    lm_caches: dict[str, str],
    tiny_tokenizer: Path,
    tiny_lm: Path,
    student_classifier: Path,
    tmp_path: Path,
) -> None:
    for cache, corpus in ((None, ()), ("c", ("x",))):
        with pytest.raises(UsageError, match="either --cache or --corpus"):
            EvaluateOptions(("s",), cache=cache, corpus=corpus)

    def fails(message: str, student: Path | str, cache: str, **more: Any) -> None:
        with pytest.raises(UsageError, match=message):
            evaluate(EvaluateOptions((str(student),), cache=cache, **more))

    fails("student .* was saved for causal-lm", tiny_lm, class_cache)
    fails("saved for sequence-classification", student_classifier, lm_caches["dense"])
    fails("student .*nowhere", tmp_path / "nowhere", class_cache)
    two = make_tiny_classifier(tiny_tokenizer, tmp_path / "two", ("no", "yes"))
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
    other = {"teacher": str(tmp_path / "mixed")}
    fails(
        "teacher .* has another vocabulary than .*: 2 tokens", tiny_lm, lm_caches["dense"], **other
    )


def test_nothing_to_compare_with(student_classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("one\ntwo\n")
    with pytest.raises(UsageError, match=r"has no labels .* and there is no teacher"):
        evaluate(EvaluateOptions((str(student_classifier),), corpus=(str(tmp_path / "plain.txt"),)))


# What is printed


def test_the_table_is_plain_lines_in_a_file_and_the_result_is_json(
    class_cache: str, student_classifier: Path
) -> None:
    result = evaluate(EvaluateOptions((str(student_classifier),), cache=class_cache))
    text = plain(render_evaluation, result)
    assert "\x1b" not in text
    lines = text.splitlines()
    heads = lines[1].split(maxsplit=3)
    assert heads == ["teacher", "(cached)", str(student_classifier), "commonest class"]
    kl = student_of(result).kl
    assert f"KL to the teacher (nats, T = 1)  {'-':>16}  {kl:.4f} -".split() in [
        line.split() for line in lines
    ]
    again = json.loads(json.dumps(dataclasses.asdict(result), allow_nan=False))
    assert again["models"][1]["kl"] == student_of(result).kl
    out = io.StringIO()
    render_evaluation(result, Console(file=out, force_terminal=True, width=120))
    assert "\x1b[1m" in out.getvalue()


@pytest.mark.parametrize(
    ("task", "known", "hidden"),
    [
        ("regression", ("pearson", "spearman", "mse", "teacher_mse"), ()),
        (
            "multi-label-classification",
            (
                *("micro_f1", "macro_f1", "micro_average_precision", "macro_average_precision"),
                *("cross_entropy", "kl", "agreement"),
            ),
            (),
        ),
        ("token-classification", ("accuracy", "entity_f1", "cross_entropy", "kl"), ("f1",)),
        ("sequence-classification", ("accuracy", "f1", "cross_entropy", "kl", "agreement"), ()),
    ],
)
def test_the_figures_of_each_domain_have_their_tables(
    task: str, known: tuple[str, ...], hidden: tuple[str, ...]
) -> None:
    """Scores had no table of domains at all, taggers none of F1, though the JSON has them."""

    def scores(first: float) -> tuple[ModelScores, ...]:
        values = {name: first + i / 1000 for i, name in enumerate((*known, *hidden))}
        return (ModelScores("run", "student", 10, **values),)

    domains = tuple(
        DomainScores(name, 5, 5, 5, scores(first)) for name, first in (("web", 0.2), ("code", 0.4))
    )
    result = EvaluateResult(
        *("cache", task, ("no", "yes", "O"), 10, 10, 10, 1.0, 10, 15, 0, 0, scores(0.3), ()),
        domains=domains,
        threshold=0.5,
    )
    tables = plain(render_evaluation, result).partition("by domain")[2]
    for domain in domains:
        (model,) = domain.models
        for name in (*known, *hidden):
            value = getattr(model, name)
            cells = (f"{value:.4f}", f"{100 * value:.2f} %")
            assert any(cell in tables for cell in cells) == (name in known), name
