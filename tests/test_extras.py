"""Without an optional package: one line that names its extra, and everything else still works."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kdcache.commands.plan.options import PlanOptions
from kdcache.commands.plan.plan import plan
from kdcache.commands.sweep import results
from kdcache.commands.sweep.results import RunScore, SweepResult
from kdcache.commands.train import on_ray
from kdcache.commands.train.options import TrainOptions
from kdcache.errors import UsageError, installed


@pytest.mark.slow
def test_a_plan_without_matplotlib_says_so_before_it_runs_a_teacher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = PlanOptions(teacher=("nowhere",), corpus=("nowhere",), plot="plan.png")
    with pytest.raises(UsageError, match=r"--plot needs matplotlib, .*'kdcache\[plot\]'"):
        plan(options)


def test_workers_without_ray_train_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.train", None)
    options = TrainOptions(cache=("nowhere",), student="bilstm", out="run", num_workers=2)
    with pytest.raises(UsageError, match=r"--num-workers needs ray.train, .*'kdcache\[cluster\]'"):
        on_ray.train_on_ray(options)


def test_a_sweep_without_matplotlib_keeps_its_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(results, "installed", lambda module: module != "matplotlib")
    run = RunScore("a", "runs/a", {"alpha": "0.1"}, None, {"hard_loss": 1.0}, 10, 2, None, 0.5)
    result = SweepResult.of(tmp_path, [run], made=1, combinations=1, evaluated=False)
    result.write(tmp_path)
    results.plot_sweep(tmp_path / "results.png", result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.json"]
    assert "kdcache[plot]" in caplog.text


def test_what_is_installed() -> None:
    assert installed("numpy")
    assert not installed("no_such_module")
