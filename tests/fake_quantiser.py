"""A quantiser from the definition: symmetric int4, a scale for each GROUP weights of a row.

    code = clamp(round(w / s), -8, 7),  s = max |w| of the group / 7.5,  w' = code · s

`prepare` changes a model as torchao does before training: the gradient of w' is that of w.
`convert` is its own tool: from a folder with the trained weights to codes and scales, `save` and
`load` keep these and no more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

GROUP = 8


def codes_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [out, groups, GROUP] and float [out, groups, 1]."""
    groups = weight.detach().unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 7.5
    return (groups / scale).round().clamp(-8, 7).to(torch.int8), scale


def floats_of(codes: Tensor, scale: Tensor) -> Tensor:
    return (codes * scale).flatten(1)


def fake(weight: Tensor) -> Tensor:
    return weight + (floats_of(*codes_of(weight)) - weight).detach()


class FakeInt4Linear(nn.Linear):
    """Its weight is kept in floats and rounded in every forward."""

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, fake(self.weight), self.bias)


class Int4Linear(nn.Module):
    """What is left of a linear layer: codes and scales."""

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        codes, scale = codes_of(weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, floats_of(self.codes, self.scale))


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """All but the output layer."""
    every = dict(model.model.layers.named_modules(prefix="model.layers"))
    return {name: module for name, module in every.items() if isinstance(module, nn.Linear)}


def prepare(model: Any, *, head: bool = False) -> Any:
    for module in [*linear_layers(model).values(), *[model.lm_head] * head]:
        module.__class__ = FakeInt4Linear
    return model


def convert(model: Any) -> Any:
    for name, module in linear_layers(model).items():
        model.set_submodule(name, Int4Linear(module.weight))
    return model


def save(model: Any, folder: Path) -> None:
    model.config.save_pretrained(folder)
    save_model(model, str(folder / "int4.safetensors"))


def load(folder: Path) -> Any:
    empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model = convert(empty)
    load_model(model, folder / "int4.safetensors")
    return model.eval()
