"""Receipts: the seal of a resumed build takes entries from them and reads only what has none."""

from __future__ import annotations

import dataclasses
import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from broken_caches import files, flip
from make_caches import CLASSES, make_cache

from kdcache.cache import Cache, ShardEntry, sealing
from kdcache.cache.sealing import Receipts, prepare_manifest, read_receipts, remove_receipts
from kdcache.commands.build.build import build
from kdcache.commands.build.driver import Progress
from kdcache.commands.build.options import BuildOptions
from kdcache.errors import CorruptCacheError, IncompleteError
from kdcache.storage import open_storage


def unsealed(folder: Path) -> Cache:
    """A cache of four shards as a driver left it that was killed before the seal."""
    cache = make_cache(folder, [5, 4, 3, 2], task=CLASSES)
    (folder / "events").mkdir()
    receipts = Receipts(cache.storage)
    for entry in cache.manifest.shards:
        receipts.add(entry)
    (folder / "manifest.json").unlink()
    return Cache.resume(str(folder))


def read_by_the_seal(cache: Cache, wanted: bytes) -> list[int]:
    """Spans whose shards are read to make the manifest, which must come out as before."""
    with mock.patch.object(sealing, "shard_entry", side_effect=sealing.shard_entry) as read:
        assert prepare_manifest(cache).to_json() == wanted
    return [call.args[1] for call in read.call_args_list]


def receipt_file(folder: Path) -> Path:
    (path,) = (folder / "events").iterdir()
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def forget(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def lie_about_the_size(path: Path) -> None:
    """A line that is whole, about a file that is longer now."""
    lines = path.read_text().splitlines()
    entry = list(read_receipts(open_storage(str(path.parents[1]))))[-1]
    path.write_text("".join(f"{line}\n" for line in lines[:-1]))
    Receipts(open_storage(str(path.parents[1]))).add(dataclasses.replace(entry, bytes=7))


def link(path: Path) -> None:
    """Small files are not read through links."""
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("damage", "read"),
    [
        (lambda _: None, []),
        (cut, [3]),
        (forget, [3]),
        (lambda path: flip(path, 8 * 400), [1]),
        (lie_about_the_size, [3]),
        (lambda path: path.write_bytes(b"\xff\x00{}\n\n 0 \n" + path.read_bytes()), []),
        (lambda path: path.write_text(""), [0, 1, 2, 3]),
        (link, [0, 1, 2, 3]),
    ],
)
def test_only_shards_without_a_receipt_are_read(
    damage: Callable[[Path], None], read: list[int], tmp_path: Path
) -> None:
    wanted = make_cache(tmp_path / "whole", [5, 4, 3, 2], task=CLASSES).manifest.to_json()
    cache = unsealed(tmp_path / "cache")
    path = receipt_file(tmp_path / "cache")
    damage(path)
    assert sorted(read_by_the_seal(cache, wanted)) == read


def test_a_shard_that_was_cut_off_is_found_at_the_seal(tmp_path: Path) -> None:
    cache = unsealed(tmp_path)
    victim = min((tmp_path / "shards").iterdir())
    cut(victim)
    with pytest.raises(CorruptCacheError, match=f"{victim.name}: its bytes have sha256"):
        prepare_manifest(cache)


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_receipts_of_all_runs_are_read_and_removed(kind: str, tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path) if kind == "local" else f"memory://{uuid.uuid4().hex}")
    (tmp_path / "events").mkdir()
    storage.write("events/corpus.json", b"[]")
    entries = [made_up(span) for span in range(150)]
    for part in (entries[:140], entries[140:]):
        receipts = Receipts(storage)
        for entry in part:
            receipts.add(entry)
        receipts.close()
        receipts.close()
    assert len(storage.names("events")) == 1 + (2 if kind == "local" else 4)
    assert sorted(read_receipts(storage), key=lambda e: e.span) == entries
    remove_receipts(storage)
    assert storage.names("events") == ["corpus.json"]


def test_receipts_that_cannot_be_written_stop_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "events").write_text("not a folder")
    receipts = Receipts(open_storage(str(tmp_path)))
    for span in range(3):
        receipts.add(made_up(span))
    assert len(caplog.messages) == 1
    assert "no receipts are kept" in caplog.text


def made_up(span: int) -> ShardEntry:
    digest = hashlib.sha256(str(span).encode()).hexdigest()
    return ShardEntry(span, f"{span:05d}-{digest[:16]}.h5", 1024, 2048, 2000, 19_000_000, digest)


@pytest.mark.end_to_end
def test_a_build_that_is_resumed_reads_no_shard_with_a_receipt_of_its_first_run(
    small_build: BuildOptions, tmp_path: Path
) -> None:
    options = dataclasses.replace(small_build, shard_tokens=1024, max_length=32, codec="topk:4")

    def stop(progress: Progress) -> None:
        if progress.made:
            raise KeyboardInterrupt

    with pytest.raises(IncompleteError):
        build(options, on_progress=stop)
    kept = {entry.span for entry in read_receipts(open_storage(options.out))}
    with mock.patch.object(sealing, "shard_entry", wraps=sealing.shard_entry) as read:
        again = build(options)
    assert kept
    looked_into = [call.args[1] for call in read.call_args_list]
    assert not kept & {*looked_into}
    assert len(looked_into) <= 1  # the span that was made while the build stopped
    assert 0 < again.made < again.spans
    quiet = dataclasses.replace(options, out=str(tmp_path / "quiet"))
    build(quiet)
    assert files(Path(options.out)) == files(Path(quiet.out))
