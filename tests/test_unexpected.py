"""Exceptions that nobody planned: one line, the traceback kept, an exit code that is right.

They are put into a dozen points of the commands, of workers in this process and of workers on Ray.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import importlib
import json
import os
import pickle
import random
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from broken_caches import forge, run
from click.testing import Result
from make_caches import CAUSAL, CLASSES, make_cache
from small_runs import LLAMA
from transformers import AutoTokenizer

from kdcache.cache import Cache
from kdcache.cache.shard import ShardData
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.corpus import Corpus, ReadStats, Record
from kdcache.errors import IncompleteError, KdcacheError, UnexpectedError, UsageError, doing
from kdcache.rows import RowSpec, make_encoder
from kdcache.targets import SoftTargets

POINTS = [
    ("build", "corpus.corpus:_read"),
    ("build", "rows.encoders:TextEncoder.encode"),
    ("build", "teacher.teacher:load_models"),
    ("build", "teacher.model:TeacherModel._slices"),
    ("build", "commands.build.packer:Packer.put"),
    ("build", "cache.cache:Cache.commit"),
    ("build", "commands.build.prepare:Corpus.open"),
    ("build", "commands.build.make:prepare_manifest"),
    ("train", "cache.cache:Cache.parse"),
    ("train", "stream.reader:TargetStream._collate"),
    ("train", "student.wrapper:DistilledStudent.forward"),
    ("train", "commands.train.run:model_card"),
    ("inspect", "cache.cache:Cache.parse"),
    ("verify", "commands.verify:problems"),
    ("export", "cache.cache:Cache.parse"),
    ("report", "cache.cache:Cache.parse"),
    ("transcode", "cache.cache:Cache.parse"),
    ("evaluate", "cache.cache:Cache.parse"),
    ("plan", "teacher.model:TeacherModel._slices"),
    ("gc", "commands.upkeep:_scratch"),
]
PASSING = {  # those of a worker, a training and a check, tried with an error of a disk too
    *("commands.build.packer:Packer.put", "commands.train.run:model_card"),
    "commands.verify:problems",
}
SPANS = ("corpus.corpus", "rows.encoders", "teacher.model", "packer:Packer", "Cache.commit")


def raising(point: str, error: Exception) -> Callable[..., Any]:
    """Put an exception into a function of the package; returns what was there."""
    module, _, path = point.partition(":")
    *owners, name = path.split(".")
    place: Any = importlib.import_module(f"kdcache.{module}")
    for owner in owners:
        place = getattr(place, owner)
    before = place.__dict__[name]

    def fail(*_: Any, **__: Any) -> Any:
        raise copy.copy(error)

    setattr(place, name, classmethod(fail) if isinstance(before, classmethod) else fail)
    return before


@pytest.fixture
def words(
    small_build: BuildOptions, lm_caches: dict[str, str], tmp_path: Path
) -> Callable[[str], list[str]]:
    """A small job for every command."""
    (tmp_path / "tiny.json").write_text(json.dumps(LLAMA))
    cache, out = lm_caches["topk:8"], str(tmp_path / "out")
    teacher = ["--teacher", *small_build.teacher, "--corpus", *map(str, small_build.corpus)]
    jobs = {
        "build": [*teacher, "--out", out, "--workers", "0", "--max-length", "48"],
        "plan": [*teacher, "--rows", "4", "--max-length", "48"],
        "train": ["--cache", cache, "--student", str(tmp_path / "tiny.json"), "--out", out],
        "inspect": [cache, "--row", "0"],
        "verify": [cache],
        "gc": [cache],
        "export": [cache, "--out", out],
        "report": [cache, "--out", out],
        "transcode": [cache, "--codec", "topk:2", "--out", out, "--workers", "0"],
        "evaluate": ["--student", *small_build.teacher, "--cache", cache],
    }
    return lambda name: [name, *jobs[name]]


def line_of(result: Result) -> str:
    """The error of a command, and its traceback's file, which is read and removed."""
    assert isinstance(result.exception, SystemExit), "no exception leaves the command line"
    assert "Traceback" not in result.output
    line = result.stderr[result.stderr.index("Error: ") :].strip()
    path = Path(re.findall(r"The traceback is in (\S+); -v shows it\.$", line)[0])
    assert re.search(r"Traceback \(most recent call last\)(.|\n)*injected", path.read_text())
    path.unlink()
    return line


