"""The output layer of a language model, and the states that its own forward gives to it.

The fused loss needs both, and logits that are the product of layer and states and nothing else. So
the student always runs its own forward, with whatever it does before its layers (prompt tuning,
changed embeddings, adapters). Only the output layer is replaced meanwhile: it keeps its input and
returns one column instead of the vocabulary.

What the model does to the logits afterwards is measured once, at the first batch: the layer returns
random numbers from 0.01 to 500, large and small because soft-capping leaves small logits alone and
a bias leaves large ones alone. The model must return these numbers, or all of them times a constant
of its config (Cohere, Granite, Falcon-H1), or capped by one (Gemma 2), or plus a buffer of the
model (the biases of Marian). No parameter may act after the layer: a bias that is zero today is
learnt tomorrow.

The layer itself must be the product with its weight: one that a quantiser has wrapped, so that its
forward rounds weight or input, is found by its own answer to the states of these tokens.

Cost: five forward passes over 8 tokens of the first batch; no global random numbers are drawn.
Guarantee: where there is a projection, `layer(states) * scale`, capped, are the model's own logits.
Any other model has none, and its own logits are used.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import UsageError
from kdcache.loss.reference import soft_capped

_TOKENS = 8
_SIZES = (0.01, 1.0, 40.0, 500.0)


class Projection:
    """What the logits of a language model are made of.

    Attributes:
        scale: what the model multiplies its projected states by; None if they are not its logits.
        cap: the logits are then ``cap * tanh(x / cap)`` of these numbers x; None: x itself.
        offset: float [V], a buffer that an uncapped model adds to its logits; None for nothing.
        thin: whether what follows the layer makes a column as wide as the vocabulary again, so that
            one number a batch stands for it.
    """

    def __init__(
        self, student: nn.Module, inputs: Mapping[str, Any], *, product: bool = True
    ) -> None:
        """Measure.

        Args:
            inputs: a batch, of which some tokens are used.
            product: whether the layer must be the product with its weight, as the fused loss takes
                it; else it may be what a quantiser made, and is called.
        """
        self.student, self._product = student, product
        self.scale: float | None = 1.0
        self.cap: float | None = None
        self.offset: Tensor | None = None
        self.thin = False
        layer = _output_layer(student, product)
        found = None if layer is None else self._measure(layer, _few(inputs))
        self.scale, self.cap = found or (None, None)

    @property
    def layer(self) -> nn.Linear | None:
        """The output layer, if it makes the logits and is whole on this device."""
        return None if self.scale is None else _output_layer(self.student, self._product)

    def states(self, layer: nn.Linear, inputs: Mapping[str, Any]) -> Tensor:
        """The states [B, L', H] of its own forward: times `layer`, they are the logits."""
        return self._scaled(layer_input(self.student, layer, inputs, thin=self.thin))

    def bias(self, layer: nn.Linear) -> Tensor | None:
        """The layer's bias on the scale of `states`, and what the model adds besides."""
        own = None if layer.bias is None else self._scaled(layer.bias)
        if self.offset is None:
            return own
        offset = self.offset.to(layer.weight)
        return offset if own is None else own + offset

    def _scaled(self, values: Tensor) -> Tensor:
        return values if self.scale is None or self.scale == 1 else values * self.scale

    def _measure(
        self, layer: nn.Linear, inputs: Mapping[str, Any]
    ) -> tuple[float, float | None] | None:
        """What the model does to its projected states: scale and cap; None if it does else."""
        answers: list[Tensor] = []

        def answer(states: Tensor) -> Tensor:
            # Whatever comes after the layer must leave no trace of a parameter.
            torch.set_grad_enabled(True)
            sizes = torch.tensor(_SIZES).repeat(states.shape[-2])[: states.shape[-2], None]
            shape = (*states.shape[:-1], layer.out_features)
            numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * sizes
            answers.append(numbers.to(states.device))
            return answers[-1]

        with torch.inference_mode(False), quiet(self.student):
            inputs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
            with torch.no_grad(), answering(layer, answer):
                own = logits_of(call(self.student, inputs))
                if len(answers) != 1 or own.requires_grad or own.shape != answers[0].shape:
                    return None
                self.offset = self._added(layer, inputs)
            try:
                with torch.no_grad():
                    self.thin = self._widens(layer, inputs)
                    states = layer_input(self.student, layer, inputs, thin=self.thin)
                    if self._product and not _is_product(layer, states):
                        return None
            except (RuntimeError, IndexError, ValueError, UsageError):
                return None  # one column is not enough for what follows the layer
        found = self._named(own.double(), answers[0].double(), torch.finfo(own.dtype).eps)
        if found is None or found[1] is not None:
            self.offset = None  # a cap leaves zeros alone
        return found

    def _widens(self, layer: nn.Linear, inputs: Mapping[str, Any]) -> bool:
        """See `thin`; False where the model cannot do with less than a number a token."""

        def answer(states: Tensor) -> Tensor:
            return states.new_zeros((*states.shape[:-1], 1))

        with answering(layer, answer):
            if logits_of(call(self.student, inputs)).shape[-1] == 1:
                return False
        try:
            layer_input(self.student, layer, inputs, thin=True)
        except (RuntimeError, IndexError, ValueError, UsageError):
            return False
        return True

    def _added(self, layer: nn.Linear, inputs: Mapping[str, Any]) -> Tensor | None:
        """A buffer of the model that it adds to its logits at each token, float [V]."""

        def answer(states: Tensor) -> Tensor:
            return states.new_zeros((*states.shape[:-1], layer.out_features))

        with torch.no_grad(), answering(layer, answer):
            added = logits_of(call(self.student, inputs))
        flat = added.reshape(-1, added.shape[-1])
        if not flat.any() or not torch.equal(flat, flat[:1].expand_as(flat)):
            return None
        buffers = (values.detach().reshape(-1) for values in self.student.buffers())
        return next((b for b in buffers if torch.equal(b.to(flat), flat[0])), None)

    def _named(self, own: Tensor, given: Tensor, eps: float) -> tuple[float, float | None] | None:
        """Scale and cap between two tensors, 1 and none or what the config names, if there are."""
        rounding = 0.0
        if self.offset is not None:
            rounding = float(eps * self.offset.double().norm())
            own = own - self.offset.double()
        for scale, cap in named_constants(getattr(self.student, "config", None)):
            want = soft_capped(scale * given, cap)
            size = want.norm(dim=-1)
            # Each row says it by itself: large numbers show the cap, small ones the scale.
            wrong = ((own * want).sum(-1) / size.square() - 1).abs()
            apart = (own - want).norm(dim=-1)
            near = 4 * (max(eps, 1e-6) * size + rounding)
            if (wrong <= max(eps, 1e-5) + rounding / size).all() and (apart <= near).all():
                return scale, cap
        return None


def layer_input(
    model: nn.Module, layer: nn.Linear, inputs: Mapping[str, Any], *, thin: bool = False
) -> Tensor:
    """What a model's own forward gives to its output layer, [B, L', H]; no logits are made.

    Args:
        thin: see `Projection`.
    """
    found: list[Tensor] = []

    def keep(states: Tensor) -> Tensor:
        found.append(states)
        return states.new_zeros((1,) * states.ndim if thin else (*states.shape[:-1], 1))

    with answering(layer, keep):
        call(model, inputs)
    if len(found) != 1 or found[0].ndim != 3:
        raise UsageError(
            "the model used its output layer in another way than at its first batch: its "
            "forward must be the same for all batches."
        )
    return found[0]


def named_constants(config: Any) -> Iterator[tuple[float, float | None]]:
    """Scales and caps that a config names, 1 and none first: what logits may be made with."""
    named = {
        name: float(value)
        for name, value in getattr(text_config(config), "__dict__", {}).items()
        if ("logit" in name or "lm_head" in name) and isinstance(value, (int, float)) and value
    }
    scales = [1.0, *(scale for value in named.values() for scale in (value, 1 / value))]
    caps = [None, *(value for name, value in named.items() if "cap" in name and value > 0)]
    for cap, scale in itertools.product(caps, scales):
        yield scale, cap


def call(student: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run a student with those of the inputs that it takes, without a cache of keys and values."""
    names = _accepted(student)
    if names is None:
        return student(**inputs)
    given = {name: value for name, value in inputs.items() if name in names}
    if "position_ids" in inputs and "position_ids" not in names:
        raise UsageError(
            f"{type(student).__name__} takes no position_ids, so it cannot keep the documents of a "
            "row apart. Use a cache built with --packing split or --attend row."
        )
    if "use_cache" in names:
        given["use_cache"] = False
    return student(**given)


def text_config(config: Any) -> Any:
    """The part of a Hugging Face config that speaks of text."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def logits_of(output: Any) -> Tensor:
    """The logits in the output of a student's forward.

    Raises:
        UsageError: there are none.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None and isinstance(output, tuple):
        found = output[0]
    if not isinstance(found, Tensor):
        raise UsageError(
            f"the student's forward returned {type(output).__name__} without logits; return a "
            "tensor or an output with `logits`."
        )
    return found


def _accepted(student: Any) -> set[str] | None:
    """Names of the inputs that a forward takes; None if it takes any.

    `**kwargs` are looked through: to the parent classes, and to the model inside of
    `torch.compile` and PEFT. Those of transformers' own classes are not inputs.
    """
    names: set[str] = set()
    owners = [student] if "forward" in vars(student) else []
    owners += [c for c in type(student).__mro__ if "forward" in vars(c) and c is not nn.Module]
    for owner in owners:
        parameters = inspect.signature(owner.forward).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        ours = isinstance(owner, type) and owner.__module__.startswith("transformers.")
        if ours or all(p.kind is not p.VAR_KEYWORD for p in parameters):
            return names
    base = getattr(student, "get_base_model", None)
    inner = getattr(student, "_orig_mod", None) if base is None else base()
    further = None if inner is None or inner is student else _accepted(inner)
    return None if further is None else names | further


def _output_layer(student: Any, product: bool) -> nn.Linear | None:
    getter = getattr(student, "get_output_embeddings", None)
    layer: Any = None if getter is None else getter()
    if not product:
        return layer if isinstance(getattr(layer, "out_features", None), int) else None
    if type(layer) is not nn.Linear or hasattr(layer.weight, "device_mesh"):
        return None
    # Where weights are sharded, what is here may be a part or nothing.
    if tuple(layer.weight.shape) != (layer.out_features, layer.in_features):
        return None
    return layer


def _is_product(layer: nn.Linear, states: Tensor) -> bool:
    """Whether a layer's own answer is the product with what it shows as its weight.

    Of torch's own class it is one, if the weight is a plain tensor: others round in a product of
    their own. Its hooks have run on the way to the states.
    """
    if type(layer.weight) not in (nn.Parameter, Tensor):
        return False
    if "forward" not in vars(layer) or layer.weight.is_meta:  # offloaded: its forward fetches it
        return True
    states = states.to(layer.weight.device)
    want = nn.functional.linear(states, layer.weight, layer.bias)
    return torch.equal(layer.forward(states).to(want), want)


def _few(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The first tokens of the first row."""
    ids = next(v for v in inputs.values() if isinstance(v, Tensor) and v.ndim > 1)

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:1] != ids.shape[:1]:
            return value
        return value[:1, :_TOKENS] if value.shape[:2] == ids.shape[:2] else value[:1]

    return {name: cut(value) for name, value in inputs.items()}


@contextmanager
def answering(layer: nn.Linear, answer: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The layer answers like this meanwhile. Its hooks still run."""
    own = vars(layer)
    before = own.get("forward")
    own["forward"] = answer
    try:
        yield
    finally:
        del own["forward"]
        if before is not None:
            own["forward"] = before


@contextmanager
def quiet(student: nn.Module) -> Iterator[None]:
    """No dropout: it would draw random numbers, and a resumed run would draw them once more."""
    modes = [(module, module.training) for module in student.modules()]
    student.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
