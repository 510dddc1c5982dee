"""How many workers a build requests of a cluster, what each needs of a node, and how it waits."""

from __future__ import annotations

import functools
import math
import operator
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from kdcache.cluster import Need, describe, share_of_cpus
from kdcache.commands.build import on_ray
from kdcache.commands.build.on_ray import RayWorkers
from kdcache.commands.build.options import BuildOptions, WorkerOptions
from kdcache.commands.build.source import TeacherSourceOptions
from kdcache.commands.build.workers import Job
from kdcache.corpus import InputFile, Span
from kdcache.errors import IncompleteError, UsageError
from kdcache.rows import RowSpec
from kdcache.teacher import TeacherOptions

ROOT = Path(__file__).parent.parent
GPU_NODE = {"CPU": 16.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("need", "node", "fit", "threads"),
    [
        (Need(1), GPU_NODE, 1, 8),  # eight keep no more busy
        (Need(1, workers=16), GPU_NODE, 1, 8),
        (Need(1), {"CPU": 4, "GPU": 1}, 1, 4),
        (Need(1), {"CPU": 16, "GPU": 8}, 8, 2),
        (Need(1, workers=2), {"CPU": 16, "GPU": 8}, 8, 8),
        (Need(0.5), {"CPU": 8, "GPU": 1}, 2, 4),
        (Need(0.1), {"CPU": 8, "GPU": 0.3}, 3, 2),
        (Need(2), {"CPU": 8, "GPU": 1}, 0, 8),
        (Need(0), {"CPU": 4}, 4, 1),
        (Need(0, workers=1), {"CPU": 4}, 4, 4),
        (Need(0, cpus=3), {"CPU": 4}, 1, 4),
        (Need(1, cpus=2, exact=True), GPU_NODE, 1, 2),
        (Need(1), {"memory": 1.0}, 0, 1),
    ],
)
def test_a_worker_has_its_share_of_the_node_that_it_gets(
    need: Need, node: dict[str, float], fit: int, threads: int
) -> None:
    assert need.fit(node) == fit
    assert need.threads(node) == threads


def test_what_workers_reserve_leaves_room_for_all() -> None:
    assert share_of_cpus(0, 2, [{"CPU": 4}, {"CPU": 4}]).cpus == 4
    assert share_of_cpus(0, 3, [{"CPU": 4}, {"CPU": 4}]).cpus == 2
    assert share_of_cpus(0, 1, [{"CPU": 64}]).cpus == 8
    for workers in (None, 16):  # nodes that are not there yet decide later
        assert share_of_cpus(1, workers, []) == Need(1, 1, workers)
        assert share_of_cpus(0, workers, []).cpus == 1


def test_gpus_across_nodes_are_counted_together() -> None:
    nodes = [{"CPU": 16.0, "GPU": 8.0}, {"CPU": 16.0, "GPU": 8.0}, {"CPU": 4.0}]
    assert (Need(16).room(nodes), Need(16, across=True).room(nodes)) == (0, 1)
    assert (Need(8).room(nodes), Need(5, across=True).room(nodes)) == (2, 3)
    assert str(Need(16, across=True)) == "16 GPUs and 1 CPU on one node or several"


def test_nodes_in_words() -> None:
    assert describe([]) == "nodes: none"
    nodes = [GPU_NODE, {"CPU": 2.0}, GPU_NODE]
    assert describe(nodes, {"GPU": 0.5}) == (
        "nodes: 1 with 0 GPUs and 2 CPUs, 2 with 1 GPU and 16 CPUs; free: 0.5 GPUs and 0 CPUs"
    )
    assert str(Need(0.5)) == "0.5 GPUs and 1 CPU on one node"
    assert str(Need(0, 2)) == "2 CPUs on one node"


