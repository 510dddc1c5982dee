"""One training in several processes that torch.distributed has joined.

Each process makes its own student from the same seed and takes its slices of the same global
batches; torch averages gradients over them (DDP, or FSDP on demand). The first one writes the run's
folder, which all must be able to read.

Guarantee: before the first step all have compared what they are about to do (options, caches,
checkpoint), and an error of one is raised in all of them. A process that went on alone would wait
for the others for ever, or train on other rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import distributed

from kdcache.commands.interrupt import check
from kdcache.commands.run_folder import TrainProgress, TrainResult
from kdcache.commands.train.options import Launched, TrainOptions
from kdcache.commands.train.prepare import RunPlan
from kdcache.commands.train.run import Run
from kdcache.errors import IncompleteError, KdcacheError, UsageError
from kdcache.files import alone, full_disk
from kdcache.student.precision import Computing

_MEET = datetime.timedelta(minutes=30)
# What gloo and NCCL say when a peer is gone; their errors have no class of their own everywhere.
_PEER_GONE = re.compile(
    r"gloo|nccl|process ?group|connection (closed|reset)|broken pipe|remote process", re.I
)


class SharedError(Exception):
    """Raised in all processes alike, for an error that one of them had."""

    def __init__(self, error: KdcacheError) -> None:
        """Wrap it."""
        super().__init__(str(error))
        self.error = error


def train_in_group(
    options: TrainOptions,
    on_progress: Callable[[TrainProgress], None] | None = None,
    report: Callable[[str], None] = lambda line: None,
    *,
    locked: bool = False,
    owner: str = "",
) -> TrainResult:
    """Train as one of the processes of torch.distributed's default group; the first one reports.

    Args:
        options: the same in all of them; `num_workers` is their number.
        locked: the run's folder is locked by whoever started the processes.
        owner: what they own a run in an object store by.

    Raises:
        SharedError: one of them cannot begin.
    """
    run, finished, facts = None, None, {}
    with contextlib.ExitStack() as held:
        with _shared() as share:
            plan = RunPlan.make(options, on_progress, report)
        share({})
        first = distributed.get_rank() == 0
        with _shared() as share:  # nobody looks into the folder while the first begins in it
            if first:
                finished = plan.finished()
            if first and finished is None:
                if not locked:
                    held.enter_context(alone(plan.out, "training"))
                    finished = plan.finished()  # by the process that was at work here
                if finished is None:
                    plan.begin(owner)
        share({})
        with _shared() as share:
            if not first:
                finished = plan.finished()
            if finished is None:
                plan.folder.bring()
            facts = {**options.shown(), **_facts(plan), "finished": finished is not None}
        share(facts)
        if finished is not None:
            return finished
        held.enter_context(full_disk(plan.out, lambda: RunPlan.go_on(options)))
        with _shared() as share:
            plan.announce()
            run = Run.prepare(plan)
        share({})
        assert run is not None, "its error was shared"
        return run.train()


def _facts(plan: RunPlan) -> dict[str, Any]:
    """What all processes must see alike, next to the options."""
    checkpoint = plan.checkpoint()
    return {
        "caches": [cache.digest for cache in (*plan.caches, *plan.eval_caches)],
        "checkpoint": None if checkpoint is None else checkpoint.name,
        "streams": plan.streams,
    }


@contextlib.contextmanager
def _shared() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Keep an error of the block for the function that this gives, which shares it with all."""
    mine: list[KdcacheError] = []

    def share(facts: Mapping[str, Any]) -> None:
        everyones: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everyones, (mine[0] if mine else None, dict(facts)))
        for error, _ in everyones:
            if error is not None:
                raise SharedError(error)
        for rank, (_, theirs) in enumerate(everyones):
            if theirs != everyones[0][1]:
                raise SharedError(_disagreement(everyones[0][1], theirs, rank))

    try:
        yield share
    except KdcacheError as error:
        mine.append(error)


def _disagreement(first: Mapping[str, Any], other: Mapping[str, Any], rank: int) -> UsageError:
    differ = [name for name in first if first[name] != other.get(name)]
    words = ", ".join(f"{name}: {first[name]} and {other.get(name)}" for name in differ)
    if {"checkpoint", "finished", "streams"} & {*differ}:
        return UsageError(
            f"processes 0 and {rank} of this training see different files in its folder ({words}). "
            "All of them must read one --out: use a file system that they share, or an object "
            "store."
        )
    return UsageError(
        f"processes 0 and {rank} of one training have different options or caches ({words}). Give "
        "all the same ones. For separate trainings start each with a launcher of its own."
    )


# Processes of a launcher


def train_launched(
    options: TrainOptions,
    launched: Launched,
    on_progress: Callable[[TrainProgress], None] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """Train as one of the processes that torchrun or srun started.

    Args:
        options: without `num_workers` and `address`, which the launcher decides.
        launched: this process among them.

    Raises:
        UsageError, IncompleteError: as `train`; also where the processes do not find each other, or
            one of them ended. All but the first mark errors that the first one reports.
    """
    options = dataclasses.replace(options, num_workers=launched.world_size)
    try:
        with _joined(options, launched):
            return train_in_group(options, on_progress, report)
    except SharedError as shared:
        shared.error.reported = launched.rank != 0
        raise shared.error from None
    except KeyboardInterrupt:
        raise _interrupted(options, launched) from None
    except KdcacheError:
        raise
    except Exception as error:
        try:
            check()  # a signal to all of them ends one first, and the others lose it
        except KeyboardInterrupt:
            raise _interrupted(options, launched) from None
        if not (isinstance(error, RuntimeError) and _PEER_GONE.search(str(error))):
            raise
        raise IncompleteError(
            f"another process of this training has ended (this is {launched.rank} of "
            f"{launched.world_size}). {RunPlan.go_on(options)}"
        ) from error


def _interrupted(options: TrainOptions, launched: Launched) -> IncompleteError:
    """Reported by the first process alone."""
    error = IncompleteError(f"interrupted. {RunPlan.go_on(options)}")
    error.reported = launched.rank != 0
    return error


@contextlib.contextmanager
def _joined(options: TrainOptions, launched: Launched) -> Iterator[None]:
    """The process group of all processes, unless the caller has made one."""
    if distributed.is_initialized():
        yield
        return
    os.environ.update(launched.environment)
    if launched.launcher == "srun":  # torchrun has set it
        os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    gpu = Computing.choose(options.precision, options.gpus_per_worker).gpu
    device = None
    if gpu:  # srun may show each process its own GPU alone
        device = torch.device("cuda", launched.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    try:
        distributed.init_process_group("nccl" if gpu else "gloo", timeout=_MEET, device_id=device)
    except distributed.DistError as error:
        raise IncompleteError(
            f"the {launched.world_size} processes of this training have not met at "
            f"{launched.address}:{launched.port} ({str(error).splitlines()[0]}). Start "
            f"as many as {launched.launcher} promises, on nodes that reach that port, or name "
            "another one with MASTER_ADDR and MASTER_PORT."
        ) from error
    try:
        yield
    except SharedError:
        distributed.destroy_process_group()
        raise
    except BaseException:
        if not gpu:  # NCCL waits for operations that a lost process never ends
            distributed.destroy_process_group()
        raise
    else:
        distributed.destroy_process_group()