@pytest.mark.parametrize(("command", "point"), POINTS)
def test_an_exception_at_any_point_is_a_line_and_a_file(
    command: str,
    point: str,
    words: Callable[[str], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, _, path = point.partition(":")
    owner = importlib.import_module(f"kdcache.{module}")
    for name in path.split(".")[:-1]:
        owner = getattr(owner, name)
    name = path.split(".")[-1]
    monkeypatch.setattr(owner, name, owner.__dict__[name])  # puts it back
    raising(point, KeyError("injected"))
    result = run(*words(command))
    assert result.exit_code == 1
    line = line_of(result)
    assert "KeyError: 'injected'" in line
    if command == "build" and any(part in point for part in SPANS):
        assert "text.jsonl" in line  # which file or span it was
    if point not in PASSING:
        return
    raising(point, OSError(errno.EIO, "injected", "some/file"))
    result = run(*words(command))
    assert result.exit_code == 3
    line = line_of(result)
    assert "some/file: injected" in line
    assert "Run the same command" in line


def test_the_traceback_is_shown_with_v_and_has_no_secret(
    words: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise KeyError("http://me:feedbeef@host/a")

    monkeypatch.setattr(Cache, "parse", fail)
    result = run("-v", *words("inspect"))
    assert "Traceback (most recent call last)" in result.stderr
    assert "The traceback is above." in result.stderr
    assert "feedbeef" not in result.output
    path = Path(re.findall(r"in (\S+); -v", run(*words("inspect")).stderr)[0])
    assert path.stat().st_mode & 0o077 == 0
    assert "feedbeef" not in path.read_text()
    path.unlink()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyError("x"), 1),
        (RuntimeError("shapes"), 1),
        (OSError(errno.ENOENT, "gone", "f"), 1),
        (OSError(errno.EACCES, "denied", "f"), 2),
        (OSError(errno.ENOSPC, "full", "f"), 3),
        (OSError(errno.EIO, "bad", "f"), 3),
        (OSError(errno.ESTALE, "stale", "f"), 3),
        (OSError(errno.EMFILE, "many", "f"), 3),
        (MemoryError(), 3),
        (ConnectionResetError(errno.ECONNRESET, "reset"), 3),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), 3),
    ],
)
def test_the_exit_code_says_whether_the_same_command_goes_on(error: Exception, code: int) -> None:
    with pytest.raises(type(error)) as caught, doing("reading a"), doing("reading b"):
        raise error
    found = UnexpectedError.of(caught.value)
    assert found.exit_code == code
    assert found.line.endswith(" while reading b while reading a")
    assert UnexpectedError.of(found) is found
    sent = pickle.loads(pickle.dumps(found))
    assert (str(sent), sent.trace, sent.exit_code) == (str(found), found.trace, code)
    # What is raised for another's sake is judged by that.
    passing = code == 3 and getattr(error, "errno", None) != errno.ENOSPC
    with pytest.raises(ValueError, match="later") as later:
        raise ValueError("later") from error
    assert UnexpectedError.of(later.value).exit_code == (3 if passing else 1)


def test_planned_errors_stay_as_they_are() -> None:
    with pytest.raises(UsageError, match=r"^wrong$"), doing("reading"):
        raise UsageError("wrong")


# Workers


