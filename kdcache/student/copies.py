"""Copies of batches to a GPU, on a CUDA stream of their own.

On the stream of the training step a copy waits until the step before is done, and the next step
waits for the copy. On a stream of its own it runs while the step before does: the host launches a
step faster than the GPU runs it.

Cost: the memory of one more batch. Guarantee: nothing of the step reads a batch before it is there,
and its memory is not used again before the step is done with it.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device

from kdcache.stream import Batch


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
