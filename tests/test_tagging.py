"""What only students of taggers have: words of their own, and classes that are put in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TAGS
from transformers import AutoModelForTokenClassification, AutoTokenizer

import kdcache  # noqa: F401 - registers the biLSTM with transformers
from kdcache.cache import Cache
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.evaluate.evaluate import evaluate
from kdcache.commands.options import EvaluateOptions
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.errors import UsageError
from kdcache.rows import Row
from kdcache.rows.batches import pad_rows
from kdcache.stream import TargetStream
from kdcache.student import StudentInfo, load_student, student_tokenize
from kdcache.tasks import TOKEN_CLASSIFICATION, UNLABELLED, labelled

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


def run(cache: str, student: str, out: Path, **options: Any) -> Any:
    small = SIZES if student == "bilstm" else {}
    options = {"batch_size": 16, "epochs": 2, "learning_rate": 0.01, **small, **options}
    return train(
        TrainOptions(cache=(cache,), eval_cache=(cache,), student=student, out=str(out), **options)
    )


@pytest.mark.parametrize("student", ["teacher's tokens", "own tokenizer"])
def test_students_of_other_tokens_learn_and_are_measured(
    student: str, tag_caches: dict[str, str], tagged_corpus: Path, tiny_tagger: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"student_tokenizer": "teacher"}
    name = "bilstm"
    if student == "own tokenizer":
        from transformers import RobertaConfig, RobertaForTokenClassification

        tokenizer = AutoTokenizer.from_pretrained(
            Path(__file__).parent / "tiny_tokenizers" / "bytes"
        )
        config = RobertaConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=130,
            id2label=dict(enumerate(TAGS)), label2id={tag: i for i, tag in enumerate(TAGS)},
        )  # fmt: skip
        name, options = str(tmp_path / "roberta"), {}
        RobertaForTokenClassification(config).save_pretrained(name)
        tokenizer.save_pretrained(name)
    cache, out = tag_caches["first"], str(tmp_path / "run")
    result = run(cache, name, tmp_path / "run", best="f1", **options)
    (teacher, mine) = evaluate(EvaluateOptions(student=(out,), cache=cache)).models
    assert mine.accuracy == pytest.approx(result.eval["accuracy"])
    assert mine.entity_f1 == pytest.approx(result.eval["f1"])
    assert mine.kl == pytest.approx(result.eval["soft_loss"], rel=1e-4)
    assert teacher.kl is None
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


def test_a_teacher_of_another_task_is_refused(
    tiny_classifier: Path, tagged_corpus: Path, tmp_path: Path
) -> None:
    options = BuildOptions(
        teacher=(str(tiny_classifier),), corpus=(str(tagged_corpus),), workers=0,
        out=str(tmp_path / "cache"), task="token-classification",
    )  # fmt: skip
    with pytest.raises(UsageError, match="was not trained for token-classification"):
        build(options)


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
    with pytest.raises(UsageError, match="has the classes I-LOC, B-LOC, I-PER, B-PER, O in this"):
        run(tag_caches["first"], str(tmp_path / "turned"), tmp_path / "run")
    found = evaluate(
        EvaluateOptions(student=(str(tmp_path / "turned"),), cache=tag_caches["first"])
    ).models[1]
    assert found.agreement == 1.0
    assert found.kl == pytest.approx(0.0, abs=1e-6)


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
