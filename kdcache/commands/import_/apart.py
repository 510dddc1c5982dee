"""Targets that another program keeps in files apart from their rows.

| layout | files | of a position | a row finds its own by |
|---|---|---|---|
| `megatron` | `cpC_dpD__I.tar` of `ITERATION.pt.zst` | K log-probabilities at T = 1 | `index` |
| `se-kd3x` | `manifest.json`, `shard_N.pt` | N draws at the signature's T | SHA-1 of its ids |

`index` is the number of a row in the order of training; ids are hashed as int64.

Megatron's saver runs over micro-batches: of iteration i each data-parallel rank d has M tensors
[S, B, K], so that row `index` is b of micro-batch m there:

    index = ((i M + m) D + d) B + b

With a nucleus (`p`) a position has fewer than K ids: what fills it up has -1000 for a logarithm.

SE-KD3x draws N ids with replacement, keeps the U that were drawn most, and stores counts in steps
of 1/127. They are unbiased, up to that rounding, where no id had to be left out: then the steps sum
to 127. A batch of several rows in memory has one key for all, under which only the first was kept.

Both give an id 17 bits, so of a larger vocabulary its ids from 131,072 on stand there as others.

Files are PyTorch's, read by its loader of tensors (`weights_only`), which builds nothing else.

Cost: an iteration, or a shard, in memory for each of the last few that were asked for.

Source: Megatron-LM, `megatron/training/distillation`, 2026; SE-KD3x (arXiv 2602.01395),
`sekd/training/offline_cache.py`, 2026.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from kdcache.commands.import_.layouts import Entries
from kdcache.corpus import Record, RecordError
from kdcache.corpus.files import open_bytes
from kdcache.errors import UsageError
from kdcache.storage import open_storage, redact

ID_BITS = 17
_SHARE_BITS = 7
SHARES = (1 << _SHARE_BITS) - 1
_NOTHING = -1000.0  # Megatron's logarithm of what fills a position up, exact in 16 bits
_TAR = re.compile(r"cp(\d+)_dp(\d+)__(\d+)\.tar")
_MEMBER = re.compile(r"(\d+)\.pt\.zst")
_PART = re.compile(r"(shard|item)_\d+\.pt")
_MOST = 1 << 32  # bytes of a member, unpacked
_META = "_meta.json"


class Apart(ABC):
    """Targets of rows that are elsewhere.

    Attributes:
        temperature: T of the targets.
        width: ids of a position, at most.
        about: what the files say of themselves, for the notes.
    """

    temperature: float = 1.0
    width: int
    about: dict[str, Any]

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    @abstractmethod
    def entries(self, record: Record) -> Entries:
        """The targets of a row.

        Raises:
            RecordError: there are none, or they are not those of its ids.
            UsageError: a file is not what it should be.
        """

    def open(self, name: str) -> BinaryIO:
        """A file of the folder."""
        return open_bytes(f"{self.url}/{name}")

    def wrong(self, name: str, what: str) -> UsageError:
        """What is wrong with a file of the folder."""
        return UsageError(
            f"{redact(f'{self.url}/{name}')} {what}. Name the folder as its program wrote it with "
            "--logits, and the --layout of that program."
        )

    def tensors(self, name: str, data: bytes) -> Any:
        """What is in a file of PyTorch's: tensors, in lists and mappings, or it is refused."""
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # the loader's own are of many kinds
            raise self.wrong(name, "is not a file of this layout") from error

    @contextmanager
    def layout(self, name: str) -> Iterator[None]:
        """Refuse a file whose content the block cannot read."""
        try:
            yield
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise self.wrong(name, "is not a file of this layout") from error


@dataclass(frozen=True)
class _Member:
    """Where the iteration of a rank is in its archive."""

    file: str
    offset: int
    size: int


