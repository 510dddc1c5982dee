"""`--num-workers N`: the same run in several processes, started by Ray Train.

Each worker makes its own student from the same seed and takes its slices of the same global
batches; torch averages gradients over workers (DDP, or FSDP on demand). Worker 0 writes the run's
folder, which all workers must be able to read.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kdcache.cluster import (
    Need,
    Wait,
    at_home,
    check_own_ray,
    cluster_address,
    connect,
    describe,
    end,
    launching,
    leave,
    nodes_up,
    reason,
    share_of_cpus,
)
from kdcache.commands.run_folder import TrainProgress, TrainResult
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.prepare import RunPlan, train_folder
from kdcache.commands.train.process_group import SharedError, train_in_group
from kdcache.errors import IncompleteError, KdcacheError, UsageError, as_worker
from kdcache.storage import is_remote

logger = logging.getLogger(__name__)

_WRONG, _FAILURES = "wrong.txt", "failures.txt"
_GROW_EVERY = 300.0  # seconds between two looks for room for more: growing costs the last steps
_ANSWER_SECONDS = 5.0  # that the controller may take to say what it does
_LOOK_EVERY = 0.5
_ABORT_SECONDS = 30.0
_WAKE_EVERY = 10.0
_END_SECONDS = 60.0  # that a command may take to end once its own Ray is lost
_MOST_CPUS = 8


def train_on_ray(plan: RunPlan) -> TrainResult:
    """Run a training on Ray workers; a lost worker restarts them all from the last checkpoint.

    Raises:
        UsageError: the cluster lacks what the workers need.
        KdcacheError: the workers failed for good.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback
    from ray.train.torch import TorchTrainer

    options, follower = plan.options, None
    fewest, most = options.workers
    where = {"plot": None} | ({} if is_remote(options.out) else {"out": str(plan.out)})
    own = plan.folder.ray
    # A Ray of ours on this machine ends with the command, and its workers may talk over loopback.
    owns = connect(options.address)
    here = owns and cluster_address(options.address) is None
    grows = cluster_address(options.address) is not None
    private = tempfile.mkdtemp(prefix="kdcache-") if here else None
    try:
        need = need_of(options, nodes_up(), grows=grows)
        # Preemption is usual on a cluster; on one machine a worker that dies mostly dies again.
        failures = (100 if grows else 2) if options.max_failures is None else options.max_failures

        class Trainer(TorchTrainer):  # type: ignore[misc]
            """Leaves Ctrl-C to the command: Ray's handler waits, and ends with another code."""

            controller: Any = None

            def _register_sigint_handler(self, controller: Any) -> None:
                self.controller = controller

        class Failures(UserCallback):  # type: ignore[misc]
            """Notes each failure for the command; the controller runs on the command's node."""

            def after_exception(self, run_context: Any, worker_exceptions: Any) -> None:
                first = next(iter(worker_exceptions.values()))
                with open(own / _FAILURES, "a") as file:
                    file.write(reason(first) + "\n")

        # Before any worker starts: the run in a store belongs to the training that began last.
        plan.folder.claim()
        trainer = Trainer(
            _work,
            train_loop_config={
                "options": {**options.to_dict(), **where, "gpus_per_worker": need.gpus},
                "owner": plan.folder.owner,
                "need": need,
                "folder": str(Path.cwd()),
            },
            torch_config=_process_group("nccl" if need.gpus else "gloo", private),
            # A range makes the training elastic: a smaller group continues, a larger one is tried.
            scaling_config=ScalingConfig(
                num_workers=fewest if fewest == most else (fewest, most),
                use_gpu=need.gpus > 0,
                resources_per_worker={
                    "CPU": need.cpus,
                    **({"GPU": need.gpus} if need.gpus else {}),
                },
                elastic_resize_monitor_interval_s=_GROW_EVERY,
            ),
            run_config=RunConfig(
                name="workers",
                storage_path=str(own),
                failure_config=FailureConfig(max_failures=failures),
                callbacks=[Failures()],
            ),
        )
        shutil.rmtree(own, ignore_errors=True)  # of a run that was killed
        own.mkdir(parents=True)
        wait = _Waiting(trainer, need, options) if grows else None
        follower = _Follower(plan, watch=owns, wait=wait)
        follower.failures, follower.most = own / _FAILURES, failures
        try:
            with warnings.catch_warnings():
                # Ray warns of what its own modules use.
                warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))
                trainer.fit()
        except KeyboardInterrupt:
            follower.stop()  # it may be what has interrupted, and would do so again
            if owns:
                check_own_ray()
            elif trainer.controller is not None:  # else they end with this Ray
                # The controller ends the workers, then itself: instead of an answer comes that it
                # has died or, while it does, that it cannot be reached.
                with suppress(ray.exceptions.RayActorError):
                    ray.get(trainer.controller.abort.remote(), timeout=_ABORT_SECONDS)
            if follower.gave_up is not None:
                # Ctrl-C was the follower's: the reason is what the user should read.
                raise follower.gave_up from None
            raise
        except ray.exceptions.RayError:
            if owns:
                check_own_ray()
            raise
        except TrainingFailedError as error:
            for failure in getattr(error, "worker_failures", {}).values():
                cause = getattr(failure, "_base_exc", failure)  # Ray's own adds its traceback
                # What a worker has in a message of ours needs no traceback of Ray's around it.
                if isinstance(cause, KdcacheError):
                    raise cause from error
            raise
        finally:
            follower.stop()
            wrong = plan.folder.take_note(_WRONG)  # of why the workers cannot train
            shutil.rmtree(own, ignore_errors=True)
    finally:
        if owns:
            leave()
        if private is not None:
            shutil.rmtree(private, ignore_errors=True)
        if follower is not None:
            # Last: what ends Ray above may hang as well, and then the timer is the way out.
            follower.ended()
    if wrong:
        raise UsageError(wrong)
    document = plan.folder.result()
    assert document is not None, "the workers have finished"
    return TrainResult(**document["result"])


