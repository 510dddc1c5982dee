"""The file of a teacher's output layer: `output_layer-<16 hex digits of its SHA-256>.safetensors`.

Tensors `weight` [V, D] and, where there are any, `bias` [V], `scale` [1], `cap` [1], `mean` [D] and
`unit` [D]; see `OutputLayer`. Cost: a file is hashed and its numbers are read once a process;
they stay in the file's own pages, which processes of a machine share.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections import deque
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from kdcache.errors import CorruptCacheError
from kdcache.storage import open_storage, redact, sha256_file
from kdcache.targets import OutputLayer

_NUMBERS = ("scale", "cap")
_TENSORS = ("weight", "bias", "mean", "unit")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def layer_bytes(layer: OutputLayer) -> bytes:
    """The content of the file; the same layer gives the same bytes."""
    tensors = {name: getattr(layer, name) for name in _TENSORS}
    for name in _NUMBERS:
        value = getattr(layer, name)
        tensors[name] = None if value is None else torch.tensor([value], dtype=torch.float64)
    return save({k: v.contiguous() for k, v in sorted(tensors.items()) if v is not None})


def layer_name(data: bytes) -> str:
    """The name of the file of this content."""
    return f"output_layer-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"


_known: WeakValueDictionary[str, OutputLayer] = WeakValueDictionary()
_recent: deque[OutputLayer] = deque(maxlen=2)
"""Kept alive: batches of a loader's worker processes may be the only ones that hold a layer."""
_lock = threading.Lock()


def open_layer(url: str, name: str, sha256: str) -> OutputLayer:
    """The output layer of a cache, as `read_layer` gives it; the same object in a whole process.

    Also for several caches of one teacher: only so can their targets be joined.
    """
    with _lock:
        layer = _known.get(sha256)
        if layer is None:
            layer = _known[sha256] = read_layer(url, name, sha256)
            _recent.append(layer)
        return layer


def read_layer(url: str, name: str, sha256: str) -> OutputLayer:
    """The output layer of a cache, hashed and checked now.

    Args:
        url: of the cache.
        name: of the file in it.
        sha256: that its bytes must have.

    Raises:
        CorruptCacheError: it is missing, changed, or not an output layer.
    """
    where = f"{redact(url)}/{name}"
    cure = "Restore it from a copy, or run the same build again."
    try:
        with open_storage(url).hold(name) as path:
            found = sha256_file(path)
            if found != sha256:
                raise CorruptCacheError(
                    f"{where}: sha256 is {found[:16]}…, the spec says {sha256[:16]}…. {cure}"
                )
            return _read(path, functools.partial(open_layer, url, name, sha256))
    except FileNotFoundError as error:
        raise CorruptCacheError(f"{where} is missing. {cure}") from error
    except (SafetensorError, ValueError, KeyError, RuntimeError, OSError) as error:
        raise CorruptCacheError(f"{where} is not an output layer: {error}. {cure}") from error


def _read(path: Path, origin: functools.partial[OutputLayer]) -> OutputLayer:
    tensors = load_file(path)
    odd = sorted(tensors.keys() - {*_TENSORS, *_NUMBERS})
    if odd or "weight" not in tensors:
        raise ValueError(f"its tensors are {sorted(tensors)}")
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES or not tensor.isfinite().all():
            raise ValueError(f"its {name} is not finite, or not of floats")
        if name in _NUMBERS and tensor.shape != (1,):
            raise ValueError(f"its {name} is not one number")
    parts: dict[str, Any] = {name: tensors[name] for name in _TENSORS if name in tensors}
    parts |= {name: float(tensors[name]) for name in _NUMBERS if name in tensors}
    return OutputLayer(**parts, origin=origin)
