"""What a training's evaluation adds up over the rows of a stream, and the figures made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcache.loss.entities import Entities, are_entities
from kdcache.stream import TargetStream
from kdcache.student.figures import SUMS, figure, figure_sums, hard_labels
from kdcache.student.in_bytes import SUMS as TEXT_SUMS
from kdcache.student.in_bytes import text_figures, text_sums
from kdcache.targets import Targets
from kdcache.tasks import TASKS, labelled, positions

_LOSSES = slice(0, 2)  # hard and soft, times what each is a mean over
_POSITIONS, _LABELLED, _KNOWN = 2, 3, 4  # the last: what the hard loss is a mean over
_ENTITIES = slice(5, 8)
_TASK = slice(8, 8 + SUMS)
_TEXT = slice(8 + SUMS, 8 + SUMS + TEXT_SUMS)


@dataclass(frozen=True)
class Totals:
    """Sums over rows, in one tensor: ranks and domains add theirs up as they are.

    Attributes:
        values: float64 [_TEXT.stop].
    """

    values: Tensor

    @staticmethod
    def zeros(parts: int, device: torch.device) -> Tensor:
        """The values of so many totals, float64 [parts, _TEXT.stop]."""
        return torch.zeros(parts, _TEXT.stop, dtype=torch.float64, device=device)

    def add(
        self,
        stream: TargetStream,
        inputs: Mapping[str, Any],
        outputs: Any,
        count: float,
        text: Any = None,
    ) -> None:
        """Add a batch.

        Args:
            stream: where it is from.
            inputs: of the student.
            outputs: a `DistillationOutput`.
            count: what its losses are a mean over.
            text: the `text` of the batch, where figures are in bytes, too.
        """
        task, labels, values = stream.task, inputs["labels"], self.values
        values[_LOSSES] += parts_of(outputs.hard_loss, outputs.soft_loss) * count
        values[_POSITIONS] += positions(labels, task).sum()
        values[_LABELLED] += labelled(labels, task).sum()
        values[_KNOWN] += hard_labels(task, labels)
        values[_ENTITIES] += _entities(stream, inputs, outputs.logits)
        values[_TASK] += figure_sums(task, outputs.logits, labels)
        if text is not None:
            values[_TEXT] += text_sums(text, outputs.logprobs)

    def figures(self, stream: TargetStream, alpha: float, soft: str) -> dict[str, float]:
        """Losses and figures by name.

        Args:
            stream: where the rows are from.
            alpha: weight of the hard loss.
            soft: name of the soft loss; empty where there is none.
        """
        values = self.values
        (hard, soft_loss), counted = values[_LOSSES].tolist(), float(values[_POSITIONS])
        rows, known = float(values[_LABELLED]), float(values[_KNOWN])
        # The same weighting as in training: mean over positions of the weighted sum.
        whole = max(counted if soft else rows, 1)
        found = {"loss": (alpha * hard + (1 - alpha) * soft_loss) / whole}
        if rows:
            found["hard_loss"] = hard / known
            found |= figure(stream.task, values[_TASK])
            if _tags(stream) is not None:
                true, predicted, right = values[_ENTITIES].tolist()
                if true + predicted:  # else there is no such figure
                    found["f1"] = 2 * right / (true + predicted)
        if soft:
            found[soft] = soft_loss / max(counted, 1)
        return found | text_figures(values[_TEXT], across=stream.cross is not None)


def soft_name(targets: Targets) -> str:
    """What the soft part of a loss on these targets is called in logs."""
    return "soft_loss" if targets.exact else "soft_cross_entropy"


def parts_of(hard: Tensor | None, soft: Tensor | None) -> Tensor:
    """The two parts of a loss, float64 [2]; 0 where there is no soft one."""
    assert hard is not None, "the model returns the parts of its loss"
    zero = torch.zeros_like(hard)
    return torch.stack([hard.detach(), (zero if soft is None else soft).detach()]).double()


def _tags(stream: TargetStream) -> tuple[str, ...] | None:
    """The classes of a stream of words, if they are the tags of entities."""
    names = stream.caches[0].spec.label_names if TASKS[stream.task].words else None
    return names if names is not None and are_entities(names) else None


def _entities(stream: TargetStream, inputs: Mapping[str, Any], logits: Tensor | None) -> Tensor:
    """Entities of the labels of a batch, of its predictions, and of both: float64 [3]."""
    names, labels = _tags(stream), inputs["labels"]
    if names is None or logits is None:
        return torch.zeros((), dtype=torch.float64, device=labels.device)
    at = positions(labels, stream.task)
    keep = labelled(labels, stream.task)
    if "first_tokens" in inputs:  # words count, not their tokens
        keep[at] &= inputs["first_tokens"]
    found = Entities(names)
    ours, theirs = (tags[keep].cpu().numpy() for tags in (labels, logits.argmax(-1)))
    found.add(ours, theirs, keep.sum(-1).cpu().numpy())
    counts = (found.true, found.predicted, found.right)
    return torch.tensor(counts, dtype=torch.float64, device=labels.device)