class MegatronLogits(Apart):
    """See the module."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._members: dict[tuple[int, int], _Member] = {}
        metas: dict[str, Any] = {}
        for name in sorted(open_storage(self.url).entries()):
            if found := _TAR.fullmatch(name):
                if int(found[1]):
                    raise self.wrong(name, "is of rows cut over context-parallel ranks: not read")
                metas[name] = self._index(name, int(found[2]))
        if not self._members:
            raise self.wrong("", "has no cpC_dpD__I.tar with iterations")
        self.about = next(iter(metas.values()))
        if len({json.dumps(meta.get("hash")) for meta in metas.values()}) > 1:
            raise self.wrong("", "has the files of several runs (other hashes): a folder each")
        self._ranks = 1 + max(rank for _, rank in self._members)
        self._decoded = functools.lru_cache(max(4, self._ranks))(self._decode)
        values, _ = self._decoded(*min(self._members))
        self._batch = (len(values), values[0].shape[1])
        saver = self.about.get("saver")
        kept = saver.get("k") if isinstance(saver, dict) else None
        self.width = kept if isinstance(kept, int) and kept > 0 else values[0].shape[2]

    def entries(self, record: Record) -> Entries:
        """See `Apart.entries`."""
        index = record.values.get("index")
        if not isinstance(index, (int, np.integer)) or index < 0:
            raise RecordError("index is not the number of a row in the order of training")
        micro, size = self._batch
        step, place = divmod(int(index), self._ranks * size)
        rank, column = divmod(place, size)
        iteration, number = divmod(step, micro)
        if (iteration, rank) not in self._members:
            raise RecordError(f"row {index} is of iteration {iteration}, which no file holds")
        values, ids = self._decoded(iteration, rank)
        if (len(values), values[number].shape[1]) != self._batch:
            raise RecordError(f"iteration {iteration} has another batch size than the first one")
        logprobs = values[number][:, column].double().numpy()
        logprobs = np.where(logprobs <= _NOTHING, -np.inf, logprobs)
        return filled(ids[number][:, column].numpy(), logprobs, self.width)

    def _index(self, name: str, rank: int) -> dict[str, Any]:
        meta: Any = {}
        try:
            with self.open(name) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
                for member in archive:
                    if member.name == _META:
                        text = archive.extractfile(member)
                        meta = json.loads(text.read(1 << 20)) if text is not None else {}
                    if not (found := _MEMBER.fullmatch(member.name)):
                        continue
                    key = (int(found[1]), rank)
                    if key in self._members:
                        raise self.wrong(name, f"has iteration {key[0]} once more")
                    self._members[key] = _Member(name, member.offset_data, member.size)
        except (tarfile.TarError, ValueError, OSError) as error:
            raise self.wrong(name, f"is not a whole tar archive ({error})") from error
        return meta if isinstance(meta, dict) else {}

    def _decode(self, iteration: int, rank: int) -> tuple[list[Tensor], list[Tensor]]:
        member = self._members[iteration, rank]
        where = f"{member.file}/{iteration}.pt.zst"
        with self.open(member.file) as stream:
            stream.seek(member.offset)
            data = stream.read(member.size)
        try:
            text = pa.CompressedInputStream(pa.BufferReader(data), "zstd").read(_MOST)
        except OSError as error:
            raise self.wrong(where, "is not whole zstd data") from error
        found = self.tensors(where, text)
        with self.layout(where):
            values = list(found["values"])
            parts = zip(found["indices_low"], found["bit_17"], strict=True)
            ids = [low.long() | (high.long() << 16) for low, high in parts]
            shapes = {value.shape[1:2] for value in values}
            if len(shapes) != 1 or [v.shape for v in values] != [i.shape for i in ids]:
                raise ValueError("tensors of different shapes")
        return values, ids


class SampledCache(Apart):
    """See the module."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._loaded = functools.lru_cache(2)(self._load)
        try:
            with self.open("manifest.json") as stream:
                manifest = json.loads(stream.read(_MOST))
            self.about = dict(manifest["signature"])
            self._items = dict(manifest["items"])
            self._shards = [str(one["path"]) for one in manifest.get("shards", ())]
            self.temperature = float(self.about["kd_temperature"])
            self.width = int(self.about["rs_vocab_samples"])
            bits = (int(self.about["id_bits"]), int(self.about["prob_bits"]))
        except (ValueError, LookupError, TypeError) as error:
            raise self.wrong("manifest.json", "is not that of a cache of SE-KD3x") from error
        if bits != (ID_BITS, _SHARE_BITS) or self.width < 1 or not self.temperature > 0:
            raise self.wrong(
                "manifest.json", f"has ids and shares of {bits} bits, expected (17, 7)"
            )

    def entries(self, record: Record) -> Entries:
        """See `Apart.entries`."""
        try:
            ids = np.ascontiguousarray(record.values["input_ids"], "<i8")
        except (LookupError, TypeError, ValueError):
            raise record.missing(("input_ids",), "--columns input_ids=NAME") from None
        key = hashlib.sha1(ids.tobytes(), usedforsecurity=False).hexdigest()
        if key not in self._items:
            raise RecordError(
                "no targets have the hash of its ids. Of each batch of several rows SE-KD3x kept "
                "the first one alone, under the hash of all"
            )
        packed, counted = self._item(self._items[key])
        if len(counted) != len(ids) - 1:
            raise RecordError(f"its targets have {len(counted)} items for {len(ids)} input_ids")
        triples = packed.reshape(len(counted), -1, 3).astype(np.int64) << np.array([0, 8, 16])
        words = triples.sum(-1)
        shares = words >> ID_BITS
        with np.errstate(divide="ignore"):
            logprobs = np.log(shares / SHARES)
        entries = filled(words & ((1 << ID_BITS) - 1), logprobs, self.width)
        return Entries(entries.counts, entries.ids, entries.logprobs, counted)

    def _item(self, at: Any) -> tuple[np.ndarray, np.ndarray]:
        try:
            name = at if isinstance(at, str) else self._shards[at["shard"]]
            place = None if isinstance(at, str) else int(at["index"])
        except (LookupError, TypeError, ValueError) as error:
            raise self.wrong("manifest.json", f"has no file for {at}") from error
        if not _PART.fullmatch(name):
            raise self.wrong("manifest.json", f"names {name!r}, expected shard_N.pt or item_N.pt")

        items = self._loaded(name)
        with self.layout(name):
            item = items if place is None else items[place]
            packed, mask = item["rs"]["packed"].numpy(), item["valid_mask"].bool().numpy()
            if packed.dtype != np.uint8 or len(packed) != len(mask) * int(item["rs"]["U"]) * 3:
                raise ValueError("not three bytes an entry")
        return packed, mask

    def _load(self, name: str) -> Any:
        with self.open(name) as stream:
            return self.tensors(name, stream.read())


