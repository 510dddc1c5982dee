"""What single architectures do otherwise than others: the one place that names them.

*How far a model reads* (`reach`): as many tokens as its table of positions has entries. A longer
row would be an index beyond the table: an error of torch on a CPU, and on a GPU one that ends the
process. The configuration alone does not give it: RoBERTa and its like count positions from the
one behind the padding's id, so some entries of their tables are never used.

*What depends on a batch's length or on the batches before* (`forget_lengths`, `length_class`).
`longrope` (Phi-3) has one table of frequencies for inputs of at most its original length and one
for longer ones. `dynamic` computes them anew for each length beyond the original, and keeps those
of the longest input so far. BigBird attends to all tokens of a short input and to some blocks of a
long one; after a short input it attends to all tokens of every later one. The routers of NLLB-MoE
keep how many tokens an expert may take of the last batch that was evaluated, also in training.
RWKV divides weights in place at its first forward in evaluation and multiplies them in the next in
training, so a student saved in between would be another one.

*What a decoder reads before the labels* (`decoder_start`): padding in T5 and Marian, the end of a
sequence in BART, the last label, a code of the language, in mBART. It is measured: the model's own
forward runs on two rows of labels up to its decoder, which keeps its input and stops.

Cost: of a model that is not loaded, its modules on torch's meta device, without weights. No layer
runs. Where a part depends on lengths, some batches are cut in two, and those beyond the length of
`dynamic` and BigBird into rows of one length.
Guarantee: with `forget_lengths` a forward depends on its own batch alone, and rows of one
`length_class` are read as each would be alone. Where `decoder_start` returns a rule, `labels` alone
give the decoder the input that rows hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from kdcache.errors import UsageError, reason_of
from kdcache.pretrained import UnreadableError, quiet_transformers, unreadable
from kdcache.rows.spec import LAST_LABEL
from kdcache.tasks import IGNORE, SEQ2SEQ_LM

_LENGTHS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")
_BUFFERS = ("embed_positions", "pos_encoding")  # of GPT-J, CodeGen and CTRL


def reach(model: Any, side: str = "decoder", *, trust_remote_code: bool = False) -> int | None:
    """The most tokens that a model can read, by its table of positions; None without one.

    Args:
        model: a model, with weights or on the meta device; or a configuration, of which a model
            without weights is made. None, too, of a configuration that makes no model.
        side: of a sequence-to-sequence model whose sides have lengths of their own, `encoder` or
            `decoder`.
    """
    config = model if isinstance(model, PreTrainedConfig) else getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: None)()
    known = {} if text is None else text.to_dict()
    length = _length(known, side)
    if length is None:
        return None
    if config is model:
        try:
            with unreadable(), quiet_transformers(), torch.device("meta"):
                model = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
        except (UnreadableError, ImportError, OSError):
            return None  # loading it gives the reason
    kind = known.get("model_type")
    if kind == "mpt":  # its biases of distances end there, too
        return length
    if kind == "prophetnet" and side == "encoder":  # all further tokens have the last position
        return None
    tables = [
        (len(table.weight), table.padding_idx)
        for name, table in model.named_modules()
        if hasattr(table, "padding_idx")
        and isinstance(getattr(table, "weight", None), torch.Tensor)
        and ("position" in name.rpartition(".")[2] or name.endswith("wpe"))
    ]
    tables += [
        (len(values), None)
        for name, values in model.named_buffers()
        if name.rpartition(".")[2] in _BUFFERS and values.ndim == 2
    ]
    tables = [(rows, before) for rows, before in tables if rows >= length]
    if not tables:  # rotary or relative positions, whatever the configuration names
        return None
    unread = (1 + i for rows, i in tables if rows == length and i is not None)
    # A ProphetNet's decoder looks one position further.
    return length - max(unread, default=0) - int(kind == "prophetnet")


def check_reach(
    who: str, of_rows: tuple[int, int | None], of_sources: tuple[int, int | None]
) -> None:
    """Refuse rows that a model cannot read.

    Args:
        of_rows: tokens of the longest row, and the most that it reads.
        of_sources: the same of sources, which a sequence-to-sequence model's encoder reads.

    Raises:
        UsageError: one is longer.
    """
    for (length, most), what, flag in (
        (of_rows, "row", "--max-length"),
        (of_sources, "source", "--seq2seq max-source-length"),
    ):
        if most is not None and length > most:
            raise UsageError(
                f"{who} reads at most {most} tokens, and a {what} has {length}. Build with a "
                f"{flag} of at most {most}, or name a model that reads more."
            )


def _length(known: dict[str, Any], side: str) -> int | None:
    """What a configuration names, whether a table has it or not."""
    names = (f"max_{side}_position_embeddings", *_LENGTHS)
    found = next((known[name] for name in names if known.get(name)), None)
    return None if found is None else int(found)


LengthClass = Callable[[int], tuple[int, ...]]

_SPARSE = "block_sparse"


def forget_lengths(model: nn.Module, *, to_train: bool = False) -> None:
    """Have a model begin each forward as if it were its first.

    Args:
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


