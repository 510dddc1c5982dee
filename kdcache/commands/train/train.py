"""`kdcache train`: trains a student in this process, as one of a launcher's, or on Ray workers."""

from __future__ import annotations

from collections.abc import Callable

from kdcache.commands.interrupt import interruptible
from kdcache.commands.run_folder import TrainProgress, TrainResult
from kdcache.commands.train.options import Launched, TrainOptions
from kdcache.commands.train.prepare import RunPlan
from kdcache.commands.train.run import Run
from kdcache.errors import IncompleteError, UsageError
from kdcache.files import alone, full_disk
from kdcache.storage import is_remote


def train(
    options: TrainOptions,
    *,
    on_progress: Callable[[TrainProgress], None] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """Train a student, or resume it, or report that it is finished.

    Args:
        on_progress: called for every line of `metrics.jsonl`.
        report: takes a line about what is done before and between them.

    Raises:
        UsageError: options, caches and student do not fit, or the folder holds another run or has
            another process at work in it.
        IncompleteError: a cache's build has not finished, or the run was interrupted or filled the
            disk; the same command continues.
    """
    started = Launched.find()
    if started is not None and started.launcher == "torchrun" and options.launched is None:
        raise UsageError(
            f"torchrun has started {started.world_size} processes for this training. Leave out "
            "--num-workers and --address, which are for workers of Ray."
        )
    options.check_plot()
    with interruptible():
        try:
            if options.launched is not None:
                from kdcache.commands.train.process_group import train_launched

                result = train_launched(options, options.launched, on_progress, report)
            else:
                result = train_one(options, on_progress, report)
        except KeyboardInterrupt:
            raise IncompleteError(f"interrupted. {RunPlan.go_on(options)}") from None
    if options.plot is not None and (options.launched is None or options.launched.rank == 0):
        from kdcache.commands.train.card import plot_run

        plot_run(options.plot, result)
    return result


def train_one(
    options: TrainOptions,
    on_progress: Callable[[TrainProgress], None] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """As `train`, for callers that handle signals themselves."""
    report("opening the caches")
    plan = RunPlan.make(options, on_progress, report)
    finished = plan.finished()
    if finished is not None:
        return finished
    with alone(plan.out, "training"), full_disk(plan.out, lambda: RunPlan.go_on(options)):
        finished = plan.finished()
        if finished is not None:  # by the process that was at work here
            return finished
        if options.workers[1] > 1:
            from kdcache.commands.train.on_ray import train_on_ray

            if not is_remote(options.out):
                plan.announce()  # errors of its checkpoint are reported before workers start
            report(f"starting {options.num_workers} workers on Ray")
            return train_on_ray(plan)
        plan.begin()
        plan.announce()
        report("loading the student")
        return Run.prepare(plan).train()
