"""Corpora of ids: a row in is a row out, nothing about labels is guessed, no index is trusted."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import kdcache
from kdcache.cache import Cache
from kdcache.commands.build.options import BuildOptions
from kdcache.corpus import Corpus, Record
from kdcache.errors import UsageError
from kdcache.rows import Row, RowSpec, make_encoder
from kdcache.rows.ids import check_tokenizer
from kdcache.tasks import IGNORE

PATIENT = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TOKENIZERS = Path(__file__).resolve().parent / "tiny_tokenizers"
KNOWN = 60
SEQUENCES = st.lists(st.lists(st.integers(0, KNOWN - 1), min_size=2, max_size=9), max_size=12)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZERS / "bytes")


def encode(tokenizer: Any, values: Sequence[dict[str, Any]], **options: Any) -> list[Row]:
    spec = RowSpec("causal-lm", record_form="ids", **{"packing": "whole", **options})
    records = [Record(value, "data.jsonl", f"line {i}") for i, value in enumerate(values, 1)]
    return list(make_encoder(spec, tokenizer).encode(records))


def tokens_and_last(row: Row) -> list[int]:
    """The ids of a row whose every id is learnt, the last label included."""
    assert (row.labels[:-1] == row.input_ids[1:]).all()
    return [*row.input_ids.tolist(), int(row.labels[-1])]


# -- files ---------------------------------------------------------------------------------------

CODES = {"u1": 1, "i1": 2, "i2": 3, "i4": 4, "i8": 5, "f8": 6, "f4": 7, "u2": 8}


def write_indexed(path: Path, documents: Sequence[Sequence[Sequence[int]]], kind: str) -> None:
    """Megatron-LM's layout, by hand: documents of sequences of ids."""
    sequences = [ids for document in documents for ids in document]
    arrays = [np.array(ids, f"<{kind}").tobytes() for ids in sequences]
    path.with_suffix(".bin").write_bytes(b"".join(arrays))
    begins = np.cumsum([0, *map(len, arrays)])[:-1]
    ends = np.cumsum([0, *map(len, documents)])
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, CODES[kind], len(sequences), len(ends))
        + np.array([len(ids) for ids in sequences], "<i4").tobytes()
        + np.array(begins, "<i8").tobytes()
        + np.array(ends, "<i8").tobytes()
    )


def write_arrow(path: Path, rows: list[list[int]]) -> None:
    data = pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, data.schema) as writer:
        writer.write_table(data, max_chunksize=3)


WRITERS: dict[str, Callable[[Path, list[list[int]]], object]] = {
    "a.jsonl": lambda path, rows: path.write_text(
        "".join(json.dumps({"input_ids": ids}) + "\n" for ids in rows)
    ),
    "a.parquet": lambda path, rows: pq.write_table(
        pa.table({"input_ids": pa.array(rows, pa.large_list(pa.uint16()))}), path, row_group_size=5
    ),
    "a.arrow": write_arrow,
    "a.idx": lambda path, rows: write_indexed(path, [[ids] for ids in rows], "u2"),
}


@pytest.mark.parametrize("name", WRITERS)
@PATIENT
@given(rows=SEQUENCES.filter(bool), span_bytes=st.integers(8, 200))
def test_a_row_in_is_a_row_out(
    tokenizer: Any, tmp_path: Path, name: str, rows: list[list[int]], span_bytes: int
) -> None:
    path = tmp_path / name
    WRITERS[name](path, rows)
    corpus = Corpus.open([str(path)], span_bytes=span_bytes)
    spec = RowSpec("causal-lm", record_form="ids", packing="whole")
    found = []
    for span in corpus.spans:
        records = Corpus.read(span, columns=spec.columns)
        found.append([tokens_and_last(r) for r in make_encoder(spec, tokenizer).encode(records)])
    if name == "a.arrow":  # a stream deals row i to part i
        assert found == [rows[part :: len(found)] for part in range(len(found))]
    else:
        assert [ids for part in found for ids in part] == rows