class FakeRay:
    """Ray as `RayWorkers` uses it; a worker is ready when its node has come."""

    def __init__(self) -> None:
        self.up: list[dict[str, float]] = []
        self.pending: list[tuple[Any, Future[Any]]] = []
        self.requested = 0
        self.exceptions = SimpleNamespace(RayTaskError=RuntimeError)

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": i, "Alive": True, "Resources": has} for i, has in enumerate(self.up)]

    def available_resources(self) -> dict[str, float]:
        return {}

    def remote(self, **_: Any) -> Any:
        return lambda _kind: SimpleNamespace(options=self._options)

    def _options(self, **needs: Any) -> Any:
        self.needs = needs
        return SimpleNamespace(remote=self._actor)

    def _actor(self, *_: Any) -> Any:
        self.requested += 1
        answers: list[Future[Any]] = [Future(), Future()]
        never = SimpleNamespace(future=lambda: Future[Any]())
        actor = SimpleNamespace(
            where=SimpleNamespace(remote=lambda: SimpleNamespace(future=lambda: answers[0])),
            run=SimpleNamespace(remote=lambda _span: never),
            pulse=SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: never)),
        )
        self.pending.append((actor, answers[0]))
        return actor

    def kill(self, actor: Any) -> None:
        self.pending = [one for one in self.pending if one[0] is not actor]

    def start(self, node: dict[str, float]) -> None:
        """A node comes, and with it the worker that has waited longest."""
        self.up.append(node)
        _, answer = self.pending.pop(0)
        answer.set_result((f"worker {len(self.up)}", len(self.up) - 1, 4096))


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    made = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", made)
    return made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(on_ray.time, "monotonic", lambda: now[0])
    return now


JOB = Job("", TeacherSourceOptions(RowSpec("causal-lm"), TeacherOptions((), "causal-lm"), 0))
SPAN = Span(0, InputFile("/corpus/a.jsonl", 1 << 30, "jsonl"), 0, 1)


def go_on(workers: RayWorkers, clock: list[float], seconds: int) -> None:
    """Time goes by while every worker that is ready is kept busy."""
    for _ in range(seconds):
        clock[0] += 1
        workers.collect(0.0)
        while workers.backlog and workers.has_room():
            workers.submit(Span(workers.backlog, SPAN.file, 0, 1))
            workers.backlog -= 1


