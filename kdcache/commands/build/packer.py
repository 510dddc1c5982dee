"""Encoded slices of positions become stored columns on threads, next to the device's work.

Copies to the host are queued behind the kernels that make them; only the threads wait for them.

Cost: memory of the slices on their way, eight at most. Guarantee: rounding noise is keyed by (seed,
span, row, position), whatever slices the positions came in.

What a worker is at, from its first record on: counts that its threads keep and anybody may read.

Cost: a few additions a record or batch. Reading takes no lock: figures may be a step old.
"""

from __future__ import annotations

import concurrent.futures as futures
import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.rows import Row
from kdcache.targets import (
    Codec,
    SoftTargets,
    Stream,
    TargetWriter,
    label_logprob,
    position_uniform,
)
from kdcache.tasks import IGNORE

_KEPT: Mapping[str, tuple[Callable[..., np.ndarray], int]] = {
    "label_logprob": (label_logprob.encode_logprobs, Stream.LABEL_LOGPROB),
    "entropy": (label_logprob.encode_entropies, Stream.ENTROPY),
}
"""What makes the codes of a column next to the targets, and the stream of its noise."""

_UNPACKED = 8  # encoded slices on their way, at most


@dataclass(frozen=True)
class Positions:
    """Some positions of a span.

    Attributes:
        rows: int64 [n], the row of the span that each is in.
        tokens: int64 [n], the token of the row.
        labels: int64 [n], its hard label; `IGNORE` where that is not one id or class.
    """

    rows: np.ndarray
    tokens: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Row], task: str) -> Positions:
        """All positions of some rows, in row-major order."""
        wanted = [row.positions(task) for row in rows]
        labels = [
            row.labels[some]
            if row.labels.ndim == 1 and row.labels.dtype.kind == "i"
            else np.full(len(some), IGNORE)
            for row, some in zip(rows, wanted, strict=True)
        ]
        return cls(
            np.repeat(np.arange(len(rows)), [len(some) for some in wanted]),
            np.concatenate([np.zeros(0, np.int64), *wanted]),
            np.concatenate([np.zeros(0, np.int64), *labels]).astype(np.int64),
        )

    def take(self, index: np.ndarray) -> Positions:
        """Some of them."""
        return Positions(self.rows[index], self.tokens[index], self.labels[index])

    def noise(
        self, seed: int, span: int, piece: slice = slice(None), *, stream: int = Stream.CODEC
    ) -> np.ndarray:
        """See `position_uniform`."""
        rows, tokens = self.rows[piece], self.tokens[piece]
        return position_uniform(seed, span, rows, tokens, stream=stream)


class Packed(NamedTuple):
    """What is stored of a slice of positions, and the mass that its teacher gave to unknown ids.

    Attributes:
        targets: of the positions.
        kept: codes of what the cache keeps of each position besides its target, by column.
        clipped: the mass, summed.
    """

    targets: SoftTargets
    kept: Mapping[str, np.ndarray]
    clipped: np.float32


def codes_of(
    values: Mapping[str, Tensor], noise: Callable[..., np.ndarray]
) -> dict[str, np.ndarray]:
    """Codes of what `of_positions` found, by column; and of what `answer_logprob` is the sum.

    Args:
        values: float32 [n], on the CPU.
        noise: the positions' numbers, asked as `Positions.noise` is.
    """
    codes = {
        name: encode(values[name].numpy(), noise(stream=stream))
        for name, (encode, stream) in _KEPT.items()
        if name in values
    }
    if "label_logprob" in codes:
        codes["answer_logprob"] = values["label_logprob"].numpy()
    return codes


def packing_threads(device: str, cores: int) -> int:
    """Threads that pack in parallel to the teacher: two if a GPU leaves a core free."""
    return 2 if device == "cuda" and cores > 2 else 1


