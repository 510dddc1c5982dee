"""Caches made to do harm: shards of zeros that fill the memory, unknown ids, links, escapes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from broken_caches import forge, golden_copy, naming, run
from loaded import Program
from make_caches import CAUSAL, CLASSES, make_cache
from test_untrusted import resealed

import kdcache
from kdcache.cache import Cache
from kdcache.cache.check import problems
from kdcache.cache.hdf5 import write_text
from kdcache.cache.shard import ShardData
from kdcache.commands.build.workers import EventLog
from kdcache.errors import CorruptCacheError, UsageError
from kdcache.files import alone
from kdcache.storage import LocalStorage, open_storage
from kdcache.storage.disk import DiskCache
from kdcache.targets import SoftTargets

CHUNK = 1 << 20


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return golden_copy(tmp_path / "golden")


# Memory

ZEROS = zlib.compress(bytes(CHUNK), 9) + bytes(4)
MANY = 20 << 20  # items whose zeros, at four bytes each, are stored in 80 kB


def zeros(file: Any, name: str, kind: str, length: int, *width: int) -> None:
    """A column of zeros that cost a thousandth of their size."""
    step = CHUNK // (np.dtype(kind).itemsize * int(np.prod(width, dtype=np.int64)))
    column = file.create_dataset(
        name,
        (length, *width),
        kind,
        chunks=(step, *width),
        compression="gzip",
        shuffle=True,
        fletcher32=True,
    )
    for start in range(0, length, step):
        column.id.write_direct_chunk((start, *(0 for _ in width)), ZEROS)


def written(file: Any, name: str, values: list[int], kind: str) -> None:
    data = np.array(values, kind)
    file.create_dataset(
        name, data=data, chunks=data.shape, compression="gzip", shuffle=True, fletcher32=True
    )


def tokens_of_one_row(file: Any) -> tuple[int, int, int]:
    written(file, "rows/lengths", [16 * MANY], "<u4")
    written(file, "rows/next_ids", [-100], "<i4")
    for name in ("input_ids", "has_label"):
        zeros(file, f"rows/{name}", "|u1", 16 * MANY)
    for name, kind, width in (("ids", "<u2", 3), ("logprob_steps", "<u2", 3), ("tail", "<f4", 1)):
        file.create_dataset(f"targets/{name}", (0, width), kind)
    return 1, 16 * MANY, 0


def rows_of_nothing(file: Any) -> tuple[int, int, int]:
    for name, kind in (("lengths", "<u4"), ("labels", "<i4"), ("text_bytes", "<u4")):
        zeros(file, f"rows/{name}", kind, MANY)
    for name in ("input_ids", "text"):
        file.create_dataset(f"rows/{name}", (0,), "|u1")
    zeros(file, "targets/logits", "<f4", MANY, 4)
    return MANY, 0, MANY


BOMBS = {"tokens of one row": (tokens_of_one_row, CAUSAL), "rows": (rows_of_nothing, CLASSES)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["tokens of one row", pytest.param("rows", marks=pytest.mark.exhaustive)]
)
def test_a_small_shard_takes_no_large_memory(what: str, tmp_path: Path) -> None:
    fill, task = BOMBS[what]
    codec = "topk:3" if task == CAUSAL else "dense"
    folder = tmp_path / "cache"
    cache = make_cache(folder, [5], task=task, codec=codec, temperatures=(1.0,), classes=4)
    (old,) = (folder / "shards").iterdir()
    old.unlink()
    with h5py.File(tmp_path / "bomb", "w") as file:
        rows, tokens, positions = fill(file)
        for name, text in (("format", "kdcache-shard"), ("task", task), ("codec", codec)):
            write_text(file, name, text)
        span = {"fingerprint": cache.spec.fingerprint, "index": 0, "skipped": 0, "clipped_mass": 0}
        write_text(file, "span", json.dumps(span))
        counts = {"rows": rows, "tokens": tokens, "positions": positions}
        for name, number in (counts | {"version": 1}).items():
            file.attrs[name] = number
    data = (tmp_path / "bomb").read_bytes()
    assert len(data) < 1_500_000
    sha256 = hashlib.sha256(data).hexdigest()
    name = f"00000-{sha256[:16]}.h5"
    (folder / "shards" / name).write_bytes(data)
    facts = counts | {"name": name, "bytes": len(data), "sha256": sha256}
    resealed(
        folder / "manifest.json",
        lambda v: (
            v["shards"][0].update(facts),
            v.update(counts | {"bytes": len(data)}),
        ),
    )
    code = f"""
import resource
from pathlib import Path
from kdcache.cache import Cache
from kdcache.cache.check import problems

taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (2 << 30), taken + (2 << 30)))
for problem in problems(Cache.open({str(folder)!r})):
    print(problem.text)
