"""`kdcache sweep`: many students of the same caches.

    grid.yaml -> runs, all checked -> students, each built once -> training, several at a time ->
    table, plot, results

A sweep's folder holds `sweep.json` (key, name and options of every run that was ever in its grid),
`runs/NAME/` (the folder of one `kdcache train` each) and `results.json`, `.csv` and `.png` of the
current grid.

Guarantee: the same command resumes. Finished runs are left alone, interrupted ones continue from
their last checkpoint, and a changed grid only adds runs. A failed run does not stop the others.

Trainings run one by one in this process, or as tasks on Ray. There a worker process that dies costs
its run one of three tries, and the run continues from its last checkpoint.
"""

from __future__ import annotations

import os
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdcache import __version__
from kdcache.cluster import at_home, check_own_ray, cluster_address, connect, leave
from kdcache.commands.interrupt import check, interruptible
from kdcache.commands.options import SweepOptions
from kdcache.commands.run_folder import RunFolder, TrainResult, last_metrics
from kdcache.commands.sweep.grid import Grid, GridRun, nothing_started
from kdcache.commands.sweep.results import SEED, RunScore, SweepResult, plot_sweep, teacher_figures
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.prepare import RunPlan
from kdcache.commands.train.student import make_student
from kdcache.commands.train.train import train_one
from kdcache.errors import IncompleteError, KdcacheError, UnexpectedError, UsageError, as_worker
from kdcache.files import alone, inner, local_path, try_output, write_json
from kdcache.metrics import LOSS_PARTS
from kdcache.options import options_of

_TRIES = 3
_MOST_CPUS = 8

Tick = Callable[[], None]
Function = Callable[[Any, Tick], Any]
RunOutcome = tuple[int, Any]


class LocalPool:
    """Applies a function to items in this process, one after the other: `--workers 0`.

    Attributes:
        gpus: GPUs that an item is given; None for those that this process sees.
    """

    def __init__(self, options: SweepOptions, items: int) -> None:
        """Prepare for so many items at most."""
        self.gpus = options.gpus_per_run

    def map(self, function: Function, items: Sequence[Any], tick: Tick) -> Iterator[RunOutcome]:
        """Number and result of each item, or the exception that it ended with, as they come.

        Args:
            function: of a module (not a closure), called as `function(item, tick)`.
            items: what it is applied to, started in this order.
            tick: to be called every now and then in this process.
        """
        for i, item in enumerate(items):
            try:
                with as_worker():
                    result = function(item, tick)
            except KdcacheError as error:
                result = error
            yield i, result

    def stop(self) -> None:
        """Abandon unfinished items."""


class RayPool(LocalPool):
    """One Ray task an item, as many at once as were asked for or as there is room for."""

    def __init__(self, options: SweepOptions, items: int) -> None:
        """Connect (or start a local Ray) and share it out.

        Raises:
            UsageError: the cluster is unreachable or too small for a task.
        """
        import ray

        self._ray = ray
        self._owns = connect(options.address)
        self._running: dict[Any, int] = {}
        total = ray.cluster_resources()
        cores, cards = int(total.get("CPU", 1)), total.get("GPU", 0)
        workers, gpus = options.workers, options.gpus_per_run
        self.gpus = gpus = (1.0 if cards else 0.0) if gpus is None else gpus
        # A cluster that grows on demand may have room later: a fixed number of workers waits.
        fixed = workers is None or cluster_address(options.address) is None
        if fixed and gpus > cards:
            self.stop()
            raise UsageError(
                f"the Ray cluster has {cards:g} GPUs, a run needs {gpus:g}. Use --gpus-per-run 0, "
                "or set --workers to the number to wait for."
            )
        runs_at_once = int(cards // gpus) if gpus else cores
        self._count = max(1, min(workers or runs_at_once, items))
        self._threads = max(1, min(_MOST_CPUS, cores // self._count))
        self._remote = ray.remote(_call).options(
            num_cpus=self._threads,
            num_gpus=gpus,
            max_retries=_TRIES - 1,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self._threads)}},
        )

    def map(self, function: Function, items: Sequence[Any], tick: Tick) -> Iterator[RunOutcome]:
        """See `LocalPool.map`."""
        waiting = deque(enumerate(items))
        while waiting or self._running:
            while waiting and len(self._running) < self._count:
                i, item = waiting.popleft()
                ref = self._remote.remote(str(Path.cwd()), self._threads, function, item)
                self._running[ref] = i
            done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=1.0)
            tick()
            check()
            if self._owns:
                check_own_ray()
            for ref in done:
                i = self._running.pop(ref)
                try:
                    yield i, self._ray.get(ref)
                except self._ray.exceptions.RayError as error:
                    cause = getattr(error, "cause", None)
                    yield i, cause if isinstance(cause, KdcacheError) else error

    def stop(self) -> None:
        """See `LocalPool.stop`."""
        for ref in self._running:
            self._ray.cancel(ref, force=True)
        self._running.clear()
        if self._owns:
            leave()