def need_of(options: TrainOptions, nodes: Sequence[Mapping[str, float]], *, grows: bool) -> Need:
    """What each worker needs.

    Args:
        nodes: resources of each node that is up.
        grows: whether there may be more later, as on a cluster. A cluster is rented for its GPUs,
            also where it has none yet.

    Raises:
        UsageError: this machine has too few. A run that was slow without a word would cost more.
    """
    fewest, most = options.workers
    asked, gpus = options.gpus_per_worker, sum(node.get("GPU", 0) for node in nodes)
    if grows:
        # Ray waits for nodes that an autoscaler starts: too few now is not an error there.
        return share_of_cpus(1.0 if asked is None else asked, most, nodes)
    # All or none: a run of which one worker is on a CPU is as slow as that one.
    each = float(gpus > 0) if asked is None else asked
    if fewest * each > gpus:
        raise UsageError(
            f"{fewest} workers need {fewest * each:g} GPUs, this machine's Ray has {gpus:g}. Use "
            "fewer --num-workers, or --worker gpus=0 to train on CPUs."
        )
    cpus = sum(node.get("CPU", 0) for node in nodes)
    threads = max(1, min(_MOST_CPUS, int(cpus) // most))
    if fewest * threads > cpus:
        raise UsageError(
            f"{fewest} workers need {fewest * threads} CPUs, this machine's Ray has {cpus:g}. Use "
            "fewer --num-workers."
        )
    return Need(each, threads, most, exact=True)


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
            # A worker that restarts would find the file of the group that has ended.
            url = meeting + secrets.token_hex(8)  # of each start its own: such files are used once
            # In every worker before torch's group is made, which reads the variables once.
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


@as_worker()
def _work(config: dict[str, Any]) -> None:
    import ray
    import torch
    from torch import distributed

    at_home(config["folder"])
    here = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == here)
    # Ray counts CPUs and does not bind to them: each worker would take all of the node.
    torch.set_num_threads(config["need"].threads(node["Resources"]))
    # Threads of tokenizers would take the CPUs of other workers, too.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options = TrainOptions(**config["options"])
    try:
        train_in_group(options, locked=True, owner=config["owner"])
    except SharedError as shared:
        if distributed.get_rank() == 0:
            # Not raised: Ray would try again, and the same mistake would be the outcome.
            train_folder(options.out).note(_WRONG, str(shared))


class _Waiting:
    """Says what a cluster lacks while no worker of a training runs."""

    def __init__(self, trainer: Any, need: Need, options: TrainOptions) -> None:
        self._trainer, self._need = trainer, need
        self._fewest = options.workers[0]
        self._wait = Wait(options.wait_minutes)
        # The clock starts now, and not when the first look finds nothing.
        self._wait.end(time.monotonic())

    def look(self) -> None:
        """Say what is missing, if nothing runs and it is time to.

        Raises:
            IncompleteError: nothing has run for too long.
        """
        import ray

        now = time.monotonic()
        if self._runs():
            self._wait.end(now)
            return
        seconds = self._wait.due(now)
        if seconds is None:
            return
        state = (
            f"{self._fewest} needed, none runs. A worker needs {self._need}; "
            f"{describe(nodes_up(), ray.available_resources())}"
        )
        if pending := launching():
            state += f"; pending nodes: {pending}"
        self._wait.report(seconds, state, "Start nodes, or use fewer --num-workers.")

    def _runs(self) -> bool:
        """Whether the workers run. Not a public interface: unknown counts as yes."""
        import ray

        if self._trainer.controller is None:  # it starts, or this is not the main thread
            return threading.current_thread() is threading.main_thread()
        try:
            state = self._trainer.controller.get_state.remote()
            return type(ray.get(state, timeout=_ANSWER_SECONDS)).__name__ == "RunningState"
        except ray.exceptions.GetTimeoutError:  # it waits for their resources
            return False
        # Another version of Ray, or a controller that is ending: a wait that never reports is safer
        # than one that ends a training.
        except (AttributeError, ray.exceptions.RayError):
            return True


class _Follower:
    """Reports what the first worker logs, from the file it writes."""

    gave_up: IncompleteError | None = None
    failures = Path(os.devnull)
    most = 0

    def __init__(self, plan: RunPlan, *, watch: bool, wait: _Waiting | None = None) -> None:
        self._plan, self._steps = plan, plan.steps
        self._next = 0.0
        self._on_progress = plan.on_progress
        self._done = threading.Event()
        self._told = 0
        self._thread = threading.Thread(target=self._follow, name="kdcache-follow", daemon=True)
        self._watch, self._wait = watch, wait
        self._failed = 0
        self._last_resort: threading.Timer | None = None
        # Last in the constructor: the thread reads all of the above.
        self._thread.start()

    def _follow(self) -> None:
        while not self._done.wait(_LOOK_EVERY):
            self._look()
            self._look_for_failures()
            try:
                if self._watch:
                    check_own_ray()
                if self._wait is not None:
                    self._wait.look()
            except IncompleteError as error:
                self.gave_up = error
                self._wake(error)
                break
        self._look()

    def _wake(self, error: IncompleteError) -> None:
        """Interrupt the main thread, which waits for workers that never answer.

        By a real signal: `_thread.interrupt_main` does not wake a thread that waits for a lock. A
        library may swallow the first one, so it is repeated. Where nothing helps the process ends.
        """
        self._last_resort = threading.Timer(_END_SECONDS, end, [error])
        self._last_resort.daemon = True
        self._last_resort.start()
        main = threading.main_thread().ident
        assert main is not None, "it has started"
        while True:
            signal.pthread_kill(main, signal.SIGINT)
            if self._done.wait(_WAKE_EVERY):
                return

    def _look_for_failures(self) -> None:
        lines = self.failures.read_text().splitlines() if self.failures.is_file() else []
        for text in lines[self._failed :]:
            self._failed += 1
            logger.warning(
                "a worker failed or was lost (%s): all go on from the last checkpoint, for the %d. "
                "time of %d at most (--worker max-failures)",
                text,
                self._failed,
                self.most,
            )

    def _look(self) -> None:
        if self._on_progress is None:
            return
        # A request for each look would be paid where the run is in a store.
        if time.monotonic() < self._next and not self._done.is_set():
            return
        self._next = time.monotonic() + self._plan.folder.ask_every
        lines = self._plan.folder.read_metrics()
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
