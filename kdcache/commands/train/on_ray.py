"""`--num-workers N`: the same run in several processes, started by Ray Train.

Each worker makes its own student from the same seed and takes its slices of the same global
batches; torch averages gradients over workers (DDP, or FSDP on demand). Worker 0 writes the run's
folder, which all workers must be able to read.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from kdcache.cluster import at_home, check_own_ray, cluster_address, connect
from kdcache.commands.train.log import parse_metrics, read_metrics
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.prepare import RunPlan
from kdcache.commands.train.result import TrainProgress, TrainResult
from kdcache.commands.train.together import SharedError, train_in_group
from kdcache.errors import IncompleteError, KdcacheError, UsageError
from kdcache.extras import needs
from kdcache.files import no_space, write_text
from kdcache.storage import is_remote, open_storage

_RETRIES = 2
_RAY, _WRONG = ".ray", "wrong.txt"
_LOOK_EVERY = 0.5
_ASK_EVERY = 10.0  # seconds between two looks into an object store
_ABORT_SECONDS = 30.0
_WAKE_EVERY = 10.0
_END_SECONDS = 60.0  # that a command may take to end once its own Ray is lost
_MOST_CPUS = 8


def train_on_ray(
    options: TrainOptions, on_progress: Callable[[TrainProgress], None] | None = None
) -> TrainResult:
    """Run a training on Ray workers; a lost worker restarts them all from the last checkpoint.

    Args:
        options: with `num_workers` of 2 or more.
        on_progress: called for every new line of `metrics.jsonl`.

    Raises:
        UsageError: the cluster lacks what the workers need.
        KdcacheError: the workers failed for good.
    """
    import ray

    with needs("cluster", "--num-workers"):
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchTrainer

    plan, follower = RunPlan.make(options), None
    where = {"out": str(plan.out)} if plan.store is None else {}
    # Ray's own notes: not in a folder that a worker removes at the end.
    own = plan.out / _RAY if plan.store is None else plan.out.parent / _RAY
    owns = connect(options.address)
    here = owns and cluster_address(options.address) is None
    private = tempfile.mkdtemp(prefix="kdcache-") if here else None
    try:
        have = ray.cluster_resources()
        gpus, cpus = shares(options, have.get("GPU", 0), have.get("CPU", 1))

        class Trainer(TorchTrainer):  # type: ignore[misc]
            """Leaves Ctrl-C to the command: Ray's handler waits, and ends with another code."""

            controller: Any = None

            def _register_sigint_handler(self, controller: Any) -> None:
                self.controller = controller

        if plan.store is not None:
            plan.store.claim()
        trainer = Trainer(
            _work,
            train_loop_config={
                "options": {**options.to_dict(), **where, "gpus_per_worker": gpus},
                "owner": "" if plan.store is None else plan.store.owner,
                "threads": cpus,
                "folder": str(Path.cwd()),
            },
            torch_config=_process_group("nccl" if gpus else "gloo", private),
            scaling_config=ScalingConfig(
                num_workers=options.num_workers,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": cpus, **({"GPU": gpus} if gpus else {})},
            ),
            run_config=RunConfig(
                name="workers",
                storage_path=str(own),
                failure_config=FailureConfig(max_failures=_RETRIES),
            ),
        )
        shutil.rmtree(own, ignore_errors=True)  # of a run that was killed
        follower = _Follower(plan, on_progress, watch=owns)
        try:
            with warnings.catch_warnings():
                # Ray warns of what its own modules use.
                warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))
                trainer.fit()
        except KeyboardInterrupt:
            if owns:
                check_own_ray()
            elif trainer.controller is not None:  # else they end with this Ray
                # The controller ends the workers, then itself: an answer is not what comes.
                with suppress(ray.exceptions.ActorDiedError):
                    ray.get(trainer.controller.abort.remote(), timeout=_ABORT_SECONDS)
            raise
        except ray.exceptions.RayError:
            if owns:
                check_own_ray()
            raise
        except TrainingFailedError as error:
            if no_space(error):
                raise IncompleteError(
                    f"no space left on {plan.shown}. Free some. {RunPlan.go_on(options)}"
                ) from error
            raise KdcacheError(
                f"the workers failed: {error} Run the same command to continue from the last "
                "checkpoint."
            ) from error
        finally:
            follower.stop()
            wrong = _read_wrong(plan)
            shutil.rmtree(own, ignore_errors=True)
    finally:
        if owns:
            ray.shutdown()
        if private is not None:
            shutil.rmtree(private, ignore_errors=True)
        if follower is not None:
            follower.ended()
    if wrong:
        raise UsageError(wrong)
    document = plan.result()
    assert document is not None, "the workers have finished"
    return TrainResult(**document["result"])


