"""Token classification from cache to student: right targets, positions, losses and figures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TAGS
from torch.nn import functional
from transformers import AutoModelForTokenClassification, AutoTokenizer

import kdcache  # noqa: F401 - registers the biLSTM with transformers
from kdcache.cache import Cache
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.evaluate.evaluate import evaluate
from kdcache.commands.options import EvaluateOptions
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.errors import IncompleteError, UsageError
from kdcache.loss.metrics import Entities
from kdcache.rows import Row
from kdcache.rows.batches import pad_rows
from kdcache.stream import TargetStream
from kdcache.student import DistilledStudent, StudentInfo, load_student, student_tokenize
from kdcache.tasks import IGNORE, TOKEN_CLASSIFICATION, UNLABELLED, labelled

pytestmark = pytest.mark.slow

SMALL = {
    "model_type": "distilbert", "dim": 16, "n_heads": 2, "n_layers": 1, "hidden_dim": 32,
    "max_position_embeddings": 64, "dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
SIZES: dict[str, Any] = {"embedding_size": 6, "hidden_size": 5, "dense_size": 4}


def rows_of(url: str) -> list[Row]:
    cache = Cache.open(url)
    return [
        data.row(i) for data in map(cache.read, range(cache.spec.spans)) for i in range(len(data))
    ]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("mode", ["first", "all"])
def test_targets_are_the_teachers_logits_of_each_word(
    mode: str, tag_caches: dict[str, str], tiny_tagger: Path, tagged_corpus: Path
) -> None:
    """As the usual script of transformers computes them: words apart, its own forward, one row."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_tagger)
    teacher = AutoModelForTokenClassification.from_pretrained(tiny_tagger).eval()
    cache = Cache.open(tag_caches[mode])
    assert cache.spec.label_names == TAGS
    assert cache.spec.spans > 1
    want, hard = [], []
    for record in records(tagged_corpus):
        words = [word or "[UNK]" for word in record["tokens"]]
        encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            logits = teacher(**encoded).logits[0]
        ids = encoded.word_ids()
        for i, word in enumerate(ids):
            if word is not None and (mode == "all" or ids[i - 1] != word):
                tag = (record["ner_tags"] or [None] * len(words))[word]
                want.append(logits[i])
                hard.append(UNLABELLED if tag is None else TAGS.index(tag))
    shards = [cache.read(i) for i in range(cache.spec.spans)]
    got = torch.cat([data.targets.at(1.0).logits for data in shards])  # type: ignore[union-attr]
    assert torch.allclose(got, torch.stack(want), atol=1e-5)
    labels = np.concatenate([data.labels for data in shards])
    assert labels[labels != IGNORE].tolist() == hard
    assert {UNLABELLED, 0} < set(hard)


LOSSES = [("forward-kl", 0.3, 2.0), ("mse", 0.0, 1.0), ("forward-kl", 1.0, 1.0), ("jsd", 0.5, 1.0)]


@pytest.mark.parametrize("mode", ["first", "all"])
@pytest.mark.parametrize(("divergence", "alpha", "temperature"), LOSSES)
def test_losses_and_gradients_are_those_of_a_teacher_beside_the_student(
    mode: str,
    divergence: str,
    alpha: float,
    temperature: float,
    tag_caches: dict[str, str],
    tiny_tagger: Path,
    tmp_path: Path,
) -> None:
    teacher = AutoModelForTokenClassification.from_pretrained(tiny_tagger).eval().double()
    (tmp_path / "s.json").write_text(json.dumps(SMALL))
    info = StudentInfo(TOKEN_CLASSIFICATION, 300, len(TAGS), TAGS)
    student = load_student(str(tmp_path / "s.json"), info).eval().double()
    stream = TargetStream(tag_caches[mode], batch_size=16, temperature=temperature, seed=3)
    loss = DistilledStudent(student, TOKEN_CLASSIFICATION, alpha=alpha, divergence=divergence)
    batch = next(iter(stream))
    with torch.no_grad():
        beside = teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"]
    at, known = labels != IGNORE, labels >= 0
    z = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    q = (beside[at] / temperature).softmax(-1)
    p = (z[at] / temperature).softmax(-1)
    if divergence == "mse":
        soft = (z[at] - beside[at]).square().mean(-1).sum()
    elif divergence == "jsd":
        m = (p + q) / 2
        each = [(r * (r / m).log()).sum(-1) for r in (p, q)]
        soft = temperature**2 * ((each[0] + each[1]) / 2).sum()
    else:
        soft = temperature**2 * (q * (q / p).log()).sum()
    hard = functional.cross_entropy(z[known], labels[known], reduction="sum")
    want = (alpha * hard + (1 - alpha) * soft) / at.sum()
    weights = list(student.parameters())
    ours = loss(**batch).loss
    assert ours is not None
    assert torch.allclose(ours, want, rtol=1e-5), (ours, want)
    for got, expected in zip(
        torch.autograd.grad(ours, weights), torch.autograd.grad(want, weights), strict=True
    ):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, None])
