"""Hidden states of a position: what the teacher's output layer made its logits of.

The cache keeps the output layer once (`kdcache.targets.output_layer`), and a student's loss makes
the teacher's logits again, a slice of positions at a time. So targets are right at any temperature
and for every divergence, at D numbers a position instead of V.

    float16   2 D bytes; KL(teacher || rebuilt) about 1e-7 on small models
    bfloat16  2 D bytes, for states beyond float16's 65,504
    int8      1.03 D bytes; KL 1e-4 to 3e-4

`int8` takes each channel's mean off and counts in the channel's unit, both from a sample of the
corpus, measured once a cache and kept with the layer: channels of language models differ by factors
of tens, and one scale for all would leave the small ones nothing. What remains is rounded
(`kdcache.targets.output_layer`), and made numbers again where they are used: a batch holds levels.

Cost: one read of the states. Guarantee: a number that its type cannot hold is refused, not clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    check_vocabulary,
    refuse_bad_positions,
)
from kdcache.targets.decoded import HiddenTargets
from kdcache.targets.output_layer import OutputLayer, blocks_of

_COLUMNS = {"float16": "float16", "bfloat16": "uint16", "int8": "uint8"}
_WIDTH = 2048  # of a layer that is not known yet, for planning
_WORTH = 0.75  # float16 as it is is read 3.5 times as fast for 12 % more bytes


@dataclass(frozen=True)
class Hidden(Codec):
    """Stores the output layer's input.

    Attributes:
        dtype: stored type, "float16", "bfloat16" or "int8".
        layer: the teacher's output layer; None until a cache or a teacher gives it.
    """

    kind: ClassVar[str] = "hidden"
    usage: ClassVar[str] = "hidden:float16|bfloat16|int8"
    keeps_logits: ClassVar[bool] = True
    reads_states: ClassVar[bool] = True

    vocab_size: int
    temperatures: tuple[float, ...] = (1.0,)
    dtype: str = "float16"
    layer: OutputLayer | None = None

    def __post_init__(self) -> None:
        check_vocabulary(self.vocab_size)
        object.__setattr__(self, "temperatures", canonical_temperatures(self.temperatures))
        if self.dtype not in _COLUMNS:
            raise UsageError(f"codec is 'hidden:{self.dtype}', expected {self.usage}.")

    def __str__(self) -> str:
        return f"hidden:{self.dtype}"

    def with_layer(self, layer: OutputLayer) -> Hidden:
        """The same codec for the states that a layer reads.

        Raises:
            ValueError: it is of another vocabulary, or lacks what `int8` needs.
        """
        if layer.vocab_size != self.vocab_size:
            raise ValueError(f"it has {layer.vocab_size} ids, expected {self.vocab_size}")
        if self.needs_channels and layer.mean is None:
            raise ValueError(f"it has no mean and unit of its channels, which {self} needs")
        return replace(self, layer=layer)

    @property
    def needs_channels(self) -> bool:
        """Whether the layer must come with its channels' means and units."""
        return self.dtype == "int8"

    @property
    def columns(self) -> tuple[Column, ...]:
        """`states` [positions, D] (bit patterns of bfloat16; int8 levels, 128 for 0), and for
        int8 the `steps` of its blocks [positions, max(1, D // 32)]."""
        states = Column("states", _COLUMNS[self.dtype], (self._known.width,), worth=_WORTH)
        steps = Column("steps", "uint8", (blocks_of(self._known.width)[0],))
        return (states, steps) if self.dtype == "int8" else (states,)

    @property
    def bytes_per_position(self) -> float:
        """Uncompressed: the low bits of states are noise that no filter shrinks much."""
        width = _WIDTH if self.layer is None else self.layer.width
        return float(width + blocks_of(width)[0] if self.dtype == "int8" else 2 * width)

    @property
    def _known(self) -> OutputLayer:
        assert self.layer is not None, "a cache's codec comes with its output layer"
        return self.layer

    def encode(self, logits: Tensor, u: Tensor | None = None) -> dict[str, Tensor]:
        """Round the states, [n, D] of any float dtype, given instead of logits."""
        states, layer = logits, self._known
        if states.shape[1:] != (layer.width,) or not states.is_floating_point():
            raise ValueError(
                f"states are {states.dtype} {list(states.shape)}, expected floats "
                f"[positions, {layer.width}]"
            )
        finite = states.isfinite().all(-1)
        if self.dtype != "int8":
            # A type that cannot hold a number makes it infinite, which `pack` refuses.
            rounded = states.to(getattr(torch, self.dtype))
            fits = rounded.isfinite().all(-1)
            bits = rounded.view(torch.int16) if self.dtype == "bfloat16" else rounded
            return {"states": bits, "fits": fits, "finite": finite}
        levels, steps, fits = layer.to_levels(states)
        return {"states": levels, "steps": steps, "fits": fits, "finite": finite}

    def pack(
        self, encoded: Mapping[str, Array], id_to_rank: Array | None = None
    ) -> dict[str, Array]:
        """Check and return; there are no ids.

        Raises:
            UsageError: a finite state that the type cannot hold.
            KdcacheError: a position with NaN or infinite states.
        """
        refuse_bad_positions(encoded["finite"])
        if not encoded["fits"].all():
            raise UsageError(
                f"a hidden state is larger than {self} can hold. Use --codec hidden:bfloat16."
            )
        return {
            column.name: np.ascontiguousarray(encoded[column.name]).view(column.dtype)
            for column in self.columns
        }

    def at(
        self,
        columns: Mapping[str, Array],
        temperature: float,
        rank_to_id: Array | None = None,
    ) -> HiddenTargets:
        """The states as they are stored; the loss rebuilds the logits."""
        self.check_temperature(temperature)
        stored, steps = columns["states"], None
        if self.dtype == "int8":
            states, steps = torch.from_numpy(stored), torch.from_numpy(columns["steps"])
        elif self.dtype == "bfloat16":
            states = torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
        else:
            states = torch.from_numpy(stored)
        return HiddenTargets(states, self._known, temperature, steps)
