"""The output layer of a model that an engine runs, from the model's files.

The model's own class is loaded without its layers: embedding, final norm and output layer are all
that is read, by the names that transformers knows, tied or not. What the class's own forward then
makes of the layer's answers is measured as for any teacher (`kdcache.teacher.probe`).

Cost: reading the embedding and the output layer. Guarantee: the logits of a state are those that
transformers would make of it; a model for which this cannot be shown is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import UsageError, reason_of
from kdcache.pretrained import quiet_transformers
from kdcache.targets import OutputLayer
from kdcache.targets.device import outside_mass
from kdcache.targets.output_layer import finish_
from kdcache.tasks import CAUSAL_LM
from kdcache.teacher.files import TeacherFiles, auto_class
from kdcache.teacher.load import input_device
from kdcache.teacher.memory import Slice, slice_positions
from kdcache.teacher.probe import find_layer

_INSTEAD = "Use --engine transformers for this teacher."
_IDS = np.arange(8, dtype=np.int32)
_OTHER = 0.05  # rounding of bfloat16 moves a normed state by less


@dataclass(frozen=True)
class Head:
    """What follows the layers of a model.

    Attributes:
        layer: its output layer, with all columns.
        norm: the model without its layers; None if that is not a norm alone.
    """

    layer: OutputLayer
    norm: Any

    def unlike_normed(self, states: Tensor) -> float:
        """How far states are from those that the final norm gives, as a share of their size.

        A norm forgets the size of its input, so applied to what it gave without its own weights it
        gives the same again. States from before it, or of another layer, would not pass.

        Args:
            states: float [n, D].
        """
        return 0.0 if self.norm is None else _apart(self.norm, states)

    def slices(
        self, states: Tensor, vocab_size: int, *, keep: bool = True
    ) -> Iterator[tuple[Slice, Tensor]]:
        """The logits of states, a slice at a time.

        Args:
            states: float [n, D], on the device and in the dtype of the product.

        Yields:
            Slices, and float32 [n], the probability that each position gives to what is cut off.
        """
        weight, bias = self.layer.on(states.device, states.dtype)
        step = slice_positions(states.device.type, len(weight), states.element_size())
        for some in torch.split(states, step):
            logits = torch.nn.functional.linear(some, weight, bias)
            finish_(logits, self.layer.scale, self.layer.cap)
            outside = torch.zeros(len(some), device=some.device)
            if logits.shape[-1] > vocab_size:
                outside = outside_mass(logits, vocab_size)
            yield Slice(logits[:, :vocab_size], some if keep else None), outside


def read_head(files: TeacherFiles, dtype: str) -> Head:
    """Read what follows a model's layers.

    Raises:
        UsageError: it cannot be shown that these are all, and how they make logits.
    """
    model, others = _without_layers(files, dtype)
    name = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), None)
    stem = None if name is None else f"{name.rpartition('.')[2]}."
    odd = [] if stem is None else [key for key in others if stem in key]
    if odd:
        raise UsageError(
            f"{files.who}: its output layer is stored as {min(odd)}, which is not read. {_INSTEAD}"
        )
    columns = int(model.config.get_text_config().vocab_size)
    ids = torch.from_numpy(_IDS % columns).long()[None].to(input_device(model))
    try:
        layer = find_layer(model, files.name, {"input_ids": ids}, columns)
    except (
        UsageError,
        AttributeError,
        NotImplementedError,
        RuntimeError,
        ArithmeticError,
    ) as error:
        raise UsageError(
            f"{files.who}: what it makes of its hidden states cannot be measured without "
            f"its layers, so an engine that gives states cannot stand for it. {_INSTEAD}"
        ) from error
    return Head(layer, _norm(model, layer.width))


def _without_layers(files: TeacherFiles, dtype: str) -> tuple[Any, list[str]]:
    """The model without its layers, and the names of weights that were left out."""
    config = copy.deepcopy(files.config)
    # A quantised checkpoint has its output layer in floats; another kind is found by its names.
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    text = config.get_text_config()
    try:
        text.num_hidden_layers = 0
        for kinds in ("layer_types", "mlp_layer_types"):
            if getattr(text, kinds, None) is not None:
                setattr(text, kinds, [])
        with quiet_transformers():
            model, info = auto_class(CAUSAL_LM, config).from_pretrained(
                files.folder,
                config=config,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=files.trust_remote_code,
                output_loading_info=True,
            )
    except (AttributeError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise UsageError(
            f"{files.who} cannot be read without its layers ({reason_of(error)}), so its output "
            f"layer is unknown. {_INSTEAD}"
        ) from error
    lacking = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if lacking:
        raise UsageError(
            f"{files.who} has no weights for {', '.join(lacking[:3])}, which its output "
            f"layer may need. {_INSTEAD}"
        )
    return model.eval().requires_grad_(False), list(info["unexpected_keys"])


@torch.inference_mode()
def _norm(model: Any, width: int) -> Any:
    """What a decoder without layers does to its input, if that is a norm; else None."""
    decoder = model.get_decoder().float()

    def norm(states: Tensor) -> Tensor:
        output: Tensor = decoder(inputs_embeds=states[None], use_cache=False).last_hidden_state[0]
        return output

    try:
        given = norm(torch.randn(4, width, generator=torch.Generator().manual_seed(0)))
        plain = given.shape == (4, width) and _apart(norm, given) < 1e-3
    except (AttributeError, RuntimeError, ValueError, TypeError, IndexError):
        return None
    return norm if plain else None


@torch.inference_mode()
def _apart(norm: Any, states: Tensor) -> float:
    """How far a norm moves states after its weights and bias were taken out."""
    signs = torch.ones(1, states.shape[-1])
    signs[:, 1::2] = -1
    plus, minus = norm(signs), norm(-signs)
    bias, weight = (plus + minus) / 2, (plus - minus) / 2 * signs
    used = weight.abs() > 1e-3 * weight.abs().max()
    states = states.float().cpu()
    bare = torch.where(used, (states - bias) / weight, signs)
    moved = (norm(bare) - states)[:, used[0]].square().mean()
    return float((moved / states.square().mean().clamp_min(1e-12)).sqrt())


def check_normed(head: Head, name: str, states: Tensor) -> None:
    """Refuse states that the final norm did not make.

    Raises:
        UsageError: the engine gives states from elsewhere.
    """
    apart = head.unlike_normed(states)
    if not apart <= _OTHER and bool(states.isfinite().all()):
        raise UsageError(
            f"teacher {name}: the engine's hidden states are not those after the final norm (they "
            f"differ from such by {apart:.2g} of their size). {_INSTEAD}"
        )
