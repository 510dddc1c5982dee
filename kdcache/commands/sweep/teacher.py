"""The teacher's figures that caches tell, beside those of a sweep's students.

Cost: of a language model none, its cross-entropy is in the manifest; of a classifier its evaluation
caches are read once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kdcache.cache import Cache
from kdcache.commands.train.result import TrainResult
from kdcache.loss import label_loss, score_loss
from kdcache.student.figures import SUMS, figure, figure_sums, hard_labels
from kdcache.targets import DenseTargets
from kdcache.tasks import TASKS, labelled, positions


def teacher_figures(
    caches: Sequence[Cache],
    results: Sequence[TrainResult],
    *,
    evaluated: bool,
    deltas: Collection[float | None] = (None,),
) -> dict[str, float]:
    """What the teacher has of the figures that rank students.

    Args:
        caches: the evaluation caches of all runs; empty where they have none or different ones.
        results: of the runs.
        evaluated: whether figures are of evaluation caches, or of training.
        deltas: `huber_delta` of all runs, None of those whose error of scores is the squared one:
            the teacher's error is theirs, or left out where they have several.

    Returns:
        The figure of the task, such as `accuracy`, and `hard_loss`, as far as they are known and
        the same for all runs.
    """
    if caches and not TASKS[caches[0].spec.task].over_ids:
        found = _of_rows(caches, next(iter(deltas)))
        several = len(deltas) > 1
        return {name: v for name, v in found.items() if name != "hard_loss" or not several}
    known = {
        result.eval_teacher_cross_entropy if evaluated else result.teacher_cross_entropy
        for result in results
    }
    (nats,) = known if len(known) == 1 else (None,)
    return {} if nats is None else {"hard_loss": nats}


def _of_rows(caches: Sequence[Cache], delta: float | None) -> dict[str, float]:
    counted, nats, task = 0.0, 0.0, caches[0].spec.task
    sums = torch.zeros(SUMS, dtype=torch.float64)
    for cache in caches:
        codec = cache.codec()
        if not codec.keeps_logits or not (codec.any_temperature or 1.0 in codec.temperatures):
            return {}
        for shard in range(cache.spec.spans):
            data = cache.read(shard)
            targets = data.targets.at(1.0)
            assert isinstance(targets, DenseTargets), "it keeps all logits"
            marked = positions(data.labels, data.task)
            labels, logits = torch.from_numpy(data.labels[marked]), targets.logits.double()
            has = labelled(labels, task)
            counted += float(hard_labels(task, labels))
            nats += _hard_loss(task, logits[has], labels[has], delta)
            sums += figure_sums(task, logits, labels)
    if not counted:
        return {}
    return {**figure(task, sums), "hard_loss": nats / counted}


def _hard_loss(task: str, logits: Tensor, labels: Tensor, delta: float | None) -> float:
    """The loss with the hard labels, summed over rows."""
    if TASKS[task].answers == "score":
        how: dict[str, Any] = {} if delta is None else {"divergence": "huber", "huber_delta": delta}
        return float(score_loss(logits, labels, None, alpha=1.0, count=1, **how).total)
    if TASKS[task].answers == "labels":
        return float(label_loss(logits, labels, None, alpha=1.0, count=1).total)
    return float(functional.cross_entropy(logits, labels.long(), reduction="sum"))
