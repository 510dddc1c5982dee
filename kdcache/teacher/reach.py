"""How many tokens a model can read: as many as its table of positions has places for.

A longer row would be an index beyond the table: an error of torch on a CPU, and on a GPU one that
ends the process. What a configuration says is no measure of it: RoBERTa and its like count
positions from the one behind the padding's id, so their tables have some rows that no token has.

Cost: of a model that is not loaded, its modules on torch's meta device, without weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from kdcache.pretrained import UnreadableError, unreadable
from kdcache.teacher.quiet import quiet_transformers

_LENGTHS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")
_BUFFERS = ("embed_positions", "pos_encoding")  # of GPT-J, CodeGen and CTRL


def reach_of(model: Any, side: str = "decoder") -> int | None:
    """The most tokens that a model can read: of a table of positions; None of all others.

    Args:
        model: any; its weights may be on the meta device.
        side: of a sequence-to-sequence model whose sides have lengths of their own, `encoder` or
            `decoder`.
    """
    config = getattr(getattr(model, "config", None), "get_text_config", lambda: None)()
    known = {} if config is None else config.to_dict()
    length = _length(known, side)
    if length is None:
        return None
    kind = known.get("model_type")
    if kind == "mpt":  # its biases of distances end there, too
        return length
    if kind == "prophetnet" and side == "encoder":  # all further tokens have the last place
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
    # A ProphetNet's decoder looks one place further.
    return length - max(unread, default=0) - int(kind == "prophetnet")


def reach_of_config(config: Any, *, trust_remote_code: bool = False) -> int | None:
    """The same of a model that is not loaded; None, too, where it cannot be made of its
    configuration alone.

    Args:
        config: its configuration.
        trust_remote_code: whether code that ships with the model may run.
    """
    if _length(config.get_text_config().to_dict(), "decoder") is None:
        return None
    try:
        with unreadable(), quiet_transformers(), torch.device("meta"):
            model: nn.Module = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
    except (UnreadableError, ImportError, OSError):
        return None  # whoever loads it says why
    return reach_of(model)


def _length(known: dict[str, Any], side: str) -> int | None:
    """What a configuration names, whether a table has it or not."""
    names = (f"max_{side}_position_embeddings", *_LENGTHS)
    found = next((known[name] for name in names if known.get(name)), None)
    return None if found is None else int(found)
