"""Storage: atomic publishing, exclusive creation, and the same contract behind any URL."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from kdcache.errors import IncompleteError, UsageError
from kdcache.storage import LocalStorage, Storage, no_space, open_storage, redact


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


def test_publish_moves_a_scratch_file_and_fetch_gives_a_readable_path(storage: Storage) -> None:
    with storage.scratch() as path:
        path.write_bytes(b"shard")
        assert storage.names("shards") == []
        storage.publish(path, "shards/one")
        assert not path.exists()
    assert storage.fetch("shards/one").read_bytes() == b"shard"


def test_remove_is_silent_about_what_is_gone(storage: Storage) -> None:
    storage.write("name", b"x")
    storage.remove("name")
    storage.remove("name")
    assert not storage.exists("name")


def test_reading_what_is_missing_raises(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read("nothing")


def test_an_abandoned_scratch_file_leaves_nothing(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "cache")
    with pytest.raises(RuntimeError, match="boom"), storage.scratch() as path:
        path.write_bytes(b"half")
        raise RuntimeError("boom")
    assert storage.empty()


def test_a_full_disk_is_incomplete_and_a_missing_right_is_usage(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "cache")
    with pytest.raises(IncompleteError, match="no space left"), storage.scratch():
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(IncompleteError, match="no space left"), storage.scratch():
        raise RuntimeError("Unable to write (errno = 28, error message = 'No space left')")
    with pytest.raises(UsageError, match="cannot write"), storage.scratch():
        raise PermissionError(errno.EACCES, "Permission denied")
    assert not no_space(OSError(errno.EIO, "bad disk"))


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
