"""Sweeps: which runs a grid means, their files and figures, failures, interruptions, workers."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import small_runs
import torch
import yaml
from click.testing import CliRunner, Result
from conftest import further
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded import Program
from make_caches import CAUSAL, make_cache, make_rows, teacher_logits
from rich.console import Console
from safetensors.torch import load_file, save_file

from kdcache.cli.main import cli
from kdcache.cli.views import render_sweep
from kdcache.commands.options import SweepOptions
from kdcache.commands.run_folder import last_metrics, read_metrics
from kdcache.commands.sweep.grid import Grid
from kdcache.commands.sweep.results import RunScore, SweepResult, charts_of, plot_sweep
from kdcache.commands.sweep.sweep import RayPool, SweepProgress, sweep
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.errors import IncompleteError, UsageError
from kdcache.plots import Level, draw_charts

sweep_module = sys.modules[sweep.__module__]

LLAMA = small_runs.LLAMA | {"hidden_size": 8}
BILSTM = {"model_type": "kdcache-bilstm", "embedding_size": 4, "hidden_size": 4, "dense_size": 4}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches `classes` (45 rows), `held` (20), `causal` (24), and configs of students."""
    folder = tmp_path_factory.mktemp("sweep")
    make_cache(folder / "classes", [20, 14, 11])
    make_cache(folder / "held", [20], first=500)
    make_cache(folder / "causal", [14, 10], task=CAUSAL, codec="topk:6")
    (folder / "tiny.json").write_text(json.dumps(LLAMA))
    (folder / "small.json").write_text(json.dumps(LLAMA | {"hidden_size": 16}))
    (folder / "lstm.json").write_text(json.dumps(BILSTM))
    return folder