@pytest.fixture
def poisoned(small_build: BuildOptions, tmp_path: Path, corpus_texts: list[str]) -> BuildOptions:
    """A build of several spans, of whose records one ends the teacher's forward in a KeyError."""
    corpus = tmp_path / "texts"
    corpus.mkdir()
    for number in range(3):
        lines = [json.dumps({"text": text}) for text in corpus_texts[number * 5 : number * 5 + 5]]
        (corpus / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    with (corpus / "1.jsonl").open("a") as file:
        file.write('{"text": "zzzz poison zzzz"}\n')
    return dataclasses.replace(
        small_build, corpus=(str(corpus),), packing="none", max_length=48, codec="topk:4"
    )


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward of the tiny teacher ends in a KeyError at a row that begins with two same ids."""
    from transformers import LlamaModel

    original = LlamaModel.forward

    def forward(self: Any, input_ids: Any, *rest: Any, **more: Any) -> Any:
        if any(row[0] == row[1] for row in input_ids.tolist()):
            raise KeyError("injected")
        return original(self, input_ids, *rest, **more)

    monkeypatch.setattr(LlamaModel, "forward", forward)


@pytest.mark.slow
def test_a_forward_that_fails_each_time_is_the_teachers(
    poisoned: BuildOptions, poison: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KdcacheError) as caught:
        build(poisoned)
    monkeypatch.undo()
    assert not isinstance(caught.value, IncompleteError)
    text = str(caught.value)
    assert "1 of 3 spans failed 3 times" in text
    assert "1.jsonl: the lines that start in bytes 0-" in text
    assert "KeyError: 'injected' while the teacher answered the row 'zzzz poison zzzz'" in text
    assert "to try them again" not in text
    assert "in forward" in caught.value.trace
    # Once the teacher is mended, the same command makes what is missing.
    assert build(poisoned).made == 1


@pytest.mark.slow
def test_errors_of_a_disk_are_tried_again_with_the_same_command(
    poisoned: BuildOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Cache.commit

    def fails(self: Cache, span: int, *rest: Any, **more: Any) -> Any:
        if span == 2:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "shards/x")
        return commit(self, span, *rest, **more)

    monkeypatch.setattr(Cache, "commit", fails)
    with pytest.raises(IncompleteError, match="Run the same command to try them again"):
        build(poisoned)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "point",
    [
        *("rows.encoders:TextEncoder.encode", "teacher.teacher:load_models"),
        *("teacher.model:TeacherModel._slices", "cache.cache:Cache.commit"),
    ],
)
def test_an_exception_in_a_worker_on_ray_is_the_same_line(
    point: str, words: Callable[[str], list[str]]
) -> None:
    import ray

    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={
            "worker_process_setup_hook": "unexpected_points.install",
            "env_vars": {"PYTHONPATH": paths, "KDCACHE_TEST_POINT": point},
        },
    )
    try:
        job = words("build")
        job[job.index("--workers") + 1] = "1"
        result = run(*job)
    finally:
        ray.shutdown()
    line = line_of(result)
    assert result.exit_code == 1, line
    assert "KeyError: 'injected'" in line


# Caches whose hashes are right and whose ids are not


def column(name: str, value: int) -> Callable[[ShardData], ShardData]:
    """The last value of a column of the targets is another one."""

    def change(data: ShardData) -> ShardData:
        columns = {key: values.copy() for key, values in data.targets.columns.items()}
        columns[name].reshape(-1)[-1] = value
        targets = SoftTargets(data.targets.codec, columns, data.targets.rank_to_id)
        return dataclasses.replace(data, targets=targets)

    return change


def first(name: str, value: int) -> Callable[[ShardData], ShardData]:
    """The first value of a column of the rows is another one."""

    def change(data: ShardData) -> ShardData:
        values = getattr(data, name).copy()
        values[0] = value
        return dataclasses.replace(data, **{name: values})

    return change


FORGED = {
    "an input id": (CAUSAL, "topk:3", first("input_ids", 900)),
    "an entry of top-k": (CAUSAL, "topk:3", column("ids", 64)),
    "an entry near": (CAUSAL, "sample:5", column("near_ids", 255)),
    "an entry of a head": (CLASSES, "sample:5", column("head_ids", 900)),
    "a class": (CLASSES, "dense", first("labels", 3)),
    "a class below 0": (CLASSES, "dense", first("labels", -7)),
}


@pytest.mark.parametrize("what", FORGED)
def test_readers_name_the_shard_whose_ids_cannot_be(what: str, tmp_path: Path) -> None:
    task, codec, change = FORGED[what]
    cache = make_cache(tmp_path / "good", [6, 6], task=task, codec=codec)
    forged = forge(cache, tmp_path / "forged", change)
    (tmp_path / "tiny.json").write_text(json.dumps(LLAMA))
    student = str(tmp_path / "tiny.json") if task == CAUSAL else "bilstm"
    url, out = str(tmp_path / "forged"), str(tmp_path / "out")
    commands = [
        ["verify", url],
        ["train", "--cache", url, "--student", student, "--batch-size", "4", "--out", out],
        ["inspect", url, "--row", "0"],
        ["export", url, "--out", f"{out}.parquet"],
        ["report", url, "--out", f"{out}.html"],
    ]
    for command in commands:
        result = run(*command)
        assert result.exit_code == 1, command
        assert forged.manifest.shards[0].name in result.stderr, command
        assert "The traceback is" not in result.stderr, command


def test_a_shard_that_the_disk_does_not_give_is_not_called_damaged(
    lm_caches: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache.open(lm_caches["topk:8"])

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "shards/x")

    monkeypatch.setattr("h5py.File", fail)
    with pytest.raises(OSError, match="Too many open files"):
        cache.read(0)


# Tables


def arrow_file(path: Path, *, stream: bool) -> Path:
    """Ten rows of two columns."""
    table = pa.table({"text": [f"row {i}" for i in range(10)], "ids": [[i, i] for i in range(10)]})
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(path, table.schema) as writer:
        writer.write_table(table)
    return path


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("offset", [5, -7, 1 << 30])
@pytest.mark.parametrize("column", ["text", "ids"])
def test_arrow_whose_offsets_are_wrong_is_refused_by_name(
    column: str, offset: int, stream: bool, tmp_path: Path
) -> None:
    path = arrow_file(tmp_path / "a.arrow", stream=stream)
    good = [record.values["text"] for record in read(path)]
    assert good == [f"row {i}" for i in range(10)]
    ends = [5 * i if column == "text" else 2 * i for i in range(11)]
    old, new = (struct.pack("<11i", *e) for e in (ends, [*ends[:4], ends[4] + offset, *ends[5:]]))
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    if column == "text" and offset == 5:
        # Rising still: other rows, which nothing in the file contradicts.
        assert len(read(path)) == 10
        return
    with pytest.raises(UsageError, match=r"a\.arrow: can't be read as arrow"):
        read(path)


def test_text_of_arrow_that_is_not_utf8_is_the_matter_of_its_record(tmp_path: Path) -> None:
    path = arrow_file(tmp_path / "a.arrow", stream=False)
    path.write_bytes(path.read_bytes().replace(b"row 3", b"row \xff"))
    stats = ReadStats()
    (span,) = Corpus.open([str(path)], span_bytes=1 << 20).spans
    assert len(list(Corpus.read(span, on_error="skip", stats=stats))) == 9
    assert stats.skipped == 1


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_footer_of_parquet_names_the_file(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(10)]}), path)
    good, data = read(path), bytearray(path.read_bytes())
    draw = random.Random(seed)
    (size,) = struct.unpack("<i", data[-8:-4])
    for at in draw.sample(range(len(data) - 8 - size, len(data) - 8), 8):
        data[at] = draw.randrange(256)
    path.write_bytes(data)
    try:
        found = read(path)
    except UsageError as error:
        assert "a.parquet: can't be read as parquet" in str(error)  # noqa: PT017
    except Exception as error:
        assert UnexpectedError.of(error).line.endswith(f"while reading {path}")  # noqa: PT017
    else:
        assert len(found) <= len(good)


def read(path: Path) -> list[Record]:
    """All records of a file."""
    return [
        r for span in Corpus.open([str(path)], span_bytes=1 << 20).spans for r in Corpus.read(span)
    ]


# White space


@pytest.mark.parametrize("task", ["causal", "masked"])
def test_white_space_between_two_texts_is_part_of_the_rows(
    task: str, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    text = "one\n" + "\n" * 400 + "two\n"
    (tmp_path / "a.txt").write_text(text)
    corpus = Corpus.open([str(tmp_path)], span_bytes=64, divide=True)
    spec = RowSpec("causal-lm", max_length=64)
    if task == "masked":
        tokenizer.add_special_tokens({"mask_token": "<mask>"})
        spec = RowSpec("masked-lm", max_length=64)
    ids: list[int] = []
    for span in corpus.spans:
        encoder = make_encoder(spec, tokenizer)
        for row in encoder.encode(Corpus.read(span), span=span.index):
            known = np.where(row.labels >= 0, row.labels, row.input_ids)
            ids += map(int, known if task == "masked" else [*row.input_ids[:1], *row.labels])
        assert encoder.empty == 0
    assert tokenizer.decode(ids).replace("<|end|>", "").rstrip("\n") == text.rstrip("\n")
