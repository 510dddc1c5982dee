"""The scripts of examples/trainers: each takes the same steps, alone, resumed, and on workers."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

SCRIPTS = Path(__file__).resolve().parent.parent / "examples" / "trainers"
# Processes that begin as copies of one, so that PyTorch is imported once.
FORK = """
import os, sys
import torch, transformers
from torch import distributed
import kdcache.student.trainer, kdcache.stream
code, world, sys.argv = sys.argv[1], int(sys.argv[2]), sys.argv[2:]
children = []
for rank in range(world):
    child = os.fork()
    if child == 0:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        exec(code, {})
        sys.stdout.flush()
        os._exit(0)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""

Losses = dict[int, float]
Script = Callable[..., Losses]


def source(name: str) -> str:
    return (SCRIPTS / f"{name}.py").read_text()


def losses(printed: str) -> Losses:
    """Loss of each step."""
    return {int(n): float(x) for n, x in re.findall(r"^step (\d+): ([\d.]+)$", printed, re.M)}


@pytest.fixture(scope="module")
def desk(
    tiny_lm: Path, lm_caches: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with what the scripts name, tiny."""
    desk = tmp_path_factory.mktemp("trainers")
    shutil.copytree(tiny_lm, desk / "HuggingFaceTB" / "SmolLM2-135M")
    shutil.copytree(lm_caches["topk:8"], desk / "caches" / "lm")
    return desk


@pytest.fixture
def script(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Script:
    """Run a script in this process; returns the losses it printed."""
    monkeypatch.chdir(desk)
    # What earlier trainings of this process have left.
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    shutil.rmtree(desk / "runs", ignore_errors=True)

    def run(name: str, *arguments: str) -> Losses:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capsys.readouterr()
        exec(source(name), {"__name__": "__main__"})
        return losses(capsys.readouterr().out)

    return run


def on_workers(desk: Path, name: str, world: int, *arguments: str) -> Losses:
    """Run a script as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-c", FORK, source(name), str(world), *arguments],
        cwd=desk,
        env={**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(done.stdout)


@pytest.mark.end_to_end
def test_a_loop_goes_on_where_it_stopped(script: Script) -> None:
    begun = script("loop", "4")
    resumed = script("loop", "11")
    Path("runs/plain-loop.pt").unlink()
    whole = script("loop", "11")
    assert list(whole) == list(range(1, 12))
    assert begun | resumed == whole


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_workers_take_the_steps_of_one(script: Script, desk: Path) -> None:
    both = on_workers(desk, "loop", 2, "3")
    assert list(both) == [1, 2, 3]
    state = torch.load("runs/plain-loop.pt", weights_only=True)
    assert state["stream"]["streams"] == 2
    assert list(script("loop", "5")) == [4, 5]  # alone, with the streams of two
    state = torch.load("runs/plain-loop.pt", weights_only=True)
    assert state["stream"] == {"epoch": 0, "rows_seen": 40, "step": 5, "streams": 2}


@pytest.mark.end_to_end
def test_accelerate_goes_on_where_it_stopped(script: Script) -> None:
    begun = script("with_accelerate", "4")
    resumed = script("with_accelerate", "11", "resume")
    whole = script("with_accelerate", "11")
    assert list(whole) == list(range(1, 12))
    assert begun | resumed == whole
    assert whole == pytest.approx(script("loop", "11"), abs=2e-4)


@pytest.mark.end_to_end
@pytest.mark.skipif(find_spec("lightning") is None, reason="Lightning is not installed")
@pytest.mark.filterwarnings("ignore")
def test_lightning_goes_on_where_it_stopped(script: Script) -> None:
    whole = script("with_lightning", "11")
    assert list(whole) == list(range(1, 12))
    resumed = script("with_lightning", "11", "runs/lightning/step=6.ckpt")
    assert resumed == {step: loss for step, loss in whole.items() if step > 6}
    assert whole == pytest.approx(script("loop", "11"), abs=2e-4)


@pytest.mark.exhaustive
@pytest.mark.end_to_end
@pytest.mark.filterwarnings("ignore")  # Ray warns of what its own modules use
def test_ray_train_takes_the_steps_of_a_loop(ray: None, script: Script, desk: Path) -> None:
    (last,) = script("with_ray_train").items()
    assert last == (3, pytest.approx(on_workers(desk, "loop", 2, "3")[3], abs=2e-4))
