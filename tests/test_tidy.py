"""What is left of work that was killed is removed, and never what somebody is at work on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from make_caches import make_cache

from kdcache.cache import Cache
from kdcache.commands.options import GcOptions
from kdcache.commands.upkeep import gc
from kdcache.files import alone

SCRATCH = "0123456789abcdef" * 2 + ".tmp"


@pytest.fixture
def begun(tmp_path: Path) -> Cache:
    """A cache that a build in this process has just begun, with a file that it writes."""
    whole = make_cache(tmp_path / "whole", [4])
    names = {name.split("/")[1]: whole.read_beside(name) for name in whole.files}
    cache = Cache.create_or_resume(str(tmp_path / "cache"), whole.spec, tokenizer_files=names)
    (tmp_path / "cache" / "tmp").mkdir(exist_ok=True)
    (tmp_path / "cache" / "tmp" / SCRATCH).write_bytes(b"12345")
    return cache


@pytest.mark.parametrize("ahead", [-7200.0, 0.0, 7200.0])
def test_gc_asks_whether_a_build_is_at_work_and_no_clock(
    begun: Cache, ahead: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    monkeypatch.setattr("time.time", lambda: now() + ahead)
    kept = gc(GcOptions(begun.url))
    assert (kept.removed, kept.young) == ((), 1)
    begun.release()
    assert [left.name for left in gc(GcOptions(begun.url, dry_run=True)).removed] == [
        f"tmp/{SCRATCH}"
    ]
    removed = gc(GcOptions(begun.url))
    assert (removed.bytes, removed.young) == (5, 0)
    assert gc(GcOptions(begun.url)).removed == ()


def test_gc_removes_nothing_where_it_cannot_know(
    begun: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun.release()

    def refuse(*_: Any) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert gc(GcOptions(begun.url)).young == 1


def test_a_build_can_begin_after_gc(begun: Cache) -> None:
    begun.release()
    gc(GcOptions(begun.url))
    assert begun.storage.share("spec.json") is not None


def test_a_folder_is_tidied_by_the_process_that_works_in_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    others = {".0123.tmp", "mine.tmp", f"x.{SCRATCH}"}
    for name in (f".{SCRATCH}", *others):
        (tmp_path / "run" / name).touch()
    with alone(tmp_path / "run", "training"):
        assert {path.name for path in (tmp_path / "run").iterdir()} - {".lock"} == others
