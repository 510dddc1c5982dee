"""Storage: atomic publishing, exclusive creation, and the same contract behind any URL."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from at_once import at_each_moment
from fsspec.implementations.memory import MemoryFileSystem

from kdcache.errors import IncompleteError, UsageError
from kdcache.storage import LocalStorage, Storage, open_storage, redact
from kdcache.storage.filesystem import FileSystem


@pytest.fixture(params=["local", "memory"])
def storage(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Storage]:
    monkeypatch.setenv("KDCACHE_DISK", str(tmp_path / "disk"))
    if request.param == "local":
        yield open_storage(str(tmp_path / "cache"))
    else:
        yield open_storage(f"memory://{tmp_path.name}/cache")
        fsspec.filesystem("memory").store.clear()


def held(storage: Storage, name: str) -> bytes:
    """What is read from a file while it is held."""
    with storage.hold(name) as path:
        return path.read_bytes()


def test_a_storage_starts_empty_and_lists_what_was_written(storage: Storage) -> None:
    assert storage.empty()
    assert storage.names("shards") == []
    storage.write("shards/b", b"2")
    storage.write("shards/a", b"1")
    storage.write("top", b"0")
    assert not storage.empty()
    assert storage.names("shards") == ["a", "b"]
    assert storage.names() == ["top"]
    assert storage.entries() == ["shards", "top"]
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


def test_a_held_file_can_be_read(storage: Storage) -> None:
    storage.write("shards/one", b"shard")
    assert held(storage, "shards/one") == b"shard"


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
        (errno.ENAMETOOLONG, UsageError, "cannot write"),
        (errno.EROFS, UsageError, "cannot write"),
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
    below = open_storage(str(tmp_path / "cache" / "below"))
    assert below.empty()
    with pytest.raises(UsageError, match="Not a directory. Make it writable, or choose"):
        below.create("spec.json", b"{}")
    with pytest.raises(UsageError, match="File name too long. Choose another path"):
        open_storage(str(tmp_path / ("x" * 300)))


def test_an_unknown_protocol_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="nosuch"):
        open_storage("nosuch://bucket/cache")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/cache?token=1", "s3://bucket/cache"),
        ("s3://key:sec/r+et@bucket/cache", "s3://bucket/cache"),
        ("ftp://user@host/a", "ftp://host/a"),
        ("s3://bucket/a@b/c", "s3://bucket/a@b/c"),
        ("http://host:8080/a@b", "http://host:8080/a@b"),
        ("no s3://k:s@b/c?x=1 and http://h/d?y=2 here", "no s3://b/c and http://h/d here"),
        ("simplecache::http://u:p@host/a.gz", "simplecache::http://host/a.gz"),
        ("/home/user/a?b", "/home/user/a?b"),
    ],
)
def test_credentials_are_redacted(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_writers_that_share_the_scratch_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    problems: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for i in range(150):
                storage.write(f"shards/{number}-{i}", b"x")
        except BaseException as error:
            problems.append(error)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert not problems
    assert len(storage.names("shards")) == 600
    assert storage.entries() == ["shards"]


def test_a_file_that_is_replaced_meanwhile_is_shared_as_it_is_then(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "place")

    def replace(data: bytes = b"new") -> bool:
        return storage.replace_unshared("spec.json", data, lambda: True)

    replaced = 0
    for both in at_each_moment(
        storage.root,
        lambda: storage.share("spec.json"),
        replace,
        prepare=lambda: storage.write("spec.json", b"old"),
    ):
        assert not replace(b"newer"), both
        assert storage.read("spec.json") == (b"new" if both.second else b"old"), both
        replaced += both.second
        both.first.close()
    assert replaced >= 2


def test_ranges_are_asked_for_together_where_the_client_would_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    everybody = threading.Barrier(4, timeout=60)
    cat_file = MemoryFileSystem.cat_file

    def together(*args: object, **options: object) -> bytes:
        everybody.wait()
        data: bytes = cat_file(*args, **options)
        return data

    fsspec.filesystem("memory").pipe({"/ranges/a": b"0123456789", "/ranges/b": b"abcdef"})
    monkeypatch.setattr(MemoryFileSystem, "cat_file", together)
    store = FileSystem("memory://ranges")
    wanted = [("/ranges/a", 0, 2), ("/ranges/a", 8, 10), ("/ranges/b", 0, 6), ("/ranges/b", 5, 6)]
    assert store.read_all(wanted) == [b"01", b"89", b"abcdef", b"f"]
    fsspec.filesystem("memory").store.clear()
