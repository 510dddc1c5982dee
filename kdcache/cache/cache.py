"""A cache: shards of rows and their soft targets.

Next to them is the teacher's output layer, where targets are hidden states, in a file
`output_layer-<16 hex digits of its SHA-256>.safetensors`: tensors `weight` [V, D] and, where there
are any, `bias` [V], `scale` [1], `cap` [1], `mean` [D] and `unit` [D]; see `OutputLayer`.

Cost: opening reads two JSON files and no shard. An output layer is hashed and its numbers are read
once a process; they stay in the file's own pages, which processes of a machine share.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from kdcache.cache.manifest import ShardEntry
from kdcache.cache.shard import (
    ShardCounts,
    ShardData,
    check_ids,
    read_counts,
    read_shard,
    shard_bytes,
)
from kdcache.cache.spec import CacheSpec, is_generated
from kdcache.cache.store import ShardStore
from kdcache.errors import CorruptCacheError, UsageError, doing
from kdcache.storage import open_storage, redact, sha256_file
from kdcache.targets import Codec, Hidden, OutputLayer
from kdcache.targets.label_logprob import sum_logprobs
from kdcache.targets.soft import read_ranks
from kdcache.tasks import TASKS


@dataclass
class Cache(ShardStore[CacheSpec]):
    """A cache being built (`create_or_resume`) or read (`open`)."""

    kind = "cache"
    command = "build"
    suffix = "h5"

    @classmethod
    def parse_spec(cls, values: Any, url: str) -> CacheSpec:
        """See `ShardStore.parse_spec`."""
        if is_generated(values):
            raise UsageError(
                f"{url} is a corpus that kdcache generate wrote, not a cache. Make one of it: "
                f"kdcache build --corpus {url}."
            )
        return CacheSpec.from_dict(values)

    def read_facts(self, path: Path) -> tuple[ShardCounts, dict[str, Any]]:
        """See `ShardStore.read_facts`."""
        return read_counts(path)

    def hash_of(self, name: str) -> str | None:
        """See `ShardStore.hash_of`."""
        return self.spec.ranks if name == "ranks.u32" else super().hash_of(name)

    def check_beside(self, name: str) -> None:
        """See `ShardStore.check_beside`."""
        if name.startswith("output_layer-"):
            read_layer(*self._layer())
        else:
            super().check_beside(name)

    def commit(
        self,
        span: int,
        data: ShardData,
        *,
        skipped: int = 0,
        filtered: int | None = None,
        clipped_mass: float = 0.0,
    ) -> ShardEntry:
        """Write a span's shard and make it appear; safe to call again for the same span.

        Args:
            skipped: records that were left out, empty or broken.
            filtered: records that filters left out; None where there are no filters.
            clipped_mass: probability that fell on ids outside the vocabulary, summed.

        Raises:
            IncompleteError: no space left.
        """
        facts: dict[str, Any] = {"skipped": skipped, "clipped_mass": clipped_mass}
        if filtered is not None:
            facts["filtered"] = filtered
        if (domain := self.spec.domain_of(span)) is not None:
            facts["domain"] = domain
        if (codes := data.every_logprob) is not None:
            nats, impossible = sum_logprobs(codes)
            facts |= {"label_nats": nats, "impossible_labels": impossible}
        if data.hard_labels is not None:
            facts["hard_labels"] = int(data.ends("hard")[-1])
        said = self.manifest.shards[span].sha256 if self.sealed else None
        content = shard_bytes(data, attributes=self.stated(span, facts), sha256=said)
        return self.put(span, content, (len(data), len(data.input_ids), len(data.targets)), facts)

    def codec(self) -> Codec:
        """The codec that reads this cache's targets.

        Raises:
            CorruptCacheError: targets are hidden states, and the output layer is not theirs.
        """
        codec = self.spec.make_codec()
        try:
            return codec.with_layer(self.output_layer) if isinstance(codec, Hidden) else codec
        except ValueError as error:
            raise CorruptCacheError(f"{self.url}: the output layer: {error}.") from error

    @cached_property
    def output_layer(self) -> OutputLayer:
        """The teacher's output layer, of a cache whose targets are hidden states.

        Raises:
            CorruptCacheError: its file is missing, or not the one of the spec.
        """
        return open_layer(*self._layer())

    def _layer(self) -> tuple[str, str, str]:
        sha256 = self.spec.output_layer
        if sha256 is None:
            raise CorruptCacheError(f"{self.url}: spec.json names no output layer.")
        return self.storage.url, f"output_layer-{sha256[:16]}.safetensors", sha256

    def read(self, span: int, *, targets: bool = True) -> ShardData:
        """One shard in memory.

        Args:
            targets: False leaves the soft targets on disk, for training on hard labels alone.

        Raises:
            CorruptCacheError: the file is missing, damaged, or not the one of the manifest.
        """
        entry = self.manifest.shards[span]
        try:
            return self._read_shard(entry, targets)
        except CorruptCacheError:
            if not self.storage.remote:
                raise
            # The copy on this machine may be what is damaged, and not the cache.
            return self._read_shard(entry, targets, fresh=True)

    def _read_shard(self, entry: ShardEntry, targets: bool, *, fresh: bool = False) -> ShardData:
        with (
            doing(f"reading {entry.name} of {self.url}"),
            self.hold(entry, fresh=fresh, noted=not fresh) as path,
        ):
            return self.parse(path, entry, targets=targets)

    def parse(self, path: Path, entry: ShardEntry, *, targets: bool = True) -> ShardData:
        """A shard's file, with the columns that the spec names.

        Args:
            targets: False leaves the soft targets on disk.

        Raises:
            CorruptCacheError: it is not such a shard, or a checksum fails.
        """
        data = read_shard(
            path,
            self.codec(),
            counts=entry.counts,
            ranks=self.rank_to_id if targets else None,
            kept=self.spec.kept,
            with_targets=targets,
        )
        over_ids = TASKS[self.spec.task].over_ids  # others are read by their texts, too
        try:
            check_ids(data, self.spec, lambda: self.known_ids if over_ids else None)
        except CorruptCacheError as error:
            raise CorruptCacheError(f"shard {entry.span}: {entry.name}: {error}") from error
        return data

    @cached_property
    def known_ids(self) -> int | None:
        """How many ids the tokenizer has, or its language model can predict; None: not known."""
        with contextlib.suppress(CorruptCacheError, UsageError):
            tokenizer = self.tokenizer()
            largest = max(tokenizer.get_vocab().values(), default=-1)  # ids may have gaps
            predicted = self.spec.vocab_size if TASKS[self.spec.task].over_ids else 0
            return max(largest + 1, len(tokenizer), predicted)
        return None

    @cached_property
    def rank_to_id(self) -> np.ndarray | None:
        """Id of each frequency rank, int64 [V]; None where ids are stored as they are.

        Raises:
            CorruptCacheError: the table is missing or not the one of the spec.
        """
        if self.spec.ranks is None:
            return None
        return read_ranks(self.read_beside("ranks.u32"), self.spec.vocab_size)


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
