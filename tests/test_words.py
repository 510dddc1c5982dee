"""Rows of words: each word keeps its own label, whatever a tokenizer makes of it."""

from __future__ import annotations

import functools
import gzip
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertTokenizerLegacy

from kdcache.cache.shard import ShardData, read_shard, write_shard
from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.commands.finetune.trainer import label_names_of
from kdcache.corpus import Corpus, Record
from kdcache.errors import CorruptCacheError, UsageError
from kdcache.rows import Row, RowSpec, make_encoder
from kdcache.rows.words import ReadWords, WordReader
from kdcache.student import word_tokenizer
from kdcache.targets import Codec, TargetWriter
from kdcache.tasks import IGNORE, TOKEN_CLASSIFICATION, UNLABELLED

TOKENIZERS = Path(__file__).resolve().parent / "tiny_tokenizers"
KINDS = ("bytes", "wordpiece", "pieces")
NAMES = ("O", "B-PER", "I-PER", "B-LOC")
WORD = st.text("ab'. \u200b\x07é中", max_size=6)


@functools.cache
def tokenizer(kind: str) -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZERS / kind)


def rows_of(values: dict[str, Any], kind: str = "wordpiece", **options: Any) -> list[Row]:
    options = {"label_names": NAMES, **options}
    spec = RowSpec(task=TOKEN_CLASSIFICATION, **options)
    return list(make_encoder(spec, tokenizer(kind)).encode([Record(values, "a.jsonl", "line 1")]))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KINDS), st.lists(WORD, min_size=1, max_size=12), st.integers(4, 40))
def test_each_word_that_is_kept_has_its_own_label(kind: str, words: list[str], length: int) -> None:
    tags = [None if i % 5 == 3 else i % len(NAMES) for i in range(len(words))]
    want = [UNLABELLED if tag is None else tag for tag in tags]
    (row,) = rows_of({"tokens": words, "tags": tags}, kind, max_length=length)
    assert row.first is not None
    assert row.words is not None
    assert len(row.input_ids) == len(row.labels) == len(row.first) <= length
    kept = len(row.words)
    assert 1 <= kept <= len(words)
    assert list(row.words) == words[:kept]
    assert row.labels[row.first].tolist() == want[:kept]
    assert (row.labels[~row.first] == IGNORE).all()
    assert row.positions(TOKEN_CLASSIFICATION).tolist() == np.flatnonzero(row.first).tolist()

    (every,) = rows_of({"tokens": words, "tags": tags}, kind, max_length=length, label_tokens="all")
    assert every.first is not None
    assert np.array_equal(every.first, row.first)
    # Each token of a word has the label of the first token before it.
    inside = np.flatnonzero(every.labels != IGNORE)
    owner = np.cumsum(row.first)[inside] - 1
    assert every.labels[inside].tolist() == [want[i] for i in owner]
    assert set(np.flatnonzero(row.first)) <= set(inside)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_that_cuts_texts_on_the_left_keeps_the_first_words(kind: str) -> None:
    left = AutoTokenizer.from_pretrained(TOKENIZERS / kind, truncation_side="left")
    sentence = [f"w{i}" for i in range(30)]
    (read,) = WordReader(left).read([sentence], 12)
    (want,) = WordReader(tokenizer(kind)).read([sentence], 12)
    assert isinstance(read, ReadWords)
    assert isinstance(want, ReadWords)
    assert read.ids.tolist() == want.ids.tolist()
    assert read.word_of[read.first][0] == 0
    assert left.truncation_side == "left"


def test_all_tokens_of_a_word_have_its_label_and_the_tokenizers_own_have_none() -> None:
    values = {"tokens": ["New York", "fox"], "tags": ["B-LOC", "O"]}
    (row,) = rows_of(values, label_tokens="all")
    pieces = tokenizer("wordpiece").convert_ids_to_tokens(row.input_ids.tolist())
    assert pieces == ["[CLS]", "new", "y", "##o", "##r", "##k", "f", "##o", "##x", "[SEP]"]
    assert row.labels.tolist() == [IGNORE, 3, 3, 3, 3, 3, 0, 0, 0, IGNORE]
    assert row.type_ids is not None
    assert not row.type_ids.any()


