"""The interface of a storage, and a folder of this machine or of a shared file system as one.

Guarantee: locally a file is written under `tmp/`, flushed to the disk and renamed, so a name
appears only with its whole content, even if a process is killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import stat
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from kdcache.errors import CorruptCacheError, UsageError
from kdcache.files import inner, output_errors, sync_folder

SMALL_FILE = 64 << 20
"""Bytes that `Storage.read` takes into memory unless told otherwise."""

_SCRATCH = "tmp"
_BLOCK = 1 << 20
_HASHED_NAME = re.compile(r"-([0-9a-f]{16})\.\w+$")


class Share:
    """A lock on a file, by its open handle, until it is closed, forgotten, or the process ends."""

    def __init__(self, handle: int) -> None:
        self._handle: int | None = handle

    def close(self) -> None:
        """Let go of it."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    __del__ = close


class Storage(ABC):
    """A folder of immutable files. Names are relative, with `/` between their parts."""

    url: str
    remote = False  # whether `hold` gives copies

    def names(self, folder: str = "") -> list[str]:
        """Names of the files directly inside `folder`, sorted; none where it is missing."""
        return list(self.sizes(folder))

    @abstractmethod
    def sizes(self, folder: str = "") -> dict[str, int]:
        """As `names`, with the bytes of each."""

    @abstractmethod
    def entries(self) -> list[str]:
        """Names of the files and folders at the top, sorted."""

    def empty(self) -> bool:
        """Whether nothing at all is there yet."""
        return not self.entries()

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether a whole file of that name is there."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file."""

    @abstractmethod
    def read(self, name: str, limit: int = SMALL_FILE) -> bytes:
        """The content of a small file, which lies in the folder itself.

        Raises:
            FileNotFoundError: there is none.
            CorruptCacheError: it is larger than `limit`, a link, or no regular file.
        """

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file, atomically and durably.

        Raises:
            IncompleteError: no space left, or no answer.
            UsageError: the storage cannot be written to.
        """

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write a small file unless it exists; whether this call made it.

        Where the answer of an object store was lost on its way this may be False although the file
        is this call's: compare what is there.
        """

    @abstractmethod
    def hold(self, name: str, *, fresh: bool = False) -> AbstractContextManager[Path]:
        """A local path to read the file from, which stays until the end of the `with` block.

        A remote file is downloaded first, unless a copy of it is on this machine. A file whose name
        carries its hash (`00042-0123456789abcdef.h5`) is checked against it when it arrives.

        Args:
            fresh: ignore a copy on this machine and download it again.

        Raises:
            FileNotFoundError: there is none (a local path is given without a look).
            CorruptCacheError: the bytes of the store are not those of the name.
        """

    def share(self, name: str) -> Share | None:
        """A lock against `unshared` until it is closed or this process ends; None without locks."""
        return None

    def create_shared(self, name: str, data: bytes) -> Share | None:
        """`create`, then `share`, with no moment between in which another could replace it."""
        self.create(name, data)
        return self.share(name)

    @contextlib.contextmanager
    def unshared(self, name: str) -> Iterator[bool]:
        """Keeps others from `share`; False if a process shares the file, or if it is unknown."""
        yield False

    def replace_unshared(self, name: str, data: bytes, prepare: Callable[[], bool]) -> bool:
        """Replace a file that no process shares; False if one does, or if it can't be known.

        Args:
            prepare: called before, while nobody can share it; whether to replace it.
        """
        with self.unshared(name) as free:
            if replaced := free and prepare():
                self.write(name, data)
        return replaced

    def prefetch(self, files: Iterable[tuple[str, int]]) -> None:  # noqa: B027
        """Say which files are read next, in this order, with their sizes in bytes.

        Returns at once; threads download, as far as the disk's bound allows. The next call
        replaces this one's list. Local files need none of it.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a file; no error if it is gone already."""


def too_large(place: str, size: int, limit: int) -> CorruptCacheError:
    """The error about a file that is larger than what reads it allows."""
    return CorruptCacheError(
        f"{place} has {size} bytes, at most {limit} are allowed. Restore it from a copy."
    )


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits; about 1 GB/s a core."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def hash_in(name: str) -> str | None:
    """The first 16 digits of the file's SHA-256, where its name carries them."""
    found = _HASHED_NAME.search(name)
    return found.group(1) if found else None


def is_remote(name: str) -> bool:
    """Whether a name is a URL, and not of a file on this machine."""
    return "://" in name and not name.startswith("file://")