def shares(options: TrainOptions, gpus: float, cpus: float) -> tuple[float, int]:
    """GPUs and CPUs of each worker on a cluster that has so many.

    Raises:
        UsageError: it has too few. A run that was slow without a word would cost more.
    """
    n = options.num_workers
    asked = options.gpus_per_worker
    each = float(gpus > 0) if asked is None else asked
    if n * each > gpus:
        raise UsageError(
            f"{n} workers need {n * each:g} GPUs, the Ray cluster has {gpus:g}. Use fewer "
            "--num-workers, or --gpus-per-worker 0 to train on CPUs."
        )
    threads = max(1, min(_MOST_CPUS, int(cpus) // n))
    if n * threads > cpus:
        raise UsageError(
            f"{n} workers need {n * threads} CPUs, the Ray cluster has {cpus:g}. Use fewer "
            "--num-workers."
        )
    return each, threads


def _process_group(backend: str, private: str | None) -> Any:
    """How the workers form torch's process group, for Ray Train.

    Torch's store listens on all interfaces and asks nobody who he is, and gloo listens where the
    machine's name points to. Workers that are all on this machine need neither.

    Args:
        backend: `nccl` or `gloo`.
        private: for workers of a Ray of our own: a folder that only this user can read, in which
            they meet; they talk over the loopback interface.
    """
    import ray
    from ray.train.torch import TorchConfig, config

    if private is None:
        return TorchConfig(backend=backend)
    meeting = f"file://{private}/"

    class OnLoopback(config._TorchBackend):  # type: ignore[misc]
        def on_start(self, workers: Any, torch_config: Any) -> None:
            url = meeting + secrets.token_hex(8)  # of each start its own: such files are used once
            workers.execute(_talk_on_loopback)
            workers.execute(config._set_torch_distributed_env_vars)
            ranks = range(len(workers))
            arguments = {"backend": backend, "world_size": len(ranks), "init_method": url}
            arguments["timeout_s"] = torch_config.timeout_s
            setup = config._setup_torch_process_group
            ray.get(
                [workers.execute_single_async(n, setup, world_rank=n, **arguments) for n in ranks]
            )

    class LoopbackConfig(TorchConfig):  # type: ignore[misc]
        @property
        def backend_cls(self) -> type[Any]:
            return OnLoopback

    return LoopbackConfig(backend=backend)


def _talk_on_loopback() -> None:
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if names:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = names[0]


def _work(config: dict[str, Any]) -> None:
    import torch
    from torch import distributed

    at_home(config["folder"])
    torch.set_num_threads(config["threads"])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options = TrainOptions(**config["options"])
    try:
        train_in_group(options, locked=True, owner=config["owner"])
    except SharedError as shared:
        if distributed.get_rank() == 0:
            # Not raised: Ray would try again, and the same mistake would be the outcome.
            if is_remote(options.out):
                open_storage(options.out).write(_WRONG, str(shared).encode())
            else:
                write_text(Path(options.out, _RAY, _WRONG), str(shared))


def _read_wrong(plan: RunPlan) -> str:
    """Why the workers cannot train, as the first one has written it; empty if they could."""
    if plan.store is not None:
        return plan.store.take(_WRONG)
    told = plan.out / _RAY / _WRONG
    return told.read_text() if told.is_file() else ""


class _Follower:
    """Reports what the first worker logs, from the file it writes."""

    def __init__(
        self, plan: RunPlan, on_progress: Callable[[TrainProgress], None] | None, *, watch: bool
    ) -> None:
        self._plan, self._steps = plan, plan.steps
        self._next = 0.0
        self._on_progress = on_progress
        self._done = threading.Event()
        self._told = 0
        self._thread = threading.Thread(target=self._follow, name="kdcache-follow", daemon=True)
        self._watch = watch
        self._last_resort: threading.Timer | None = None
        if watch or on_progress is not None:
            self._thread.start()

    def _follow(self) -> None:
        while not self._done.wait(_LOOK_EVERY):
            self._look()
            if self._watch:
                try:
                    check_own_ray()
                except IncompleteError as error:
                    self._wake(error)
                    break
        self._look()

    def _wake(self, error: IncompleteError) -> None:
        """Interrupt the main thread, which waits for workers that never answer.

        By a real signal: `_thread.interrupt_main` does not wake a thread that waits for a lock. A
        library may swallow the first one, so it is repeated. Where nothing helps the process ends.
        """
        self._last_resort = threading.Timer(_END_SECONDS, _end, [error])
        self._last_resort.daemon = True
        self._last_resort.start()
        main = threading.main_thread().ident
        assert main is not None, "it has started"
        while True:
            signal.pthread_kill(main, signal.SIGINT)
            if self._done.wait(_WAKE_EVERY):
                return

    def _look(self) -> None:
        if self._on_progress is None:
            return
        if self._plan.store is None:
            lines = read_metrics(self._plan.out)
        elif time.monotonic() < self._next and not self._done.is_set():
            return
        else:
            self._next = time.monotonic() + _ASK_EVERY
            lines = parse_metrics(self._plan.store.read_metrics())
        told = min(self._told, len(lines))  # workers that restart cut lines off
        self._told = len(lines)
        for logs in lines[told:]:
            step, seconds = logs.pop("step"), logs.pop("seconds")
            self._on_progress(TrainProgress(step, self._steps, logs["epoch"], seconds, logs))

    def stop(self) -> None:
        """Report the last lines and end."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def ended(self) -> None:
        """Say that the command ends by itself: after a lost Ray it would be ended otherwise."""
        if self._last_resort is not None:
            self._last_resort.cancel()


def _end(error: IncompleteError) -> None:
    """End this process, whose main thread is stuck in a Ray that is gone."""
    sys.stderr.write(f"Error: {error}\n")
    sys.stderr.flush()
    os._exit(error.exit_code)
