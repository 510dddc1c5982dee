"""What is killed, stopped, preempted or full: after each, the same command ends with the bytes of a
build that was never disturbed.

Real Ray, real processes, real signals. Faults at exact moments come from `fault_points`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from broken_caches import files, flip, run
from conftest import further
from fault_points import MOMENTS
from make_caches import CAUSAL, make_cache

from kdcache.cache import Cache
from kdcache.cache.check import problems
from kdcache.commands.build.build import build
from kdcache.commands.build.driver import Progress
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.generate.generate import generate
from kdcache.commands.generate.options import GenerateOptions
from kdcache.commands.options import RepairOptions, TranscodeOptions
from kdcache.commands.transcode import transcode
from kdcache.commands.upkeep import repair
from kdcache.errors import IncompleteError, UsageError

pytestmark = pytest.mark.end_to_end

FILES = 12


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `fault_points` looks into."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(autouse=True)
def no_faults(faults: Path) -> None:
    """Nothing left by the test before."""
    for path in faults.iterdir():
        path.unlink()


@pytest.fixture(scope="module")
def cluster(faults: Path) -> Iterator[Any]:
    """Three nodes, two of them with a CPU, whose workers can be struck."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": False,
            "_system_config": {"metrics_report_interval_ms": 500},
        },
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    ray.init(
        address=cluster.address,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={
            "worker_process_setup_hook": "fault_points.install",
            "env_vars": {
                "PYTHONPATH": str(Path(__file__).parent),
                "KDCACHE_TEST_FAULTS": str(faults),
            },
        },
    )
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def options(small_build: BuildOptions, text_corpus: Path, tmp_path: Path) -> BuildOptions:
    """A build of twelve input files, each of them one span."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    lines = text_corpus.read_text().splitlines(keepends=True)
    for i in range(FILES):
        (corpus / f"{i:02}.jsonl").write_text("".join(lines[i::FILES]))
    return dataclasses.replace(
        small_build,
        corpus=(str(corpus),),
        codec="topk:8",
        max_length=32,
        batch_tokens=128,
        gpus_per_worker=0,
    )


def same_as_undisturbed(options: BuildOptions) -> bool:
    """Whether a cache has the very files of one that was built in peace."""
    quiet = Path(options.out).with_name("quiet")
    build(dataclasses.replace(options, out=str(quiet), workers=0))
    disturbed = files(Path(options.out))
    # A killed writer may leave its temporary file; nothing ever reads one.
    left = {k: v for k, v in disturbed.items() if not k.startswith("tmp/")}
    wanted = files(quiet)
    assert sorted(left) == sorted(wanted)
    assert [name for name in wanted if left[name] != wanted[name]] == []
    return not list(problems(Cache.open(options.out)))


def events(options: BuildOptions, kind: str) -> list[dict[str, Any]]:
    """Events of one kind, of all builds of a cache."""
    lines = Path(options.out, "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


def until(condition: Callable[[], Any], seconds: float = 300) -> Any:
    """Wait for something to be true, and give it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return found


# Workers


@pytest.mark.parametrize("moments", [("read",), *further((MOMENTS,))])
def test_workers_that_hang_and_are_killed_at_moments_and_a_span_that_kills_each(
    cluster: Any, faults: Path, options: BuildOptions, moments: tuple[str, ...]
) -> None:
    for moment in moments:
        (faults / moment).write_text("stop" if moment == "read" else "kill")
    poison = Path(options.corpus[0], "07.jsonl")
    (faults / "poison").write_text(str(poison))
    options = dataclasses.replace(options, address=cluster.address, workers=2, hang_seconds=6)
    with pytest.raises(IncompleteError, match="1 of 12 spans failed 3 times") as caught:
        build(options)
    assert f"span 7 ({poison}: the lines that start in bytes 0-" in str(caught.value)
    assert not [m for m in moments if (faults / m).exists()], "every moment came"
    lost = events(options, "worker lost")
    assert len(lost) >= len(moments) + len(events(options, "span failed"))
    (hung,) = [e for e in lost if "it made no progress for" in e["error"]]
    until(lambda: not psutil.pid_exists(int(hung["worker"].split(":")[1])))
    (aside,) = events(options, "span set aside")
    assert aside["span"] == 7
    assert len(list(Path(options.out, "shards").iterdir())) == FILES - 1
    (faults / "poison").unlink()
    # Another number of workers goes on where two of them ended.
    assert build(dataclasses.replace(options, workers=0)).made == 1
    assert same_as_undisturbed(options)


