"""Room for workers: what one needs, how many a node holds, and how many CPUs each has there.

The nodes of a cluster that grows on demand are unknown when the workers are requested. So a worker
reserves little, what decides where it can run, and counts its CPUs on the node that it got.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdcache.errors import IncompleteError
from kdcache.humanize import counted

logger = logging.getLogger(__name__)

_WAITING_EVERY = 30.0  # seconds between two lines about what is waited for
_MOST_CPUS = 8  # of one worker: reading and packing keep no more busy

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Need:
    """What a worker needs.

    Attributes:
        gpus: GPUs of one worker, on one node.
        cpus: CPUs reserved for it.
        workers: how many there are at most; None for as many as fit.
        exact: whether it uses just these CPUs, however many its node has for it.
    """

    gpus: float
    cpus: int = 1
    workers: int | None = None
    exact: bool = False

    def fit(self, node: Resources) -> int:
        """How many workers a node of these resources holds, used or not."""
        workers = int(node.get("CPU", 0)) // self.cpus
        if self.gpus:
            workers = min(workers, int(node.get("GPU", 0) / self.gpus + 1e-9))
        return workers

    def threads(self, node: Resources) -> int:
        """CPUs that a worker uses on such a node: its share if as many run there as fit."""
        if self.exact:
            return self.cpus
        beside = max(1, self.fit(node))
        share = int(node.get("CPU", 0)) // min(beside, self.workers or beside)
        return max(self.cpus, min(_MOST_CPUS, share))

    def __str__(self) -> str:
        gpus = f"{counted(self.gpus, 'GPU')} and " if self.gpus else ""
        return f"{gpus}{counted(self.cpus, 'CPU')} on one node"


def share_of_cpus(gpus: float, workers: int | None, nodes: Sequence[Resources]) -> Need:
    """What each of so many workers should reserve of the nodes that are up.

    Workers with GPUs are placed by these. Others are spread by their CPUs: as many for each, up to
    eight, as leave room for all.
    """
    for cpus in range(1 if gpus or workers is None else _MOST_CPUS, 1, -1):
        need = Need(gpus, cpus, workers)
        if sum(map(need.fit, nodes)) >= (workers or 0):
            return need
    return Need(gpus, 1, workers)


@dataclass
class Wait:
    """A time without workers, in seconds of the caller's clock.

    Attributes:
        minutes: after so many it is over; None waits for ever.
        since: when it began.
        told: when a line about it was due last.
    """

    minutes: float | None
    since: float = 0.0
    told: float = 0.0

    def end(self, now: float) -> None:
        """There is a worker."""
        self.since = self.told = now

    def due(self, now: float) -> float | None:
        """The seconds waited so far where it is time to report them, else None."""
        over = self.minutes is not None and now - self.since >= 60 * self.minutes
        if not over and now - self.told < _WAITING_EVERY:
            return None
        self.told = now
        return now - self.since

    def report(self, seconds: float, state: str, cure: str) -> None:
        """Say what is waited for.

        Raises:
            IncompleteError: it took too long.
        """
        if self.minutes is not None and seconds >= 60 * self.minutes:
            raise IncompleteError(
                f"no worker was ready for {seconds / 60:g} minutes (--wait-minutes): {state}. "
                f"{cure} Run the same command to continue."
            )
        logger.warning("waiting for workers: %s (%.0f s)", state, seconds)


def describe(nodes: Sequence[Resources], free: Resources | None = None) -> str:
    """The nodes, and what is free on them, in a few words."""
    kinds = Counter(map(_resources, nodes))
    words = ", ".join(f"{count} with {what}" for what, count in sorted(kinds.items())) or "none"
    return f"nodes: {words}" + ("" if free is None else f"; free: {_resources(free)}")


def _resources(has: Resources) -> str:
    return f"{counted(has.get('GPU', 0), 'GPU')} and {counted(has.get('CPU', 0), 'CPU')}"
