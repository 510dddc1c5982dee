"""Optional packages: what the program can do only where they are installed."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

from kdcache.errors import UsageError


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
