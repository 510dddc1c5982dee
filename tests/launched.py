"""Several processes of one training, as torchrun or srun starts them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from loaded import CONTEXT

from kdcache.commands.run_folder import TrainProgress, TrainResult
from kdcache.commands.train.options import TrainOptions

_DEADLINE = 120.0

Look = Callable[[TrainProgress], None]


@dataclass
class Ended:
    """How a process ended.

    Attributes:
        result: of `train`.
        kinds: classes of its student's parameters.
        error: instead of a result.
        exitcode: of the process; negative for a signal.
    """

    result: TrainResult | None = None
    kinds: frozenset[str] = frozenset()
    error: BaseException | None = None
    exitcode: int | None = None


def free_port() -> int:
    """A port of the loopback device that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def srun(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables that srun sets, on one node."""
    return {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_NODEID": "0",
        "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": str(world),
        "SLURM_STEP_TASKS_PER_NODE": str(world), "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(port), "SLURM_CPUS_PER_TASK": "1",
    }  # fmt: skip


def launch(
    options: TrainOptions | Sequence[TrainOptions],
    world: int,
    *,
    by: Callable[[int, int, int], Mapping[str, str]] = torchrun,
    look: Look | None = None,
    folders: Sequence[Path] | None = None,
    environments: Sequence[Mapping[str, str]] | None = None,
) -> list[Ended]:
    """Train in `world` processes; how each of them ended.

    Args:
        options: of all, or of each; the launcher decides `num_workers`.
        world: how many.
        by: the launcher.
        look: called in the first process for every line of its log; a function of a module.
        folders: working directory of each.
        environments: further variables of each.
    """
    port, started = free_port(), []
    for rank in range(world):
        own = options if isinstance(options, TrainOptions) else options[rank]
        ours, theirs = CONTEXT.Pipe(duplex=False)
        # The server's own environment is that of the first call.
        environment = {**os.environ, **by(rank, world, port)}
        environment |= environments[rank] if environments else {}
        here = Path.cwd() if folders is None else folders[rank]
        process = CONTEXT.Process(
            target=_work, args=(own.to_dict(), environment, here, look, theirs)
        )
        process.start()
        theirs.close()
        started.append((process, ours))
    ends = []
    for process, answer in started:
        try:
            ended = answer.recv() if answer.poll(_DEADLINE) else Ended()
        except EOFError:
            ended = Ended()
        process.join(_DEADLINE)
        ended.exitcode = process.exitcode
        if process.is_alive():
            process.kill()
        ends.append(ended)
    return ends


def _work(
    values: dict[str, Any],
    environment: dict[str, str],
    here: Path,
    look: Look | None,
    answer: Connection,
) -> None:
    os.environ.update(environment)
    os.chdir(here)
    from kdcache.commands.train.train import train
    from kdcache.student.trainer import DistillationTrainer

    ended, kinds = Ended(), set()
    taken = DistillationTrainer.train

    def noted(trainer: DistillationTrainer, *args: Any, **kwargs: Any) -> Any:
        taken(trainer, *args, **kwargs)
        kinds.update(type(parameter).__name__ for parameter in trainer.model.parameters())

    DistillationTrainer.train = noted  # type: ignore[method-assign]
    try:
        ended.result = train(TrainOptions(**{**values, "num_workers": 1}), on_progress=look)
        ended.kinds = frozenset(kinds)
    except Exception as error:
        ended.error = error
    answer.send(ended)
