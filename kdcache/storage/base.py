"""The interface of a storage, and what all storages share."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from kdcache.errors import CorruptCacheError

SMALL_FILE = 64 << 20
"""Bytes that `Storage.read` takes into memory unless told otherwise."""

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
            name: of the file.
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
            name: of the file.
            data: its new content.
            prepare: called before, while nobody can share it; whether to replace it.
        """
        with self.unshared(name) as free:
            if replaced := free and prepare():
                self.write(name, data)
        return replaced

    @abstractmethod
    def prefetch(self, files: Iterable[tuple[str, int]]) -> None:
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