@pytest.fixture
def here(caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which these caches and configs have short names."""
    for path in caches.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str | Path, grid: dict[str, list[Any]], **fixed: Any) -> str:
    """A grid file; a language model unless `fixed` says otherwise."""
    common = {"cache": "causal", "student": "tiny.json", "report-to": "none", "batch-size": 8}
    values = {k: v for k, v in {**common, **fixed}.items() if k not in grid}
    Path(path).write_text(yaml.safe_dump({**values, "grid": grid}, sort_keys=False))
    return str(path)


def classifiers(path: str | Path, grid: dict[str, list[Any]], **fixed: Any) -> str:
    lstm = {"cache": "classes", "eval-cache": "held", "student": "lstm.json", "learning-rate": 0.01}
    return write(path, grid, **{**lstm, **fixed})


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, ["sweep", *words], catch_exceptions=False)


def local(grid: str, out: str = "out", **more: Any) -> SweepOptions:
    return SweepOptions(grid, out, workers=0, **more)


def logged(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each run of a sweep logged, without wall times."""
    times = ("seconds", "eval_runtime")
    return {
        run.name: [{k: v for k, v in x.items() if k not in times} for x in read_metrics(run)]
        for run in sorted((folder / "runs").iterdir())
    }


# Which runs a grid means


ALPHAS, SEEDS = [0, 0.25, 0.5], [0, 1, 7]


@settings(max_examples=25, deadline=None)
@given(
    alphas=st.lists(st.sampled_from(ALPHAS), min_size=1, unique=True),
    seeds=st.lists(st.sampled_from(SEEDS), min_size=1, unique=True),
    seed_first=st.booleans(),
)
def test_a_run_is_the_same_in_any_grid(
    caches: Path, alphas: list[float], seeds: list[int], seed_first: bool
) -> None:
    names = {"cache": str(caches / "causal"), "student": str(caches / "tiny.json")}
    path = caches.parent / "grid.yaml"
    crossed = {"seed": seeds, "alpha": alphas} if seed_first else {"alpha": alphas, "seed": seeds}
    grid = Grid.read(write(path, crossed, **names))
    assert len(grid.runs) == len(alphas) * len(seeds)
    assert len({r.key for r in grid.runs}) == len({r.name for r in grid.runs}) == len(grid.runs)
    for member in grid.runs:
        one = {"alpha": [str(member.options.alpha)]}
        (again,) = Grid.read(write(path, one, seed=member.options.seed, **names)).runs
        assert again.key == member.key


def test_what_a_student_does_not_depend_on_makes_no_runs(here: Path) -> None:
    grid = Grid.read(write("g.yaml", {"alpha": [1, 0.5, 1.0], "temperature": [1, 2, "2"]}))
    assert grid.combinations == 9
    assert [r.setting for r in grid.runs] == [
        {"alpha": "1", "temperature": "-"},
        {"alpha": "0.5", "temperature": "1"},
        {"alpha": "0.5", "temperature": "2"},
    ]
    speed = {"logging-steps": [1, 10], "gradient-accumulation": [1, 2], "prefetch": [2, 4]}
    assert len(Grid.read(write("g.yaml", speed)).runs) == 1
    length = {"epochs": [1, 2], "max-steps": [None, 3]}
    assert len(Grid.read(write("g.yaml", length)).runs) == 4
    losses = {"divergence": ["forward-kl", "mse"], "temperature": [1, 3]}
    assert len(Grid.read(classifiers("g.yaml", losses)).runs) == 3


def test_a_changed_config_is_another_student(here: Path) -> None:
    path = write("g.yaml", {"seed": [0]}, student="own.json")
    Path("own.json").write_text(json.dumps(LLAMA))
    (before,) = Grid.read(path).runs
    Path("own.json").write_text(json.dumps(LLAMA | {"hidden_size": 12}))
    (after,) = Grid.read(path).runs
    assert before.key != after.key


@pytest.mark.slow
def test_changed_weights_below_one_name_are_another_student_of_sweep_and_train(here: Path) -> None:
    """Of a grid read in another working folder, too, a finished run is not the answer."""
    train(TrainOptions(("causal",), "tiny.json", "own", report_to="none"))
    path = write("g.yaml", {"seed": [0]}, student="own")
    options = TrainOptions(("causal",), "own", "run", report_to="none")
    (before,) = Grid.read(path).runs
    assert (train(options).made, train(options).made) == (True, False)
    weights = load_file("own/model.safetensors")
    weights["model.embed_tokens.weight"][0, 0] += 1
    save_file(weights, "own/model.safetensors", {"format": "pt"})
    (after,) = Grid.read(path).runs
    assert before.key != after.key
    with pytest.raises(
        UsageError, match=r"other caches or options:\n  student_files: \w+ -> \w+\n"
    ):
        train(options)
    Path("own").rename("elsewhere")  # as on a machine of a cluster that has no student
    assert train(options).made is False


def test_values_are_told_apart_by_short_names(here: Path) -> None:
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "student.json").write_text(json.dumps(LLAMA))
    crossed = {
        "student": ["a/student.json", "b/student.json"],
        "cache": ["causal", ["causal", str(here / "causal")]],
    }
    grid = Grid.read(write("g.yaml", crossed))
    assert [r.setting["student"] for r in grid.runs[::2]] == ["a/student", "b/student"]
    assert [r.setting["cache"] for r in grid.runs[:2]] == ["causal", "causal+causal"]
    assert all("/" not in r.name for r in grid.runs)


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("cache: [1", ["not valid YAML"]),
        ("just words", ["holds no options"]),
        ("cache: causal\nstudent: tiny.json", ["grid has no values"]),
        ("cache: causal\nstudent: tiny.json\ngrid: {alpha: 0.5}", ["alpha under grid is 0.5"]),
        ("grid: {seed: [0]}", ["cache is missing", "student is missing"]),
        (
            "cache: causal\nstudent: none.json\nout: x\nalpha: 0.2\nbatch-size: [1, 2]\n"
            "tempature: 2\n"
            "grid: {alpha: [0.5, 1.5], temperature: [1, 3], seed: [zero], fsdp: [true], lr: []}",
            [
                "out cannot be used", "fsdp cannot be used", "alpha is given twice",
                "batch-size takes one value", "Did you mean temperature?", "lr under grid is []",
                "alpha is 1.5, expected 0 to 1. (2 of 4 combinations, first alpha=1.5",
                "seed is 'zero', expected a whole number", "student none.json: no such file",
            ],
        ),
        (
            "cache: [causal, classes]\nstudent: tiny.json\ngrid: {temperature: [1, 3], seed: [0]}",
            ["task of", "(1 of 2 combinations, first temperature=3 seed=0)"],
        ),
        (
            "student: tiny.json\ngrid: {cache: [causal, classes]}",
            ["for causal-lm and sequence-classification, and runs of several tasks"],
        ),
        (
            "cache: causal\ngrid: {student: [bilstm, tiny.json, nowhere/x, 'm:f']}",
            ["bilstm is a classifier", "nowhere/x", "No module named 'm'"],
        ),
    ],
)  # fmt: skip
def test_everything_wrong_is_told_before_anything_starts(
    here: Path, text: str, messages: list[str]
) -> None:
    Path("g.yaml").write_text(text)
    result = run("g.yaml", "--out", "out", "--workers", "0")
    assert result.exit_code == 2, result.output
    for message in messages:
        assert message in result.stderr
    assert "Traceback" not in result.output
    assert not Path("out").exists()


