"""Deal: files that cannot be entered in the middle are read once for all their parts."""

from __future__ import annotations

import csv
import dataclasses
import errno
import gzip
import io
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import further
from hypothesis import given
from hypothesis import strategies as st

from kdcache.commands.build.build import build
from kdcache.commands.build.driver import Progress, SpansLeft
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.build.workers import Stopped
from kdcache.corpus import Corpus, ReadStats, Span, files, parts, tables, text
from kdcache.errors import IncompleteError, UsageError

TEXTS = [f"{i}: " + "words and words, " * (i % 40) for i in range(400)]
LINES = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()


def as_csv(texts: list[str]) -> bytes:
    stream = io.StringIO()
    csv.writer(stream).writerows([["text", "label"], *([t + '\n"x"', "é"] for t in texts)])
    return stream.getvalue().encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def stream(texts: list[str], rows: int, codec: str | None) -> bytes:
    """An Arrow stream of batches of some rows."""
    table = pa.table(
        {
            "text": texts,
            "ids": [list(range(len(text) % 9)) for text in texts],
            "messages": [[{"role": "user", "content": text}] for text in texts],
            "score": [None if len(text) % 7 == 0 else len(text) / 4 for text in texts],
        }
    )
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return bytes(sink.getvalue())


BAD = LINES[:900] + b'\n{"text": \xff}\n\n{"text": "' + b"x" * 9000 + b'"}\nnull\n' + LINES[900:]
FILES: dict[str, bytes] = {
    "a.jsonl.gz": gzip.compress(b"\xef\xbb\xbf" + LINES),
    "a.jsonl.zst": zstd(LINES[:5000]) + zstd(LINES[5000:]),
    "bad.jsonl.gz": gzip.compress(BAD),
    "cut.jsonl.gz": gzip.compress(LINES)[:-900],
    "a.tsv.gz": gzip.compress(("text\tlabel\n" + "".join(f"{t}\t1\n" for t in TEXTS)).encode()),
    "a.txt.gz": gzip.compress("\n\n".join(TEXTS).encode()),
    "a.conll.gz": gzip.compress("".join(f"{t[:9]}\tO\nx\tO\n\n" for t in TEXTS).encode()),
    "a.csv": as_csv(TEXTS),
    "bad.csv": as_csv(TEXTS[:50]) + b'a,b,c\n"a"b,c\n\xff,1\n' + b"y" * 9000 + b",1\nlast,1\n",
    "a.csv.gz": gzip.compress(as_csv(TEXTS)),
    "a.arrow": stream([*TEXTS[:99], "z" * 9000, *TEXTS[99:]], 7, None),
    "zstd.arrow": stream(TEXTS, 90, "zstd"),
}


@pytest.fixture
def decompressed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts decompressed bytes."""
    counts: Counter[str] = Counter()
    readinto = files._Decompressed.readinto

    def counted(self: Any, buffer: Any) -> int:
        size = readinto(self, buffer)
        counts["bytes"] += size
        return size

    monkeypatch.setattr(files._Decompressed, "readinto", counted)
    return counts


@pytest.fixture(autouse=True)
def nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_KEPT", parts._Kept())
    monkeypatch.setenv("KDCACHE_DISK", str(tmp_path / "disk"))


def plain(values: Any) -> Any:
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}


def read(span: Span) -> tuple[list[Any], ReadStats]:
    stats = ReadStats()
    found = Corpus.read(span, on_error="skip", stats=stats)
    # Lists of numbers of a table are arrays, which do not compare as wholes.
    return [(plain(record.values), str(record.location)) for record in found], stats


def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each part read all of its file."""
    monkeypatch.setattr(text._Text, "records", text._Text._own)
    monkeypatch.setattr(tables.Arrow, "_stream_rows", tables.Arrow._own)