def test_a_word_without_a_token_is_read_as_unknown_and_moves_no_label() -> None:
    values = {"tokens": ["The", "\x07", "", "end"], "tags": ["O", "B-PER", "I-PER", "B-LOC"]}
    for kind, unknown in (("wordpiece", "[UNK]"), ("pieces", "<unk>")):
        (row,) = rows_of(values, kind)
        assert row.first is not None
        first = tokenizer(kind).convert_ids_to_tokens(row.input_ids[row.first].tolist())
        assert first[2] == unknown
        assert row.labels[row.first].tolist() == [0, 1, 2, 3]


def test_byte_level_tokenizers_read_each_word_with_the_blank_before_it() -> None:
    """As `add_prefix_space` does, which taggers of such tokenizers are trained with."""
    own = tokenizer("bytes")
    ((first, second),) = [
        own.convert_ids_to_tokens(read.ids[read.first].tolist())
        for read in WordReader(own).read([["The", "The"]])
        if not isinstance(read, str)
    ]
    assert first == second == "ĠThe"


def test_slow_tokenizers_are_refused() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vocab.txt")
        path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
        with pytest.raises(UsageError, match="does not tell which word a token is of"):
            WordReader(BertTokenizerLegacy(str(path)))


def test_what_is_cut_is_counted_and_records_without_words_are_empty() -> None:
    spec = RowSpec(task=TOKEN_CLASSIFICATION, max_length=6, label_names=NAMES)
    encoder = make_encoder(spec, tokenizer("wordpiece"))
    values = [["a"] * 9, [], None, ["b"] * 4]
    rows = list(
        encoder.encode([Record({"tokens": v}, "a", f"line {i}") for i, v in enumerate(values)])
    )
    assert [len(row.words or ()) for row in rows] == [4, 4]
    assert (encoder.truncated, encoder.empty) == (1, 2)
    assert all((row.labels[row.first] == UNLABELLED).all() for row in rows)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, r"1 tags in column 'tags' for 2 words in column"),
        ({"tokens": ["a"], "tags": "O"}, "column 'tags' holds text where a list of tags was"),
        ({"tokens": ["a"], "tags": ["B-ORG"]}, r"'B-ORG', .* of the teacher's classes: 0 \(O\)"),
        ({"tokens": ["a"], "tags": [4]}, "a tag is 4, which is not one of"),
        ({"tokens": "a b", "tags": ["O"]}, "column 'tokens' holds text where a list of words"),
        ({"tokens": ["a", 3], "tags": [0, 0]}, "column 'tokens' holds a number where a word was"),
        ({"text": "a b"}, "has no column 'tokens'; its columns are 'text'.* --columns tokens="),
        ({"tokens": ["a"], "tags": [0], "ner_tags": [1]}, "in the columns tags and ner_tags"),
        ({"tokens": ["\ud800"], "tags": [0]}, "column 'tokens' holds half of a surrogate pair"),
    ],
)  # fmt: skip
def test_wrong_records_are_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as found:
        rows_of(values)
    assert "\n" not in str(found.value)
    assert "a.jsonl: line 1" in str(found.value)


def test_a_named_column_of_tags_must_be_there_and_none_reads_no_tags() -> None:
    with pytest.raises(UsageError, match="has no column 'pos'"):
        rows_of({"tokens": ["a"], "tags": [0]}, label_column="pos")
    (row,) = rows_of({"tokens": ["a"], "tags": [1]}, label_column="none")
    assert row.labels.tolist() == [IGNORE, UNLABELLED, IGNORE]
    (row,) = rows_of({"tokens": ["a"], "pos": ["B-PER"], "tags": [0]}, label_column="pos")
    assert row.labels[1] == 1


