"""Threshold samples: unbiased sparse weights, a few ids a position, at every declared temperature
at once.

`kdcache.targets.device` chooses and quantises; this module stores the result. A position with m
temperatures stores

* `head_count`, and per head id its rank and its mass at each temperature in units of 1/M;
* `near_count`: how many tail ids have a rank below 256;
* per tail id its rank and, for m > 1, its shares at the first m - 1 temperatures in units of 1/R
  (at all of them the shares sum to R);
* for `Anchored`, per tail id the inverse of its inclusion probability, and also the head ids whose
  mass rounded to 0: a student must know of each id whether chance had a part in it.

Nothing else is needed. The tail's units follow from the head's (M minus their sum, at each T; in
all U), hence the number of tail ids n = ceil(U N / M) and the size U / (M n) that each stands for;
a tail id weighs its share of that. M = 2 N: finer units cost more bytes than the noise they save is
worth, measured on SmolLM2.

Ids are sorted inside a position and stored as differences: after shuffle + gzip that is close to
the entropy of a set of ids. Frequent ids (low ranks) have a column of bytes of their own: one
Huffman code cannot serve their small differences and the large ones of rare ids well (4 % of the
ids' bytes).

Guarantee: the mean over the noise of the weight of any id is its probability at each declared T, up
to float32 rounding; at one temperature the weights of a position sum to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kdcache.targets.base import (
    Array,
    Codec,
    Column,
    canonical_temperatures,
    check_logits,
    check_vocabulary,
    id_dtype,
    owners,
    positive_int,
    refuse_bad_positions,
    run_items,
    running_sum,
    sum_up_,
)
from kdcache.targets.decoded import AnchoredTargets, SparseTargets
from kdcache.targets.device import Rule, sample_entries

_SHARE_UNITS = 7
"""R: rounding shares to 1/7 adds 2 % to the noise and takes 5 % of the bytes off, against 1/15."""

_BASE = 8 ** (1 / 4)
"""B: rounding inverse inclusion probabilities to its powers leaves 4.5 % of a sample's noise to a
student that is its teacher, in 0.55 bytes an entry; powers of 2 would leave 8 % in 0.51, powers of
the root of 2 2 % in 0.61."""

_INVERSES = np.where(np.arange(256) < 35, _BASE ** (np.arange(256.0) - 2), np.inf)
"""The inverse of each code; the last is that of 2^24."""

_NEAR = 256
"""Ranks below this are stored as bytes."""

_AXES = ("head", "near", "far")

_SLICE = 4096
"""Positions decoded at a time: their entries fit the processor's cache, and memory is used again
instead of being asked from the system anew, which took up to half of the time."""


@dataclass(frozen=True)
class Sample(Codec):
    """Stores at most `draws` times the number of temperatures entries a position.

    Attributes:
        temperatures: where the weights are unbiased, ascending.
        draws: N; ids with a size above 1/N are always kept.
    """

    kind: ClassVar[str] = "sample"
    usage: ClassVar[str] = "sample:N"
    needs_noise: ClassVar[bool] = True
    anchored: ClassVar[bool] = False

    vocab_size: int
    temperatures: tuple[float, ...] = (1.0,)
    draws: int = 20

    def __post_init__(self) -> None:
        check_vocabulary(self.vocab_size)
        object.__setattr__(self, "temperatures", canonical_temperatures(self.temperatures))
        object.__setattr__(self, "draws", positive_int(self.draws, self.usage))

    def __str__(self) -> str:
        return f"{self.kind}:{self.draws}"

    @property
    def keeps_means(self) -> bool:
        """Always: entries have a weight for each temperature."""
        return True

    @property
    def rule(self) -> Rule:
        """The constants of the sample: M follows from N, its rounding adds 2 % to the noise."""
        m = len(self.temperatures)
        base = _BASE if self.anchored else 0.0
        return Rule(self.draws, self.temperatures, max(2, m) * self.draws, _SHARE_UNITS, base)

    @property
    def columns(self) -> tuple[Column, ...]:
        """Counts per position; ids and values of the head and of the tail, each ragged."""
        m, units = len(self.temperatures), self.rule.units
        slots = self.rule.slots(self.vocab_size)
        ids = id_dtype(self.vocab_size)
        columns: tuple[Column, ...] = (
            Column("head_count", _unsigned(slots)),
            Column("head_ids", ids, per="head"),
            Column("head_units", _unsigned(units), (m,), "head"),
            Column("near_count", _unsigned(slots)),
            Column("near_ids", "uint8", per="near"),
            Column("far_ids", ids, per="far"),
        )
        return columns + tuple(
            Column(f"{axis}_{name}", "uint8", shape, axis)
            for name, shape in self._beside.items()
            for axis in ("near", "far")
        )

    @property
    def _beside(self) -> dict[str, tuple[int, ...]]:
        """What is stored of a tail id with its rank: name and shape."""
        m = len(self.temperatures)
        shapes: dict[str, tuple[int, ...]] = {"shares": (m - 1,)} if m > 1 else {}
        return {**shapes, "inverse": ()} if self.anchored else shapes

    def counts(self, columns: Mapping[str, Array]) -> dict[str, Array]:
        """Items of each position in the ragged columns, int32, by axis; see `Codec.counts`."""
        return self._lengths(columns)[0]

    def largest_id(self, columns: Mapping[str, Array]) -> int:
        """See `Codec.largest_id`: those of positions are the sums of their differences."""
        largest = -1
        for (axis, counts), base in zip(self.counts(columns).items(), (0, 0, _NEAR), strict=True):
            # Of running sums alone: ids are checked before an array of them is made.
            before = np.concatenate([[0], running_sum(columns[f"{axis}_ids"])])
            ends = running_sum(counts)[counts > 0]
            last = before[ends] - before[ends - counts[counts > 0]]
            largest = max(largest, base + int(last.max(initial=-1 - base)))
        return largest

    def _lengths(self, columns: Mapping[str, Array]) -> tuple[dict[str, Array], Array]:
        """Items of each position by axis, and the units that its head leaves to the tail, int32."""
        m, units = len(self.temperatures), self.rule.units
        heads, near = (columns[f"{axis}_count"].astype(np.int32) for axis in ("head", "near"))
        # 32 bits are enough: if the running sum overflows, its differences are right all the same.
        before = np.zeros(columns["head_units"].size + 1, np.int32)
        before[1:] = running_sum(columns["head_units"].reshape(-1), np.int32)
        ends = before[running_sum(heads) * m]
        left = units * m - np.diff(ends, prepend=before[:1])
        # n = ceil(U N / M) and M is a multiple of N: the device computes the same.
        draws = -(-left // (units // self.draws))
        return {"head": heads, "near": near, "far": draws - near}, left

    @property
    def bytes_per_position(self) -> float:
        """From SmolLM2: half of the possible entries are used at T = 1, nearly all when hotter."""
        return 3.0 + 0.75 * self.draws + 2.3 * self.draws * (len(self.temperatures) - 1)

    @property
    def most_entries(self) -> int:
        """One for each draw, and one more."""
        return self.rule.slots(self.vocab_size)

    def encode(self, logits: Tensor, u: Tensor | None = None) -> dict[str, Tensor]:
        """Choose ids and quantise their weights on the device; see `Codec.encode`."""
        logits = check_logits(logits, self.vocab_size, len(self.temperatures))
        if u is None or u.dtype != torch.float64 or u.shape != logits.shape[:1]:
            raise ValueError(f"{self.kind} needs u, float64 [positions], from position_uniform")
        # Of a model that is spread over devices the last one gives the logits.
        return sample_entries(logits, u.to(logits.device), self.rule)

    def pack(
        self, encoded: Mapping[str, Array], id_to_rank: Array | None = None
    ) -> dict[str, Array]:
        """Drop what carries no weight, sort by id, store differences."""
        refuse_bad_positions(encoded["finite"])
        values = encoded["values"]
        ids = encoded["ids"] if id_to_rank is None else np.asarray(id_to_rank)[encoded["ids"]]
        # Slots beyond heads and draws are unused: shapes are fixed on the device.
        slot = np.arange(ids.shape[1])
        heads = encoded["heads"][:, None]
        # A head id with a mass below one unit would be stored to weigh zero.
        head = (slot < heads) & (self.anchored | values.any(-1))
        tail = (slot >= heads) & (slot < heads + encoded["draws"][:, None])

        entries = values.reshape(-1, values.shape[-1])
        # The last share is what the others leave of R.
        beside = {"shares": entries[:, :-1]}
        if self.anchored:
            beside["inverse"] = encoded["inverse"].reshape(-1)
        columns: dict[str, Array] = {}
        # Sorted: differences are small and the order of draws means nothing.
        head_ids, order, columns["head_count"] = _sorted_deltas(ids, head)
        columns["head_ids"], columns["head_units"] = head_ids, entries[order]
        for axis, chosen, base in (("near", ids < _NEAR, 0), ("far", ids >= _NEAR, _NEAR)):
            columns[f"{axis}_ids"], order, count = _sorted_deltas(ids - base, tail & chosen)
            columns[f"{axis}_count"] = count
            for name, whole in beside.items():
                columns[f"{axis}_{name}"] = whole[order]
        return {c.name: columns[c.name].astype(c.dtype) for c in self.columns}

    def renumber(self, columns: Mapping[str, Array], rank_to_id: Array) -> dict[str, Array]:
        """See `Codec.renumber`: an id moves between near and far with its other values."""
        # Everything is sorted anew: another order of ids changes all differences.
        counts = self.counts(columns)
        owner = {axis: owners(n) for axis, n in counts.items()}
        ids = {axis: _undo_deltas(columns[f"{axis}_ids"], _first(n)) for axis, n in counts.items()}
        renamed = dict(columns)

        head = rank_to_id[ids["head"]]
        order = _order(owner["head"], head)
        renamed["head_ids"] = _deltas(head[order], counts["head"])
        renamed["head_units"] = columns["head_units"][order]

        tail = rank_to_id[np.concatenate([ids["near"], ids["far"] + _NEAR])]
        # Near and far are one set here: which of the two an id is in follows from its new rank.
        position_of = np.concatenate([owner["near"], owner["far"]])
        order = _order(position_of, tail)
        tail, position_of = tail[order], position_of[order]
        for axis, chosen, base in (("near", tail < _NEAR, 0), ("far", tail >= _NEAR, _NEAR)):
            count = np.bincount(position_of[chosen], minlength=len(counts["near"]))
            renamed[f"{axis}_ids"] = _deltas(tail[chosen] - base, count)
            if axis == "near":
                renamed["near_count"] = count
            for name in self._beside:
                renamed[f"{axis}_{name}"] = _tail(columns, name)[order][chosen]
        return {c.name: renamed[c.name].astype(c.dtype) for c in self.columns}

    def at(
        self,
        columns: Mapping[str, Array],
        temperature: float,
        rank_to_id: Array | None = None,
    ) -> SparseTargets:
        """Unbiased weights; head ids come first, then the tail's, each part sorted by rank.

        An id may take two entries; their weights add up.
        """
        index = self._temperature_index(temperature)
        lengths, left = self._lengths(columns)
        # In the order in which entries stand in a row: the head, near, far.
        counts = np.stack([lengths[axis] for axis in _AXES])
        total = counts.sum(0)
        positions, width = len(total), max(1, int(total.max(initial=0)))
        # The size that each tail entry represents.
        size = left / np.maximum((total - counts[0]) * float(self.rule.units), 1)
        size = size.astype(np.float32)
        ends = np.zeros((len(_AXES), positions + 1), np.int64)
        for axis, count in enumerate(counts):
            ends[axis, 1:] = running_sum(count)
        # Padding is id 0 with weight 0, which changes no sum.
        ids = np.zeros((positions, width), np.int64)
        # Empty: `_weigh` writes every slot, zeros too, while the slice is in the cache.
        weights = np.empty((positions, width), np.float32)
        inverse = np.zeros((positions if self.anchored else 0, width), np.float32)
        ragged = [column for column in self.columns if column.per != "position"]
        for first in range(0, positions, _SLICE):
            part = slice(first, min(first + _SLICE, positions))
            cut = {a: slice(*ends[i, [part.start, part.stop]]) for i, a in enumerate(_AXES)}
            mine = {column.name: columns[column.name][cut[column.per]] for column in ragged}
            flat_at, found = self._entries(mine, counts[:, part], width)
            if rank_to_id is not None:
                # A look-up of one slice: the table stays in the cache, where that of all would not.
                found = rank_to_id[found].astype(np.int64)
            ids[part].reshape(-1)[flat_at] = found
            self._weigh(weights[part], mine, flat_at, size[part], total[part], index)
            if self.anchored:
                # Ids of the head keep 0: chance had no part in them.
                drawn = flat_at[len(mine["head_ids"]) :]
                inverse[part].reshape(-1)[drawn] = _INVERSES[_tail(mine, "inverse")]
        sample = SparseTargets(
            ids=torch.from_numpy(ids),
            weights=torch.from_numpy(weights),
            tail=torch.zeros(positions),
            exact=False,
            temperature=temperature,
        )
        if not self.anchored:
            return sample
        heads = torch.from_numpy(counts[0].astype(np.int64))
        return AnchoredTargets(**vars(sample), inverse=torch.from_numpy(inverse), heads=heads)

    def _entries(
        self, columns: Mapping[str, Array], counts: Array, width: int
    ) -> tuple[Array, Array]:
        """All entries of some positions: those of the head, then the near and the far ones.

        Args:
            columns: the ragged columns.
            counts: int32 [3, n], entries of each position by axis.
            width: of the padded result.

        Returns:
            Flat index in the padded result, and id or rank of each entry, int64.
        """
        heads, near, _ = counts
        # One call for all three axes: their differences are undone by a single running sum.
        row = np.arange(counts.shape[1]) * width
        starts = np.concatenate([row, row + heads, row + heads + near])
        counts = counts.reshape(-1)
        # Without the empty runs: the first item of one would be that of the next run.
        used = np.flatnonzero(counts)
        flat_at, first = run_items(starts[used], counts[used])
        deltas = [columns[f"{axis}_ids"] for axis in _AXES]
        ids = _undo_deltas(np.concatenate(deltas), first)
        # Far ids count from 256, which is in no difference.
        ids[len(ids) - len(deltas[-1]) :] += _NEAR
        return flat_at, ids

    def _weigh(
        self,
        weights: Array,
        columns: Mapping[str, Array],
        flat_at: Array,
        size: Array,
        total: Array,
        index: int,
    ) -> None:
        """Fill in the weights of some positions.

        Args:
            weights: float32 [n, width], of any content.
            columns: as for `_entries`.
            flat_at: from there.
            size: float32 [n], the size that each tail entry represents.
            total: [n], entries of each position.
            index: of the temperature.
        """
        flat, head = weights.reshape(-1), len(columns["head_ids"])
        if len(self.temperatures) == 1 and weights.shape[1] <= _SLICE:
            # Heads as well, for now: whole rows, `total` ones before zeros, beat indices.
            rows = np.tri(weights.shape[1] + 1, weights.shape[1], -1, dtype=np.float32)
            rows.take(total, axis=0, out=weights, mode="clip")
            weights *= size[:, None]
        else:
            share: Array | int = _SHARE_UNITS
            if len(self.temperatures) > 1:
                shares = _tail(columns, "shares")
                # The last is what the others leave: the shares of an entry sum to 1 exactly.
                last = index == shares.shape[1]
                share = _SHARE_UNITS - sum(shares.T) if last else shares[:, index]
            # Shares first and sizes after: one product a row instead of a lookup an entry.
            weights[...] = 0
            flat[flat_at[head:]] = share / np.float32(_SHARE_UNITS)
            weights *= size[:, None]
        # Last, over what the lines above have put into the head's slots.
        flat[flat_at[:head]] = columns["head_units"][:, index] / np.float32(self.rule.units)


@dataclass(frozen=True)
class Anchored(Sample):
    """The entries of `Sample`, and what lets a student's own distribution take their noise off.

    See `kdcache.loss.anchor` for what is done with it.
    """

    kind: ClassVar[str] = "anchored"
    usage: ClassVar[str] = "anchored:N"
    anchored: ClassVar[bool] = True

    @property
    def bytes_per_position(self) -> float:
        """From SmolLM2: the inverse of an inclusion probability takes about half a byte."""
        return super().bytes_per_position + 0.25 * self.draws * len(self.temperatures)


def _tail(columns: Mapping[str, Array], name: str) -> Array:
    """What all tail ids have of that name, near ones first."""
    return np.concatenate([columns[f"near_{name}"], columns[f"far_{name}"]])


def _unsigned(largest: int) -> str:
    """Smallest unsigned type that holds a number."""
    return str(np.min_scalar_type(largest))


def _sorted_deltas(ids: Array, used: Array) -> tuple[Array, Array, Array]:
    """Sort the used ids of each row.

    Returns:
        Differences to the row's previous id (the first: to 0), the flat indices the ids came from,
        and how many each row has.
    """
    counts = used.sum(1)
    # Unused slots sort behind all ids, so each row's first `counts` are the used ones.
    key = np.where(used, ids.astype(np.int64), np.iinfo(np.int64).max)
    order = np.argsort(key, axis=1)
    # From the one sort: a second one would cost as much again.
    key = np.take_along_axis(key, order, 1)
    kept = np.arange(ids.shape[1]) < counts[:, None]
    deltas = np.diff(key, axis=1, prepend=0)[kept]
    indices = (order + np.arange(len(ids))[:, None] * ids.shape[1])[kept]
    return deltas, indices, counts


def _order(owner: Array, ids: Array) -> Array:
    """Order by position, then by id, equal ones as they come: `np.lexsort`, ten times faster."""
    # One number of both: an id takes the lower 32 bits.
    return np.argsort(owner << 32 | ids, kind="stable")


def _deltas(ids: Array, counts: Array) -> Array:
    """Differences of ids that are sorted inside each position; the first of one counts from 0."""
    # Across all positions at once, and the first of each corrected: a loop would be Python's.
    deltas = np.diff(ids, prepend=0)
    first = _first(counts)
    deltas[first] = ids[first]
    return np.asarray(deltas)


def _first(counts: Array) -> Array:
    """Where the items of each position begin, of those that have any."""
    return np.asarray((running_sum(counts) - counts)[counts > 0])


def _undo_deltas(deltas: Array, first: Array) -> Array:
    """Ids from their differences (int64).

    Args:
        deltas: as `_deltas` gives them.
        first: where the ids of each position begin, of those that have any.
    """
    deltas = deltas.astype(np.int64)
    # Each position's first difference takes back the sum of those of the position before.
    # One running sum over all positions, since a loop over them would be Python's.
    totals = running_sum(deltas)[first[1:] - 1]
    totals[1:] -= totals[:-1]
    deltas[first[1:]] -= totals
    return sum_up_(deltas)
