"""A teacher is its content: names, links and moments of a change do not pass for it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from pathlib import Path

import pytest

from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.errors import IncompleteError, UsageError
from kdcache.teacher import TeacherFiles, load


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has read nothing yet."""
    monkeypatch.setenv("KDCACHE_DISK", str(tmp_path / "disk"))


def linked(folder: Path, into: Path) -> tuple[Path, Path]:
    """A snapshot as the hub's cache keeps it: a folder of links, and the blob of its weights."""
    snapshot, blobs = into / "snapshots" / "0123", into / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        name = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blobs / name)
        (snapshot / path.name).symlink_to(blobs / name)
    return snapshot, (snapshot / "model.safetensors").resolve()


def exchange(weights: Path) -> None:
    """Other weights of the same size under the same name, whatever the clock says."""
    facts, data = weights.stat(), bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**9))


def aged(*paths: Path) -> None:
    """Files that were written long ago, whose notes are kept."""
    for path in paths:
        os.utime(path, (1e9, 1e9))


def test_a_blob_is_what_is_in_it(tiny_lm: Path, tmp_path: Path) -> None:
    snapshot, blob = linked(tiny_lm, tmp_path)
    aged(blob)
    plain = TeacherFiles.find(str(tiny_lm)).sha256
    assert [TeacherFiles.find(str(snapshot)).sha256 for _ in range(2)] == [plain] * 2
    exchange(blob)
    assert TeacherFiles.find(str(snapshot)).sha256 != plain


def test_a_blob_is_read_once(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, blob = linked(tiny_lm, tmp_path)
    aged(blob)
    first = TeacherFiles.find(str(snapshot)).sha256
    monkeypatch.setattr("kdcache.storage.disk.sha256_file", None)
    assert TeacherFiles.find(str(snapshot)).sha256 == first


@pytest.mark.slow
def test_weights_exchanged_between_two_sittings_are_refused(
    tiny_lm: Path, text_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, blob = linked(tiny_lm, tmp_path)
    options = BuildOptions(
        teacher=(str(snapshot),), corpus=(str(text_corpus),), out=str(tmp_path / "cache"),
        codec="topk:4", max_length=32, limit=12, shard_tokens=300, workers=0,
    )  # fmt: skip

    def stop(progress: object) -> None:
        if progress.made:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with pytest.raises(IncompleteError):
        build(options, on_progress=stop)
    exchange(blob)
    with pytest.raises(UsageError, match="teacher"):
        build(options)


@pytest.mark.slow
@pytest.mark.parametrize("snapshot", [False, True])
def test_weights_exchanged_before_a_worker_loads_them_are_refused(
    tiny_lm: Path,
    text_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    snapshot: bool,
) -> None:
    """Workers begin whenever a cluster has room for them."""
    if snapshot:
        folder, weights = linked(tiny_lm, tmp_path)
    else:
        folder = Path(shutil.copytree(tiny_lm, tmp_path / "plain"))
        weights = folder / "model.safetensors"
    loads = load.load_models

    def late(options: object) -> object:
        exchange(weights)
        return loads(options)  # type: ignore[arg-type]

    monkeypatch.setattr("kdcache.teacher.teacher.load_models", late)
    options = BuildOptions(
        teacher=(str(folder),), corpus=(str(text_corpus),), out=str(tmp_path / "cache"),
        codec="topk:4", max_length=32, limit=4, workers=0,
    )  # fmt: skip
    with pytest.raises(UsageError, match="was changed since this build began"):
        build(options)


def test_a_worker_holds_one_lock_at_a_time(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notes of two files may share one: the other would be waited for without end."""
    monkeypatch.setattr("kdcache.storage.disk._LOCKS", 1)
    snapshot, _ = linked(tiny_lm, tmp_path)
    aged(*(path.resolve() for path in snapshot.iterdir()))
    identity, locked, waits = TeacherFiles.find(str(tiny_lm)).sha256, [], []
    own = fcntl.flock

    def flock(file: int, how: int) -> None:
        locked.append(file)
        try:
            own(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            waits.append(file)
            raise

    monkeypatch.setattr("fcntl.flock", flock)
    for _ in range(2):
        TeacherFiles.find(str(snapshot)).check_same(identity)
    with pytest.raises(UsageError, match="was changed since"):
        TeacherFiles.find(str(snapshot)).check_same("0" * 64)
    assert locked
    assert waits == []