@pytest.mark.parametrize(
    ("task", "records", "names"),
    [
        (
            "token-classification",
            [
                {"tokens": ["a"], "tags": None, "ner_tags": ["B-X"]},
                {"tokens": ["b"], "tags": ["O"]},
            ],
            ("B-X", "O"),
        ),
        (
            "multi-label-classification",
            [{"labels": None, "label": ["b"]}, {"labels": [], "label": ""}, {"labels": "a, b"}],
            ("a", "b"),
        ),
        ("sequence-classification", [{"label": "b"}, {"label": "a"}], ("a", "b")),
    ],
)
def test_of_several_columns_of_labels_the_filled_one_counts(
    task: Any, records: list[dict[str, Any]], names: tuple[str, ...], tmp_path: Path
) -> None:
    """In fine-tuning, which looks for the classes first, as in the rows themselves."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = FinetuneOptions("m", (str(tmp_path / "a.jsonl"),), "out", task=task)
    assert label_names_of(options) == names
    if task != "sequence-classification":
        column = "ner_tags" if task == "token-classification" else "label"
        (tmp_path / "a.jsonl").write_text(json.dumps({**records[-1], column: ["b"]}) + "\n")
        with pytest.raises(UsageError, match=r"labels in the columns .*--label-column"):
            label_names_of(options)


def test_words_of_a_word_vocabulary_stay_whole() -> None:
    words = word_tokenizer(
        ["don't", "New York", "U.S.", "中国"], lower=False, apart=True, max_length=None
    )
    (read,) = WordReader(words).read([["New York", "don't", "new", "", "中国"]])
    assert not isinstance(read, str)
    assert words.convert_ids_to_tokens(read.ids.tolist()) == [
        "New York",
        "don't",
        "<unk>",
        "<unk>",
        "中国",
    ]
    assert read.first.all()


# Files


def conll(path: Path, count: int, seed: int = 1) -> list[tuple[list[str], list[str]]]:
    """Sentences of CoNLL with documents, and the file that holds them."""
    draw = random.Random(seed)
    text, want = "-DOCSTART- -X- -X- O\n\n", []
    for number in range(count):
        if draw.random() < 0.2:
            text += "-DOCSTART- -X- O\n" + "\n" * draw.randint(0, 2)
        words = [f"w{number}_{i}" for i in range(draw.randint(1, 5))]
        tags = [draw.choice(["O", "B-LOC"]) for _ in words]
        text += "".join(f"{w} NN {t}\n" for w, t in zip(words, tags, strict=True))
        text += draw.choice(["\n", "\n\n", " \n"])
        want.append((words, tags))
    path.write_text("\ufeff" + text.rstrip("\n "), encoding="utf-8")
    return want


def sentences(corpus: Corpus) -> list[tuple[list[str], list[str]]]:
    found = [record.values for span in corpus.spans for record in Corpus.read(span)]
    return [(values["tokens"], values["tags"]) for values in found]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 400), st.integers(0, 50), st.one_of(st.none(), st.integers(1, 45)))
def test_each_sentence_is_read_once_wherever_spans_are_cut(
    span_bytes: int, seed: int, limit: int | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.conll")
        want = conll(path, 40, seed)
        corpus = Corpus.open([str(path)], span_bytes=span_bytes, limit=limit)
        assert sentences(corpus) == want[:limit]


def test_compressed_files_and_other_columns(tmp_path: Path) -> None:
    want = conll(tmp_path / "a.conll", 30)
    packed = tmp_path / "b.iob.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.conll").read_bytes()))
    corpus = Corpus.open([str(packed)], span_bytes=64)
    assert len(corpus.spans) > 3
    assert sorted(sentences(corpus)) == sorted(want)

    (tmp_path / "c.conll").write_text("EU NNP B-ORG\nrejects VBZ O\n\nGerman\tcall sign\tI-X\n")
    named = Corpus.open([str(tmp_path / "c.conll")], span_bytes=999, columns=["form", "pos", "ner"])
    values = [record.values for record in Corpus.read(named.spans[0])]
    assert values == [
        {"form": ["EU", "rejects"], "pos": ["NNP", "VBZ"], "ner": ["B-ORG", "O"]},
        {"form": ["German"], "pos": ["call sign"], "ner": ["I-X"]},
    ]
    (tmp_path / "d.conll").write_text("only\nwords\n")
    (record,) = Corpus.read(Corpus.open([str(tmp_path / "d.conll")], span_bytes=99).spans[0])
    assert record.values == {"tokens": ["only", "words"]}


def test_universal_dependencies(tmp_path: Path) -> None:
    rest = "\t_" * 6
    (tmp_path / "a.conllu").write_text(
        f"# sent_id = 1\n# text = au #1\n1-2\tau\t_\t_{rest}\n1\tà\tà\tADP{rest}\n"
        f"2\tle\tle\tDET{rest}\n2.1\tx\t_\t_{rest}\n3\t#1\t_\tSYM{rest}\n\n"
    )
    (record,) = Corpus.read(Corpus.open([str(tmp_path / "a.conllu")], span_bytes=999).spans[0])
    assert record.values["tokens"] == ["à", "le", "#1"]
    assert record.values["tags"] == ["ADP", "DET", "SYM"]


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("a B O\nb O\n", None, "line 1: the line 'b O' has 2 columns, the first .* has 3"),
        ("a O\n", ["w", "p", "t"], "2 columns where --columns names 3"),
    ],
)  # fmt: skip
def test_wrong_lines_are_refused_in_one_line(
    tmp_path: Path, text: str, columns: Sequence[str] | None, message: str
) -> None:
    (tmp_path / "a.conll").write_text(text)
    corpus = Corpus.open([str(tmp_path / "a.conll")], span_bytes=999, columns=columns)
    with pytest.raises(UsageError, match=message):
        list(Corpus.read(corpus.spans[0]))


# Shards


def shard(words: Sequence[Sequence[str]]) -> ShardData:
    rows = [row for one in words for row in rows_of({"tokens": one, "tags": [1] * len(one)})]
    codec = Codec.parse("dense", (1.0,), len(NAMES))
    positions = sum(len(row.positions(TOKEN_CLASSIFICATION)) for row in rows)
    u = torch.zeros(positions, dtype=torch.float64)
    targets = TargetWriter(codec).write(torch.randn(positions, len(NAMES)), u)
    return ShardData.from_rows(TOKEN_CLASSIFICATION, rows, targets)


@pytest.mark.parametrize("words", [[], [["a"]], [["New York", ""], ["é", "b", "\x07"]]])
def test_a_shard_keeps_words_and_first_tokens(tmp_path: Path, words: list[list[str]]) -> None:
    data = shard(words)
    write_shard(tmp_path / "a.h5", data, attributes={})
    found = read_shard(tmp_path / "a.h5", data.targets.codec)
    assert found.words == [tuple(one) for one in words]
    for i in range(len(words)):
        ours, theirs = data.row(i), found.row(i)
        assert ours.words == theirs.words
        for name in ("input_ids", "labels", "first", "type_ids"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name


def test_first_tokens_that_are_no_positions_are_refused(tmp_path: Path) -> None:
    data = shard([["a", "b"]])
    write_shard(tmp_path / "a.h5", data, attributes={})
    for flags in ([1, 1, 0, 0], [0, 1, 0, 0], [0, 2, 1, 0]):
        with h5py.File(tmp_path / "a.h5", "r+") as file:
            file["rows/first_tokens"][:] = np.array(flags, np.uint8)
        with pytest.raises(CorruptCacheError, match=r"first_tokens|words_bytes"):
            read_shard(tmp_path / "a.h5", data.targets.codec)