@pytest.mark.parametrize("command", [transcode, *further(generate)])
def test_workers_that_are_killed_in_other_commands(
    command: Any, cluster: Any, faults: Path, options: BuildOptions, tmp_path: Path
) -> None:
    quiet: Any = GenerateOptions(
        model=options.teacher[0],
        corpus=options.corpus,
        out=str(tmp_path / "quiet"),
        prompt_tokens=6,
        max_new_tokens=6,
        workers=0,
    )
    spans, moments = FILES, ["read", "write", "renamed"]
    if command is transcode:
        source = make_cache(tmp_path / "source", [5, 4, 6, 3, 5, 4], task=CAUSAL)
        quiet = TranscodeOptions(source.url, "sample:4", str(tmp_path / "quiet"), workers=0)
        spans, moments = source.spec.spans, ["renamed"]
    command(quiet)
    for moment in moments:
        (faults / moment).write_text("kill")
    out = str(tmp_path / "new")
    disturbed = dataclasses.replace(
        quiet, out=out, workers=2, gpus_per_worker=0, address=cluster.address
    )
    assert command(disturbed).made == spans
    assert not [m for m in moments if (faults / m).exists()], "every moment came"
    said = Path(out, "events.jsonl").read_text()
    assert said.count('"event": "worker lost"') == len(moments)
    found, wanted = (
        {name: data for name, data in files(Path(url)).items() if not name.startswith("tmp/")}
        for url in (out, quiet.out)
    )
    assert found == wanted
    if command is transcode:
        assert not list(problems(Cache.open(out)))


@pytest.mark.exhaustive
def test_workers_that_hang_one_after_the_other_are_replaced(
    cluster: Any, faults: Path, options: BuildOptions
) -> None:
    (faults / "read").write_text("stop")
    later = ["hang"]

    def strike_the_second(progress: Progress) -> None:
        if progress.lost and later:
            (faults / "forward").write_text(later.pop())

    options = dataclasses.replace(options, address=cluster.address, workers=1, hang_seconds=6)
    result = build(options, on_progress=strike_the_second)
    assert not list(faults.iterdir()), "all came"
    lost = events(options, "worker lost")
    assert result.workers_lost == len(lost) >= 2
    assert "it made no progress for" in lost[0]["error"]
    until(lambda: not any(psutil.pid_exists(int(e["worker"].split(":")[1])) for e in lost))
    assert same_as_undisturbed(options)


# Nodes


@pytest.mark.exhaustive
def test_nodes_go_and_come(cluster: Any, faults: Path, options: BuildOptions) -> None:
    """The workers of `auto` follow the nodes, and a span that was on a lost one is not blamed."""
    old = list(cluster.worker_nodes)
    added: list[Any] = []
    close_gate(faults, tickets=1)

    def exchange(progress: Progress) -> None:
        if not added and progress.made:
            assert metrics(), "Ray's dashboard has figures while the build goes on"
            added.append(cluster.add_node(num_cpus=1))
        elif old and len(progress.workers) == 3:
            # One is preempted with notice, the other is simply gone.
            cluster.remove_node(old.pop(), allow_graceful=True)
            cluster.remove_node(old.pop(), allow_graceful=False)
        elif progress.lost == 2:
            # Not before: the processes of a node that is gone live on for a moment, in which they
            # could make all that is left.
            (faults / "gate").unlink(missing_ok=True)

    options = dataclasses.replace(options, address=cluster.address)
    result = build(dataclasses.replace(options, workers=None), on_progress=exchange)
    lost = events(options, "worker lost")
    assert [e["fault"] for e in lost] == ["node", "node"]
    assert result.redone == sum(len(e["spans"]) for e in lost) >= 2
    assert not events(options, "span failed")
    last = events(options, "worker ready")[-1]
    assert last["node"] == added[0].node_id
    assert last["batch_tokens"] == options.batch_tokens
    assert same_as_undisturbed(options)
    cluster.add_node(num_cpus=1)


def metrics() -> set[str]:
    """Names of our figures at the nodes' metrics endpoints."""
    import ray

    def look() -> set[str]:
        found = set()
        for node in ray.nodes():
            if node["Alive"]:
                url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
                try:
                    lines = urllib.request.urlopen(url, timeout=30).read().decode().splitlines()
                except OSError:  # not up yet
                    continue
                found |= {line.split("{")[0] for line in lines if line.startswith("ray_kdcache_")}
        return found if len(found) == 3 else set()

    return until(look)


# The driver


def close_gate(faults: Path, tickets: int) -> None:
    """From now on only so many shards are committed."""
    for i in range(tickets):
        (faults / f"ticket-{i}").touch()
    (faults / "gate").touch()


