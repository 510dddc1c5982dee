"""Trainings whose processes torchrun or srun starts: places, agreement, lost processes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launched import Ended, free_port, launch, srun
from make_caches import make_cache

from kdcache.commands.run_folder import TrainProgress
from kdcache.commands.train.options import Launched, TrainOptions, first_host
from kdcache.commands.train.train import train
from kdcache.errors import IncompleteError, UsageError

BILSTM: dict[str, Any] = {
    "student": "bilstm", "embedding_size": 8, "hidden_size": 8, "dense_size": 8, "dropout": 0.0,
    "batch_size": 8, "epochs": 2, "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none",
    "save_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 rows of a classifier."""
    folder = tmp_path_factory.mktemp("launched")
    make_cache(folder / "classes", [20, 14, 11])
    return folder / "classes"


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def undisturbed(cache: Path, out: Path, streams: int) -> list[float]:
    train(TrainOptions(cache=str(cache), out=str(out), streams=streams, **BILSTM))
    return losses(out)


# Places


def test_a_process_by_itself_has_no_place() -> None:
    assert Launched.find({}) is None
    assert Launched.find({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}) is None
    # The batch script of a job of eight tasks, which runs one command without srun.
    batch = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert Launched.find(batch) is None
    assert Launched.find({**batch, "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_torchrun_gives_the_place() -> None:
    here = {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "node1", "MASTER_PORT": "4711",
    }  # fmt: skip
    assert Launched.find(here) == Launched("torchrun", 5, 8, 1, 4, "node1", 4711)
    assert Launched.find(here | {"SLURM_STEP_NUM_TASKS": "2"}) == Launched.find(here)
    found = Launched.find(here)
    assert found is not None
    assert found.environment == here


def test_srun_gives_the_place() -> None:
    here = {
        "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "2", "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
        "SLURM_NODEID": "2", "SLURM_STEP_NUM_TASKS": "10", "SLURM_STEP_TASKS_PER_NODE": "4(x2),2",
        "SLURM_STEP_NODELIST": "gpu[07-08,11]", "SLURM_JOB_NODELIST": "gpu[01-11]",
    }  # fmt: skip
    assert Launched.find(here) == Launched("srun", 9, 10, 1, 2, "gpu07", 15_000 + 123_458 % 20_000)
    given = Launched.find(here | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"})
    assert given == Launched("srun", 9, 10, 1, 2, "10.0.0.7", 29500)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"), ("a,b", "a"), ("node[3-5]", "node3"),
        ("n[001,7-9]-ib,m", "n001-ib"),
        ("rack[1-2]node[08-09]", "rack1node08"), ("", ""),
    ],
)  # fmt: skip
def test_the_first_of_slurms_hosts(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_launcher_and_ray_are_not_mixed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    common = {"cache": str(cache), "out": str(tmp_path / "run"), **BILSTM}
    for more in ({"num_workers": 2}, {"address": "auto"}):
        with pytest.raises(UsageError, match="torchrun has started 4 processes"):
            train(TrainOptions(**common, **more))
    assert TrainOptions(**common, fsdp=True).fsdp
    assert not (tmp_path / "run").exists()


# Runs


@pytest.mark.end_to_end
def test_torchrun_gives_the_run_of_one_process(cache: Path, tmp_path: Path) -> None:
    words = [f"--{k.replace('_', '-')}={v}" for k, v in BILSTM.items()]
    out = tmp_path / "run"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
            *("--master-addr=127.0.0.1", f"--master-port={free_port()}", "-m", "kdcache", "train"),
            *(f"--cache={cache}", f"--out={out}", "--json", *words),
        ],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["steps"] == 12, "the first process alone reports"
    assert losses(out) == pytest.approx(undisturbed(cache, tmp_path / "alone", 2), abs=1e-4)


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_the_processes_of_srun_train_together(cache: Path, tmp_path: Path) -> None:
    options = TrainOptions(cache=str(cache), out=str(tmp_path / "run"), **BILSTM)
    ends = launch(options, 2, by=srun)
    assert [end.error for end in ends] == [None, None]
    results = [end.result for end in ends]
    assert results[0] is not None
    alike = {"seconds": results[1].seconds, "one_answer": {}, "warning": ""}  # the first one judges
    assert results[1] == dataclasses.replace(results[0], **alike)
    want = undisturbed(cache, tmp_path / "alone", 2)
    assert losses(Path(options.out)) == pytest.approx(want, abs=1e-4)
    again = launch(options, 2, by=srun)
    assert not any(end.result is None or end.result.made for end in again)


def stop_at_6(now: TrainProgress) -> None:
    if now.step == 6:
        os.kill(os.getpid(), signal.SIGTERM)


def die_at_6(now: TrainProgress) -> None:
    if now.step == 6:
        os.kill(os.getpid(), signal.SIGKILL)


def stop_at_9(now: TrainProgress) -> None:
    if now.step == 9:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_four_two_and_four_processes_take_the_steps_of_one(cache: Path, tmp_path: Path) -> None:
    options = TrainOptions(cache=str(cache), out=str(tmp_path / "run"), **BILSTM)
    first = launch(options, 4, look=die_at_6)
    assert first[0].exitcode == -signal.SIGKILL
    for end in first[1:]:  # the step at which a process is lost is not in a checkpoint
        assert isinstance(end.error, IncompleteError)
        assert "another process of this training has ended" in str(end.error)
        assert "continues from step 4" in str(end.error)
    second = launch(options, 2, look=stop_at_9)
    assert "interrupted. The same command continues from step 8" in str(second[0].error)
    assert all(isinstance(end.error, IncompleteError) for end in second)
    assert [end.error for end in launch(options, 4)] == [None] * 4
    want = undisturbed(cache, tmp_path / "alone", 4)
    assert losses(Path(options.out)) == pytest.approx(want, abs=1e-4)


def refused(ends: list[Ended]) -> str:
    """The error that all processes raise and the first one reports."""
    errors = [end.error for end in ends]
    assert all(isinstance(error, UsageError) for error in errors), errors
    assert len({str(error) for error in errors}) == 1
    assert not errors[0].reported  # type: ignore[union-attr]
    assert all(error.reported for error in errors[1:])  # type: ignore[union-attr]
    return str(errors[0])


@pytest.mark.end_to_end
def test_processes_that_differ_do_not_begin(cache: Path, tmp_path: Path) -> None:
    options = TrainOptions(cache=str(cache), out=str(tmp_path / "run"), **BILSTM)
    other = dataclasses.replace(options, out=str(tmp_path / "other"), epochs=1)
    text = refused(launch([options, other], 2))
    assert "different options or caches (" in text
    assert "epochs: 2 and 1" in text
    elsewhere = dataclasses.replace(options, cache=(str(tmp_path / "nowhere"),))
    assert "nowhere" in refused(launch([options, elsewhere], 2))
    assert not (tmp_path / "run").exists()


@pytest.mark.end_to_end
def test_processes_that_share_no_folder_do_not_begin(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its own `run`, as on nodes without a common file system."""
    options = TrainOptions(cache=str(cache), out=str(tmp_path / "run"), **BILSTM)
    launch(options, 2, look=stop_at_6)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    shutil.move(tmp_path / "run", tmp_path / "one" / "run")
    options = dataclasses.replace(options, out="run")
    ends = launch(options, 2, folders=[tmp_path / "one", tmp_path / "two"])
    assert "see different files in its folder (checkpoint: checkpoint-4 and None" in refused(ends)
