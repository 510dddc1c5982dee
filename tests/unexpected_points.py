"""An exception at a point of the package in Ray's workers: their `worker_process_setup_hook`."""

from __future__ import annotations

import os

from test_unexpected import raising


def install() -> None:
    """Put a KeyError into the point that KDCACHE_TEST_POINT names."""
    raising(os.environ["KDCACHE_TEST_POINT"], KeyError("injected"))
