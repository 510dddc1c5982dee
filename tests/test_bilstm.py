"""The biLSTM of Tang et al. 2019: its forward, its words and its word vectors."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertTokenizer

from kdcache.errors import UsageError
from kdcache.student import (
    BiLstmConfig,
    DistilledStudent,
    StudentInfo,
    load_student,
    read_embeddings,
    student_tokenize,
    word_tokenizer,
)
from kdcache.student.bilstm import BiLstmForSequenceClassification
from kdcache.student.tokens import unknown_share

V = 40
TEXTS = ["A fine film, isn't it?", "A dull film.", "Fine!"]
CLASSES = StudentInfo(
    "sequence-classification", vocab_size=V, num_labels=2, label_names=("bad", "good"), texts=TEXTS
)


def test_bilstm_is_the_documented_one() -> None:
    """Last states of both directions, unpadded: computed here one word after the other."""
    torch.manual_seed(0)
    model = BiLstmForSequenceClassification(BiLstmConfig(vocab_size=9, num_labels=3)).eval()
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
    model = BiLstmForSequenceClassification(
        BiLstmConfig(vocab_size=9, num_labels=2, pooling="max", layers=2, dropout=0.5)
    ).eval()
    ids = torch.tensor([[3, 4, 5, 0, 0], [6, 7, 8, 3, 4]])
    torch.testing.assert_close(model(ids).logits[0], model(ids[:1, :3]).logits[0])


@pytest.mark.parametrize("freeze", [False, True])
def test_bilstm_starts_as_torch_makes_its_parts(freeze: bool) -> None:
    """Layers in this order from the seed alone, then word vectors; nothing else is drawn."""
    sizes = {"embedding_size": 6, "hidden_size": 4, "dense_size": 5, "layers": 2}
    config = BiLstmConfig(vocab_size=9, num_labels=3, freeze_embeddings=freeze, **sizes)
    torch.manual_seed(5)
    model = BiLstmForSequenceClassification(config)
    after = torch.rand(1)
    torch.manual_seed(5)
    parts = {
        "embedding": torch.nn.Embedding(9, 6, padding_idx=0),
        "lstm": torch.nn.LSTM(6, 4, 2, batch_first=True, bidirectional=True),
        "dense": torch.nn.Linear(8, 5),
        "classes": torch.nn.Linear(5, 3),
    }
    torch.nn.init.normal_(parts["embedding"].weight, std=0.1)
    want = {f"{n}.{k}": v for n, part in parts.items() for k, v in part.state_dict().items()}
    want["embedding.weight"][0] = 0
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {
        k: v.tolist() for k, v in want.items()
    }
    assert torch.equal(after, torch.rand(1))
    assert model.embedding.weight.requires_grad is not freeze


@pytest.mark.parametrize("source", ["words", "teacher"])
def test_bilstm_round_trip(tmp_path: Path, source: str) -> None:
    sizes = {
        "embedding_size": 6,
        "hidden_size": 4,
        "dense_size": 5,
        "dropout": 0.1,
        "freeze_embeddings": True,
    }
    model: Any = load_student("bilstm", CLASSES, options={**sizes, "tokenizer": source})
    assert (model.tokenizer is None) == (source == "teacher")
    DistilledStudent(model, CLASSES.task).save_pretrained(tmp_path / "run")
    again: Any = load_student(str(tmp_path / "run"), CLASSES)
    assert {name: getattr(again.config, name) for name in sizes} == sizes
    assert again.config.id2label == {0: "bad", 1: "good"}
    assert not again.embedding.weight.requires_grad
    ids = torch.tensor([[3, 4, 1]])
    for loaded in (again, AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")):
        torch.testing.assert_close(loaded.eval()(ids).logits, model.eval()(ids).logits)
    tokenize = student_tokenize(again, str(tmp_path / "run"), CLASSES)
    assert (tokenize is None) == (source == "teacher")
    if tokenize is not None:
        own = student_tokenize(model, "bilstm", CLASSES)
        assert own is not None
        assert tokenize(TEXTS, None)["input_ids"].tolist() == own(TEXTS, None)["input_ids"].tolist()
    fresh: Any = load_student(str(tmp_path / "run" / "config.json"), CLASSES)
    assert fresh.config.hidden_size == 4
    with pytest.raises(UsageError, match="2 classes, the cache has 3"):
        load_student(str(tmp_path / "run"), StudentInfo(CLASSES.task, V, 3))
    (tmp_path / "run" / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"no weights: expected \*\.safetensors"):
        load_student(str(tmp_path / "run"), CLASSES)


@pytest.mark.parametrize("pooling", ["last", "max"])
def test_a_text_without_words_is_padding_alone_and_in_a_batch(pooling: str) -> None:
    model: Any = load_student("bilstm", CLASSES, options={"pooling": pooling})
    tokenize = student_tokenize(model, "bilstm", CLASSES)
    assert tokenize is not None
    together = model.eval()(**tokenize(["a dull film", " "], None)).logits
    alone = model(**tokenize(["", "\n"], None)).logits
    torch.testing.assert_close(alone[0], together[1])
    torch.testing.assert_close(alone[1], together[1])


# --- words ---


def words_of(tokenizer: Any) -> list[str]:
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.__getitem__)


def test_vocabulary_is_a_function_of_the_texts_alone() -> None:
    words = word_tokenizer(TEXTS, max_length=6)
    special = ["<pad>", "<unk>", "<sep>"]
    assert words_of(words) == [
        *special, "a", "film", "fine", "!", ",", ".", "?", "dull", "isn't", "it",
    ]  # fmt: skip
    assert words_of(words) == words_of(word_tokenizer(reversed(TEXTS)))
    assert words("Fine films")["input_ids"] == [5, 1]
    assert words("a", "film")["input_ids"] == [3, 2, 4]
    assert words("")["input_ids"] == []
    assert words("a a a a a a a a", truncation=True)["input_ids"] == [3] * 6
    batch = words(["a film", "?"], padding=True)
    assert batch["input_ids"] == [[3, 4], [9, 0]]
    assert batch["attention_mask"] == [[1, 1], [1, 0]]
    assert len(word_tokenizer(TEXTS, min_count=2)) == 6
    assert len(word_tokenizer(TEXTS, max_words=4)) == 4
    assert "A" in word_tokenizer(TEXTS, lower=False).get_vocab()
    with pytest.raises(UsageError, match="no word occurs 9 times"):
        word_tokenizer(TEXTS, min_count=9)


def test_words_of_many_scripts() -> None:
    """CJK characters stand alone, as in BERT; whatever is spelt like a special token is text."""
    bert = BertTokenizer(vocab={"[UNK]": 0, "[PAD]": 1, "[SEP]": 2, "[CLS]": 3, "[MASK]": 4})
    split = bert.backend_tokenizer
    cases = {
        "这家酒店非常好。房间很大": list("这家酒店非常好。房间很大"),
        "iPhone手机64GB": ["iphone", "手", "机", "64gb"],
        "東京タワー𠀀": ["東", "京", "タワー", "𠀀"],
        "naïve\u3000café <pad>": ["naïve", "café", "<", "pad", ">"],
        "हिन्दी don\u2019t": ["हिन्दी", "don\u2019t"],
    }
    for text, want in cases.items():
        words = word_tokenizer([text])
        assert set(words_of(words)[3:]) == set(want), text
        assert [words.decode([i]) for i in words(text)["input_ids"]] == want
        assert 0 not in words(text)["input_ids"]
        cjk = {w for w in want if "\u4e00" <= w[0] <= "\u9fff" or w[0] > "\uffff"}
        normal = split.normalizer.normalize_str(text)
        assert cjk <= {w for w, _ in split.pre_tokenizer.pre_tokenize_str(normal)}


def test_share_of_unknown_words() -> None:
    words = word_tokenizer(TEXTS)
    assert unknown_share(words, TEXTS) == 0
    assert unknown_share(words, ["a film", "", "a zebra!"] * 1000) == pytest.approx(1 / 5)
    assert unknown_share(words, []) == 0
    words.unk_token = None
    assert unknown_share(words, TEXTS) is None


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
    assert model.embedding.weight[model.tokenizer("film")["input_ids"][0]].tolist() == [1, 2, 3]
    assert not model.embedding.weight.requires_grad
    assert model.embedding.weight[0].tolist() == [0, 0, 0]


def test_words_without_a_vector_have_that_of_their_lower_case(tmp_path: Path) -> None:
    """A tagger's words keep their case, and most vectors are of lower-cased text."""
    (tmp_path / "vectors.txt").write_text("film 1 2\nParis 3 4\nparis 5 6\nROME 7 8\nus 9 9\n")
    words = ["<pad>", "Film", "film", "FILM", "Paris", "PARIS", "rome", "US"]
    found, vectors = read_embeddings(tmp_path / "vectors.txt", words)
    assert found.tolist() == [word not in ("<pad>", "rome") for word in words]
    want = [[0, 0], [1, 2], [1, 2], [1, 2], [3, 4], [5, 6], [0, 0], [9, 9]]
    assert vectors.tolist() == want


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
