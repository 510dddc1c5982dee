"""Copies of remote files on this machine in a bounded folder, and notes of which files were hashed.

A copy is a file `<key>`; while it is downloaded it is `<key>.part`. Every use of either holds a
kernel lock (flock) on it: exclusive while it is written or removed, shared while it is read. The
kernel drops the locks of a process that dies, so nothing needs repair: a `.part` without a lock is
left from a killed download and is removed by the next scan. A process that needs a copy which is
being downloaded waits for it. Space is reserved before a download begins: the `.part` has its final
size from the start, and under the lock of the whole folder the least recently used copies are
removed until it fits.

The ranks of a node read the same files, and again each epoch. The first that needs a file hashes it
while the others wait, and appends a note in one write: 32 bytes, the hash of device, inode, size,
time of last change, and SHA-256.

Cost: one scan of the folder a download; two system calls and a stat a use.
Guarantee: a key's file is whole and checked; the copies' sizes stay within the bound, except for
those in use, which are never removed. A file that was written to since its note has another time,
and one changed within the last seconds gets no note, since clocks of file systems are coarse.
Corruption of the disk is found by the checksums inside a shard. Where the folder cannot be used, or
belongs to another user, every read hashes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from kdcache.errors import IncompleteError, UsageError, no_space
from kdcache.storage.base import sha256_file

_MOST = 32 << 30
_PART = ".part"
_LOCK = ".lock"
# The clock of file systems, where there is such a one.
_CLOCK = getattr(time, "CLOCK_REALTIME_COARSE", time.CLOCK_REALTIME)

# Size of a file, and what writes it whole or raises.
Download = Callable[[], tuple[int, Callable[[BinaryIO], None]]]


class DiskCache:
    """A bounded folder of copies, least recently used first out."""

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        """Name the folder; it is created on first use.

        Args:
            folder: of the copies and of nothing else.
            limit: bytes they may take. Default: 32 GiB, or half of what is free for them if that is
                less.
        """
        self.folder, self.limit = folder, limit

    @classmethod
    def of_environment(cls) -> DiskCache:
        """The folder that KDCACHE_DISK names, bounded by KDCACHE_DISK_BYTES.

        Without them it is in the user's cache folder (XDG_CACHE_HOME, or ~/.cache).

        Raises:
            UsageError: the bound is not a positive number of bytes.
        """
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = os.environ.get("KDCACHE_DISK") or f"{base}/kdcache"
        given = os.environ.get("KDCACHE_DISK_BYTES")
        if given and not (given.isdecimal() and int(given)):
            raise UsageError(f"KDCACHE_DISK_BYTES is {given!r}, expected a number of bytes.")
        return cls(Path(folder).expanduser().absolute(), int(given) if given else None)

    @contextlib.contextmanager
    def hold(self, key: str, download: Download, *, fresh: bool = False) -> Iterator[Path]:
        """The copy of that key, kept until the end of the `with` block.

        Args:
            key: name of the copy, which identifies its content.

        Raises:
            UsageError: the folder cannot be written to, or the bound is below the file's size.
            IncompleteError: no space left.
        """
        file = self._obtain(key, download, fresh=fresh, wait=True)
        assert file is not None, "waiting ends with a copy or an error"
        with file:
            yield self.folder / key

    def bring(self, key: str, download: Download) -> None:
        """Download a copy unless it exists or is being downloaded; raises as `hold` does."""
        file = self._obtain(key, download, fresh=False, wait=False)
        if file is not None:
            file.close()

    def leading(self, files: Iterable[tuple[str, int]], share: float) -> list[str]:
        """The first of these names that together fit in that share of the bound."""
        names, left = [], self._bound(sum(size for *_, size in self._copies())) * share
        for name, size in files:
            left -= size
            if left < 0:
                break
            names.append(name)
        return names

    def _obtain(self, key: str, download: Download, *, fresh: bool, wait: bool) -> BinaryIO | None:
        """The copy, open and locked for reading; None if it is being downloaded and not `wait`."""
        path, part = self.folder / key, self.folder / f"{key}{_PART}"
        with self._errors():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            while True:
                found = None if fresh else _locked(path, fcntl.LOCK_SH)
                if found is not None:
                    # The time of the last change stays: it is what the content is known by.
                    changed = os.fstat(found.fileno()).st_mtime_ns
                    os.utime(path, ns=(time.clock_gettime_ns(_CLOCK), changed))
                    return found
                ours = _locked(part, fcntl.LOCK_EX | fcntl.LOCK_NB, create=True)
                if ours is None:
                    if not wait:
                        return None
                    # The downloading process makes its lock a shared one when the copy is whole.
                    arrived = _locked(part, fcntl.LOCK_SH, named=path)
                    if arrived is not None:
                        return arrived
                    time.sleep(random.uniform(0.0, 0.02))  # it failed: one of us retries
                    continue
                if fresh or not path.exists():
                    fresh = False
                    self._download(ours, part, path, download)
                    fcntl.flock(ours, fcntl.LOCK_SH)
                else:  # it arrived between the two looks
                    part.unlink()
                if _is(ours, path):
                    return ours
                ours.close()

    def _download(self, file: BinaryIO, part: Path, path: Path, download: Download) -> None:
        try:
            size, fill = download()
            os.ftruncate(file.fileno(), 0)
            self._make_room(file, size)
            fill(file)
            file.flush()
            os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            file.close()
            raise

    def _make_room(self, file: BinaryIO, size: int) -> None:
        """Remove copies until a file fits within the bound, and give it its size."""
        with _open(self.folder / _LOCK, os.O_CREAT) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            copies = self._copies()
            taken = sum(held for *_, held in copies)
            bound = self._bound(taken)
            if size > bound:
                raise UsageError(
                    f"a file of {size} bytes does not fit into {self.folder}, which may hold "
                    f"{bound} bytes. Set KDCACHE_DISK_BYTES to several times as much, or name a "
                    f"larger disk with KDCACHE_DISK."
                )
            for _, path, held in sorted(copies):
                if taken + size <= bound:
                    break
                if _discard(path):
                    taken -= held
            os.ftruncate(file.fileno(), size)

    def _bound(self, taken: int) -> int:
        if self.limit is not None:
            return self.limit
        place = self.folder
        while not place.exists():
            place = place.parent
        return min(_MOST, (shutil.disk_usage(place).free + taken) // 2)

    def _copies(self) -> list[tuple[int, Path, int]]:
        """Time of the last use (0: left by a killed download), path and bytes of each file."""
        copies = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    stat = entry.stat()
                    if entry.name != _LOCK and entry.is_file():
                        used = (
                            0
                            if entry.name.endswith(_PART)
                            else max(stat.st_atime_ns, stat.st_mtime_ns)
                        )
                        copies.append((used, Path(entry.path), stat.st_size))
        return copies

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if no_space(error):
                raise IncompleteError(
                    f"no space left for {self.folder}, where files of object stores are kept. "
                    "Free some space, lower KDCACHE_DISK_BYTES or name another disk with "
                    "KDCACHE_DISK, "
                    "and run the same command again."
                ) from error
            if isinstance(error, PermissionError) or error.errno == errno.ELOOP:
                raise UsageError(
                    f"cannot write to {self.folder} ({error.strerror}). Name a folder for copies "
                    "of remote files with KDCACHE_DISK."
                ) from error
            raise


def _locked(
    path: Path, lock: int, *, create: bool = False, named: Path | None = None
) -> BinaryIO | None:
    """The file of a path, open and locked.

    Args:
        create: make an empty file where there is none.
        named: the path that must name it once it is locked. Default: the same one.

    Returns:
        None if it is missing, named otherwise by now, or locked by others and `lock` does not wait.
    """
    flags = os.O_CREAT if create else 0
    while True:
        with contextlib.ExitStack() as opened:
            try:
                file = opened.enter_context(_open(path, flags))
                fcntl.flock(file, lock)
            except (FileNotFoundError, BlockingIOError):
                return None
            if _is(file, named or path):
                opened.pop_all()
                return file
        if not create:
            return None


def _open(path: Path, flags: int) -> BinaryIO:
    """A file of the folder, open for reading and writing; never what a link points to."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW | flags, 0o600), "r+b")


