"""The biLSTM of Tang et al. 2019: its forward, its words and its word vectors."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcache.errors import UsageError
from kdcache.student import (
    BiLstmClassifier,
    BiLstmConfig,
    DistilledStudent,
    StudentInfo,
    Vocabulary,
    load_student,
    read_embeddings,
    student_tokenize,
)

V = 40
TEXTS = ["A fine film, isn't it?", "A dull film.", "Fine!"]
CLASSES = StudentInfo(
    "sequence-classification", vocab_size=V, num_labels=2, label_names=("bad", "good"), texts=TEXTS
)


def test_bilstm_is_the_documented_one() -> None:
    """Last states of both directions, unpadded: computed here one word after the other."""
    torch.manual_seed(0)
    model = BiLstmClassifier(BiLstmConfig(vocab_size=9, num_labels=3)).eval()
    sizes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sizes["embedding.weight"] == (9, 300)
    assert sizes["lstm.weight_hh_l0_reverse"] == (1024, 256)
    assert sizes["dense.weight"] == (128, 512)
    assert sizes["classes.weight"] == (3, 128)
    ids = torch.tensor([[3, 4, 5, 0, 0], [6, 7, 8, 3, 4]])
    got = model(ids, (ids > 0).long()).logits
    torch.testing.assert_close(model(ids).logits, got)
    for row, length in ((0, 3), (1, 5)):
        ends = []
        for suffix, words in (("l0", ids[row, :length]), ("l0_reverse", ids[row, :length].flip(0))):
            h, c = torch.zeros(256), torch.zeros(256)
            for word in words:
                gates = (
                    getattr(model.lstm, f"weight_ih_{suffix}") @ model.embedding.weight[word]
                    + getattr(model.lstm, f"bias_ih_{suffix}")
                    + getattr(model.lstm, f"weight_hh_{suffix}") @ h
                    + getattr(model.lstm, f"bias_hh_{suffix}")
                )
                i, f, g, o = gates.chunk(4)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            ends.append(h)
        want = model.classes(torch.relu(model.dense(torch.cat(ends))))
        torch.testing.assert_close(got[row], want, rtol=1e-4, atol=1e-5)


def test_bilstm_max_pooling_ignores_padding() -> None:
    model = BiLstmClassifier(
        BiLstmConfig(vocab_size=9, num_labels=2, pooling="max", layers=2, dropout=0.5)
    ).eval()
    ids = torch.tensor([[3, 4, 5, 0, 0], [6, 7, 8, 3, 4]])
    torch.testing.assert_close(model(ids).logits[0], model(ids[:1, :3]).logits[0])


@pytest.mark.parametrize("source", ["words", "teacher"])
def test_bilstm_round_trip(tmp_path: Path, source: str) -> None:
    sizes = {
        "embedding_size": 6,
        "hidden_size": 4,
        "dense_size": 5,
        "dropout": 0.1,
        "tokenizer": source,
    }
    model: Any = load_student("bilstm", CLASSES, options=sizes)
    assert (model.vocabulary is None) == (source == "teacher")
    DistilledStudent(model, CLASSES.task).save_pretrained(tmp_path / "run")
    again: Any = load_student(str(tmp_path / "run"), CLASSES)
    assert again.config == model.config
    assert again.vocabulary == model.vocabulary
    assert again.config.id2label == {0: "bad", 1: "good"}
    ids = torch.tensor([[3, 4, 1]])
    torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits)
    tokenize = student_tokenize(again, str(tmp_path / "run"), CLASSES)
    assert (tokenize is None) == (source == "teacher")
    with pytest.raises(UsageError, match="2 classes, the cache has 3"):
        load_student(str(tmp_path / "run"), StudentInfo(CLASSES.task, V, 3))
    (tmp_path / "run" / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model\.safetensors not found"):
        load_student(str(tmp_path / "run"), CLASSES)


def test_vocabulary_is_a_function_of_the_texts_alone(tmp_path: Path) -> None:
    words = Vocabulary.build(TEXTS, max_length=6)
    assert words.words == (
        "<pad>",
        "<unk>",
        "<sep>",
        "a",
        "film",
        "fine",
        "!",
        ",",
        ".",
        "?",
        "dull",
        "isn't",
        "it",
    )
    assert words == Vocabulary.build(reversed(TEXTS), max_length=6)
    assert words.ids("Fine films") == [5, 1]
    assert words.ids("a", "film") == [3, 2, 4]
    assert words.ids("") == [1]
    assert words.ids("a a a a a a a a") == [3] * 6
    batch = words(["a film", "?"])
    assert batch["input_ids"].tolist() == [[3, 4], [9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    words.save(tmp_path / "vocab.json")
    assert Vocabulary.load(tmp_path / "vocab.json") == words
    assert len(Vocabulary.build(TEXTS, min_count=2)) == 6
    assert len(Vocabulary.build(TEXTS, max_size=4)) == 4
    assert "A" in Vocabulary.build(TEXTS, lower=False).words
    with pytest.raises(UsageError, match="no word occurs 9 times"):
        Vocabulary.build(TEXTS, min_count=9)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UsageError, match="not a vocabulary"):
        Vocabulary.load(tmp_path / "vocab.json")


@pytest.mark.parametrize("form", ["glove", "word2vec", "gz"])
def test_embeddings(tmp_path: Path, form: str) -> None:
    text = "film 1 2 3\nnew york 9 9 9\nunseen x y z\nfine -0.5 0 1e-2\nfilm 7 7 7\n"
    path = tmp_path / ("vectors.txt.gz" if form == "gz" else "vectors.txt")
    if form == "gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(("5 3\n" if form == "word2vec" else "") + text)
    found, vectors = read_embeddings(path, ["<pad>", "film", "fine", "new york"])
    assert found.tolist() == [False, True, True, True]
    torch.testing.assert_close(vectors[1:3], torch.tensor([[1.0, 2, 3], [-0.5, 0, 0.01]]))
    model: Any = load_student(
        "bilstm", CLASSES, embeddings=path, options={"freeze_embeddings": True}
    )
    assert model.config.embedding_size == 3
    assert model.embedding.weight[model.vocabulary.ids("film")[0]].tolist() == [1, 2, 3]
    assert not model.embedding.weight.requires_grad
    assert model.embedding.weight[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("content", "size", "message"),
    [
        (None, None, "no such file"),
        (b"film 1 2\n", 3, "expected 3"),
        (b"film 1 two\n", None, "not a GloVe"),
        (b"\xff\xfe\x00", None, "not a GloVe"),
        (b"elephant 1 2\n", None, "none of the 1 words"),
        (b"", None, "none of the 1 words"),
        (b"justtext\n", None, "not a text file of word vectors|expected"),
    ],
)
def test_wrong_embeddings(
    tmp_path: Path, content: bytes | None, size: int | None, message: str
) -> None:
    path = tmp_path / "vectors.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_embeddings(path, ["film"], size)


def test_truncated_embeddings(tmp_path: Path) -> None:
    path = tmp_path / "vectors.gz"
    path.write_bytes(gzip.compress(b"elephant 1 2\n" * 9999)[:-20])
    with pytest.raises(UsageError, match="not a GloVe"):
        read_embeddings(path, ["film"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "hidden_size 0"),
        ({"dropout": 1.0}, "dropout 1"),
        ({"pooling": "mean"}, "last, max"),
        ({"sizes": 3}, "no option sizes"),
        ({"tokenizer": "letters"}, "words or teacher"),
    ],
)
def test_wrong_bilstm_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_student("bilstm", CLASSES, options=options)
