"""The threads of a stream, what they hand to each other, and a sum over the workers of a training.

`Background` runs an iterable in a thread, a bounded number of items ahead of its consumer.
Guarantee: items in order, errors raised where the items are taken, no thread left after `close`.

A sum over the workers of a training, for the count that a step's loss is divided by.

A worker that reads only its share of a global batch cannot count the positions of all of it. One
number is summed a step, next to the gradients: 8 bytes, in the thread that takes the batches.
Guarantee: whole numbers are added, so every worker gets the same count, whatever their number.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed

from kdcache.cache.shard import ShardData
from kdcache.errors import UsageError
from kdcache.stream.batch import Batch
from kdcache.stream.order import Cursor
from kdcache.stream.shard_rows import ShardRows

T = TypeVar("T")


class Background(Generic[T]):
    """Runs an iterable in a thread, at most `ahead` items before the consumer."""

    def __init__(self, items: Iterable[T], ahead: int, name: str) -> None:
        self._change = threading.Condition()
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._done = self._closed = False
        self._ahead = ahead
        self._thread = threading.Thread(target=self._work, args=(items,), name=name, daemon=True)
        self._thread.start()

    def _work(self, items: Iterable[T]) -> None:
        iterator = iter(items)
        try:
            while True:
                with self._change:
                    self._change.wait_for(lambda: self._closed or len(self._ready) < self._ahead)
                    if self._closed:
                        return
                item = next(iterator, self)
                if item is self:
                    return
                with self._change:
                    self._ready.append(item)  # type: ignore[arg-type]
                    self._change.notify_all()
                del item  # the consumer alone decides how long it lives
        except BaseException as error:
            self._error = error
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()
            with self._change:
                self._done = True
                self._change.notify_all()

    def __iter__(self) -> Background[T]:
        return self

    def __next__(self) -> T:
        with self._change:
            self._change.wait_for(lambda: self._ready or self._done)
            if self._ready:
                item = self._ready.popleft()
                self._change.notify_all()
                return item
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        raise StopIteration

    def close(self) -> None:
        """End the thread and drop the items that are ready."""
        with self._change:
            self._closed = True
            self._ready.clear()
            self._change.notify_all()
        self._thread.join()


@dataclass
class Group:
    """Decoded shards of one group of a stream.

    Attributes:
        first: row of the stream that the first of `rows` is.
        rows: rows of `pool` in the stream's order, all of one epoch.
    """

    stream: int
    first: int
    rows: np.ndarray
    pool: ShardRows

    @property
    def end(self) -> int:
        """Row of the stream after the last."""
        return self.first + len(self.rows)


@dataclass
class Made:
    """A batch of a slice, and what the thread that takes it does with it.

    Attributes:
        positions: what this worker adds to the count; None where the batch has its count.
        after: the cursor after it; None unless it is the last slice of its step.
        left_out: int64 [2], see `TargetStream.left_out`, of its rows.
    """

    batch: Batch
    positions: int | None
    empty: bool
    first: bool
    after: Cursor | None
    left_out: np.ndarray


@dataclass
class Parts:
    """Rows of one step as they are read.

    Attributes:
        bounds: of this worker's slices among the rows of the step.
        slices: of each slice its rows so far, a pool at a time.
    """

    bounds: np.ndarray
    slices: list[list[ShardData]] = field(init=False)
    done: int = 0
    positions: int = 0

    def __post_init__(self) -> None:
        self.slices = [[] for _ in self.bounds[1:]]

    def add(self, pool: ShardRows, rows: np.ndarray) -> None:
        """Take in the next rows, and pick those that are in a slice."""
        self.positions += int(pool.positions[rows].sum())
        bounds = np.maximum(self.bounds - self.done, 0)
        for i, part in enumerate(self.slices):
            mine = rows[bounds[i] : bounds[i + 1]]
            if len(mine):
                part.append(pool.take(mine))
        self.done += len(rows)


class SumOverRanks:
    """Adds up a whole number over the processes of a torch.distributed group.

    With a backend for GPUs alone (nccl) the sum stays on the GPU, and the host does not wait.
    """

    def __init__(self, group: Any = None) -> None:
        """Name the group.

        Args:
            group: of the workers that take different rows, such as `mesh["dp"].get_group()` where
                workers of a tensor-parallel group take the same. Default: all processes.
        """
        self._group = group

    def check(self, world_size: int) -> None:
        """Refuse a group of another size than the number of workers.

        Raises:
            UsageError: it is, or torch.distributed is not set up.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            raise UsageError(
                f"each of {world_size} workers reads its share of a batch, whose positions are "
                "summed by torch.distributed, which is not set up here. Call "
                "torch.distributed.init_process_group first, give the stream a sum_over of your "
                "own, or use streams=1, with which every worker reads the whole cache."
            )
        size = distributed.get_world_size(self._group)
        if size != world_size:
            raise UsageError(
                f"the stream has world_size={world_size}, but its counts would be summed over "
                f"{size} processes. Use sum_over=SumOverRanks(group) with the group of the "
                "workers that take different rows."
            )

    def __call__(self, number: int) -> Tensor:
        """The sum, int64 []; every worker of the group must call at the same step."""
        backends = distributed.get_backend_config(self._group)
        device = "cpu" if "cpu:" in backends else torch.accelerator.current_accelerator()
        # Filled there: a copy from the host would make it wait for what the device has to do.
        total = torch.full((), number, dtype=torch.int64, device=device)
        distributed.all_reduce(total, group=self._group)
        return total
