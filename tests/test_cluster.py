"""Ways onto a cluster: a Ray of one's own, job submission with a token, Slurm, and KubeRay."""

from __future__ import annotations

import ipaddress
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdcache.cache import Cache
from kdcache.cache.check import problems
from kdcache.cli.commands import COMMANDS
from kdcache.cluster import _keep_token_private

ROOT = Path(__file__).resolve().parent.parent
RAY = Path(sys.executable).with_name("ray")
DEADLINE = 240


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def environment(home: Path) -> dict[str, str]:
    """That of a user with a home of their own, whose commands are those of this environment."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_"))}
    return {
        **kept,
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


def run(call: list[Any], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in call]
    return subprocess.run(
        words,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE,
    )


LISTENING = """
import os, pathlib, psutil, ray
from kdcache.cluster import connect, leave

assert connect(None)
actors = [ray.remote(num_cpus=0)(type("Actor", (), {"ping": lambda self: 1})).remote()] * 2
ray.get([actor.ping.remote() for actor in actors])
me = psutil.Process()
sockets = {s.laddr for p in me.children(recursive=True) for s in p.net_connections("unix")}
for place in filter(None, sockets):
    if place.startswith("/"):
        print("socket", place)
        parents = [p for p in pathlib.Path(place).parents if p.stat().st_uid == os.getuid()]
        assert any(p.stat().st_mode & 0o777 == 0o700 for p in parents), place
for process in [me, *me.children(recursive=True)]:
    for port in process.net_connections("inet"):
        if not port.raddr:
            print("port", process.name(), port.laddr.ip)
leave()
"""


@pytest.mark.end_to_end
def test_a_ray_of_our_own_listens_on_loopback_and_keeps_its_token_private(
    environment: dict[str, str], tmp_path: Path
) -> None:
    own = {k: v for k, v in environment.items() if k != "RAY_AUTH_MODE"} | {"HOME": str(tmp_path)}
    own |= {"TMPDIR": str(tmp_path / ("x" * 80))}  # too long for the name of a socket in it
    Path(own["TMPDIR"]).mkdir()
    done = run([sys.executable, "-c", LISTENING], own)
    assert done.returncode == 0, done.stdout
    ports = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("port ")]
    assert {"gcs_server", "raylet"} <= {name for name, _ in ports}
    sockets = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("socket ")]
    assert {"raylet", "plasma_store"} <= {Path(socket).name for socket in sockets}
    assert not any(Path(socket).parents[2].exists() for socket in sockets), "removed at the end"
    outside = [
        (name, ip)
        for name, ip in ports
        if not ipaddress.ip_address(ip.removeprefix("::ffff:")).is_loopback
    ]
    assert outside == []
    token = tmp_path / ".ray" / "auth_token"
    assert len(token.read_text()) == 64
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


ASLEEP = """
import os, sys, time
if any(word.endswith("default_worker.py") for word in sys.orig_argv):
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    sys.exit()
"""
IMPATIENT = """
from kdcache import cluster
cluster._FIRST_MINUTES = 0.1
try:
    cluster.connect(None)
except cluster.IncompleteError as error:
    print(error)
    raise SystemExit(error.exit_code)
