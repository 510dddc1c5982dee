"""Trainings on Ray workers: relative paths, interruptions, and a Ray that is lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import yaml
from loaded import Program
from make_caches import make_cache
from small_runs import BERT, USUAL

from kdcache.commands.interrupt import interruptible
from kdcache.commands.options import SweepOptions
from kdcache.commands.run_folder import TrainProgress
from kdcache.commands.sweep.sweep import SweepProgress, sweep
from kdcache.commands.train import on_ray
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.errors import IncompleteError
from kdcache.student.checkpoints import last_checkpoint

pytestmark = pytest.mark.end_to_end

SMALL: dict[str, Any] = USUAL | {"epochs": 2}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches `classes` and `held`, a student's config and word vectors."""
    folder = tmp_path_factory.mktemp("desk")
    make_cache(folder / "caches" / "classes", [20, 14, 11])
    make_cache(folder / "caches" / "held", [20], first=500)
    (folder / "bert.json").write_text(json.dumps(BERT | {"hidden_dropout_prob": 0.0}))
    (folder / "vectors.txt").write_text("".join(f"w{i} {i} 1 -1 0.5\n" for i in range(9, 60)))
    return folder


@pytest.mark.exhaustive
@pytest.mark.parametrize("student", ["bilstm", "bert.json"])
def test_relative_paths_mean_the_same_on_workers(
    ray: None, desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, student: str
) -> None:
    """As the README writes them; a worker's own working directory is elsewhere."""
    shutil.copytree(desk, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    common: dict[str, Any] = {
        "cache": "caches/classes", "eval_cache": "caches/held", "student": student, **SMALL,
    }  # fmt: skip
    if student == "bilstm":
        common |= {"embeddings": "vectors.txt", "embedding_size": 4, "hidden_size": 8, "dropout": 0}
    alone = train(TrainOptions(out="runs/alone", streams=2, **common))
    seen: list[int] = []
    both = train(
        TrainOptions(out="runs/both", num_workers=2, **common),
        on_progress=lambda now: seen.append(now.step),
    )
    assert both.made
    assert list(dict.fromkeys(seen)) == list(range(1, both.steps + 1))
    assert both.out == str(tmp_path / "runs" / "both")
    assert both.loss == pytest.approx(alone.loss, abs=1e-3)
    assert both.eval["loss"] == pytest.approx(alone.eval["loss"], abs=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*(path.name for path in desk.iterdir()), "runs"]
    )


