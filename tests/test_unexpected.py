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
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from broken_caches import run
from click.testing import Result
from small_runs import LLAMA

from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.errors import IncompleteError, KdcacheError, UnexpectedError, UsageError, doing

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
    ("train", "stream.reader:collate"),
    ("train", "student.wrapper:DistilledStudent.forward"),
    ("train", "commands.train.run:model_card"),
    ("inspect", "cache.cache:Cache.parse"),
    ("verify", "commands.verify:problems"),
    ("export", "cache.cache:Cache.parse"),
    ("report", "cache.cache:Cache.parse"),
    ("transcode", "cache.cache:Cache.parse"),
    ("evaluate", "cache.cache:Cache.parse"),
    ("plan", "teacher.model:TeacherModel._slices"),
    ("gc", "commands.upkeep:gc_cache"),
]
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
    raising(point, OSError(errno.EIO, "injected", "some/file"))
    result = run(*words(command))
    assert result.exit_code == 3
    line = line_of(result)
    assert "some/file: injected" in line
    assert "Run the same command" in line


def test_the_traceback_is_shown_with_v_and_has_no_secret(
    words: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdcache.cache import Cache

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


def test_errors_of_a_disk_are_tried_again_with_the_same_command(
    poisoned: BuildOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdcache.cache import Cache

    commit = Cache.commit

    def fails(self: Cache, span: int, *rest: Any, **more: Any) -> Any:
        if span == 2:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "shards/x")
        return commit(self, span, *rest, **more)

    monkeypatch.setattr(Cache, "commit", fails)
    with pytest.raises(IncompleteError, match="Run the same command to try them again"):
        build(poisoned)
