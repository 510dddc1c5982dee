"""A teacher in the real vLLM whose processes are on two nodes of a Ray cluster, one of them lost.

The nodes are processes of this machine; the GPUs that they offer are none (`ray_cpu`).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_vllm import LENGTH, llama, pytestmark  # noqa: F401

import kdcache
from kdcache.cache import Cache
from kdcache.commands.build import prepare

PLUGIN = Path(__file__).parent / "ray_cpu"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head for the driver, and two nodes with a GPU each."""
    import ray
    from ray.cluster_utils import Cluster

    places = [str(PLUGIN), str(Path(kdcache.__file__).parent.parent)]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # Ray would count what it hides
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=1, num_gpus=1)
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def build_options(
    llama: Path,  # noqa: F811
    corpus_texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> kdcache.BuildOptions:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus_texts[:60]))
    of = prepare._teacher_options
    monkeypatch.setattr(
        prepare, "_teacher_options", lambda *a: dataclasses.replace(of(*a), device="cpu")
    )
    return kdcache.BuildOptions(
        teacher=(str(llama),), corpus=(str(corpus),), out=str(tmp_path / "cache"),
        engine="vllm", codec="topk:8", dtype="float32", max_length=LENGTH, shard_tokens=900,
        batch_tokens=512, workers=1, address="auto", hang_seconds=300,
    )  # fmt: skip


@pytest.mark.timeout(1200)
def test_a_build_outlives_a_node_of_its_engine(
    cluster: Any, build_options: kdcache.BuildOptions
) -> None:
    """Tensor-parallel: with pipeline-parallel workers vLLM's CPU build fails at the first rows."""
    args = ("tensor_parallel_size=2", "distributed_executor_backend=ray")
    lost: list[Any] = []

    def events(kind: str) -> list[dict[str, Any]]:
        lines = Path(build_options.out, "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def lose(progress: Any) -> None:
        """Take the node that the worker itself is not on, once a span is made."""
        if progress.made and not lost:
            (ready,) = events("worker ready")
            lost.append(next(n for n in cluster.worker_nodes if n.node_id != ready["node"]))
            cluster.remove_node(lost[0], allow_graceful=False)
            cluster.add_node(num_cpus=1, num_gpus=1)

    kdcache.build(dataclasses.replace(build_options, engine_arg=args), on_progress=lose)
    assert lost
    (fault,) = events("worker lost")
    assert fault["fault"] in ("node", "worker"), "the engine may end before Ray misses the node"
    quiet = dataclasses.replace(
        build_options, out=f"{build_options.out}-2", engine=None, workers=0, address=None
    )
    kdcache.build(quiet)
    mine, other = Cache.open(build_options.out), Cache.open(quiet.out)
    assert mine.manifest.positions == other.manifest.positions
    for span in range(mine.spec.spans):
        np.testing.assert_array_equal(mine.read(span).input_ids, other.read(span).input_ids)
        a, b = (cache.read(span).targets.at(1.0) for cache in (mine, other))
        # Rounding moves a number to a neighbouring level.
        torch.testing.assert_close(a.weights, b.weights, rtol=0.05, atol=1e-3)
