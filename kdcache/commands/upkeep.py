"""`kdcache repair` and `kdcache gc`: remove damaged and left-over files from a cache, so that the
same build makes them again.

The state of a cache is the listing of its files, so a repair only removes. Without a shard, its
span is missing; without the manifest, the cache is unfinished; the spec of a finished cache is
written again by a build of the same spec. Nothing is computed here.

Cost: `repair` reads what `verify` reads; `gc` reads listings. Guarantee: intact files that a sealed
cache names are kept; the digest of a cache changes only with `reseal`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from kdcache.cache.check import problems
from kdcache.cache.generated import store_at
from kdcache.cache.manifest import SHARD_NAME, Manifest
from kdcache.cache.sealing import shard_entry
from kdcache.cache.spec import no_cache
from kdcache.cache.store import ShardStore, StoreT
from kdcache.commands.options import GcOptions, RepairOptions
from kdcache.errors import CorruptCacheError, IncompleteError, UsageError
from kdcache.storage import LocalStorage, Storage, open_storage, redact
from kdcache.storage.filesystem import FileSystem

YOUNG = 3600.0
"""Seconds by the clock of an object store: an upload begun so recently may still go on."""

_SCRATCH = re.compile(r"[0-9a-f]{32}\.tmp")


@dataclass(frozen=True)
class RepairResult:
    """The result of a repair.

    Attributes:
        removed: names of the files that were broken, and are gone now.
        missing: names of files that had been missing.
        old_digest: of the cache before `reseal` gave it another one, else None.
        digest: of the cache now; None if it is no longer sealed.
    """

    cache: str
    removed: tuple[str, ...]
    missing: tuple[str, ...]
    old_digest: str | None
    digest: str | None


@dataclass(frozen=True)
class Leftover:
    """A file, or the beginning of one, that no build will finish and no reader uses."""

    name: str
    bytes: int


@dataclass(frozen=True)
class GcResult:
    """The result of `gc`: leftovers that were removed.

    Attributes:
        removed: what is gone now, or would be.
        young: number of leftovers that may belong to a running build, and stay.
    """

    cache: str
    removed: tuple[Leftover, ...]
    young: int
    dry_run: bool

    @property
    def bytes(self) -> int:
        """Bytes of all removed leftovers."""
        return sum(leftover.bytes for leftover in self.removed)


def repair(options: RepairOptions) -> RepairResult:
    """Remove the damaged files of a cache, finished or not.

    Args:
        options: the cache; `reseal` accepts shards that were made again with other bytes than in
            the manifest, and writes a manifest that names them.

    Raises:
        UsageError: there is no cache, or its folders are links.
        CorruptCacheError: neither spec nor manifest can be read, or they are of two caches.
        IncompleteError: a cache that is to be resealed lacks shards.
    """
    url = options.cache
    storage = _open(url)
    removed = list(_remove_documents(storage))
    if not storage.exists("spec.json"):
        missing = () if removed else ("spec.json",)
        return RepairResult(redact(url), tuple(removed), missing, None, None)
    cache = store_at(storage).resume(url)
    gone = []
    for name in list(_broken(cache)):
        if storage.exists(name):
            storage.remove(name)
            removed.append(name)
        else:
            gone.append(name)
    old = cache.digest if cache.sealed else None
    if options.reseal:
        cache = _reseal(cache)
    new = cache.digest if cache.sealed else None
    changed = old if old != new else None
    return RepairResult(redact(url), tuple(removed), tuple(gone), changed, new)


def _remove_documents(storage: Storage) -> Iterator[str]:
    """Remove the manifest or the spec if it cannot be read; each can be made from the rest."""
    broken = []
    parsers: dict[str, Callable[[], Any]] = {
        "spec.json": lambda: store_at(storage).read_spec(storage),
        "manifest.json": lambda: Manifest.read(storage),
    }
    for name, parse in parsers.items():
        try:
            if storage.exists(name):
                parse()
        except CorruptCacheError:
            broken.append(name)
        except (FileNotFoundError, UsageError):  # another repair has removed it since
            pass
    if not any(storage.exists(name) and name not in broken for name in parsers):
        raise CorruptCacheError(
            f"{redact(storage.url)}: neither spec.json nor manifest.json can be read, and one of "
            f"them is needed to know what this cache is. Restore one from a copy, or build with "
            "another --out."
        )
    for name in broken:
        storage.remove(name)
        yield name


def _broken(cache: ShardStore[Any]) -> Iterator[str]:
    """Names of damaged files."""
    if cache.sealed:
        yield from (problem.file for problem in problems(cache) if not problem.stray)
        return
    for span, name in cache.committed().items():
        try:
            shard_entry(cache, span, name)
        except CorruptCacheError:
            yield f"shards/{name}"


def _reseal(cache: StoreT) -> StoreT:
    """The cache with a manifest of the shards that are there."""
    if not cache.sealed:
        raise IncompleteError(
            f"{cache.url} is not finished: there is nothing to reseal. Run the same build again."
        )
    here, listed = cache.committed(), dataclasses.replace(cache, manifest_or_none=None).committed()
    lacking = [span for span in range(cache.spec.spans) if span not in listed]
    if lacking:
        raise IncompleteError(
            f"{len(lacking)} of {cache.spec.spans} spans have no shard (first: {lacking[0]}). Run "
            "the same build again to make them, then reseal."
        )
    entries = tuple(
        said if said.span in here else shard_entry(cache, said.span, listed[said.span])
        for said in cache.manifest.shards
    )
    if entries != cache.manifest.shards:
        manifest = dataclasses.replace(cache.manifest, shards=entries)
        cache.storage.write("manifest.json", manifest.to_json())
    return type(cache).open(cache.storage.url)


def gc(options: GcOptions) -> GcResult:
    """Remove what crashed builds left, and nothing that is part of the cache.

    That is: temporary files, unless a build is at work (its lock shows it, not a clock; nor where
    there are no locks), unfinished uploads that are older than an hour for the object store and, in
    a finished cache, second shards of a span.

    Raises:
        UsageError: there is no cache, or its folders are links.
        CorruptCacheError: its spec or manifest cannot be read.
    """
    storage = _open(options.cache)
    if not storage.exists("spec.json"):
        raise no_cache(storage)
    cache = store_at(storage).resume(options.cache)
    removed, young = [], 0
    with storage.unshared("spec.json") as idle:
        for found in (_second_copies(cache), _scratch(storage, idle), _uploads(storage)):
            for leftover, left, remove in found:
                if not left:
                    young += 1
                    continue
                if not options.dry_run:
                    remove()
                removed.append(leftover)
    return GcResult(redact(options.cache), tuple(removed), young, options.dry_run)


# A file, whether nobody works on it any more, and what removes it.
_Found = Iterator[tuple[Leftover, bool, Callable[[], Any]]]


def _second_copies(cache: ShardStore[Any]) -> _Found:
    if not cache.sealed:
        return
    here = cache.committed()
    named = set(here.values())
    for name in cache.storage.names("shards"):
        match = SHARD_NAME.fullmatch(name)
        # If the manifest's shard is missing, another one may replace it.
        if match and name not in named and int(match.group(1)) in here:
            full = f"shards/{name}"
            remove = functools.partial(cache.storage.remove, full)
            try:
                size = cache.storage.size(full)
            except FileNotFoundError:  # another gc has just removed it
                continue
            yield Leftover(full, size), True, remove


def _scratch(storage: Storage, idle: bool) -> _Found:
    if not isinstance(storage, LocalStorage):
        return
    for name in storage.names("tmp"):
        path = storage.root / "tmp" / name
        if _SCRATCH.fullmatch(name) and not path.is_symlink():
            try:
                size = path.stat().st_size
            except FileNotFoundError:  # a build has just given it its name
                continue
            remove = functools.partial(storage.remove, f"tmp/{name}")
            yield Leftover(f"tmp/{name}", size), idle, remove


def _uploads(storage: Storage) -> _Found:
    """Uploads of large objects that were neither completed nor aborted (S3)."""
    if not storage.remote:
        return
    store = FileSystem(storage.url)
    if not hasattr(store.fs, "call_s3"):
        return
    bucket, prefix, _ = store.fs.split_path(store.path)
    where = {"Bucket": bucket, "Prefix": f"{prefix}/"}
    listed = store.ask("call_s3", "list_multipart_uploads", **where)
    now = parsedate_to_datetime(listed["ResponseMetadata"]["HTTPHeaders"]["date"])
    for upload in listed.get("Uploads", []):
        one = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
        parts = store.ask("call_s3", "list_parts", **one).get("Parts", [])
        name = upload["Key"].removeprefix(f"{prefix}/")
        leftover = Leftover(name, sum(part["Size"] for part in parts))
        age = (now - upload["Initiated"]).total_seconds()
        remove = functools.partial(store.ask, "call_s3", "abort_multipart_upload", **one)
        yield leftover, age >= YOUNG, remove


def _open(url: str) -> Storage:
    """The storage of a cache with folders of its own: what is removed must be the cache's."""
    storage = open_storage(url)
    if not storage.exists("spec.json") and not storage.exists("manifest.json"):
        raise no_cache(storage)
    if isinstance(storage, LocalStorage):
        for name in ("shards", "tmp", "tokenizer"):
            if (storage.root / name).is_symlink():
                raise UsageError(
                    f"{storage.root / name} is a link: files are removed only inside the cache's "
                    f"own folder. Replace the link by the folder."
                )
    return storage