def _is(file: BinaryIO, path: Path) -> bool:
    """Whether an open file still is the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _discard(path: Path) -> bool:
    """Remove a file unless it is in use; returns whether it did."""
    file = _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if file is None:
        return False
    with file:
        path.unlink()
    return True


_NOTE = 32
_MOST_NOTES = 64 << 20  # bytes of notes: two million files
_LOCKS = 64
_SETTLED_SECONDS = 3.0


_thread = threading.local()


class Verified:
    """The notes of one folder, read as they grow."""

    def __init__(self, folder: Path) -> None:
        """Name the folder; it is made when the first note is written."""
        self._folder, self._read = folder, 0
        self._known: set[bytes] = set()

    @classmethod
    @functools.cache
    def in_folder(cls, folder: Path) -> Verified:
        """The notes of this process that are kept there."""
        return cls(folder)

    def once(self, path: Path, sha256: str, check: Callable[[], None], *, ours: bool) -> None:
        """Call `check` unless the file passed it before, in this process or another.

        Args:
            check: hashes it; raises what it finds wrong.
            ours: whether nobody writes to the file in place, so that its note need not wait.
        """
        try:
            note, changed = _note_of(path, sha256)
            found = self._has(note)
        except OSError:
            check()
            return
        if found:
            return
        if not ours and time.time() - changed < _SETTLED_SECONDS:
            check()
            return
        with self._alone(note) as locked:
            if locked and self._has(note):  # another process hashed it meanwhile
                return
            check()
            with contextlib.suppress(OSError):
                if locked and _note_of(path, sha256)[0] == note:
                    self._write(note)

    def _has(self, note: bytes) -> bool:
        if note in self._known:
            return True
        path = self._folder / "notes"
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            facts = os.fstat(file.fileno())
            if facts.st_uid != os.getuid():
                return False
            if facts.st_size < self._read:  # it was begun anew
                self._read = 0
            file.seek(self._read)
            data = file.read(facts.st_size - self._read)
            whole = len(data) // _NOTE * _NOTE
            self._known.update(data[at : at + _NOTE] for at in range(0, whole, _NOTE))
            self._read += whole
        return note in self._known

    def _write(self, note: bytes) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        handle = os.open(self._folder / "notes", flags, 0o600)
        try:
            if os.fstat(handle).st_size >= _MOST_NOTES:
                os.ftruncate(handle, 0)
            os.write(handle, note)
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def _alone(self, note: bytes) -> Iterator[bool]:
        """Let one process at a time hash a file; yields whether that was possible. A thread that
        hashes others for it holds no second lock, for which it might wait for ever."""
        if getattr(_thread, "holds", False):
            yield True
            return
        with contextlib.ExitStack() as held:
            _thread.holds = True
            held.callback(setattr, _thread, "holds", False)
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                path = self._folder / f"lock-{note[0] % _LOCKS}"
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
                held.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX)
                locked = self._folder.stat().st_uid == os.getuid()
            except OSError:
                locked = False
            yield locked


def verified_here() -> Verified | None:
    """The notes in this machine's folder of copies; None where the environment names none."""
    try:
        return Verified.in_folder(DiskCache.of_environment().folder / ".verified")
    except (UsageError, RuntimeError):  # a wrong bound; no home folder
        return None


def once_here(path: Path, sha256: str, check: Callable[[], None]) -> None:
    """`Verified.once` with the notes of this machine; without these `check` is called each time."""
    notes = verified_here()
    if notes is None:
        check()
    else:
        notes.once(path, sha256, check, ours=False)


def sha256_here(path: Path) -> str:
    """A file's SHA-256. Whether it is the name of the file, as in the hub's cache, is read once by
    all processes of this machine."""
    name = path.resolve().name
    if not re.fullmatch("[0-9a-f]{64}", name):
        return sha256_file(path)
    found = [name]

    def check() -> None:
        found[0] = sha256_file(path)
        if found[0] != name:
            raise ValueError

    with contextlib.suppress(ValueError):
        once_here(path, name, check)
    return found[0]


def _note_of(path: Path, sha256: str) -> tuple[bytes, float]:
    """The note of a file as it is, and when it was last written to."""
    facts = path.stat()
    was = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, sha256)
    return hashlib.sha256(repr(was).encode()).digest(), facts.st_mtime
