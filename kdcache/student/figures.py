"""What an evaluation during training adds up over a stream's rows, and the figures made of it.

=========  ==========  ================================================================
answers    figure      of the rows with a hard label
=========  ==========  ================================================================
classes    accuracy    share whose most probable class is the label
labels     micro_f1    F1 over all rows and classes, predicted from a probability of 1/2
score      pearson     linear correlation with the labels
=========  ==========  ================================================================

Higher is better in each. A tagger of entities has their F1 as well. Language models have bits per
byte, which do not depend on the tokenizer: sums over chunks of text, as `kdcache evaluate` computes
them (`kdcache.commands.evaluate.in_bytes`). Sums of workers and domains are added before a figure
is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.loss.chunks import compared
from kdcache.loss.metrics import Entities, are_entities, f1_counts
from kdcache.stream import TargetStream
from kdcache.stream.checks import check_every_position
from kdcache.targets import LabelTargets, Targets
from kdcache.tasks import IGNORE, TASKS, labelled, positions

if TYPE_CHECKING:
    from kdcache.stream.text import TextChunks

SUMS = 6


FIGURES = {"classes": "accuracy", "labels": "micro_f1", "score": "pearson"}


def figure_of(task: str) -> str | None:
    """The name of a task's figure."""
    return FIGURES.get(TASKS[task].answers)


def figure_sums(task: str, logits: Tensor | None, labels: Tensor) -> Tensor:
    """What the figure of some rows is made of: float64 [SUMS], which adds up over batches.

    Args:
        task: of the model.
        logits: [n, outputs], or [n, L, classes] where labels belong to tokens; None where the task
            has no figure.
        labels: as a batch has them.
    """
    sums, made_of = torch.zeros(SUMS, dtype=torch.float64, device=labels.device), figure_of(task)
    if logits is not None and made_of is not None:
        found = torch.stack([*_MADE_OF[made_of](logits, labels, labelled(labels, task))])
        sums[: len(found)] = found
    return sums


def _right(logits: Tensor, labels: Tensor, there: Tensor) -> Iterable[Tensor]:
    return ((logits.argmax(-1) == labels) & there).sum(), there.sum()


def _hits(logits: Tensor, labels: Tensor, there: Tensor) -> Iterable[Tensor]:
    hits, both = f1_counts(labels, logits >= 0)
    return 2 * hits.sum(), both.sum()


def _products(logits: Tensor, labels: Tensor, there: Tensor) -> Iterable[Tensor]:
    x, y = logits[there, 0].double(), labels[there].double()
    one = torch.ones_like(x)
    pairs = (one, one), (x, one), (y, one), (x, x), (y, y), (x, y)
    return ((a * b).sum() for a, b in pairs)


_MADE_OF: Mapping[str, Callable[[Tensor, Tensor, Tensor], Iterable[Tensor]]] = {
    "accuracy": _right,
    "micro_f1": _hits,
    "pearson": _products,
}


def hard_labels(task: str, labels: Tensor) -> Tensor:
    """How many rows, or tokens, the hard loss of some is a mean over: those with a label.

    Of several labels a row, the share of its classes that is known counts: their loss is a mean
    over all classes, and has nothing of the others.
    """
    if TASKS[task].answers != "labels":
        return labelled(labels, task).sum()
    return (labels != IGNORE).sum() / labels.shape[-1]


def label_shares(task: str, inputs: Mapping[str, Any]) -> Tensor:
    """float64 [2]: hard labels by what a batch's loss is a mean over, infinite on a rank without
    rows, and those of them that have no soft target.
    """
    known = hard_labels(task, inputs["labels"]).double()
    others = inputs.get("hard_labels")
    alone = torch.zeros_like(known) if others is None else (others != IGNORE).sum().double()
    count: Tensor = inputs["count"]
    return torch.stack([known + alone, alone]) / count


def mean_parts(sums: Tensor, steps: int, soft: str, knows_kl: bool) -> dict[str, float]:
    """The parts of the loss of some steps, as far as there are such means, by name.

    Args:
        sums: [5] over the steps: hard and soft loss, the share of labels in what they are a mean
            over, KL, and the share of labels without a soft target.
        steps: how many.
        soft: name of the soft loss; empty where there is none.
        knows_kl: whether the KL is known.
    """
    hard, loss, known, kl, alone = sums.tolist()
    found = {"hard_loss": hard / known} if known else {}
    with_target = steps - alone
    if soft and with_target > 1e-9 * steps:  # else all their labels have none, but for rounding
        found[soft] = loss / with_target
        found |= {"kl": kl / with_target} if knows_kl else {}
    return found