def filled(ids: np.ndarray, logprobs: np.ndarray, width: int) -> Entries:
    """Entries of the same number of ids at each position; unused ones have no probability."""
    ids, logprobs = ids[:, :width], logprobs[:, :width]
    missing = ((0, 0), (0, width - ids.shape[1]))
    logprobs = np.pad(logprobs, missing, constant_values=-np.inf)
    ids = np.where(logprobs > -np.inf, np.pad(ids, missing), 0)
    counts = np.full(len(ids), width, np.int64)
    return Entries(counts, ids.reshape(-1), logprobs.reshape(-1), np.ones(len(ids), np.bool_))


APART: dict[str, type[Apart]] = {"megatron": MegatronLogits, "se-kd3x": SampledCache}


@functools.lru_cache(4)
def open_apart(layout: str, url: str) -> Apart:
    """The targets of a folder, opened once a process."""
    return APART[layout](url)


def steps_of(weights: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in the proportions of some weights, int64 [n, k], of this sum in each row:
    those that lost most by rounding down have one more.
    """
    exact = weights / weights.sum(1, keepdims=True) * total
    whole: np.ndarray = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(-(exact - whole), axis=1, kind="stable")
    more = np.arange(weights.shape[1]) < (total - whole.sum(1))[:, None]
    np.put_along_axis(whole, order, np.take_along_axis(whole, order, 1) + more, 1)
    return whole