class Packer:
    """Packs the encoded slices of one span while the device computes the next ones."""

    def __init__(self, writer: TargetWriter, seed: int, span: int, threads: int = 1) -> None:
        self.seed, self.span = seed, span
        self._writer = writer
        self._pool = futures.ThreadPoolExecutor(threads, thread_name_prefix="kdcache-pack")
        self._unpacked_slots = threading.BoundedSemaphore(_UNPACKED)

    def __enter__(self) -> Packer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def put(
        self, encoded: dict[str, Tensor], clipped: Tensor, positions: Positions, start: int
    ) -> futures.Future[Packed]:
        """Have a slice packed.

        Args:
            encoded: what the codec gave of it, and "label_logprob" and "entropy" float32 [n] where
                those are kept.
            clipped: scalar, probability of the slice outside the vocabulary, summed.
        """
        encoded = {**encoded, "clipped": clipped}
        host = {name: tensor.to("cpu", non_blocking=True) for name, tensor in encoded.items()}
        # Of a teacher that is spread over GPUs the last one encodes: each copy waits in the stream
        # of its own device.
        copied = []
        for device in {tensor.device for tensor in encoded.values() if tensor.is_cuda}:
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            copied.append(event)
        self._unpacked_slots.acquire()
        return self._pool.submit(self._pack, host, copied, positions, start)

    def _pack(
        self,
        host: dict[str, Tensor],
        copied: list[torch.cuda.Event],
        positions: Positions,
        start: int,
    ) -> Packed:
        try:
            for event in copied:
                event.synchronize()
            if not host["finite"].all():
                bad = start + int(host["finite"].int().argmin())
                raise UsageError(
                    f"the teacher gives NaN or infinite logits for span {self.span}, row "
                    f"{positions.rows[bad]}, position {positions.tokens[bad]}: nothing of this "
                    "span is cached. Try --dtype float32, or check the model."
                )
            clipped = np.float32(host.pop("clipped"))
            piece = slice(start, start + len(host["finite"]))
            noise = functools.partial(positions.noise, self.seed, self.span, piece)
            kept = codes_of(host, noise)
            targets = {name: values for name, values in host.items() if name not in kept}
            return Packed(self._writer.pack(targets), kept, clipped)
        finally:
            self._unpacked_slots.release()


def in_row_order(
    codec: Codec, packed: Sequence[Packed], numbers: Sequence[np.ndarray]
) -> tuple[SoftTargets, dict[str, np.ndarray]]:
    """Targets of a span and what is kept next to them in row-major order, from its batches.

    Args:
        codec: of the targets.
        packed: all slices.
        numbers: which position of the span, counted row by row, each position of them is.
    """
    if not packed:
        return SoftTargets.empty(codec), {
            **{name: encode([], []) for name, (encode, _) in _KEPT.items()},
            "answer_logprob": np.zeros(0, np.float32),
        }
    order = np.concatenate(numbers)
    inverse = np.empty(len(order), np.int64)
    inverse[order] = np.arange(len(order))
    targets = SoftTargets.concat([part.targets for part in packed]).take(inverse)
    kept = {
        name: np.concatenate([p.kept[name] for p in packed])[inverse] for name in packed[0].kept
    }
    return targets, kept


@dataclass
class SpanFigures:
    """What is done of a span in flight.

    Attributes:
        batches: of the whole span; 0 while it is read.
        batches_done: answered so far.
        teacher_seconds: spent on them so far, none of it counted for another span.
    """

    span: int
    records: int = 0
    batches: int = 0
    batches_done: int = 0
    positions: int = 0
    teacher_seconds: float = 0.0

    @property
    def share(self) -> float:
        """Share of the span that is answered, 0 to 1."""
        return self.batches_done / max(1, self.batches)


@dataclass(frozen=True)
class Pulse:
    """A worker's heartbeat.

    Attributes:
        idle: seconds without progress in the slowest span; 0 while there is none. A span that waits
            for its turn with the teacher does not count; the one that has it does.
        spans: those in flight.
    """

    idle: float = 0.0
    spans: tuple[SpanFigures, ...] = ()


class Steps:
    """The steps of a span: call it, or one of its methods, after each.

    Attributes:
        last: `time.monotonic()` of the last step; None while the span waits for its turn.
        answering: `time.perf_counter()` since which the source answers; None if it does not.
        teacher_seconds: of the answers, once they are there.
    """

    def __init__(self, span: int, check: Callable[[], None]) -> None:
        """Begin.

        Args:
            check: raises in a worker that was stopped.
        """
        self._check, self._now = check, SpanFigures(span)
        self.last: float | None = time.monotonic()
        self.answering: float | None = None
        self.teacher_seconds = 0.0

    def __call__(self) -> None:
        """A step of any kind."""
        self._check()
        self.last = time.monotonic()

    def record(self) -> None:
        """A record was read."""
        self._now.records += 1
        self()

    def begin(self, batches: int) -> None:
        """So many batches are left to be answered."""
        self._now.batches = self._now.batches_done + batches
        self()

    def batch(self, positions: int) -> None:
        """A batch with so many positions was answered."""
        self._now.batches_done += 1
        self._now.positions += positions

    def figures(self, running: float = 0.0) -> SpanFigures:
        """The counts; `running` are the seconds of an answer that has not ended."""
        return replace(self._now, teacher_seconds=self.teacher_seconds + running)
