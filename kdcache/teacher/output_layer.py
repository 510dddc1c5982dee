"""Takes the output layer out of a loaded teacher, and proves that it makes the teacher's logits.

`Projection` measures what the model's own forward does to what its layer gives: the layer answers
with random numbers from 0.01 to 500, so a soft-cap, a scale or a bias that real rows would hardly
show is found. What it names is kept; a model that does anything else is refused. Then the kept
layer is applied to the states of real rows and compared with the logits that the teacher gives.

Cost: four forwards over 8 tokens, and one of the rows.
Guarantee: `OutputLayer.logits(states)` are the teacher's own logits, up to the rounding of its
dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from kdcache.errors import UsageError
from kdcache.targets import OutputLayer
from kdcache.teacher.load import kept_loaded
from kdcache.teacher.probe import distance
from kdcache.teacher.projection import Projection

_INSTEAD = "Use --codec sample:N, topk:K or dense for this teacher."


def find_layer(model: Any, name: str, inputs: Mapping[str, Tensor], vocab_size: int) -> OutputLayer:
    """The output layer of a language model, on the CPU.

    Args:
        model: in evaluation mode.
        name: for messages.
        inputs: of a real row, of which some tokens are used.
        vocab_size: V; the layer's further rows are padding and left out.

    Raises:
        UsageError: the model's logits are not an output layer's product with its states, scaled
            and soft-capped by what its configuration names.
    """
    projection = Projection(model, inputs)
    linear = projection.layer
    if linear is None or projection.scale is None:
        raise UsageError(
            f"model {name} does more to its logits than a plain output layer, a scale and a "
            f"soft-cap that its configuration names, so they cannot be made of its hidden states. "
            f"{_INSTEAD}"
        )
    with kept_loaded(linear):
        weight, bias = (_kept(values, vocab_size) for values in (linear.weight, linear.bias))
    assert weight is not None, "a linear layer has a weight"
    if projection.offset is not None:
        offset = (projection.offset / projection.scale).to(weight)[:vocab_size].cpu()
        bias = offset if bias is None else bias + offset
    return OutputLayer(weight, bias, projection.scale, projection.cap)


def prove_layer(
    layer: OutputLayer, name: str, slices: Iterable[tuple[Tensor, Tensor | None]], tolerance: float
) -> None:
    """Compare a layer's logits with a model's own on real rows.

    Args:
        layer: the layer.
        name: of the model.
        slices: logits and states of the model.
        tolerance: share of the logits' spread that rounding may move them by.

    Raises:
        UsageError: they differ.
    """
    layer = replace(layer)  # copies in other dtypes go with it
    for logits, states in slices:
        assert states is not None, "a model that is asked for states gives them"
        own = logits.float().cpu()
        moved = distance([layer.logits(states.float().cpu())], [own])
        if moved > tolerance:
            raise UsageError(
                f"model {name}: its output layer applied to its hidden states gives other logits "
                f"than the model (they differ by {moved:.2g} of their spread). {_INSTEAD}"
            )


def _kept(values: Tensor | None, vocab_size: int) -> Tensor | None:
    if values is None:
        return None
    return values.detach()[:vocab_size].to("cpu").contiguous()
