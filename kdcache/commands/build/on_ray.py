"""Workers as actors on a Ray cluster, which come and go with its nodes.

A worker that is requested and has no room waits as a pending actor, which an autoscaler takes as
demand for a node. `auto` begins with as many workers as the nodes hold, one at least. While all of
them are busy and spans are left it requests more: as many as there are, so their number doubles
each time that nodes have come. Once no span is left, pending requests are withdrawn.

Cost: every answer of an actor arrives in one queue, from Ray's own thread, so an answer costs the
driver the same among ten workers and among thousands.
"""

from __future__ import annotations

import logging
import os
import queue
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from kdcache.cluster import (
    Need,
    Placement,
    Wait,
    all_up,
    at_home,
    call_at_home,
    check_own_ray,
    cluster_address,
    connect,
    describe,
    launching,
    leave,
    nodes_up,
    reason,
    share_of_cpus,
)
from kdcache.commands.build.options import WorkerOptions
from kdcache.commands.build.source import Work
from kdcache.commands.build.workers import (
    IN_FLIGHT,
    EventSink,
    Fault,
    Job,
    Outcome,
    SpanReport,
    SpanWorker,
    WorkerFigures,
    Workers,
    arrived,
    ignore_events,
)
from kdcache.errors import IncompleteError, KdcacheError, UnexpectedError, UsageError, as_worker
from kdcache.humanize import counted
from kdcache.teacher.engine import TeacherDied

logger = logging.getLogger(__name__)

_START_TRIES = 3
_START_EVERY = 5.0
_HEARTBEATS = 10  # at least, in the time after which a worker counts as hung
_BEAT_EVERY = 2.0  # seconds between heartbeats of a worker, or more
_BEATS = 100  # heartbeats of all workers a second, at most


