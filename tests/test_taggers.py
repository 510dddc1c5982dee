"""Commands about taggers: made by `finetune`, asked by `predict`, looked at by all others."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from conftest import TAGS, WORDPIECE
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
)

from kdcache.cache import Cache
from kdcache.cli.main import cli
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.evaluate.evaluate import evaluate
from kdcache.commands.export import export
from kdcache.commands.finetune.finetune import finetune
from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.commands.inspect import inspect
from kdcache.commands.options import (
    EvaluateOptions,
    ExportOptions,
    InspectOptions,
    PlanOptions,
    PredictOptions,
    ReportOptions,
    TranscodeOptions,
    VerifyOptions,
)
from kdcache.commands.plan.plan import plan
from kdcache.commands.predict.predict import predict
from kdcache.commands.report.report import report
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.commands.transcode import transcode
from kdcache.commands.verify import verify
from kdcache.errors import UsageError
from kdcache.teacher.adapter import quiet_peft

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


def test_an_adapter_teaches_a_student_with_word_vectors(
    encoder: Path, conll: Path, tmp_path: Path
) -> None:
    """`finetune --lora`, a build of the adapter, and vectors of lower-cased text."""
    peft = pytest.importorskip("peft", reason="the extra lora")
    adapter, cache, run = (str(tmp_path / name) for name in ("adapter", "cache", "run"))
    given: dict[str, Any] = {"task": "token-classification", "corpus": (str(conll),)}
    finetune(
        FinetuneOptions(model=str(encoder), out=adapter, lora="r=4", learning_rate=0.02, **given)
    )
    build(BuildOptions(teacher=(adapter,), out=cache, workers=0, **given))
    with quiet_peft():
        alone = peft.AutoPeftModelForTokenClassification.from_pretrained(adapter, num_labels=4)
    data, tokenizer = Cache.open(cache).read(0), AutoTokenizer.from_pretrained(adapter)
    assert data.words is not None
    encoded = tokenizer(list(data.words[0]), is_split_into_words=True, return_tensors="pt")
    with torch.inference_mode():
        want = alone(**encoded).logits[0]
    ids = encoded.word_ids()
    first = [ids.index(i) for i in range(len(data.words[0]))]
    got = torch.from_numpy(data.targets.columns["logits"][: len(first)])
    torch.testing.assert_close(got, want[first], rtol=0, atol=1e-5)

    (tmp_path / "vectors.txt").write_text("new 1 2\nyork 3 4\nthe 5 6\nNEW 7 8\n")
    options: dict[str, Any] = {"embeddings": str(tmp_path / "vectors.txt"), "hidden_size": 4}
    result = train(TrainOptions((cache,), student="bilstm", out=run, max_steps=2, **options))
    assert result.pretrained == 3  # New, York, the; Smith and the full stop have none
    (teacher, student) = evaluate(EvaluateOptions((run,), cache)).models
    assert (teacher.accuracy, student.kl) > (0.5, 0)  # type: ignore[operator]


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_width": 8}, "--head-width is for classifiers of whole texts"),
        (
            {"task": "causal-lm"},
            "and sequence-to-sequence models. Train a language model with transformers or TRL",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    options = {"task": "token-classification", **options}
    with pytest.raises(UsageError, match=message):
        FinetuneOptions(model="m", corpus=("a",), out="b", **options)


def test_predictions_are_one_tag_a_word_in_the_order_of_the_input(
    tagger: Any, conll: Path, tmp_path: Path
) -> None:
    out = tmp_path / "found.jsonl"
    result = predict(PredictOptions(student=tagger.out, corpus=(str(conll),), out=str(out)))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    want = [part.split("\n") for part in conll.read_text().strip().split("\n\n")]
    assert result.records == len(lines) == len(want)
    for line, sentence in zip(lines, want, strict=True):
        assert line["tokens"] == [word.split()[0] for word in sentence]
        assert line["tags"] == [word.split()[2] for word in sentence]
        assert all(0.25 < p <= 1 for p in line["probabilities"])


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


def test_a_row_is_shown_by_its_tokens(tag_caches: dict[str, str]) -> None:
    cache = Cache.open(tag_caches["first"])
    row = inspect(InspectOptions(cache=tag_caches["first"], row=1)).row
    assert row is not None
    data = cache.read(0)
    assert data.words is not None
    assert row.text == " ".join(data.words[1])
    assert len(row.positions) == len(data.words[1])
    assert {position.label_text for position in row.positions} <= {None, *TAGS}


def test_parquet_holds_words_and_targets(tag_caches: dict[str, str], tmp_path: Path) -> None:
    export(ExportOptions(cache=tag_caches["all"], out=str(tmp_path / "out")))
    table = pq.read_table(tmp_path / "out")
    cache = Cache.open(tag_caches["all"])
    data = cache.read(0)
    row = table.slice(0, 1).to_pylist()[0]
    assert data.words is not None
    assert row["words"] == list(data.words[0])
    assert sum(row["first_tokens"]) == len(row["words"])
    marked = [tail is not None for tail in row["target_tail"]]
    assert marked == [label != -100 for label in data.row(0).labels]
    assert [len(ids) for ids in row["target_ids"]] == [5 * there for there in marked]
    assert all(label >= 0 or label == -100 for label in row["labels"])


def test_a_cache_is_verified_against_its_teacher_and_encoded_anew(
    tag_caches: dict[str, str], tiny_tagger: Path, tmp_path: Path
) -> None:
    found = verify(VerifyOptions(cache=tag_caches["all"], teacher=(str(tiny_tagger),)))
    assert not found.problems
    options = TranscodeOptions(
        cache=tag_caches["first"], out=str(tmp_path / "b"), codec="dense:float16", workers=0
    )
    transcode(options)
    ours, theirs = (Cache.open(url).read(1) for url in (tag_caches["first"], options.out))
    assert ours.words == theirs.words
    assert torch.allclose(
        ours.targets.at(2.0).logits, theirs.targets.at(2.0).logits, atol=1e-2  # type: ignore[union-attr]
    )  # fmt: skip
    assert not verify(VerifyOptions(cache=options.out)).problems


def test_plan_and_report_know_words(
    tiny_tagger: Path, tagged_corpus: Path, tag_caches: dict[str, str], tmp_path: Path
) -> None:
    result = plan(
        PlanOptions(
            teacher=(str(tiny_tagger),), corpus=(str(tagged_corpus),), task="token-classification"
        )
    )
    assert {found.codec for found in result.caches} >= {"dense", "dense:float16"}
    assert result.corpus_positions > 90
    report(ReportOptions(paths=(tag_caches["first"],), out=str(tmp_path / "page.html")))
    assert "B-PER" in (tmp_path / "page.html").read_text()


def test_the_command_line_tags_a_file(tagger: Any, conll: Path) -> None:
    words = ["predict", "--student", tagger.out, "--corpus", str(conll), "--limit", "2"]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 2
