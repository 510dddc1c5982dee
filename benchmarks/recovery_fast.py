"""torchao's fake quantisers in fewer passes over the weights: what a training on a CPU needs.

torchao 0.18 makes some 20 tensors of the size of a weight for int4 and 40 for NVFP4, in each
forward pass: with SmolLM2-135M 9 to 20 s of CPU time a step, where the model itself needs 5 for
1,024 positions in bfloat16. These take 4 and 9 tensors, in place: 0.5 s. The first weights of a
student are compared with torchao's own: values must be equal to the bit, gradients up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

GROUP, BLOCK = 32, 16
LOWEST, HIGHEST = -8, 7
MOST_E2M1, MOST_E4M3 = 6.0, 448.0


class Int4(torch.autograd.Function):
    """Symmetric int4, a scale for each 32 weights of a row; the gradient passes straight through,
    but where 8 was rounded to and 7 is the highest."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        """[n, m] to what is left of it."""
        x = weight.view(-1, GROUP)
        low, high = x.aminmax(dim=1, keepdim=True)
        half = torch.maximum(-low, high)
        scale = (half / ((HIGHEST - LOWEST) / 2)).clamp_min_(torch.finfo(x.dtype).eps)
        q = (x * (1.0 / scale)).round_()
        ctx.save_for_backward(q <= HIGHEST)
        return q.clamp_(LOWEST, HIGHEST).mul_(scale).view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Of a weight."""
        (inside,) = ctx.saved_tensors
        return gradient * inside.view_as(gradient)


class Nvfp4(torch.autograd.Function):
    """E2M1 numbers, an E4M3 scale for each 16 of a row, a float32 one for the tensor; the gradient
    passes straight through."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        """[n, m] to what is left of it."""
        x = weight.view(-1, BLOCK)
        low, high = x.aminmax(dim=1, keepdim=True)
        most = torch.maximum(-low, high)
        whole = most.max() / (MOST_E4M3 * MOST_E2M1)
        scale = (most / MOST_E2M1 / whole).clamp_(2**-6, MOST_E4M3)
        scale = scale.to(torch.float8_e4m3fn).float()
        y = x * ((1.0 / whole) / scale)
        # The power of two below a number, from its bits: E2M1 has two numbers from one to the next.
        step = (y.view(torch.int32) & 0x7F800000).view(torch.float32).mul_(0.5).clamp_(0.5, 2.0)
        y.div_(step).round_().mul_(step).clamp_(-MOST_E2M1, MOST_E2M1)
        return y.mul_(whole * scale).view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Of a weight."""
        return gradient


class _Int4Module(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        found: Tensor = Int4.apply(weight)
        return found


class _FastNvfp4Linear(nn.Linear):
    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, Nvfp4.apply(self.weight), self.bias)


def _outcome(layer: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer makes of states, and its weight's gradient."""
    made = layer(states)
    (gradient,) = torch.autograd.grad(made.square().sum(), [layer.weight])
    return made.detach(), gradient


def quicken(model: nn.Module, nvfp4: type[nn.Module], compared: int = 7) -> nn.Module:
    """Replace a student's fake quantisers by these.

    Args:
        model: what the example's `int4` or `nvfp4` returned; changed in place.
        nvfp4: the example's layer.
        compared: so many layers are compared first.

    Returns:
        `model`.

    Raises:
        AssertionError: they differ.
    """
    module: Any
    for module in list(model.modules()):
        quantiser = getattr(module, "weight_fake_quantizer", None)
        if quantiser is None and type(module) is not nvfp4:
            continue
        module.requires_grad_(True)
        states = torch.eye(module.in_features)[: 2 * BLOCK]
        before = _outcome(module, states) if compared > 0 else None
        if quantiser is not None:
            module.weight_fake_quantizer = _Int4Module()
        else:
            module.__class__ = _FastNvfp4Linear
        if before is not None:
            after = _outcome(module, states)
            assert torch.equal(before[0], after[0]), "other numbers than torchao's"
            torch.testing.assert_close(before[1], after[1], rtol=1e-5, atol=0)
        compared -= 1
    return model