def test_a_grid_that_is_not_there_and_options_that_cannot_be() -> None:
    assert "cannot be read" in run("/nowhere.yaml", "--out", "out").stderr
    with pytest.raises(UsageError, match=r"workers is -1[^\n]*\n--gpus-per-run is -2"):
        SweepOptions("g", "o", workers=-1, gpus_per_run=-2)


# What comes out


@pytest.mark.slow
def test_a_sweep_is_its_training_runs_side_by_side(here: Path) -> None:
    crossed = {"alpha": [0.5, 1.0], "temperature": [1, 2], "seed": [0, 1]}
    grid = classifiers("g.yaml", crossed, epochs=2)
    told: list[SweepProgress] = []
    result = sweep(local(grid), on_progress=told.append)
    assert (len(result.runs), result.made, result.combinations) == (6, 6, 8)
    assert told[-1] == SweepProgress(6, 6, 0, 72, 72, 0, told[-1].seconds)
    steps = [now.step for now in told]
    assert steps == sorted(steps)
    assert len(set(steps)) > 6

    # Each run is what the train command makes of the same options.
    one = next(r for r in result.runs if r.setting["temperature"] == "2" and r.seed == "1")
    alone = train(
        TrainOptions(
            cache="classes", eval_cache="held", student="lstm.json", out="alone", alpha=0.5,
            temperature=2, seed=1, epochs=2, batch_size=8, learning_rate=0.01, report_to="none",
        )  # type: ignore[arg-type]
    )  # fmt: skip
    assert one.figures == alone.eval
    assert (one.parameters, one.steps, one.best_step) == (
        alone.parameters, alone.steps, alone.best_step,
    )  # fmt: skip
    assert Path(one.out, "model.safetensors").is_file()
    student = Path(alone.out, "model.safetensors").read_bytes()
    assert Path(one.out, "model.safetensors").read_bytes() == student

    # Figures over seeds, best first.
    assert result.ranked_by == "accuracy"
    assert [s.mean["accuracy"] for s in result.settings] == sorted(
        (s.mean["accuracy"] for s in result.settings), reverse=True
    )
    by_name = {r.name: r for r in result.runs}
    for setting in result.settings:
        assert len(setting.runs) == 2
        values = [by_name[name].figures["hard_loss"] for name in setting.runs]
        assert setting.mean["hard_loss"] == pytest.approx(sum(values) / 2)
        assert setting.deviation["hard_loss"] == pytest.approx(statistics.stdev(values))
    held = make_rows("sequence-classification", range(500, 520), 64, 3)
    labels = torch.tensor([int(row.labels[0]) for row in held])
    logits = teacher_logits(held, "sequence-classification", 3)
    right = (logits.argmax(-1) == labels)[labels >= 0].double().mean()
    nats = torch.nn.functional.cross_entropy(logits, labels)
    assert result.teacher == pytest.approx({"accuracy": float(right), "hard_loss": float(nats)})
    hard = next(s for s in result.settings if s.setting["alpha"] == "1")
    assert hard.setting["temperature"] == "-"
    assert "soft_loss" not in hard.mean

    # Files.
    document = json.loads(Path("out/results.json").read_text())
    assert [r["name"] for r in document["runs"]] == [r.name for r in result.runs]
    with Path("out/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == [r.figures["accuracy"] for r in result.runs]
    assert {row["seed"] for row in rows} == {"0", "1"}
    assert Path("out/results.png").read_bytes()[:4] == b"\x89PNG"

    # No column is lost where a terminal is narrow.
    for width in (40, 90, 200):
        console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        render_sweep(result, console)
        assert console.file.getvalue().count(f"{one.parameters:,}") == 3, width

    # Again: nothing is trained, the table is printed.
    stamps = {path: path.stat().st_mtime_ns for path in Path("out/runs").rglob("*")}
    printed = run(grid, "--out", "out", "--workers", "0")
    assert printed.exit_code == 0, printed.output
    assert "8 combinations make 6 runs" in printed.stdout
    assert "6 runs, 0 of them now" in printed.stdout
    assert "±" in printed.stdout
    table = [line.split()[:2] for line in printed.stdout.splitlines()[2:5]]
    assert table == [[s.setting["alpha"], s.setting["temperature"]] for s in result.settings]
    assert {path: path.stat().st_mtime_ns for path in Path("out/runs").rglob("*")} == stamps
    outcome = json.loads(run(grid, "--out", "out", "--workers", "0", "--json").stdout)
    assert outcome["made"] == 0
    assert outcome["runs"] == document["runs"]


@pytest.mark.slow
def test_a_changed_grid_only_adds_runs(here: Path) -> None:
    common = {"learning-rate": 1e-3, "max-steps": 2}
    first = sweep(local(write("g.yaml", {"alpha": [0.1, 0.5]}, **common)))
    names = {r.name for r in first.runs}
    stamps = {path: path.stat().st_mtime_ns for path in Path("out/runs").rglob("*")}
    # One value less and one more; an option with several values that had one: alpha 0.5 is found.
    crossed = {"alpha": [0.5, 1.0], "learning-rate": [5e-4, 1e-3]}
    second = sweep(local(write("g.yaml", crossed, **common)))
    assert (len(second.runs), second.made) == (4, 3)
    assert len(names & {r.name for r in second.runs}) == 1
    third = sweep(local(write("g.yaml", {"seed": [0, 1], "alpha": [0.1, 0.5]}, **common)))
    assert (len(third.runs), third.made) == (4, 2)
    assert names < {r.name for r in third.runs}
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    manifest = json.loads(Path("out/sweep.json").read_text())
    assert {entry["name"] for entry in manifest["runs"].values()} == {
        path.name for path in Path("out/runs").iterdir()
    }
    # Without evaluation caches there are only the losses of training, and it is said.
    assert (third.ranked_by, third.evaluated) == ("hard_loss", False)
    assert "No eval-cache was given" in run("g.yaml", "--out", "out", "--workers", "0").stdout


@pytest.mark.slow
def test_runs_of_one_process_may_differ_in_precision(here: Path) -> None:
    result = sweep(
        local(write("g.yaml", {"precision": ["float32", "bf16", "float32"]}, **{"max-steps": 2}))
    )
    low, high = result.runs[1].figures, result.runs[0].figures
    assert low != high
    assert low == pytest.approx(high, abs=0.05)


def test_credentials_in_urls_stay_out_of_the_files(here: Path) -> None:
    make_cache(here / "causal2", [14], task=CAUSAL, codec="topk:6", first=40)
    url = f"file://{here}/causal2?token=hush"
    grid = write("g.yaml", {"seed": [0]})
    (member,) = Grid.read(grid).runs
    shown = dataclasses.replace(member.options, cache=(url,), eval_cache=(url,)).shown()
    assert "hush" not in json.dumps(shown)


def scores(
    grid: dict[str, list[str]], figure: str, seeds: int, teacher: dict[str, float]
) -> SweepResult:
    """A sweep whose figures tell the place of their setting, and of their seed."""
    runs = []
    for number, values in enumerate(itertools.product(*grid.values())):
        setting = dict(zip(grid, values, strict=True))
        for seed in range(seeds):
            figures = {figure: number + 0.1 * seed}
            name = str(seed) if seeds > 1 else None
            runs.append(RunScore("", "", setting, name, figures, 1, 1, None, 1.0))
    return SweepResult.of(Path("s"), runs, made=1, combinations=1, evaluated=True, teacher=teacher)


def test_a_plot_shows_the_best_at_each_value_beside_the_teacher() -> None:
    grid = {"student": ["b", "a"], "alpha": ["0.1", "0.5", "1"], "lr": ["10", "9"]}
    for figure, best in (("hard_loss", [0, 2, 4]), ("accuracy", [1, 3, 5])):
        charts = charts_of(scores(grid, figure, 3, {figure: 0.5, "loss": 7.0}))
        assert [chart.x_label for chart in charts] == ["student", "alpha", "lr"]
        assert [chart.ticks for chart in charts] == [["b", "a"], grid["alpha"], ["9", "10"]]
        assert all(chart.levels == [Level("teacher", 0.5)] for chart in charts)
        lines = [line for line in charts[1].lines if not line.faint]
        assert [line.label for line in lines] == ["b", "a"]
        assert lines[0].y == pytest.approx([x + 0.1 for x in best])
        assert lines[1].y == pytest.approx([x + 6.1 for x in best])
        assert lines[0].error == pytest.approx([0.1] * 3)
        faint = [line for line in charts[1].lines if line.faint]
        assert sum(len(line.y) for line in faint) == 6
        figure_drawn = draw_charts(charts, title="t", note="n")
        (legend,) = figure_drawn.legends
        labels = [text.get_text() for text in legend.get_texts()]
        assert labels == ["alpha 0.1", "alpha 0.5", "alpha 1", "b", "a", "teacher"]


def test_a_plot_of_settings_without_an_option_and_of_seeds_alone() -> None:
    result = scores({"alpha": ["0.5", "1"], "temperature": ["1", "2", "-"]}, "loss", 1, {})
    alpha, temperature = charts_of(result)
    assert "without temperature" in [line.label for line in alpha.lines]
    assert temperature.ticks == ["1", "2"]
    assert [level.label for level in temperature.levels] == [
        "alpha 0.5, without temperature", "alpha 1, without temperature",
    ]  # fmt: skip
    (seeds,) = charts_of(scores({}, "hard_loss", 3, {}))
    assert (seeds.ticks, seeds.lines[0].y) == (["0", "1", "2"], pytest.approx([0, 0.1, 0.2]))


# What goes wrong


@pytest.mark.parametrize("figure", ["hard_loss", "accuracy"])
def test_a_run_that_diverged_comes_last_and_hides_no_other(figure: str, tmp_path: Path) -> None:
    """Its figures are not numbers, which compare with nothing."""
    runs = []
    for alpha, values in {"0.5": (0.6, 0.7), "0.1": (math.nan, 0.8), "1": (0.4, 0.5)}.items():
        for seed, value in enumerate(values):
            setting, figures = {"alpha": alpha}, {figure: value, "loss": value}
            runs.append(RunScore("", "", setting, str(seed), figures, 1, 1, None, 1.0))
    result = SweepResult.of(tmp_path, runs, made=1, combinations=6, evaluated=True)
    order = ["1", "0.5"] if figure == "hard_loss" else ["0.5", "1"]
    assert [setting.setting["alpha"] for setting in result.settings] == [*order, "0.1"]
    first, second, last = result.settings
    want = {"1": (0.45, statistics.stdev((0.4, 0.5))), "0.5": (0.65, statistics.stdev((0.6, 0.7)))}
    for setting in (first, second):
        found = setting.mean[figure], setting.deviation[figure]
        assert found == pytest.approx(want[setting.setting["alpha"]])
    assert math.isnan(last.mean[figure])
    assert math.isnan(last.deviation[figure])
    console = Console(file=io.StringIO(), width=200)
    render_sweep(result, console)
    result.write(tmp_path)
    plot_sweep(tmp_path / "results.png", result)
    assert (tmp_path / "results.png").is_file()


MOODS = """
import time
from pathlib import Path

import torch


class Moody(torch.nn.Module):
    def __init__(self, info):
        super().__init__()
        torch.manual_seed(info.seed)
        self.odd = info.seed % 2 == 1
        self.head = torch.nn.Linear(1, info.num_labels)

    def forward(self, input_ids):
        if self.odd and Path("bad-weather").exists():
            raise ValueError("it rains")
        deadline = time.monotonic() + 100
        while (hold := Path("hold")).exists():
            saved = Path("out").glob("runs/*/checkpoint-*/kdcache*")
            if len({path.parent.parent for path in saved}) < int(hold.read_text() or 1):
                break
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return self.head(input_ids.float().sum(-1, keepdim=True) / 64)
"""


@pytest.fixture
def moods(here: Path) -> str:
    """A student that fails if its seed is odd and there is bad weather, and that holds while there
    is a file `hold` and as many runs as it says (1 where it is empty) have a checkpoint."""
    (here / "moods.py").write_text(MOODS)
    return "moods:Moody"


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(
    here: Path, moods: str, caplog: pytest.LogCaptureFixture
) -> None:
    grid = classifiers("g.yaml", {"seed": [0, 1, 2, 3]}, student=moods)
    Path("bad-weather").touch()
    result = run(grid, "--out", "out", "--workers", "0")
    assert result.exit_code == 3
    assert "2 of 4 runs failed" in result.stderr
    assert result.stderr.count("ValueError: it rains") == 2
    assert "seed1-" in result.stderr
    assert "kdcache sweep g.yaml --out out --workers 0" in result.stderr
    kept = Path(re.findall(r"The traceback is in (\S+);", result.stderr)[0])
    assert kept.read_text().count("Traceback") == 2
    kept.unlink()
    with pytest.raises(IncompleteError, match="1 of 1 runs failed:"):
        sweep(local(classifiers("one.yaml", {"seed": [1]}, student=moods), "none"))
    assert not Path("none/results.json").exists()
    with Path("out/results.csv").open() as file:
        assert [row["seed"] for row in csv.DictReader(file)] == ["0", "2"]
    Path("bad-weather").unlink()
    again = sweep(local(grid))
    assert again.made == 2
    assert [r.seed for r in again.runs] == ["0", "1", "2", "3"]


def wait_until(condition: Callable[[], bool], process: Program) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.returncode is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_runs_of_a_sweep_that_ended_meanwhile_are_kept(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = classifiers("one.yaml", {"alpha": [0.5, 1.0]})
    other = classifiers("other.yaml", {"alpha": [1.0, 0.2]})
    check, ended = sweep_module._Sweep._check_students, []

    def check_while_another_ends(self: Any, *rest: Any) -> None:
        check(self, *rest)
        if not ended:
            ended.append(0)
            ended.append(sweep(local(other)).made)

    monkeypatch.setattr(sweep_module._Sweep, "_check_students", check_while_another_ends)
    assert sweep(local(one)).made == 1
    assert ended[1] == 2
    known = json.loads(Path("out/sweep.json").read_text())["runs"]
    assert sorted(run["setting"]["alpha"] for run in known.values()) == ["0.2", "0.5", "1"]


@pytest.mark.end_to_end
def test_a_stopped_and_a_killed_sweep_go_on(here: Path, moods: str) -> None:
    more = {"epochs": 4, "eval-steps": 6, "logging-steps": 3}
    grid = classifiers("g.yaml", {"alpha": [0.5, 1.0, 0.2]}, student=moods, **more)
    whole = sweep(local(grid, "whole"))
    hold = Path("hold")
    hold.touch()

    def start() -> Program:
        return Program("kdcache", "sweep", grid, "--out", "out", "--workers", "0")

    def saved(runs: int) -> bool:
        """Whether so many runs have got to a checkpoint, at which the last one waits."""
        begun = {path.parent.parent for path in here.glob("out/runs/*/checkpoint-*/kdcache*")}
        return len(begun) >= runs

    process = start()
    wait_until(lambda: saved(1), process)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    assert "interrupted: 0 of 3 runs are finished" in errors
    assert "To continue: kdcache sweep g.yaml --out out --workers 0" in errors
    hold.write_text("3")
    process = start()
    wait_until(lambda: saved(3), process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    finished = {path.parent.name for path in here.glob("out/runs/*/train.json")}
    assert len(finished) == 2
    hold.unlink()
    result = sweep(local(grid))
    assert result.made == 1
    assert logged(here / "out") == logged(here / "whole")
    assert [r.figures for r in result.runs] == [r.figures for r in whole.runs]


# Ray


@pytest.mark.end_to_end
@pytest.mark.parametrize(("workers", "seeds"), [(1, [0, 1]), *further((2, [0, 1, 2, 4]))])
def test_runs_on_ray_survive_killed_workers_and_a_failing_neighbour(
    ray: None, here: Path, moods: str, workers: int, seeds: list[int]
) -> None:
    more = {"epochs": 3, "eval-steps": 3, "logging-steps": 1}
    grid = classifiers("g.yaml", {"seed": seeds}, student=moods, **more)
    Path("bad-weather").touch()
    with pytest.raises(IncompleteError):
        sweep(local(grid, "whole"))
    Path("hold").touch()
    killed: list[int] = []

    def kill_them(_: SweepProgress) -> None:
        """Kill all workers once a run has a checkpoint."""
        if killed or not list(here.glob("out/runs/*/checkpoint-*/kdcache*")):
            return
        for process in psutil.Process().children(recursive=True):
            if process.name().startswith("ray::_call"):
                killed.append(process.pid)
                process.kill()
        Path("hold").unlink()

    with pytest.raises(IncompleteError, match=r"1 of \d runs failed(.|\n)*ValueError: it rains"):
        sweep(SweepOptions(grid, "out", workers=workers), on_progress=kill_them)
    assert killed
    mine, theirs = logged(here / "out"), logged(here / "whole")
    assert mine.keys() == theirs.keys()
    for name, lines in theirs.items():
        assert len(mine[name]) == len(lines)
        for x, y in zip(mine[name], lines, strict=True):
            assert x == pytest.approx(y, rel=1e-4, abs=1e-6)


@pytest.mark.end_to_end
def test_a_cluster_without_what_a_run_needs_is_told(ray: None) -> None:
    with pytest.raises(UsageError, match="has 0 GPUs, a run needs 1"):
        RayPool(SweepOptions("g", "o", gpus_per_run=1), 3)


def test_the_last_line_is_found_from_the_end(tmp_path: Path) -> None:
    assert last_metrics(tmp_path) is None
    lines = [{"step": i, "seconds": 0.5, "loss": 1 / (i + 1)} for i in range(3000)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 30')
    assert last_metrics(tmp_path) == lines[-1]
    assert read_metrics(tmp_path) == lines
    (tmp_path / "metrics.jsonl").write_text('{"st')
    assert last_metrics(tmp_path) is None
