"""A folder of immutable shards: `spec.json`, `shards/`, `tokenizer/` and `manifest.json`.

What a cache and a generated corpus share: beginning and resuming, committing, the seal, and access
to the files. The listing of `shards/` is the only state of what is made.

Cost: opening reads two JSON files and no shard.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from kdcache.cache.manifest import SHARD_NAME, Manifest, ShardEntry, check_files
from kdcache.cache.shard import ShardCounts
from kdcache.cache.spec import Spec, from_text, no_cache, to_text
from kdcache.errors import CorruptCacheError, IncompleteError, UsageError
from kdcache.humanize import redacted
from kdcache.storage import Share, Storage, open_storage, redact
from kdcache.storage.disk import verified_here

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LEFTOVER = re.compile(r"tmp|tokenizer|ranks\.u32|output_layer-.*")  # of a start that crashed
_OF_THE_CORPUS = "events/corpus.json"  # what the build noted of it
_UNUSED = "Nothing is committed there: if no build is running on it, delete its spec.json first."

SpecT = TypeVar("SpecT", bound=Spec)
StoreT = TypeVar("StoreT", bound="ShardStore[Any]")


@dataclass
class ShardStore(ABC, Generic[SpecT]):
    """A folder of shards that is being made (`create_or_resume`) or read (`open`)."""

    kind: ClassVar[str]
    command: ClassVar[str]
    suffix: ClassVar[str]

    storage: Storage
    spec: SpecT
    manifest_or_none: Manifest | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    at_work: Share | None = field(default=None, repr=False, compare=False)  # a lock, while open

    @classmethod
    @abstractmethod
    def parse_spec(cls, values: Any, url: str) -> SpecT:
        """The spec in a `spec.json`.

        Raises:
            UsageError: it is of another kind of folder.
            CorruptCacheError: it cannot be.
        """

    @abstractmethod
    def read_facts(self, path: Path) -> tuple[ShardCounts, dict[str, Any]]:
        """The counts of a shard's file, and what it states of its span."""

    def check_shard(self, entry: ShardEntry) -> None:
        """Check the bytes of a shard, then what it holds; see `kdcache.cache.check` of a cache's.

        Raises:
            CorruptCacheError: it is not the one of the manifest, or not what a shard must be.
        """
        raise NotImplementedError

    def stated(self, span: int, facts: Mapping[str, Any]) -> dict[str, Any]:
        """What a shard's file states of its span."""
        return {"fingerprint": self.spec.fingerprint, "index": span, **facts}

    def put(
        self, span: int, content: bytes, counts: tuple[int, int, int], facts: Mapping[str, Any]
    ) -> ShardEntry:
        """Make a shard appear; safe to call again for the same span.

        Args:
            facts: of `SPAN_FACTS`, as the file has them.

        Raises:
            IncompleteError: no space left.
        """
        sha256 = hashlib.sha256(content).hexdigest()
        name = f"{span:05d}-{sha256[:16]}.{self.suffix}"
        self.storage.write(f"shards/{name}", content)
        return ShardEntry(span, name, *counts, len(content), sha256, **facts)

    @classmethod
    def create_or_resume(
        cls: type[StoreT],
        url: str,
        spec: Any,
        *,
        tokenizer_files: Mapping[str, bytes],
        ranks: bytes = b"",
        output_layer: bytes = b"",
        notes: Mapping[str, Any] | None = None,
    ) -> StoreT:
        """Start a cache, or resume one of the same spec.

        The creator of `spec.json` has begun the cache: it names the hashes of all its other files,
        and no build writes anything that it does not name. So of two builds that start at once one
        is refused, or both work on the same cache. A cache in which nothing is committed and no
        build is at work (a lock on `spec.json`, on local file systems) may begin with another spec.

        Args:
            tokenizer_files: name and content of each tokenizer file, kept in the cache.
            ranks: the rank table of the hash in the spec, if it has one.
            output_layer: the file of the hash in the spec, if it has one; also empty to resume a
                cache that has it.
            notes: facts that do not decide the bytes (names, versions), kept with the spec.

        Raises:
            UsageError: the folder holds something else, or a cache with another spec.
        """
        storage, spec = open_storage(url), spec.without_secrets()
        beside = {f"tokenizer/{name}": data for name, data in tokenizer_files.items()}
        if ranks:
            beside["ranks.u32"] = ranks
        if output_layer:
            beside[layer_name(output_layer)] = output_layer
        files = {name: hashlib.sha256(data).hexdigest() for name, data in beside.items()}
        document = {"spec": spec.to_dict(), "notes": redacted(notes or {}), "files": files}
        if storage.exists("spec.json"):
            at_work = storage.share("spec.json")
        else:
            entries = set(storage.entries())
            others = {name for name in entries if not _LEFTOVER.fullmatch(name)}
            strange = "spec.json" not in entries and bool(others)
            if strange and "manifest.json" in entries:  # a sealed cache that lost its spec.json
                strange = not Manifest.read(storage).fits(spec, files)
            if strange:
                raise UsageError(
                    f"{redact(url)} is not empty and not a kdcache {cls.kind}. Choose another "
                    "--out."
                )
            at_work = storage.create_shared("spec.json", to_text(document))
        cache = cls._read(storage)
        if cache.in_use:
            spec = spec.in_form_of(cache.spec)
        unused = bool(cache.spec.differences(spec)) and not cache.in_use
        if unused:
            if at_work is not None:
                at_work.close()

            def clear() -> bool:
                """Drop what the old spec alone names, unless a build has committed something."""
                old = cls._read(storage)
                if old.in_use:
                    return False
                for name in (*old.files.keys() - files.keys(), _OF_THE_CORPUS):
                    storage.remove(name)
                return True

            storage.replace_unshared("spec.json", to_text(document), clear)
            at_work = storage.share("spec.json")
            cache = cls._read(storage)
            unused = not cache.in_use
        changed = cache.spec.differences(spec)
        if changed:
            if at_work is not None:  # a kept error would keep the lock
                at_work.close()
            listed, hint = "\n  ".join(changed), f" {_UNUSED}" if unused else ""
            raise UsageError(
                f"{redact(url)} was begun with other options:\n  {listed}\n"
                f"Use the same options to continue, or another --out.{hint}"
            )
        cache.at_work = at_work
        cache._complete(beside)
        return cache

    def release(self) -> None:
        """Say that this build is no longer at work: see `create_or_resume`."""
        if self.at_work is not None:
            self.at_work.close()

    @classmethod
    def open(cls: type[StoreT], url: str) -> StoreT:
        """Open a sealed cache for reading.

        Raises:
            UsageError: there is no cache at `url`.
            IncompleteError: its build is unfinished.
            CorruptCacheError: its files contradict each other.
        """
        storage = open_storage(url)
        if not storage.exists("spec.json"):
            raise no_cache(storage)
        cache = cls._read(storage)
        if cache.manifest_or_none is None:
            done = len(cache.committed())
            raise IncompleteError(
                f"the build of {redact(url)} has not finished: {done} of {cache.spec.spans} "
                f"shards are there. Run the same `kdcache {cls.command}` command again to finish "
                "it."
            )
        return cache

    @classmethod
    def resume(cls: type[StoreT], url: str) -> StoreT:
        """Open a cache whose build may be running, as its workers do."""
        return cls._read(open_storage(url))

    @classmethod
    def _read(cls: type[StoreT], storage: Storage) -> StoreT:
        cache = cls.read_spec(storage)
        if storage.exists("manifest.json"):
            with contextlib.suppress(FileNotFoundError):  # a repair has removed it since
                cache.manifest_or_none = cache.read_manifest()
        return cache

    @classmethod
    def read_spec(cls: type[StoreT], storage: Storage) -> StoreT:
        """A cache by its `spec.json` alone, finished or not.

        Raises:
            UsageError: there is none.
            CorruptCacheError: the file was changed or truncated, or is not a spec.
        """
        name = f"{redact(storage.url)}/spec.json"
        try:
            document = from_text(storage.read("spec.json"), name)
        except FileNotFoundError:  # a repair has removed it
            raise no_cache(storage) from None
        try:
            spec = cls.parse_spec(document["spec"], redact(storage.url))
            files = check_files(document["files"])
            notes = dict(document["notes"])
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptCacheError(f"{name} cannot be read: {error!r}.") from error
        return cls(storage, spec, None, notes, files)

    def read_manifest(self) -> Manifest:
        """The manifest as it is in the storage now.

        Raises:
            CorruptCacheError: it is not of this cache's spec.
        """
        manifest = Manifest.read(self.storage)
        if not manifest.fits(self.spec, self.files):
            raise CorruptCacheError(
                f"{self.url}: manifest.json does not belong to spec.json. "
                "Restore both from one build."
            )
        return manifest

    def _complete(self, beside: Mapping[str, bytes]) -> None:
        """Write the spec's other files that are missing or differ from its hashes."""
        for name, sha256 in self.files.items():
            try:
                self.check_beside(name)
            except CorruptCacheError as error:
                data = beside.get(name, b"")
                if hashlib.sha256(data).hexdigest() != sha256:
                    raise UsageError(
                        f"{error} This build would write a different one, since the cache was "
                        f"begun with other versions of the libraries. Use those, or another --out."
                    ) from None
                self.storage.write(name, data)

    def committed(self) -> dict[int, str]:
        """Span -> shard file name of the committed spans, from the listing alone.

        Of a sealed cache, only what its manifest names counts.
        """
        names = self.storage.names("shards")
        if self.manifest_or_none is not None:
            listed = set(names)
            return {s.span: s.name for s in self.manifest_or_none.shards if s.name in listed}
        found: dict[int, str] = {}
        for name in names:
            match = SHARD_NAME.fullmatch(name)
            if match and match.group(3) == self.suffix and int(match.group(1)) < self.spec.spans:
                # Two copies can only come from two builds racing on one span: every reader and the
                # seal take the first name, so they agree.
                found.setdefault(int(match.group(1)), name)
        return found

    def missing(self) -> list[int]:
        """Spans without a committed shard, in order."""
        return sorted(set(range(self.spec.spans)) - self.committed().keys())

    @property
    def sealed(self) -> bool:
        """Whether the manifest is there."""
        return self.manifest_or_none is not None

    @property
    def in_use(self) -> bool:
        """Whether anything is committed."""
        return self.sealed or bool(self.committed())

    @property
    def manifest(self) -> Manifest:
        """The manifest of a sealed cache."""
        assert self.manifest_or_none is not None, "Cache.open gives only sealed caches"
        return self.manifest_or_none

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest: identifies the exact bytes of the whole cache."""
        return hashlib.sha256(self.manifest.to_json()).hexdigest()

    @property
    def url(self) -> str:
        """The cache's address without secrets, for printing."""
        return redact(self.storage.url)

    @contextlib.contextmanager
    def hold(
        self, entry: ShardEntry, *, fresh: bool = False, noted: bool = False
    ) -> Iterator[Path]:
        """A shard's file on this machine, whose bytes are those of the manifest.

        Args:
            fresh: leave a copy of a remote file that is on this machine aside.
            noted: do not hash a file again that a process of this machine has hashed.

        Raises:
            CorruptCacheError: the file is missing, or its size or hash is another.
        """
        path = None
        with contextlib.ExitStack() as held:
            with contextlib.suppress(FileNotFoundError):
                path = held.enter_context(self.storage.hold(f"shards/{entry.name}", fresh=fresh))
            notes = verified_here() if noted else None
            if notes is None or path is None:
                entry.check(path)
            else:
                check = functools.partial(entry.check, path)
                notes.once(path, entry.sha256, check, ours=self.storage.remote)
            assert path is not None, "it was found"
            yield path

    def prefetch(self, spans: Iterable[int]) -> None:
        """Say which shards are read next, in this order, so that remote ones are fetched ahead.

        Returns at once. The next call replaces this one's list.
        """
        entries = (self.manifest.shards[span] for span in spans)
        self.storage.prefetch((f"shards/{entry.name}", entry.bytes) for entry in entries)

    def read_beside(self, name: str) -> bytes:
        """A file named in `spec.json`, such as `tokenizer/tokenizer.json`.

        Raises:
            CorruptCacheError: it is missing, or not the one that `spec.json` names.
        """
        cure = "Restore it from a copy, or run the same build again."
        try:
            data = self.storage.read(name)
        except FileNotFoundError as error:
            raise CorruptCacheError(f"{self.url}/{name} is missing. {cure}") from error
        said = self.hash_of(name)
        found = hashlib.sha256(data).hexdigest()
        if said is not None and found != said:
            raise CorruptCacheError(
                f"{self.url}/{name}: sha256 is {found[:16]}…, the spec says {said[:16]}…. {cure}"
            )
        return data

    def hash_of(self, name: str) -> str | None:
        """What `spec.json` states that the SHA-256 of a file next to it is."""
        return self.files.get(name)

    def check_beside(self, name: str) -> None:
        """Compare a file with its hash in `spec.json`.

        Raises:
            CorruptCacheError: it is missing, or another one.
        """
        self.read_beside(name)

    def tokenizer_files(self) -> dict[str, bytes]:
        """Name and content of each tokenizer file.

        Raises:
            CorruptCacheError: they are missing or changed.
        """
        named = [name for name in self.files if name.startswith("tokenizer/")]
        every = named or [f"tokenizer/{name}" for name in self.storage.names("tokenizer")]
        return {name.removeprefix("tokenizer/"): self.read_beside(name) for name in every}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer, from the files kept in the cache.

        Raises:
            CorruptCacheError: they are missing or changed.
            UsageError: they make no tokenizer here, or one that needs code of its own; a cache
                brings none.
        """
        from kdcache.pretrained import UnreadableError, tokenizer_of

        try:
            return tokenizer_of(self.tokenizer_files())
        except UnreadableError as error:
            reason = str(error).split(". ")[0]
            raise UsageError(
                f"{self.url}: its tokenizer cannot be loaded ({reason}). Code of a tokenizer is "
                "never run from a cache: build with a teacher that needs none."
            ) from error


def layer_name(data: bytes) -> str:
    """The name of an output layer's file with this content."""
    return f"output_layer-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
