"""Notes of which files on this machine have been hashed and found right, for all its processes.

The ranks of a node read the same files, and again each epoch. The first that needs a file hashes it
while the others wait; then a note tells all. A note is 32 bytes: the hash of what the file was
(device, inode, size, time of its last change, and the SHA-256 that it had), appended in one write.

Guarantee: a file that was written to since has another time, so its note is not found, and a file
changed within the last seconds gets none, since clocks of file systems are coarse. What a disk
loses without a write, the checksums inside a shard find when it is read. Where the folder cannot be
used, or is another user's, every read hashes.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kdcache.errors import UsageError
from kdcache.storage.disk import DiskCache

_NOTE = 32
_MOST = 64 << 20  # bytes of notes: two million files
_LOCKS = 64
_SETTLED_SECONDS = 3.0


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
            path: of the file.
            sha256: that it must have.
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
            if os.fstat(handle).st_size >= _MOST:
                os.ftruncate(handle, 0)
            os.write(handle, note)
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def _alone(self, note: bytes) -> Iterator[bool]:
        """Let one process at a time hash a file; yields whether that was possible."""
        with contextlib.ExitStack() as held:
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


def _note_of(path: Path, sha256: str) -> tuple[bytes, float]:
    """The note of a file as it is, and when it was last written to."""
    facts = path.stat()
    was = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, sha256)
    return hashlib.sha256(repr(was).encode()).digest(), facts.st_mtime
