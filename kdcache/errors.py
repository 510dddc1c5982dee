"""The errors a user can cause or must act on. The command line maps each class to one exit code.

Any other exception is a fault of kdcache and keeps its traceback.

Optional packages: what the program can do only where they are installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

_SHOWN = 300


def reason_of(error: BaseException) -> str:
    """What an error of a library says, in one line of bounded length and without a full stop."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said[:_SHOWN].rstrip(".: ")


class KdcacheError(Exception):
    """Base of all errors for the user: what is wrong, what was expected, what to do.

    Attributes:
        reported: another process of the same work prints it.
    """

    exit_code = 1
    reported = False


class UsageError(KdcacheError):
    """Wrong options or wrong input; nothing was written that a later run would trust."""

    exit_code = 2


class IncompleteError(KdcacheError):
    """Work is left, and the same command resumes where this one ended."""

    exit_code = 3


class CorruptCacheError(KdcacheError):
    """Bytes of a cache differ from its manifest or its own checksums."""

    exit_code = 1


def installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


@contextlib.contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Imports of optional packages go inside.

    Args:
        extra: the extra of this package that installs them.
        what: what the user asked for that needs them.

    Raises:
        UsageError: one is not installed; names the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{what} needs {error.name}, which is not installed. Install it with "
            f"pip install 'kdcache[{extra}]'."
        ) from error
