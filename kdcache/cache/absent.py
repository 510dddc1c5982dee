"""What is at a place that was expected to be a cache and is none."""

from __future__ import annotations

from kdcache.errors import UsageError
from kdcache.storage import LocalStorage, Storage, redact

# Files by which the other folders that kdcache makes are known, the surest first.
_KNOWN = {
    "sweep.json": "sweep",
    "train.json": "run",
    "finetune.json": "model",
    "_kdcache.json": "export",
    "config.json": "model",
    "adapter_config.json": "model",
    "metrics.jsonl": "run",
}
_CURE = {"sweep": " `kdcache report` shows it.", "run": " `kdcache report` shows it."}


def is_missing(storage: Storage) -> bool:
    """Whether there is not even a folder; object stores have no empty ones."""
    if isinstance(storage, LocalStorage):
        return not storage.root.is_dir()
    return storage.empty()


def no_cache(storage: Storage) -> UsageError:
    """The error of a place without a `spec.json`: says what is there instead."""
    url = redact(storage.url)
    if is_missing(storage):
        return UsageError(f"there is no folder {url}: expected a cache. Check the path.")
    entries = storage.entries()
    kind = next((kind for name, kind in _KNOWN.items() if name in entries), None)
    if kind is None and any(name.startswith("checkpoint-") for name in entries):
        kind = "run"
    if kind is not None:
        article = "an" if kind == "export" else "a"
        return UsageError(
            f"{url} is the folder of {article} {kind}, not of a cache.{_CURE.get(kind, '')}"
        )
    lacks = "it has no spec.json" if entries else "it is empty"
    return UsageError(f"{url} is not a kdcache cache: {lacks}.")
