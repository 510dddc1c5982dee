"""The end of a build: the manifest of all shards, and the seal.

Cost: receipts spare a resumed build from reading the shards of earlier runs; a shard without one is
read and hashed whole.
"""

from __future__ import annotations

import concurrent.futures as futures
import contextlib
import functools
from collections.abc import Iterable, Mapping

from kdcache.cache.cache import Cache
from kdcache.cache.manifest import SPAN_FACTS, Manifest, ShardEntry, missing_shard
from kdcache.cache.receipts import matching, read_receipts
from kdcache.cache.shard import read_counts
from kdcache.errors import CorruptCacheError, IncompleteError, KdcacheError
from kdcache.storage import sha256_file

_READERS = 16  # shards of earlier runs that are read at once


def prepare_manifest(cache: Cache, entries: Iterable[ShardEntry] = ()) -> Manifest:
    """The manifest of all spans, once every one is committed; nothing is written.

    Args:
        cache: being built, or sealed by another build.
        entries: what this process committed. Of shards of earlier runs the receipts are
            taken; those without one are read and hashed.

    Raises:
        IncompleteError: spans are missing.
        CorruptCacheError: a shard's bytes are not what its name says.
        KdcacheError: the cache was sealed before, with other bytes than those of `entries`.
    """
    known = {entry.name: entry for entry in entries}
    if cache.manifest_or_none is not None:
        for entry in known.values():
            _refuse_change(cache, entry)
    committed = cache.committed()
    missing = [span for span in range(cache.spec.spans) if span not in committed]
    if missing:
        raise IncompleteError(
            f"{len(missing)} of {cache.spec.spans} spans have no shard yet (first: "
            f"{missing[0]}). Run the same command again to make them."
        )
    if cache.manifest_or_none is not None:
        return cache.manifest
    left = {s: n for s, n in committed.items() if n not in known}
    if left:
        sizes = cache.storage.sizes("shards")
        known |= matching(read_receipts(cache.storage), left.values(), sizes)
        left = {s: n for s, n in left.items() if n not in known}
        if left and cache.storage.exists("manifest.json"):  # whose seal removed the receipts
            with contextlib.suppress(FileNotFoundError):
                return cache.read_manifest()
        known |= _look_into(cache, left)
    shards = tuple(known[committed[span]] for span in range(cache.spec.spans))
    return Manifest(cache.spec.fingerprint, shards, cache.files)


def seal(cache: Cache, manifest: Manifest) -> Manifest:
    """Write the manifest: from now on the cache can be read, and is never changed.

    Where another build has sealed the cache meanwhile, its manifest stands and is returned.
    """
    if not cache.storage.create("manifest.json", manifest.to_json()):
        manifest = cache.read_manifest()
    cache.manifest_or_none = manifest
    return manifest


def shard_entry(cache: Cache, span: int, name: str) -> ShardEntry:
    """The manifest's entry of a committed shard; its file is hashed and opened.

    Raises:
        CorruptCacheError: its bytes are not what its name says, or of another build.
    """
    with cache.storage.hold(f"shards/{name}") as path:
        try:
            sha256, size = sha256_file(path), path.stat().st_size
        except FileNotFoundError:  # a repair has removed it since it was listed
            raise missing_shard(name) from None
        if not name.endswith(f"-{sha256[:16]}.h5"):
            raise CorruptCacheError(
                f"{name}: its bytes have sha256 {sha256[:16]}…. Delete the file and run the "
                "same build again: only this shard is made again."
            )
        counts, facts = read_counts(path)
    said = tuple(map(facts.get, ("fingerprint", "index", "domain")))
    if said != (cache.spec.fingerprint, span, cache.spec.domain_of(span)):
        raise CorruptCacheError(
            f"{name} belongs to another build. Delete it and run the build again."
        )
    values = {"span": span, "name": name, **vars(counts), "bytes": size, "sha256": sha256}
    values |= {key: facts.get(key) for key in SPAN_FACTS}
    try:
        return ShardEntry.from_dict(values, span)
    except ValueError as error:
        raise CorruptCacheError(f"{name} cannot be listed: {error}.") from error


def _look_into(cache: Cache, names: Mapping[int, str]) -> dict[str, ShardEntry]:
    """Manifest entries of shards (name by span) that this process has not written, by name.

    Each is read whole. A store is mostly waited for, so several are read at once.
    """
    pool = futures.ThreadPoolExecutor(_READERS, thread_name_prefix="kdcache-seal")
    try:
        found = pool.map(functools.partial(shard_entry, cache), names, names.values())
        return {entry.name: entry for entry in found}
    finally:
        pool.shutdown(cancel_futures=True)


def _refuse_change(cache: Cache, entry: ShardEntry) -> None:
    said = cache.manifest.shards[entry.span]
    if entry != said:
        raise KdcacheError(
            f"shard {entry.span} was made again as {entry.name}, but the manifest has "
            f"{said.name}: another kind of machine, or other versions of the libraries, round "
            f"differently. Make it again on a machine like the first, restore the file from a "
            f"copy, or accept the new shard, and a new digest of the cache, with `kdcache "
            "repair --reseal`."
        )
