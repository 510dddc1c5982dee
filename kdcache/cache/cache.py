"""A cache being built or read: what is committed, what is missing, the seal, and the shards.

Cost: opening reads two JSON files; no shard is touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kdcache.cache.manifest import SHARD_NAME, Manifest, ShardEntry
from kdcache.cache.spec import CacheSpec
from kdcache.errors import CorruptCacheError, IncompleteError, UsageError
from kdcache.ranks import read_ranks
from kdcache.shard import ShardData, read_counts, read_shard, shard_bytes
from kdcache.storage import Storage, open_storage, redact, sha256_file
from kdcache.targets import Codec


@dataclass
class Cache:
    """A cache being built (`create_or_resume`) or read (`open`)."""

    storage: Storage
    spec: CacheSpec
    manifest_or_none: Manifest | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def create_or_resume(
        cls,
        url: str,
        spec: CacheSpec,
        *,
        tokenizer_files: Mapping[str, bytes],
        ranks: bytes = b"",
        notes: Mapping[str, Any] | None = None,
    ) -> Cache:
        """Start a cache, or go on with one of the same spec.

        Args:
            url: folder or fsspec URL.
            spec: what the cache should hold.
            tokenizer_files: name and content of each tokenizer file, kept in the cache.
            ranks: the rank table whose hash the spec has, if it has one.
            notes: facts that do not decide the bytes (names, versions), kept beside the spec.

        Raises:
            UsageError: the folder holds something else, or a cache with another spec.
        """
        storage = open_storage(url)
        if not storage.exists("spec.json"):
            leftovers = {"tmp", "tokenizer", "ranks.u32"}
            if not storage.empty() and not _only(storage, leftovers):
                raise UsageError(
                    f"{redact(url)} is not empty and not a kdcache cache. Choose another --out."
                )
            for name, data in tokenizer_files.items():
                storage.write(f"tokenizer/{name}", data)
            if ranks:
                storage.write("ranks.u32", ranks)
            document = {"spec": spec.to_dict(), "notes": dict(notes or {})}
            storage.create("spec.json", (json.dumps(document, indent=1) + "\n").encode())
        cache = cls._read(storage)
        changed = cache.spec.differences(spec)
        if changed:
            raise UsageError(
                f"{redact(url)} was begun with other options:\n  "
                + "\n  ".join(changed)
                + "\nUse the same options to go on, or another --out."
            )
        return cache

    @classmethod
    def open(cls, url: str) -> Cache:
        """Open a sealed cache for reading.

        Raises:
            UsageError: there is no cache at `url`.
            IncompleteError: its build has not finished.
            CorruptCacheError: its files contradict each other.
        """
        storage = open_storage(url)
        if not storage.exists("spec.json"):
            raise UsageError(f"{redact(url)} is not a kdcache cache: it has no spec.json.")
        cache = cls._read(storage)
        if cache.manifest_or_none is None:
            done = len(cache.committed())
            raise IncompleteError(
                f"the build of {redact(url)} has not finished: {done} of {cache.spec.spans} "
                f"shards are "
                "there. Run the same `kdcache build` command again to finish it."
            )
        return cache

    @classmethod
    def resume(cls, url: str) -> Cache:
        """Open a cache whose build may still be going on, as its workers do."""
        return cls._read(open_storage(url))

    @classmethod
    def _read(cls, storage: Storage) -> Cache:
        try:
            document = json.loads(storage.read("spec.json"))
            spec, notes = CacheSpec.from_dict(document["spec"]), document["notes"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptCacheError(
                f"{redact(storage.url)}/spec.json cannot be read: {error!r}."
            ) from error
        manifest = None
        if storage.exists("manifest.json"):
            manifest = Manifest.from_json(storage.read("manifest.json"))
            if manifest.fingerprint != spec.fingerprint or len(manifest.shards) != spec.spans:
                raise CorruptCacheError(
                    f"{redact(storage.url)}: manifest.json does not belong to spec.json. "
                    "Restore both from one build."
                )
        return cls(storage, spec, manifest, notes)

    # Building

    def committed(self) -> dict[int, str]:
        """Span -> shard file name of what is done, from the listing alone."""
        found: dict[int, str] = {}
        for name in self.storage.names("shards"):
            match = SHARD_NAME.fullmatch(name)
            if match and int(match.group(1)) < self.spec.spans:
                # Two copies can only come from two builds racing on one span: every reader and the
                # seal take the first name, so they agree.
                found.setdefault(int(match.group(1)), name)
        return found

    def missing(self) -> list[int]:
        """Spans without a committed shard, in order."""
        done = self.committed()
        return [span for span in range(self.spec.spans) if span not in done]

    @property
    def sealed(self) -> bool:
        """Whether the manifest is there."""
        return self.manifest_or_none is not None

    def commit(
        self, span: int, data: ShardData, *, skipped: int = 0, clipped_mass: float = 0.0
    ) -> ShardEntry:
        """Write a span's shard and make it appear; safe to call again for the same span.

        Raises:
            IncompleteError: no space left.
        """
        attributes = {
            "fingerprint": self.spec.fingerprint,
            "index": span,
            "skipped": skipped,
            "clipped_mass": clipped_mass,
        }
        content = shard_bytes(data, attributes=attributes)
        sha256 = hashlib.sha256(content).hexdigest()
        name = f"{span:05d}-{sha256[:16]}.h5"
        self.storage.write(f"shards/{name}", content)
        counts = (len(data), len(data.input_ids), len(data.targets))
        return ShardEntry(span, name, *counts, len(content), sha256, skipped, clipped_mass)

    def prepare_manifest(self, entries: Iterable[ShardEntry] = ()) -> Manifest:
        """The manifest of all spans, once every one is committed; nothing is written.

        Args:
            entries: what this process committed; shards of earlier runs are hashed and looked into.

        Raises:
            IncompleteError: spans are missing.
            CorruptCacheError: a shard's bytes are not what its name says.
        """
        known = {entry.name: entry for entry in entries}
        committed = self.committed()
        missing = [span for span in range(self.spec.spans) if span not in committed]
        if missing:
            raise IncompleteError(
                f"{len(missing)} of {self.spec.spans} spans have no shard yet (first: "
                f"{missing[0]}). "
                "Run the same command again to make them."
            )
        shards = tuple(
            known.get(committed[span]) or self._entry(span, committed[span])
            for span in range(self.spec.spans)
        )
        return Manifest(self.spec.fingerprint, shards)

    def seal(self, manifest: Manifest) -> Manifest:
        """Write the manifest: from now on the cache can be read, and is never changed."""
        self.storage.write("manifest.json", manifest.to_json())
        self.manifest_or_none = manifest
        return manifest

    def _entry(self, span: int, name: str) -> ShardEntry:
        path = self.storage.fetch(f"shards/{name}")
        sha256 = sha256_file(path)
        if not name.endswith(f"-{sha256[:16]}.h5"):
            raise CorruptCacheError(
                f"{name}: its bytes have sha256 {sha256[:16]}…. Delete the file and run the same "
                f"build "
                "again: only this shard is made anew."
            )
        counts, attributes = read_counts(path)
        if (
            attributes.get("fingerprint") != self.spec.fingerprint
            or attributes.get("index") != span
        ):
            raise CorruptCacheError(
                f"{name} belongs to another build. Delete it and run the build again."
            )
        return ShardEntry(
            span,
            name,
            counts.rows,
            counts.tokens,
            counts.positions,
            path.stat().st_size,
            sha256,
            attributes["skipped"],
            attributes["clipped_mass"],
        )

    # Reading

    @property
    def manifest(self) -> Manifest:
        """The manifest of a sealed cache."""
        assert self.manifest_or_none is not None, "Cache.open gives only sealed caches"
        return self.manifest_or_none

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest: names the exact bytes of the whole cache."""
        return hashlib.sha256(self.manifest.to_json()).hexdigest()

    @property
    def url(self) -> str:
        """Where the cache is, fit for printing."""
        return redact(self.storage.url)

    def codec(self) -> Codec:
        """The codec that reads this cache's targets."""
        return self.spec.make_codec()

    def read(self, span: int, *, targets: bool = True) -> ShardData:
        """One shard in memory.

        Args:
            span: which one.
            targets: False leaves the soft targets on disk, for training on hard labels alone.

        Raises:
            CorruptCacheError: the file is missing, damaged, or not the one of the manifest.
        """
        entry = self.manifest.shards[span]
        path = self.storage.fetch(f"shards/{entry.name}")
        if path.exists() and path.stat().st_size != entry.bytes:
            raise CorruptCacheError(
                f"shard {span}: {entry.name} has {path.stat().st_size} bytes, the manifest says "
                f"{entry.bytes}. Delete the file and run the same build again: only this shard is "
                f"made anew."
            )
        ranks = self.rank_to_id if targets else None
        return read_shard(
            path, self.codec(), counts=entry.counts, ranks=ranks, with_targets=targets
        )

    @cached_property
    def rank_to_id(self) -> np.ndarray | None:
        """Id of each frequency rank, int64 [V]; None where ids are stored as they are.

        Raises:
            CorruptCacheError: the table is missing or not the one of the spec.
        """
        if self.spec.ranks is None:
            return None
        try:
            table = self.storage.read("ranks.u32")
        except FileNotFoundError as error:
            raise CorruptCacheError(
                f"{self.url}/ranks.u32 is missing. Restore it from a copy, or build the cache "
                "again."
            ) from error
        found = hashlib.sha256(table).hexdigest()
        if found != self.spec.ranks:
            raise CorruptCacheError(
                f"{self.url}/ranks.u32: sha256 is {found[:16]}…, the spec says "
                f"{self.spec.ranks[:16]}…. Restore it from a copy, or build the cache again."
            )
        return read_ranks(table, self.spec.vocab_size)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer, from the files kept in the cache."""
        with tempfile.TemporaryDirectory(prefix="kdcache-tokenizer-") as folder:
            for name in self.storage.names("tokenizer"):
                Path(folder, name).write_bytes(self.storage.read(f"tokenizer/{name}"))
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def verify(self) -> Iterator[str]:
        """Check every hash, count and checksum; yields one line a problem.

        Cost: reads every byte once and decodes it once.
        """
        try:
            _ = self.rank_to_id
        except CorruptCacheError as error:
            yield str(error)
            return
        for entry in self.manifest.shards:
            name = f"shard {entry.span}: {entry.name}"
            cure = "Delete the file and run the same build again: only this shard is made anew."
            if not self.storage.exists(f"shards/{entry.name}"):
                yield f"{name} is missing. Run the same build again: only this shard is made anew."
                continue
            path = self.storage.fetch(f"shards/{entry.name}")
            sha256 = sha256_file(path)
            if sha256 != entry.sha256:
                # Hash first, open second: HDF5 never parses bytes that are known to be wrong.
                said = entry.sha256[:16]
                yield f"{name}: sha256 is {sha256[:16]}…, the manifest says {said}…. {cure}"
                continue
            try:
                data = self.read(entry.span)
                temperature = self.spec.temperatures[0] if self.spec.temperatures else 1.0
                if len(data.targets):
                    data.targets.take(np.arange(min(64, len(data.targets)))).at(temperature)
            except CorruptCacheError as error:
                yield f"{name}: {error}"


def _only(storage: Storage, allowed: set[str]) -> bool:
    root = getattr(storage, "root", None)
    with contextlib.suppress(FileNotFoundError):
        return root is not None and all(p.name in allowed for p in root.iterdir())
    return False
