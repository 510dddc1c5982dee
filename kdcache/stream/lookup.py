"""Targets by content: for rows that a trainer prepared and ordered by itself.

A row is found by its ids up to its last label, or up to any id after that where the cache learns
more of the row than the trainer does. A causal model's target depends on the ids before it alone,
so every target of a cached row whose ids are equal is right, wherever the row stands in a batch.
Caches of `--packing none` and `whole` are asked for rows, those of `--attend document` for
documents. Where `position_ids` do not rise by one another row or document begins.

Cost: a hash of each row's ids, a search in the index, and a copy of its targets
(measured in `benchmarks/RESULTS.md`). The first lookup indexes the cache; see
`kdcache.stream.content`.
Guarantee: ids and last label are compared in full with the cache's own, so no index, damaged or
forged, leads to another row's targets.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kdcache.cache import Cache
from kdcache.cache.shard import ShardData
from kdcache.corpus.records import shorten
from kdcache.errors import CorruptCacheError, KdcacheError, UsageError
from kdcache.stream.checks import check_caches, check_every_position, open_caches
from kdcache.stream.content import DecodedRows, RowIndex, hashed
from kdcache.stream.shard_rows import ShardRows, by_document
from kdcache.targets import SoftTargets
from kdcache.targets.decoded import Targets
from kdcache.tasks import CAUSAL_LM, IGNORE

logger = logging.getLogger(__name__)

_OPEN = 1024  # shards with rows that stay mapped
_SHOWN = 32  # ids of a missed row that a message decodes
_COMPARED = 4096  # cached rows that a missed row is compared with
_ALIKE = 12  # neighbouring ids that two rows must share to be of one text


@dataclass(frozen=True)
class Found:
    """What the caches have for a batch.

    Attributes:
        targets: of all positions of `labels`, in row-major order, on the device of the batch.
        labels: int64, in the shape of the batch: of each position the next id, aligned with the
            logits as `DistilledStudent` takes them; -100 elsewhere and at all of a missed row.
        hard: the same of rows that were missed; None where there are none.
        positions: how many labels both have.
        rows: how many rows and documents have them.
        missed: how many of these were missed.
    """

    targets: Targets
    labels: Tensor
    hard: Tensor | None
    positions: int
    rows: int
    missed: int

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Found:
        """Copy to a device."""
        return replace(
            self,
            targets=self.targets.to(device, non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            hard=None if self.hard is None else self.hard.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True)
class _Wanted:
    """A row or document of a batch.

    Attributes:
        at: where it begins in the flattened batch.
        ids: int32, its ids, at least up to the last label, which is one of them.
        labelled: int64, rising: which of its tokens have labels.
    """

    at: int
    ids: np.ndarray
    labelled: np.ndarray
    odd: int

    @property
    def least(self) -> int:
        """How many ids its key has, at least."""
        return int(self.labelled[-1]) + 2

    def longer(self) -> Iterator[bytes]:
        """Keys of the row with more of its ids."""
        known = hashed(self.ids[: self.least])
        for end in range(self.least, len(self.ids)):
            known.update(np.ascontiguousarray(self.ids[end : end + 1], "<i4").data)
            yield known.digest()


class TargetLookup:
    """Soft targets of the rows of a batch, found by their ids.

    Attributes:
        temperature: of the targets; may be set between batches.
        rows: rows and documents with labels that were asked for so far.
        missed: those of them that the caches do not have.
    """

    def __init__(
        self,
        caches: Cache | str | Sequence[Cache | str],
        *,
        temperature: float = 1.0,
        labels: Literal["token", "next"] = "token",
        on_miss: Literal["error", "hard"] = "error",
    ) -> None:
        """Open the caches; nothing else is read before the first lookup.

        Args:
            caches: sealed caches of causal language models, opened or by URL. Of several the first
                that has a row answers.
            labels: what a batch's labels stand with: the id itself, as in transformers, or the
                one before it, as in kdcache's own batches.
            on_miss: "hard" leaves rows that are missed to the hard labels, and counts them.

        Raises:
            UsageError: caches that do not fit each other, or whose rows are not found by content.
        """
        self.caches = open_caches(caches)
        self.temperature, self.rows, self.missed = temperature, 0, 0
        problems = [
            f"{name} is {value!r}, expected {' or '.join(known)}."
            for name, value, known in (
                ("labels", labels, ("token", "next")),
                ("on_miss", on_miss, ("error", "hard")),
            )
            if value not in known
        ]
        for cache in self.caches:
            if cache.spec.task != CAUSAL_LM:
                problems.append(
                    f"{cache.url} is for {cache.spec.task}, but targets are found by content for "
                    f"{CAUSAL_LM} only. Use a TargetStream."
                )
            elif not cache.spec.apart and cache.spec.packing not in ("none", "whole"):
                problems.append(
                    f"{cache.url} was built with --packing {cache.spec.packing}, which cuts and "
                    "joins documents where a trainer would not. Build it with --packing none or "
                    "whole, or with --attend document."
                )
        problems += check_every_position(self.caches, "looking targets up by content")
        check_caches(self.caches, (temperature,), problems)
        self._labels, self._hard = labels, on_miss == "hard"
        self._open: OrderedDict[tuple[int, int], DecodedRows] = OrderedDict()
        self._proved = False

    def __getstate__(self) -> dict[str, Any]:
        """Without what is mapped: another process maps it again."""
        left = {k: v for k, v in self.__dict__.items() if k not in ("_indexes", "_codecs")}
        return {**left, "_open": OrderedDict()}

    @cached_property
    def _indexes(self) -> list[RowIndex]:
        return [RowIndex.of_cache(cache) for cache in self.caches]

    @cached_property
    def _codecs(self) -> list[Any]:
        return [cache.codec() for cache in self.caches]

    def lookup(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Targets:
        """The targets of a batch's labels, as a `TargetStream` gives them; see `find`."""
        return self.find(input_ids, labels, position_ids, attention_mask).targets

    def find(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Found:
        """The targets of a batch.

        Args:
            input_ids: int [B, S], as the trainer's collator makes them.
            labels: int [B, S], -100 where there is none.
            position_ids: int [B, S] of rows in which several documents, or all rows of a batch,
                are laid end to end.
            attention_mask: int [B, S]; needed where rows are padded on the left.

        Raises:
            UsageError: the labels stand with other ids than `labels` of this object states.
            KdcacheError: rows that the caches do not have, or labels without targets.
        """
        ids, own, begins = self._read(input_ids, labels, position_ids, attention_mask)
        wanted = _divided(ids, own, begins)
        if odd := sum(row.odd for row in wanted):
            other = "next" if self._labels == "token" else "token"
            raise UsageError(
                f"{odd} labels of the batch are not the ids that follow in their rows, as "
                f'labels="{self._labels}" has them. Try labels="{other}".'
            )
        found = self._find(wanted)
        missed = [row for row, part in zip(wanted, found, strict=True) if part is None]
        self.rows, self.missed = self.rows + len(wanted), self.missed + len(missed)
        if missed and not self._hard:
            raise KdcacheError(self._miss(missed, len(wanted)))
        if missed and self.missed == len(missed):
            logger.warning("%s They train on hard labels.", self._miss(missed, len(wanted)))
        parts = [(row, part) for row, part in zip(wanted, found, strict=True) if part is not None]
        hard = np.full_like(own, IGNORE)
        for row in missed:
            labelled = row.at + row.labelled
            hard.flat[labelled], own.flat[labelled] = own.flat[labelled], IGNORE
        device = labels.device
        return Found(
            self._targets(parts).to(device),
            torch.from_numpy(own).to(device),
            torch.from_numpy(hard).to(device) if missed else None,
            sum(len(row.labelled) for row in wanted),
            len(wanted),
            len(missed),
        )

    @property
    def missed_share(self) -> float:
        """Of the rows that were asked for, the share that the caches do not have."""
        return self.missed / max(self.rows, 1)

    def _read(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, labels aligned with the logits, and where rows or documents begin, [B, S]."""
        ids, given = (x.cpu().numpy().astype(np.int64) for x in (input_ids, labels))
        begins = np.zeros(ids.shape, np.bool_)
        if ids.ndim != 2 or given.shape != ids.shape:
            raise UsageError(
                f"input_ids are {list(ids.shape)} and labels {list(given.shape)}, expected two "
                "of one shape [B, S]."
            )
        begins[:, :1] = True
        for values, step in ((position_ids, 1), (attention_mask, 0)):
            if values is not None:
                at = np.broadcast_to(values.cpu().numpy().astype(np.int64), ids.shape)
                begins[:, 1:] |= np.diff(at) != step
        own = given
        if self._labels == "token":
            own = np.full_like(given, IGNORE)
            own[:, :-1] = np.where(begins[:, 1:], IGNORE, given[:, 1:])
        return ids, own, begins

    def _find(self, wanted: Sequence[_Wanted]) -> list[ShardData | None]:
        """The cached row of each; None where there is none."""
        exact = [[hashed(row.ids[: row.least]).digest()] for row in wanted]
        found: list[ShardData | None] = [None] * len(wanted)
        self._search(wanted, exact, found)
        if None in found:
            rows = zip(wanted, found, strict=True)
            longer = [[] if part is not None else list(row.longer()) for row, part in rows]
            self._search(wanted, longer, found)
            if None in found and not self._proved:
                # Before a miss is told, a damaged index is made anew.
                self._proved = True
                broken = [i for i, index in enumerate(self._indexes) if not index.intact()]
                for i in broken:
                    self._indexes[i] = RowIndex.of_cache(self.caches[i], fresh=True)
                return self._find(wanted) if broken else found
        return found

    def _search(
        self,
        wanted: Sequence[_Wanted],
        keys: Sequence[Sequence[bytes]],
        found: list[ShardData | None],
    ) -> None:
        """Fill in the rows that are not found yet and have one of these keys."""
        for number, index in enumerate(self._indexes):
            owners = [i for i, own in enumerate(keys) for _ in own if found[i] is None]
            asked = [key for i, own in enumerate(keys) for key in own if found[i] is None]
            for i, at in zip(owners, index.find(asked), strict=True):
                if at is not None and found[i] is None:
                    found[i] = self._row(number, *at, wanted[i])

    def _row(self, cache: int, span: int, row: int, wanted: _Wanted) -> ShardData | None:
        """A cached row, if it is the wanted one; an index may say anything."""
        if span >= self.caches[cache].spec.spans:
            return None
        rows = self._open.pop((cache, span), None)
        if rows is None:
            rows = DecodedRows.of_shard(self.caches[cache], span, self._codecs[cache])
        self._open[cache, span] = rows
        if len(self._open) > _OPEN:
            self._open.popitem(last=False)
        part = rows.row(row) if row < len(rows) else None
        if part is None or not (part.labels != IGNORE).any():
            return None
        ids = _ids_of(part)
        same = wanted.least <= len(ids) and np.array_equal(ids, wanted.ids[: len(ids)])
        return part if same else None

    def _targets(self, parts: Sequence[tuple[_Wanted, ShardData]]) -> Targets:
        """The targets of found rows, in order, at the trainer's labels."""
        if not parts:
            return SoftTargets.empty(self._codecs[0]).at(self.temperature)
        kept = []
        for row, part in parts:
            there = np.flatnonzero(part.labels != IGNORE)
            kept.append(np.isin(there, row.labelled))
            if kept[-1].sum() != len(row.labelled):
                lacks = int(np.setdiff1d(row.labelled, there)[0])
                raise KdcacheError(
                    f"the row that begins {self._text(row.ids)} has a label for its token "
                    f"{lacks + 1}, and the cache has no target there. Build the cache with the "
                    "trainer's labels, or with --labels none, which learns every id."
                )
        targets = ShardRows([part for _, part in parts]).take().targets  # copies
        all_kept = np.concatenate(kept)
        if not all_kept.all():
            targets = targets.take(np.flatnonzero(all_kept))
        return targets.at(self.temperature)

    # Rows that are not there

    def _miss(self, missed: Sequence[_Wanted], asked: int) -> str:
        urls = ", ".join(cache.url for cache in self.caches)
        return (
            f"{len(missed)} of the {asked} rows of a batch are not in {urls}. The first begins "
            f"{self._text(missed[0].ids)}. {self._cause(missed[0])}"
        )

    def _text(self, ids: np.ndarray) -> str:
        try:
            text = self.caches[0].tokenizer().decode(ids[:_SHOWN].tolist())
        except (CorruptCacheError, UsageError, OverflowError):
            return str(ids[:_SHOWN].tolist())
        return repr(shorten(str(text)))

    def _has(self, keys: Sequence[Sequence[int] | np.ndarray]) -> int | None:
        """The first of these lists of ids that is a key of a cache."""
        hashes = [hashed(np.asarray(ids, np.int32)).digest() for ids in keys]
        found = [index.find(hashes) for index in self._indexes]
        return next((i for i, at in enumerate(zip(*found, strict=True)) if any(at)), None)

    def _cause(self, row: _Wanted) -> str:
        """What most likely keeps a row from being found: a sentence or two."""
        cache, ids = self.caches[0], row.ids
        known = cache.known_ids
        if known is not None and ids.max() >= known:
            return (
                f"It has the id {ids.max()}, and the cache's tokenizer has {known}: the trainer "
                "uses another tokenizer."
            )
        cut = [ids[:end] for end in range(len(ids) - 1, 1, -1)]
        if (at := self._has(cut)) is not None:
            return (
                f"The cache has its first {len(cut[at])} ids as a row: the trainer truncates at "
                "another length than the build (--max-length), ends rows otherwise, or lays "
                "several end to end without position_ids."
            )
        ends = range(row.least, len(ids) + 1)
        if self._has([ids[1:end] for end in ends]) is not None:
            return f"The cache has it without its first id, {ids[0]}: the trainer adds a BOS."
        firsts = {int(ids_of[0]): None for ids_of in self._some_rows()}
        for first in list(firsts)[:_SHOWN]:
            if self._has([[first, *ids[:end]] for end in ends]) is not None:
                return f"The cache has it after the id {first}: the trainer adds no BOS."
        for other in self._some_rows():
            if len(other) > row.least and np.array_equal(other[: row.least], ids[: row.least]):
                return (
                    f"The cache has a row of {len(other)} ids that begins with it: the trainer "
                    "truncates at another length than the build (--max-length)."
                )
        return self._other_text(ids)

    def _some_rows(self) -> Iterator[np.ndarray]:
        """Ids of the first rows of the first cache."""
        data = by_document(self.caches[0].read(0, targets=False))
        for begin, end in zip(data.offsets[:_COMPARED], data.offsets[1:], strict=False):
            last = data.labels[end - 1 : end]
            yield np.append(data.input_ids[begin:end], last[last != IGNORE])

    def _other_text(self, ids: np.ndarray) -> str:
        """The same of a row that shares no beginning and no end with a cached one."""
        pieces = {ids[at : at + _ALIKE].tobytes() for at in range(len(ids) - _ALIKE + 1)}
        for other in self._some_rows():
            own = np.ascontiguousarray(other, ids.dtype)
            if any(own[at : at + _ALIKE].tobytes() in pieces for at in range(len(own))):
                return (
                    "The cache has a row with a part of the same text, which begins "
                    f"{self._text(other)}: the trainer uses another chat template, or cuts texts "
                    "elsewhere."
                )
        try:
            tokenizer = self.caches[0].tokenizer()
        except (CorruptCacheError, UsageError):
            return "Build the cache from the rows that the trainer prepares (--record-form ids)."
        again = tokenizer(tokenizer.decode(ids.tolist()), add_special_tokens=False)["input_ids"]
        if len(set(again) & set(ids.tolist())) < len(set(ids.tolist())) / 2:
            return (
                "The cache's tokenizer gives other ids for that text: the trainer uses another "
                "tokenizer."
            )
        return (
            "Its text is in none of the rows it was compared with: build the cache from the rows "
            "that the trainer prepares (--record-form ids)."
        )


def _ids_of(part: ShardData) -> np.ndarray:
    """The ids of one row up to its last label, and that label."""
    last = int(np.flatnonzero(part.labels != IGNORE)[-1])
    return np.append(part.input_ids[: last + 1], part.labels[last])


def _divided(ids: np.ndarray, own: np.ndarray, begins: np.ndarray) -> list[_Wanted]:
    """The rows and documents of a batch that have labels, in order."""
    flat, labels = ids.reshape(-1), own.reshape(-1)
    starts = np.append(np.flatnonzero(begins), len(flat))
    there = np.flatnonzero(labels != IGNORE)
    cuts = np.searchsorted(there, starts)
    found = []
    for i in np.flatnonzero(np.diff(cuts)).tolist():
        begin, end = int(starts[i]), int(starts[i + 1])
        row, labelled = flat[begin:end], there[cuts[i] : cuts[i + 1]] - begin
        own_labels = labels[begin + labelled]
        if (row[labelled[-1] + 1 :][:1] != own_labels[-1:]).any() or end - begin == labelled[
            -1
        ] + 1:
            row = np.append(row[: labelled[-1] + 1], own_labels[-1])  # what follows is padding
        odd = int(np.count_nonzero(row[labelled + 1] != own_labels))
        found.append(_Wanted(begin, row.astype(np.int32), labelled, odd))
    return found
