"""Checks that a student's logits for a row depend neither on the padding of its batch nor on later
tokens.

Some encoders mix padding into the rows (ConvBERT, FNet), and a masked language model reads the
labels that it is to predict. Their loss would not be that of the rows.

Cost: five forwards of at most three rows of 256 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.student.wrapper import DistilledStudent
from kdcache.tasks import CAUSAL_LM
from kdcache.teacher.probe import TOLERANCES, distance

_TOKENS = 256


@torch.no_grad()
def check_rows(name: str, student: DistilledStudent, batch: Mapping[str, Tensor]) -> None:
    """Refuse a student that reads padding or later tokens.

    Args:
        name: of the student, for messages.
        student: with its weights, on any device.
        batch: a few rows of different lengths, right-padded: `input_ids`, `attention_mask`,
            `labels`. Students with inputs of another kind are not checked.

    Raises:
        UsageError: names what its logits depend on.
    """
    mask, labels = batch.get("attention_mask"), batch["labels"]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if mask is None or any(value.shape != mask.shape for value in inputs.values()):
        return
    causal = student.task == CAUSAL_LM
    device = next(student.parameters()).device
    lengths = mask.sum(-1).clamp_max(_TOKENS if causal else mask.shape[1]).tolist()

    def logits(rows: slice, stop: int, **changed: Tensor) -> Tensor:
        """Logits [rows, stop, V] or [rows, classes]."""
        given = {key: value[rows, :stop].to(device) for key, value in {**inputs, **changed}.items()}
        # All places count, whether they have labels or not.
        marks = torch.zeros_like(labels[rows, :stop] if causal else labels[rows]).to(device)
        found: Tensor | None = student(labels=marks, return_logits=True, **given).logits
        assert found is not None
        return found.float().cpu()

    modes = [(module, module.training) for module in student.modules()]
    student.eval()
    try:
        alone = [logits(slice(i, i + 1), n)[0] for i, n in enumerate(lengths)]
        padded = logits(slice(None), max(lengths))
        if causal:
            ids = inputs["input_ids"][:1].clone()
            half = lengths[0] // 2
            ids[:, half : lengths[0]] = ids[:, : lengths[0] - half].flip(1)
            other = logits(slice(0, 1), lengths[0], input_ids=ids)[0]
            _refuse_beyond(
                distance([other[:half]], [alone[0][:half]]),
                f"student {name} is not a causal language model: its logits at a position depend "
                "on later tokens, and so on the labels. Name a causal one.",
            )
    finally:
        for module, mode in modes:
            module.training = mode
    own = [row[:n] if causal else row[None] for row, n in zip(padded, lengths, strict=True)]
    _refuse_beyond(
        distance(own, [row if causal else row[None] for row in alone]),
        f"student {name} gives other logits where its batch is padded, so its loss would be wrong. "
        "Use --batch-size 1, or a student that masks padding.",
    )


def _refuse_beyond(moved: float, message: str) -> None:
    if moved > TOLERANCES["float32"]:
        raise UsageError(f"{message} (They differ by {moved:.2g} of their spread.)")
