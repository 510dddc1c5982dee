"""A build in parts without Ray: every part makes its share, and the one that ends last seals."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from broken_caches import files, run

from kdcache.cache import Cache
from kdcache.cache.check import problems
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.errors import UsageError

ROOT = Path(__file__).parent.parent
SPANS = 8


@pytest.fixture
def options(small_build: BuildOptions, text_corpus: Path, tmp_path: Path) -> BuildOptions:
    """A build of eight input files, each of them one span."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    lines = text_corpus.read_text().splitlines(keepends=True)[:40]
    for i in range(SPANS):
        (corpus / f"{i:02}.jsonl").write_text("".join(lines[i::SPANS]))
    return dataclasses.replace(
        small_build, corpus=(str(corpus),), codec="topk:8", max_length=32, batch_tokens=128
    )


def undisturbed(options: BuildOptions) -> dict[str, bytes]:
    """The files of the same build in one piece."""
    quiet = Path(options.out).with_name("quiet")
    build(dataclasses.replace(options, out=str(quiet), part=None))
    return files(quiet)


def shards(options: BuildOptions) -> list[int]:
    return sorted(int(p.name[:5]) for p in Path(options.out, "shards").iterdir())


@pytest.mark.slow
def test_parts_share_the_spans_in_any_number_and_order(options: BuildOptions) -> None:
    for n in (1, 2, 3, 7, 20):
        shares = [dataclasses.replace(options, part=f"{i}/{n}").share for i in range(1, n + 1)]
        assert sorted(span for share in shares for span in share[:50] if span < 50) == [*range(50)]
    seen: list[tuple[int, int]] = []
    third = build(
        dataclasses.replace(options, part="3/3"),
        on_progress=lambda p: seen.append((p.done, p.spans)),
    )
    assert seen[-1] == (2, 2), "progress counts the share"
    assert (third.made, third.missing, shards(options)) == (2, 6, [2, 5])
    assert third.rows > 0
    assert not Path(options.out, "manifest.json").exists()
    again = build(dataclasses.replace(options, part="3/3"))
    assert (again.made, again.missing, again.rows) == (0, 6, 0)
    # Another number of parts: what is there is not made again.
    assert build(dataclasses.replace(options, part="1/2")).made == 3
    last = build(dataclasses.replace(options, part="2/2"))
    assert (last.made, last.missing) == (3, 0)
    assert files(Path(options.out)) == undisturbed(options)
    done = build(dataclasses.replace(options, part="1/2"))
    assert (done.made, done.missing, done.rows) == (0, 0, last.rows)


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "1/0", "a/b", "1/2/3", "-1/2", ""])
def test_a_part_is_one_of_several(part: str, options: BuildOptions) -> None:
    with pytest.raises(UsageError, match=f"--part is '{part}', expected I/N"):
        dataclasses.replace(options, part=part)


def test_a_part_says_what_is_missing(options: BuildOptions) -> None:
    words = ["--teacher", *options.teacher, "--corpus", *options.corpus, "--out", options.out]
    done = run("build", *words, "--workers", "0", "--part", "1/4", "--max-length", "32")
    assert done.exit_code == 0, done.output
    assert "6 shards of other parts are missing; the part that ends last seals" in done.output


def until(condition: Callable[[], Any], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_an_array_of_tasks_of_which_one_is_killed(options: BuildOptions, tmp_path: Path) -> None:
    faults, site = tmp_path / "faults", tmp_path / "site"
    faults.mkdir()
    site.mkdir()
    (site / "sitecustomize.py").write_text("import fault_points; fault_points.install()\n")
    (faults / "gate").touch()  # nobody commits anything yet
    command = tmp_path / "bin" / "kdcache"
    command.parent.mkdir()
    command.write_text(f'#!/bin/bash\nexec {sys.executable} -m kdcache "$@"\n')
    command.chmod(0o755)
    words = ["--teacher", *options.teacher, "--corpus", *options.corpus, "--out", options.out]
    words += ["--codec", "topk:8", "--max-length", "32", "--batch-tokens", "128"]
    path = [str(site), str(ROOT), str(ROOT / "tests")]

    def start(task: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", ROOT / "examples" / "cluster" / "slurm-array.sh", *words],
            env={
                **os.environ, "PYTHONPATH": os.pathsep.join(path),
                "PATH": f"{command.parent}:{os.environ['PATH']}",
                "KDCACHE_TEST_FAULTS": str(faults), "SLURM_ARRAY_TASK_ID": str(task),
                "SLURM_ARRAY_TASK_COUNT": "2",
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    tasks = [start(1), start(2)]
    try:
        waiting = lambda: len(list(faults.glob("waiting-*")))  # noqa: E731
        until(lambda: waiting() == 4 or any(task.poll() is not None for task in tasks))
        tasks[1].send_signal(signal.SIGKILL)
        tasks[1].communicate(timeout=60)
        (faults / "gate").unlink()
        out, err = tasks[0].communicate(timeout=240)
        assert tasks[0].returncode == 0, err
        assert "4 shards of other parts are missing" in out
        assert shards(options) == [0, 2, 4, 6]
        tasks.append(start(2))
        out, err = tasks[2].communicate(timeout=240)
        assert tasks[2].returncode == 0, err
    finally:
        for task in tasks:
            task.kill()
            task.communicate()
    left = {name: d for name, d in files(Path(options.out)).items() if not name.startswith("tmp/")}
    assert left == undisturbed(options)
    assert list(problems(Cache.open(options.out))) == []


def test_recipes_without_ray_name_each_part_once(tmp_path: Path) -> None:
    """The scripts of the Indexed Job and of SkyPilot, run with a command that shows its words."""
    folder = ROOT / "examples" / "cluster"
    job = yaml.safe_load((folder / "indexed-job.yaml").read_text())["spec"]
    (pod,) = job["template"]["spec"]["containers"]
    task = yaml.safe_load((folder / "skypilot.yaml").read_text())
    command = tmp_path / "kdcache" / "bin" / "kdcache"
    command.parent.mkdir(parents=True)
    command.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    command.chmod(0o755)
    path = {"PATH": f"{command.parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    recipes = {
        job["completions"]: ([*pod["command"], *pod["args"]], "JOB_COMPLETION_INDEX", {}),
        task["num_nodes"]: (["bash", "-c", task["run"]], "SKYPILOT_NODE_RANK", task["envs"]),
    }
    for count, (words, name, given) in recipes.items():
        given = {**path, **given, "SKYPILOT_NUM_NODES": str(count)}
        for index in (0, count - 1):
            environment = {**given, name: str(index)}
            shown = subprocess.run(words, env=environment, capture_output=True, text=True)
            found = shown.stdout.split("\n")
            assert found[0] == "build", shown.stderr
            assert found[found.index("--part") + 1] == f"{index + 1}/{count}"
            given_options = {word[2:].replace("-", "_") for word in found if word[:2] == "--"}
            assert given_options <= {one.name for one in dataclasses.fields(BuildOptions)}
