"""Slices of a batch's positions: the logits of a whole batch never exist at once."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kdcache.targets import Codec

_SLICE_BYTES = {"cpu": 1 << 26, "cuda": 1 << 31}
_GPU_POSITIONS = 8192


def slice_positions(device: str, columns: int, item_size: int) -> int:
    """Positions that are projected at a time.

    A CPU computes in float32 where it can; a slice stays near its caches. A GPU wants long slices,
    in whole tiles of its products, of fewer elements than 32-bit indices reach.

    Args:
        device: kind of device.
        columns: of the output layer.
        item_size: bytes of a logit.
    """
    if device == "cpu":
        return max(1, _SLICE_BYTES[device] // (4 * columns))
    fits = min(_GPU_POSITIONS, _SLICE_BYTES[device] // (item_size * columns))
    return fits // 256 * 256 or max(1, fits)


class Slice(NamedTuple):
    """Some positions of a batch.

    Attributes:
        logits: [n, V]; of a mean of probabilities [n, m, V], for each of m temperatures.
        states: [n, D] that the output layer made them of; None where they were not asked for.
    """

    logits: Tensor
    states: Tensor | None = None

    def read_by(self, codec: Codec) -> Tensor:
        """What a codec encodes: the states or the logits."""
        if not codec.reads_states:
            return self.logits
        assert self.states is not None, "states are asked for where the codec reads them"
        return self.states