class LocalStorage(Storage):
    """A folder of this machine or of a shared file system."""

    def __init__(self, folder: str | Path) -> None:
        self.root = Path(folder).expanduser().absolute()
        self.url = str(self.root)
        try:
            is_file = self.root.exists() and not self.root.is_dir()
        except OSError as error:  # no right to look there, or no path at all
            raise UsageError(f"{self.root}: {error.strerror}. Choose another path.") from error
        if is_file:
            raise UsageError(f"{self.root} is a file; a cache is a folder. Choose another path.")

    def _path(self, name: str) -> Path:
        return self.root / inner(name)

    def names(self, folder: str = "") -> list[str]:
        """See `Storage.names`."""
        try:
            with os.scandir(self.root / folder) as entries:
                return sorted(e.name for e in entries if e.is_file())
        except FileNotFoundError:
            return []

    def sizes(self, folder: str = "") -> dict[str, int]:
        """See `Storage.sizes`."""
        try:
            with os.scandir(self.root / folder) as entries:
                return {e.name: e.stat().st_size for e in entries if e.is_file()}
        except FileNotFoundError:
            return {}

    def entries(self) -> list[str]:
        """See `Storage.entries`."""
        try:
            return sorted(os.listdir(self.root))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def exists(self, name: str) -> bool:
        """See `Storage.exists`."""
        return self._path(name).is_file()

    def size(self, name: str) -> int:
        """See `Storage.size`."""
        return self._path(name).stat().st_size

    def read(self, name: str, limit: int = SMALL_FILE) -> bytes:
        """See `Storage.read`."""
        path = self._path(name)
        self._refuse_links(path)
        # A fifo would wait for a writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise CorruptCacheError(f"{path} is not a regular file. Restore it from a copy.")
            if facts.st_size > limit:
                raise too_large(str(path), facts.st_size, limit)
            return file.read(facts.st_size)

    def _refuse_links(self, path: Path) -> None:
        """A cache is read and written inside its own folder, wherever that was copied from."""
        while path != self.root:
            if path.is_symlink():
                raise CorruptCacheError(
                    f"{path} is a link, and a cache is only read and written inside its own "
                    "folder. Replace the link by what it points to (`cp -RL` copies so)."
                )
            path = path.parent

    def write(self, name: str, data: bytes) -> None:
        """See `Storage.write`."""
        with self._written(data) as path:
            target = self._target(name)
            path.replace(target)
            sync_folder(target.parent)

    def create(self, name: str, data: bytes) -> bool:
        """See `Storage.create`."""
        with self._written(data) as path:
            return self._publish(path, name)

    def create_shared(self, name: str, data: bytes) -> Share | None:
        """See `Storage.create_shared`."""
        with self._written(data) as path:
            first = self.share(str(path.relative_to(self.root)))
            self._publish(path, name)
            # Opened by its name: a handle from `tmp/` would keep that folder on the disk.
            lock = self.share(name)
            if first is not None:
                first.close()
            return lock

    def _publish(self, path: Path, name: str) -> bool:
        """Give a file that is on the disk its name, unless that is taken; whether it was free."""
        target = self._target(name)
        try:
            os.link(path, target)  # unlike a rename, a link never replaces what is there
        except FileExistsError:
            return False
        except OSError as error:
            # Some network and FUSE file systems have no hard links; a look and a rename is the best
            # that remains there, and the spec is compared after writing anyway.
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
                raise
            if target.exists():
                return False
            path.rename(target)
        sync_folder(target.parent)
        return True

    @contextlib.contextmanager
    def hold(self, name: str, *, fresh: bool = False) -> Iterator[Path]:
        """See `Storage.hold`."""
        yield self._path(name)

    def share(self, name: str) -> Share | None:
        """See `Storage.share`."""
        path = self._path(name)
        while True:
            try:
                handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return None
            lock = Share(handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_SH)
            except OSError:  # some network file systems have no locks
                return None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return lock
            lock.close()  # it was replaced while this process waited

    @contextlib.contextmanager
    def unshared(self, name: str) -> Iterator[bool]:
        """See `Storage.unshared`."""
        path, free = self._path(name), False
        with contextlib.ExitStack() as opened:
            with contextlib.suppress(OSError):  # shared, or no locks, or not writable
                file = opened.enter_context(open(path, "r+b"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = os.path.samestat(os.fstat(file.fileno()), path.stat())
            yield free

    def remove(self, name: str) -> None:
        """See `Storage.remove`."""
        path = self._path(name)
        self._refuse_links(path.parent)
        with output_errors(self.url):
            path.unlink(missing_ok=True)

    def append(self, name: str, text: str) -> None:
        """Add to a file in one write, so that several processes may; makes it where there is none.

        Raises:
            OSError: it cannot be written, or is a link.
            CorruptCacheError: its folder is a link.
        """
        path = self._path(name)
        self._refuse_links(path.parent)
        path.parent.mkdir(exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        with os.fdopen(os.open(path, flags, 0o666), "ab") as file:
            file.write(text.encode())

    @contextlib.contextmanager
    def _written(self, data: bytes) -> Iterator[Path]:
        """A temporary file with the data, flushed to the disk; removed at exit unless moved."""
        path = self.root / _SCRATCH / f"{uuid.uuid4().hex}.tmp"
        self._refuse_links(path)
        with output_errors(self.url):
            try:
                with _new_file(path) as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                yield path
            finally:
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # another writer still has a file in it
                    path.parent.rmdir()

    def _target(self, name: str) -> Path:
        target = self._path(name)
        self._refuse_links(target.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


def _new_file(path: Path) -> BinaryIO:
    """A new file in a folder that other writers make and remove all the time."""
    path.parent.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir()
        with contextlib.suppress(FileNotFoundError):
            return open(path, "xb")
