"""The codec inside the engine: what leaves it of a position is what a cache keeps, no state.

vLLM lets a class of ours join its worker (`EncodingWorker`). Once a build asks, that
class reads output layer and codec in each worker, and an `Encoder` takes the place of what follows
the pooling of states: a request that names positions, their noise and their labels is answered by
one tensor of bytes, a line a position (`Layout`). All other requests are answered by states as
before, so a teacher is probed in the old way.

Pooling comes after the whole prompt is read, in however many chunks, and noise comes with the
request. So neither batch nor chunk nor prefix decides a draw, except by rounding. Tensor-parallel
workers all have the states: each encodes its share of the positions with the whole output layer,
and they exchange bytes that are done. That needs V x D numbers on each of them instead of a part,
and moves tens of bytes a position where parts of the vocabulary would have to meet several times.

Cost: the output layer on each worker. Guarantee: what `Encoding` makes of the engine's states.
Source: vLLM's `TokenPooler`, of the versions in `KNOWN`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.teacher.engine.head import Head
from kdcache.teacher.memory import Encoding

KNOWN = ("0.32.",)
"""Beginnings of the versions whose worker has the seams that this module uses."""

_FIELD = "kdcache"
_KINDS = (np.int64, np.float64, np.int64)


Parts: TypeAlias = Sequence[tuple[str, str, Sequence[int]]]
"""Name, dtype and shape of a line of some tensors."""

Key: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Noise, float64 [n], and labels, integers [n], of the positions of a row."""


def request(positions: np.ndarray, u: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What a row's request states besides its ids: numbers [n] of some of its positions."""
    parts = zip((positions, u, labels), _KINDS, strict=True)
    return {_FIELD: [part.astype(kind).tobytes() for part, kind in parts]}


class Layout:
    """How named tensors with a line a position are one tensor of bytes."""

    def __init__(self, parts: Parts) -> None:
        """Take names, dtypes and shapes of a line, in order."""
        self.parts: Parts = [(name, dtype, tuple(shape)) for name, dtype, shape in parts]

    @classmethod
    def of(cls, encoded: Mapping[str, Tensor]) -> Layout:
        """That of some tensors."""
        names = {name: str(t.dtype).rpartition(".")[2] for name, t in encoded.items()}
        return cls([(name, names[name], tuple(t.shape[1:])) for name, t in encoded.items()])

    @staticmethod
    def join(encoded: Mapping[str, Tensor]) -> Tensor:
        """The tensors as uint8 [n, bytes]."""
        flat = [t.reshape(len(t), -1).contiguous().view(torch.uint8) for t in encoded.values()]
        return torch.cat(flat, 1)

    def split(self, joined: Tensor) -> dict[str, Tensor]:
        """The tensors that were joined."""
        found, start = {}, 0
        for name, dtype, shape in self.parts:
            kind = getattr(torch, dtype)
            end = start + int(np.prod(shape, dtype=int)) * torch.empty(0, dtype=kind).element_size()
            flat = joined[:, start:end].clone(memory_format=torch.contiguous_format).view(kind)
            found[name], start = flat.reshape(len(joined), *shape), end
        return found


class Encoder(nn.Module):
    """What follows the pooling of a row's states."""

    def __init__(self, states: Any, head: Head, encoding: Encoding, group: Any) -> None:
        """Take what answers without it, and the workers that share each layer."""
        super().__init__()
        self.states: Any = states.states if isinstance(states, Encoder) else states
        self._head, self._encoding, self._group = head, encoding, group

    def encode(self, states: Tensor, u: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
        """The columns of some positions, a slice at a time."""
        made, done = [], 0
        for piece, outside in self._head.slices(states, self._encoding.codec.vocab_size):
            end = done + len(piece.logits)
            encoded = self._encoding(piece, u[done:end], labels[done:end])
            made.append({**encoded, "clipped": outside})
            done = end
        return made

    def forward(self, pooled: Sequence[Tensor | None], metadata: Any) -> list[Tensor | None]:
        """Answer the rows that are read to their end; None stands for each other one."""
        answers: list[Tensor | None] = []
        asked: list[tuple[int, Tensor, Sequence[bytes]]] = []
        for states, params in zip(pooled, metadata.pooling_params, strict=True):
            said = (params.extra_kwargs or {}).get(_FIELD)
            if states is None or said is None:
                answers.append(self.states.forward_chunk(states, params))
            else:
                asked.append((len(answers), states, said))
                answers.append(None)
        if asked:
            for (i, _, _), answer in zip(asked, self._answer(asked), strict=True):
                answers[i] = answer
        return answers

    def _answer(self, asked: Sequence[tuple[int, Tensor, Sequence[bytes]]]) -> Sequence[Tensor]:
        read = [
            [np.frombuffer(part, kind) for part, kind in zip(said, _KINDS, strict=True)]
            for *_, said in asked
        ]
        counts = [len(positions) for positions, *_ in read]
        starts = np.cumsum([0, *(len(states) for _, states, _ in asked)])
        each = [(a + one[0], *one[1:]) for a, one in zip(starts, read, strict=False)]
        total, size = sum(counts), self._group.world_size
        # Each worker has as many: the last position once more where they do not divide.
        share = -(-total // size)
        mine = np.arange(share) + self._group.rank_in_group * share
        index, u, labels = (
            torch.from_numpy(np.concatenate(parts)[mine.clip(max=total - 1)])
            for parts in zip(*each, strict=True)
        )
        states = torch.cat([states for _, states, _ in asked])
        index, u, labels = (part.to(states.device) for part in (index, u, labels))
        made = self.encode(states[index], u, labels)
        joined = torch.cat([Layout.join(piece) for piece in made])
        if size > 1:
            all_of = [torch.empty_like(joined) for _ in range(size)]
            torch.distributed.all_gather(all_of, joined, group=self._group.device_group)
            joined = torch.cat(all_of)
        return torch.split(joined[:total], counts)
