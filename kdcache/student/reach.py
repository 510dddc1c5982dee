"""How many tokens a student can read: as many as its table of positions has.

A longer row would be an index beyond the table: an error of torch on a CPU, and on a GPU one that
ends the process.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def reach_of(student: Any) -> int | None:
    """The most tokens that a student can read: of a table of positions; None of all others.

    RoBERTa and its like count positions from the one behind the padding's id, so their tables have
    some rows that no token has.
    """
    config = getattr(getattr(student, "config", None), "get_text_config", lambda: None)()
    known = {} if config is None else config.to_dict()
    length = known.get("max_position_embeddings") or known.get("n_positions")
    if length is None:
        return None
    tables = [
        table
        for name, table in student.named_modules()
        if isinstance(table, nn.Embedding)
        and ("position" in name.rpartition(".")[2] or name.endswith("wpe"))
        and table.num_embeddings >= length
    ]
    if not tables:  # rotary or relative positions, whatever the configuration names
        return None
    before = (t.padding_idx for t in tables if t.num_embeddings == length)
    return int(length) - max((1 + i for i in before if i is not None), default=0)
