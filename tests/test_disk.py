"""Copies of remote shards on this machine: bounded, shared, and never half written; a file is
hashed once on a machine, by whichever process needs it first, until it changes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from make_caches import make_cache

from kdcache.cache import Cache
from kdcache.cache.manifest import ShardEntry
from kdcache.commands.options import VerifyOptions
from kdcache.errors import CorruptCacheError, UsageError
from kdcache.storage import open_storage
from kdcache.storage.disk import DiskCache, Verified

DEADLINE = 60.0
SHARDS = 3


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


# Files that were hashed


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Spans whose files were hashed, in order."""
    spans: list[int] = []
    check = ShardEntry.check

    def counting(self: ShardEntry, path: Path | None) -> None:
        spans.append(self.span)
        check(self, path)

    monkeypatch.setattr(ShardEntry, "check", counting)
    return spans


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache that was written a while ago."""
    monkeypatch.setenv("KDCACHE_DISK", str(tmp_path / "disk"))
    make_cache(tmp_path / "cache", [4] * SHARDS)
    for path in shards_of(tmp_path / "cache"):
        os.utime(path, (1e9, 1e9))
    yield tmp_path / "cache"
    Verified.in_folder.cache_clear()


def shards_of(cache: Path) -> list[Path]:
    return sorted((cache / "shards").iterdir())


def read_all(cache: Path) -> None:
    """As a process does that begins now."""
    Verified.in_folder.cache_clear()
    opened = Cache.open(str(cache))
    for span in range(SHARDS):
        opened.read(span)


def flip(path: Path, bit: int, changed: float | None = None) -> None:
    """Change a bit of a shard that no checksum of HDF5 covers."""
    content = bytearray(path.read_bytes())
    content[-1] ^= bit
    path.write_bytes(content)
    if changed is not None:
        os.utime(path, (changed, changed))


def test_a_shard_is_hashed_once_by_all_processes_and_epochs(cache: Path, hashed: list[int]) -> None:
    for _ in range(3):
        read_all(cache)
    assert hashed == list(range(SHARDS))


def test_a_shard_that_changed_is_hashed_again(cache: Path, hashed: list[int]) -> None:
    read_all(cache)
    for bit, changed in ((1, 2e9), (2, None)):  # also where it was written just now
        flip(shards_of(cache)[1], bit, changed)
        with pytest.raises(CorruptCacheError, match="00001-"):
            read_all(cache)
    assert hashed == [*range(SHARDS), 1, 1]


def test_a_shard_written_just_now_gets_no_note(
    cache: Path, hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcache.storage.disk._SETTLED_SECONDS", 3600.0)  # however slow this is
    for path in shards_of(cache):
        os.utime(path)
    read_all(cache)
    read_all(cache)
    assert hashed == [*range(SHARDS)] * 2


def test_readers_that_come_together_hash_once(cache: Path, hashed: list[int]) -> None:
    gate = threading.Barrier(4)

    def read() -> None:
        opened = Cache.open(str(cache))
        gate.wait()
        opened.read(0)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hashed == [0]


@pytest.mark.slow
def test_verify_hashes_all_the_same(cache: Path) -> None:
    from kdcache.commands.verify import verify

    read_all(cache)
    flip(shards_of(cache)[1], 1, 1e9)  # a change that keeps size and time
    read_all(cache)
    (problem,) = verify(VerifyOptions(str(cache))).problems
    assert "00001-" in problem


@pytest.mark.parametrize("how", ["a file", "another user's", "broken"])
def test_without_a_usable_folder_every_read_hashes(
    cache: Path, hashed: list[int], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    disk = cache.parent / "disk"
    if how == "a file":
        disk.write_text("")
    elif how == "broken":
        monkeypatch.setenv("KDCACHE_DISK_BYTES", "many")
    else:
        read_all(cache)
        hashed.clear()
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    read_all(cache)
    read_all(cache)
    assert hashed == [*range(SHARDS)] * 2
