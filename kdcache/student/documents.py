"""Documents of a row that do not attend to each other, as a student computes them.

A batch of such rows has `position_ids`, which begin again at 0 with each document, and no
attention mask. From these transformers makes block-diagonal masks (SDPA, flex, eager), or calls
FlashAttention for sequences of different lengths, which it does for a batch of a single row: there
the rows of a batch are laid end to end.

Some architectures ignore positions in part (state-space and linear attention, ALiBi, relative
positions). Their documents would leak into each other without a word, so each student is tried.

Cost: six forwards of at most 256 tokens, once.
Guarantee: none for documents that behave unlike those tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import UsageError
from kdcache.student.padding import tolerance
from kdcache.teacher.probe import distance
from kdcache.teacher.projection import call, logits_of, quiet, text_config

_TOKENS = 256
_LEAST = 12


@torch.no_grad()
def check_documents(student: nn.Module, input_ids: Tensor) -> None:
    """Compare documents that share a row with each alone.

    Args:
        student: a causal language model.
        input_ids: int64 [B, L] of a batch, where the student wants them; some tokens are used.

    Raises:
        UsageError: they differ.
    """
    ids = input_ids[0, :_TOKENS]
    ids = ids.repeat(-(-_LEAST // len(ids)))
    n = len(ids)
    rows = torch.stack([ids, ids.flip(0)])
    cuts = [(0, n // 3, n // 3 + 1, n), (0, n // 2, n)]
    position_ids = torch.stack(
        [torch.cat([torch.arange(b - a) for a, b in pairwise(at)]) for at in cuts]
    ).to(ids.device)
    documents = [(row, a, b) for row, at in enumerate(cuts) for a, b in pairwise(at)]
    with quiet(student):
        inputs = {"input_ids": rows, "position_ids": position_ids}
        together = _logits(student, in_one_row(student, inputs)).reshape(2, n, -1)
        alone = [_logits(student, {"input_ids": rows[r : r + 1, a:b]})[0] for r, a, b in documents]
    moved = distance([together[r, a:b] for r, a, b in documents], alone)
    if moved > tolerance(student):
        raise UsageError(
            f"student {type(student).__name__} lets documents of one row read each other: their "
            f"logits differ from those of each alone by {moved:.2g} of their spread. Use a cache "
            "built with --packing split or --attend row, or another architecture."
        )


def in_one_row(student: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of a batch end to end, for FlashAttention; else the batch as it is.

    Args:
        student: a causal language model.
        inputs: with `position_ids`; padding is a document too.
    """
    implementation = getattr(text_config(getattr(student, "config", None)), _ATTENTION, None)
    if "flash" not in str(implementation):
        return dict(inputs)
    shape = inputs["position_ids"].shape
    return {
        name: value.reshape(1, -1) if isinstance(value, Tensor) and value.shape == shape else value
        for name, value in inputs.items()
    }


_ATTENTION = "_attn_implementation"


def _logits(student: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    found = logits_of(call(student, inputs)).float().cpu()
    return found[:, found.shape[1] - inputs["input_ids"].shape[1] :]  # prompt tuning adds tokens
