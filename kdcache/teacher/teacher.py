"""Logits of the requested positions, from the models of one worker.

Cost: one forward of the base model a batch; the vocabulary is projected in slices of positions,
only where a position is requested, so `[positions, vocabulary]` never exists whole.
Guarantee: ids outside the tokenizer's vocabulary (padded output layers) are cut off before the
softmax.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.rows import Row
from kdcache.tasks import positions
from kdcache.teacher.load import compile_layers, input_device, load_models
from kdcache.teacher.memory import gpus_of
from kdcache.teacher.options import TeacherOptions

logger = logging.getLogger(__name__)

_SLICE_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}


class Teacher:
    """The loaded models of one worker, seen as one."""

    def __init__(self, options: TeacherOptions, vocab_size: int) -> None:
        """Load the models.

        Args:
            options: which models, and how.
            vocab_size: width of the logits to give: output columns beyond it are cut off.
        """
        self.options = options
        self.vocab_size = vocab_size
        self._models = load_models(options)
        self._direct = [options.causal and _head_is_plain(model) for model in self._models]
        if options.compile:
            for model in self._models:
                compile_layers(model)
        self.device = input_device(self._models[0])
        self._clipped_mass = torch.zeros((), device=self.device)

    @property
    def gpus(self) -> tuple[torch.device, ...]:
        """The GPUs that its models lie on."""
        return gpus_of(self._models)

    @torch.inference_mode()
    def logits(self, rows: Sequence[Row]) -> Iterator[Tensor]:
        """Logits of all positions of one batch of rows, in row-major order.

        Args:
            rows: the batch; rows of similar length waste the least.

        Yields:
            [n, vocab_size] slices on the teacher's device, together one row a position.
        """
        batch = self._batch(rows)
        if len(self._models) == 1:
            yield from self._slices(0, batch)
            return
        parts = [self._slices(i, batch) for i in range(len(self._models))]
        for slices in zip(*parts, strict=True):
            yield self._mean(slices)

    def _mean(self, slices: tuple[Tensor, ...]) -> Tensor:
        weights = self.options.weights
        slices = tuple(z.to(slices[0].device) for z in slices)
        if self.options.ensemble == "mean-logits":
            return torch.stack([w * z.float() for w, z in zip(weights, slices, strict=True)]).sum(0)
        # Log of the mean probability serves as logits: their softmax at T = 1 is that mean.
        logs = [z.float().log_softmax(-1) + np.log(w) for w, z in zip(weights, slices, strict=True)]
        return torch.logsumexp(torch.stack(logs), 0)

    def take_clipped_mass(self) -> Tensor:
        """Probability the teacher gave to ids beyond the vocabulary since the last call, summed.

        Returns:
            A float32 scalar on the teacher's device: reading it waits for all batches so far.
        """
        total = self._clipped_mass
        self._clipped_mass = torch.zeros((), device=self.device)
        return total

    def _batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Right-padded tensors on the device; `wanted` indexes the positions of the flat batch."""
        width = max(len(row.input_ids) for row in rows)
        input_ids = np.zeros((len(rows), width), np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        type_ids = np.zeros((len(rows), width), np.int64)
        wanted = np.zeros((len(rows), width), bool)
        for i, row in enumerate(rows):
            length = len(row.input_ids)
            input_ids[i, :length] = row.input_ids
            mask[i, :length] = 1
            if self.options.causal:
                wanted[i, :length] = positions(row.labels, self.options.task)
            if row.type_ids is not None:
                type_ids[i, :length] = row.type_ids
        # Indexing by a mask would make the host wait for the device to count it.
        batch = {"input_ids": input_ids, "wanted": np.flatnonzero(wanted)}
        if not self.options.causal:
            batch["attention_mask"] = mask
        if rows[0].type_ids is not None:
            batch["token_type_ids"] = type_ids
        return {name: self.to_device(torch.from_numpy(a)) for name, a in batch.items()}

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy to where inputs go, without waiting for what the device has still to do."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _slices(self, index: int, batch: dict[str, Tensor]) -> Iterator[Tensor]:
        model = self._models[index]
        inputs = {name: value for name, value in batch.items() if name != "wanted"}
        if not self.options.causal:
            yield model(**inputs).logits[:, : self.vocab_size]
            return
        # Rows are padded on the right, where causal attention never looks: no mask is needed, and
        # without one the fastest attention kernels apply.
        if not self._direct[index]:
            logits = model(**inputs, use_cache=False).logits
            wanted = batch["wanted"].to(logits.device)
            yield self._cut(logits.flatten(0, 1).index_select(0, wanted))
            return
        hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        head = model.get_output_embeddings()
        # The layers of a model that is spread move what they are given to their own devices; the
        # last one may live on another than the first.
        hidden = hidden.flatten(0, 1).index_select(0, batch["wanted"].to(hidden.device))
        step = max(1, _SLICE_BYTES[hidden.device.type] // (4 * head.weight.shape[0]))
        for start in range(0, len(hidden), step):
            yield self._cut(head(hidden[start : start + step]))

    def _cut(self, logits: Tensor) -> Tensor:
        if logits.shape[-1] <= self.vocab_size:
            return logits
        inside, outside = logits[:, : self.vocab_size], logits[:, self.vocab_size :]
        total = torch.logsumexp(logits.float(), -1)
        mass = (torch.logsumexp(outside.float(), -1) - total).exp().sum()
        self._clipped_mass += mass.to(self._clipped_mass.device)
        return inside


@torch.inference_mode()
def _head_is_plain(model: Any) -> bool:
    """Whether logits are the output layer applied to the decoder's last hidden state, and no more.

    Soft-capping (Gemma 2) and logit scaling (Granite, Cohere) happen after the layer: found by
    comparing with the model's own forward on a few ids, rather than from a list of architectures.
    """
    with suppress(AttributeError, NotImplementedError):
        decoder, head = model.get_decoder(), model.get_output_embeddings()
        if decoder is None or head is None or decoder is model:
            return False
        device = input_device(model)
        ids = torch.arange(8, device=device)[None] % int(model.config.get_text_config().vocab_size)
        want = model(input_ids=ids, use_cache=False).logits.float()
        got = head(decoder(input_ids=ids, use_cache=False).last_hidden_state)
        got = got.float().to(want.device)
        # A broken model gives NaN here too: the build reports it later, with the position.
        scale = float(want.nan_to_num(0, 0, 0).abs().max())
        plain = torch.allclose(got, want, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)
        if not plain:
            logger.info(
                "%s changes logits after its output layer: its own forward is used", type(model)
            )
        return plain
    return False