@pytest.mark.parametrize("limit", [111, *further(None)])
@pytest.mark.parametrize("name", FILES)
def test_parts_are_those_of_reading_the_whole_file_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, limit: int | None
) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    monkeypatch.setattr(parts, "_BLOCK", 700)  # several blocks a part
    corpus = Corpus.open(
        [str(tmp_path / name)],
        span_bytes=len(FILES[name]) // 20,
        limit=limit,
        documents="paragraph",
        max_record_bytes=5000,
    )
    assert len(corpus.spans) > 1
    order = random.Random(3).sample(range(len(corpus.spans)), len(corpus.spans))
    found = {i: read(corpus.spans[i]) for i in [*order, order[0]]}
    whole(monkeypatch)
    for i in order:
        assert found[i] == read(corpus.spans[i])
    assert sum(len(records) for records, _ in found.values()) > 40


def test_a_file_is_decompressed_once_whatever_its_parts(
    tmp_path: Path, decompressed: Counter[str]
) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES * 20))
    corpus = Corpus.open([str(path)], span_bytes=1000)
    assert len(corpus.spans) > 20
    for span in corpus.spans:
        assert read(span)[0]
    assert decompressed["bytes"] == len(LINES) * 20
    assert parts._KEPT._parts is None, "dropped once all is read"
    assert not list((tmp_path / "disk-parts").iterdir()), "it has no name"


def test_a_stream_of_arrow_is_read_once_and_named_if_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.arrow"
    data = stream(TEXTS * 4, 50, "zstd")
    path.write_bytes(data)
    passes: list[int] = []
    blocks = tables.Arrow._blocks
    monkeypatch.setattr(tables.Arrow, "_blocks", lambda self: passes.append(1) or blocks(self))
    spans = Corpus.open([str(path)], span_bytes=len(data) // 12).spans
    for number in (3, *range(len(spans))):
        found = [record.values["text"] for record in Corpus.read(spans[number], columns=["text"])]
        assert found == (TEXTS * 4)[number :: len(spans)]
    assert len(passes) == 1
    assert {span.group for span in spans} == {str(path)}, "a worker reads all of its parts"
    path.write_bytes(data[:-900])
    for span in Corpus.open([str(path)], span_bytes=len(data) // 3).spans:
        with pytest.raises(UsageError, match=r"a\.arrow: can't be read as arrow \(Expected"):
            list(Corpus.read(span))


def test_a_file_that_was_rewritten_is_dealt_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    for texts in (TEXTS, TEXTS[::-1]):
        lines = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
        path.write_bytes(gzip.compress(lines))
        span = Corpus.open([str(path)], span_bytes=1000).spans[1]
        assert [v["text"] for v, _ in read(span)[0]] == texts[1 :: span.parts]


@pytest.mark.parametrize("room", ["none", "some", "no folder"])
def test_without_room_each_part_reads_the_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    room: str,
) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES))
    if room == "no folder":
        (tmp_path / "disk-parts").write_text("in the way")
    else:
        free = 100 if room == "none" else 2 * len(path.read_bytes()) + 2
        usage = type("", (), {"free": free})
        monkeypatch.setattr(parts.shutil, "disk_usage", lambda _: usage)
        monkeypatch.setattr(parts, "_BLOCK", 700)
    spans = Corpus.open([str(path)], span_bytes=1000).spans
    found = [values["text"] for span in spans for values, _ in read(span)[0]]
    assert sorted(found) == sorted(TEXTS)
    assert caplog.text.count("no room for the parts") == 1
    assert "KDCACHE_DISK" in caplog.text


def test_a_stopped_worker_leaves_the_pass_and_another_makes_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES * 10))
    span = Corpus.open([str(path)], span_bytes=1000).spans[1]
    calls: list[int] = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        list(Corpus.read(span, progress=stop))
    assert len(read(span)[0]) == len(range(1, 10 * len(TEXTS), span.parts))