@pytest.mark.parametrize(("workers", "accumulation"), [(2, 1), (1, 3), (2, 2)])
def test_slices_of_several_workers_add_up_to_the_whole_batch(
    workers: int,
    accumulation: int,
    temperature: float | None,
    tag_caches: dict[str, str],
    tmp_path: Path,
) -> None:
    """The mean is over positions, and without soft targets over hard labels, of all slices."""
    (tmp_path / "s.json").write_text(json.dumps(SMALL))
    info = StudentInfo(TOKEN_CLASSIFICATION, 300, len(TAGS), TAGS)
    student = load_student(str(tmp_path / "s.json"), info).eval()
    loss = DistilledStudent(student, TOKEN_CLASSIFICATION, alpha=0.3)

    def losses(**options: Any) -> list[float]:
        stream = TargetStream(
            tag_caches["first"],
            batch_size=12,
            temperature=temperature,
            seed=5,
            streams=1,
            **options,
        )
        return [float(loss(**batch).loss.detach()) for batch in stream]

    whole = losses()
    parts = sum(
        np.array(losses(rank=rank, world_size=workers, accumulation=accumulation))
        .reshape(-1, accumulation).sum(1)
        for rank in range(workers)
    )  # fmt: skip
    assert np.allclose(parts, whole, rtol=1e-5)


def run(cache: str, student: str, out: Path, **options: Any) -> Any:
    small = SIZES if student == "bilstm" else {}
    options = {"batch_size": 16, "epochs": 2, "learning_rate": 0.01, **small, **options}
    return train(
        TrainOptions(cache=(cache,), eval_cache=(cache,), student=student, out=str(out), **options)
    )


def slow_figures(run_folder: str, corpus: Path) -> dict[str, float]:
    """Accuracy and F1 of a tagger over words, by the usual script: one sentence at a time."""
    tokenizer = AutoTokenizer.from_pretrained(run_folder)
    model = AutoModelForTokenClassification.from_pretrained(run_folder).eval()
    entities, right, count = Entities(TAGS), 0, 0
    for record in records(corpus):
        if record["ner_tags"] is None:
            continue
        blank = " " if tokenizer.unk_token is None else ""  # of a byte-level one
        words = [blank + (word or tokenizer.unk_token or "") for word in record["tokens"]]
        encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        ids = encoded.word_ids()
        first = [ids.index(i) for i in range(len(words))]
        encoded.pop("token_type_ids", None)
        with torch.no_grad():
            found = model(**encoded).logits[0, first].argmax(-1).numpy()
        keep = np.array([tag is not None for tag in record["ner_tags"]])
        labels = np.array([TAGS.index(tag or "O") for tag in record["ner_tags"]])
        entities.add(labels[keep], found[keep], np.array([keep.sum()]))
        right, count = right + int((labels == found)[keep].sum()), count + int(keep.sum())
    return {"f1": entities.f1, "accuracy": right / count}


@pytest.mark.parametrize("student", ["bilstm", "teacher's tokens", "config", "own tokenizer"])
def test_students_learn_are_saved_and_measured(
    student: str, tag_caches: dict[str, str], tagged_corpus: Path, tiny_tagger: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {}
    name = "bilstm"
    if student == "teacher's tokens":
        options = {"student_tokenizer": "teacher"}
    elif student == "config":
        name = str(tmp_path / "s.json")
        (tmp_path / "s.json").write_text(json.dumps(SMALL))
    elif student == "own tokenizer":
        from transformers import RobertaConfig, RobertaForTokenClassification

        tokenizer = AutoTokenizer.from_pretrained(
            Path(__file__).parent / "tiny_tokenizers" / "bytes"
        )
        config = RobertaConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=130,
            id2label=dict(enumerate(TAGS)), label2id={tag: i for i, tag in enumerate(TAGS)},
        )  # fmt: skip
        name = str(tmp_path / "roberta")
        RobertaForTokenClassification(config).save_pretrained(name)
        tokenizer.save_pretrained(name)
    cache, out = tag_caches["first"], str(tmp_path / "run")
    result = run(cache, name, tmp_path / "run", best="f1", **options)
    assert result.made
    assert result.eval["f1"] >= 0
    (teacher, mine) = evaluate(EvaluateOptions(student=(out,), cache=cache)).models
    assert mine.accuracy == pytest.approx(result.eval["accuracy"])
    assert mine.entity_f1 == pytest.approx(result.eval["f1"])
    assert mine.kl == pytest.approx(result.eval["soft_loss"], rel=1e-4)
    assert teacher.entity_f1 is not None
    assert teacher.kl is None
    want = slow_figures(out, tagged_corpus)
    assert (mine.entity_f1, mine.accuracy) == pytest.approx((want["f1"], want["accuracy"]))
    live = evaluate(
        EvaluateOptions(student=(out,), teacher=str(tiny_tagger), corpus=(str(tagged_corpus),))
    ).models
    for name_ in ("accuracy", "kl", "entity_f1", "entity_recall", "agreement", "cross_entropy"):
        assert getattr(live[1], name_) == pytest.approx(getattr(mine, name_), rel=1e-4)
    assert live[0].entity_f1 == pytest.approx(teacher.entity_f1)