class TestIndexed:
    @PATIENT
    @given(
        documents=st.lists(st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=3)),
        kind=st.sampled_from(["u1", "i1", "i2", "i4", "i8", "u2"]),
        parts=st.integers(1, 5),
    )
    def test_a_document_is_the_record_whatever_its_sequences(
        self, tmp_path: Path, documents: list[list[list[int]]], kind: str, parts: int
    ) -> None:
        write_indexed(tmp_path / "a", documents, kind)
        size = (tmp_path / "a.bin").stat().st_size
        if not size:
            with pytest.raises(UsageError, match="the corpus is empty"):
                Corpus.open([str(tmp_path)], span_bytes=1)
            return
        corpus = Corpus.open([str(tmp_path)], span_bytes=-(-size // parts))
        found = [r.values["input_ids"].tolist() for s in corpus.spans for r in Corpus.read(s)]
        assert found == [[i for ids in document for i in ids] for document in documents]

    def test_it_is_found_by_either_name_and_both_files_are_its_identity(
        self, tmp_path: Path
    ) -> None:
        write_indexed(tmp_path / "a", [[[1, 2]], [[3]]], "i4")
        found = [
            Corpus.open([str(tmp_path / name)], span_bytes=99) for name in ("a", "a.bin", "a.idx")
        ]
        assert found[0].identity() == found[1].identity() == found[2].identity()
        assert [file["name"] for file in found[0].identity()] == ["a.idx", "a.bin"]
        assert [len(list(Corpus.read(replace(s, limit=1)))) for s in found[0].spans] == [1]
        write_indexed(tmp_path / "a", [[[1, 2], [3]]], "i4")
        with pytest.raises(UsageError, match=r"a\.idx: the file was changed"):
            list(Corpus.read(found[0].spans[0]))
        (tmp_path / "a.bin").unlink()
        with pytest.raises(UsageError, match=r"a\.bin is missing"):
            Corpus.open([str(tmp_path / "a.idx")], span_bytes=99)

    @pytest.mark.parametrize(
        ("at", "new", "message"),
        [
            (0, b"X", "does not begin as an index"),
            (9, struct.pack("<Q", 2), "version 2 and type 4"),
            (17, b"\x07", "version 1 and type 7"),
            (17, b"\x63", "version 1 and type 99"),
            (18, struct.pack("<Q", 1 << 62), "expected by its 4,611,686,018,427,387,904 sequences"),
            (26, struct.pack("<Q", 0), "0 items of its document index"),
            (34, struct.pack("<i", -1), "sequence 1 of -1 ids"),
            (34, struct.pack("<i", 1 << 30), "sequence 1 of 1073741824 ids at byte 0"),
            (46, struct.pack("<q", -8), "at byte -8"),
            (46, struct.pack("<q", (1 << 63) - 1), "at byte 9223372036854775807"),
            (70, struct.pack("<q", 1), "has documents of sequences 1 to 3"),
            (78, struct.pack("<q", 3), "not in order"),
            (94, struct.pack("<q", 1 << 40), "has documents of sequences 0 to 1099511627776"),
            (102, b"\x00\x00\x00", "marks sequences of other modes"),
            (102, b"\x00", "has 103 bytes, 102 expected"),
        ],
    )
    def test_hostile_indices_are_named(
        self, tmp_path: Path, at: int, new: bytes, message: str
    ) -> None:
        write_indexed(tmp_path / "a", [[[1, 2]], [[3, 4, 5]], [[6]]], "i4")
        index = tmp_path / "a.idx"
        content = index.read_bytes()
        index.write_bytes(content[:at] + new + content[at + len(new) :])
        with pytest.raises(UsageError, match=rf"a\.idx: the index.*{message}"):
            for span in Corpus.open([str(index)], span_bytes=12).spans:
                list(Corpus.read(span))

    def test_cut_files_and_long_documents(self, tmp_path: Path) -> None:
        write_indexed(tmp_path / "a", [[[1, 2]], [[3] * 50], [[6]]], "i4")
        whole = Corpus.open([str(tmp_path)], span_bytes=999, max_record_bytes=100)
        with pytest.raises(UsageError, match=r"a\.bin: document 2: longer than --read max"):
            list(Corpus.read(whole.spans[0]))
        kept = list(Corpus.read(whole.spans[0], on_error="skip"))
        assert [record.location for record in kept] == ["document 1", "document 3"]
        for name in ("a.bin", "a.idx"):
            content = (tmp_path / name).read_bytes()
            (tmp_path / name).write_bytes(content[:-1])
            with pytest.raises(UsageError, match=r"a\.idx: the index has"):
                list(Corpus.read(Corpus.open([str(tmp_path)], span_bytes=999).spans[0]))
            (tmp_path / name).write_bytes(content)


# -- rows ----------------------------------------------------------------------------------------


class TestLabels:
    @PATIENT
    @given(rows=SEQUENCES, data=st.data(), packing=st.sampled_from(["whole", "none", "split"]))
    def test_both_conventions_make_the_same_rows(
        self, tokenizer: Any, rows: list[list[int]], data: st.DataObject, packing: str
    ) -> None:
        masks = [data.draw(st.lists(st.booleans(), min_size=len(r), max_size=len(r))) for r in rows]
        both = list(zip(rows, masks, strict=True))
        learnt = [[i if m else IGNORE for i, m in zip(*one, strict=True)] for one in both]
        forms = {
            "token": [
                [{"input_ids": r, "labels": t} for r, t in zip(rows, learnt, strict=True)],
                [{"input_ids": r, "loss_mask": [*map(int, m)]} for r, m in both],
                [{"input_ids": r, "labels": r, "loss_mask": m} for r, m in both],
            ],
            "next": [
                [{"input_ids": r[:-1], "labels": t[1:]} for r, t in zip(rows, learnt, strict=True)],
                [{"input_ids": r, "loss_mask": [*map(int, m[1:]), 1]} for r, m in both],
            ],
        }
        expected = [
            (ids[i], label)
            for ids, t in zip(rows, learnt, strict=True)
            for i, label in enumerate(t[1:])
            if label != IGNORE
        ]
        for word, kinds in forms.items():
            for values in kinds:
                found = encode(tokenizer, values, labels=word, packing=packing, max_length=20)
                assert expected == [
                    (int(row.input_ids[t]), int(row.labels[t]))
                    for row in found
                    for t in row.positions("causal-lm")
                ]
                assert len(found) == sum(any(m[1:]) for m in masks)

    def test_padding_is_cut_off_on_both_sides(self, tokenizer: Any) -> None:
        for attention, expected in (
            ([1, 1, 1, 0, 0], [5, 6, 7]),
            ([0, 0, 1, 1, 1], [7, 8, 9]),
            ([0, 1, 1, 0, 0], [6, 7]),
        ):
            record = {"input_ids": [5, 6, 7, 8, 9], "attention_mask": attention}
            assert tokens_and_last(encode(tokenizer, [record], labels="none")[0]) == expected
        with pytest.raises(UsageError, match="line 1: attention_mask hides ids in the middle"):
            encode(tokenizer, [{"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}])

    def test_what_labels_stand_beside_is_never_guessed(self, tokenizer: Any) -> None:
        for name in ("labels", "loss_mask"):
            record = {"input_ids": [1, 1], name: [1, 1]}
            with pytest.raises(UsageError, match=f"column '{name}', which may stand.*--labels"):
                encode(tokenizer, [record])
        token = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
        following = {"input_ids": [5, 6, 7], "labels": [6, 7, 8]}
        with pytest.raises(UsageError, match="do not agree with --labels next, but with .* token"):
            encode(tokenizer, [token], labels="next")
        with pytest.raises(UsageError, match="do not agree with --labels token, but with .* next"):
            encode(tokenizer, [following], labels="token")
        other = {"input_ids": [5, 6, 7], "labels": [5, 9, 7]}
        with pytest.raises(UsageError, match=r"line 1: labels\[1\] is 9, which is not the id"):
            encode(tokenizer, [other], labels="token")
        assert tokens_and_last(encode(tokenizer, [other], labels="none")[0]) == [5, 6, 7]

    def test_masks_and_divisions_of_trainers(self, tokenizer: Any) -> None:
        """TRL's masks; documents by their lengths, or numbered in the attention mask."""
        ids = [5, 6, 7, 8, 9]
        masks = {"completion_mask": [0, 0, 1, 1, 1], "assistant_masks": [0, 1, 1, 0, 1]}
        (row,) = encode(tokenizer, [{"input_ids": ids, **masks}], labels="token")
        assert row.labels.tolist() == [IGNORE, 7, IGNORE, 9]
        for columns in (
            {"seq_lengths": [2, 3]},
            {"attention_mask": [1, 1, 2, 2, 2]},
            {"position_ids": [0, 1, 0, 1, 2]},
        ):
            (row,) = encode(tokenizer, [{"input_ids": ids, **columns}], attend="document")
            assert row.starts is not None
            assert row.starts.tolist() == [True, False, True, False]
            assert row.labels.tolist() == [6, IGNORE, 8, 9]
            with pytest.raises(UsageError, match="divide the row into documents"):
                encode(tokenizer, [{"input_ids": ids, **columns}])
        padded = {"input_ids": [0, *ids, 0], "attention_mask": [0, 1, 1, 2, 2, 2, 0]}
        (again,) = encode(tokenizer, [padded], attend="document")
        assert (again.starts == row.starts).all()
        spec = RowSpec("causal-lm", record_form="ids", packing="whole", attend="document")
        beginning = {"input_ids": np.array(ids[:4]), "seq_lengths": [2, 3]}
        records = [Record(beginning, "data.jsonl", "line 1", cut=True)]
        (row,) = make_encoder(spec, tokenizer).encode(records)
        assert row.labels.tolist() == [6, IGNORE, 8]

    def test_concat_joins_and_keeps_masks(self, tokenizer: Any) -> None:
        values = [{"input_ids": [1, 2, 3]}, {"input_ids": [4]}, {"input_ids": [5, 6]}]
        (row,) = encode(tokenizer, values, packing="concat")
        assert tokens_and_last(row) == [1, 2, 3, 4, 5, 6]
        values = [{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}, {"input_ids": [4, 5]}]
        values[1]["loss_mask"] = [0, 1]
        (row,) = encode(tokenizer, values, packing="concat", labels="token")
        assert row.labels.tolist() == [2, 3, IGNORE, 5]
        for mask in ([False, True], [0.0, 1.0]):  # as Megatron's, which may be floats
            values[1]["loss_mask"] = mask
            (other,) = encode(tokenizer, values, packing="concat", labels="token")
            assert other.labels.tolist() == row.labels.tolist()
        with pytest.raises(UsageError, match="packing concat would go on with"):
            RowSpec("causal-lm", record_form="ids", packing="concat", labels="next")


class TestWrongRecords:
    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ({"input_ids": [1, -1]}, "input_ids holds -1, which is not an id"),
            ({"input_ids": [1, 1 << 40]}, "input_ids holds 1099511627776, which is not an id"),
            ({"input_ids": [1, 1 << 70]}, "input_ids holds something else than whole numbers"),
            ({"input_ids": [1, 2.5]}, "input_ids holds something else than whole numbers"),
            ({"input_ids": [1, None]}, "input_ids holds something else than whole numbers"),
            ({"input_ids": [[1, 2]]}, "input_ids holds something else than whole numbers"),
            ({"input_ids": [[1], [2, 3]]}, "input_ids holds something else than whole numbers"),
            ({"input_ids": "1 2"}, "input_ids holds text where a list"),
            ({"input_ids": [1, 2], "labels": [1]}, "labels has 1 numbers for 2 input_ids"),
            ({"input_ids": [1, 2], "labels": [1, -5]}, "labels holds -5, which is not an id"),
            ({"input_ids": [1, 2], "loss_mask": [1, 7]}, "loss_mask holds other numbers"),
            ({"input_ids": [1, 2], "loss_mask": [1, 0.5]}, "loss_mask holds other numbers"),
            (
                {"input_ids": [1, 2], "loss_mask": [1, float("nan")]},
                "loss_mask holds other numbers",
            ),
            ({"input_ids": [1, 2], "loss_mask": [1, None]}, "loss_mask holds something else"),
            ({"input_ids": [1, 2], "attention_mask": [1, 0.5]}, "attention_mask holds other"),
            ({"input_ids": [1, 2], "attention_mask": [1, -1]}, "attention_mask holds other"),
            ({"input_ids": [1, 2], "seq_lengths": [1, 2]}, "segment_ids has 3 numbers for 2"),
            ({"input_ids": [1, 2], "seq_lengths": [2, 0]}, "seq_lengths holds a document without"),
            ({"input_ids": [True, True]}, "input_ids holds something else than whole numbers"),
        ],
    )
    def test_they_are_named_or_skipped(
        self, tokenizer: Any, record: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(UsageError, match=f"^data.jsonl: line 2: {message}"):
            encode(tokenizer, [{"input_ids": [1, 2]}, record], labels="token")
        encoder = make_encoder(
            RowSpec(
                "causal-lm", record_form="ids", packing="whole", labels="token", on_error="skip"
            ),
            tokenizer,
        )
        good = {"input_ids": [1, 2], "labels": [1, 2]}
        records = [Record(v, "data.jsonl", f"line {i}") for i, v in enumerate([record, good])]
        assert [tokens_and_last(row) for row in encoder.encode(records)] == [[1, 2]]
        assert encoder.skipped == 1

    def test_what_is_too_long_is_refused_cut_and_counted_or_continued(self, tokenizer: Any) -> None:
        record = {"input_ids": [1, 2, 3, 4, 5, 6]}
        assert len(encode(tokenizer, [record], max_length=5)) == 1
        with pytest.raises(UsageError, match="line 1: 6 tokens do not fit one row, --max-length"):
            encode(tokenizer, [record], max_length=4)
        tail = {"input_ids": [1, 2, 3, 4, 5, 6], "loss_mask": [1, 1, 1, 0, 0, 0]}
        assert len(encode(tokenizer, [tail], max_length=4, labels="token")) == 1
        spec = RowSpec("causal-lm", record_form="ids", packing="none", max_length=4)
        encoder = make_encoder(spec, tokenizer)
        (row,) = encoder.encode([Record(record, "a", "line 1")])
        assert (tokens_and_last(row), encoder.truncated) == ([1, 2, 3, 4, 5], 1)
        split = encode(tokenizer, [record], max_length=4, packing="split")
        assert [tokens_and_last(row) for row in split] == [[1, 2, 3, 4, 5], [5, 6]]
        text = RowSpec("causal-lm", packing="whole", max_length=4)
        with pytest.raises(UsageError, match="do not fit one row"):
            list(make_encoder(text, tokenizer).encode([Record({"text": "x" * 50}, "a", "line 1")]))

    def test_documents_of_a_row_do_not_see_each_other_if_that_is_asked_for(
        self, tokenizer: Any
    ) -> None:
        row = {"input_ids": [1, 2, 3, 4, 5, 6], "attention_mask": [1, 1, 1, 1, 1, 0]}
        for name, whole, divided in (
            ("segment_ids", [7, 7, 7, 7, 7, 0], [1, 1, 2, 2, 2, 0]),
            ("position_ids", [0, 1, 2, 3, 4, 0], [0, 1, 0, 1, 2, 0]),
        ):
            (same,) = encode(tokenizer, [{**row, name: whole}])
            assert tokens_and_last(same) == [1, 2, 3, 4, 5]
            assert same.starts is None
            with pytest.raises(UsageError, match="line 1: .* divide the row .*--attend document"):
                encode(tokenizer, [{**row, name: divided}])
            for packing in ("whole", "concat", "split"):
                (apart,) = encode(
                    tokenizer, [{**row, name: divided}], attend="document", packing=packing
                )
                assert apart.starts is not None
                assert apart.input_ids.tolist() == [1, 2, 3, 4]
                assert apart.labels.tolist() == [2, IGNORE, 4, 5]
                assert apart.starts.tolist() == [True, False, True, False]
        for wrong in ([5, 6, 7, 8, 9, 0], [0, 1, 1, 2, 3, 0], [0, 2, 3, 4, 5, 0]):
            with pytest.raises(UsageError, match="position_ids do not count from 0"):
                encode(tokenizer, [{**row, "position_ids": wrong}], attend="document")
        with pytest.raises(UsageError, match="segment_ids come back to a document after another"):
            encode(tokenizer, [{**row, "segment_ids": [1, 1, 2, 1, 1, 0]}], attend="document")
        both = {"segment_ids": [1, 1, 2, 2, 2, 0], "position_ids": [0, 1, 2, 0, 1, 0]}
        with pytest.raises(UsageError, match="divide the row differently"):
            encode(tokenizer, [{**row, **both}], attend="document")

    def test_missing_columns_say_how_to_name_them(self, tokenizer: Any) -> None:
        with pytest.raises(UsageError, match="'tokens'. Name the right one with --columns input"):
            encode(tokenizer, [{"tokens": [1, 2]}])
        text = RowSpec("causal-lm")
        with pytest.raises(UsageError, match="none of text.*--record-form ids"):
            list(make_encoder(text, tokenizer).encode([Record({"input_ids": [1]}, "a", "line 1")]))


class TestTokenizer:
    def test_another_one_is_refused_by_size_special_ids_or_tokens(
        self, tokenizer: Any, tmp_path: Path
    ) -> None:
        check_tokenizer(str(TOKENIZERS / "bytes"), tokenizer)
        larger = AutoTokenizer.from_pretrained(TOKENIZERS / "bytes")
        larger.add_tokens(["<more>"])
        larger.save_pretrained(tmp_path / "larger")
        with pytest.raises(UsageError, match=r"--tokenizer .*larger has \d+ ids, the teacher's"):
            check_tokenizer(str(tmp_path / "larger"), tokenizer)
        tokenizer.save_pretrained(tmp_path / "other")
        path = tmp_path / "other" / "tokenizer.json"
        model = json.loads(path.read_text())
        vocab = model["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        path.write_text(json.dumps(model))
        with pytest.raises(UsageError, match="gives '[ab]' the id"):
            check_tokenizer(str(tmp_path / "other"), tokenizer)
        other = AutoTokenizer.from_pretrained(TOKENIZERS / "bytes")
        other.eos_token = "a"
        other.save_pretrained(tmp_path / "special")
        with pytest.raises(UsageError, match="other special ids than the teacher's: eos_token_id"):
            check_tokenizer(str(tmp_path / "special"), tokenizer)
        with pytest.raises(UsageError, match="is neither a folder with a tokenizer"):
            check_tokenizer(str(tmp_path / "none"), tokenizer)

    def test_options_say_what_is_missing(self) -> None:
        needed: dict[str, Any] = {"teacher": ("t",), "corpus": ("c",), "out": "o"}
        for options, message in (
            ({"record_form": "ids"}, "--tokenizer is missing"),
            ({"labels": "token"}, "--labels is for records of ids"),
            ({"tokenizer": "t"}, "--tokenizer is for records of ids"),
            (
                {"record_form": "ids", "tokenizer": "t", "labels": "next", "packing": "concat"},
                "--labels next belongs to rows",
            ),
        ):
            with pytest.raises(UsageError, match=message):
                BuildOptions(**needed, **options)


@pytest.mark.end_to_end
def test_a_build_from_ids_is_the_build_from_their_text(
    small_build: BuildOptions, tiny_lm: Path, tmp_path: Path
) -> None:
    """The rows of one packed build, written out as ids, give the same targets again."""
    kdcache.build(small_build)
    from_text = Cache.open(small_build.out)
    rows = [
        data.row(i)
        for data in map(from_text.read, range(from_text.spec.spans))
        for i in range(len(data))
    ]
    assert len(rows) > 3
    table = {
        "tokens": [row.input_ids.tolist() for row in rows],
        "labels": [row.labels.tolist() for row in rows],
        "part": [str(i % 2) for i in range(len(rows))],
    }
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    options = replace(
        small_build,
        corpus=(str(tmp_path / "rows.parquet"),),
        out=str(tmp_path / "ids"),
        record_form="ids",
        tokenizer=str(tiny_lm),
        labels="next",
        packing=None,
        columns=("input_ids=tokens",),
    )  # fmt: skip
    kdcache.build(options)
    from_ids = Cache.open(options.out)
    found = [
        data.row(i)
        for data in map(from_ids.read, range(from_ids.spec.spans))
        for i in range(len(data))
    ]
    for mine, theirs in zip(found, rows, strict=True):
        assert (mine.input_ids == theirs.input_ids).all()
        assert (mine.labels == theirs.labels).all()
    assert from_ids.manifest.positions == from_text.manifest.positions
    half = replace(options, out=str(tmp_path / "half"), filter=("part=1",))
    kdcache.build(half)
    kept = Cache.open(half.out)
    assert kept.manifest.rows == len(rows) // 2
    assert kept.spec.reading["filters"] == ["part=1"]
    with pytest.raises(UsageError, match="filters"):
        kdcache.build(replace(half, filter=("part=0",)))