"""
    program = Program("python", "-c", code)
    said = program.communicate()
    assert program.returncode == 0, said
    assert re.fullmatch(r".*needs up to \d+ bytes of memory.*\n", said)
    with pytest.raises(CorruptCacheError, match="bytes of memory"):
        Cache.open(str(folder)).read(0)  # as training does


# Ids


def test_ids_beyond_the_vocabulary_are_found_in_every_column(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "a", [6], task=CAUSAL, codec="topk:3", temperatures=(1.0,))

    def last_of_first(data: ShardData, name: str) -> ShardData:
        columns = dict(vars(data))
        values = columns[name].copy()
        values[0 if name == "input_ids" else data.offsets[1] - 1] = 64
        return dataclasses.replace(data, **{name: values})

    def entry(data: ShardData) -> ShardData:
        columns = {k: v.copy() for k, v in data.targets.columns.items()}
        columns["ids"][0, 0] = 64
        return dataclasses.replace(data, targets=SoftTargets(cache.codec(), columns))

    changes = {
        "the input id 64": lambda data: last_of_first(data, "input_ids"),
        "the label 64": lambda data: last_of_first(data, "labels"),
        "outside the vocabulary": entry,
    }
    for number, (words, change) in enumerate(changes.items()):
        (found,) = problems(forge(cache, tmp_path / str(number), change))
        assert words in found.text
    classes = make_cache(tmp_path / "b", [6])
    changed = forge(classes, tmp_path / "c", lambda data: last_of_first(data, "input_ids"))
    (found,) = problems(changed)
    assert "the input id 64, expected less than 64" in found.text


@pytest.mark.parametrize("worst", [47, 2**32 - 1])
def test_ranks_beyond_the_vocabulary_are_found(golden: Path, worst: int) -> None:
    cache = Cache.open(str(golden))
    worst = cache.spec.vocab_size if worst == 47 else worst
    table = np.frombuffer((golden / "ranks.u32").read_bytes(), "<u4").copy()
    table[3] = worst
    (golden / "ranks.u32").write_bytes(table.tobytes())
    digest = hashlib.sha256(table.tobytes()).hexdigest()
    spec = dataclasses.replace(cache.spec, ranks=digest)
    resealed(
        golden / "spec.json",
        lambda v: (v["spec"].update(ranks=digest), v["files"].update({"ranks.u32": digest})),
    )
    resealed(
        golden / "manifest.json",
        lambda v: (
            v["files"].update({"ranks.u32": digest}),
            v.update(fingerprint=spec.fingerprint),
        ),
    )
    assert "ranks.u32 is not a list of different ids below" in naming(golden)


# Small files

SMALL = ["spec.json", "manifest.json", "ranks.u32", "tokenizer/tokenizer.json"]


@pytest.mark.parametrize("name", SMALL)
def test_small_files_are_read_with_a_bound_and_not_through_links(name: str, golden: Path) -> None:
    path, away = golden / name, golden.parent / "away"
    storage = LocalStorage(golden)
    whole = storage.read(name)
    shutil.move(path, away)
    path.symlink_to(away)
    assert f"{path} is a link" in naming(golden)
    path.unlink()
    os.mkfifo(path)  # a read of it would wait for ever
    with pytest.raises(CorruptCacheError, match="is not a regular file"):
        storage.read(name)
    path.unlink()
    shutil.copy(away, path)
    assert storage.read(name) == whole
    os.truncate(path, 1 << 40)  # of which nothing is on the disk
    with pytest.raises(CorruptCacheError, match=f"{path} has {1 << 40} bytes, at most"):
        storage.read(name)


def test_folders_of_small_files_are_no_links_either(golden: Path) -> None:
    away = golden.parent / "away"
    shutil.move(golden / "tokenizer", away)
    (golden / "tokenizer").symlink_to(away)
    assert f"{golden}/tokenizer is a link" in naming(golden)
    with pytest.raises(CorruptCacheError, match="is a link"):
        Cache.open(str(golden)).tokenizer()


def test_objects_are_read_with_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_DISK", str(tmp_path))
    storage = open_storage("memory://bounded")
    storage.write("spec.json", b"123456")
    assert storage.read("spec.json", 6) == b"123456"
    with pytest.raises(CorruptCacheError, match="has 6 bytes, at most 5 are allowed"):
        storage.read("spec.json", 5)


# Nothing is written through a link


@pytest.mark.parametrize("folder", ["tmp", "shards", "tokenizer"])
def test_no_file_is_written_through_a_link(folder: str, tmp_path: Path) -> None:
    away = tmp_path / "away"
    away.mkdir()
    (away / "mine").write_text("mine")
    root = tmp_path / "cache"
    root.mkdir()
    (root / folder).symlink_to(away)
    storage = LocalStorage(root)
    for act in (
        lambda: storage.write(f"{folder}/new", b"x"),
        lambda: storage.create(f"{folder}/new", b"x"),
        lambda: storage.remove(f"{folder}/mine"),
    ):
        with pytest.raises(CorruptCacheError, match=f"{folder} is a link"):
            act()
    assert [(p.name, p.read_text()) for p in away.iterdir()] == [("mine", "mine")]


def test_a_build_in_a_folder_with_links_writes_nothing_elsewhere(golden: Path) -> None:
    away = golden.parent / "away"
    away.mkdir()
    cache = Cache.open(str(golden))
    data = cache.read(0)
    (golden / "manifest.json").unlink()
    shutil.rmtree(golden / "shards")
    (golden / "shards").symlink_to(away)
    with pytest.raises(CorruptCacheError, match="shards is a link"):
        Cache.resume(str(golden)).commit(0, data)
    assert list(away.iterdir()) == []


def test_events_are_not_appended_through_a_link(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away, root = tmp_path / "away", tmp_path / "cache"
    root.mkdir()
    away.write_text("mine")
    (root / "events.jsonl").symlink_to(away)
    log = EventLog(LocalStorage(root))
    log("begin")
    log.close()
    assert away.read_text() == "mine"
    assert "events of this run are not recorded" in caplog.text


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "checkpoint-3", "runs/events"])
def test_no_run_is_written_through_a_link(name: str, tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", [4], temperatures=(1.0,))
    away, out = tmp_path / "away", tmp_path / "run"
    away.write_text("mine")
    (out / name).parent.mkdir(parents=True)
    (out / name).symlink_to(away)
    words = ["--student", "bilstm", "--temperature", "1", "--out", str(out)]
    result = run("train", "--cache", str(tmp_path / "cache"), *words)
    assert result.exit_code == 2
    assert f"{out / name} is a link" in result.stderr
    for work in ("sweep", "fine-tuning"):
        with pytest.raises(UsageError, match="is a link"), alone(out, work):
            pass
    assert away.read_text() == "mine"
    own = tmp_path / "own"
    own.symlink_to(tmp_path / "there")
    (tmp_path / "there").mkdir()
    with alone(own, "training"):  # the user's own word
        (own / "x").touch()


@pytest.mark.parametrize("name", [".lock", "key", "key.part"])
def test_copies_are_not_written_through_a_link(name: str, tmp_path: Path) -> None:
    away, disk = tmp_path / "away", DiskCache(tmp_path / "disk")
    disk.folder.mkdir()
    (disk.folder / name).symlink_to(away)
    with (
        pytest.raises(UsageError, match="cannot write to"),
        disk.hold("key", lambda: (3, lambda file: file.write(b"abc") and None)),
    ):
        pass
    assert not away.exists()


# Terminals

ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f"


def test_no_terminal_escape_is_printed(tmp_path: Path) -> None:
    """Those of names and texts of a cache, of its errors, and of file names."""
    make_cache(tmp_path / "cache", [4])
    (tmp_path / "cache" / f"stray{ESCAPE}").touch()
    cache = Cache.open(str(tmp_path / "cache"))
    names = tuple(f"{name}{ESCAPE}" for name in cache.spec.label_names or ())

    def text(data: ShardData) -> ShardData:
        return dataclasses.replace(data, texts=[f"{t}{ESCAPE}" for t in data.texts or ()])

    forged = tmp_path / "forged"
    forge(cache, forged, text, label_names=names)
    corpus = forged / "spec.json"
    resealed(corpus, lambda v: v["notes"].update(teachers=[f"teacher{ESCAPE}"]))
    outputs = [
        run("verify", str(tmp_path / "cache")),
        run("inspect", str(forged)),
        run("inspect", str(forged), "--row", "1"),
        run("inspect", str(tmp_path / f"none{ESCAPE}")),
    ]
    for result in outputs:
        printed = result.stdout + result.stderr
        assert printed.strip()
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", printed), ascii(printed)
    assert "owned" in outputs[2].stdout


def test_all_that_is_printed_goes_through_one_place() -> None:
    prints = re.compile(r"click\.echo\(|\bprint\(|console\.print\(|sys\.std(out|err)\.write\(")
    escapes = re.compile(
        r"printable\(|_safe\(|json\.dumps\(|map\(Text, cells\)|console.print\(table\)"
    )
    found = [
        f"{path.name}: {line.strip()}"
        for path in sorted((Path(kdcache.__file__).parent / "cli").rglob("*.py"))
        for line in path.read_text().splitlines()
        if prints.search(line) and not escapes.search(line)
    ]
    assert found == []