def test_figures_of_all_tokens_are_of_words(tag_caches: dict[str, str], tmp_path: Path) -> None:
    """A student of the teacher's tokens has the same entities, whichever tokens have targets."""
    result = run(tag_caches["all"], "bilstm", tmp_path / "run", student_tokenizer="teacher")
    out = (str(tmp_path / "run"),)
    every, first = (
        evaluate(EvaluateOptions(student=out, cache=tag_caches[mode])) for mode in ("all", "first")
    )
    assert every.positions > first.positions
    for mine, other in zip(every.models, first.models, strict=True):
        assert mine.entity_f1 == pytest.approx(other.entity_f1)
    assert every.models[1].entity_f1 == pytest.approx(result.eval["f1"])


def test_a_student_with_words_of_its_own_needs_targets_of_words(
    tag_caches: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"Build with --label-tokens first"):
        run(tag_caches["all"], "bilstm", tmp_path / "run")
    run(tag_caches["first"], "bilstm", tmp_path / "words")
    with pytest.raises(UsageError, match=r"targets at all tokens of a word \(--label-tokens all\)"):
        evaluate(EvaluateOptions(student=(str(tmp_path / "words"),), cache=tag_caches["all"]))


def test_a_student_of_words_cuts_none(tag_caches: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--max-length is 5, and a student of words reads each"):
        run(tag_caches["first"], "bilstm", tmp_path / "run", max_length=5)


def test_an_adapter_is_trained_saved_and_measured(
    tag_caches: dict[str, str], tiny_tagger: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="the extra lora")
    cache, out = tag_caches["all"], str(tmp_path / "run")
    result = run(cache, str(tiny_tagger), tmp_path / "run", lora="r=2", alpha="1")
    assert result.trained < result.parameters / 2
    assert not (tmp_path / "run" / "model.safetensors").exists()
    (_, found) = evaluate(EvaluateOptions(student=(out,), cache=cache)).models
    assert found.entity_f1 == pytest.approx(result.eval["f1"])
    assert found.accuracy == pytest.approx(result.eval["accuracy"])


def test_a_stopped_run_resumes_to_the_bit(tag_caches: dict[str, str], tmp_path: Path) -> None:
    cache = tag_caches["first"]
    run(cache, "bilstm", tmp_path / "whole", eval_steps=3)

    def stop(progress: Any) -> None:
        if progress.step >= 7:
            raise KeyboardInterrupt

    options = TrainOptions(
        cache=(cache,), eval_cache=(cache,), student="bilstm", out=str(tmp_path / "cut"),
        batch_size=16, epochs=2, learning_rate=0.01, eval_steps=3, logging_steps=1, **SIZES,
    )  # fmt: skip
    with pytest.raises(IncompleteError):
        train(options, on_progress=stop)
    train(dataclasses.replace(options, logging_steps=10))
    ours, theirs = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")
    )
    assert ours == theirs


