"""Who does the spans: threads of this process, or actors on a Ray cluster, alike to the driver.

A crew takes spans while it has room and hands back outcomes. It knows about workers and nodes that
come and go. What is still to do, what was tried, and when to give up, only the driver knows.
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
