"""Megatron (megatron-core 0.16) trains on a kdcache cache: external data loader and loss function.

In a training script of Megatron-LM, with `--dataloader-type external --calculate-per-token-loss`:

    def datasets(numbers):
        args = get_args()
        return CachedTargets("caches/lm", micro_batch_size=args.micro_batch_size,
                             seq_length=args.seq_length, temperature=2.0), None, None

    datasets.is_distributed = True  # each rank reads for itself
    pretrain(datasets, model_provider, ModelType.encoder_or_decoder,
             Distillation("caches/lm", alpha=0.1).forward_step)

Ranks of one tensor- or pipeline-parallel group read the same rows, so nothing is broadcast. Each
has the logits of its slice of the ids, and kdcache's loss exchanges some numbers a position.
Context parallelism would cut the positions and is refused. Only with the loss per token is a step's
loss divided by all its positions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

import kdcache
from kdcache.loss import Anchor, VocabSlice

NO_LABEL = -100


class CachedTargets:
    """Microbatches of this data-parallel rank.

    Attributes:
        stream: its `state_dict` and `load_state_dict` are the state of the data.
    """

    def __init__(
        self,
        cache: str,
        *,
        micro_batch_size: int,
        seq_length: int,
        temperature: float = 1.0,
        seed: int = 0,
        streams: int | None = None,
    ) -> None:
        ranks = parallel_state.get_data_parallel_world_size()
        self.seq_length = seq_length
        self.batches: Iterator[Any] | None = None
        # A batch of the stream is one microbatch; Megatron counts the positions of a step.
        self.stream = kdcache.TargetStream(
            cache,
            batch_size=micro_batch_size * ranks,
            temperature=temperature,
            seed=seed,
            streams=streams,
            rank=parallel_state.get_data_parallel_rank(),
            world_size=ranks,
            sum_over=lambda positions: positions,
        )

    def __iter__(self) -> CachedTargets:
        return self

    def __next__(self) -> dict[str, Any]:
        if self.batches is None:
            self.batches = self.stream.batches(sys.maxsize)
        batch = next(self.batches)
        ids, labels, targets = batch["input_ids"], batch["labels"], batch["targets"]
        if "position_ids" in batch:
            raise ValueError(
                "rows of several documents need a mask; build without --attend document"
            )
        if ids.shape[1] > self.seq_length:
            raise ValueError(
                f"a cached row has {ids.shape[1]} tokens, --seq-length is {self.seq_length}. "
                f"Set it to at least {ids.shape[1]}."
            )
        if batch["count"].isinf():  # a share without rows holds one that counts nothing
            labels, targets = labels.new_full(labels.shape, NO_LABEL), targets[:0]
        spare = (0, self.seq_length - ids.shape[1])
        return {
            "tokens": F.pad(ids, spare),
            "labels": F.pad(labels, spare, value=NO_LABEL),
            "targets": targets,
        }

    def save_state(self) -> dict[str, int]:
        """What Megatron-LM keeps with `--dataloader-save`."""
        return self.stream.state_dict()


class Distillation:
    """The forward step and its loss.

    Args:
        cache: the folder or URL of the loader's cache.
        alpha: weight of the hard loss, 0 to 1.
        anchor: theta of an `anchored` cache's targets. It is fixed, because Megatron has no hook at
            the end of a step; 0 uses the samples alone.
    """

    def __init__(self, cache: str, *, alpha: float = 0.5, anchor: float = 0.0) -> None:
        self.vocab_size = kdcache.Cache.open(cache).spec.vocab_size
        self.alpha, self.anchor = alpha, Anchor(anchor)
        self.cut: VocabSlice | None = None

    def forward_step(self, data_iterator: Any, model: Any) -> tuple[Tensor, Any]:
        """Megatron's `forward_step_func`."""
        if parallel_state.get_context_parallel_world_size() > 1:
            raise ValueError("context parallelism cuts the positions; use tensor parallelism")
        batch = next(data_iterator)
        device = next(model.parameters()).device
        batch = {name: value.to(device) for name, value in batch.items()}
        tokens = batch["tokens"]
        places = tokens.new_ones(tokens.shape).cumsum(1) - 1
        return model(tokens, places, None), partial(self.loss, batch)

    def loss(self, batch: dict[str, Any], logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Of logits [B, L, ids of this rank]: the sum over positions, their number, the log."""
        if parallel_state.get_tensor_model_parallel_world_size() > 1 and self.cut is None:
            group = parallel_state.get_tensor_model_parallel_group()
            self.cut = VocabSlice.of(group, logits.shape[-1], logits.device)
        labels = batch["labels"].flatten()
        at = (labels != NO_LABEL).nonzero().squeeze(1)
        loss = kdcache.distillation_loss(
            logits.flatten(0, 1)[at],
            labels[at],
            batch["targets"],
            alpha=self.alpha,
            vocab_size=self.vocab_size,
            count=1.0,
            anchor=self.anchor,
            group=self.cut,
        ).total
        number = (labels != NO_LABEL).sum().int()
        return loss, number, {"lm loss": loss.detach().new_tensor([loss.item(), number.item()])}
