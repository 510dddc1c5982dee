"""The K best log-probabilities and the exact mass of all other ids at each declared temperature.

Log-probabilities at T = 1 can be rescaled to another temperature only among themselves: the mass of
the other V - K ids at that temperature is lost (of SmolLM2's top 64, 88 % of the mass at T = 1
becomes 2 % at T = 4). So the tail's mass is stored at every declared temperature; the K entries
share the remainder in the proportions their log-probabilities give.

Numbers are levels L of one byte, close together where the loss feels an error:

    p    = (1 - L / 255) ** 6               of an entry at T = 1
    tail = sin(pi / 2 * (L / 255) ** 2) ** 2

At temperature T a step of p ** (1 / (2 T)) costs the same KL whatever p is; the sixth root is near
that for T from 1 to 4. Only an entry of 0, and a tail of 0 or 1, has the level of it: no other
logarithm is infinite.

Cost: about 3 bytes an entry and one a temperature before compression. Bias: the distribution inside
the tail, and a KL of 5.0e-5 at T = 1, 2.5e-5 at 2 and 2.3e-5 at 4, by rounding (SmolLM2-135M,
K = 64). Imports and caches of earlier versions have float16 log-probabilities and float32 tails
(`levels` is False).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    positive_int,
    refuse_bad_positions,
)
from kdcache.targets.decoded import SparseTargets
from kdcache.targets.device import top_entries

_MOST = 255
_POWER = 6  # entries down to e^-33 have a level of their own
with np.errstate(divide="ignore"):
    _SURPRISES = -_POWER * np.log1p(-np.arange(256) / _MOST).astype(np.float32)
_TAILS = (np.sin(np.pi / 2 * (np.arange(256) / _MOST) ** 2) ** 2).astype(np.float32)


@dataclass(frozen=True)
class TopK(Codec):
    """Stores `k` entries a position.

    Attributes:
        temperatures: where the tail's mass is stored, ascending; T = 1 need not be one of them.
        k: entries a position; capped at V, where nothing is left for the tail.
        levels: whether numbers are stored as levels of one byte.
    """

    kind: ClassVar[str] = "topk"
    usage: ClassVar[str] = "topk:K"

    vocab_size: int
    temperatures: tuple[float, ...] = (1.0,)
    k: int = 64
    levels: bool = True

    def __post_init__(self) -> None:
        check_vocabulary(self.vocab_size)
        object.__setattr__(self, "temperatures", canonical_temperatures(self.temperatures))
        object.__setattr__(self, "k", min(positive_int(self.k, self.usage), self.vocab_size))

    def __str__(self) -> str:
        return f"topk:{self.k}"

    @property
    def columns(self) -> tuple[Column, ...]:
        """Ids (or ranks) and levels [positions, K], levels of the tail [positions, temperatures].

        Entries fall in probability, so levels rise, as the bit patterns of minus the
        log-probabilities as float16 do: stored are their differences, exact and much smaller after
        shuffle + gzip.
        """
        ids, each = Column("ids", id_dtype(self.vocab_size), (self.k,)), (len(self.temperatures),)
        if self.levels:
            steps = Column("level_steps", "uint8", (self.k,))
            return ids, steps, Column("tail_levels", "uint8", each)
        return ids, Column("logprob_steps", "uint16", (self.k,)), Column("tail", "float32", each)

    @property
    def bytes_per_position(self) -> float:
        """From SmolLM2 at K = 64."""
        entry, tail = (1.8, 1.0) if self.levels else (2.4, 4.0)
        return entry * self.k + tail * len(self.temperatures)

    @property
    def most_entries(self) -> int:
        """K."""
        return self.k

    def in_floats(self) -> TopK:
        """See `Codec.in_floats`."""
        return replace(self, levels=False)

    def encode(self, logits: Tensor, u: Tensor | None = None) -> dict[str, Tensor]:
        """The K largest logits, normalised, and the tail; see `Codec.encode`."""
        logits = check_logits(logits, self.vocab_size)
        return top_entries(logits, self.k, self.temperatures)

    def pack(
        self, encoded: Mapping[str, Array], id_to_rank: Array | None = None
    ) -> dict[str, Array]:
        """Quantise; entries stay in falling order of probability."""
        refuse_bad_positions(encoded["finite"])
        ids = encoded["ids"] if id_to_rank is None else id_to_rank[encoded["ids"]]
        return self.stored(ids, -encoded["logprobs"], encoded["tail"])

    def stored(self, ids: Array, surprises: Array, tail: Array) -> dict[str, Array]:
        """The columns of some positions.

        Args:
            ids: as they are stored, [n, K].
            surprises: minus the log-probabilities at T = 1, rising, [n, K].
            tail: mass outside the entries at each temperature, [n, temperatures].
        """
        # Rounding may lift the first one above zero by a hair; abs() would fold it, the maximum
        # flattens it.
        surprises = np.maximum(surprises, 0)
        ids = np.ascontiguousarray(ids, id_dtype(self.vocab_size))
        if self.levels:
            levels = np.rint(-_MOST * np.expm1(-surprises / _POWER))
            levels = np.minimum(levels, _MOST - (surprises < np.inf)).astype(np.uint8)
            steps = np.diff(levels, axis=1, prepend=np.uint8(0))
            shares = np.sqrt(np.arcsin(np.sqrt(np.clip(tail, 0, 1))) / (np.pi / 2))
            tails = np.clip(np.rint(_MOST * shares), tail > 0, _MOST - (tail < 1))
            return {"ids": ids, "level_steps": steps, "tail_levels": tails.astype(np.uint8)}
        with np.errstate(over="ignore"):  # beyond 65504 float16 has infinity: 0 either way
            bits = surprises.astype(np.float16).view(np.uint16)
        steps = np.diff(bits, axis=1, prepend=np.uint16(0))
        tails = np.ascontiguousarray(tail, np.float32)
        return {"ids": ids, "logprob_steps": steps, "tail": tails}

    def surprises(self, columns: Mapping[str, Array]) -> Array:
        """Minus the log-probabilities at T = 1, float32 [n, K]."""
        if self.levels:
            levels = np.cumsum(columns["level_steps"], axis=1, dtype=np.uint8)
            return np.asarray(_SURPRISES[levels])
        bits = np.cumsum(columns["logprob_steps"], axis=1, dtype=np.uint16)
        return bits.view(np.float16).astype(np.float32)

    def largest_id(self, columns: Mapping[str, Array]) -> int:
        """See `Codec.largest_id`."""
        return int(columns["ids"].max(initial=0))

    def renumber(self, columns: Mapping[str, Array], rank_to_id: Array) -> dict[str, Array]:
        """See `Codec.renumber`."""
        ids = rank_to_id[columns["ids"]].astype(id_dtype(self.vocab_size))
        return {**columns, "ids": ids}

    def at(
        self,
        columns: Mapping[str, Array],
        temperature: float,
        rank_to_id: Array | None = None,
    ) -> SparseTargets:
        """Probabilities of the K entries, which with `rest` sum to 1."""
        index = self._temperature_index(temperature)
        ids = columns["ids"].astype(np.int64) if rank_to_id is None else rank_to_id[columns["ids"]]
        # Dividing before the softmax is p^(1/T) among the K; the division is by the declared value.
        logprobs = torch.from_numpy(-self.surprises(columns))
        tail = columns["tail_levels" if self.levels else "tail"][:, index]
        rest = torch.from_numpy(_TAILS[tail] if self.levels else tail.astype(np.float32))
        share = torch.softmax(logprobs / self.temperatures[index], -1)
        return SparseTargets(
            ids=torch.from_numpy(np.ascontiguousarray(ids, np.int64)),
            weights=share * (1 - rest[:, None]),
            tail=rest,
            exact=True,
            temperature=temperature,
        )
