"""Storage: atomic publishing, exclusive creation, and the same contract behind any URL."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from kdcache.errors import IncompleteError, UsageError
from kdcache.storage import LocalStorage, Storage, open_storage, redact


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "local":
        yield open_storage(str(tmp_path / "cache"))
    else:
        yield open_storage(f"memory://{tmp_path.name}/cache")
        fsspec.filesystem("memory").store.clear()


def test_a_storage_starts_empty_and_lists_what_was_written(storage: Storage) -> None:
    assert storage.empty()
    assert storage.names("shards") == []
    storage.write("shards/b", b"2")
    storage.write("shards/a", b"1")
    storage.write("top", b"0")
    assert not storage.empty()
    assert storage.names("shards") == ["a", "b"]
    assert storage.names() == ["top"]
    assert storage.read("shards/a") == b"1"
    assert storage.size("shards/a") == 1
    assert storage.exists("top")
    assert not storage.exists("bottom")


def test_write_replaces_and_create_never_does(storage: Storage) -> None:
    storage.write("name", b"old")
    storage.write("name", b"new")
    assert storage.read("name") == b"new"
    assert not storage.create("name", b"other")
    assert storage.read("name") == b"new"
    assert storage.create("fresh", b"first")
    assert storage.read("fresh") == b"first"


def test_fetch_gives_a_readable_path(storage: Storage) -> None:
    storage.write("shards/one", b"shard")
    assert storage.fetch("shards/one").read_bytes() == b"shard"


def test_remove_is_silent_about_what_is_gone(storage: Storage) -> None:
    storage.write("name", b"x")
    storage.remove("name")
    storage.remove("name")
    assert not storage.exists("name")


def test_reading_what_is_missing_raises(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read("nothing")


@pytest.mark.parametrize(
    ("code", "kind", "match"),
    [
        (errno.ENOSPC, IncompleteError, "no space left"),
        (errno.EDQUOT, IncompleteError, "no space left"),
        (errno.EACCES, UsageError, "cannot write"),
        (errno.EROFS, UsageError, "read-only"),
        (errno.EIO, OSError, "disk"),
    ],
)
def test_what_a_failing_disk_means_and_that_nothing_is_left_behind(
    code: int,
    kind: type[Exception],
    match: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(handle: int) -> None:
        raise OSError(code, "the disk says no")

    monkeypatch.setattr("os.fsync", fail)
    storage = LocalStorage(tmp_path / "cache")
    with pytest.raises(kind, match=match):
        storage.write("shards/one", b"half")
    monkeypatch.undo()
    assert storage.empty()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(UsageError, match="is a file"):
        open_storage(str(tmp_path / "cache"))


def test_an_unknown_protocol_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="nosuch"):
        open_storage("nosuch://bucket/cache")


def test_credentials_are_redacted() -> None:
    assert redact("s3://key:secret@bucket/cache?token=1") == "s3://bucket/cache"
    assert redact("/home/user/a?b") == "/home/user/a?b"
