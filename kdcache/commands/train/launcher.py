"""The place of this process among those that a launcher started for one training.

torchrun and `accelerate launch` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; srun
sets SLURM_PROCID and its kin, from which the same follows. A batch script of Slurm that runs one
command without srun has no SLURM_STEP_NUM_TASKS and trains alone. Imports nothing heavy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

_PORTS = 15_000, 20_000  # the first, and how many: away from Ray's in examples/cluster/slurm.sh


@dataclass(frozen=True)
class Launched:
    """One of several processes.

    Attributes:
        launcher: what started them, for messages.
        rank: number of this one, from 0.
        world_size: how many there are, 2 or more.
        local_rank: its number on its node.
        local_world_size: how many are on its node.
        address: host of the first one, where all meet.
        port: on that host.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int

    @classmethod
    def find(cls, environment: Mapping[str, str] | None = None) -> Launched | None:
        """The place that the environment describes; None for a process by itself."""
        here = os.environ if environment is None else environment
        if int(here.get("WORLD_SIZE") or 1) > 1 and "RANK" in here:
            return cls(
                "torchrun",
                int(here["RANK"]),
                int(here["WORLD_SIZE"]),
                int(here.get("LOCAL_RANK") or 0),
                int(here.get("LOCAL_WORLD_SIZE") or 1),
                here.get("MASTER_ADDR") or "localhost",
                int(here.get("MASTER_PORT") or 29500),
            )
        if "RANK" not in here and int(here.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
            first, many = _PORTS
            step = int(here.get("SLURM_JOB_ID") or 0) + int(here.get("SLURM_STEP_ID") or 0)
            nodes = here.get("SLURM_STEP_NODELIST") or here.get("SLURM_JOB_NODELIST") or ""
            return cls(
                "srun",
                int(here["SLURM_PROCID"]),
                int(here["SLURM_STEP_NUM_TASKS"]),
                int(here["SLURM_LOCALID"]),
                _tasks_here(here),
                here.get("MASTER_ADDR") or first_host(nodes) or "localhost",
                int(here.get("MASTER_PORT") or first + step % many),
            )
        return None

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which PyTorch and its friends know the place."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def first_host(nodes: str) -> str:
    """The first of a list of hosts as Slurm writes it: `gpu[03-05,9],login` is gpu03."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", found.group() if found else "")


def _tasks_here(here: Mapping[str, str]) -> int:
    """Tasks on this node, of a list such as `4(x2),3`: two nodes with four, one with three."""
    counts: list[int] = []
    for part in (here.get("SLURM_STEP_TASKS_PER_NODE") or "1").split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    node = int(here.get("SLURM_NODEID") or 0)
    return counts[min(node, len(counts) - 1)]
