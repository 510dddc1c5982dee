"""The recipe in the real torchtitan, on four processes: `make test-trainers`."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainer_contract import ALPHA, build_texts, make_student
from transformers import AutoModelForCausalLM

import kdcache

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.skipif(
        importlib.util.find_spec("torchtitan") is None,
        reason="torchtitan is missing: make test-trainers",
    ),
]
BATCH, STREAMS, STEPS = 4, 2, 20


def train(work: Path, name: str, processes: int, split: int, *more: str) -> list[float]:
    """The loss of each step on so many processes, `split` of which hold one copy of the model."""
    log = work / f"{name}.jsonl"
    options = {
        "dump_folder": work / name.split("-")[0],
        "hf_assets_path": work / "student",
        "dataloader.cache": work / "cache",
        "dataloader.streams": STREAMS,
        "loss.alpha": ALPHA,
        "loss.num_chunks": 2,
        "lr_scheduler.warmup_steps": 1,
        "training.steps": STEPS,
        "training.seq_len": 64,
        "training.local_batch_size": BATCH * split // processes,
        "training.mixed_precision_param": "float32",
        "parallelism.tensor_parallel_degree": split,
        # The default backend needs a PyTorch newer than 2.13.
        "parallelism.spmd_backend": "partial_dtensor",
        "checkpoint.interval": 10,
        "checkpoint.initial_load_path": work / "student",
    }
    pairs = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)),
            *(str(Path(__file__).with_name("titan_cpu.py")), *pairs, *more),
            *("--checkpoint.enable", "--checkpoint.initial_load_in_hf"),
        ],
        env={**os.environ, "KDCACHE_LOSSES": str(log), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


@pytest.mark.parametrize("codec", ["topk:32", "anchored:8"])
def test_four_processes_take_the_steps_of_one(
    stories260k: Path, tmp_path: Path, codec: str
) -> None:
    """Data parallel times tensor parallel, and the rest of such a run on one process."""
    make_student(stories260k, tmp_path / "student")
    cache = build_texts(stories260k, tmp_path, codec)
    student = kdcache.DistilledStudent(
        AutoModelForCausalLM.from_pretrained(tmp_path / "student"),
        cache.spec.task,
        alpha=ALPHA,
        vocab_size=cache.spec.vocab_size,
    )
    batches = kdcache.TargetStream(cache, batch_size=BATCH, streams=STREAMS).batches(1)
    with torch.no_grad():
        first = float(student(**next(batches)).loss)
    batches.close()  # type: ignore[attr-defined]

    one = train(tmp_path, "one", 1, 1)
    four = train(tmp_path, "four", 4, 2)
    assert len(one) == STEPS
    assert one[0] == pytest.approx(first, abs=1e-5)
    assert min(one) < 0.5 * first
    assert four == pytest.approx(one, rel=1e-4, abs=1e-4)
    shutil.rmtree(tmp_path / "four" / "checkpoint" / "step-20")
    rest = train(tmp_path, "four-resumed", 1, 1, "--checkpoint.load_step", "10")
    assert rest == pytest.approx(four[10:], rel=1e-4, abs=1e-4)