class _ReachedError(Exception):
    """The decoder was called."""


def decoder_start_of(config: Any, name: str, *, trust_remote_code: bool = False) -> int:
    """The same as `decoder_start` of a model that is not loaded.

    Raises:
        UsageError: as `decoder_start`.
    """
    from transformers import AutoModelForSeq2SeqLM

    try:
        with quiet_transformers(), torch.device("meta"):
            model = AutoModelForSeq2SeqLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, AttributeError, RuntimeError, ImportError) as error:
        raise _refused(name, error) from error
    return decoder_start(model, name)


@torch.no_grad()
def decoder_start(model: Any, name: str) -> int:
    """What a model's decoder reads before the labels.

    Args:
        model: of `AutoModelForSeq2SeqLM`, with weights or without.

    Returns:
        An id, or `LAST_LABEL`.

    Raises:
        UsageError: its forward makes no input of labels, or another one than the labels one
            position later.
    """
    shared = getattr(model.config, "share_encoder_decoder_embeddings", True)
    sizes = {getattr(model.config, n, None) for n in ("vocab_size", "decoder_vocab_size")}
    if not shared or len(sizes - {None}) > 1:
        raise UsageError(
            f"{name} has a vocabulary for each side, and {SEQ2SEQ_LM} needs one for both. Name "
            "another model."
        )
    text = model.config.get_text_config()
    width = int(getattr(text, "vocab_size", 0) or getattr(model.config, "vocab_size", 0))
    special = {
        getattr(config, f"{which}_token_id", None)
        for which in ("pad", "bos", "eos", "decoder_start")
        for config in (text, model.config)
    }
    usual = [i for i in range(min(width, 64)) if i not in special][:6]
    if len(usual) < 6:
        raise UsageError(f"{name} has a vocabulary of {width} ids, too few to try its decoder.")
    a, b, c, d, e, f = usual
    try:
        seen = _decoder_input(model, [[a, b, c, d], [e, f, IGNORE, IGNORE]])
    except (ValueError, AttributeError, RuntimeError, TypeError, IndexError, KeyError) as error:
        raise _refused(name, error) from error
    first = [int(row[0]) for row in seen]
    if seen[0][1:] == [a, b, c] and seen[1][1] == e:
        if first == [d, f]:
            return LAST_LABEL
        if first[0] == first[1] and 0 <= first[0] < width:
            return first[0]
    raise UsageError(
        f"{name} gives its decoder {seen[0]} for the labels {[a, b, c, d]}, and {seen[1]} for "
        f"{[e, f]}: expected a token of its own and the labels but the last. Correct "
        "decoder_start_token_id in its config.json, or name another model."
    )


def with_start(decoder_ids: Tensor, labels: Tensor, start: int | None) -> Tensor:
    """The decoder's input of rows, as a model of another start reads it.

    Args:
        decoder_ids: int64 [B, L].
        labels: int64 [B, L], `IGNORE` behind those of a row.
        start: of the model; None leaves the rows as they are.
    """
    if start is None or not decoder_ids.shape[1]:
        return decoder_ids
    if start == LAST_LABEL:
        last = (labels != IGNORE).sum(1, keepdim=True).clamp_min(1) - 1
        first = labels.gather(1, last).to(decoder_ids)
        first = torch.where(first == IGNORE, decoder_ids[:, :1], first)
    else:
        first = torch.full_like(decoder_ids[:, :1], start)
    return torch.cat([first, decoder_ids[:, 1:]], 1)


def _decoder_input(model: Any, labels: list[list[int]]) -> list[list[int]]:
    decoder = model.get_decoder()
    if not isinstance(decoder, nn.Module):
        raise ValueError("it has no decoder")
    seen: list[Tensor] = []

    def stop(_module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        ids = given.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor):
            seen.append(ids)
        raise _ReachedError

    device = next((p.device for p in model.parameters() if p.device.type != "meta"), None)
    device = device or torch.device("cpu")
    states = torch.zeros(2, 3, 8, device=device)
    hook = decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=torch.ones(2, 3, dtype=torch.long, device=device),
            labels=torch.tensor(labels, device=device),
            use_cache=False,
        )
    except _ReachedError:
        pass
    finally:
        hook.remove()
    if len(seen) != 1:
        raise ValueError(f"its forward makes no decoder input of labels; {SEQ2SEQ_LM} needs that")
    found: list[list[int]] = seen[0].tolist()
    return found


def _refused(name: str, error: Exception) -> UsageError:
    return UsageError(
        f"{name} cannot be used for {SEQ2SEQ_LM}: its forward on labels fails "
        f"({reason_of(error)}). Name another model."
    )