def figure(task: str, sums: Tensor) -> dict[str, float]:
    """The figure by its name; empty where it is not defined.

    A correlation is taken from sums of squares in float64: where the scores differ by less than a
    millionth of their size, it is not defined either.
    """
    name, found = figure_of(task), sums.tolist()
    if name is None:
        return {}
    if name != "pearson":
        return {name: found[0] / found[1]} if found[1] else {}
    n, x, y, xx, yy, xy = found
    if not n:
        return {}
    spread = [a / n - (b / n) ** 2 for a, b in ((xx, x), (yy, y))]
    if any(s <= 1e-12 * a / n for s, a in zip(spread, (xx, yy), strict=True)):
        return {}
    return {name: (xy / n - x / n * y / n) / math.sqrt(spread[0] * spread[1])}


TEXT_SUMS = 6


def text_sums(text: TextChunks, logprobs: Tensor) -> Tensor:
    """What the figures of a batch are made of: float64 [SUMS], which adds up over batches.

    Args:
        text: of the batch.
        logprobs: float64 [P], the student's log-probability of each label.
    """
    begin, end = (torch.from_numpy(edge).to(logprobs.device) for edge in (text.begin, text.end))
    before = torch.cat([logprobs.new_zeros(1), logprobs.cumsum(0)])
    mine = before[end] - before[begin]
    sizes = torch.from_numpy(text.sizes).to(mine)
    if text.likelihood is None:
        unknown = mine.new_tensor(math.nan)
        known = (mine.sum(), sizes.sum(), torch.ones_like(mine).sum())
        return torch.stack([*known, unknown, unknown, unknown])
    theirs = torch.from_numpy(text.likelihood).to(mine)
    kept = theirs.isfinite()
    mine, theirs, sizes = mine[kept], theirs[kept], sizes[kept]
    kl, agreed = compared(theirs, mine)
    number = torch.ones_like(mine).sum()
    return torch.stack([mine.sum(), sizes.sum(), number, kl, agreed.to(mine), theirs.sum()])


def text_figures(sums: Tensor, *, across: bool) -> dict[str, float]:
    """The figures by name; empty where there is no text.

    Args:
        sums: of `text_sums`.
        across: whether the student has another tokenizer than its teacher, so that chunks are what
            both can be asked about.
    """
    nats, size, chunks, kl, agreed, teacher = sums.tolist()
    if not size:
        return {}
    found = {"bits_per_byte": -nats / math.log(2) / size}
    if math.isfinite(teacher):
        found["teacher_bits_per_byte"] = -teacher / math.log(2) / size
        if across:
            found |= {"chunk_kl": kl / chunks, "chunk_agreement": agreed / chunks}
    return {name: value for name, value in found.items() if math.isfinite(value)}


_LOSSES = slice(0, 2)  # hard and soft, times what each is a mean over
_POSITIONS, _LABELLED, _KNOWN = 2, 3, 4  # the last: what the hard loss is a mean over
_ENTITIES = slice(5, 8)
_TASK = slice(8, 8 + SUMS)
_TEXT = slice(8 + SUMS, 8 + SUMS + TEXT_SUMS)
_KL, _KL_POSITIONS = _TEXT.stop, _TEXT.stop + 1
_SIZE = _TEXT.stop + 2


@dataclass(frozen=True)
class Totals:
    """Sums over rows, in one tensor: ranks and domains add theirs up as they are.

    Attributes:
        values: float64 [_SIZE].
    """

    values: Tensor

    @staticmethod
    def zeros(parts: int, device: torch.device) -> Tensor:
        """The values of so many totals, float64 [parts, _SIZE]."""
        return torch.zeros(parts, _SIZE, dtype=torch.float64, device=device)

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
            count: what its losses are a mean over.
            text: the `text` of the batch, where figures are in bytes, too.

        Raises:
            UsageError: some of its labels have no soft target.
        """
        if "hard_labels" in inputs:
            raise UsageError(check_every_position(stream.caches, "an evaluation")[0])
        task, labels, values = stream.task, inputs["labels"], self.values
        values[_LOSSES] += parts_of(outputs.hard_loss, outputs.soft_loss) * count
        values[_POSITIONS] += positions(labels, task).sum()
        if outputs.kl is not None:
            values[_KL] += outputs.kl.detach() * count
            values[_KL_POSITIONS] += count
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
            tags = _tags(stream) or ()
            f1 = Entities(tags, *values[_ENTITIES].tolist()).f1
            if not math.isnan(f1):  # else there are no entities, or no tags of them
                found["f1"] = f1
        if soft:
            found[soft] = soft_loss / max(counted, 1)
        if soft and float(values[_KL_POSITIONS]) == counted > 0:
            found["kl"] = float(values[_KL]) / counted
        return found | text_figures(values[_TEXT], across=stream.reading.vocab_size is not None)


def soft_name(targets: Targets | LabelTargets) -> str:
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
