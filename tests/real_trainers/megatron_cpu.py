"""megatron-core on a CPU: `torchrun megatron_cpu.py FOLDER NAME SPLIT [STEP]`.

Its GPTModel, parallel state, schedule, data-parallel wrapper and optimizer train on FOLDER/cache
for 20 steps, or from the state of STEP on, with SPLIT processes to a copy of the model. What they
make on a GPU is made on the CPU instead.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.overrides import TorchFunctionMode

torch.cuda.current_device = lambda: torch.device("cpu")
torch.cuda.get_rng_state = torch.get_rng_state
torch.cuda.manual_seed = torch.manual_seed

from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import random
from megatron.core.transformer.transformer_config import TransformerConfig

random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "megatron"))
from distilled import CachedTargets, Distillation

STEPS, SAVED, MICROBATCHES, ROWS, LENGTH = 20, 10, 2, 4, 64


def student(split: int) -> Any:
    """A small Llama, its ids filled up to a multiple as Megatron does."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=8,
        num_query_groups=4,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=split,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=640,
        max_sequence_length=LENGTH,
        parallel_output=True,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    config.finalize_model_grads_func = finalize_model_grads
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model)


def main(folder: Path, name: str, split: int, start: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=split)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(0)
    model = student(split)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=2e-3, weight_decay=0.0, clip_grad=0.0), [model]
    )
    ranks = parallel_state.get_data_parallel_world_size()
    cache = str(folder / "cache")
    data = CachedTargets(cache, micro_batch_size=ROWS // ranks, seq_length=LENGTH, streams=2)
    distillation = Distillation(cache, alpha=0.25, anchor=0.5)
    state = folder / f"state-{parallel_state.get_tensor_model_parallel_rank()}.pt"
    if start:
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        data.stream.load_state_dict(saved["data"])
    losses = []
    for step in range(start + 1, STEPS + 1):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=distillation.forward_step,
            data_iterator=data,
            model=[model],
            num_microbatches=MICROBATCHES,
            seq_length=LENGTH,
            micro_batch_size=ROWS // ranks,
            forward_only=False,
        )
        optimizer.step()
        total = torch.stack([report["lm loss"] for report in reports]).sum(0)
        distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
        losses.append(float(total[0] / total[1]))
        if step == SAVED and parallel_state.get_data_parallel_rank() == 0:
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**parts, "data": data.save_state()}, state)
    if distributed.get_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(losses))
    distributed.destroy_process_group()


class OnCpu(TorchFunctionMode):
    """Tensors that Megatron makes on the GPU are made here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device", "")) == "cuda":
            kwargs["device"] = "cpu"
        return args[0] if func is torch.Tensor.cuda else func(*args, **kwargs)


if __name__ == "__main__":
    with OnCpu():
        main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int((sys.argv[4:] or ["0"])[0]))
