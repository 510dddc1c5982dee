"""All logits of a position: exact at any temperature, and the only codec for losses on raw logits.

Costs V values a position: right for classifiers and small vocabularies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.targets.base import (
    Array,
    Codec,
    Column,
    canonical_temperatures,
    check_logits,
    check_vocabulary,
    refuse_bad_positions,
)
from kdcache.targets.decoded import DenseTargets

_DTYPES = {"float32": np.finfo(np.float32), "float16": np.finfo(np.float16)}


@dataclass(frozen=True)
class Dense(Codec):
    """Stores logits as they are, in float32 or float16.

    Attributes:
        dtype: stored type, "float32" or "float16" (relative error 2^-11).
        declared_only: the logits are those of a mean of distributions at the one declared
            temperature, and others are refused. Says how to read, not what is stored.
    """

    kind: ClassVar[str] = "dense"
    usage: ClassVar[str] = "dense[:float32|:float16]"
    keeps_logits: ClassVar[bool] = True

    vocab_size: int
    temperatures: tuple[float, ...] = (1.0,)
    dtype: str = "float32"
    declared_only: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        check_vocabulary(self.vocab_size, 1)  # a score is one number
        object.__setattr__(self, "temperatures", canonical_temperatures(self.temperatures))
        object.__setattr__(self, "dtype", self.dtype or "float32")
        if self.dtype not in _DTYPES:
            raise UsageError(f"codec is 'dense:{self.dtype}', expected {self.usage}.")

    def __str__(self) -> str:
        return "dense" if self.dtype == "float32" else f"dense:{self.dtype}"

    @property
    def any_temperature(self) -> bool:
        """Unless the logits are those of a mean."""
        return not self.declared_only

    @property
    def columns(self) -> tuple[Column, ...]:
        """One: `logits` [positions, V]."""
        return (Column("logits", self.dtype, (self.vocab_size,)),)

    @property
    def bytes_per_position(self) -> float:
        """Uncompressed: the low bits of logits are noise that no filter shrinks much."""
        return float(np.dtype(self.dtype).itemsize * self.vocab_size)

    def encode(self, logits: Tensor, u: Tensor | None = None) -> dict[str, Tensor]:
        """Keep the logits; see `Codec.encode`. Minus infinity counts as unusable here."""
        logits = check_logits(logits, self.vocab_size)
        return {
            "logits": logits.to(getattr(torch, self.dtype)),
            # float16 cannot hold what bfloat16 and float32 can: its overflow shows after the cast.
            "finite": logits.isfinite().all(-1),
        }

    def pack(
        self, encoded: Mapping[str, Array], id_to_rank: Array | None = None
    ) -> dict[str, Array]:
        """Check and return; classes keep their order, so ranks do not apply.

        Raises:
            UsageError: a finite logit that float16 cannot hold.
            KdcacheError: a position with NaN or infinite logits.
        """
        refuse_bad_positions(encoded["finite"])
        logits = np.ascontiguousarray(encoded["logits"], self.dtype)
        if not np.isfinite(logits).all():
            raise UsageError(
                f"a logit is larger than {_DTYPES[self.dtype].max:g}, which {self.dtype} "
                f"cannot hold. Use --codec dense."
            )
        return {"logits": logits}

    def at(
        self,
        columns: Mapping[str, Array],
        temperature: float,
        rank_to_id: Array | None = None,
    ) -> DenseTargets:
        """The logits as float32: the loss applies the temperature."""
        self.check_temperature(temperature)
        return DenseTargets(torch.from_numpy(columns["logits"].astype(np.float32)), temperature)
