"""Without an optional package: what is missing is named before anything starts, with the command
that installs it, and everything else still works."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest

from kdcache import errors
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.commands.options import EvaluateOptions, PlanOptions
from kdcache.commands.sweep import results
from kdcache.commands.sweep.results import RunScore, SweepResult
from kdcache.commands.train import callbacks
from kdcache.commands.train.options import TrainOptions
from kdcache.errors import EXTRAS, UsageError, install_command, installed, require
from kdcache.storage.filesystem import FileSystem
from kdcache.teacher.files import TeacherFiles

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def _train(**asked: object) -> object:
    return TrainOptions(**{"cache": ("nowhere",), "student": "s", "out": "run", **asked})  # type: ignore[arg-type]


def _build(**asked: object) -> object:
    return BuildOptions(**{"teacher": ("t",), "corpus": ("c",), "out": "cache", **asked})  # type: ignore[arg-type]


def _trackers() -> None:
    if wrong := callbacks.wrong_trackers(["tensorboard"]):
        raise UsageError("\n".join(wrong))


ASKS: list[tuple[str, str, Callable[[], object]]] = [
    ("cluster", "--num-workers", lambda: _train(num_workers=2)),
    ("cluster", "--num-workers", lambda: _train(num_workers="1:4")),
    ("gcs", "gs://", lambda: FileSystem("gs://bucket/corpus")),
    ("lora", "--lora", lambda: _train(lora="r=4")),
    ("lora", "--lora", lambda: FinetuneOptions(model="m", corpus=("c",), out="o", lora="r=4")),
    ("plot", "--plot", lambda: _train(plot="a.png")),
    ("plot", "--plot", lambda: PlanOptions(teacher=("t",), corpus=("c",), plot="a.png")),
    ("plot", "--plot", lambda: EvaluateOptions(student=("s",), cache="c", plot="a.png")),
    ("s3", "s3://", lambda: FileSystem("s3://bucket/cache")),
    ("tensorboard", "tensorboard", _trackers),
    *(
        (
            name,
            f"integrations.{name}",
            partial(importlib.import_module, f"kdcache.integrations.{name}"),
        )
        for name in ("axolotl", "llamafactory", "swift", "trl")
    ),
    ("vllm", "--engine", lambda: _build(engine="vllm")),
]


def test_every_extra_is_known_and_asked_for_here() -> None:
    declared = re.findall(
        r"^([\w-]+) = \[", PYPROJECT.split("optional-dependencies]")[1].split("\n[")[0], re.M
    )
    for_users = {*declared} - {"cuda-tests", "docs", "dev"}
    assert {extra for extra, _, _ in ASKS} == set(EXTRAS) == for_users
    (listed,) = re.findall(r"\(extras: (.*?)\)", (ROOT / "README.md").read_text())
    assert set(re.findall(r"`(\w+)`", listed)) == set(EXTRAS)


@pytest.mark.parametrize(("extra", "what", "ask"), ASKS)
def test_what_is_missing_is_named_before_anything_starts(
    extra: str, what: str, ask: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, EXTRAS[extra], None)
    monkeypatch.setattr(callbacks, "get_available_reporting_integrations", list)
    with pytest.raises(UsageError) as refused:
        ask()
    assert what in str(refused.value)
    assert install_command(extra) in str(refused.value)


@pytest.mark.parametrize("extra", ["cluster", "lora", "plot", "vllm"])
def test_what_is_there_is_no_news(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "installed", lambda extra: True)
    for _, _, ask in (one for one in ASKS if one[0] == extra):
        ask()


def test_several_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for extra in ("cluster", "lora", "plot"):
        monkeypatch.setitem(sys.modules, EXTRAS[extra], None)
    with pytest.raises(UsageError) as refused:
        _train(num_workers=2, lora="r=4", plot="a.png")
    *lines, command = str(refused.value).splitlines()
    assert [line.split()[0] for line in lines] == ["--lora", "--plot", "--num-workers"]
    assert command.endswith(shlex.quote(f"{ROOT}[lora,plot,cluster]"))


def test_an_adapter_says_so_before_its_base_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="an adapter, needs the extra `lora`"):
        TeacherFiles.find(str(tmp_path))


def test_a_checkout_asks_for_its_own_extras() -> None:
    words = shlex.split(install_command("plot", "s3"))
    assert words == [sys.executable, "-m", "pip", "install", "-e", f"{ROOT}[plot,s3]"]


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_copy_asks_for_what_its_extra_brings(
    extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "kdcache" / "errors.py"))
    (declared,) = re.findall(rf'^{extra} = \["(.*?)"\]', PYPROJECT, re.M)
    *_, install, wanted = shlex.split(install_command(extra))
    assert install == "install"
    assert re.split("[>=]+", wanted)[-1] == re.split("[>=]+", declared)[-1]
    assert {*re.findall(r"\w+", wanted)} == {*re.findall(r"\w+", declared)}


def test_no_index_is_asked_for_kdcache() -> None:
    assert metadata.requires("kdcache")
    for name in ("README.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))):
        assert not re.search(r"install '?kdcache\[", (ROOT / name).read_text()), name


def test_an_environment_without_pip_is_one_of_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    words = shlex.split(install_command("plot"))
    assert words[:5] == ["uv", "pip", "install", "--python", sys.executable]


def test_a_sweep_without_matplotlib_keeps_its_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = RunScore("a", "runs/a", {"alpha": "0.1"}, None, {"hard_loss": 1.0}, 10, 2, None, 0.5)
    result = SweepResult.of(tmp_path, [run], made=1, combinations=1, evaluated=False)
    result.write(tmp_path)
    results.plot_sweep(tmp_path / "results.png", result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.json"]
    assert install_command("plot") in caplog.text


def test_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed("plot")
    require({"plot": "--plot"})
    monkeypatch.setitem(EXTRAS, "plot", "no_such_module")
    assert not installed("plot")
