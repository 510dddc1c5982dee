"""Every command ends with the command to run next, and that one runs."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from pathlib import Path
from unittest import mock

import pytest
from click.testing import CliRunner

from kdcache.cli.commands import COMMANDS
from kdcache.cli.main import cli
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.demo.demo import DemoResult

GOLDEN = Path(__file__).parent / "golden"


def run(*words: str, fails: bool = False) -> str:
    """Run a command; what it says is next, without its own name."""
    result = CliRunner().invoke(cli, list(words), catch_exceptions=False)
    assert result.exit_code == int(fails), result.output
    assert "Next:" not in result.stdout, "a program may read this"
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Next: kdcache "), result.stderr
    assert last.split()[2] in COMMANDS
    return last.removeprefix("Next: kdcache ")


def filled(line: str, **words: str) -> list[str]:
    """The words of a line, those in capitals filled in."""
    return [words.get(word, word) for word in shlex.split(line)]


@pytest.mark.slow
def test_from_a_dry_run_to_labelled_texts(
    tiny_classifier: Path, labelled_corpus: Path, tmp_path: Path
) -> None:
    cache, out, labelled = (str(tmp_path / name) for name in ("a cache", "run", "labelled.jsonl"))
    corpus = str(labelled_corpus)
    begin = ["--teacher", str(tiny_classifier), "--task", "sequence-classification"]
    begin += ["--corpus", corpus, "--max-length", "32", "--limit", "30"]
    line = run("build", *begin, "--out", "never", "--dry-run")
    assert line.startswith("plan ")
    line = run(*filled(line), "--rows", "4")
    assert line.startswith("build ")
    assert "--workers" not in line
    line = run(*filled(line, CACHE=cache))
    spec = json.loads((tmp_path / "a cache" / "spec.json").read_text())["spec"]
    assert (spec["task"], spec["codec"]) == ("sequence-classification", "dense")
    assert line == f"train --cache '{cache}' --student bilstm --out RUN"
    line = run(*filled(line, RUN=out), "--max-steps", "1", "--temperature", "1")
    line = run(*filled(line, TEST_CACHE=cache))
    line = run(*filled(line, TEXTS=corpus), "--out", labelled)
    line = run(*filled(line, LABELLED_TEXTS=corpus))
    assert line == f"predict --student {out} --corpus TEXTS"


@pytest.mark.slow
def test_from_a_broken_cache_to_a_page(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    shutil.copytree(GOLDEN / "sample-1", cache)
    train = f"train --cache {cache} --student STUDENT --out RUN"
    assert run("verify", cache) == train
    assert run("gc", cache, "--dry-run") == run("gc", cache) == f"inspect {cache}"
    (tmp_path / "cache" / "shards" / "notes.txt").write_text("mine")
    line = run("verify", cache, fails=True)
    assert line == f"repair {cache}"
    (tmp_path / "cache" / "shards" / "notes.txt").unlink()
    line = run(*filled(line))
    assert line == f"inspect {cache}"
    line = run(*filled(line))
    assert line == f"inspect {cache} --row 0"
    line = run(*filled(line))
    assert line == f"report {cache} --out report.html"
    page = CliRunner().invoke(cli, [*line.split()[:-1], str(tmp_path / "page.html")])
    assert page.stdout.endswith("Open it in a browser.\n")


@pytest.mark.slow
def test_from_cache_to_table_and_back(small_build: BuildOptions, tmp_path: Path) -> None:
    cache, copy, table, back = (str(tmp_path / name) for name in ("cache", "copy", "table", "back"))
    build(dataclasses.replace(small_build, out=cache, codec="topk:4"))
    line = run("transcode", cache, "--codec", "topk:2", "--out", copy, "--workers", "0")
    assert line == f"inspect {copy} --row 0"
    line = run("export", copy, "--out", table)
    line = run(*filled(line, TEACHER=small_build.teacher[0], CACHE=back), "--workers", "0")
    assert line == f"inspect {back} --row 0"
    run(*filled(line))


def test_from_a_teacher_to_its_cache(
    tiny_classifier: Path, labelled_corpus: Path, tmp_path: Path
) -> None:
    teacher, corpus = str(tmp_path / "teacher"), str(labelled_corpus)
    words = ["--model", str(tiny_classifier), "--corpus", corpus, "--out", teacher]
    line = run("finetune", *words, "--epochs", "0.05", "--max-length", "16")
    filled_in = filled(line, CORPUS=corpus, CACHE=str(tmp_path / "cache"))
    assert run(*filled_in, "--workers", "0", "--limit", "8").startswith("train ")


def test_what_follows_a_sweep_the_demo_and_env(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    cache = GOLDEN / "labels"
    grid.write_text(f"cache: {cache}\nstudent: bilstm\nmax-steps: 1\ngrid: {{seed: [0]}}\n")
    out = str(tmp_path / "sweep")
    assert run("sweep", str(grid), "--out", out, "--workers", "0") == f"report {out}"
    assert run("env") == "demo"
    result = DemoResult("demo", None, (), 1, 1.0, 1.0, folders=("demo/cache", "demo/run"))
    with mock.patch("kdcache.commands.demo.demo.demo", return_value=result):
        assert run("demo") == "report demo/cache demo/run --out report.html"


def test_a_part_that_is_not_the_last_names_no_training(
    tiny_classifier: Path, labelled_corpus: Path, tmp_path: Path
) -> None:
    words = ["--teacher", str(tiny_classifier), "--task", "sequence-classification"]
    words += ["--corpus", str(labelled_corpus), "--shard-tokens", "300", "--limit", "60"]
    words += ["--out", str(tmp_path / "cache"), "--workers", "0", "--part"]
    first = CliRunner().invoke(cli, ["build", *words, "1/2"])
    assert "the part that ends last seals the cache" in first.stdout
    assert "Next:" not in first.output
    assert run("build", *words, "2/2").startswith("train ")


@pytest.mark.parametrize("word", ["--json", "-q"])
def test_silence(word: str) -> None:
    for words in (["inspect", str(GOLDEN / "topk-1")], ["verify", str(GOLDEN / "topk-1")], ["env"]):
        assert CliRunner().invoke(cli, [*words, word]).stderr == ""
