"""The figure of an evaluation during training, beside its losses: sums over rows, of any worker.

=========  ==========  ================================================================
answers    figure      of the rows with a hard label
=========  ==========  ================================================================
classes    accuracy    share whose most probable class is the label
labels     micro_f1    F1 over all rows and classes, predicted from a probability of 1/2
score      pearson     linear correlation with the labels
=========  ==========  ================================================================

Higher is better in each. Tasks over the ids of a vocabulary have none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdcache.tasks import IGNORE, TASKS, labelled

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
    sums = torch.zeros(SUMS, dtype=torch.float64, device=labels.device)
    if logits is None or figure_of(task) is None:
        return sums
    there = labelled(labels, task)
    if TASKS[task].answers == "classes":
        right = (logits.argmax(-1) == labels) & there
        sums[:2] = torch.stack([right.sum(), there.sum()])
    elif TASKS[task].answers == "labels":
        truth, chosen = labels == 1, (logits >= 0) & (labels != IGNORE)
        sums[:2] = torch.stack([2 * (truth & chosen).sum(), truth.sum() + chosen.sum()])
    else:
        x, y = logits[there, 0].double(), labels[there].double()
        ones = torch.ones_like(x)
        sums = torch.stack([(a * b).sum() for a, b in _products(ones, x, y)])
    return sums


def hard_labels(task: str, labels: Tensor) -> Tensor:
    """How many rows, or tokens, the hard loss of some is a mean over: those with a label.

    Of several labels a row, the share of its classes that is known counts: their loss is a mean
    over all classes, and has nothing of the others.

    Args:
        task: of the model.
        labels: as a batch has them.
    """
    if TASKS[task].answers != "labels":
        return labelled(labels, task).sum()
    return (labels != IGNORE).sum() / labels.shape[-1]


def _products(one: Tensor, x: Tensor, y: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    return (one, one), (x, one), (y, one), (x, x), (y, y), (x, y)


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
