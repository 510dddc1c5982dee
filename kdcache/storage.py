"""Where a cache lives: a folder, local or behind any fsspec URL, reduced to the few verbs a cache
needs.

Guarantee: a name appears only with its whole content. Locally a file is written under `tmp/`,
flushed to the disk and renamed; in an object store one PUT makes it appear. Listing the folder is
therefore the only state there is: what is listed is committed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from kdcache.errors import IncompleteError, UsageError

_SCRATCH = "tmp"
_BLOCK = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def open_storage(url: str) -> Storage:
    """The storage behind a local path or an fsspec URL such as `s3://bucket/cache`."""
    if "://" in url and not url.startswith("file://"):
        return RemoteStorage(url)
    return LocalStorage(url.removeprefix("file://"))


class Storage(ABC):
    """A folder of immutable files. Names are relative, with `/` between their parts."""

    url: str

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """Names of the files directly inside `folder`, sorted; empty where the folder is
        missing.
        """

    @abstractmethod
    def empty(self) -> bool:
        """Whether nothing at all is there yet."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether a whole file of that name is there."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The content of a small file; FileNotFoundError where there is none."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file, atomically and durably.

        Raises:
            IncompleteError: no space left.
            UsageError: the place cannot be written to.
        """

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write a small file unless it exists; whether this call made it."""

    @abstractmethod
    def fetch(self, name: str) -> Path:
        """A local path to read the file from; remote files are downloaded first."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a file; no error where it is gone already."""


class LocalStorage(Storage):
    """A folder of this machine or of a shared file system."""

    def __init__(self, folder: str | Path) -> None:
        self.root = Path(folder).expanduser().absolute()
        self.url = str(self.root)
        if self.root.exists() and not self.root.is_dir():
            raise UsageError(f"{self.root} is a file; a cache is a folder. Choose another path.")

    def names(self, folder: str = "") -> list[str]:
        """See `Storage.names`."""
        try:
            with os.scandir(self.root / folder) as entries:
                return sorted(e.name for e in entries if e.is_file())
        except FileNotFoundError:
            return []

    def empty(self) -> bool:
        """See `Storage.empty`."""
        return not self.root.exists() or not any(self.root.iterdir())

    def exists(self, name: str) -> bool:
        """See `Storage.exists`."""
        return (self.root / name).is_file()

    def size(self, name: str) -> int:
        """See `Storage.size`."""
        return (self.root / name).stat().st_size

    def read(self, name: str) -> bytes:
        """See `Storage.read`."""
        return (self.root / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """See `Storage.write`."""
        with self._written(data) as path:
            target = self._target(name)
            path.replace(target)
            _sync_folder(target.parent)

    def create(self, name: str, data: bytes) -> bool:
        """See `Storage.create`."""
        with self._written(data) as path:
            target = self._target(name)
            try:
                os.link(path, target)  # unlike a rename, a link never replaces what is there
            except FileExistsError:
                return False
            except OSError as error:
                # Some network and FUSE file systems have no hard links; a look and a rename is the
                # best that remains there, and the spec is compared after writing anyway.
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
                    raise
                if target.exists():
                    return False
                path.rename(target)
            _sync_folder(target.parent)
            return True

    def fetch(self, name: str) -> Path:
        """See `Storage.fetch`."""
        return self.root / name

    def remove(self, name: str) -> None:
        """See `Storage.remove`."""
        (self.root / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _written(self, data: bytes) -> Iterator[Path]:
        """A temporary file with the data, safe on the disk; removed at exit unless it was moved."""
        folder = self.root / _SCRATCH
        with _output_errors(self.url):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{uuid.uuid4().hex}.tmp"
            try:
                path.write_bytes(data)
                _sync_file(path)
                yield path
            finally:
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # another writer still has a file in it
                    folder.rmdir()

    def _target(self, name: str) -> Path:
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


class RemoteStorage(Storage):
    """A prefix of an object store, through fsspec."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._fs, self._prefix = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UsageError(f"{redact(url)}: {error}") from error
        name = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self._local = Path(tempfile.gettempdir()) / f"kdcache-{os.getuid()}" / name

    def _path(self, name: str) -> str:
        return f"{self._prefix}/{name}" if name else self._prefix

    def names(self, folder: str = "") -> list[str]:
        """See `Storage.names`."""
        self._fs.invalidate_cache()
        try:
            listed = self._fs.ls(self._path(folder), detail=True)
        except FileNotFoundError:
            return []
        return sorted(e["name"].rsplit("/", 1)[-1] for e in listed if e["type"] == "file")

    def empty(self) -> bool:
        """See `Storage.empty`."""
        self._fs.invalidate_cache()
        try:
            return not self._fs.ls(self._prefix, detail=False)
        except FileNotFoundError:
            return True

    def exists(self, name: str) -> bool:
        """See `Storage.exists`."""
        return bool(self._fs.isfile(self._path(name)))

    def size(self, name: str) -> int:
        """See `Storage.size`."""
        return int(self._fs.size(self._path(name)))

    def read(self, name: str) -> bytes:
        """See `Storage.read`."""
        return bytes(self._fs.cat_file(self._path(name)))

    def write(self, name: str, data: bytes) -> None:
        """See `Storage.write`."""
        self._fs.pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """See `Storage.create`; fsspec has no exclusive create, so this looks first."""
        if self.exists(name):
            return False
        self.write(name, data)
        return True

    def fetch(self, name: str) -> Path:
        """See `Storage.fetch`."""
        local = self._local / name
        if not local.exists():
            local.parent.mkdir(parents=True, exist_ok=True)
            partial = local.with_name(f"{local.name}.{uuid.uuid4().hex}.part")
            try:
                self._fs.get_file(self._path(name), str(partial))
                partial.replace(local)
            finally:
                partial.unlink(missing_ok=True)
        return local

    def remove(self, name: str) -> None:
        """See `Storage.remove`."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))


def redact(url: str) -> str:
    """The URL without user names, passwords and query strings, fit for logs and manifests."""
    url = re.sub(r"(?<=://)[^/@]*@", "", url)
    return re.sub(r"\?.*", "", url) if "://" in url else url


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits; about 1 GB/s a core."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def no_space(error: OSError) -> bool:
    """Whether an error means a full disk or quota."""
    return error.errno in _FULL


@contextlib.contextmanager
def _output_errors(url: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise UsageError(
            f"cannot write to {url}: {error.strerror}. Choose another --out."
        ) from error
    except OSError as error:
        if no_space(error):
            raise IncompleteError(
                f"no space left on {url}: what is committed stays valid. "
                "Free some space and run the same command again."
            ) from error
        if error.errno == errno.EROFS:
            raise UsageError(
                f"{url} is on a read-only file system. Choose another --out."
            ) from error
        raise


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
