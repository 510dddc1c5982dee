"""torchtitan on a CPU, `torchrun titan_cpu.py OPTIONS`: stories260k as a Llama of its own.

torchtitan takes a machine without a GPU for one with CUDA, and attends with kernels for GPUs alone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

torch._utils._get_available_device_type = lambda: "cpu"
for name, answer in {
    "get_device_name": "CPU",
    "get_device_properties": SimpleNamespace(total_memory=1),
    "memory_stats": {},
    "reset_peak_memory_stats": None,
    "empty_cache": None,
}.items():
    setattr(torch.cpu, name, lambda *_, answer=answer: answer)

from torchtitan import train
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.distributed import fsdp, utils
from torchtitan.models import llama3
from torchtitan.models.common import Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.rope import ComplexRoPE

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "torchtitan"))
import distilled


def tiny() -> distilled.DistillationTrainer.Config:
    """The sizes of stories260k."""
    dim, vocab = 64, 512
    layers = llama3._build_llama3_layers(
        n_layers=5,
        dim=dim,
        n_heads=8,
        n_kv_heads=4,
        hidden_dim=172,
        rope=ComplexRoPE.Config(dim=8, max_seq_len=512, theta=10000.0),
        fuse_qkv=False,
        attn_backend="flex",
    )
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
        layer.attention_norm.eps = layer.ffn_norm.eps = 1e-5
    spec = llama3.model_registry("debugmodel")
    spec.model = llama3.Llama3Model.Config(
        dim=dim,
        vocab_size=vocab,
        enable_weight_tying=True,
        tok_embeddings=Embedding.Config(
            num_embeddings=vocab, embedding_dim=dim, param_init=llama3._EMBEDDING_SKIP_INIT
        ),
        norm=RMSNorm.Config(normalized_shape=dim, param_init=llama3._NORM_INIT),
        lm_head=Linear.Config(
            in_features=dim, out_features=vocab, param_init=llama3._output_linear_init(dim)
        ),
        layers=layers,
    )
    config = distilled.distilled(llama3.config_registry.llama3_debugmodel())
    config.model_spec = spec
    return config


def sum_gradients(model: torch.nn.Module) -> None:
    """As torchtitan does, by a sum that gloo has."""
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def log(self: Any, step: int, loss: float, *rest: Any, **more: Any) -> None:
    if torch.distributed.get_rank() == 0:
        with Path(os.environ["KDCACHE_LOSSES"]).open("a") as file:
            file.write(json.dumps({"step": step, "loss": loss}) + "\n")


if __name__ == "__main__":
    MetricsProcessor.log = log
    fsdp.disable_fsdp_gradient_division = sum_gradients
    utils.set_pg_timeouts = lambda **_: None  # its barrier names a device, which gloo refuses
    sys.modules["titan_cpu"] = sys.modules["__main__"]
    sys.argv += ["--module", "titan_cpu", "--config", "tiny"]
    train.main()
