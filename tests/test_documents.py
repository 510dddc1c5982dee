"""Text files as documents, and records that are longer than they may be."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcache.corpus import Corpus, ReadStats, Record
from kdcache.errors import UsageError

PATIENT = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LINES = st.lists(st.sampled_from(["a", "two words", "", " ", "é" * 9, "\t"]), max_size=40)


def read(corpus: Corpus, **options: Any) -> list[Record]:
    return [record for span in corpus.spans for record in Corpus.read(span, **options)]


def texts(corpus: Corpus, **options: Any) -> list[str]:
    return [record.values["text"] for record in read(corpus, **options)]


def paragraphs(text: str) -> list[str]:
    """What Python's own line splitting makes of a text."""
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return ["\n".join(lines) for lines in found if lines]


@pytest.mark.parametrize("packed", [False, True])
class TestDocuments:
    @PATIENT
    @given(
        lines=LINES, span_bytes=st.integers(1, 120), ended=st.booleans(), limit=st.integers(1, 9)
    )
    def test_paragraphs_come_once_however_a_file_is_cut(
        self,
        tmp_path: Path,
        packed: bool,
        lines: list[str],
        span_bytes: int,
        ended: bool,
        limit: int,
    ) -> None:
        text = "\n".join(["first", *lines]) + "\n" * ended
        self._write(tmp_path, packed, text)
        options: dict[str, Any] = {"span_bytes": span_bytes, "documents": "paragraph"}
        corpus = Corpus.open([str(tmp_path)], **options)
        assert sorted(texts(corpus)) == sorted(paragraphs(text))
        few = Corpus.open([str(tmp_path)], limit=limit, **options)
        assert sorted(texts(few)) == sorted(paragraphs(text)[:limit])

    @PATIENT
    @given(lines=LINES, span_bytes=st.integers(1, 120), ended=st.booleans())
    def test_a_file_is_one_document_whole_or_in_pieces(
        self, tmp_path: Path, packed: bool, lines: list[str], span_bytes: int, ended: bool
    ) -> None:
        text = "\n".join(["first", *lines]) + "\n" * ended
        self._write(tmp_path, packed, text)
        (whole,) = read(Corpus.open([str(tmp_path)], span_bytes=span_bytes))
        assert (whole.values["text"], whole.opens, whole.closes) == (text.rstrip("\n"), True, True)
        divided = Corpus.open([str(tmp_path)], span_bytes=span_bytes, divide=True)
        pieces = read(divided)
        joined = "".join(piece.values["text"] for piece in pieces)
        assert joined.rstrip() == text.rstrip()  # white space in the middle included
        assert [piece.opens for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        assert [piece.closes for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        if not packed and len(text.encode()) > 4 * span_bytes and len(pieces) > 1:
            assert max(len(p.values["text"].encode()) for p in pieces) <= span_bytes + 19

    def test_blank_files_are_no_documents(self, tmp_path: Path, packed: bool) -> None:
        self._write(tmp_path, packed, " \n\t\n")
        (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\n\r\n")
        corpus = Corpus.open([str(tmp_path)], span_bytes=99)
        assert texts(corpus) == ["one\r\n\r\ntwo"]
        limited = Corpus.open([str(tmp_path)], span_bytes=99, limit=1)
        assert texts(limited) == ["one\r\n\r\ntwo"]

    @staticmethod
    def _write(folder: Path, packed: bool, text: str) -> None:
        name, data = (
            ("a.txt.gz", gzip.compress(text.encode())) if packed else ("a.txt", text.encode())
        )
        (folder / name).write_bytes(data)


def test_what_a_document_is_belongs_to_the_identity(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    said = []
    for documents in ("file", "paragraph", "line"):
        corpus = Corpus.open([str(tmp_path)], span_bytes=9, documents=documents)  # type: ignore[arg-type]
        said.append(corpus.settings["documents"])
    assert said == ["file", "paragraph", "line"]
    (tmp_path / "b.jsonl").write_text("{}")
    assert "documents" not in Corpus.open([str(tmp_path / "b.jsonl")], span_bytes=9).settings
    with pytest.raises(UsageError, match="--read documents is 'page'; expected one of file"):
        Corpus.open([str(tmp_path)], span_bytes=9, documents="page")  # type: ignore[arg-type]


def test_csv_with_another_delimiter(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text;label\n"a; b";1\nc, d;0\n')
    corpus = Corpus.open([str(tmp_path)], span_bytes=9, delimiter=";")
    assert sorted(texts(corpus)) == ["a; b", "c, d"]
    assert corpus.settings["delimiter"] == ";"
    with pytest.raises(UsageError, match="--read delimiter is ';;'"):
        Corpus.open([str(tmp_path)], span_bytes=9, delimiter=";;")


BOUND = 1000
LONG = "x" * 5_000
TOO_LONG: dict[str, tuple[str, dict[str, Any]]] = {
    "a.jsonl": ('{"text": "one"}\n{"text": "%s"}\n{"text": "two"}\n', {}),
    "a.tsv": ("text\tn\none\t1\n%s\t2\ntwo\t3\n", {}),
    "a.csv": ('text,n\none,1\n"%s ""\n quoted,\n",2\ntwo,3\n', {}),
    "b.csv": ("text,n\none,1\n%s,2\ntwo,3\n", {}),
    "a.txt": ("one\n%s\ntwo\n", {"documents": "line"}),
    "b.txt": ("one\n\nstart\n%s\nend\n\ntwo\n", {"documents": "paragraph"}),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", TOO_LONG)
@pytest.mark.parametrize("span_bytes", [1 << 30, 700])
def test_a_record_that_is_too_long_fails_or_is_counted(
    tmp_path: Path, name: str, packed: bool, span_bytes: int
) -> None:
    form, options = TOO_LONG[name]
    # Of one line, and of many short ones where the format has such records.
    for filler in (LONG, ("x\n" * 2_500).strip() if name in ("a.csv", "b.txt") else LONG):
        data = (form % filler).encode()
        path = tmp_path / f"{name}.gz" if packed else tmp_path / name
        path.write_bytes(gzip.compress(data) if packed else data)
        corpus = Corpus.open([str(path)], span_bytes=span_bytes, max_record_bytes=BOUND, **options)
        with pytest.raises(UsageError, match=r"longer than --read max-record-bytes, 1,000 bytes"):
            read(corpus)
        stats = ReadStats()
        assert sorted(texts(corpus, on_error="skip", stats=stats)) == ["one", "two"]
        assert stats.skipped == 1
        assert corpus.settings["max_record_bytes"] == BOUND


def test_other_records_that_are_too_long(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet as pq

    table = pa.table({"text": ["one", LONG, "two"], "messages": [[{"role": "a"}]] * 3})
    pq.write_table(table, tmp_path / "a.parquet")
    pyarrow.feather.write_feather(table, tmp_path / "a.feather")
    (tmp_path / "a.txt").write_text(LONG)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(LONG.encode()))
    for name, found in (("a.parquet", 2), ("a.feather", 2), ("a.txt", 0), ("b.txt.gz", 0)):
        corpus = Corpus.open([str(tmp_path / name)], span_bytes=1 << 20, max_record_bytes=BOUND)
        with pytest.raises(UsageError, match="longer than --read max-record-bytes"):
            read(corpus)
        stats = ReadStats()
        assert len(read(corpus, on_error="skip", stats=stats)) == found
        assert stats.skipped == 1


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.txt.gz", "a.txt", "a.tsv.gz"])
def test_memory_is_bounded_by_the_longest_record(tmp_path: Path, name: str) -> None:
    size, bound = 48 << 20, 1 << 20
    path = tmp_path / name
    # CSV: one row of many lines, in quotes that never end; else one line.
    block = (b"x" * 1023 + (b"\n" if "csv" in name else b"x")) * 1024
    with gzip.open(path, "wb", 1) if name.endswith("gz") else path.open("wb") as stream:
        stream.write(b'text\n"' if "csv" in name else b"text\n" if "tsv" in name else b"")
        for _ in range(size // len(block)):
            stream.write(block)
    corpus = Corpus.open([str(path)], span_bytes=1 << 30, max_record_bytes=bound)
    stats = ReadStats()
    tracemalloc.start()
    assert [r.values for r in read(corpus, on_error="skip", stats=stats)] == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stats.skipped == 1
    # The CSV parser takes four bytes a character.
    assert peak < 8 * bound


def test_long_lines_before_a_span_are_not_held(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("x" * (40 << 20) + "\n" + json.dumps({"text": "last"}) + "\n")
    corpus = Corpus.open([str(path)], span_bytes=1 << 20, max_record_bytes=1 << 20)
    tracemalloc.start()
    assert [record.values["text"] for record in Corpus.read(corpus.spans[-1])] == ["last"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
