"""Which files a corpus takes, which it refuses, and what it notices when they change."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from conftest import further

from kdcache.corpus import Corpus
from kdcache.corpus.listing import expand
from kdcache.errors import IncompleteError, UsageError


def names(folder: Path, *patterns: str, split: str | None = None) -> list[str]:
    """The files that patterns below a folder name, relative to it."""
    found = expand([str(folder / pattern) for pattern in patterns or ("",)], split=split)
    return [os.path.relpath(file.url, folder) for file in found]


def fill(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "x"}\n')
    return folder


# -- what is no file -----------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["", "*", "**", "b.jsonl", "deep"])
def test_what_is_no_file_is_refused_by_name(tmp_path: Path, pattern: str) -> None:
    fill(tmp_path, "a.jsonl", "deep/a.jsonl")
    path = tmp_path / ("deep/b.jsonl" if pattern == "deep" else "b.jsonl")
    path.symlink_to("nowhere")
    with pytest.raises(UsageError, match=r"b\.jsonl: a link to nowhere, which is not there"):
        names(tmp_path, pattern)
    path.unlink()
    os.mkfifo(path)  # a read of it would wait for ever
    with pytest.raises(UsageError, match=r"b\.jsonl is not a regular file"):
        names(tmp_path, pattern)


@pytest.mark.parametrize("pattern", ["", "**", "*", "**/*.jsonl"])
def test_folders_that_hold_themselves_are_refused(tmp_path: Path, pattern: str) -> None:
    fill(tmp_path, "a/1.jsonl", "b/2.jsonl")
    (tmp_path / "a/to-b").symlink_to(tmp_path / "b")
    found = names(tmp_path, pattern)
    assert "a/to-b/2.jsonl" in found, "a linked folder is read"
    (tmp_path / "b/to-a").symlink_to(tmp_path / "a")
    with pytest.raises(UsageError, match="a folder that holds it"):
        names(tmp_path, pattern)


def test_a_listing_error_is_not_passed_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "a.jsonl", "secret/b.jsonl")
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UsageError, match="secret: may not be read"):
        names(tmp_path)


@pytest.mark.parametrize(
    "begun", ["shards/00000-00.h5", "manifest.json", "tokenizer/tokenizer.json"]
)
@pytest.mark.parametrize("pattern", ["", "*", "**", "**/*.json"])
def test_a_cache_in_a_corpus_is_no_input(tmp_path: Path, begun: str, pattern: str) -> None:
    fill(tmp_path, "a.json", "deep/b.json", "deep/spec.json")
    before = names(tmp_path, pattern)
    fill(tmp_path, "out/spec.json", "out/events.jsonl", f"out/{begun}", "deep/cache/spec.json")
    fill(tmp_path, "deep/cache/manifest.json", "deep/cache/tokenizer/tokenizer.json")
    assert names(tmp_path, pattern) == before
    store = fsspec.filesystem("memory")
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        store.pipe_file(f"/here/{path.relative_to(tmp_path)}", path.read_bytes())
    try:
        if not pattern:
            assert [file.url for file in expand(["memory://here"])] == [
                f"memory:///here/{name}" for name in before
            ]
    finally:
        store.rm("/here", recursive=True)


# -- splits --------------------------------------------------------------------------------

HUB = ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet")
LAYOUTS: dict[str, tuple[dict[str, list[str]], str]] = {
    "shards": (
        {
            "train": list(HUB),
            "test": ["data/test-00000-of-00001.parquet"],
            "unsupervised": ["data/unsupervised-00000-of-00001.parquet"],
        },
        r"test \(1 file\), train \(2 files\), unsupervised \(1 file\)",
    ),
    "files": (
        {"train": ["train.jsonl"], "validation": ["dev.jsonl"], "test": ["test.jsonl"]},
        r"validation \(1 file\), test \(1 file\), train",
    ),
    "folders": (
        {"train": ["train/0.jsonl", "train/1.jsonl"], "test": ["test/0.jsonl"]},
        r"test \(1 file\), train \(2 files\)",
    ),
    "prefixed": (
        {
            "train": ["c4-train.00000-of-01024.json.gz", "c4-train.00001-of-01024.json.gz"],
            "validation": ["c4-validation.00000-of-00008.json.gz"],
        },
        r"train \(2 files\), validation \(1 file\)",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_several_splits_needs_a_choice(tmp_path: Path, layout: str) -> None:
    splits, message = LAYOUTS[layout]
    every = sorted(name for files in splits.values() for name in files)
    fill(tmp_path, *every)
    glob = "*/*" if "/" in every[0] else "*"
    for pattern in ("", glob, "**"):
        with pytest.raises(UsageError, match=f"several splits: {message}.*--split"):
            names(tmp_path, pattern)
        for split, files in splits.items():
            assert names(tmp_path, pattern, split=split) == files
        assert names(tmp_path, pattern, split="all") == every
        with pytest.raises(UsageError, match="has no split 'other'; its splits are"):
            names(tmp_path, pattern, split="other")
    # A file that is named is the user's own choice.
    assert names(tmp_path, *every) == every
    both = list(dict.fromkeys([every[0], *splits["train"]]))
    assert names(tmp_path, every[0], "", split="train") == both


def test_names_that_tell_no_split_need_no_choice(tmp_path: Path) -> None:
    fill(tmp_path, "en-00000-of-00002.jsonl", "de-00000-of-00002.jsonl", "latest.txt", "trains.txt")
    assert len(names(tmp_path)) == 4
    fill(tmp_path, "train.jsonl")
    assert len(names(tmp_path / "", "train.jsonl", "latest.txt")) == 2
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(UsageError, match=r"--split is 'train', but no file.*Leave --split out"):
        names(tmp_path, split="train")


def test_a_saved_dataset_dict(tmp_path: Path) -> None:
    for split, texts in (("train", ["a", "b"]), ("test", ["c"]), ("extra", ["d"])):
        (tmp_path / split).mkdir()
        table = pa.table({"text": texts})
        path = tmp_path / split / "data-00000-of-00001.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        # What `datasets` writes beside it: no records, or records again.
        for name in ("dataset_info.json", "state.json"):
            (tmp_path / split / name).write_text('{\n "features": {}\n}')
        (tmp_path / split / "cache-0123456789abcdef.arrow").write_bytes(path.read_bytes())
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test", "extra"]}')
    with pytest.raises(UsageError, match=r"several splits: extra \(1 file\), test \(1 file\)"):
        Corpus.open([str(tmp_path)], span_bytes=1 << 20)
    for split, texts in (("train", ["a", "b"]), ("extra", ["d"])):
        corpus = Corpus.open([str(tmp_path)], span_bytes=1 << 20, split=split)
        found = [record.values["text"] for span in corpus.spans for record in Corpus.read(span)]
        assert found == texts
    alone = Corpus.open([str(tmp_path / "test")], span_bytes=1 << 20)
    assert [file.url for file in alone.files] == [str(tmp_path / "test/data-00000-of-00001.arrow")]


# -- changes -------------------------------------------------------------------------------

TEXTS = [f"number {i} of many" for i in range(2_000)]
LINES = [json.dumps({"text": text}) for text in TEXTS]


def write(path: Path, texts: list[str]) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=1000)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(pa.table({"text": texts}), path, chunksize=1000)
    elif path.suffix == ".csv":
        path.write_text("text\n" + "".join(f"{text}\n" for text in texts))
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(texts))
    else:
        path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    os.utime(path, ns=(10**18, 10**18))


def cut(path: Path) -> None:
    data = path.read_bytes()
    half = len(data) // 2  # of compressed bytes none may be a line's end
    path.write_bytes(data[: data.rfind(b"\n", 0, half) + 1 or half])


def blank(path: Path) -> None:
    path.write_bytes(b" " * (path.stat().st_size - 1) + b"\n")


def replace(path: Path) -> None:
    size = path.stat().st_size
    write(path.with_name("other" + path.suffix), [text.replace("many", "more") for text in TEXTS])
    data = path.with_name("other" + path.suffix).read_bytes()[:size].ljust(size, b"\n")
    path.with_name("other" + path.suffix).write_bytes(data)
    path.with_name("other" + path.suffix).replace(path)


def touch_middle(path: Path) -> None:
    """Another byte in the middle: size, first and last 64 KiB stay."""
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(b"Z" if byte != b"Z" else b"Y")


CHANGES = [cut, blank, replace, touch_middle, os.unlink]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(("a.jsonl", change) for change in CHANGES),
        *((f"a.{kind}", replace) for kind in ("jsonl.gz", "parquet", "feather")),
        *further(*(("a.jsonl.gz", c) for c in CHANGES if c is not replace)),
        *further(*((f"a.{kind}", c) for kind in ("csv", "txt") for c in CHANGES)),
        *further(
            *((f"a.{k}", c) for k in ("parquet", "feather") for c in CHANGES if c is not replace)
        ),
    ],
)
def test_a_file_that_changes_is_refused_by_the_span_that_meets_it(
    tmp_path: Path, name: str, change: Callable[[Path], object]
) -> None:
    path = tmp_path / name
    write(path, TEXTS)
    corpus = Corpus.open([str(path)], span_bytes=20_000, divide=True)
    # Before a span is read.
    list(Corpus.read(corpus.spans[0]))
    corpus.check_unchanged()
    change(path)
    message = rf"{name}: the file (was changed|is gone)"
    for span in (corpus.spans[0], corpus.spans[-1]):
        with pytest.raises(UsageError, match=message):
            list(Corpus.read(span))
        with pytest.raises(UsageError, match=message):
            list(Corpus.read(span, on_error="skip"))
    with pytest.raises(UsageError, match=message):
        corpus.check_unchanged()
    if name == "a.feather":
        return  # a mapped file: one that is cut while it is read ends the process
    # While it is read.
    write(path, TEXTS)
    reading = Corpus.read(Corpus.open([str(path)], span_bytes=1 << 30, divide=True).spans[0])
    next(reading)
    change(path)
    with pytest.raises(UsageError, match=message):
        list(reading)


def test_the_hub_is_not_asked_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        pytest.fail("a request was sent")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "create_connection", never)
    monkeypatch.setattr(socket, "getaddrinfo", never)
    with pytest.raises(UsageError, match="hf://datasets/a/b: HF_HUB_OFFLINE is set"):
        expand(["hf://datasets/a/b"])


def test_without_a_network_the_answer_comes_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("kdcache.storage.filesystem.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("kdcache.storage.filesystem.time.sleep", lambda _: None)
    monkeypatch.setattr("kdcache.storage.filesystem._ANSWERED", set())
    error = ConnectionError("no route")
    error.__cause__ = socket.gaierror(-2, "Name or service not known")
    store = fsspec.filesystem("memory")
    asked = itertools.count()

    def info(self: object, path: str) -> None:
        next(asked)
        raise error

    monkeypatch.setattr(type(store), "info", info)
    with pytest.raises(IncompleteError, match="has not answered successfully"):
        expand(["memory://nowhere"])
    assert next(asked) < 10
    # A store that has answered before is waited for.
    monkeypatch.setattr("kdcache.storage.filesystem._ANSWERED", {type(store)})
    with pytest.raises(IncompleteError, match="has not answered successfully"):
        expand(["memory://nowhere"])
    assert next(asked) > 100


@pytest.fixture
def store() -> Iterator[Any]:
    memory = fsspec.filesystem("memory")
    yield memory
    memory.rm("/changing", recursive=True)


def test_a_remote_file_that_changes_is_refused(store: Any) -> None:
    data = "".join(line + "\n" for line in LINES).encode()
    store.pipe_file("/changing/a.jsonl", data)
    store.pipe_file("/changing/b.jsonl", data)
    for pattern in ("memory://changing", "memory://changing/*", "memory://changing/a.jsonl"):
        store.pipe_file("/changing/a.jsonl", data)
        corpus = Corpus.open([pattern], span_bytes=20_000)
        corpus.check_unchanged()
        list(Corpus.read(corpus.spans[0]))
        store.pipe_file("/changing/a.jsonl", data.replace(b"many", b"more"))
        with pytest.raises(UsageError, match=r"a\.jsonl: the file was changed .*been written to"):
            list(Corpus.read(corpus.spans[1]))
        with pytest.raises(UsageError, match=r"a\.jsonl: the file was changed"):
            corpus.check_unchanged()
