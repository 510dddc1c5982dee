"""Copies of remote shards on this machine: bounded, shared, and never half written."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from kdcache.errors import UsageError
from kdcache.storage import open_storage
from kdcache.storage.disk import DiskCache

DEADLINE = 60.0


def copied(size: int, calls: list[int] | None = None) -> Any:
    """A download of that many bytes."""

    def begin() -> tuple[int, Callable[[BinaryIO], None]]:
        if calls is not None:
            calls.append(size)
        return size, lambda file: (file.seek(0), file.write(b"x" * size), None)[-1]

    return begin


def kept(disk: DiskCache) -> set[str]:
    return {path.name for path in disk.folder.iterdir() if path.name != ".lock"}


def test_the_copies_used_longest_ago_make_room(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path / "disk", 1000)
    for key in "abc":
        disk.bring(key, copied(300))
    with disk.hold("a", copied(300)):
        pass
    disk.bring("d", copied(300))
    assert kept(disk) == {"a", "c", "d"}
    disk.bring("e", copied(700))
    assert kept(disk) == {"d", "e"}
    with pytest.raises(UsageError, match="KDCACHE_DISK_BYTES"):
        disk.bring("f", copied(1001))
    assert kept(disk) == {"d", "e"}


def test_a_copy_in_use_is_never_removed(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path / "disk", 1000)
    with disk.hold("a", copied(600)) as path:
        with disk.hold("b", copied(600)) as other:
            assert (path.stat().st_size, other.stat().st_size) == (600, 600)
        disk.bring("c", copied(300))
        assert kept(disk) == {"a", "c"}
    disk.bring("d", copied(600))
    assert kept(disk) == {"c", "d"}


def test_a_fresh_copy_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path / "disk", 1000)
    calls: list[int] = []
    with disk.hold("a", copied(300, calls)) as path, open(path, "rb") as old:
        with disk.hold("a", copied(400, calls), fresh=True):
            assert path.stat().st_size == 400
        assert len(old.read()) == 300
    with disk.hold("a", copied(300, calls)) as path:
        assert path.stat().st_size == 400
    assert calls == [300, 400]


def test_a_failed_download_leaves_nothing_and_the_next_one_succeeds(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path / "disk", 1000)

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("the line broke")

    with pytest.raises(OSError, match="broke"):
        disk.bring("a", lambda: (300, fail))
    assert kept(disk) == set()
    disk.bring("a", copied(300))
    assert kept(disk) == {"a"}


def test_many_readers_share_few_downloads_within_the_bound(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path / "disk", 1000)
    calls: list[int] = []
    problems: list[BaseException] = []

    def read(first: int) -> None:
        try:
            for i in range(120):
                key = (first + i) % 6
                with disk.hold(str(key), copied(100 * (key + 1), calls)) as path:
                    assert path.read_bytes() == b"x" * (100 * (key + 1))
        except BaseException as error:
            problems.append(error)

    readers = [threading.Thread(target=read, args=(i % 2,)) for i in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(DEADLINE)
    assert not problems
    assert not any(reader.is_alive() for reader in readers)
    disk.bring("last", copied(100))
    assert sum((disk.folder / name).stat().st_size for name in kept(disk)) <= 1000


def test_bounds_that_are_no_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_DISK_BYTES", "20GB")
    with pytest.raises(UsageError, match="20GB"):
        open_storage("s3://bucket/cache")