"""


@pytest.mark.end_to_end
def test_a_ray_of_our_own_whose_workers_never_register_ends_by_itself(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(ASLEEP)
    here = {"PYTHONPATH": str(tmp_path), "TMPDIR": "/tmp"}
    done = run([sys.executable, "-c", IMPATIENT], environment | here)
    assert done.returncode == 3, done.stdout
    assert "no worker was ready for 0.1" in done.stdout
    assert "Ray on this machine has started none" in done.stdout


def test_only_one_module_starts_a_ray() -> None:
    starts = [p.name for p in (ROOT / "kdcache").rglob("*.py") if "ray.init(" in p.read_text()]
    assert starts == ["cluster.py"]


def test_a_token_is_for_its_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / ".ray" / "auth_token"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    _keep_token_private(token)
    assert not token.parent.exists()
    monkeypatch.delenv("RAY_AUTH_MODE")
    _keep_token_private(token)
    made = token.read_text()
    assert len(made) == 64
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    token.chmod(0o644)  # as Ray itself writes it
    _keep_token_private(token)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert token.read_text() == made
    assert list(token.parent.iterdir()) == [token]


@pytest.fixture
def head(environment: dict[str, str], tmp_path: Path) -> Iterator[tuple[str, int]]:
    """A local cluster that asks for a token: its address for jobs, and its port for drivers."""
    made = run([RAY, "get-auth-token", "--generate"], environment)
    assert made.returncode == 0, made.stdout
    port = free_port()
    log = tmp_path / "ray.log"
    drivers = free_port()
    call = [RAY, "start", "--head", "--block", f"--port={drivers}", "--num-cpus=2"]
    call += ["--dashboard-host=127.0.0.1", f"--dashboard-port={port}"]
    # At its usual port the agent of a Ray that has just ended may listen for another minute.
    call += [f"--dashboard-agent-listen-port={free_port()}"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(w) for w in call],
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + DEADLINE
        while not _listens(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", drivers
    finally:
        process.send_signal(signal.SIGTERM)  # `--block` ends the processes it started
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as tried:
        tried.settimeout(1)
        return tried.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_a_build_is_submitted_to_a_cluster_that_asks_for_a_token(
    head: tuple[str, int],
    environment: dict[str, str],
    tiny_lm: Path,
    text_corpus: Path,
    tmp_path: Path,
) -> None:
    dashboard, port = head
    call = [RAY, "job", "submit", "--address", dashboard, "--working-dir", ".", "--"]
    out = tmp_path / "cache"
    build = ["python", "cli.py", "build", "--address", "auto"]
    build += ["--workers", "1", "--worker", "gpus=0"]
    build += ["--teacher", tiny_lm, "--corpus", text_corpus, "--max-length", "64", "--out", out]
    stranger = {**environment, "HOME": str(tmp_path), "RAY_AUTH_TOKEN": "guessed" * 8}
    refused = run([*call, *build], stranger)
    assert "Invalid authentication token" in refused.stdout
    assert not out.exists()
    # A client that does not know of tokens asks once a second, 20 times unless told otherwise.
    address = f"{socket.gethostbyname(socket.gethostname())}:{port}"
    unaware = {**environment, "HOME": str(tmp_path), "RAY_NUM_REDIS_GET_RETRIES": "1"}
    del unaware["RAY_AUTH_MODE"]
    words = [sys.executable, "cli.py", "build", "--address", address, *build[5:]]
    for client in (unaware, {**unaware, "RAY_AUTH_MODE": "token"}):
        refused = run(words, client)
        assert refused.returncode == 2, refused.stdout
        assert "RAY_AUTH_MODE=token" in refused.stdout.splitlines()[-1]
    done = run([*call, *build], environment)
    assert done.returncode == 0, done.stdout
    assert "succeeded" in done.stdout
    token = (Path(environment["HOME"]) / ".ray" / "auth_token").read_text().strip()
    assert token not in done.stdout
    cache = Cache.open(str(out))
    assert list(problems(cache)) == []
    assert cache.manifest.rows > 0


@pytest.fixture
def slurm(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """One node that believes to be in a Slurm job: `srun` runs its command right here."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "scontrol": "echo 127.0.0.1",
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    }
    for name, line in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{line}\n")
        (folder / name).chmod(stat.S_IRWXU)
    return {
        **environment,
        "PATH": f"{folder}:{environment['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1]",
        "SLURM_JOB_NUM_NODES": "1",
    }


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_slurm_script_gives_ray_its_words(slurm: dict[str, str], tmp_path: Path) -> None:
    """To a program in the place of `ray`, which shows them; the test below has the real one."""
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

    ray = tmp_path / "bin" / "ray"
    make = "mkdir -p ~/.ray; touch ~/.ray/auth_token; chmod 644 ~/.ray/auth_token"
    ray.write_text(f'#!/bin/bash\n[[ $1 == get* ]] && {{ {make}; }} || printf "%s\\n" "$@"\n')
    ray.chmod(stat.S_IRWXU)
    given = ["--teacher", "a b", "--corpus", "*.jsonl"]
    script = ROOT / "examples" / "cluster" / "slurm.sh"
    done = run(["bash", script, *given], {**slurm, "HOME": str(tmp_path)})
    assert done.returncode == 0, done.stdout
    words = done.stdout.splitlines()
    end = words.index("--")
    assert words[end + 1 :] == ["kdcache", "build", "--address", "auto", *given]
    assert words[0] == "symmetric-run"
    assert curate_and_validate_ray_start_args(words[1:end]) == ["--dashboard-host=127.0.0.1"]
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o077 == 0


@pytest.mark.exhaustive
@pytest.mark.end_to_end
@pytest.mark.alone  # `ray symmetric-run` ends with `ray stop`
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_slurm_script_builds(
    slurm: dict[str, str], tiny_lm: Path, text_corpus: Path, tmp_path: Path
) -> None:
    from ray.scripts.symmetric_run import check_ray_already_started

    if check_ray_already_started():
        pytest.skip("a Ray runs on this machine, and the script wants a node of its own")
    script = ROOT / "examples" / "cluster" / "slurm.sh"
    out = tmp_path / "cache"
    call = ["bash", script, "--teacher", tiny_lm, "--corpus", text_corpus, "--out", out]
    call += ["--max-length", "64", "--workers", "1", "--worker", "gpus=0"]
    done = run(call, slurm)
    assert done.returncode == 0, done.stdout
    assert list(problems(Cache.open(str(out)))) == []
    token = Path(slurm["HOME"]) / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o077 == 0
    assert token.read_text().strip() not in done.stdout


def test_the_rayjob_asks_for_a_token_and_preemptible_gpus() -> None:
    text = (ROOT / "examples" / "cluster" / "rayjob.yaml").read_text()
    job: dict[str, Any] = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    words = spec["entrypoint"].split()
    assert words[0] == "kdcache"
    assert words[1] in COMMANDS
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    head = cluster["headGroupSpec"]
    # On loopback the operator could neither submit the job nor see how it does.
    assert head["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    assert head.get("serviceType", "ClusterIP") == "ClusterIP"
    pods = [head["template"]["spec"]]
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == 0 < group["maxReplicas"]
        pods.append(group["template"]["spec"])
        (container,) = pods[-1]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert len({c["image"] for pod in pods for c in pod["containers"]}) == 1
    assert "AWS_" not in text  # roles, not keys
    assert not any("env" in c for pod in pods for c in pod["containers"])
