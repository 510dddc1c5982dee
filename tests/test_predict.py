"""predict against forwards that share no code with it."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES
from make_caches import word_tokenizer
from textbook import class_logits, logprobs_of, word_logits
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from zoo import make

import kdcache
from kdcache.cache import Cache
from kdcache.commands.options import PredictOptions
from kdcache.commands.predict import Writer, predict
from kdcache.errors import UsageError
from kdcache.student.saved import SavedModel

pytestmark = pytest.mark.slow


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_predictions_come_in_order_whatever_the_batches(
    labelled_corpus: Path,
    student_classifier: Path,
    class_cache: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(sys.modules["kdcache.commands.predict"], "_WINDOW", 7)
    out = tmp_path / "new" / "out.jsonl"
    options = PredictOptions(
        str(student_classifier), (str(labelled_corpus),), str(out), batch_tokens=71
    )
    result = predict(options)
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


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_text_without_tokens_gets_its_line(kind: str, tmp_path: Path) -> None:
    """Also where the tokenizer adds nothing to it."""
    config = AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, pad_token_id=0, num_labels=2,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    for name, content in word_tokenizer().items():
        (tmp_path / name).write_bytes(content)
    output = io.StringIO()
    predict(PredictOptions(str(tmp_path), ("-",)), lines=["", "w3 w4", " "], output=output)
    found = lines_of(output.getvalue())
    assert [record["text"] for record in found] == ["", "w3 w4", " "]
    assert found[0]["probabilities"] == pytest.approx(found[2]["probabilities"])
    with torch.no_grad():
        want = model(torch.tensor([[3, 4]])).logits.softmax(-1)[0]
    assert list(found[1]["probabilities"].values()) == pytest.approx(want.tolist(), abs=1e-5)


@pytest.mark.parametrize("value", ["half \ud800", 5, float("nan"), ["a"]])
def test_what_is_no_text_is_refused_or_counted(
    value: Any, student_classifier: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", value, None)))
    options = PredictOptions(str(student_classifier), (str(file),))
    with pytest.raises(UsageError, match=r"rows.jsonl: line 2: column 'text' holds"):
        predict(options, output=io.StringIO())
    output = io.StringIO()
    result = predict(dataclasses.replace(options, on_error="skip"), output=output)
    assert (result.records, result.skipped) == (2, 1)
    assert [record["text"] for record in lines_of(output.getvalue())] == ["a", ""]


def test_standard_input_that_is_no_text_is_refused(
    student_classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = PredictOptions(str(student_classifier), ("-",))
    with pytest.raises(UsageError, match="standard input: line 2: column 'text' holds half"):
        predict(options, lines=["a\n", "\udcff\n"], output=io.StringIO())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n\xff\n"), "utf-8"))
    with pytest.raises(UsageError, match=r"standard input is not text in utf-8 \(byte 0xff\)"):
        predict(options, output=io.StringIO())


def test_prediction_streams(student_classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than one window is read ahead of what is written."""
    monkeypatch.setattr(sys.modules["kdcache.commands.predict"], "_WINDOW", 10)
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
    with pytest.raises(UsageError, match="cannot be combined"):
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
    with pytest.raises(UsageError, match="file is not a folder"):
        predict(
            PredictOptions(str(student_classifier), ("-",), str(tmp_path / "file" / "o")), lines=[]
        )


# What a model's `generation_config.json` says of targets

SEARCHES: list[tuple[int, dict[str, Any]]] = [  # beams, and what the file says besides
    (1, {"num_beams": 4, "num_return_sequences": 4}),
    (3, {"return_dict_in_generate": True, "output_scores": True}),
    (1, {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9}),
    (1, {"penalty_alpha": 0.6, "top_k": 4}),
    (3, {"num_beam_groups": 2, "diversity_penalty": 1.0}),
    (1, {"prompt_lookup_num_tokens": 3}),
    (1, {"guidance_scale": 1.5}),
    (1, {"cache_implementation": "quantized"}),
    (3, {"low_memory": True}),
    (1, {"token_healing": True}),
    (3, {"force_words_ids": [[5]]}),
    (1, {"max_length": 3}),
]


@pytest.fixture
def model(corpus_texts: list[str], tmp_path: Path) -> Path:
    bpe = ByteLevelBPETokenizer()
    special = ["<|end|>", "<pad>"]
    bpe.train_from_iterator(corpus_texts, 300, special_tokens=special, show_progress=False)
    bpe._tokenizer.post_processor = TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", 0)]
    )
    names = dict(zip(("eos_token", "pad_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)
    species = make("t5", decoder_start_token_id=1)
    folder = species.save(tmp_path / "model", AutoModelForSeq2SeqLM, tokenizer)
    lines = [{"source": text[:30]} for text in corpus_texts[:5]]
    (tmp_path / "sources.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def written(folder: Path, beams: int) -> list[str]:
    out = folder.parent / "targets.jsonl"
    corpus = str(folder.parent / "sources.jsonl")
    kdcache.predict(PredictOptions(str(folder), (corpus,), str(out), max_length=8, beams=beams))
    return [json.loads(line)["target"] for line in out.read_text().splitlines()]


def say(folder: Path, **changes: Any) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_search_is_that_of_the_options(model: Path) -> None:
    plain = {beams: written(model, beams) for beams in (1, 3)}
    before = (model / "generation_config.json").read_text()
    for beams, search in SEARCHES:
        say(model, **search)
        assert written(model, beams) == plain[beams], (search, beams)
        (model / "generation_config.json").write_text(before)


def test_what_it_says_of_the_tokens_of_a_target_holds(model: Path) -> None:
    say(model, forced_bos_token_id=7, stop_strings=["\u2603"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    assert all(target.startswith(tokenizer.decode([7])) for target in written(model, 1))


def test_one_that_transformers_refuses_is_one_line(model: Path) -> None:
    say(model, num_return_sequences=3)
    with pytest.raises(UsageError, match="num_return_sequences") as error:
        written(model, 1)
    assert "\n" not in str(error.value)


def test_sources_beyond_a_model_s_original_length_share_no_batch(model: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    sparse = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}
    species = make("bigbird_pegasus", decoder_start_token_id=1, **sparse)
    folder = species.save(model.parent / "sparse", AutoModelForSeq2SeqLM, tokenizer)
    options = PredictOptions(str(folder), ("-",), max_length=8)
    writer = Writer(options, SavedModel.find(str(folder)), "seq2seq-lm", "cpu")
    texts = ["a b c " * 30, "a b c " * 20, "a b", "a", "b"]
    assert len(writer.write(texts)) == 5
    assert writer._probe.batching == "padded"
    rows, _ = writer._rows(texts)
    for batching, want in (
        ("padded", [[0], [1], [2, 3, 4]]),
        ("equal lengths", [[0], [1], [2], [3, 4]]),
        ("one by one", [[i] for i in range(5)]),
    ):
        writer._probe.batching = batching  # type: ignore[assignment]
        assert list(writer._batches(range(5), rows)) == want
