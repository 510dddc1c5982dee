"""Commands about taggers: made by `finetune`, asked by `predict`, looked at by all others."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TAGS, WORDPIECE
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
)

from kdcache.commands.evaluate.evaluate import evaluate
from kdcache.commands.finetune.finetune import finetune
from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.commands.options import (
    EvaluateOptions,
    PredictOptions,
)
from kdcache.commands.predict import predict
from kdcache.errors import UsageError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder without a head, which reads 40 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(WORDPIECE)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=40,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def conll(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences whose tags follow from the words."""
    entity = [("New", "B-LOC"), ("York", "I-LOC")], [("Smith", "B-PER")], [("the", "O")]
    lines = []
    for number in range(60):
        words = [pair for i in range(3) for pair in entity[(number * (i + 2) + i) % 3]]
        lines += [f"{word} NN {tag}" for word, tag in [*words, (".", "O")]] + [""]
    path = tmp_path_factory.mktemp("conll") / "a.conll"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def tagger(encoder: Path, conll: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    options = FinetuneOptions(
        model=str(encoder), corpus=(str(conll),), eval_corpus=(str(conll),), epochs=6,
        out=str(tmp_path_factory.mktemp("tagger") / "teacher"), task="token-classification",
        learning_rate=0.01, batch_size=16,
    )  # fmt: skip
    return finetune(options)


def test_an_encoder_becomes_a_tagger(tagger: Any, conll: Path) -> None:
    assert tagger.label_names == ("B-LOC", "B-PER", "I-LOC", "O")
    assert (tagger.rows, tagger.unlabelled) == (60, 0)
    assert tagger.f1 == 1.0  # the tags follow from the words
    assert tagger.accuracy == 1.0
    (found,) = evaluate(EvaluateOptions(student=(tagger.out,), corpus=(str(conll),))).models
    assert (found.entity_f1, found.accuracy) == (1.0, 1.0)
    model = AutoModelForTokenClassification.from_pretrained(tagger.out)
    assert model.config.id2label == {0: "B-LOC", 1: "B-PER", 2: "I-LOC", 3: "O"}


def test_balanced_classes_and_rows_without_tags(
    encoder: Path, tagged_corpus: Path, tmp_path: Path
) -> None:
    options = FinetuneOptions(
        model=str(encoder), corpus=(str(tagged_corpus),), epochs=1, out=str(tmp_path / "t"),
        task="token-classification", class_weights="balanced", label_names=TAGS,
    )  # fmt: skip
    result = finetune(options)
    lines = [json.loads(line)["ner_tags"] for line in tagged_corpus.read_text().splitlines()]
    rows = sum(any(tag is not None for tag in tags or ()) for tags in lines)
    assert (result.rows, result.unlabelled, result.label_names) == (rows, 90 - rows, TAGS)


def test_an_evaluation_without_entities_selects_no_epoch(
    encoder: Path, conll: Path, tmp_path: Path
) -> None:
    (tmp_path / "dev.conll").write_text("the NN O\n. NN O\n\n")
    options = FinetuneOptions(
        model=str(encoder), corpus=(str(conll),), eval_corpus=(str(tmp_path / "dev.conll"),),
        out=str(tmp_path / "t"), task="token-classification",
        label_names=("B-LOC", "B-PER", "I-LOC", "O"),
    )  # fmt: skip
    with pytest.raises(UsageError, match="no row of --eval-corpus .* has an entity, so its F1"):
        finetune(options)


def test_predictions_of_lists_texts_and_standard_input(tagger: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"tokens": ["Smith", "New York"]}\n{"tokens": []}\n{"tokens": null}\n'
    )
    (tmp_path / "b.jsonl").write_text('{"text": "Smith  the Smith"}\n')
    found: dict[str, list[Any]] = {}
    for name in ("a", "b", "-"):
        sink = io.StringIO()
        corpus = "-" if name == "-" else str(tmp_path / f"{name}.jsonl")
        predict(
            PredictOptions(student=tagger.out, corpus=(corpus,)), lines=["Smith\n"], output=sink
        )
        found[name] = [json.loads(line) for line in sink.getvalue().splitlines()]
    assert [line["tokens"] for line in found["a"]] == [["Smith", "New York"], [], []]
    assert found["b"][0]["tokens"] == ["Smith", "the", "Smith"]
    assert len(found["b"][0]["tags"]) == 3
    assert found["-"][0]["tokens"] == ["Smith"]


def test_words_beyond_what_a_tagger_reads_have_no_tag_and_are_counted(
    tagger: Any, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"tokens": ["the"] * 50}) + "\n")
    out = tmp_path / "found.jsonl"
    result = predict(
        PredictOptions(student=tagger.out, corpus=(str(tmp_path / "a.jsonl"),), out=str(out))
    )
    tags = json.loads(out.read_text())["tags"]
    assert result.cut == tags.count(None) == 50 - 38
    assert tags[38:] == [None] * 12
