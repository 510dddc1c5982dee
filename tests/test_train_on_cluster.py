"""Trainings on a cluster whose nodes come and go: waiting, lost workers, as many as there are."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from make_caches import make_cache
from test_launched import BILSTM

from kdcache import cluster as kdcache_cluster
from kdcache.cluster import Need
from kdcache.commands.run_folder import TrainProgress
from kdcache.commands.train import on_ray
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.errors import IncompleteError, UsageError


def options(**changes: Any) -> TrainOptions:
    values: dict[str, Any] = {"cache": "cache", "student": "bilstm", "out": "run"}
    return TrainOptions(**(values | changes))


@pytest.mark.parametrize(
    ("given", "workers"), [(1, (1, 1)), ("3", (3, 3)), ("4:16", (4, 16)), ("2:2", (2, 2))]
)
def test_a_range_of_workers(given: int | str, workers: tuple[int, int]) -> None:
    assert options(num_workers=given).workers == workers


@pytest.mark.parametrize("given", [0, -1, "16:4", "0:4", "4:", ":4", "some", "1.5"])
def test_what_is_no_number_of_workers(given: int | str) -> None:
    with pytest.raises(UsageError, match=f"--num-workers is {given}, expected a number"):
        options(num_workers=given)


def test_shards_of_a_model_need_two_workers_at_least() -> None:
    with pytest.raises(UsageError, match="--fsdp shards over workers"):
        options(num_workers="1:4", fsdp=True)
    assert options(num_workers="2:4", fsdp=True).fsdp


def test_what_a_worker_of_a_cluster_needs() -> None:
    """The nodes may not be there yet; a cluster is rented for its GPUs."""
    eight = {"CPU": 64.0, "GPU": 8.0}
    assert on_ray.need_of(options(num_workers=16), [], grows=True) == Need(1, 1, 16)
    assert on_ray.need_of(options(num_workers="4:16"), [eight], grows=True).threads(eight) == 8
    cpus = options(num_workers="2:4", gpus_per_worker=0)
    assert on_ray.need_of(cpus, [{"CPU": 8.0}, {"CPU": 8.0}], grows=True) == Need(0, 4, 4)
    with pytest.raises(UsageError, match="2 workers need 2 CPUs, this machine's Ray has 1"):
        on_ray.need_of(cpus, [{"CPU": 1.0}], grows=False)


def test_a_cluster_without_room_is_described_until_patience_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    now = [1000.0]
    monkeypatch.setattr(on_ray, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(on_ray, "nodes_up", lambda: [{"CPU": 8.0}])
    monkeypatch.setattr(on_ray, "launching", lambda: "2 of gpu")
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 7.0})
    trainer = SimpleNamespace(controller=None)
    waiting = on_ray._Waiting(trainer, Need(1, 1, 4), options(num_workers="2:4", wait_minutes=1))
    runs = [False, False, True, False, False, False]
    monkeypatch.setattr(waiting, "_runs", lambda: runs.pop(0))
    text = (
        "2 needed, none runs. A worker needs 1 GPU and 1 CPU on one node; nodes: 1 with 0 GPUs and "
        "8 CPUs; free: 0 GPUs and 7 CPUs; pending nodes: 2 of gpu"
    )
    with caplog.at_level(logging.WARNING):
        for seconds, lines in ((29, 0), (1, 1), (1, 1), (29, 1), (1, 2)):
            now[0] += seconds
            waiting.look()
            assert len(caplog.messages) == lines
    assert caplog.messages[0] == f"waiting for workers: {text} (30 s)"
    now[0] += 30
    with pytest.raises(IncompleteError) as caught:
        waiting.look()
    assert str(caught.value).startswith(
        f"no worker was ready for 1 minutes (--worker wait-minutes): {text}"
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster with room for one worker."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


class Notes(logging.Handler):
    """Calls a function with each message."""

    def __init__(self, take: Any) -> None:
        super().__init__()
        self._take = take

    def emit(self, record: logging.LogRecord) -> None:
        self._take(record.getMessage())


@pytest.mark.end_to_end
def test_a_training_waits_for_room_and_outlives_a_worker(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins with one worker of two, on the streams of two."""
    import psutil
    import ray

    @ray.remote(num_cpus=1)
    class Other:
        def ready(self) -> None:
            pass

    other = Other.remote()
    ray.get(other.ready.remote())
    monkeypatch.setattr(kdcache_cluster, "_WAITING_EVERY", 0.5)
    make_cache(tmp_path / "classes", [20, 14, 11])
    said: list[str] = []
    freed: list[str] = []

    def take(text: str) -> None:
        said.append(text)
        if text.startswith("waiting for workers") and not freed:
            freed.append(text)
            ray.kill(other)

    struck: list[int] = []

    def strike(now: TrainProgress) -> None:
        if now.step >= 3 and not struck:
            workers = psutil.Process().children(recursive=True)
            (worker,) = [one for one in workers if "RayTrainWorker" in " ".join(one.cmdline())]
            struck.append(now.step)
            worker.kill()

    common = {"cache": str(tmp_path / "classes"), **BILSTM, "epochs": 5}
    handler = Notes(take)
    logging.getLogger("kdcache").addHandler(handler)
    try:
        result = train(
            TrainOptions(
                out=str(tmp_path / "run"), num_workers="1:2", gpus_per_worker=0,
                address=cluster.address, **common,
            ),
            on_progress=strike,
        )  # fmt: skip
    finally:
        logging.getLogger("kdcache").removeHandler(handler)
    assert result.made
    assert struck
    assert "1 needed, none runs. A worker needs 1 CPU on one node; nodes: 1 with" in freed[0]
    (lost,) = [text for text in said if text.startswith("a worker failed or was lost")]
    assert "for the 1. time of 100 at most" in lost
    train(TrainOptions(out=str(tmp_path / "alone"), streams=2, **common))
    runs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "alone")]
    mine, theirs = ([json.loads(line) for line in text.splitlines()] for text in runs)
    assert [x["step"] for x in mine] == [x["step"] for x in theirs]
    assert [x["loss"] for x in mine] == pytest.approx([x["loss"] for x in theirs], abs=1e-3)
