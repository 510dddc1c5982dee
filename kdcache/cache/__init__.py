"""The cache: a folder with `spec.json`, `shards/00042-<sha256[:16]>.h5`, `tokenizer/` and
`manifest.json`.

The spec states which bytes the cache should hold; its SHA-256 is the fingerprint. A span is done
when its shard is listed; resuming makes the missing ones. `manifest.json` is written last and seals
the cache: readers refuse a cache without it.

Guarantee: a sealed cache holds every span exactly once, with the counts and hashes of the manifest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.cache.cache import Cache
    from kdcache.cache.manifest import Manifest, ShardEntry
    from kdcache.cache.spec import CacheSpec

__all__ = ["Cache", "CacheSpec", "Manifest", "ShardEntry"]

_HOMES = {"Cache": "cache", "CacheSpec": "spec", "Manifest": "manifest", "ShardEntry": "manifest"}


# Loaded when asked for: the sandbox imports this package and must start without torch.
def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