def test_an_interrupted_training_leaves_no_worker_and_goes_on(
    ray: None, desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By relative paths, though a worker's own working directory is elsewhere."""
    import ray as ray_module

    shutil.copytree(desk, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    options = TrainOptions(
        cache="caches/classes", out="run", student="bilstm", embeddings="vectors.txt",
        embedding_size=4, hidden_size=8, num_workers=2, save_steps=2, **(SMALL | {"epochs": 500}),
    )  # fmt: skip

    struck: list[int] = []  # once: a second signal would meet Ray's own handler, after the training

    def strike(now: TrainProgress) -> None:
        if not struck and last_checkpoint(tmp_path / "run"):
            struck.append(now.step)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(IncompleteError, match="interrupted. The same command continues from step"):
        train(options, on_progress=strike)

    @ray_module.remote(num_cpus=2)
    def take_all() -> bool:
        return True

    assert ray_module.get(take_all.remote(), timeout=60), "the workers have gone"
    seen: list[int] = []
    alone = {k: v for k, v in options.to_dict().items() if k != "num_workers"}
    short = TrainOptions(**(alone | {"epochs": 0.1}))
    train(short, on_progress=lambda now: seen.append(now.step))
    assert min(seen, default=2) >= 2


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_sweep_notices_a_signal_that_a_library_swallowed(
    ray: None, desk: Path, tmp_path: Path, workers: int
) -> None:
    grid = tmp_path / "grid.yaml"
    fixed = {"cache": str(desk / "caches" / "classes"), "student": str(desk / "bert.json")}
    fixed |= {name.replace("_", "-"): value for name, value in SMALL.items()}
    grid.write_text(yaml.safe_dump({**fixed, "grid": {"seed": [0, 1, 2, 3]}}))
    done: list[int] = []

    def strike(now: SweepProgress) -> None:
        done.append(now.done)
        if now.done == 1:
            with contextlib.suppress(KeyboardInterrupt):  # it cannot leave a library's callback
                signal.raise_signal(signal.SIGINT)

    options = SweepOptions(grid=str(grid), out=str(tmp_path / "sweep"), workers=workers)
    with pytest.raises(IncompleteError, match="interrupted: [12] of 4 runs are finished"):
        sweep(options, on_progress=strike)
    assert max(done) <= 2
    assert sweep(options).made >= 2


LOSING = """
import signal, sys, threading, time
import psutil

def strike():
    '''Kill a process of this one's Ray as soon as a worker of it is there.'''
    while True:
        children = psutil.Process().children(recursive=True)
        # A child that has only just been forked has this process's own words in its command line.
        if any(" ".join(child.cmdline()).startswith(sys.argv[2]) for child in children):
            break
        time.sleep(0.1)
    (victim,) = [child for child in children if sys.argv[1] in child.name()]
    victim.send_signal(signal.SIGKILL)

def run():
    while True:
        try:
            return strike()
        except psutil.Error:  # a child that ended meanwhile
            pass

threading.Thread(target=run, daemon=True).start()
from kdcache.cli.main import cli
cli(sys.argv[3:])
"""


@pytest.mark.parametrize(
    ("command", "victim", "when"),
    [
        pytest.param("build", "raylet", "ray::RayWorker", marks=pytest.mark.exhaustive),
        ("train", "raylet", "ray::TrainController"),
        pytest.param("sweep", "raylet", "ray::_call", marks=pytest.mark.exhaustive),
    ],
)
def test_a_ray_of_its_own_that_dies_ends_the_command(
    command: str, victim: str, when: str, desk: Path, tiny_lm: Path, tmp_path: Path
) -> None:
    # More than a worker that outlives its raylet for a while could finish.
    (tmp_path / "text.jsonl").write_text(
        (json.dumps({"text": "some words " * 40}) + "\n") * (200_000 if command == "build" else 1)
    )
    student = ["--cache", str(desk / "caches" / "classes"), "--student", "bilstm"]
    grid = {"cache": student[1], "student": "bilstm", "epochs": 2000, "grid": {"seed": [0, 1]}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    words = {
        "build": ["--teacher", str(tiny_lm), "--corpus", str(tmp_path / "text.jsonl")],
        "train": [*student, "--epochs", "2000", "--num-workers", "2"],
        "sweep": [str(tmp_path / "grid.yaml")],
    }[command]
    program = Program(
        *("python", "-c", LOSING, victim, when, command, *words, "--out", str(tmp_path / "out")),
        environment=os.environ | {"RAY_num_prestart_python_workers": "0"},
    )
    said = program.communicate()
    assert program.returncode == 3, said[-3000:]
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"Error: Ray on this machine has lost its {victim}"), said[-3000:]
    assert "Traceback" not in said


STUCK = """
import threading
from pathlib import Path
from types import SimpleNamespace
from kdcache.commands.train import on_ray
from kdcache.errors import IncompleteError

def lost():
    raise IncompleteError("Ray on this machine has lost its raylet")

on_ray.check_own_ray = lost
on_ray._WAKE_EVERY, on_ray._END_SECONDS = 0.2, 2.0
on_ray._Follower(SimpleNamespace(out=Path(), steps=1, on_progress=None), watch=True)
while True:
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
"""


def test_a_training_that_no_signal_ends_is_ended_after_its_ray_is_lost() -> None:
    program = Program("python", "-c", STUCK)
    assert program.communicate() == "Error: Ray on this machine has lost its raylet\n"
    assert program.returncode == 3


@pytest.mark.timeout(60)
def test_a_training_that_waits_for_a_lock_is_woken_when_its_ray_is_lost(tmp_path: Path) -> None:
    """Only a real signal does that."""
    plan: Any = SimpleNamespace(out=tmp_path, steps=1, on_progress=None)
    lock = threading.Lock()
    lock.acquire()
    error = IncompleteError("Ray on this machine has lost its raylet")
    with mock.patch.object(on_ray, "check_own_ray", side_effect=error), interruptible():
        follower = on_ray._Follower(plan, watch=True)
        with pytest.raises(KeyboardInterrupt):
            lock.acquire()
        follower.stop()
    follower.ended()
    assert follower._last_resort is not None
    assert follower._last_resort.finished.is_set()
