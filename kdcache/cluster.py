"""Other processes: a Ray, joined or started, Pythons for one task, and what resources they need.

The nodes of a cluster that grows on demand are unknown when workers are requested. So a worker
reserves only what decides where it can run, and counts its CPUs on the node that it got.

Guarantee: all processes find their modules where this process does, never in the folder where a
command was given, which may hold anybody's files. A Ray that is started here listens on the
loopback interface alone, asks for a token that only this user can read, and has its sockets and
files in a folder that only this user can enter. A cluster that is joined is as open as its owner
made it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.errors import IncompleteError, UnexpectedError, UsageError
from kdcache.humanize import counted, printable, redacted

logger = logging.getLogger(__name__)

_MAIN_PROCESSES = {"raylet", "gcs_server"}
_FIRST_MINUTES = 5.0  # that a Ray of our own may take to start a worker
_LONGEST_FOLDER = 41  # bytes: a socket's whole name has 107, of which Ray's own part takes 66
_PYTHON = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1))\n"
_folders: list[tempfile.TemporaryDirectory[str]] = []


def python(code: str, *words: str, **more: Any) -> subprocess.Popen[bytes]:
    """Start a Python next to this one, isolated, with pipes for its input and its output."""
    here = json.dumps([place for place in sys.path if place])  # an empty one is the current folder
    command = [sys.executable, "-I", "-c", _PYTHON + code, here, *words]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **more)


def cluster_address(address: str | None) -> str | None:
    """The cluster to use: the one named, else RAY_ADDRESS (`ray job submit` sets it), or
    None for a Ray of this process."""
    address = address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address


def connect(address: str | None) -> bool:
    """Join or start a Ray; whether this call started it, so that `leave` ends it.

    Raises:
        UsageError: no cluster answers at the address, or it wants another token.
    """
    # What a cluster reports of dead workers Ray prints on standard output, where a command's
    # outcome belongs; our own log shows it too.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    import ray

    if ray.is_initialized():
        return False
    # Without an address Ray would join any cluster it finds running on this machine.
    address = cluster_address(address) or "local"
    given: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    private: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if address == "local":
        given |= {"include_dashboard": False, "_temp_dir": _own_folder()}
        # Else it waits for them before this process is connected, where nothing can interrupt it.
        given["_system_config"] = {"prestart_worker_first_driver": False}
        private = _private_ray()
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with private:
            ray.init(address=address, job_config=_job(), **given)
    except Exception as error:
        if address == "local":
            leave()
            found = UnexpectedError.of(error)
            failed = IncompleteError(
                f"Ray did not start on this machine ({found.line}). Run the same command again; "
                "--workers 0 needs no Ray."
            )
            failed.trace = found.trace
            raise failed from error
        if not isinstance(error, ConnectionError | ray.exceptions.AuthenticationError):
            raise
        raise UsageError(
            f"cannot join the Ray cluster at {address}: no answer, or not with this token. Check "
            "the address. If the cluster asks for a token, set RAY_AUTH_MODE=token and put its "
            "token in ~/.ray/auth_token or RAY_AUTH_TOKEN."
        ) from error
    finally:
        if main:  # Ray's own handler ends the process on the spot
            signal.signal(signal.SIGTERM, handler)
    if address == "local":
        try:
            _first_worker()
        except BaseException:
            leave()
            raise
    return True


def leave() -> None:
    """End the Ray that `connect` started, and remove its files."""
    import ray

    ray.shutdown()
    while _folders:
        _folders.pop().cleanup()


def _job() -> Any:
    """What Ray is told of this process.

    By itself it puts the current folder in front of all modules of its workers.
    """
    from ray.job_config import JobConfig

    class Job(JobConfig):  # type: ignore[misc]
        def _runtime_env_has_working_dir(self) -> bool:
            return True  # so that Ray adds no folder of its own choice

    return Job(_py_driver_sys_path=[place for place in sys.path[:1] if place])


def _own_folder() -> str:
    """A new folder for the files of a Ray, which opens its own to everybody: in one of this user's.

    Short enough for its sockets.
    """
    base = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(base)) > _LONGEST_FOLDER - len("/kdc-01234567/r"):
        base = "/tmp"
    _folders.append(
        tempfile.TemporaryDirectory(prefix="kdc-", dir=base, ignore_cleanup_errors=True)
    )
    return f"{_folders[-1].name}/r"


def _first_worker() -> None:
    """Wait for the first worker of a Ray of our own, and not for ever.

    Raises:
        IncompleteError: none has come for five minutes, or Ray has died meanwhile.
    """
    import ray

    one = [ray.remote(num_cpus=0)(lambda: None).remote()]
    wait, started = Wait(_FIRST_MINUTES, option=""), time.monotonic()
    while not ray.wait(one, timeout=1.0)[0]:
        check_own_ray()
        seconds = wait.due(time.monotonic() - started)
        if seconds is not None:
            wait.report(seconds, "Ray on this machine has started none", "Is it busy?")


def end(error: IncompleteError) -> None:
    """End this process, and its Ray with it, where the main thread is stuck in Ray."""
    sys.stderr.write(f"Error: {printable(redacted(str(error)))}\n")
    sys.stderr.flush()
    while _folders:
        _folders.pop().cleanup()
    os._exit(error.exit_code)


def check_own_ray() -> None:
    """Look whether the Ray that `connect` started is still whole; for commands that wait for it.

    Without its raylet it starts no worker and reports nothing.

    Raises:
        IncompleteError: one of its main processes has died.
    """
    from ray._private import worker

    node = worker._global_node
    dead = {name for name, _ in node.dead_processes()} & _MAIN_PROCESSES if node else ()
    if dead:
        raise IncompleteError(
            f"Ray on this machine has lost its {' and '.join(sorted(dead))}: killed, or out of "
            "memory. Run the same command to continue."
        )


def launching() -> str:
    """What an autoscaler of the joined cluster has ordered or could not get, in a few words."""
    import ray

    try:
        from ray.autoscaler.v2.sdk import get_cluster_status

        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        words = [f"{one.count} of {one.ray_node_type_name}" for one in status.pending_launches]
        words += [f"{one.ray_node_type_name} installing" for one in status.pending_nodes]
        failed = Counter(one.ray_node_type_name for one in status.failed_launches)
        words += [f"{n} launches of {kind} failed" for kind, n in failed.items()]
    except Exception as error:  # not a public interface: without it a line is shorter
        logger.debug("the autoscaler's state is unknown: %s", error)
        return ""
    return ", ".join(words) or "none"


@contextlib.contextmanager
def lending_ray() -> Iterator[None]:
    """A program that starts inside and begins a job of its own does so on the Ray of this process.

    Ray's actors look for modules in the current folder of what begins their job.
    """
    import ray

    if ray.is_initialized():
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    here = os.getcwd()
    os.chdir("/")
    try:
        yield
    finally:
        os.chdir(here)


def nodes_up() -> list[dict[str, float]]:
    """Resources of each node of this moment, used or not."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def all_up(nodes: Collection[str]) -> bool:
    """Whether these nodes, by Ray's ids, are all up at this moment."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}.issuperset(nodes)


def reason(error: BaseException) -> str:
    """First sentence of the last line of a message, where Ray gives the reason."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].split(". ")[0].strip()


