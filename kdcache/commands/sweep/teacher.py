"""The teacher's figures that caches tell, beside those of a sweep's students.

Cost: of a language model none, its cross-entropy is in the manifest; of a classifier its evaluation
caches are read once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from kdcache.cache import Cache
from kdcache.commands.train.result import TrainResult
from kdcache.targets import DenseTargets
from kdcache.tasks import TASKS, labelled, positions


def teacher_figures(
    caches: Sequence[Cache], results: Sequence[TrainResult], *, evaluated: bool
) -> dict[str, float]:
    """What the teacher has of the figures that rank students.

    Args:
        caches: the evaluation caches of all runs; empty where they have none or different ones.
        results: of the runs.
        evaluated: whether figures are of evaluation caches, or of training.

    Returns:
        `accuracy` and `hard_loss`, as far as they are known and the same for all runs.
    """
    if caches and not TASKS[caches[0].spec.task].over_ids:
        return _of_classes(caches)
    known = {
        result.eval_teacher_cross_entropy if evaluated else result.teacher_cross_entropy
        for result in results
    }
    (nats,) = known if len(known) == 1 else (None,)
    return {} if nats is None else {"hard_loss": nats}


def _of_classes(caches: Sequence[Cache]) -> dict[str, float]:
    right = known = 0
    nats = 0.0
    for cache in caches:
        codec = cache.codec()
        if not codec.keeps_logits or not (codec.any_temperature or 1.0 in codec.temperatures):
            return {}
        for shard in range(cache.spec.spans):
            data = cache.read(shard)
            targets = data.targets.at(1.0)
            assert isinstance(targets, DenseTargets), "it keeps all logits"
            marked = positions(data.labels, data.task)
            labels = torch.from_numpy(data.labels[marked]).long()
            logits, has = targets.logits.double(), labelled(labels, data.task)
            right += int((logits.argmax(-1) == labels)[has].sum())
            known += int(has.sum())
            nats += float(functional.cross_entropy(logits[has], labels[has], reduction="sum"))
    if not known:
        return {}
    return {"accuracy": right / known, "hard_loss": nats / known}
