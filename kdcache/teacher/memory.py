"""Fits a teacher into memory: where its weights go, the batch size, and slices of positions.

Weights go on one GPU, or are spread over several and the host. Both this and the batch size are
decided by measured numbers: the tensors of the weight files against free memory, and the peak of a
batch that is run before the first span. The sizes tried are halves of one another, so equal cards
that run nothing else settle on the same one. Logits are made of a slice of a batch's positions at a
time, and `Encoding` makes of a slice what a cache keeps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from kdcache.files import inner
from kdcache.targets import Codec
from kdcache.targets.device import of_positions

WEIGHTS_SHARE = 0.8
"""Of a GPU's free memory that weights may take; the rest is for a batch and a slice of logits."""

HOST_SHARE = 0.9
"""Of the host's available memory that offloaded weights may take."""

_BATCH_SHARE = 0.9
"""Of what the weights leave free that a batch may take: other batches leave other holes."""

_FLOATS = ("F64", "F32", "BF16", "F16")


def weight_bytes(folder: Path, dtype: str) -> int:
    """Bytes that a model's weights take once they are loaded.

    Args:
        dtype: what floats are converted to; other tensors (quantised ones) stay as they are.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(map(inner, json.loads(index.read_bytes())["weight_map"].values())))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    total = 0
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - a handle, not a mapping
                part = file.get_slice(key)
                if part.get_dtype() in _FLOATS:
                    total += size * math.prod(part.get_shape())
                else:
                    total += file.get_tensor(key).nbytes
    return total


def find_batch_tokens(peak_share: Callable[[int], float | None], most: int, least: int) -> int:
    """The largest batch that fits: `most`, or the first of its halves.

    Args:
        peak_share: runs a batch of so many tokens; the share of the free memory that it took at
            its peak, None if it ran out of it.
        most: tokens that are tried first.

    Returns:
        Tokens of a batch, at least `least`.
    """
    tokens = most
    while tokens > least:
        share = peak_share(tokens)
        if share is not None and share <= _BATCH_SHARE:
            return tokens
        tokens //= 2
    return least


def gpus_of(models: Iterable[Any]) -> tuple[torch.device, ...]:
    """The GPUs that hold models, in order; other processes may use the others."""
    names = {str(tensor.device) for model in models for tensor in model.state_dict().values()}
    for model in models:
        names |= {str(device) for device in getattr(model, "hf_device_map", {}).values()}
    found = {torch.device("cuda", int(p)) if p.isdecimal() else torch.device(p) for p in names}
    return tuple(sorted((d for d in found if d.type == "cuda"), key=lambda d: d.index or 0))


def peak_share(run: Callable[[], object], devices: Sequence[torch.device]) -> float | None:
    """Run a function on GPUs and measure its share of their free memory.

    Args:
        run: what is tried.
        devices: the GPUs that it uses. Others are left alone: asking one makes a context there, of
            half a GB.

    Returns:
        The largest share of any GPU; None if one ran out.
    """
    before, free = [], []
    for device in devices:
        torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
        before.append(torch.cuda.memory_allocated(device))
        free.append(torch.cuda.mem_get_info(device)[0])
    try:
        run()
        for device in devices:
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()
    taken = [torch.cuda.max_memory_allocated(d) - b for d, b in zip(devices, before, strict=True)]
    return max(t / max(1, f) for t, f in zip(taken, free, strict=True))


_SLICE_BYTES = {"cpu": 1 << 26, "cuda": 1 << 31}
_GPU_POSITIONS = 8192


def slice_positions(device: str, columns: int, item_size: int) -> int:
    """Positions that are projected at a time.

    A CPU computes in float32 where it can; a slice stays near its caches. A GPU wants long slices,
    in whole tiles of its products, of fewer elements than 32-bit indices reach.

    Args:
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


@dataclass(frozen=True)
class Encoding:
    """Makes a cache's numbers of slices of logits.

    Attributes:
        kept: what the cache keeps of each position besides its target, as `CacheSpec.kept` has it.
        made_for: `TeacherOptions.temperatures`.
    """

    codec: Codec
    kept: Collection[str]
    made_for: tuple[float, ...] = (1.0,)

    def __call__(self, piece: Slice, u: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What is kept of some positions, on their device; the host waits for nothing.

        Args:
            u: float64 [n], the codec's noise.
            labels: int64 [n], hard labels.

        Returns:
            What the codec gives, and what the cache keeps besides it, as `of_positions` gives it.
        """
        values = logits_at(piece.read_by(self.codec), self.made_for, self.codec.temperatures)
        encoded = self.codec.encode(values, u)
        if "label_logprob" in self.kept:
            at_one = logits_at(piece.logits, self.made_for, (1.0,))
            read_before = encoded if piece.logits.ndim == 2 else None
            found = of_positions(at_one, labels, read_before, entropy="entropy" in self.kept)
            encoded |= found
            if self.codec.reads_states:  # which may be finite where the logits are not
                encoded["finite"] = encoded["finite"] & ~found["label_logprob"].isnan()
        return encoded


def logits_at(logits: Tensor, made_for: Sequence[float], wanted: Sequence[float]) -> Tensor:
    """The logits of some temperatures.

    Args:
        logits: as `Teacher.logits` yields them.
        made_for: `TeacherOptions.temperatures`.

    Returns:
        [n, len(wanted), V] of a mean of probabilities; [n, V] as they are of any other teacher.
    """
    if logits.ndim == 2:
        return logits
    return logits[:, [list(made_for).index(t) for t in wanted]]
