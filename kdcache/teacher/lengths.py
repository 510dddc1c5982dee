"""Parts of models that follow the length of the batch that a model is given, or the batches before.

Rotary positions of two kinds of `rope_type` do so. `longrope` (Phi-3) has one table of frequencies
for inputs of at most its original length and one for longer ones. `dynamic` computes them anew for
each length beyond the original, and keeps those of the longest input so far. BigBird attends to all
tokens of a short input and to some blocks of a long one, counted from both ends of the batch; after
a short input it attends to all tokens of every later one. So the logits of a row depend on the
longest row of its batch, padding included, and on the batches before.

The routers of NLLB-MoE keep how many tokens an expert may take of the last batch that was
evaluated, also in training. RWKV divides weights in place at its first forward in evaluation, and
multiplies them in the next in training, so a student that was saved in between was another one.

Cost: none where a model has none of these; else some batches are cut in two, and those beyond the
length of `dynamic` and BigBird into rows of one length.
Guarantee: with `forget_lengths` a forward depends on its own batch alone, and rows for which
`length_class` is the same are read as each would be alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

LengthClass = Callable[[int], tuple[int, ...]]

_SPARSE = "block_sparse"


def forget_lengths(model: nn.Module, *, to_train: bool = False) -> None:
    """Have a model begin each forward as if it were its first.

    Args:
        model: before its first forward.
        to_train: whether it is one to train, whose weights stay in the scale in which they are
            trained and saved; only float16 needs another.
    """
    for module in model.modules():
        if hasattr(module, "moe_eval_capacity_token_fraction"):
            module.register_forward_pre_hook(_forget_capacity(module.expert_capacity))
        if to_train and hasattr(module, "layers_are_rescaled"):
            module._rescale_layers = _leave_scale  # type: ignore[assignment]
        if any("dynamic" in kind for kind, _ in _kinds(module)):
            module.register_forward_pre_hook(_forget_frequencies)
    for module in _sparse(model):
        module.register_forward_pre_hook(_forget_full, with_kwargs=True)


def length_class(model: nn.Module) -> LengthClass | None:
    """What tells rows apart, by their tokens, that must not share a batch.

    Args:
        model: before its first forward.

    Returns:
        None where all rows may.
    """
    tables: set[int] = set()
    originals = {_most_full(module) for module in _sparse(model)}
    for module in model.modules():
        for kind, layer in _kinds(module):
            if kind == "longrope":
                tables.add(_original(module.config, layer))
            elif "dynamic" in kind:
                originals.add(int(module.original_max_seq_len))  # type: ignore[arg-type]
    if not tables and not originals:
        return None

    def classify(tokens: int) -> tuple[int, ...]:
        beyond = any(tokens > original for original in originals)
        return (*(int(tokens > most) for most in sorted(tables)), tokens if beyond else 0)

    return classify


def _kinds(module: Any) -> Iterator[tuple[str, str]]:
    """Kinds of rotary positions of a module of transformers, and the layers that have each."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        yield kinds, ""
    elif isinstance(kinds, dict):
        yield from ((str(kind), layer) for layer, kind in kinds.items())


def _original(config: Any, layer: str) -> int:
    parameters = config.rope_parameters
    return int((parameters[layer] if layer else parameters)["original_max_position_embeddings"])


def _forget_frequencies(module: Any, _: Any) -> None:
    for kind, layer in _kinds(module):
        if "dynamic" in kind:
            prefix = f"{layer}_" if layer else ""
            now = getattr(module, f"{prefix}inv_freq")
            first = getattr(module, f"{prefix}original_inv_freq").to(now.device)
            module.register_buffer(f"{prefix}inv_freq", first, persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _forget_capacity(own: Any) -> Callable[[Any, Any], None]:
    def forget(router: Any, _: Any) -> None:
        router.expert_capacity = own

    return forget


def _leave_scale() -> None:
    """In place of RWKV's `_rescale_layers`."""


def _sparse(model: nn.Module) -> list[Any]:
    """The modules that choose how all below them attend."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        able = hasattr(module, "set_attention_type")
        if able and not any(f"{name}.".startswith(f"{above}.") for above in found if above):
            found[name] = module
        if able and not name:
            break  # the model itself
    return [one for one in found.values() if getattr(one, "attention_type", None) == _SPARSE]


def _most_full(module: Any) -> int:
    """The most tokens that BigBird attends to fully."""
    return int((5 + 2 * module.config.num_random_blocks) * module.config.block_size)


def _forget_full(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]]
    tokens = next((one.shape[1] for one in given if one is not None), 0)
    if tokens > _most_full(module):
        module.set_attention_type(_SPARSE)