def at_home(folder: str) -> None:
    """On a worker: work where the command was given, if that folder is here.

    Relative paths, and the modules of a `module:function`, mean the same there.
    """
    if os.path.isdir(folder):
        os.chdir(folder)


def call_at_home(folder: str, function: Any, arguments: Any) -> Any:
    """Call a function on a worker, where the command was given."""
    at_home(folder)
    return function(*arguments)


@contextlib.contextmanager
def _private_ray() -> Iterator[None]:
    """What is started inside keeps to the loopback interface, with a token of this user's."""
    from ray._private import ray_constants

    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        _keep_token_private(Path.home() / ".ray" / "auth_token")
    # Ray listens on all interfaces wherever it could form a cluster; this is its own switch, off on
    # macOS. As a node's address it takes 127.0.0.1 for the machine's public one.
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _keep_token_private(path: Path) -> None:
    """Make the token before Ray does, whose file everybody could read; close one that is open."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        made = path.with_name(f".{secrets.token_hex(8)}")
        try:
            made.touch(mode=0o600)
            made.write_text(secrets.token_hex(32))
            os.link(made, path)  # whole at once, and only if there is none
        finally:
            made.unlink(missing_ok=True)
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)


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
        across: whether its GPUs, whole ones, may be on several nodes.
    """

    gpus: float
    cpus: int = 1
    workers: int | None = None
    exact: bool = False
    across: bool = False

    def room(self, nodes: Sequence[Resources]) -> int:
        """How many workers nodes of these resources hold together, used or not."""
        if self.across:
            return int(sum(int(node.get("GPU", 0)) for node in nodes) // self.gpus)
        return sum(map(self.fit, nodes))

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
        where = "one node or several" if self.across else "one node"
        return f"{gpus}{counted(self.cpus, 'CPU')} on {where}"


OWN_SHARE = 0.1
"""Of a worker whose GPUs are on several nodes: its part of the first; its engine has the others."""


class Placement:
    """Where Ray puts an actor or a task, and what it holds for it there.

    Across nodes that is a placement group, a bundle for each GPU, on as few nodes as possible. The
    actor itself is in the first bundle, and vLLM finds the group through it.

    Attributes:
        options: of the actor or task.
    """

    def __init__(self, need: Need) -> None:
        self.options: dict[str, Any] = {"num_cpus": need.cpus, "num_gpus": need.gpus}
        self._group: Any = None
        if need.across:
            from ray.util import placement_group, scheduling_strategies

            bundles = [{"GPU": 1.0} for _ in range(int(need.gpus))]
            bundles[0]["CPU"] = need.cpus
            self._group = placement_group(bundles, strategy="PACK")
            self.options["num_gpus"] = OWN_SHARE
            make = scheduling_strategies.PlacementGroupSchedulingStrategy
            self.options["scheduling_strategy"] = make(
                self._group,
                placement_group_bundle_index=0,
                placement_group_capture_child_tasks=True,
            )

    def nodes(self) -> set[str]:
        """Ray's ids of the nodes of the group."""
        if self._group is None:
            return set()
        from ray.util import placement_group_table

        return set(placement_group_table(self._group)["bundles_to_node_id"].values())

    def free(self) -> None:
        """Give the group back; what runs in it is killed."""
        if self._group is not None:
            from ray.util import remove_placement_group

            remove_placement_group(self._group)


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
        option: that sets the minutes.
    """

    minutes: float | None
    since: float = 0.0
    told: float = 0.0
    option: str = " (--worker wait-minutes)"

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
                f"no worker was ready for {seconds / 60:g} minutes{self.option}: {state}. "
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
