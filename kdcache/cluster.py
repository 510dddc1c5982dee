"""Ray: which cluster is meant, and joining or starting it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import Any

from kdcache.errors import UsageError


def cluster_address(address: str | None) -> str | None:
    """The cluster that is meant: the one named, else RAY_ADDRESS (`ray job submit` sets it), or
    None for a Ray of this process."""
    address = address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address


def connect(address: str | None) -> bool:
    """Join or start a Ray; whether this call started it, so that `stop` ends it."""
    # What a cluster reports of dead workers Ray prints on standard output, where a command's
    # outcome belongs; our own log says it too.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    import ray

    if ray.is_initialized():
        return False
    # Without an address Ray would join any cluster it finds running on this machine.
    address = cluster_address(address) or "local"
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        quiet["include_dashboard"] = False
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, **quiet)
    except ConnectionError as error:
        raise UsageError(f"no Ray cluster answers at {address}: {error}") from error
    finally:
        if main:  # Ray's own handler ends the process on the spot
            signal.signal(signal.SIGTERM, handler)
    return True
