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
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from kdcache.cache import Cache
from kdcache.commands.options import PredictOptions
from kdcache.commands.predict import predict
from kdcache.errors import UsageError

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
