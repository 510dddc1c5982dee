"""What is left of work that was killed is removed, and never what somebody is at work on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from conftest import further
from make_caches import make_cache
from small_runs import SMALL, USUAL, StopError

from kdcache.cache import Cache
from kdcache.commands.options import GcOptions
from kdcache.commands.train import run as run_module
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.commands.upkeep import gc
from kdcache.files import alone
from kdcache.student.checkpoints import STATE_FILE

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


def names(folder: Path) -> set[str]:
    """All files below a folder but its lock."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in found if not name.endswith(".lock")}


@pytest.mark.slow
@pytest.mark.parametrize("after", [*further(4), 12])
def test_a_run_that_was_killed_leaves_what_one_does_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Killed while it deleted its oldest checkpoint and wrote; or so after its last step."""
    make_cache(tmp_path / "train", [20, 14, 11])
    common: dict[str, Any] = {
        "cache": str(tmp_path / "train"), "student": "bilstm", "save_steps": 2, "max_steps": 12,
        "keep_checkpoints": 2, **SMALL,
    }  # fmt: skip

    def stop(at: Any = None) -> None:
        if at is None or at.step > after:
            raise StopError

    out = tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(StopError):
        if after == 12:
            patched.setattr(run_module, "_save", lambda *_: stop())
        train(TrainOptions(**(USUAL | common | {"out": str(out)})), on_progress=stop)
    for checkpoint in ("checkpoint-1", f"checkpoint-{after - 1}"):
        (out / checkpoint).mkdir()
        (out / checkpoint / "optimizer.pt").write_bytes(b"123")
    (out / "student.tmp").mkdir()
    for folder in (out, out / "student.tmp"):
        (folder / f".{SCRATCH}").write_bytes(b"123")
    train(TrainOptions(**(USUAL | common | {"out": str(out)})))
    whole = tmp_path / "whole"
    train(TrainOptions(**(USUAL | common | {"out": str(whole)})))
    assert names(out) == names(whole)
    assert all((path / STATE_FILE).is_file() for path in out.glob("checkpoint-*"))
