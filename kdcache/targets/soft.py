"""Soft targets of many positions as one value: sliced, joined, and decoded at a temperature.

Ids may be stored as frequency ranks, so that frequent ones are small numbers, which saves 6 to 9 %
of the bytes of language-model targets. `kdcache.commands.build.prepare` counts them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kdcache.errors import CorruptCacheError
from kdcache.targets.base import Array, Codec, ragged_items, running_sum
from kdcache.targets.decoded import Targets

Ids = npt.NDArray[np.int64]

_LARGEST = 1 << 24  # ids of a vocabulary: the table is held whole


def read_ranks(table: bytes, vocab_size: int) -> Ids:
    """The id of every rank, int64 [V]: the ids of the table, then all others in rising order.

    Raises:
        CorruptCacheError: it is not a list of different ids of the vocabulary.
    """
    if len(table) % 4 == 0 and vocab_size <= _LARGEST:
        met = np.frombuffer(table, "<u4").astype(np.int64)
        left = np.ones(vocab_size, bool)
        if (met < vocab_size).all():
            left[met] = False
            if np.count_nonzero(left) == vocab_size - len(met):
                return np.concatenate([met, np.flatnonzero(left)])
    raise CorruptCacheError(
        f"ranks.u32 is not a list of different ids below {vocab_size}. Restore the cache from a "
        "copy, or build it again."
    )


def ranks_of_ids(rank_to_id: Ids) -> Ids:
    """The inverse table: the rank of every id, int64 [V]."""
    inverse = np.empty_like(rank_to_id)
    inverse[rank_to_id] = np.arange(len(rank_to_id))
    return inverse


@dataclass
class SoftTargets:
    """Stored columns of some positions and the codec that reads them.

    Attributes:
        codec: what wrote the columns, as `Codec.pack` does.
        rank_to_id: [V] id of each frequency rank, or None where ids are stored as they are.
    """

    codec: Codec
    columns: dict[str, Array]
    rank_to_id: Array | None = None

    def __len__(self) -> int:
        """Number of positions."""
        return next(len(self.columns[c.name]) for c in self.codec.columns if c.per == "position")

    @cached_property
    def _counts(self) -> dict[str, Array]:
        return self.codec.counts(self.columns)

    @cached_property
    def _starts(self) -> dict[str, Array]:
        return {axis: running_sum(counts) - counts for axis, counts in self._counts.items()}

    def take(self, positions: Array) -> SoftTargets:
        """The targets of these positions, in this order; repetition is fine.

        Args:
            positions: int64 [n], each in [0, len(self)).
        """
        items = {"position": np.asarray(positions, np.int64)}
        for axis, starts in self._starts.items():
            items[axis] = ragged_items(starts[positions], self._counts[axis][positions])
        columns = {c.name: self.columns[c.name][items[c.per]] for c in self.codec.columns}
        return SoftTargets(self.codec, columns, self.rank_to_id)

    def offsets(self, positions: Array) -> dict[str, Array]:
        """Where the items of these positions begin in the columns of each axis.

        Args:
            positions: int64 [n], each in [0, len(self)], the end included.

        Returns:
            int64 [n] by the name of the axis, `position` being one of them. Nothing as large as the
            targets stays in memory, as it does after `take`.
        """
        found = {"position": positions}
        for axis, counts in self.codec.counts(self.columns).items():
            begin = np.zeros(len(counts) + 1, np.int64)
            begin[1:] = running_sum(counts)
            found[axis] = begin[positions]
        return found

    def at(self, temperature: float) -> Targets:
        """Targets at a temperature the codec declares; see `Codec.at`."""
        return self.codec.at(self.columns, temperature, self.rank_to_id)

    def plain(self) -> SoftTargets:
        """The same targets with ids stored as they are."""
        if self.rank_to_id is None:
            return self
        return SoftTargets(self.codec, self.codec.renumber(self.columns, self.rank_to_id))

    @classmethod
    def empty(cls, codec: Codec) -> SoftTargets:
        """The targets of no position."""
        return cls(codec, {c.name: np.zeros((0, *c.shape), c.dtype) for c in codec.columns})

    @staticmethod
    def codec_of(parts: Sequence[SoftTargets]) -> Codec:
        """The codec of parts together: what binds one to its temperatures binds them all."""
        return min((part.codec for part in parts), key=lambda codec: codec.any_temperature)

    @staticmethod
    def alike(parts: Sequence[SoftTargets]) -> list[SoftTargets]:
        """Parts with ids of one meaning: those of different rank tables lose their ranks."""
        ranks: list[Any] = [part.rank_to_id for part in parts]
        # Those of a cache are the same object.
        if all(one is ranks[0] or np.array_equal(one, ranks[0]) for one in ranks):
            return list(parts)
        return [part.plain() for part in parts]

    @classmethod
    def concat(cls, parts: Sequence[SoftTargets]) -> SoftTargets:
        """Join parts that one codec wrote; those of different rank tables lose their ranks.

        Raises:
            ValueError: no part, or parts of different codecs.
        """
        if not parts:
            raise ValueError("nothing to join: at least one part is needed")
        if any(part.codec != parts[0].codec for part in parts):
            raise ValueError(f"parts differ: {sorted({str(part.codec) for part in parts})}")
        codec, parts = SoftTargets.codec_of(parts), SoftTargets.alike(parts)
        columns = {
            column.name: np.concatenate([part.columns[column.name] for part in parts])
            for column in codec.columns
        }
        return cls(codec, columns, parts[0].rank_to_id)


class TargetWriter:
    """Logits to stored targets of one codec, ids as frequency ranks where there is a table."""

    def __init__(self, codec: Codec, rank_to_id: Array | None = None) -> None:
        """Invert the table of ids of ranks [V], if there is one, once."""
        self.codec, self.rank_to_id = codec, rank_to_id
        self._id_to_rank = None if rank_to_id is None else ranks_of_ids(rank_to_id)

    def write(self, logits: Tensor, u: Tensor | None = None) -> SoftTargets:
        """Encode, wait for the device, and pack; see `Codec.encode`."""
        encoded = self.codec.encode(logits, u)
        return self.pack({name: tensor.cpu() for name, tensor in encoded.items()})

    def pack(self, encoded: Mapping[str, Tensor]) -> SoftTargets:
        """What `Codec.encode` gave, on the CPU, as stored targets."""
        arrays = {name: tensor.numpy() for name, tensor in encoded.items()}
        packed = self.codec.pack(arrays, self._id_to_rank)
        return SoftTargets(self.codec, packed, self.rank_to_id)
