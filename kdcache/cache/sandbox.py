"""Opens untrusted HDF5 files in a sandboxed subprocess and reports how it ended.

HDF5 is a large C library: a malicious file may crash the process that opens it. The hashes of a
cache from elsewhere came with it and prove nothing. So a subprocess opens and reads the whole of
each shard before this process does.

Cost: the subprocess starts in a third of a second and lives as long as its `Sandbox`; each file is
decoded once more. Guarantee: `Sandbox.open` returns or raises, whatever the file does to its
reader: the subprocess has bounded memory and a deadline.
"""

from __future__ import annotations

import contextlib
import json
import resource
import select
import signal
import subprocess
import sys
from pathlib import Path

from kdcache.cache.hdf5 import read_all
from kdcache.cluster import python
from kdcache.errors import CorruptCacheError

_START = "from kdcache.cache.sandbox import serve; serve()"
_MEMORY = 1 << 30  # above what the process has when it starts: a chunk at a time is read
_PATIENCE = 60.0  # seconds, and one more for each of these bytes
_SLOWEST = 1 << 20


class Sandbox:
    """Opens files in a subprocess; use as a context manager, from one thread at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._end(self._process)

    def open(self, path: Path) -> None:
        """Open a file there, and read all of it.

        Raises:
            CorruptCacheError: HDF5 cannot read it, or its reader does not survive it.
        """
        process = self._process or self._start()
        patience = _PATIENCE
        with contextlib.suppress(FileNotFoundError):  # a repair removed it: the reader reports it
            patience += path.stat().st_size / _SLOWEST
        with contextlib.suppress(BrokenPipeError):  # a missing answer means the same
            assert process.stdin is not None, "it was started with a pipe"
            process.stdin.write(json.dumps(str(path)).encode() + b"\n")
            process.stdin.flush()
        answer = _answer(process, patience)
        if not answer.endswith(b"\n"):
            died = self._end(process)
            how = f"ended with {died}" if died else f"did not answer within {patience:.0f} s"
            raise CorruptCacheError(
                f"{path} cannot be read: the sandboxed process that opened it {how}."
            )
        found = json.loads(answer)
        if found is not None:
            raise CorruptCacheError(str(found))

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = process = python(_START, stderr=subprocess.DEVNULL)
        if not _answer(process, _PATIENCE):
            raise RuntimeError(
                f"the sandboxed process did not start: {self._end(process) or 'no answer'}"
            )
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> str:
        """End the subprocess; returns how it had died, if it had."""
        self._process = None
        code = process.poll()
        process.kill()
        process.communicate()
        if code is None:
            return ""
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _answer(process: subprocess.Popen[bytes], patience: float) -> bytes:
    """A line of the subprocess; empty if it died, or wrote none in so many seconds."""
    assert process.stdout is not None, "it was started with a pipe"
    waiting = select.poll()
    waiting.register(process.stdout, select.POLLIN)
    if not waiting.poll(1000 * patience):
        return b""
    line = process.stdout.readline()
    if not line:  # the end of its output comes a moment before its own
        process.wait(_PATIENCE)
    return line


def serve() -> None:
    """The subprocess: reads a path as a JSON line, answers with its problem as one."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MEMORY, most))
    _tell("ready")
    for line in sys.stdin.buffer:
        try:
            read_all(Path(json.loads(line)))
        except CorruptCacheError as error:
            _tell(str(error))
        except MemoryError:
            _tell("It needs more memory than a shard may use.")
        else:
            _tell(None)


def _tell(found: str | None) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
