"""Students that begin as their teacher with weights in 4 bits, or without some of its layers.

    kdcache train --student students:int4 ...     in this folder, with RECOVERY_TEACHER=FOLDER
    python students.py convert int4 RUN OUT       the trained weights, quantised by torchao
    python students.py prune TEACHER TEXT OUT     a folder without the layers that do least

Both quantisers are torchao's and leave embeddings and output layer alone, as transformers'
`TorchAoConfig` and llm-compressor's usual recipes do:

* `int4`: symmetric, a scale for each 32 weights of a row (`IntxWeightOnlyConfig`), prepared and
  converted by `QATConfig`;
* `nvfp4`: E2M1 numbers, an E4M3 scale for each 16 of a row and a float32 one for the tensor.
  torchao's own fake quantisation runs on Blackwell only, so a weight goes through `NVFP4Tensor`,
  what `NVFP4WeightOnlyConfig` converts to, and back; the gradient passes straight through (Bengio
  et al., arXiv 1308.3432). Activations stay as they are.

Layers are pruned by Block Influence (ShortGPT, arXiv 2403.03853): one minus the mean cosine between
what goes into a layer and what comes out of it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

GROUP, BLOCK = 32, 16
TEACHER = os.environ.get("RECOVERY_TEACHER", "teacher")


def teacher() -> Any:
    """The teacher, in float32."""
    return AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)


def layers_only(module: nn.Module, path: str, group: int = GROUP) -> bool:
    """Linear layers but the output layer, and those whose weights groups (of NVFP4: torchao's tiles
    of blocks) do not make up."""
    if not isinstance(module, nn.Linear) or path.endswith("lm_head"):
        return False
    return module.in_features % group == 0 and (group != BLOCK or module.out_features % BLOCK == 0)


# ------------------------------------------------------------------------------------------- int4


def int4_config() -> Any:
    """What torchao quantises to."""
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))


def int4(info: Any) -> Any:
    """The teacher with fake-quantised int4 weights."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    model = teacher()
    quantize_(model, QATConfig(int4_config(), step="prepare"), filter_fn=layers_only)
    return model


# ------------------------------------------------------------------------------------------ nvfp4


class _ThroughNvfp4(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

        scale = per_tensor_amax_to_scale(weight.abs().max())
        return NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale).dequantize(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Nvfp4Linear(nn.Linear):
    """A linear layer whose weight is what NVFP4 keeps of it; parameters have the usual names."""

    def forward(self, states: Tensor) -> Tensor:
        """As its parent."""
        return nn.functional.linear(states, _ThroughNvfp4.apply(self.weight), self.bias)


def nvfp4(info: Any) -> Any:
    """The teacher with fake-quantised NVFP4 weights."""
    model = teacher()
    for path, module in model.named_modules():
        if layers_only(module, path, BLOCK):
            module.__class__ = Nvfp4Linear
    return model


# --------------------------------------------------------------------------------- without a layer


@torch.no_grad()
def prune(folder: str, text: str, out: str, share: float = 0.1) -> list[int]:
    """Write a teacher without the layers of least Block Influence.

    Args:
        folder: the teacher's.
        text: JSON lines with `text`, of which the first passages are read.
        out: the student's folder.
        share: of its layers, rounded down, at least one.

    Returns:
        The layers that went.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    layers = model.model.layers
    influence, seen = torch.zeros(len(layers)), 0
    with open(text) as file:
        for line, _ in zip(file, range(16), strict=False):
            ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"][:, :256]
            states = model(ids, output_hidden_states=True).hidden_states
            for i in range(len(layers)):  # what comes out of the last has been through the norm
                near = nn.functional.cosine_similarity(states[i], states[i + 1], dim=-1)
                influence[i] += (1 - near).sum()
            seen += ids.numel()
    influence[-1] = torch.inf
    fewer = max(1, int(share * len(layers)))
    gone = sorted(influence.argsort()[:fewer].tolist())
    print(f"layers {gone} of {len(layers)} go, of influence {influence[gone] / seen}")
    kept = [layer for i, layer in enumerate(layers) if i not in gone]
    for i, layer in enumerate(kept):
        layer.self_attn.layer_idx = i
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [
            kind for i, kind in enumerate(model.config.layer_types) if i not in gone
        ]
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return gone


# ---------------------------------------------------------------------------------- after training


def convert(kind: str, run: str) -> Any:
    """A trained student with the weights that its quantiser makes of it, by transformers' loader.

    Args:
        kind: int4 or nvfp4.
        run: folder that `kdcache train` wrote.
    """
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig

    group = GROUP if kind == "int4" else BLOCK
    plain = AutoModelForCausalLM.from_pretrained(run)
    kept = [
        path
        for path, module in plain.named_modules()
        if isinstance(module, nn.Linear) and not layers_only(module, path, group)
    ]
    config = TorchAoConfig(
        int4_config() if kind == "int4" else NVFP4WeightOnlyConfig(), modules_to_not_convert=kept
    )
    return AutoModelForCausalLM.from_pretrained(
        run, dtype=torch.float32, quantization_config=config
    )


def main() -> None:
    """The commands of the module's docstring."""
    command, *words = sys.argv[1:] or [""]
    if command == "prune" and len(words) == 3:
        prune(*words)
    elif command == "convert" and len(words) == 3 and words[0] in ("int4", "nvfp4"):
        convert(*words[:2]).save_pretrained(words[2])
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