def test_hard_labels_alone_leave_words_without_a_label_out(
    tag_caches: dict[str, str], tmp_path: Path
) -> None:
    rates = {"learning_rate": None, "lr_scheduler": "constant", "logging_steps": 1}
    result = run(tag_caches["first"], "bilstm", tmp_path / "run", alpha="1", **rates)
    assert result.soft_loss is None
    # By default that of the biLSTM, whichever its task.
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["learning_rate"] == 1e-3
    batch = next(iter(TargetStream(tag_caches["first"], batch_size=90, temperature=None)))
    labels = batch["labels"]
    assert UNLABELLED not in labels
    assert int(batch["count"]) == int(labelled(labels, TOKEN_CLASSIFICATION).sum()) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": ["a", "b"], "ner_tags": ["O"]}, "1 tags in column 'ner_tags' for 2 words"),
        ({"tokens": ["a"], "ner_tags": ["B-ORG"]}, "'B-ORG', which is not one of the teacher's"),
        ({"tokens": ["a"], "ner_tags": "O"}, "'ner_tags' holds text where a list of tags"),
        ({"text": "a b c"}, "has no column 'tokens'"),
    ],
)
def test_wrong_corpora_stop_a_build_in_one_line(
    change: dict[str, Any], message: str, tiny_tagger: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(change) + "\n")
    options = BuildOptions(
        teacher=(str(tiny_tagger),), corpus=(str(tmp_path / "a.jsonl"),), workers=0,
        out=str(tmp_path / "cache"), task="token-classification",
    )  # fmt: skip
    with pytest.raises(UsageError, match=message) as found:
        build(options)
    assert "\n" not in str(found.value)


def test_teachers_and_students_that_do_not_fit_are_refused(
    tag_caches: dict[str, str],
    tiny_tagger: Path,
    tiny_classifier: Path,
    tagged_corpus: Path,
    tmp_path: Path,
) -> None:
    options = BuildOptions(
        teacher=(str(tiny_classifier),), corpus=(str(tagged_corpus),), workers=0,
        out=str(tmp_path / "cache"), task="token-classification",
    )  # fmt: skip
    with pytest.raises(UsageError, match="was not trained for token-classification"):
        build(options)
    model = AutoModelForTokenClassification.from_pretrained(tiny_tagger)
    model.config.id2label = dict(enumerate(TAGS[::-1]))
    model.config.label2id = {tag: i for i, tag in enumerate(TAGS[::-1])}
    model.save_pretrained(tmp_path / "turned")
    with pytest.raises(UsageError, match="has the classes I-LOC, B-LOC, I-PER, B-PER, O in this"):
        run(tag_caches["first"], str(tmp_path / "turned"), tmp_path / "run")


def test_classes_in_another_order_are_put_in_the_teachers(
    tag_caches: dict[str, str], tiny_tagger: Path, tmp_path: Path
) -> None:
    """The same tagger with its classes turned around agrees with itself everywhere."""
    model = AutoModelForTokenClassification.from_pretrained(tiny_tagger)
    model.config.id2label = dict(enumerate(TAGS[::-1]))
    model.config.label2id = {tag: i for i, tag in enumerate(TAGS[::-1])}
    with torch.no_grad():
        for part in (model.classifier.weight, model.classifier.bias):
            part.copy_(part.flip(0))
    model.save_pretrained(tmp_path / "turned")
    AutoTokenizer.from_pretrained(tiny_tagger).save_pretrained(tmp_path / "turned")
    found = evaluate(
        EvaluateOptions(student=(str(tmp_path / "turned"),), cache=tag_caches["first"])
    ).models[1]
    assert found.agreement == 1.0
    assert found.kl == pytest.approx(0.0, abs=1e-6)


def test_two_taggers_make_one_target(
    tiny_tagger: Path, tagged_corpus: Path, tag_caches: dict[str, str], tmp_path: Path
) -> None:
    options = BuildOptions(
        teacher=(str(tiny_tagger), str(tiny_tagger)), corpus=(str(tagged_corpus),), workers=0,
        out=str(tmp_path / "cache"), task="token-classification", ensemble="mean-logits",
    )  # fmt: skip
    build(options)
    (ours,) = rows_of(options.out)[:1]
    assert ours.words
    one, two = (
        Cache.open(url).read(0).targets.at(1.0) for url in (tag_caches["first"], options.out)
    )
    count = len(one)
    assert torch.allclose(one.logits, two.logits[:count], atol=1e-5)  # type: ignore[union-attr]


def test_padding_moves_no_logits(tag_caches: dict[str, str]) -> None:
    """The biLSTM reads a row alone as it does in a batch, where an id of padding is a token too."""
    info = StudentInfo(TOKEN_CLASSIFICATION, 300, len(TAGS), TAGS)
    student = load_student("bilstm", info, options={**SIZES, "tokenizer": "teacher"}).eval()
    assert student_tokenize(student, "bilstm", info) is None
    rows = rows_of(tag_caches["first"])[:8]
    batch = {k: torch.from_numpy(v) for k, v in pad_rows(rows, 0).items() if k != "token_type_ids"}
    batch["input_ids"][:, 1] = 0
    with torch.no_grad():
        whole = student(**batch).logits
        for i, row in enumerate(rows):
            one = {k: v[i : i + 1, : len(row.input_ids)] for k, v in batch.items()}
            assert torch.allclose(
                student(**one).logits[0], whole[i, : len(row.input_ids)], atol=1e-6
            )
