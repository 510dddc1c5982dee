"""torchtitan (0.3) trains on a kdcache cache: data, tensor and sequence parallelism, chunked loss.

    PYTHONPATH=examples/torchtitan torchrun --nproc-per-node 8 -m torchtitan.train \
        --module distilled --config llama3_8b --parallelism.tensor_parallel_degree 4 \
        --dataloader.cache caches/lm --dataloader.temperature 2 --loss.alpha 0.1

Any other of its models: `distilled(CONFIG)` of its own configuration. Processes of one
tensor-parallel group read the same rows. Each has the logits of its slice of the ids, for a chunk
of the positions at a time, and kdcache's loss exchanges some numbers a position. torchtitan's
checkpoints keep the stream's state.

Context and pipeline parallelism are refused, as they cut the positions, and so are CUDA graphs,
which would go on with the first step's targets.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss, ChunkedLossWrapper
from torchtitan.models.llama3 import config_registry
from torchtitan.trainer import Trainer

import kdcache
from kdcache.loss import Anchor, VocabSlice


class CachedTargets(BaseDataLoader):
    """The rows of a cache, this data-parallel rank's share of each batch."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        cache: str = ""
        """A folder or URL that `kdcache build` made."""
        temperature: float = 1.0
        """Of the soft targets."""
        seed: int = 0
        """Of the order of rows."""
        streams: int | None = None
        """Stretches of the cache that are read side by side, on which the batches depend.
        Default: the data-parallel degree of the run's first start."""

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        seq_len: int,
        local_batch_size: int,
        **unused: Any,
    ) -> None:
        # A batch of the stream is one microbatch; torchtitan counts the positions of a step.
        self.seq_len = seq_len
        self.stream = kdcache.TargetStream(
            config.cache,
            batch_size=local_batch_size * dp_world_size,
            temperature=config.temperature,
            seed=config.seed,
            streams=config.streams,
            rank=dp_rank,
            world_size=dp_world_size,
            sum_over=lambda positions: positions,
        )

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for batch in self.stream.batches(sys.maxsize):
            ids, labels, targets = batch["input_ids"], batch["labels"], batch["targets"]
            if batch["count"].isinf():  # a share without rows holds one that counts nothing
                labels, targets = torch.full_like(labels, IGNORE_INDEX), targets[:0]
            rows, length = ids.shape
            if length > self.seq_len:
                raise ValueError(
                    f"a cached row has {length} tokens, training.seq_len is {self.seq_len}. "
                    f"Set it to at least {length}."
                )
            spare = (0, self.seq_len - length)
            begins = torch.arange(self.seq_len).expand(rows, -1)
            places = F.pad(batch["position_ids"], spare) if "position_ids" in batch else begins
            inputs = {"input": F.pad(ids, spare), "positions": places, "targets": targets}
            yield inputs, F.pad(labels, spare, value=IGNORE_INDEX)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:  # empty: a checkpoint of weights alone
            self.stream.load_state_dict(state_dict)


class ChunkLoss(BaseLoss):
    """kdcache's loss of a chunk of logits, of all ids or of this rank's."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        pass

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.alpha, self.vocab_size, self.anchor = 0.5, 0, Anchor()
        self.group: distributed.ProcessGroup | None = None
        self.cut: VocabSlice | None = None
        self.targets: Any = None

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        place: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits = (pred.to_local() if isinstance(pred, DTensor) else pred).flatten(0, 1)
        if self.group is not None and self.cut is None:
            self.cut = VocabSlice.of(self.group, logits.shape[-1], logits.device)
        at = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
        assert place is not None, "DistillationLoss gives it"
        parts = kdcache.distillation_loss(
            logits[at],
            labels.flatten()[at],
            self.targets[place.flatten()[at]],
            alpha=self.alpha,
            vocab_size=self.vocab_size,
            count=global_valid_tokens,
            anchor=self.anchor,
            group=self.cut,
        )
        return parts.total, {}


class DistillationLoss(ChunkedLossWrapper):
    """torchtitan's loop over chunks of the positions, with the targets of each."""

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        alpha: float = 0.5
        """Weight of the hard loss, 0 to 1."""
        loss_fn: BaseLoss.Config = field(default_factory=ChunkLoss.Config)

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        super().__init__(config, compile_config=compile_config)
        self.loss_fn.alpha = config.alpha

    def __call__(self, pred: Tensor, labels: Tensor, *counts: Any, **inputs: Any) -> Any:
        # Targets stand in the order of the positions: those whose label is not -100.
        place = (labels != IGNORE_INDEX).flatten().cumsum(0).view_as(labels) - 1
        return super().__call__(pred, labels, *counts, **{**inputs, "place": place})


class DistillationTrainer(Trainer):
    """torchtitan's own, which hands the targets of a microbatch to the loss."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    def __init__(self, config: Config) -> None:
        if not config.training.disable_cuda_graphs:
            raise ValueError("give --training.disable_cuda_graphs: the targets of steps differ")
        super().__init__(config)
        dims, inner = self.parallel_dims, self.loss_fn.loss_fn
        if dims.cp_enabled or dims.pp_enabled or dims.spmd_backend == "full_dtensor":
            raise ValueError("no context or pipeline parallelism, and not the full_dtensor backend")
        inner.group = dims.get_mesh("tp").get_group() if dims.tp_enabled else None
        inner.vocab_size = self.dataloader.stream.caches[0].spec.vocab_size

    def post_dataloading_process(
        self, input_dict: dict[str, Any], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        self.loss_fn.loss_fn.targets = input_dict.pop("targets").to(self.device)
        return super().post_dataloading_process(input_dict, labels)

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        super().train_step(data_iterator)
        dims = self.parallel_dims

        def over_rows(value: Tensor) -> Tensor:
            if dims.dp_enabled:
                distributed.all_reduce(value, group=dims.get_mesh("batch").get_group())
            return value

        self.loss_fn.loss_fn.anchor.update(over_rows)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "anchor": self.loss_fn.loss_fn.anchor.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.loss_fn.loss_fn.anchor.load_state_dict(state_dict["anchor"])


def distilled(base: Trainer.Config) -> DistillationTrainer.Config:
    """A configuration of torchtitan's, on cached targets and without its validation."""
    kept = {each.name: getattr(base, each.name) for each in dataclasses.fields(base)}
    kept["training"].disable_cuda_graphs = True
    kept["validator"].enable = False
    # The last checkpoint goes on as any other.
    kept["checkpoint"].last_save_model_only = False
    kept |= {"dataloader": CachedTargets.Config(), "loss": DistillationLoss.Config()}
    return DistillationTrainer.Config(**kept)


def llama3_8b() -> DistillationTrainer.Config:
    return distilled(config_registry.llama3_8b())


def llama3_70b() -> DistillationTrainer.Config:
    return distilled(config_registry.llama3_70b())
