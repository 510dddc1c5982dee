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

from kdcache.cache import Cache
from kdcache.cli import printers
from kdcache.cli.commands import COMMANDS
from kdcache.cli.main import cli
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.demo.demo import DemoResult
from kdcache.commands.run_folder import TrainResult
from kdcache.commands.train.options import TrainOptions
from kdcache.tasks import TASKS

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
    run(*filled(line, RUN=out), "--max-steps", "1", "--temperature", "1")
    line = f"predict --student {out} --corpus TEXTS"
    line = run(*filled(line, TEXTS=corpus), "--out", labelled)
    assert line == f"evaluate --student {out} --corpus LABELLED_TEXTS"
    run(*filled(line, LABELLED_TEXTS=corpus))


def test_a_training_that_learnt_little_is_to_be_longer(capsys: pytest.CaptureFixture[str]) -> None:
    options = TrainOptions("cache", "bilstm", "run", alpha=1.0, bilstm=("layers=2",), epochs=2)
    result = TrainResult("run", 30, 2.0, 480, 1.0, warning="no better than one answer for all")
    words = printers.trained(options, result)
    assert words is not None
    assert " ".join(words) == (
        "train --cache cache --student bilstm --out run-longer --alpha 1 --epochs 34 "
        "--bilstm layers=2"
    )
    long = dataclasses.replace(result, steps=3000)
    assert printers.trained(options, long) == ("inspect", "cache", "--row", "0")


@pytest.mark.parametrize(
    ("student", "trusted", "flag"),
    [("students:int4", False, True), ("run-of-int4", True, True), ("bilstm", False, False)],
)
def test_what_a_function_made_is_evaluated_with_leave_to_run_it(
    student: str, trusted: bool, flag: bool
) -> None:
    options = TrainOptions("cache", student, "run", trust_remote_code=trusted)
    words = printers.trained(options, TrainResult("run", 30, 2.0, 480, 1.0)) or ()
    assert words[0] == "evaluate"
    assert ("--trust-remote-code" in words) == flag


SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "intermediate_size", "d_ff"), 16),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "num_attention_heads", "num_heads"), 1),
    **{"num_key_value_heads": 1, "d_kv": 16, "max_position_embeddings": 64},
}
MODELS = {"causal-lm": "llama", "masked-lm": "bert", "seq2seq-lm": "t5"}
TEXTS = {
    "token-classification": {"tokens": ["w3", "w4"]},
    "seq2seq-lm": {"source": "w3 w4", "target": "w5"},
}


# What lines differ by: ids or classes, a source, a table that can be imported, domains.
ONE_OF_A_KIND = {"domains", "labels", "pairs"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ONE_OF_A_KIND else pytest.mark.exhaustive)
        for name in sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
    ],
)
def test_every_next_line_runs_as_printed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each kind of cache, from every command that reads one to where its lines lead."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / name, "cache")
    spec = Cache.open("cache").spec
    model = {"model_type": MODELS.get(spec.task, "bert"), **SIZES}
    Path("model.json").write_text(json.dumps(model))
    record = {"text": "w3 w4", "label": 0} | TEXTS.get(spec.task, {})
    Path("texts.jsonl").write_text(f"{json.dumps(record)}\n")
    fill = {"CONFIG_OR_MODEL": "model.json", "TEST_CACHE": "cache", "TEXTS": "texts.jsonl"}
    fill |= {"LABELLED_TEXTS": "texts.jsonl", "TEACHER": "cache/tokenizer"}
    begin = [
        ["export", "cache", "--out", "table"],
        ["gc", "cache", "--dry-run"],
        ["inspect", "cache"],
    ]
    # Of these ids only the classifiers' tokenizer has not all.
    begin += [["verify", "cache"], ["repair", "cache"]] if TASKS[spec.task].over_ids else []
    seen: set[str] = set()
    lines = [run(*words) for words in begin]
    lines += [" ".join(("train", *printers._training("cache")[1:]))]
    while lines:
        line = lines.pop()
        words = filled(line, **fill)
        seen.add(words[0])
        if words[0] == "import":  # see below: the tokenizer of these is no one's
            continue
        if words[0] == "train" and "RUN-longer" in words:  # the same again: it is told what to do
            words += ["--max-steps", "1"]
        result = CliRunner().invoke(cli, words, catch_exceptions=False)
        assert result.exit_code == 0, (line, result.output)
        after = result.stderr.partition("Next: kdcache ")[2].strip()
        if words[0] == "train":  # what its own line says where it learnt enough
            lines.append(f"evaluate --student {words[words.index('--out') + 1]} --cache cache")
        if after and not (words[0] in seen and after.split()[0] in seen):
            lines.append(after)
    assert {"train", "evaluate", "inspect", "report"} <= seen
    of_import = ("topk", "hidden", "documents", "domains", "answers")
    assert ("import" in seen) == name.startswith(of_import)


@pytest.mark.slow
def test_from_a_broken_cache_to_its_repair(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    shutil.copytree(GOLDEN / "sample-1", cache)
    (tmp_path / "cache" / "shards" / "notes.txt").write_text("mine")
    line = run("verify", cache, fails=True)
    assert line == f"repair {cache}"
    (tmp_path / "cache" / "shards" / "notes.txt").unlink()
    assert run(*filled(line)) == f"inspect {cache}"


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