@as_worker()
def _call(folder: str, threads: int, function: Function, item: Any) -> Any:
    """Run on a worker, in the sweep's own working directory."""
    import torch

    at_home(folder)
    torch.set_num_threads(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return function(item, lambda: None)


SWEEP_FILE = "sweep.json"
_RUNS = "runs"


@dataclass(frozen=True)
class SweepProgress:
    """The progress of a sweep.

    Attributes:
        step: steps done, over all runs.
        before: steps that were done before this sitting.
        seconds: since this sitting began to train.
    """

    runs: int
    done: int
    failed: int
    step: int
    steps: int
    before: int
    seconds: float


def sweep(
    options: SweepOptions, *, on_progress: Callable[[SweepProgress], None] | None = None
) -> SweepResult:
    """Train or resume every run of a grid, and compare their figures.

    Args:
        on_progress: called about once a second and after every run.

    Raises:
        UsageError: the grid, a run of it or a student is wrong (nothing was started), or the folder
            holds something else.
        IncompleteError: interrupted, or some runs failed; the same command resumes.
    """
    job: _Sweep | None = None
    with interruptible():
        try:
            job = _Sweep(options, on_progress)
            if job.missing():
                job.train()
        except KeyboardInterrupt:
            done = f": {len(job.finished)} of {len(job.runs)} runs are finished" if job else ""
            raise IncompleteError(f"interrupted{done}. To continue: {_command(options)}") from None
    result = job.result()
    if result is not None:
        result.write(job.out)
        plot_sweep(job.out / "results.png", result)
    if job.failed or result is None:
        raise job.failures()
    return result


class _Sweep:
    """A running sweep: its runs, finished and failed ones."""

    def __init__(
        self, options: SweepOptions, on_progress: Callable[[SweepProgress], None] | None
    ) -> None:
        self.options, self.on_progress = options, on_progress
        self.out = local_path(options.out)
        self.grid = Grid.read(options.grid)
        self.runs = {run.key: run for run in self.grid.runs}
        self._name_runs()
        tasks = sorted({plan.caches[0].spec.task for plan in self.plans.values()})
        if len(tasks) > 1:
            raise UsageError(
                f"the caches of the grid are for {' and '.join(tasks)}, and runs of several tasks "
                "have no figure to be compared by. Make a sweep of each task."
            )
        self.finished: dict[str, TrainResult] = {}
        for key, plan in self.plans.items():
            result = plan.finished()
            if result is not None:
                self.finished[key] = result
        self.failed: dict[str, KdcacheError] = {}
        self.made = 0
        self._steps: dict[str, int] = {}
        self._before, self._begun = 0, 0.0

    def _name_runs(self) -> None:
        """Give each run its folder: the one that it had in earlier grids, or a new one."""
        self.known = _read_manifest(self.out)
        self.names = {
            key: inner(self.known[key]["name"]) if key in self.known else run.name
            for key, run in self.runs.items()
        }
        self.plans = {
            key: run.at(self.out / _RUNS / self.names[key]) for key, run in self.runs.items()
        }

    def missing(self) -> list[str]:
        """Keys of the missing runs."""
        return [key for key in self.runs if key not in self.finished]

    def train(self) -> None:
        """Train the missing runs."""
        missing = self.missing()
        try_output(self.options.out)
        pool = (RayPool if self.options.workers != 0 else LocalPool)(self.options, len(missing))
        try:
            self._check_students(pool, missing)
            with alone(self.out, "sweep"):
                self._name_runs()  # another sweep may have ended here since
                (self.out / _RUNS).mkdir(exist_ok=True)
                self._write_manifest()
                self._steps = {key: plan.steps for key, plan in self.plans.items()}
                self._before, self._begun = self._step(), time.perf_counter()
                items = [on_gpus(self.plans[key].options, pool.gpus) for key in missing]
                for i, outcome in pool.map(_train_one, items, self._tell):
                    self._settle(missing[i], outcome)
                    self._tell()
        finally:
            pool.stop()

    def _check_students(self, pool: LocalPool, missing: Sequence[str]) -> None:
        """Build each student once and drop it: its errors are reported before any training."""
        student = [one.name for one in options_of(TrainOptions) if one.decides == "student"]
        distinct = {
            tuple(getattr(self.plans[key].options, name) for name in student): key
            for key in reversed(missing)
        }
        keys = list(reversed(distinct.values()))
        wrong: dict[str, None] = {}
        items = [self.plans[key].options for key in keys]
        for _, outcome in pool.map(_try_student, items, lambda: None):
            if isinstance(outcome, KdcacheError) and not isinstance(outcome, UnexpectedError):
                wrong.update(dict.fromkeys(str(outcome).splitlines()))
            elif isinstance(outcome, BaseException):
                raise outcome
        if wrong:
            raise nothing_started(self.options.grid, list(wrong))

    def _settle(self, key: str, outcome: Any) -> None:
        if isinstance(outcome, TrainResult):
            self.finished[key] = outcome
            self.made += outcome.made  # a run may have been finished by another sweep
            return
        known = isinstance(outcome, KdcacheError)
        self.failed[key] = outcome if known else UnexpectedError.of(outcome)

    def _step(self) -> int:
        step = 0
        for key, plan in self.plans.items():
            if key in self.finished:
                step += self._steps[key]  # a run that ended early leaves nothing to do
            else:
                step += (last_metrics(plan.out) or {"step": 0})["step"]
        return step

    def _tell(self) -> None:
        if self.on_progress is None:
            return
        self.on_progress(
            SweepProgress(
                runs=len(self.runs),
                done=len(self.finished),
                failed=len(self.failed),
                step=self._step(),
                steps=sum(self._steps.values()),
                before=self._before,
                seconds=time.perf_counter() - self._begun,
            )
        )

    def _write_manifest(self) -> None:
        entries = {
            key: {
                "name": self.names[key],
                "setting": run.setting,
                "options": self.plans[key].options.shown(),
            }
            for key, run in self.runs.items()
        }
        document = {"kdcache": __version__, "runs": {**self.known, **entries}}
        write_json(self.out / SWEEP_FILE, document)

    def result(self) -> SweepResult | None:
        """The figures of the finished runs; None if there are none."""
        scores = [
            _score(run, self.finished[key])
            for key, run in self.runs.items()
            if key in self.finished
        ]
        if not scores:
            return None
        plans = list(self.plans.values())
        evaluated = all(plan.eval_caches for plan in plans)
        sets = {tuple(cache.digest for cache in plan.eval_caches) for plan in plans}
        return SweepResult.of(
            self.out,
            scores,
            made=self.made,
            combinations=self.grid.combinations,
            evaluated=evaluated,
            teacher=teacher_figures(
                plans[0].eval_caches if len(sets) == 1 else (),
                list(self.finished.values()),
                evaluated=evaluated,
                deltas={
                    plan.options.huber_delta if plan.options.divergence == "huber" else None
                    for plan in plans
                },
            ),
            task=plans[0].caches[0].spec.task,
        )

    def failures(self) -> IncompleteError:
        """What failed and how to resume."""
        lines = [
            f"  {self.names[key]}: {getattr(error, 'line', ' '.join(str(error).splitlines()))}"
            for key, error in self.failed.items()
        ]
        others = f"; the others are in {self.out}/results.csv" if self.finished else ""
        failed = IncompleteError(
            f"{len(self.failed)} of {len(self.runs)} runs failed{others}:\n"
            + "\n".join(lines)
            + f"\nTo try them again: {_command(self.options)}"
        )
        failed.trace = "\n".join(error.trace for error in self.failed.values())
        return failed


def on_gpus(options: TrainOptions, gpus: float | None) -> TrainOptions:
    """A run on what it was given: Ray leaves GPUs visible to tasks that asked for none."""
    return options if gpus is None else replace(options, gpus_per_worker=float(gpus > 0))


def _try_student(options: TrainOptions, _: Tick) -> None:
    make_student(RunPlan.make(options))


def _train_one(options: TrainOptions, tick: Tick) -> TrainResult:
    return train_one(options, on_progress=lambda _: tick())


def _read_manifest(out: Path) -> dict[str, Any]:
    """The runs of earlier grids.

    Raises:
        UsageError: the folder is not a sweep's.
    """
    document = RunFolder(out, SWEEP_FILE, "a sweep of kdcache", (_RUNS,)).document()
    return {} if document is None else dict(document["runs"])


def _score(run: GridRun, result: TrainResult) -> RunScore:
    trained = {name: getattr(result, name) for name in ("loss", *LOSS_PARTS)}
    figures = result.eval or {name: value for name, value in trained.items() if value is not None}
    return RunScore(
        name=Path(result.out).name,
        out=result.out,
        setting={name: text for name, text in run.setting.items() if name != SEED},
        seed=run.setting.get(SEED),
        figures=figures,
        parameters=result.parameters,
        steps=result.steps,
        best_step=result.best_step,
        seconds=result.seconds,
    )


def _command(options: SweepOptions) -> str:
    words = ["kdcache", "sweep", options.grid, "--out", options.out]
    for name in ("workers", "gpus_per_run", "address"):
        value = getattr(options, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", f"{value:g}" if name != "address" else value]
    return shlex.join(words)
