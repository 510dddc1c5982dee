"""Who does the spans: threads of this process, or actors on a Ray cluster. Both look alike to the
driver.

A crew takes spans while it has room and hands back outcomes. It knows about workers and nodes that
come and go; it does not know what is still to do, what was tried, or when to give up: that is
`build`'s part.
"""

from __future__ import annotations

import concurrent.futures as futures
import logging
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from kdcache.corpus import Span
from kdcache.errors import KdcacheError, UsageError
from kdcache.worker import Job, SpanReport, SpanWorker

logger = logging.getLogger(__name__)

_IN_FLIGHT = 2
_START_TRIES = 3


@dataclass(frozen=True)
class Outcome:
    """A span that left a worker: with a report, or with the error that ended it.

    `lost` tells that the worker died with the span, so the span itself may or may not be at fault.
    """

    span: Span
    report: SpanReport | None = None
    error: BaseException | None = None
    lost: bool = False


class Crew(ABC):
    """Workers that make shards."""

    @abstractmethod
    def room(self, *, alone: bool = False) -> bool:
        """Whether a span can be given now; `alone` asks for a worker that has nothing else."""

    @abstractmethod
    def give(self, span: Span, *, alone: bool = False) -> None:
        """Hand a span to the least busy worker; with `alone` nothing else runs beside it."""

    @abstractmethod
    def wait(self, seconds: float) -> list[Outcome]:
        """Outcomes that arrived; waits for the first one, `seconds` at most."""

    @abstractmethod
    def stop(self) -> None:
        """Abandon what is in flight and let the workers go."""

    @abstractmethod
    def workers(self) -> int:
        """How many workers are ready now."""


class LocalCrew(Crew):
    """One worker in this process: `--workers 0`."""

    def __init__(self, job: Job) -> None:
        self._worker = SpanWorker(job)
        self._pool = futures.ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="kdcache-span")
        self._spans: dict[futures.Future[SpanReport], Span] = {}

    def room(self, *, alone: bool = False) -> bool:
        """See `Crew.room`."""
        return len(self._spans) < (1 if alone else _IN_FLIGHT)

    def give(self, span: Span, *, alone: bool = False) -> None:
        """See `Crew.give`."""
        self._spans[self._pool.submit(self._worker.run, span)] = span

    def wait(self, seconds: float) -> list[Outcome]:
        """See `Crew.wait`."""
        done, _ = futures.wait(self._spans, seconds, futures.FIRST_COMPLETED)
        outcomes = []
        for future in done:
            span, error = self._spans.pop(future), future.exception()
            outcomes.append(Outcome(span, None if error else future.result(), error))
        return outcomes

    def stop(self) -> None:
        """See `Crew.stop`."""
        self._worker.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def workers(self) -> int:
        """See `Crew.workers`."""
        return 1


@dataclass
class _Actor:
    handle: Any
    ready: Any
    in_flight: dict[Any, Span] = field(default_factory=dict)
    started: bool = False
    alone: bool = False


