"""Corpus: every record of every format exactly once, however it is cut; wrong input is named."""

from __future__ import annotations

import csv
import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from fake_hub import DATASET, GATED, fake_hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcache.corpus import Corpus, ReadStats, Record, kind_of
from kdcache.errors import UsageError

PATIENT = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXTS = st.lists(
    st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=40).filter(
        str.strip
    ),
    min_size=1,
    max_size=40,
)


def read_all(corpus: Corpus, **options: Any) -> list[Record]:
    return [record for span in corpus.spans for record in Corpus.read(span, **options)]


def texts_of(corpus: Corpus, **options: Any) -> list[str]:
    return [record.values["text"] for record in read_all(corpus, **options)]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue().to_pybytes())


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def write_csv(path: Path, texts: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        writer.writerows([text, "1"] for text in texts)


def write_arrow_stream(path: Path, table: Any) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def table(texts: list[str]) -> Any:
    return pa.table({"other": list(range(len(texts))), "text": texts})


WRITERS: dict[str, Callable[[Path, list[str]], object]] = {
    "a.jsonl": lambda path, texts: path.write_bytes(jsonl(texts)),
    "a.json": lambda path, texts: path.write_bytes(b"\xef\xbb\xbf" + jsonl(texts).rstrip()),
    "a.txt": lambda path, texts: path.write_bytes("\r\n\n".join(texts).encode()),
    "a.tsv": lambda path, texts: path.write_bytes(
        "".join(f"{text}\t1\n" for text in ["text", *texts]).encode().replace(b"1", b"label", 1)
    ),
    "a.csv": write_csv,
    "a.jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(jsonl(texts))),
    "a.jsonl.zst": lambda path, texts: path.write_bytes(
        zstd(jsonl(texts[:1])) + zstd(jsonl(texts[1:]))
    ),
    "a.parquet": lambda path, texts: pq.write_table(table(texts), path, row_group_size=7),
    "a.arrow": lambda path, texts: write_arrow_stream(path, table(texts)),
    "a.feather": lambda path, texts: pa.feather.write_feather(
        table(texts), path, chunksize=5, compression="lz4"
    ),
}


@pytest.mark.parametrize("name", WRITERS)
class TestEveryFormat:
    @PATIENT
    @given(texts=TEXTS, span_bytes=st.integers(1, 400))
    def test_each_record_comes_once(
        self, tmp_path: Path, name: str, texts: list[str], span_bytes: int
    ) -> None:
        path = tmp_path / name
        WRITERS[name](path, texts)
        corpus = Corpus.open([str(path)], span_bytes=span_bytes, documents="line")
        found = texts_of(corpus)
        if "gz" in name or "zst" in name or "csv" in name or name == "a.arrow":
            # Dealt parts interleave: part k has the records k, k + parts, ...
            parts = len(corpus.spans)
            assert found == [text for part in range(parts) for text in texts[part::parts]]
        else:
            assert found == texts

    @PATIENT
    @given(texts=TEXTS, span_bytes=st.integers(1, 400), limit=st.integers(1, 45))
    def test_limit_is_the_first_records(
        self, tmp_path: Path, name: str, texts: list[str], span_bytes: int, limit: int
    ) -> None:
        WRITERS[name](tmp_path / name, texts)
        WRITERS[name](tmp_path / f"z{name}", texts)
        corpus = Corpus.open(
            [str(tmp_path / name), str(tmp_path / f"z{name}")],
            span_bytes=span_bytes,
            limit=limit,
            documents="line",
        )
        assert sorted(texts_of(corpus)) == sorted([*texts, *texts][:limit])

    def test_location_finds_the_record(self, tmp_path: Path, name: str) -> None:
        texts = [f"number {i}" for i in range(20)]
        WRITERS[name](tmp_path / name, texts)
        corpus = Corpus.open([str(tmp_path)], span_bytes=30, documents="line")
        # As a worker on another machine gets them.
        spans = pickle.loads(pickle.dumps(list(corpus.spans)))
        records = [record for span in spans for record in Corpus.read(span)]
        where = {record.values["text"]: str(record.location) for record in records}
        assert len(set(where.values())) == 20
        expected = {
            "a.parquet": "row 6",
            "a.arrow": "row 6",
            "a.feather": "batch 2, row 1",
            "a.tsv": "line 7",
            "a.csv": "line 7",
            "a.txt": "line 11",
        }
        assert where["number 5"] == expected.get(name, "line 6")


def test_tables_are_read_in_the_wanted_columns_and_know_the_others(tmp_path: Path) -> None:
    pq.write_table(table(["a", "b"]), tmp_path / "a.parquet")
    pa.feather.write_feather(table(["c"]), tmp_path / "b.feather")
    corpus = Corpus.open([str(tmp_path)], span_bytes=1 << 20)
    records = read_all(corpus, columns=["text", "absent"])
    assert [record.values for record in records] == [{"text": "a"}, {"text": "b"}, {"text": "c"}]
    assert records[0].columns == ("other", "text")
    assert [record.values for record in read_all(corpus, columns=["absent"])] == [{}, {}, {}]


def test_parquet_keeps_nested_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    pq.write_table(pa.table({"messages": [messages]}), tmp_path / "a.parquet")
    (record,) = read_all(Corpus.open([str(tmp_path)], span_bytes=99), columns=["messages"])
    assert record.values == {"messages": messages}


def test_csv_with_newlines_quotes_and_long_fields(tmp_path: Path) -> None:
    texts = ["two\nlines", 'a "quoted" word', "comma, here", "x" * 200_000]
    write_csv(tmp_path / "a.csv", texts)
    records = read_all(Corpus.open([str(tmp_path)], span_bytes=1 << 30))
    assert [record.values["text"] for record in records] == texts
    assert [str(record.location) for record in records] == [f"line {n}" for n in (2, 4, 5, 6)]


def test_tsv_takes_quotes_literally(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\n"open quote\t0\nnext\t1\n')
    corpus = Corpus.open([str(tmp_path)], span_bytes=5)
    assert texts_of(corpus) == ['"open quote', "next"]


def test_headerless_table_by_columns(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("good\t1\nbad\t0\n")
    (tmp_path / "b.csv").write_text("fine,1\n")
    corpus = Corpus.open([str(tmp_path)], span_bytes=3, columns=["text", "label"])
    values = [tuple(record.values.values()) for record in read_all(corpus)]
    assert values == [("good", "1"), ("bad", "0"), ("fine", "1")]


def test_missing_column_of_a_headerless_table_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("good film\t1\nbad film\t0\n")
    (record,) = read_all(Corpus.open([str(tmp_path)], span_bytes=99))
    error = record.missing(["text"], "--text-column", ["text", "label"])
    assert "--columns text,label" in str(error)
    assert "'good film', '1'" in str(error)


# -- which files ---------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b/2.jsonl", "b/1.jsonl", "a/x/3.jsonl.gz", "c [1].txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = jsonl([name]) if "jsonl" in name else name.encode()
        path.write_bytes(gzip.compress(data, mtime=0) if name.endswith("gz") else data)
    for name in ("README.md", ".hidden.jsonl", "b/_SUCCESS", "dataset_info.json", ".git/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["."], ["a/x/3.jsonl.gz", "b/1.jsonl", "b/2.jsonl", "c [1].txt"]),
        (["b/*.jsonl"], ["b/1.jsonl", "b/2.jsonl"]),
        (["**/*.jsonl*"], ["a/x/3.jsonl.gz", "b/1.jsonl", "b/2.jsonl"]),
        (["**"], ["a/x/3.jsonl.gz", "b/1.jsonl", "b/2.jsonl", "c [1].txt"]),
        (["b/2.jsonl", "b", "b/*"], ["b/2.jsonl", "b/1.jsonl"]),
        (["c [1].txt"], ["c [1].txt"]),
        (["[ab]"], ["a/x/3.jsonl.gz", "b/1.jsonl", "b/2.jsonl"]),
    ],
)
def test_patterns(tree: Path, patterns: list[str], expected: list[str]) -> None:
    corpus = Corpus.open([f"{tree}/{pattern}" for pattern in patterns], span_bytes=1 << 20)
    assert [str(Path(file.url).relative_to(tree)) for file in corpus.files] == expected
    assert texts_of(corpus) == expected


def test_identity_moves_with_the_corpus_and_changes_with_its_content(tree: Path) -> None:
    before = Corpus.open([str(tree)], span_bytes=9).identity()
    assert [entry["name"] for entry in before] == [
        "a/x/3.jsonl.gz",
        "b/1.jsonl",
        "b/2.jsonl",
        "c [1].txt",
    ]
    assert json.loads(json.dumps(before)) == before
    moved = shutil.copytree(tree, tree.parent / f"{tree.name}-moved" / "deeper")
    assert Corpus.open([str(moved)], span_bytes=9).identity() == before
    (moved / "b/1.jsonl").write_bytes(jsonl(["B/1.jsonl"]))
    after = Corpus.open([str(moved)], span_bytes=9).identity()
    assert [a != b for a, b in zip(before, after, strict=True)] == [False, True, False, False]


def test_identity_of_a_large_file_sees_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    tags = set()
    for position in (None, 5, 299_995):
        data = bytearray(b"x" * 300_000)
        if position is not None:
            data[position] = ord("y")
        path.write_bytes(data)
        ((entry),) = Corpus.open([str(path)], span_bytes=1 << 20).identity()
        assert entry["size"] == 300_000
        tags.add(entry["tag"])
    assert len(tags) == 3


def test_span_bytes_by_the_size_of_the_corpus(tree: Path) -> None:
    corpus = Corpus.open([str(tree / "b")], span_bytes=lambda total: total // 4)
    total = sum(file.size for file in corpus.files)
    assert corpus.settings["span_bytes"] == total // 4
    assert len(corpus.spans) == 4


def test_planning_neither_reads_files_nor_grows_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("jsonl", "txt", "csv", "tsv", "parquet", "arrow", "jsonl.gz", "jsonl.zst")
    paths = [tmp_path / f"{i:04}.{names[i % len(names)]}" for i in range(2000)]
    for module in ("files", "tables"):
        monkeypatch.setattr(
            f"kdcache.corpus.{module}.open_bytes", lambda url: pytest.fail(f"{url} was opened")
        )
    peaks, spans = [], []
    # Sparse files: 2 MB, then 2 TB in all.
    for size in (1000, 1_000_000_000):
        for path in paths:
            path.touch()
            os.truncate(path, size)
        tracemalloc.start()
        corpus = Corpus.open([str(tmp_path)], span_bytes=1 << 20)
        assert corpus.spans[len(corpus.spans) - 1].file.url == str(paths[-1])
        assert corpus.spans[-1] == corpus.spans[len(corpus.spans) - 1]
        assert [span.index for span in corpus.spans[5:8]] == [5, 6, 7]
        with pytest.raises(IndexError):
            corpus.spans[len(corpus.spans)]
        spans.append(len(corpus.spans))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert spans[0] == 2000
    assert spans[1] > 500 * spans[0]
    assert peaks[1] < 1.2 * peaks[0]


@pytest.fixture
def memory() -> Iterator[Any]:
    store = fsspec.filesystem("memory")
    yield store
    store.rm("/", recursive=True)


def test_any_fsspec_url(memory: Any, tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(50)]
    for name, writer in WRITERS.items():
        writer(tmp_path / name, texts)
        memory.pipe_file(f"/data/{name}", (tmp_path / name).read_bytes())
    memory.pipe_file("/data/README.md", b"no data")
    memory.pipe_file("/data/empty.txt", b"")
    corpus = Corpus.open(["memory://data"], span_bytes=100, documents="line")
    local = Corpus.open([str(tmp_path)], span_bytes=100, documents="line")
    assert texts_of(corpus) == texts_of(local)
    same = [entry for entry in corpus.identity() if entry["name"] != "empty.txt"]
    assert same == local.identity()
    few = Corpus.open(["memory://data/*.jsonl", "memory://data/a.jsonl"], span_bytes=100)
    assert [file.url for file in few.files] == ["memory:///data/a.jsonl"]
    bad = "memory://data/a.jsonl.gz"
    memory.pipe_file("/data/a.jsonl.gz", b"not gzip")
    with pytest.raises(
        UsageError, match=r"a.jsonl.gz: start: the gz stream is cut short or damaged"
    ):
        texts_of(Corpus.open([bad], span_bytes=100))


READ = """
import json, sys
from kdcache.corpus import Corpus
from kdcache.errors import UsageError
for url in sys.argv[1:]:
    try:
        corpus = Corpus.open([url], span_bytes=5000)
    except UsageError as error:
        print(json.dumps(str(error)))
    else:
        records = [r.values["text"] for span in corpus.spans for r in Corpus.read(span)]
        print(json.dumps([len(corpus.spans), records, corpus.identity()]))
"""


@pytest.mark.end_to_end
def test_a_dataset_on_the_hub(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(1000)]
    for name in ("a.jsonl", "a.parquet", "a.jsonl.gz"):
        WRITERS[name](tmp_path / name, texts)
    local = Corpus.open([str(tmp_path)], span_bytes=5000)
    files = {f"data/{path.name}": path.read_bytes() for path in tmp_path.iterdir()}
    whole = f"hf://datasets/{DATASET}"
    urls = [whole, f"{whole}@main/data", f"{whole}/data/*.jsonl", f"{whole}/**/a.jsonl"]
    wrong = [f"{whole}/b.jsonl", f"hf://datasets/{DATASET}s", f"hf://datasets/{GATED}"]
    # The hub's address is read when its library is imported: a process of its own.
    with fake_hub(files | {"README.md": b"no data"}) as address:
        done = subprocess.run(
            [sys.executable, "-c", READ, *urls, *wrong],
            env={**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers[:2] == [[len(local.spans), texts_of(local), local.identity()]] * 2
    assert [records for _, records, _ in answers[2:4]] == [texts, texts]
    for told, url in zip(answers[4:], wrong, strict=True):
        assert told.startswith(f"--corpus {url}: no file found")
        assert "A private or gated dataset needs HF_TOKEN" in told


# -- wrong input ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "options", "message"),
    [
        ("nothing/*.jsonl", {}, "no file found"),
        ("nothing.jsonl", {}, "no file found"),
        ("model.bin", {}, r"the format cannot be told.*--format"),
        ("x.parquet.gz", {}, "the format cannot be told"),
        ("empty.jsonl", {}, "the corpus is empty"),
        ("blank.txt", {"limit": 3}, "no records"),
        ("a.jsonl", {"format": "xml"}, "format is 'xml'; it must be one of auto, jsonl"),
        ("a.jsonl", {"limit": 0}, "--limit is 0"),
        ("a.jsonl", {"span_bytes": 0}, "span_bytes is 0"),
        ("a.jsonl", {"columns": ["text"]}, "a.jsonl is jsonl and has its own"),
        ("a.tsv", {"columns": ["text", "text"]}, "expected different names"),
        ("nosuch://bucket/a.jsonl", {}, "can't open nosuch://"),
    ],
)
def test_what_can_not_be_planned(
    tmp_path: Path, pattern: str, options: dict[str, Any], message: str
) -> None:
    for name in ("model.bin", "x.parquet.gz", "a.jsonl", "a.tsv"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.txt").write_text("\n \n")
    path = pattern if "://" in pattern else str(tmp_path / pattern)
    with pytest.raises(UsageError, match=message):
        Corpus.open([path], **{"span_bytes": 100, **options})


@pytest.mark.parametrize(("delimiter", "shown"), [(";", "';'"), ("\t", r"$'\t'"), ("|", "'|'")])
def test_csv_of_another_delimiter_is_refused_with_the_option_that_names_it(
    tmp_path: Path, delimiter: str, shown: str
) -> None:
    path = tmp_path / "a.csv"
    rows = ["text", "label"], ["good", "1"], ["fair, in parts", "0"]
    path.write_text("\n".join(map(delimiter.join, rows)))
    with pytest.raises(UsageError, match="line 3: 2 fields where the header names 1") as of_fields:
        read_all(Corpus.open([str(path)], span_bytes=1 << 30))
    assert f"--read delimiter={shown}" in str(of_fields.value)
    (first,) = read_all(Corpus.open([str(path)], span_bytes=1 << 30), on_error="skip")
    assert f"--read delimiter={shown}." in str(first.missing(["text"], "--text-column"))
    read = read_all(Corpus.open([str(path)], span_bytes=1 << 30, delimiter=delimiter))
    assert [record.values["text"] for record in read] == ["good", "fair, in parts"]


def test_no_corpus_at_all() -> None:
    with pytest.raises(UsageError, match="no corpus was given"):
        Corpus.open([], span_bytes=100)


GOOD = b'{"text": "good"}\n'
BAD_LINES = [
    (
        "a.jsonl",
        b'{"text": "x\n',
        r"line 2: not valid JSON \(Invalid control|line 2: not valid JSON",
    ),
    ("a.jsonl", b'{"text": "\xff"}\n', r"line 2: not valid UTF-8 \(byte 0xff in column 11\)"),
    ("a.jsonl", b"[1, 2]\n", "line 2: a JSON list where one object a line"),
    ("a.jsonl", b"7\n", "line 2: a number where a JSON object"),
    ("a.txt", b"\xc3\x28\n", "line 2: not valid UTF-8"),
    ("a.tsv", b"\xff\tx\n", "line 2: not valid UTF-8"),
    ("a.tsv", b"x\n", "line 2: 1 fields where the header names 2"),
    ("a.csv", b"x,y,z\n", "line 2: 3 fields where the header names 2"),
    ("a.csv", b"\xff,x\n", r"line 2: not valid UTF-8 \(byte 0xff\)"),
    ("a.csv", b'"a"b,x\n', "line 2: not valid CSV"),
]


@pytest.mark.parametrize(("name", "line", "message"), BAD_LINES)
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_a_bad_record_is_named_or_skipped_and_counted(
    tmp_path: Path, name: str, line: bytes, message: str, packed: str
) -> None:
    good = GOOD if name == "a.jsonl" else b"text\tlabel\n" if name == "a.tsv" else b"text,label\n"
    after = {"a.jsonl": GOOD, "a.txt": b"good\n", "a.tsv": b"good\t1\n", "a.csv": b"good,1\n"}[name]
    data = good + line + after
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(gzip.compress(data) if packed else data)
    corpus = Corpus.open([str(path)], span_bytes=1 << 30, documents="line")
    with pytest.raises(UsageError, match=message) as caught:
        read_all(corpus)
    assert str(path) in str(caught.value)
    assert "--on-error skip" in str(caught.value)
    stats = ReadStats()
    left = read_all(corpus, on_error="skip", stats=stats)
    assert left[-1].values["text"] == "good"
    assert stats.skipped == len(stats.reasons) == 1
    assert stats.records == len(left)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "null"), (True, "true or false"), (3, "a number"), (0.5, "a number"),
        ("x", "text"), ([1], "a list"), (np.zeros(2), "a list"), ({}, "an object"),
        (b"x", "a value of type bytes"),
    ],
)  # fmt: skip
def test_messages_name_a_value_in_words_and_not_by_its_type_in_python(
    value: object, kind: str
) -> None:
    assert kind_of(value) == kind


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.csv.gz"])
def test_a_truncated_stream_is_named_or_counted_once(tmp_path: Path, name: str) -> None:
    random = Random(0)
    lines = [f'"{random.getrandbits(200):x}"' for _ in range(20_000)]
    if "csv" in name:
        text = "text\n" + "\n".join(lines)
    else:
        text = "\n".join(f'{{"text": {line}}}' for line in lines)
    data = gzip.compress(text.encode()) if name.endswith("gz") else zstd(text.encode())
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    corpus = Corpus.open([str(tmp_path)], span_bytes=1 + len(data) // 2)
    assert len(corpus.spans) == 3
    with pytest.raises(UsageError, match=r"line \d+: the .* stream is cut short or damaged"):
        read_all(corpus)
    stats = ReadStats()
    found = {record.values["text"] for record in read_all(corpus, on_error="skip", stats=stats)}
    assert 100 < stats.records < 20_000
    assert stats.skipped == 1
    # What was cut in two never passes for a record.
    assert found <= {line.strip('"') for line in lines}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.tsv", b"text\ttext\nx\ty\n", "the header names 'text' more than once"),
        ("a.tsv", b"te\xffxt\nx\n", "line 1: not valid UTF-8"),
        ("a.csv", b"te\xffxt\nx\n", "line 1: not valid UTF-8"),
        ("a.parquet", b"certainly no table", "can't be read as parquet"),
        ("a.arrow", b"certainly no table", "can't be read as arrow"),
        ("a.feather", b"certainly no table", "can't be read as arrow"),
    ],
)
def test_a_file_whose_frame_is_broken_is_refused(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=message):
        read_all(Corpus.open([str(tmp_path)], span_bytes=99))


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    columns = [pa.array(["a"]), pa.array([0]), pa.array([1])]
    table = pa.Table.from_arrays(columns, ["text", "x", "x"])
    pq.write_table(table, tmp_path / "a.parquet")
    (span,) = Corpus.open([str(tmp_path / "a.parquet")], span_bytes=1 << 20).spans
    assert [r.values for r in Corpus.read(span, columns=["text"])] == [{"text": "a"}]
    with pytest.raises(UsageError, match="several columns named 'x'"):
        list(Corpus.read(span, columns=["text", "x"]))


def test_invalid_utf8_in_a_parquet_value(tmp_path: Path) -> None:
    bad = pa.array([b"good", b"\xff", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    corpus = Corpus.open([str(tmp_path)], span_bytes=1 << 20)
    with pytest.raises(UsageError, match="row 2: not valid UTF-8"):
        read_all(corpus)
    stats = ReadStats()
    assert texts_of(corpus, on_error="skip", stats=stats) == ["good", "fine"]
    assert stats.skipped == 1


def test_novels_come_whole(novels: Path) -> None:
    with gzip.open(novels, "rt", encoding="utf-8") as stream:
        expected = [json.loads(line)["text"] for line in stream]
    corpus = Corpus.open([str(novels)], span_bytes=4 << 20)
    assert len(corpus.spans) > 1
    assert sorted(texts_of(corpus)) == sorted(expected)


class TestColumns:
    """`--filter` and renamed columns, in files that have types and in those that have text."""

    def files(self, folder: Path) -> list[Path]:
        rows = [
            {
                "text": f"t{i}",
                "lang": ["en", "de", None][i % 3],
                "n": i % 4,
                "ok": i % 2 == 0,
                "share": i % 8 / 8,
            }
            for i in range(24)
        ]
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pq.write_table(pa.Table.from_pylist(rows), folder / "b.parquet", row_group_size=5)
        lines = [
            "text\tlang\tn\tok\tshare",
            *("\t".join(map(_plain, row.values())) for row in rows),
        ]
        (folder / "c.tsv").write_text("\n".join(lines))
        return [folder / name for name in ("a.jsonl", "b.parquet", "c.tsv")]

    @pytest.mark.parametrize(
        ("filters", "expected"),
        [
            (["lang=en"], [i for i in range(24) if i % 3 == 0]),
            (["lang=en", "lang=de"], [i for i in range(24) if i % 3 < 2]),
            (["lang="], [i for i in range(24) if i % 3 == 2]),
            (["n=2", "lang=de"], [i for i in range(24) if i % 4 == 2 and i % 3 == 1]),
            (["ok=true"], list(range(0, 24, 2))),
            (["ok=1"], []),
            (["n=two"], []),
            (["share=0.25", "share=0.5"], [i for i in range(24) if i % 8 in (2, 4)]),
        ],
    )
    def test_a_filter_keeps_the_same_records_of_every_format(
        self, tmp_path: Path, filters: list[str], expected: list[int]
    ) -> None:
        for path in self.files(tmp_path):
            corpus = Corpus.open([str(path)], span_bytes=100, filters=filters)
            assert corpus.settings["filters"] == filters
            assert texts_of(corpus, columns=["text"]) == [f"t{i}" for i in expected]

    @pytest.mark.parametrize("kind", [pa.int64(), pa.float32(), pa.decimal128(21, 2)])
    def test_a_number_is_compared_by_its_value(self, tmp_path: Path, kind: pa.DataType) -> None:
        numbers = pa.array([1, 2, 3, None]).cast(kind)
        table = pa.table({"text": list("abcd"), "n": numbers, "tags": [["a"]] * 4})
        pq.write_table(table, tmp_path / "a.parquet")
        names = ("2", "2.0", "2.00", "2e0")
        for name in names:
            corpus = Corpus.open([str(tmp_path)], span_bytes=1 << 20, filters=[f"n={name}"])
            assert texts_of(corpus, columns=["text"]) == ["b"]
        (tmp_path / "b.jsonl").write_text('{"text": "a", "tags": {"a": 1}}\n')
        for name in ("a.parquet", "b.jsonl"):
            corpus = Corpus.open([str(tmp_path / name)], span_bytes=1 << 20, filters=["tags=a"])
            with pytest.raises(UsageError, match=" 1: column 'tags' holds a list or an object"):
                texts_of(corpus, columns=["text"])

    def test_renamed_columns_have_their_new_names_everywhere(self, tmp_path: Path) -> None:
        for path in self.files(tmp_path):
            corpus = Corpus.open(
                [str(path)], span_bytes=100, columns=["text=lang", "n=text"], filters=["n=t4"]
            )
            (record,) = read_all(corpus, columns=["text", "n"])
            assert (record.values["text"], record.values["n"]) == ("de", "t4")

    def test_a_field_of_a_column_gets_a_name_of_its_own(self, tmp_path: Path) -> None:
        rows = [{"id": i, "pair": {"en": f"e{i}", "de": f"d{i}"}} for i in range(3)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
        for name in ("a.jsonl", "b.parquet"):
            corpus = Corpus.open(
                [str(tmp_path / name)], span_bytes=100, columns=["source=pair.en", "target=pair.de"]
            )
            records = read_all(corpus, columns=["source", "target"])
            found = [(record.values["source"], record.values["target"]) for record in records]
            assert found == [("e0", "d0"), ("e1", "d1"), ("e2", "d2")]

    def test_wrong_words_are_refused(self, tmp_path: Path) -> None:
        path = str(self.files(tmp_path)[1])
        for options, message in (
            ({"filters": ["lang"]}, "--filter is 'lang', expected COLUMN=VALUE"),
            ({"columns": ["text=a", "b"]}, "names alone .* or renamed ones alone"),
            ({"columns": ["text=a", "text=b"]}, "expected different names"),
            ({"columns": ["text=a", "b=a"]}, "expected different names"),
            ({"columns": ["text="]}, "expected different names"),
        ):
            with pytest.raises(UsageError, match=message):
                Corpus.open([path], span_bytes=100, **options)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=r"row 1 has no column 'x'.*with --filter"):
            read_all(Corpus.open([path], span_bytes=100, filters=["x=1"]), columns=["text"])


def _plain(value: object) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
