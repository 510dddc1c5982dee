"""Runs the trainings of a sweep: one by one in this process, or as tasks on a Ray cluster.

A pool applies a function to items and returns outcomes as they come. A worker process that dies
costs its item one of three tries, and the training run then continues from its last checkpoint. An
exception is an outcome like any other.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from kdcache.cluster import at_home, check_own_ray, cluster_address, connect, leave
from kdcache.commands.interrupt import check
from kdcache.errors import KdcacheError, UsageError, as_worker

_TRIES = 3
_MOST_CPUS = 8

Tick = Callable[[], None]
Function = Callable[[Any, Tick], Any]
RunOutcome = tuple[int, Any]


class Pool(Protocol):
    """Applies a function to items.

    Attributes:
        gpus: GPUs that an item is given; None for those that this process sees.
    """

    gpus: float | None

    def map(self, function: Function, items: Sequence[Any], tick: Tick) -> Iterator[RunOutcome]:
        """Number and result of each item, or the exception that it ended with, as they come.

        Args:
            function: of a module (not a closure), called as `function(item, tick)`.
            items: what it is applied to, started in this order.
            tick: to be called every now and then in this process.
        """

    def stop(self) -> None:
        """Abandon unfinished items."""


class LocalPool:
    """This process, one item after the other: `--workers 0`."""

    def __init__(self, gpus: float | None) -> None:
        """Say what a run may use."""
        self.gpus = gpus

    def map(self, function: Function, items: Sequence[Any], tick: Tick) -> Iterator[RunOutcome]:
        """See `Pool.map`."""
        for i, item in enumerate(items):
            try:
                with as_worker():
                    result = function(item, tick)
            except KdcacheError as error:
                result = error
            yield i, result

    def stop(self) -> None:
        """See `Pool.stop`."""


class RayPool:
    """One Ray task an item."""

    def __init__(
        self, *, workers: int | None, gpus: float | None, address: str | None, items: int
    ) -> None:
        """Connect (or start a local Ray) and share it out.

        Args:
            workers: tasks at once; None for as many as there is room for.
            gpus: GPUs of a task; None for one where there are any.
            address: Ray address; None starts a Ray of this process, unless RAY_ADDRESS says
                otherwise.
            items: how many there will be at most.

        Raises:
            UsageError: the cluster is unreachable or too small for a task.
        """
        import ray

        self._ray = ray
        self._owns = connect(address)
        self._running: dict[Any, int] = {}
        total = ray.cluster_resources()
        cores, cards = int(total.get("CPU", 1)), total.get("GPU", 0)
        gpus = (1.0 if cards else 0.0) if gpus is None else gpus
        self.gpus: float | None = gpus
        # A cluster that grows on demand may have room later: a fixed number of workers waits.
        fixed = workers is None or cluster_address(address) is None
        if fixed and gpus > cards:
            self.stop()
            raise UsageError(
                f"the Ray cluster has {cards:g} GPUs, a run needs {gpus:g}. Use --gpus-per-run 0, "
                "or set --workers to the number to wait for."
            )
        room = int(cards // gpus) if gpus else cores
        self._count = max(1, min(workers or room, items))
        self._threads = max(1, min(_MOST_CPUS, cores // self._count))
        self._remote = ray.remote(_call).options(
            num_cpus=self._threads,
            num_gpus=gpus,
            max_retries=_TRIES - 1,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self._threads)}},
        )

    def map(self, function: Function, items: Sequence[Any], tick: Tick) -> Iterator[RunOutcome]:
        """See `Pool.map`."""
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
        """See `Pool.stop`."""
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