def start(options: BuildOptions, workers: int, faults: Path) -> subprocess.Popen[str]:
    """The command as a user runs it, in a process group of its own as from a shell; with
    `fault_points` in all its processes."""
    site = Path(options.out).with_name("site")
    site.mkdir()
    (site / "sitecustomize.py").write_text("import fault_points; fault_points.install()\n")
    path = f"{site}{os.pathsep}{Path(__file__).parent}"
    return subprocess.Popen(
        [
            sys.executable, "-m", "kdcache", "build", "--teacher", *options.teacher,
            "--corpus", *options.corpus, "--codec", "topk:8", "--max-length", "32",
            "--batch-tokens", "128", "--workers", str(workers), "--worker", "gpus=0",
            "--out", options.out,
        ],
        env={**os.environ, "PYTHONPATH": path, "KDCACHE_TEST_FAULTS": str(faults)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def gone(processes: list[psutil.Process]) -> bool:
    """Whether they have ended. Ray's own two agents take a minute to notice that their node was
    killed, because they try to report it first."""
    agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            ended = process.status() == psutil.STATUS_ZOMBIE
            if not ended and not " ".join(process.cmdline()).startswith(agents):
                return False
    return True


@pytest.mark.parametrize(
    ("workers", "signals", "committed"),
    [
        (1, [signal.SIGINT], 4),  # the two spans in flight are finished
        *further(
            (1, [signal.SIGKILL], 2),
            (1, [signal.SIGTERM, signal.SIGTERM], 2),  # a second signal does not wait for them
            (0, [signal.SIGTERM, signal.SIGINT], 2),  # not even for threads that hang
        ),
    ],
)
def test_a_driver_that_ends_leaves_nothing_behind(
    workers: int,
    signals: list[signal.Signals],
    committed: int,
    faults: Path,
    options: BuildOptions,
) -> None:
    close_gate(faults, tickets=2)
    process = start(options, workers, faults)
    assert process.stderr is not None
    shards = Path(options.out, "shards")
    until(lambda: len(list(faults.glob("waiting-*"))) == 2 or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    assert len(list(shards.glob("*"))) == 2
    started = psutil.Process(process.pid).children(recursive=True)
    assert any("ray::RayWorker" in " ".join(p.cmdline()) for p in started) == bool(workers)
    for i, sign in enumerate(signals):
        if sign == signal.SIGINT:
            os.killpg(process.pid, sign)  # as a terminal does: the whole group
        else:
            process.send_signal(sign)
        if sign != signal.SIGKILL and i == 0:
            told = iter(process.stderr.readline, "")
            assert any("have 20 s to finish" in line for line in told)
    if signals == [signal.SIGINT]:
        (faults / "gate").unlink()
    _, err = process.communicate(timeout=300)
    if signal.SIGKILL not in signals:
        assert process.returncode == 3, err
        assert f"{committed} of 12 shards are committed. Run the same command to continue" in err
    until(lambda: gone(started))
    assert len(list(shards.glob("*"))) == committed
    assert not (Path(options.out) / "manifest.json").exists()
    (faults / "gate").unlink(missing_ok=True)
    assert build(options).made == FILES - committed
    assert same_as_undisturbed(options)


# The disk, in this process


def refuse(options: BuildOptions, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(options)


def test_a_full_disk(options: BuildOptions, caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        refuse(options, IncompleteError, "no space left")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    build(options)
    assert same_as_undisturbed(options)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a small file system, or changes how it is mounted."""
    place = tmp_path / "mounted"
    place.mkdir()

    def call(how: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", how, "tmpfs", place], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"may not mount: {done.stderr}")
        return place

    yield call
    subprocess.run(["umount", place], check=False, capture_output=True)


def test_a_small_file_system_that_fills_up(
    options: BuildOptions, mount: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    options = dataclasses.replace(options, out=str(mount("size=400k") / "cache"))
    refuse(options, IncompleteError, "no space left")
    mount("remount,size=10m")
    build(options)
    assert same_as_undisturbed(options)


def test_a_read_only_file_system(options: BuildOptions, mount: Callable[..., Path]) -> None:
    place = mount("size=10m")
    options = dataclasses.replace(options, out=str(place / "cache"))
    mount("remount,ro")
    refuse(options, UsageError, "ead-only file system. Make it writable, or choose another place")
    mount("remount,rw")

    def freeze(progress: Progress) -> None:
        mount("remount,ro" if progress.done < FILES else "remount,rw")

    with pytest.raises(UsageError, match="ead-only"):
        build(options, on_progress=freeze)
    mount("remount,rw")
    build(options)
    assert same_as_undisturbed(options)
    flip(min(Path(options.out, "shards").iterdir()), 999)
    mount("remount,ro")
    with pytest.raises(UsageError, match="ead-only"):
        repair(RepairOptions(options.out))
    words = ["--cache", options.out, "--student", "bilstm", "--out", f"{place}/run"]
    trained = run("train", *words)
    assert trained.exit_code == 2, trained.output
    assert trained.output.splitlines()[-1].startswith("Error: ")


def test_a_file_system_that_loses_a_rename(
    options: BuildOptions, caplog: pytest.LogCaptureFixture
) -> None:
    lost: list[str] = []

    def lose_one(progress: Progress) -> None:
        if progress.made and not lost:
            victim = min(Path(options.out, "shards").iterdir())
            victim.unlink()
            lost.append(victim.name)

    result = build(options, on_progress=lose_one)
    assert (result.made, result.redone) == (FILES, 1)
    assert f"{lost[0]} was committed but is not in the listing" in caplog.text
    assert same_as_undisturbed(options)