class RayWorker(SpanWorker):
    """A worker in its own process: reports where it is and whether it makes progress, and keeps the
    figures that Ray's dashboard shows."""

    @as_worker()
    def __init__(self, job: Job, folder: str, need: Need) -> None:
        at_home(folder)
        import ray

        here = ray.get_runtime_context().get_node_id()
        # The share of its own node: nodes of one cluster may have different numbers of CPUs.
        (node,) = (node for node in ray.nodes() if node["NodeID"] == here)
        super().__init__(replace(job, threads=need.threads(node["Resources"])))
        from ray.util.metrics import Counter

        self._positions = Counter("kdcache_positions", description="Positions cached.")
        self._bytes = Counter("kdcache_bytes", description="Bytes of shards committed.")
        self._teacher = Counter(
            "kdcache_teacher_seconds", description="Seconds spent in the teacher."
        )

    def where(self) -> tuple[str, str, int]:
        """Name of this worker (host and process), Ray's id of its node, tokens of a batch."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        return f"{ray.util.get_node_ip_address()}:{os.getpid()}", node, self.source.batch_tokens

    def run(self, span: Work) -> SpanReport:
        """See `SpanWorker.run`."""
        report = super().run(span)
        for counter, value in (
            (self._positions, report.entry.positions),
            (self._bytes, report.entry.bytes),
            (self._teacher, report.teacher_seconds),
        ):
            if value:
                counter.inc(value)
        return report


@dataclass(eq=False)
class _Actor:
    handle: Any
    place: Placement
    nodes: set[str] = field(default_factory=set)
    figures: WorkerFigures | None = None  # once it is ready
    in_flight: dict[int, Work] = field(default_factory=dict)
    alone: bool = False
    group: str = ""  # of its last span
    last_progress: float = 0.0
    asked: bool = False


class RayWorkers(Workers):
    """One actor a worker on a Ray cluster. A worker that dies is replaced; its spans come back
    as outcomes with a fault.

    A worker hangs if one of its spans made no progress (a record read, a batch finished) for
    `hang_seconds`. A separate thread of the actor answers; a process that is stopped does
    not answer, which is the same as not moving.
    """

    def __init__(
        self,
        job: Job,
        options: WorkerOptions,
        *,
        gpus: float,
        across: bool = False,
        tell: EventSink = ignore_events,
    ) -> None:
        """Connect (or start a local Ray) and ask for workers.

        Between the smallest and the largest number there are as many as the cluster has room for,
        now and later, and as an autoscaler adds.

        Args:
            options: how many there are, where, and when one counts as hung.
            gpus: GPUs a worker.
            across: whether they may be on several nodes.

        Raises:
            UsageError: the cluster is unreachable, or this machine too small for the workers.
        """
        self._owns = connect(options.address)
        import ray

        self._ray = ray
        self._actors: dict[_Actor, None] = {}  # in the order of hiring
        # Actors by spans in flight, for those with room; entries may be out of date.
        self._open: list[deque[_Actor]] = [deque() for _ in range(IN_FLIGHT)]
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._fewest, self._most = options.worker_range
        self._grows = cluster_address(options.address) is not None
        self._hang, self._tell = options.hang_seconds, tell
        # A clock that stands still while this process does (Ctrl-Z, a closed laptop): meanwhile no
        # worker hangs.
        self._now, self._ticked = 0.0, time.monotonic()
        self._last_start = self._checked = 0.0
        self._wait = Wait(options.wait_minutes)
        self._failed_starts = 0
        try:
            exact = self._fewest if self._fewest == self._most else None
            self._need = share_of_cpus(gpus, exact, nodes_up())
            if options.cpus_per_worker is not None:
                self._need = Need(gpus, options.cpus_per_worker, exact, exact=True)
            self._need = replace(self._need, across=across)
            if not self._grows:
                self._refuse_too_many()
            # A heartbeat has a thread of its own: behind spans it would come when they are done.
            self._class = ray.remote(concurrency_groups={"pulse": 1})(RayWorker)
            self._job = job
            self._start_missing()
        except BaseException:
            self.stop()
            raise

    # Hiring

    def _workers_that_fit(self) -> int:
        """How many workers the nodes of this moment hold."""
        return self._need.room(nodes_up())

    def _refuse_too_many(self) -> None:
        fitting = self._workers_that_fit()
        if not fitting:
            raise UsageError(
                f"a worker needs {self._need}; {describe(nodes_up())}. Use "
                "--worker gpus=0, or fewer CPUs (--worker cpus=…)."
            )
        if self._fewest > fitting:
            raise UsageError(
                f"the Ray of this machine has room for {fitting} workers, not for {self._fewest}. "
                f"Use --workers {fitting}."
            )

    def _wanted(self) -> int:
        """The number of workers there should be."""
        if self._fewest == self._most:
            return self._fewest
        fitting, ready = max(self._fewest, self._workers_that_fit()), len(self.figures())
        if not self._grows:
            wanted = fitting
        elif not self.backlog:
            wanted = max(self._fewest, ready)
        else:
            busy = self._free(alone=False) is None
            more = min(max(1, ready), -(-self.backlog // IN_FLIGHT)) if busy else 0
            # A request that stands is not withdrawn: its node may be on its way.
            wanted = max(fitting, ready + more, len(self._actors))
        return min(wanted, self._most or wanted)

    def _start_missing(self) -> None:
        """Request the missing workers; withdraw requests, the latest first, that are too many."""
        self._last_start = self._now
        wanted = self._wanted()
        waiting = [actor for actor in self._actors if actor.figures is None]
        for actor in waiting[::-1][: max(0, len(self._actors) - wanted)]:
            self._dismiss(actor)
        while len(self._actors) < wanted:
            place = Placement(self._need)
            made = self._class.options(**place.options, max_concurrency=IN_FLIGHT)
            actor = _Actor(made.remote(self._job, os.getcwd(), self._need), place)
            self._actors[actor] = None
            self._when_answered(actor.handle.where.remote(), self._started, actor)

    def _wait_for_workers(self) -> None:
        """While no worker is ready: say what for every 30 s, and give up in the end.

        Raises:
            IncompleteError: there was none for too long.
        """
        if any(actor.figures for actor in self._actors):
            self._wait.end(self._now)
            return
        seconds = self._wait.due(self._now)
        if seconds is None:
            return
        if self._grows:
            state = (
                f"{len(self._actors)} requested, none ready. A worker needs {self._need}; "
                f"{describe(nodes_up(), self._ray.available_resources())}"
            )
            if pending := launching():
                state += f"; pending nodes: {pending}"
            cure = "Start nodes, or change --worker gpus and cpus."
        else:  # A Ray of this process has room for all: they are at work.
            state = (
                f"{counted(len(self._actors), 'worker')} started, loading libraries and the teacher"
            )
            cure = "Is this machine busy with other work? --workers 0 starts none."
        self._tell("waiting for workers", seconds=round(seconds), state=state)
        self._wait.report(seconds, state, cure)

    def _when_answered(self, ref: Any, handler: Any, *facts: Any) -> None:
        """Have `collect` call `handler(*facts, future)` once the answer is there."""
        # Only the queue is touched here: the callback runs in a thread of Ray's.
        put = self._answers.put
        ref.future().add_done_callback(lambda future: put(partial(handler, *facts, future)))

    def _started(self, actor: _Actor, answer: Any) -> list[Outcome]:
        error = answer.exception()
        if actor not in self._actors:
            return []
        if error is None:
            name, node, batch_tokens = answer.result()
            actor.nodes = {node} | actor.place.nodes()
            actor.figures = WorkerFigures(name)
            self._failed_starts = 0
            self._offer(actor)
            self._tell("worker ready", worker=name, node=node, batch_tokens=batch_tokens)
            return []
        cause = _cause(error)
        # Wrong input is wrong on every worker; only a death may end otherwise elsewhere.
        if isinstance(cause, KdcacheError) and not isinstance(cause, TeacherDied | UnexpectedError):
            raise cause
        self._failed_starts += 1
        # In a row over all workers, so that one bad node does not end what others can do.
        if self._failed_starts >= _START_TRIES * len(self._actors):
            # The constructor raised: the cause is in our hands, not a death that nobody saw.
            if getattr(error, "actor_init_failed", False):
                raise cause
            raise IncompleteError(
                f"{self._failed_starts} workers in a row died before they were ready; the last: "
                f"{reason(error)}. Is the teacher too large for their memory? Run the same "
                "command to continue."
            ) from error
        logger.warning("a worker did not start (%s); trying another", reason(error))
        self._dismiss(actor)
        self._start_missing()
        return []

    def _dismiss(self, actor: _Actor) -> None:
        self._ray.kill(actor.handle)
        actor.place.free()
        del self._actors[actor]

    # Working

    def has_room(self, *, alone: bool = False) -> bool:
        """See `Workers.has_room`."""
        return self._free(alone) is not None

    def _free(self, alone: bool) -> _Actor | None:
        """The least busy actor with room. Constant time on average, however many there are."""
        for load, actors in enumerate(self._open[: 1 if alone else IN_FLIGHT]):
            # An actor whose load changed keeps its entry, which would cost a search: those that are
            # out of date go here, each once.
            while actors:
                actor = actors[0]
                if actor in self._actors and not actor.alone and len(actor.in_flight) == load:
                    return actor
                actors.popleft()
        return None

    def _offer(self, actor: _Actor) -> None:
        """Queue an actor among those with room, if it has some."""
        if not actor.alone and len(actor.in_flight) < IN_FLIGHT:
            self._open[len(actor.in_flight)].append(actor)

    def group(self) -> str:
        """See `Workers.group`."""
        actor = self._free(alone=False)
        return "" if actor is None else actor.group

    def submit(self, span: Work, *, alone: bool = False) -> None:
        """See `Workers.submit`."""
        actor = self._free(alone)
        assert actor is not None, "has_room() comes first"
        actor.alone, actor.group = alone, span.group
        # An idle worker made no progress either: its time counts from the first span on.
        if not actor.in_flight:
            actor.last_progress = self._now
        actor.in_flight[span.index] = span
        self._offer(actor)
        self._when_answered(actor.handle.run.remote(span), self._finished, actor, span)

    def collect(self, seconds: float) -> list[Outcome]:
        """See `Workers.collect`."""
        answers = arrived(self._answers, seconds)
        if self._owns:
            check_own_ray()
        elapsed = time.monotonic() - self._ticked
        self._ticked += elapsed
        # Bounded by what was waited for: longer means that this process did not run.
        self._now += min(elapsed, seconds + 1.0)
        outcomes = [outcome for answer in answers for outcome in answer()]
        if self._now - self._checked >= self._beat:
            outcomes.extend(self._check_heartbeats())
        if self._now - self._last_start >= _START_EVERY:
            self._start_missing()
        self._wait_for_workers()
        return outcomes

    def _finished(self, actor: _Actor, span: Work, answer: Any) -> list[Outcome]:
        if span.index not in actor.in_flight:
            return []  # the worker was given up before
        error, alone = answer.exception(), actor.alone
        assert actor.figures is not None, "only a worker that is ready is given spans"
        name = actor.figures.name
        # Not raised by the span's own code: the process or its node is gone.
        if error is not None and not isinstance(error, self._ray.exceptions.RayTaskError):
            return self._lose(actor, error)
        if isinstance(error, Exception) and isinstance(_cause(error), TeacherDied):
            return self._lose(actor, RuntimeError(str(_cause(error))))  # no reason to stop
        del actor.in_flight[span.index]
        actor.alone = False
        self._offer(actor)
        if error is not None:
            return [Outcome(span, error=_cause(error), alone=alone, worker=name)]
        actor.figures.book(answer.result())
        return [Outcome(span, answer.result(), alone=alone, worker=name)]

    # Losing

    def _lose(self, actor: _Actor, error: BaseException) -> list[Outcome]:
        """Give up a worker and its spans, and start another."""
        assert actor.figures is not None, "only a worker that was ready can be lost"
        fault: Fault = "node" if self._node_gone(actor, error) else "worker"
        name, spans = actor.figures.name, list(actor.in_flight.values())
        logger.warning("worker %s is lost (%s); starting another", name, reason(error))
        numbers = [span.index for span in spans]
        self._tell("worker lost", worker=name, fault=fault, spans=numbers, error=reason(error))
        self.lost += 1
        # Answers that still come of these spans are then known to be late, and are left out.
        actor.in_flight.clear()
        self._dismiss(actor)
        self._start_missing()
        return [Outcome(s, error=error, fault=fault, alone=actor.alone, worker=name) for s in spans]

    def _node_gone(self, actor: _Actor, error: BaseException) -> bool:
        """Whether a worker was lost with its machine; its spans are not at fault."""
        exceptions = self._ray.exceptions
        # A worker that died is reported by its node at once; silence is the node's own.
        if isinstance(error, (exceptions.ActorUnavailableError, exceptions.NodeDiedError)):
            return True
        return not all_up(actor.nodes)

    @property
    def _beat(self) -> float:
        """Seconds between two heartbeats of a worker."""
        return min(self._hang / _HEARTBEATS, max(_BEAT_EVERY, len(self._actors) / _BEATS))

    def _check_heartbeats(self) -> list[Outcome]:
        """Read the workers' heartbeats, and give up those that hang or lack a node."""
        self._checked = self._now
        outcomes = []
        # A copy: a worker that hangs is replaced in the loop.
        for actor in [a for a in self._actors if a.figures]:
            silent = self._now - actor.last_progress
            # An engine across nodes may wait for ever for what was on one that is gone.
            if len(actor.nodes) > 1 and not all_up(actor.nodes):
                outcomes.extend(self._lose(actor, RuntimeError("one of its nodes is gone")))
            elif actor.in_flight and silent > self._hang:
                error = TimeoutError(f"it made no progress for {silent:.0f} s")
                outcomes.extend(self._lose(actor, error))
            # One question at a time: a stopped process would collect them.
            elif not actor.asked:
                actor.asked = True
                pulse = actor.handle.pulse.options(concurrency_group="pulse").remote()
                self._when_answered(pulse, self._felt_pulse, actor)
        return outcomes

    def _felt_pulse(self, actor: _Actor, answer: Any) -> list[Outcome]:
        actor.asked = False
        if actor not in self._actors:
            return []
        error = answer.exception()
        if error is not None:  # a worker without spans shows in no other way that it died
            return self._lose(actor, error)
        pulse = answer.result()
        # An old answer that comes late must not set the clock back.
        actor.last_progress = max(actor.last_progress, self._now - pulse.idle)
        if actor.figures is not None:
            actor.figures.in_flight = tuple(s for s in pulse.spans if s.span in actor.in_flight)
        return []

    # The end

    def stop(self) -> None:
        """See `Workers.stop`."""
        for actor in self._actors:
            self._ray.kill(actor.handle)
            actor.place.free()
        if self._owns:
            leave()

    def figures(self) -> Sequence[WorkerFigures]:
        """See `Workers.figures`."""
        return [actor.figures for actor in self._actors if actor.figures is not None]


def run_once(function: Any, *arguments: Any, need: Need, address: str | None) -> Any:
    """Run a function on a node of a cluster that has room for this; returns its result.

    Raises:
        UsageError: the cluster is unreachable, or the function raised it.
    """
    owns = connect(address)
    import ray

    place = Placement(need)
    try:
        task = ray.remote(**place.options)(call_at_home)
        answer = task.remote(os.getcwd(), function, arguments)
        # Python handles a signal between two waits, and not within one.
        while not ray.wait([answer], timeout=1.0)[0]:
            pass  # a signal is handled here
        return ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        raise _cause(error) from error
    finally:
        place.free()
        if owns:
            leave()


def _cause(error: BaseException) -> BaseException:
    """What a task raised, or a worker while it began: Ray has that in the error's arguments."""
    causes = (getattr(one, "cause", None) for one in (error, *error.args))
    return next((cause for cause in causes if isinstance(cause, BaseException)), error)
