"""What the decoder of a sequence-to-sequence model reads first.

A model that is given labels makes the decoder's input of them: the labels one place later, behind a
token that differs between models (padding in T5 and Marian, the end of a sequence in BART, the last
label, a code of the language, in mBART). Rows are made by the same rule, so the rule is measured,
not looked up: the model's own forward runs on two rows of labels up to its decoder, which keeps
what it is given and goes no further.

Cost: the forward of nothing: no layer runs, and of a configuration no weights exist (torch's meta
device).
Guarantee: where this returns a rule, `labels` alone give the decoder the input that rows hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from kdcache.errors import UsageError, reason_of
from kdcache.rows.spec import LAST_LABEL
from kdcache.tasks import IGNORE, SEQ2SEQ_LM
from kdcache.teacher.quiet import quiet_transformers


class _ReachedError(Exception):
    """The decoder was called."""


def decoder_start_of(config: Any, name: str, *, trust_remote_code: bool = False) -> int:
    """The same as `decoder_start` of a model that is not loaded.

    Args:
        config: its configuration.
        name: for messages: "teacher NAME".
        trust_remote_code: whether code that ships with the model may run.

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
        name: for messages: "teacher NAME".

    Returns:
        An id, or `LAST_LABEL`.

    Raises:
        UsageError: its forward makes no input of labels, or another one than the labels one place
            later.
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
