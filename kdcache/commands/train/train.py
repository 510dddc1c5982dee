"""`kdcache train`: trains a student in this process or on Ray workers."""

from __future__ import annotations

from collections.abc import Callable

from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.prepare import Plan
from kdcache.commands.train.result import TrainProgress, TrainResult
from kdcache.commands.train.run import Run


def train(
    options: TrainOptions, *, on_progress: Callable[[TrainProgress], None] | None = None
) -> TrainResult:
    """Train a student, or resume it, or report that it is finished.

    Args:
        options: see `TrainOptions`.
        on_progress: called for every line of `metrics.jsonl`.

    Raises:
        UsageError: options, caches and student do not fit, or the folder holds another run.
        IncompleteError: a cache's build is unfinished.
    """
    plan = Plan.make(options)
    finished = plan.finished()
    if finished is not None:
        return finished
    plan.checkpoint()  # its errors are reported before workers start
    if options.num_workers > 1:
        from kdcache.commands.train.on_ray import train_on_ray

        return train_on_ray(options, on_progress)
    return Run.prepare(plan, on_progress).train()