def test_a_worker_across_nodes_holds_a_group_and_is_lost_with_any_of_them(
    fake_ray: FakeRay, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    removed: list[int] = []
    util = SimpleNamespace(
        placement_group=lambda bundles, strategy: len(asked.append(bundles) or asked),
        placement_group_table=lambda _: {"bundles_to_node_id": {0: 0, 1: 1}},
        remove_placement_group=removed.append,
        scheduling_strategies=SimpleNamespace(
            PlacementGroupSchedulingStrategy=lambda group, **more: (group, more)
        ),
    )
    monkeypatch.setitem(sys.modules, "ray.util", util)
    fake_ray.exceptions.ActorUnavailableError = fake_ray.exceptions.NodeDiedError = KeyError
    fake_ray.up.append(GPU_NODE)
    workers = RayWorkers(JOB, WorkerOptions(workers=1, address="auto"), gpus=2, across=True)
    assert asked == [[{"GPU": 1.0, "CPU": 1}, {"GPU": 1.0}]]
    group, more = fake_ray.needs["scheduling_strategy"]
    assert (group, more["placement_group_bundle_index"]) == (1, 0)
    assert more["placement_group_capture_child_tasks"], "vLLM asks for the group"
    assert 0 < fake_ray.needs["num_gpus"] < 1, "the engine's process needs room beside it"
    fake_ray.start(GPU_NODE)
    go_on(workers, clock, 1)
    workers.submit(SPAN)
    go_on(workers, clock, 60)
    assert not removed, "while all nodes are up"
    del fake_ray.up[1:]  # nobody answers, and the worker is lost long before it hangs
    outcomes = []
    for _ in range(60):
        clock[0] += 1
        outcomes += workers.collect(0.0)
    assert {outcome.fault for outcome in outcomes} == {"node"}
    assert removed == [1]
    assert len(asked) == 2
    workers.stop()
    assert removed == [1, 2]


def test_auto_asks_for_more_while_all_are_busy(fake_ray: FakeRay, clock: list[float]) -> None:
    workers = RayWorkers(JOB, WorkerOptions(workers="1:6", address="auto"), gpus=1)
    assert fake_ray.needs["num_gpus"] == fake_ray.needs["num_cpus"] == 1
    workers.backlog = 100
    seen = []
    for _ in range(4):
        go_on(workers, clock, 12)
        seen.append(len(fake_ray.pending))
        while fake_ray.pending:
            fake_ray.start(GPU_NODE)
    assert seen == [1, 1, 2, 2], "as many as there are, six in all"
    go_on(workers, clock, 12)
    assert (len(fake_ray.pending), len(workers.figures())) == (0, 6)


def test_a_request_stands_while_spans_are_left_and_no_longer(
    fake_ray: FakeRay, clock: list[float]
) -> None:
    workers = RayWorkers(JOB, WorkerOptions(address="auto"), gpus=1)
    workers.backlog = 10
    fake_ray.start(GPU_NODE)
    go_on(workers, clock, 12)
    assert len(fake_ray.pending) == 1
    fake_ray.up.clear()  # nodes go away: the demand for others stays
    go_on(workers, clock, 12)
    assert len(fake_ray.pending) == 1
    workers.backlog = 0
    go_on(workers, clock, 12)
    assert fake_ray.pending == []


def test_no_more_workers_are_asked_for_than_spans_are_left(
    fake_ray: FakeRay, clock: list[float]
) -> None:
    workers = RayWorkers(JOB, WorkerOptions(address="auto"), gpus=0)
    for _ in range(4):
        while fake_ray.pending:
            fake_ray.start({"CPU": 1})
        workers.backlog = 99
        go_on(workers, clock, 12)
    workers.backlog, before = 3, len(fake_ray.pending)
    assert before == 8
    while fake_ray.pending:
        fake_ray.start({"CPU": 1})
    workers.backlog = 2 * 8 + 3  # the eight that have come take two each
    go_on(workers, clock, 12)
    assert (workers.backlog, len(fake_ray.pending)) == (3, 2)


def test_a_number_asks_for_that_number_at_once(fake_ray: FakeRay, clock: list[float]) -> None:
    workers = RayWorkers(JOB, WorkerOptions(workers=16, address="auto"), gpus=1)
    assert len(fake_ray.pending) == 16
    fake_ray.start(GPU_NODE)
    go_on(workers, clock, 30)
    assert (len(fake_ray.pending), fake_ray.requested) == (15, 16)


def test_what_a_build_waits_for_is_said_every_30_seconds(
    fake_ray: FakeRay, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    fake_ray.up.append({"CPU": 2.0})
    told: list[str] = []
    options = WorkerOptions(workers=1, address="auto", wait_minutes=2)

    def tell(event: str, /, **facts: object) -> None:
        told.append(f"{event}: {facts.get('state')}")

    workers = RayWorkers(JOB, options, gpus=1, tell=tell)
    state = (
        "1 requested, none ready. A worker needs 1 GPU and 1 CPU on one node; nodes: 1 with 0 GPUs "
        "and 2 CPUs; free: 0 GPUs and 0 CPUs"
    )
    with pytest.raises(IncompleteError) as caught:
        go_on(workers, clock, 1000)
    assert clock[0] == 120
    assert caplog.messages == [f"waiting for workers: {state} ({s} s)" for s in (30, 60, 90)]
    assert told == [f"waiting for workers: {state}"] * 4
    assert str(caught.value).startswith("no worker was ready for 2 minutes (--worker wait")
    assert str(caught.value).endswith("Run the same command to continue.")


def test_workers_of_this_machine_that_load_lack_no_room(
    fake_ray: FakeRay,
    clock: list[float],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    fake_ray.up.append({"CPU": 2.0})
    workers = RayWorkers(JOB, WorkerOptions(workers=2, wait_minutes=1), gpus=0)
    with pytest.raises(IncompleteError, match="--workers 0 starts none"):
        go_on(workers, clock, 100)
    state = "2 workers started, loading libraries and the teacher"
    assert caplog.messages == [f"waiting for workers: {state} (30 s)"]


def test_a_worker_that_is_ready_ends_the_wait(fake_ray: FakeRay, clock: list[float]) -> None:
    workers = RayWorkers(JOB, WorkerOptions(workers=2, address="auto", wait_minutes=1), gpus=1)
    go_on(workers, clock, 50)
    fake_ray.start(GPU_NODE)
    go_on(workers, clock, 500)
    assert len(workers.figures()) == 1


def test_a_ray_of_its_own_does_not_grow(
    fake_ray: FakeRay, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    fake_ray.up.append({"CPU": 2.0})
    with pytest.raises(UsageError, match="a worker needs 1 GPU and 1 CPU on one node; nodes: 1 wi"):
        RayWorkers(JOB, WorkerOptions(), gpus=1)
    with pytest.raises(UsageError, match="room for 2 workers, not for 3. Use --workers 2"):
        RayWorkers(JOB, WorkerOptions(workers=3), gpus=0)
    with pytest.raises(UsageError, match="needs 4 CPUs"):
        RayWorkers(JOB, WorkerOptions(workers=1, cpus_per_worker=4), gpus=0)
    fake_ray.pending.clear()
    workers = RayWorkers(JOB, WorkerOptions(), gpus=0)
    workers.backlog = 100
    go_on(workers, clock, 30)
    assert len(fake_ray.pending) == 2


def test_two_ways_to_say_a_bound_must_agree() -> None:
    with pytest.raises(UsageError, match="--max-workers and --workers differ"):
        BuildOptions(teacher=("t",), corpus=("c",), out="o", workers=2, max_workers=4)


def test_nodes_of_the_cluster_files_hold_a_worker() -> None:
    """What the autoscaler is told of a node that is not up yet satisfies what a worker asks."""
    need = share_of_cpus(1.0, None, [])
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    gpu = cluster["available_node_types"]["gpu"]
    assert (need.fit(gpu["resources"]), need.threads(gpu["resources"])) == (1, 8)
    assert f"--workers 1:{gpu['max_workers']}" in (ROOT / "cluster.yaml").read_text()
    job = yaml.safe_load((ROOT / "examples" / "cluster" / "rayjob.yaml").read_text())["spec"]
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    node = {"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])}
    assert (need.fit(node), need.threads(node)) == (1, 8)
    assert f"--workers 1:{group['maxReplicas']} " in job["entrypoint"]


def test_the_rayjob_of_16_gpus_holds_its_teacher() -> None:
    """The patch changes what is there, and its nodes have room for the engine it asks for."""
    folder = ROOT / "examples" / "cluster"
    job = yaml.safe_load((folder / "rayjob.yaml").read_text())
    for change in yaml.safe_load((folder / "rayjob-16-gpus.yaml").read_text()):
        *way, last = (int(k) if k.isdigit() else k for k in change["path"].split("/")[1:])
        where = functools.reduce(operator.getitem, way, job)
        assert change["op"] == "replace"
        assert type(where[last]) is type(change["value"])
        where[last] = change["value"]
    words = job["spec"]["entrypoint"].split()
    args = dict(word.split("=") for word in words if "_size=" in word or "_backend=" in word)
    assert args.pop("distributed_executor_backend") == "ray"
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    node = {"CPU": 32.0, "GPU": float(container["resources"]["limits"]["nvidia.com/gpu"])}
    gpus = math.prod(map(int, args.values()))
    assert (gpus, Need(gpus, across=True).room([node] * group["maxReplicas"])) == (16, 1)