def test_a_disk_that_fails_is_no_damage_and_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES))
    span = Corpus.open([str(path)], span_bytes=1000).spans[1]
    readinto = files._Decompressed.readinto

    def failing(self: Any, buffer: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files._Decompressed, "readinto", failing)
    with pytest.raises(OSError, match="Input/output"):
        read(span)
    monkeypatch.setattr(files._Decompressed, "readinto", readinto)
    assert len(read(span)[0]) == len(TEXTS[1 :: span.parts])


def gz_corpus(folder: Path, texts: list[str], count: int) -> tuple[str, int]:
    """Compressed files of some texts; their pattern and all their text's bytes."""
    size = 0
    folder.mkdir()
    for i in range(count):
        lines = "".join(json.dumps({"text": t}) + "\n" for t in texts[i::count]).encode()
        (folder / f"{i}.jsonl.gz").write_bytes(gzip.compress(lines))
        size += len(lines)
    return str(folder), size


@pytest.mark.slow
def test_a_build_that_is_killed_decompresses_once_more_and_makes_the_same_bytes(
    small_build: BuildOptions,
    corpus_texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    decompressed: Counter[str],
) -> None:
    corpus, size = gz_corpus(tmp_path / "corpus", corpus_texts[:120], 1)
    options = dataclasses.replace(
        small_build, corpus=(corpus,), out=str(tmp_path / "a"), shard_tokens=300
    )

    def interrupt(progress: Progress) -> None:
        if progress.done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(IncompleteError):
        build(options, on_progress=interrupt)
    result = build(options)
    assert result.spans > 8
    assert result.made < result.spans
    # Planning samples the beginning, in each run.
    assert decompressed["bytes"] <= 4 * size < result.spans * size
    whole(monkeypatch)
    build(dataclasses.replace(options, out=str(tmp_path / "b")))
    made, expected = (
        sorted((p.name, p.read_bytes()) for p in (tmp_path / out / "shards").iterdir())
        for out in "ab"
    )
    assert made == expected


class TestSpansLeft:
    @given(
        groups=st.lists(st.integers(0, 5), max_size=60),
        workers=st.lists(st.integers(0, 3), min_size=1, max_size=200),
    )
    def test_each_span_once_and_few_workers_a_group(
        self, groups: list[int], workers: list[int]
    ) -> None:
        groups = sorted(groups)  # the parts of a file are neighbours
        left = SpansLeft(lambda span: str(groups[span]) if groups[span] else "")
        for span in range(len(groups)):
            left.append(span)
        at: dict[int, str] = {}
        begun: list[str] = []
        taken = []
        turn = iter(workers * (len(groups) + 1))
        while left:
            worker = next(turn)
            span = left.take(at.get(worker, ""))
            taken.append(span)
            group = str(groups[span]) if groups[span] else ""
            if group and group != at.get(worker):
                begun.append(group)
            at[worker] = group
        assert sorted(taken) == list(range(len(groups)))
        # None is begun twice before all are begun, and one worker begins each once.
        named = {str(group) for group in groups if group}
        assert set(begun) == set(begun[: len(named)]) == named
        if len(set(workers)) == 1:
            assert len(begun) == len(named)

    def test_spans_of_no_group_come_in_order(self) -> None:
        left = SpansLeft(lambda span: "")
        for span in (3, 1, 2):
            left.append(span)
        left.appendleft(9)
        assert len(left) == 4
        assert [left.take("") for _ in range(4)] == [9, 3, 1, 2]
        assert not left

    def test_a_span_that_comes_back_goes_to_its_group(self) -> None:
        left = SpansLeft(lambda span: "a" if span < 4 else "b")
        for span in range(8):
            left.append(span)
        assert [left.take(g) for g in ("", "a", "")] == [0, 1, 4]
        left.appendleft(1)
        assert [left.take(g) for g in ("a", "a", "b", "a", "a")] == [1, 2, 5, 3, 6]
        left.appendleft(0)
        assert [left.take(g) for g in ("b", "b")] == [7, 0]
