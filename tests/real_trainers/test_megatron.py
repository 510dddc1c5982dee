"""The recipe in the real megatron-core, on four processes: `make test-trainers`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trainer_contract import build_texts

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.skipif(
        importlib.util.find_spec("megatron") is None,
        reason="megatron-core is missing: make test-trainers",
    ),
]


def train(work: Path, name: str, processes: int, *more: str) -> list[float]:
    """The loss of each step; see `megatron_cpu.py`."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)),
            *(str(Path(__file__).with_name("megatron_cpu.py")), str(work), name, *more),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    losses: list[float] = json.loads((work / f"{name}.json").read_text())
    return losses


@pytest.mark.parametrize("codec", ["topk:32", "anchored:8"])
def test_four_processes_take_the_steps_of_one(
    stories260k: Path, tmp_path: Path, codec: str
) -> None:
    """Data parallel times tensor parallel, stopped and resumed."""
    build_texts(stories260k, tmp_path, codec)
    one = train(tmp_path, "one", 1, "1")
    four = train(tmp_path, "four", 4, "2")
    assert len(one) == 20
    assert one[-1] < 0.8 * one[0]
    assert four == pytest.approx(one, abs=1e-4)
    assert train(tmp_path, "rest", 4, "2", "10") == pytest.approx(four[10:], abs=1e-6)
