"""What the HF Trainer needs to run over a stream: an epoch of batches, and an epoch's number.

The Trainer asks its data loader anew for each epoch, and counts epochs by the batches that it gets.
A stream reads ahead across epochs, and a resumed one begins within an epoch, so both are the
stream's own.

Batches are copied to a GPU on a CUDA stream of their own. On the stream of the training step a copy
waits until the step before is done, and the next step waits for the copy; on its own it runs while
the step before does, as the host launches a step faster than the GPU runs it. Cost: the memory of
one more batch. Guarantee: nothing of the step reads a batch before it is there, and its memory is
not used again before the step is done with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from kdcache.stream import Batch, TargetStream
from kdcache.tasks import TASKS, positions


class StreamLoader:
    """One epoch of the stream an iteration; reading continues across epochs."""

    def __init__(self, stream: TargetStream, steps: int) -> None:
        self.dataset = stream
        self._steps = steps
        self._batches: Iterator[Batch] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Batch]:
        stream = self.dataset
        if self._batches is None:
            self._batches = stream.batches(math.ceil(self._steps / stream.steps))
        epoch = stream.cursor.epoch
        while stream.cursor.epoch == epoch and stream.cursor.step < self._steps:
            batch = next(self._batches, None)
            if batch is None:
                return
            yield batch

    def close(self) -> None:
        """End the threads that read ahead."""
        if self._batches is not None:
            self._batches.close()  # type: ignore[attr-defined]


class CursorCallback(TrainerCallback):  # type: ignore[misc]
    """Keeps the Trainer's epoch and its window of logging right."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer  # a `DistillationTrainer`

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Continue the window of logging that a checkpoint was taken in."""
        if self._trainer.streams:
            self._trainer.begin_window()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Count the step, and set the epoch by the stream's cursor."""
        trainer = self._trainer
        trainer.end_anchors_step()
        if not trainer.streams:
            return
        trainer._parts_steps += 1
        cursor, rows = trainer.train_dataset.cursor, trainer.train_dataset.rows
        state.epoch = cursor.epoch + cursor.rows_seen / rows
        if state.global_step >= state.max_steps:
            control.should_log = True


class Copies:
    """Sends batches to one device; what is there already stays as it is."""

    def __init__(self, device: torch.device) -> None:
        """Make the stream, where the device has streams."""
        self._device = device
        stream: Any = torch.cuda.Stream
        self._stream = stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device; pinned memory is not waited for."""
        if self._stream is None:
            return dict(send_to_device(batch, self._device, non_blocking=True))
        step = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            sent = dict(send_to_device(batch, self._device, non_blocking=True))
        step.wait_stream(self._stream)
        recursively_apply(
            lambda value: value.record_stream(step),
            sent,
            test_type=lambda value: hasattr(value, "record_stream"),
        )
        return sent


def host_positions(labels: Tensor, task: str) -> Tensor | None:
    """Indices of the positions of the labels of tokens that are still on the host, else None.

    In pinned memory: they go to a GPU without a wait.
    """
    if not TASKS[task].per_token or labels.device.type != "cpu":
        return None
    found = positions(labels.reshape(-1), task).nonzero().squeeze(-1)
    return found.pin_memory() if torch.cuda.is_available() else found
