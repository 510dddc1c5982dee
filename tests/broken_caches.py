"""Caches to be broken: a copy of one with every kind of file, and ways to look at it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from kdcache.cache import Cache
from kdcache.cache.sealing import prepare_manifest, seal
from kdcache.cache.shard import ShardData
from kdcache.cli.main import cli
from kdcache.commands.options import VerifyOptions
from kdcache.commands.verify import verify
from kdcache.errors import CorruptCacheError

GOLDEN = Path(__file__).parent / "golden"


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words))


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a cache by name, apart from the log of events."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if name != "events.jsonl"}


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def naming(folder: Path) -> str:
    """What `verify` says of a cache."""
    try:
        return "\n".join(verify(VerifyOptions(str(folder))).problems)
    except CorruptCacheError as error:
        return str(error)


def golden_copy(folder: Path) -> Path:
    """A cache with every kind of file: documents, ranks, tokenizer and a shard."""
    shutil.copytree(GOLDEN / "sample-1-2", folder)
    return folder


def forge(
    cache: Cache, folder: Path, change: Callable[[ShardData], ShardData], **spec: Any
) -> Cache:
    """A cache of the same rows with other contents, every hash of which is right."""
    beside = {n.split("/")[1]: cache.storage.read(n) for n in cache.files if n != "ranks.u32"}
    ranks = cache.storage.read("ranks.u32") if "ranks.u32" in cache.files else b""
    new = Cache.create_or_resume(
        str(folder), dataclasses.replace(cache.spec, **spec), tokenizer_files=beside, ranks=ranks
    )
    entries = [
        new.commit(e.span, change(cache.read(e.span)), clipped_mass=e.clipped_mass)
        for e in cache.manifest.shards
    ]
    seal(new, prepare_manifest(new, entries))
    return Cache.open(str(folder))
