"""A file is hashed once on a machine, by whichever process needs it first, until it changes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from make_caches import make_cache

from kdcache.cache import Cache
from kdcache.cache.manifest import ShardEntry
from kdcache.commands.options import VerifyOptions
from kdcache.errors import CorruptCacheError
from kdcache.storage.disk import Verified

SHARDS = 3


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
