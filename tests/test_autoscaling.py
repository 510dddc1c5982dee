"""A cluster that starts empty: Ray's own autoscaler adds fake nodes with fake GPUs on this machine
when a build needs workers, and removes them afterwards.

Every process of the cluster carries a mark in its environment, by which it is found and ended; each
wait has a deadline.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from kdcache.cache import Cache
from kdcache.cache.check import problems

RAY = Path(sys.executable).with_name("ray")
HEAD = "f" * 51 + "00000"  # the id by which Ray's provider of fake nodes knows the head
DEADLINE = 240
FILES = 12
COMMANDS = (  # of a cluster's configuration: fake nodes need none, Ray needs the fields
    "setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files",
)  # fmt: skip

# Workers that are placed by fake GPUs and compute on the CPU.
BUILD = """
import dataclasses, sys
from kdcache import cluster
from kdcache.cli.main import cli
from kdcache.commands.build import prepare
options = prepare._teacher_options
prepare._teacher_options = lambda *all: dataclasses.replace(options(*all), device="cpu")
cluster._WAITING_EVERY = 1.0
cli(sys.argv[1:])
"""


# Has the kernel end a command when the tests are killed; its Ray ends with it.
WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.execv(sys.argv[1], sys.argv[1:])
"""


@dataclass
class FakeCluster:
    """A head without CPUs, whose autoscaler may add two nodes of 4 CPUs and one GPU."""

    address: str
    environment: dict[str, str]
    mark: str
    head: subprocess.Popen[bytes]

    def processes(self, name: str = "") -> list[psutil.Process]:
        """Those of the cluster that are alive and whose name has these letters."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("KDCACHE_TEST_CLUSTER") == self.mark
                if ours and process.status() != psutil.STATUS_ZOMBIE and name in process.name():
                    found.append(process)
            except psutil.Error:  # it ended, or is not ours to look at
                pass
        return found

    def nodes(self) -> int:
        """Nodes beside the head."""
        return len(self.processes("raylet")) - 1


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def until(
    condition: Callable[[], Any], what: str, log: Path, *alive: subprocess.Popen[Any]
) -> None:
    """Wait for something, while these processes live."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"not in {DEADLINE} s: {what}\n{log.read_text()[-4000:]}"
        assert all(process.poll() is None for process in alive), log.read_text()
        time.sleep(0.1)


@pytest.fixture
def cluster(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCluster]:
    port, agent = free_ports(2)
    ip = socket.gethostbyname(socket.gethostname())
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    config = {
        "cluster_name": "fake", "max_workers": 2, "idle_timeout_minutes": 0.15,
        "upscaling_speed": 10, "auth": {"ssh_user": "nobody"}, "head_node_type": "ray.head.default",
        "provider": {
            "type": "external", "module": provider, "head_node_id": HEAD, "launch_multiple": True,
            "disable_node_updaters": True, "gcs_address": f"{ip}:{port}",
        },
        "file_mounts": {}, **{name: [] for name in COMMANDS},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "gpu": {
                "resources": {"CPU": 4, "GPU": 1, "object_store_memory": 100_000_000},
                "node_config": {}, "min_workers": 0, "max_workers": 2,
            },
        },
    }  # fmt: skip
    (tmp_path / "cluster.json").write_text(json.dumps(config))
    (tmp_path / "site").mkdir()
    hook = "import fault_points; fault_points.install()\n"
    (tmp_path / "site" / "sitecustomize.py").write_text(hook)
    (tmp_path / "faults").mkdir()
    mark = uuid.uuid4().hex
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    user = {
        **kept, "HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": mark,
        "RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": "0", "KDCACHE_TEST_CLUSTER": mark,
        "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)]),
    }  # fmt: skip
    nodes = {
        **user, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD, "KDCACHE_TEST_FAULTS": str(tmp_path / "faults"),
        "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{user['PYTHONPATH']}",
    }  # fmt: skip
    short = tmp_path_factory.mktemp("r")  # Ray's sockets have names of 107 characters at most
    call = [RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=0", "--num-gpus=0"]
    call += [f"--autoscaling-config={tmp_path}/cluster.json", f"--temp-dir={short}"]
    call += ["--include-dashboard=false", f"--dashboard-agent-listen-port={agent}"]
    call += ["--object-store-memory=100000000"]
    log = tmp_path / "ray.log"
    with log.open("wb") as out:
        head = subprocess.Popen(
            [sys.executable, "-c", WITH_PARENT, *map(str, call)],
            env=nodes, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    fake = FakeCluster(f"{ip}:{port}", user, mark, head)
    try:
        until(lambda: "Ray runtime started" in log.read_text(), "a head", log, head)
        yield fake
    finally:
        # What a killed process starts at this moment is met in the next round.
        while left := fake.processes():
            for process in left:
                process.kill()
            psutil.wait_procs(left, timeout=5)
        head.wait(10)


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_a_build_from_zero_nodes_to_done_and_back_to_zero(
    cluster: FakeCluster, tiny_lm: Path, text_corpus: Path, tmp_path: Path
) -> None:
    corpus, out, faults = tmp_path / "corpus", tmp_path / "cache", tmp_path / "faults"
    corpus.mkdir()
    lines = text_corpus.read_text().splitlines(keepends=True)
    for i in range(FILES):
        (corpus / f"{i:02}.jsonl").write_text("".join(lines[i::FILES]))
    (faults / "gate").touch()  # nothing is committed before both nodes are at work
    assert cluster.nodes() == 0
    call = ["build", "--address", cluster.address, "--teacher", tiny_lm, "--corpus", corpus]
    call += ["--max-length", "32", "--batch-tokens", "128", "--dtype", "float32", "--out", out]
    log = tmp_path / "build.log"
    with log.open("wb") as file:
        build = subprocess.Popen(
            [sys.executable, "-c", BUILD, *map(str, call)],
            env=cluster.environment, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        waiting = lambda: len(list(faults.glob("waiting-*"))) == 4  # noqa: E731
        until(waiting, "two workers with two spans each", log, build, cluster.head)
        assert cluster.nodes() == 2
        (faults / "gate").unlink()
        build.wait(DEADLINE)
    finally:
        build.kill()
        build.wait()
    err = log.read_text()
    assert build.returncode == 0, err
    waited = [line for line in err.splitlines() if "waiting for workers: 1 requested" in line]
    assert "A worker needs 1 GPU and 1 CPU on one node" in waited[0], err
    assert "nodes: 1 with 0 GPUs and 0 CPUs; free: 0 GPUs and 0 CPUs" in waited[0]
    assert "pending nodes: 1 of gpu" in "".join(waited)
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    ready = [event["node"] for event in events if event["event"] == "worker ready"]
    assert len(ready) == len(set(ready) - {HEAD}) == 2
    assert not [event for event in events if event["event"] == "worker lost"]
    assert list(problems(Cache.open(str(out)))) == []
    until(lambda: cluster.nodes() == 0, "no node is left", log, cluster.head)