class RayCrew(Crew):
    """One actor a worker on a Ray cluster. A worker that dies is replaced; its spans come back
    as lost.
    """

    def __init__(
        self,
        job: Job,
        *,
        workers: int | None,
        gpus: float,
        address: str | None,
        cpus: int | None = None,
    ) -> None:
        """Connect (or start a local Ray) and ask for workers.

        Args:
            job: what the workers do.
            workers: how many; None for as many as the cluster has room for.
            gpus: GPUs a worker.
            address: Ray address; None starts a Ray of this process, unless RAY_ADDRESS says
                otherwise.
            cpus: CPUs a worker; None shares the cluster's evenly.

        Raises:
            UsageError: the cluster cannot be reached or has not what a worker needs.
        """
        import ray

        self._ray = ray
        self._owns = connect(address)
        total = ray.cluster_resources()
        cores = int(total.get("CPU", 1))
        # A cluster that grows on demand may have room later: what is asked for by number waits.
        fixed = workers is None or cluster_address(address) is None
        if fixed and gpus and total.get("GPU", 0) < gpus:
            raise UsageError(
                f"the Ray cluster has {total.get('GPU', 0):g} GPUs, a worker needs {gpus:g}. "
                "Use --gpus-per-worker 0, or say with --workers how many to wait for."
            )
        count = workers or max(1, int(total.get("GPU", 0) // gpus) if gpus else cores)
        cpus = cpus or max(1, min(8, cores // count))
        if fixed and cpus * count > cores:
            raise UsageError(
                f"{count} workers need {cpus * count} CPUs, the Ray cluster has {cores}. "
                f"Use --workers {cores // cpus}."
            )
        threads = cpus
        self._job = Job(job.url, job.rows, job.teacher, job.batch_tokens, threads)
        self._class = ray.remote(SpanWorker).options(
            num_cpus=cpus,
            num_gpus=gpus,
            max_concurrency=_IN_FLIGHT,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        )
        self._failed_starts = 0
        self._actors = [self._start() for _ in range(count)]

    def _start(self) -> _Actor:
        handle = self._class.remote(self._job)
        return _Actor(handle, handle.__ray_ready__.remote())

    def room(self, *, alone: bool = False) -> bool:
        """See `Crew.room`."""
        return self._free(alone) is not None

    def _free(self, alone: bool) -> _Actor | None:
        limit = 1 if alone else _IN_FLIGHT
        open_ = [a for a in self._actors if a.started and not a.alone and len(a.in_flight) < limit]
        return min(open_, key=lambda a: len(a.in_flight), default=None)

    def give(self, span: Span, *, alone: bool = False) -> None:
        """See `Crew.give`."""
        actor = self._free(alone)
        assert actor is not None, "room() comes first"
        actor.alone = alone
        actor.in_flight[actor.handle.run.remote(span)] = span

    def wait(self, seconds: float) -> list[Outcome]:
        """See `Crew.wait`."""
        refs = {a.ready: a for a in self._actors if not a.started}
        refs |= {ref: a for a in self._actors for ref in a.in_flight}
        done, _ = self._ray.wait(list(refs), num_returns=1, timeout=seconds, fetch_local=False)
        if done:  # take everything else that is there too
            done, _ = self._ray.wait(
                list(refs), num_returns=len(refs), timeout=0, fetch_local=False
            )
        outcomes: list[Outcome] = []
        for ref in done:
            actor = refs[ref]
            if ref is actor.ready:
                self._started(actor)
            elif ref in actor.in_flight:
                outcomes.extend(self._finished(actor, ref))
        return outcomes

    def _started(self, actor: _Actor) -> None:
        try:
            self._ray.get(actor.ready)
            actor.started = True
            self._failed_starts = 0
        except self._ray.exceptions.RayError as error:
            cause = _cause(error)
            if isinstance(cause, KdcacheError):
                raise cause from None
            self._failed_starts += 1
            if self._failed_starts >= _START_TRIES * len(self._actors):
                raise
            logger.warning("a worker did not start (%s); trying another", _first_line(error))
            self._replace(actor)

    def _finished(self, actor: _Actor, ref: Any) -> list[Outcome]:
        try:
            report = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            return [Outcome(self._take(actor, ref), error=_cause(error))]
        except self._ray.exceptions.RayError as error:
            # The process or its node is gone, and everything it had with it.
            logger.warning("a worker died (%s); starting another", _first_line(error))
            lost = [Outcome(span, error=error, lost=True) for span in actor.in_flight.values()]
            actor.in_flight.clear()
            self._replace(actor)
            return lost
        return [Outcome(self._take(actor, ref), report)]

    def _take(self, actor: _Actor, ref: Any) -> Span:
        actor.alone = False
        return actor.in_flight.pop(ref)

    def _replace(self, actor: _Actor) -> None:
        self._ray.kill(actor.handle)
        self._actors[self._actors.index(actor)] = self._start()

    def stop(self) -> None:
        """See `Crew.stop`."""
        for actor in self._actors:
            self._ray.kill(actor.handle)
        if self._owns:
            self._ray.shutdown()

    def workers(self) -> int:
        """See `Crew.workers`."""
        return sum(actor.started for actor in self._actors)


def cluster_address(address: str | None) -> str | None:
    """The cluster that is meant: the one named, else RAY_ADDRESS (`ray job submit` sets it), or
    None for a Ray of this process."""
    address = address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address


def connect(address: str | None) -> bool:
    """Join or start a Ray; whether this call started it, so that `stop` ends it."""
    import ray

    if ray.is_initialized():
        return False
    # Without an address Ray would join any cluster it finds running on this machine.
    address = cluster_address(address) or "local"
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        quiet["include_dashboard"] = False
    try:
        ray.init(address=address, **quiet)
    except ConnectionError as error:
        raise UsageError(f"no Ray cluster answers at {address}: {error}") from error
    return True


def _cause(error: BaseException) -> BaseException:
    return getattr(error, "cause", None) or error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
