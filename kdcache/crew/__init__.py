"""Who does the spans: threads of this process, or actors on a Ray cluster. Both look alike to the
driver.

A crew takes spans while it has room and hands back outcomes. It knows about workers and nodes that
come and go; it does not know what is still to do, what was tried, or when to give up: that is the
driver's part.
"""

from __future__ import annotations

from kdcache.crew.base import Crew, Fault, Outcome, WorkerFigures
from kdcache.crew.cluster import RayCrew, cluster_address, connect
from kdcache.crew.local import LocalCrew

__all__ = [
    "Crew",
    "Fault",
    "LocalCrew",
    "Outcome",
    "RayCrew",
    "WorkerFigures",
    "cluster_address",
    "connect",
]
