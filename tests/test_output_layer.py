"""A teacher's output layer, taken out of it, makes the teacher's own logits of its states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_probe import rows
from torch import Tensor
from transformers import AutoModelForCausalLM
from zoo import CAUSAL, Species

from kdcache.errors import UsageError
from kdcache.targets import OutputLayer
from kdcache.tasks import CAUSAL_LM
from kdcache.teacher import Slice, TeacherOptions
from kdcache.teacher.model import TeacherModel
from kdcache.teacher.probe import prove_layer

SPECIES = {str(one): one for one in CAUSAL}
KEPT = {  # plain, wider than its vocabulary, biased, scaled, own forward, soft-capped
    **{"llama": (1.0, None), "llama-padded": (1.0, None), "phi": (1.0, None)},
    **{"cohere-scaled": (0.25, None), "granite-scaled": (0.125, None)},
    **{"gemma2": (1.0, 30.0), "gemma2-strong-capping": (1.0, 2.0)},
    **{"bert-decoder": (1.0, None), "opt-projection": (1.0, None)},
}


def teacher_of(species: Species) -> TeacherModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(species.config()).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return TeacherModel(model, str(species), TeacherOptions(("t",), "causal-lm", states=True), 300)


@pytest.mark.parametrize("name", KEPT)
@torch.inference_mode()
def test_logits_of_the_states_are_the_models_own(name: str) -> None:
    one, some = teacher_of(SPECIES[name]), rows(40, 31, 31, 7)
    one.probe(some)
    assert one.layer is not None
    assert (one.layer.scale, one.layer.cap) == KEPT[name]
    assert one.layer.vocab_size == 300
    slices = list(one.slices(some))
    want = [one.model(input_ids=torch.from_numpy(r.input_ids)[None].long()).logits[0] for r in some]
    got = torch.cat([one.layer.logits(states) for _, states in slices])
    torch.testing.assert_close(got, torch.cat(want)[:, :300], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, torch.cat([z for z, _ in slices]), rtol=1e-5, atol=1e-5)


def edited(change: Callable[[Tensor], Tensor]) -> TeacherModel:
    """A language model that does something to its logits that its configuration does not name."""
    one = teacher_of(SPECIES["llama"])

    class Edited(type(one.model)):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
            outputs = super().forward(input_ids, **inputs)
            outputs.logits = change(outputs.logits)
            return outputs

    one.model.__class__ = Edited
    return one


# `tests/test_projection.py` has more of them, for the same measurement.
@pytest.mark.parametrize("change", [lambda z: 0.5 * z, lambda z: 30 * torch.tanh(z / 30)])
def test_a_model_that_does_anything_else_to_its_logits_is_refused(
    change: Callable[[Tensor], Tensor],
) -> None:
    with pytest.raises(UsageError, match=r"model llama does more .* Use --codec sample:N"):
        edited(change).probe(rows(20, 9))


def test_a_layer_of_other_logits_is_refused() -> None:
    layer = OutputLayer(torch.randn(9, 4), torch.randn(9), scale=0.5, cap=3.0)
    states = torch.randn(5, 4)
    own = 3 * torch.tanh((states @ layer.weight.T + layer.bias) * 0.5 / 3)
    torch.testing.assert_close(layer.logits(states), own)
    prove_layer(layer, "m", [Slice(own, states)], 1e-3)
    with pytest.raises(UsageError, match="model m: its output layer .* gives other logits"):
        prove_layer(layer, "m", [Slice(own, states), Slice(own.roll(1, 0), states)], 1e-3)


def test_precision_of_a_layer_follows_its_states() -> None:
    layer = OutputLayer(torch.randn(9, 4).bfloat16())
    for dtype, wide in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        states = torch.randn(5, 4).to(dtype)
        got = layer.logits(states)
        assert got.dtype == wide
        torch.testing.assert_close(got, states.to(wide) @ layer.weight.to(wide).T)


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({"weight": torch.zeros(3)}, "weight"),
        ({"weight": torch.zeros(3, 2, dtype=torch.int64)}, "weight"),
        ({"bias": torch.zeros(2)}, "bias"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": 0.0}, "scale"),
        ({"cap": -1.0}, "cap"),
        ({"mean": torch.zeros(2)}, "only one"),
        ({"mean": torch.zeros(2), "unit": torch.zeros(2)}, "unit"),
        ({"mean": torch.zeros(3), "unit": torch.ones(2)}, "mean"),
    ],
)
def test_layers_that_cannot_be(parts: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        OutputLayer(**{"weight": torch.zeros(3, 2), **parts})


def test_states_are_of_one_language_model(tiny_lm: Path) -> None:
    name = str(tiny_lm)
    for other in (
        {"names": (name, name), "weights": (0.5, 0.5)},
        {"task": "sequence-classification"},
    ):
        with pytest.raises(UsageError, match="one language model"):
            TeacherOptions(**{"names": (name,), "task": CAUSAL_LM, "states": True, **other})
