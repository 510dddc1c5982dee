"""The errors a user can cause or must act on. The command line maps each class to one exit code.

Any other exception was not planned, and has one answer (`UnexpectedError`): a line about what was
being done (`doing`) and the exception's message, its traceback as text, and the exit code for
whether the same command can continue. Workers make it of their exceptions, so that every process
can be sent it; the command line makes it of all others. An input that no user has needs no handler.

A feature that needs an optional package raises an error with the command that installs it.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

_SHOWN = 300
# Each extra of this package, and a module that is there where it is installed.
EXTRAS = {"axolotl": "axolotl", "cluster": "pandas", "gcs": "gcsfs",
          "llamafactory": "llamafactory", "lora": "peft",
          "plot": "matplotlib", "s3": "s3fs", "swift": "swift", "tensorboard": "tensorboard",
          "trl": "trl", "vllm": "vllm"}  # fmt: skip
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}
# torch and safetensors report a failed write as errors of their own.
_FULL_WORDS = re.compile(
    r"No space left on device|File too large|Disk quota exceeded|PytorchStreamWriter failed"
    r"|unexpected pos \d+ vs \d+|basic_ios::clear: iostream error"
)
# Disks, networks and machines that are short of something: another time there may be enough.
_PASSING = {
    *(errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EBUSY),
    *(errno.ENOLCK, errno.EPIPE, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETDOWN),
    *(errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED),
}
_PASSING_KINDS = (ConnectionError, TimeoutError, MemoryError)
_DEVICE_LOST = re.compile(r"AcceleratorError|OutOfMemoryError|CUDA error|NCCL error")


def reason_of(error: BaseException) -> str:
    """What an error of a library reports, in one line of bounded length and without a full stop."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said[:_SHOWN].rstrip(".: ")


class KdcacheError(Exception):
    """Base of all errors for the user: what is wrong, what was expected, what to do.

    Attributes:
        reported: another process of the same work prints it.
        trace: tracebacks of what was not planned, where that is the cause.
    """

    exit_code = 1
    reported = False
    trace = ""


class UsageError(KdcacheError):
    """Wrong options or wrong input; nothing was written that a later run would trust."""

    exit_code = 2


class IncompleteError(KdcacheError):
    """Work is left, and the same command resumes where this one ended."""

    exit_code = 3


class CorruptCacheError(KdcacheError):
    """Bytes of a cache differ from its manifest or its own checksums."""

    exit_code = 1


class UnexpectedError(KdcacheError):
    """An exception that nobody planned, as text.

    Attributes:
        line: what the exception reports, and what was being done.
    """

    def __init__(self, line: str, cure: str, trace: str, exit_code: int) -> None:
        """Take its parts; see `of`."""
        super().__init__(line, cure, trace, exit_code)
        self.line, self._cure, self.trace, self.exit_code = line, cure, trace, exit_code

    def __str__(self) -> str:
        return f"{self.line}. {self._cure}"

    @classmethod
    def of(cls, error: BaseException) -> UnexpectedError:
        """Describe an exception; one that was described before stays as it is."""
        if isinstance(error, cls):
            return error
        said = f"{type(error).__name__}: {reason_of(error)}"
        if isinstance(error, OSError) and error.filename:
            said = f"{error.filename}: {error.strerror}"
        if no_space(error):
            code, cure = 3, "Free some space and run the same command again."
        elif getattr(error, "errno", None) in _CLOSED:
            code, cure = 2, "Make it writable and run the same command again."
        elif passes(error):
            code, cure = 3, "Run the same command again."
        else:
            code, cure = 1, "This was not expected: the same command would end the same way."
        notes = [note for note in getattr(error, "__notes__", ()) if note.startswith("while ")]
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        return cls(" ".join([said, *notes]), cure, trace, code)


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Have exceptions of the block that nobody planned say what was being done.

    Args:
        what: "reading a file", with its name; or of a shard, a row, a step.
    """
    try:
        yield
    except KdcacheError:
        raise
    except Exception as error:
        vars(error).setdefault("__notes__", []).append(f"while {what}")
        raise


@contextlib.contextmanager
def as_worker() -> Iterator[None]:
    """Turn exceptions of the block that nobody planned into text: another process reads them."""
    try:
        yield
    except KdcacheError:
        raise
    except Exception as error:
        raise UnexpectedError.of(error) from error


def no_space(error: BaseException) -> bool:
    """Whether an error means a full disk or quota."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return bool(_FULL_WORDS.search(str(error)))


def passes(error: BaseException) -> bool:
    """Whether an exception, or what it came from, is of the machine: it may be over another time.

    Such are disks and networks that fail, too many open files, and a Ray that dies.
    """
    kind, cause = type(error), error.__cause__ or error.__context__
    return (
        getattr(error, "errno", None) in _PASSING
        or isinstance(error, _PASSING_KINDS)
        or kind.__module__.startswith("ray.")
        or bool(_DEVICE_LOST.search(f"{kind.__name__}: {error}"))
        or (cause is not None and passes(cause))
    )


def installed(extra: str) -> bool:
    """Whether what an extra of this package brings can be imported, without importing it."""
    return importlib.util.find_spec(EXTRAS[extra]) is not None


def install_command(*extras: str) -> str:
    """The command that adds extras to this Python.

    It asks for the extras of the checkout from which kdcache runs. A copy of kdcache asks for what
    they bring: where the copy came from may be gone, and need not be a package index.
    """
    checkout = Path(__file__).parent.parent
    if (checkout / "pyproject.toml").is_file():
        wanted = ["-e", f"{checkout}[{','.join(extras)}]"]
    else:
        needs = [re.split(" *; *extra == ", need) for need in metadata.requires("kdcache") or ()]
        wanted = [need[0] for need in needs if need[-1].strip("\"'") in extras]
    pip = [sys.executable, "-m", "pip", "install"]
    if not PathFinder.find_spec("pip"):  # as in the environments that uv makes
        pip = ["uv", "pip", "install", "--python", sys.executable]
    return shlex.join([*pip, *wanted])


def require(asked: Mapping[str, str]) -> None:
    """Refuse what needs extras that are not installed, each with what needs it.

    Raises:
        UsageError: states which are missing, and the command that installs them all.
    """
    if missing := [extra for extra in asked if not installed(extra)]:
        lines = [f"{asked[one]} needs the extra `{one}`, which is missing." for one in missing]
        raise UsageError("\n".join([*lines, f"Install it: {install_command(*missing)}"]))
