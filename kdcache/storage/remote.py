"""A prefix of an object store, through fsspec, as a storage.

Guarantee: an object appears whole, with one PUT or at the end of a multipart upload. A killed
upload leaves nothing visible (its parts stay until the bucket's rule for incomplete uploads removes
them). What is read from a copy on this machine is what the store holds: a name with a hash stands
for its content, and any other name is downloaded each time.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kdcache.errors import CorruptCacheError, UsageError
from kdcache.files import inner
from kdcache.storage.base import SMALL_FILE, Storage, hash_in, too_large
from kdcache.storage.disk import DiskCache
from kdcache.storage.filesystem import FileSystem

logger = logging.getLogger(__name__)

_BLOCK = 16 << 20
_LISTING = 256 << 20  # a million names, a thousand a request
_THREADS = 4
_TRIES = 3


@dataclass(frozen=True)
class Facts:
    """What a store states of a file.

    Attributes:
        checksum: of its content, with the kind of it; empty where the store has none.
        changed: when it was written; empty where the store does not say.
    """

    size: int
    checksum: str
    changed: str

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Facts:
        """From an entry of a listing."""
        lfs = entry.get("lfs") or {}
        kinds = {"sha256": lfs.get("sha256"), "md5": entry.get("md5Hash")}
        kinds |= {"crc32c": entry.get("crc32c"), "etag": entry.get("ETag") or entry.get("etag")}
        known = ((kind, str(value).strip('"')) for kind, value in kinds.items() if value)
        checksum = next((f"{kind}:{value}" for kind, value in known), "")
        times = (entry.get(key) for key in ("LastModified", "updated", "mtime", "created"))
        changed = next((str(time) for time in times if time), "")
        return cls(int(entry.get("size") or 0), checksum, changed)


class RemoteStorage(Storage):
    """A prefix of an object store; files are read from copies in the machine's `DiskCache`."""

    remote = True

    def __init__(self, url: str, disk: DiskCache | None = None) -> None:
        """Find the store; sends no request yet.

        Args:
            disk: where copies are kept. Default: as the environment has it.

        Raises:
            UsageError: a URL that cannot be opened.
        """
        self.url = url.rstrip("/")
        self.disk = disk or DiskCache.of_environment()
        self._store = FileSystem(self.url)
        self._ahead = _Ahead(self._bring)

    def __reduce__(self) -> tuple[type[RemoteStorage], tuple[str, DiskCache]]:
        return RemoteStorage, (self.url, self.disk)  # locks and connections stay in their process

    def _path(self, name: str) -> str:
        return f"{self._store.path}/{inner(name)}" if name else self._store.path

    def _list(self, folder: str) -> list[tuple[str, dict[str, Any]]]:
        """Last part of the name, and what the store states, of a folder's contents."""
        path = self._path(folder)
        try:
            listed = self._store.ask("ls", path, detail=True, volume=_LISTING)
        except FileNotFoundError:
            return []
        named = ((entry["name"].rstrip("/"), entry) for entry in listed)
        # Some tools mark a folder with an empty object of the folder's name.
        found = ((name.rsplit("/", 1)[-1], entry) for name, entry in named if name != path)
        return sorted(found, key=lambda one: one[0])

    def sizes(self, folder: str = "") -> dict[str, int]:
        """See `Storage.sizes`."""
        return {name: one.size for name, one in self.facts(folder).items()}

    def facts(self, folder: str = "") -> dict[str, Facts]:
        """As `names`, with what the store states of each file."""
        return {name: Facts.of(e) for name, e in self._list(folder) if e["type"] == "file"}

    def entries(self) -> list[str]:
        """See `Storage.entries`."""
        return [name for name, _ in self._list("")]

    def exists(self, name: str) -> bool:
        """See `Storage.exists`."""
        try:
            return bool(self._store.ask("info", self._path(name))["type"] == "file")
        except FileNotFoundError:
            return False

    def size(self, name: str) -> int:
        """See `Storage.size`."""
        return int(self._store.ask("info", self._path(name))["size"])

    def read(self, name: str, limit: int = SMALL_FILE) -> bytes:
        """See `Storage.read`."""
        size = self.size(name)
        if size > limit:
            raise too_large(f"{self._store.shown}/{name}", size, limit)
        return bytes(self._store.ask("cat_file", self._path(name), volume=size))

    def write(self, name: str, data: bytes) -> None:
        """See `Storage.write`."""
        self._put(name, data)

    def _put(self, name: str, data: bytes, **options: str) -> None:
        with self._writing():
            self._store.ask("pipe_file", self._path(name), data, volume=len(data), **options)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise UsageError(
                f"cannot write to {self._store.shown}: it does not exist. Create it, or "
                "choose another --out."
            ) from error

    def create(self, name: str, data: bytes) -> bool:
        """See `Storage.create`.

        Exclusive where the store has conditional writes, as S3 and GCS have; elsewhere a look
        before writing is the best that remains.
        """
        if self.exists(name):
            return False
        try:
            self._put(name, data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            logger.warning("%s has no conditional writes", self._store.shown)
            self._put(name, data)
        return True

    @contextlib.contextmanager
    def hold(self, name: str, *, fresh: bool = False, version: str = "") -> Iterator[Path]:
        """See `Storage.hold`; a `version` stands for the content, as a hash in the name does."""
        fresh = fresh or not (version or hash_in(name))
        with self.disk.hold(self._key(name, version), self._download(name), fresh=fresh) as path:
            yield path

    def prefetch(self, files: Iterable[tuple[str, int]]) -> None:
        """See `Storage.prefetch`."""
        # More than half of the bound could push out what is read before it.
        self._ahead.want(self.disk.leading(files, share=0.5))

    # Files of a run: large, on a disk of this machine, and known to nobody else's copies

    def tree(self, folder: str = "") -> dict[str, int]:
        """Names below `folder`, however deep, with the bytes of each; not from a cache."""
        path = self._path(folder)
        found = self._store.ask("find", path, detail=True, volume=_LISTING)
        return {name[len(path) + 1 :]: int(entry["size"] or 0) for name, entry in found.items()}

    def upload(self, name: str, path: Path) -> None:
        """Create or replace a file by one of this machine, whole or not at all."""
        with self._writing():
            self._store.ask("put_file", str(path), self._path(name), volume=path.stat().st_size)

    def download(self, name: str, path: Path) -> None:
        """Write all bytes of a file to this machine's disk.

        Raises:
            FileNotFoundError: there is none.
        """
        with open(path, "xb") as file:
            self._copy(name, self.size(name), file)

    def remove(self, name: str) -> None:
        """See `Storage.remove`."""
        with contextlib.suppress(FileNotFoundError):
            self._store.ask("rm_file", self._path(name))

    def _key(self, name: str, version: str = "") -> str:
        """The name of a file's copy: its own name, after a hash of the whole address."""
        address = hashlib.sha256(f"{self.url}/{name}{version}".encode()).hexdigest()
        return f"{address[:16]}-{inner(name).rsplit('/', 1)[-1]}"

    def _bring(self, name: str) -> None:
        self.disk.bring(self._key(name), self._download(name))

    def _download(self, name: str) -> Callable[[], tuple[int, Callable[[BinaryIO], None]]]:
        def begin() -> tuple[int, Callable[[BinaryIO], None]]:
            size = self.size(name)
            return size, functools.partial(self._copy, name, size)

        return begin

    def _copy(self, name: str, size: int, file: BinaryIO) -> None:
        """Write all bytes of a remote file, and compare them with the hash in its name."""
        wanted = hash_in(name)
        for _ in range(_TRIES):
            digest = hashlib.sha256()
            file.seek(0)
            for start in range(0, size, _BLOCK):
                block = self._store.read(self._path(name), start, min(size, start + _BLOCK))
                digest.update(block)
                file.write(block)
            found = digest.hexdigest()[:16]
            if wanted in (None, found):
                return
            logger.warning("%s/%s arrived with sha256 %s…", self._store.shown, name, found)
        raise CorruptCacheError(
            f"{self._store.shown}/{name}: its bytes have sha256 {found}…. Delete the file and run "
            "the same build again: only this shard is made again."
        )


class _Ahead:
    """Downloads the next files in order, a few at a time, in background threads.

    The threads live while there is something to do, and do not keep the process from ending: a
    download that is cut short leaves nothing to repair.
    """

    def __init__(self, bring: Callable[[str], None]) -> None:
        self._bring = bring
        self._lock = threading.Lock()
        self._names: deque[str] = deque()
        self._threads = 0

    def want(self, names: Iterable[str]) -> None:
        with self._lock:
            self._names = deque(names)
            while self._threads < min(_THREADS, len(self._names)):
                self._threads += 1
                threading.Thread(target=self._work, name="kdcache-prefetch", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._names:
                    self._threads -= 1
                    return
                names = self._names
                name = names.popleft()
            try:
                self._bring(name)
            except Exception as error:
                # The reader of the file meets the error, and has it raised where it belongs.
                logger.info("%s was not prefetched: %s", name, error)
                with self._lock:
                    names.clear()  # and not a list that has come since
