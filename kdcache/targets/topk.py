"""The K best log-probabilities and the exact mass of all other ids at each declared temperature.

Log-probabilities at T = 1 can be rescaled to another temperature only among themselves: the mass of
the other V - K ids at that temperature is lost (of SmolLM2's top 64, 88 % of the mass at T = 1
becomes 2 % at T = 4). So the tail's mass is stored as float32 at every declared temperature; the K
entries share the remainder in the proportions their log-probabilities give. Cost: about 4 bytes an
entry and 4 bytes a temperature before compression; bias: the distribution inside the tail.
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
    positive_int,
    ranks_pay,
    refuse_bad_positions,
)
from kdcache.targets.decoded import SparseTargets
from kdcache.targets.device import top_entries


@dataclass(frozen=True)
class TopK(Codec):
    """Stores `k` entries a position.

    Attributes:
        vocab_size: V.
        temperatures: where the tail's mass is stored, ascending; T = 1 need not be one of them.
        k: entries a position; capped at V, where nothing is left for the tail.
    """

    kind: ClassVar[str] = "topk"
    usage: ClassVar[str] = "topk:K"

    vocab_size: int
    temperatures: tuple[float, ...] = (1.0,)
    k: int = 64

    def __post_init__(self) -> None:
        check_vocabulary(self.vocab_size)
        object.__setattr__(self, "temperatures", canonical_temperatures(self.temperatures))
        object.__setattr__(self, "k", min(positive_int(str(self.k), self.usage), self.vocab_size))

    @classmethod
    def _from_argument(
        cls, argument: str, temperatures: tuple[float, ...], vocab_size: int
    ) -> TopK:
        return cls(vocab_size, temperatures, positive_int(argument, cls.usage))

    def __str__(self) -> str:
        return f"topk:{self.k}"

    @property
    def columns(self) -> tuple[Column, ...]:
        """Ids (or ranks) and log-probabilities [positions, K], tail masses [positions,
        temperatures].

        Entries fall in probability, so the bit patterns of minus the log-probabilities as float16
        rise: stored are their differences, exact and a third smaller after shuffle + gzip.
        """
        return (
            Column("ids", id_dtype(self.vocab_size), (self.k,)),
            Column("logprob_steps", "uint16", (self.k,)),
            Column("tail", "float32", (len(self.temperatures),)),
        )

    @property
    def bytes_per_position(self) -> float:
        """From SmolLM2 at K = 64."""
        return 2.4 * self.k + 4.0 * len(self.temperatures)

    @property
    def most_entries(self) -> int:
        """K."""
        return self.k

    @property
    def uses_ranks(self) -> bool:
        """Beyond one byte."""
        return ranks_pay(self.vocab_size)

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
        # Beyond 65504 float16 has infinity: probability zero either way. Rounding may lift the
        # first one above zero by a hair; abs() would fold it, the maximum flattens it.
        with np.errstate(over="ignore"):
            surprise = np.maximum(-encoded["logprobs"], 0).astype(np.float16)
        return {
            "ids": ids.astype(id_dtype(self.vocab_size)),
            "logprob_steps": np.diff(surprise.view(np.uint16), axis=1, prepend=np.uint16(0)),
            "tail": np.ascontiguousarray(encoded["tail"], np.float32),
        }

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
        bits = np.cumsum(columns["logprob_steps"], axis=1, dtype=np.uint16)
        logprobs = torch.from_numpy(-bits.view(np.float16).astype(np.float32))
        rest = torch.from_numpy(columns["tail"][:, index].astype(np.float32))
        share = torch.softmax(logprobs / self.temperatures[index], -1)
        return SparseTargets(
            ids=torch.from_numpy(np.ascontiguousarray(ids, np.int64)),
            weights=share * (1 - rest[:, None]),
            tail=rest,
            exact=True,
            temperature=temperature,
        )
