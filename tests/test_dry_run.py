"""`build --dry-run`: what would be built, without a teacher and without a written byte."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from unittest import mock

import pytest
from click.testing import CliRunner

from kdcache.cli.main import cli
from kdcache.cli.printers import as_words
from kdcache.commands.build import source
from kdcache.commands.build.build import build, dry_run
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.options import PlanOptions
from kdcache.errors import UsageError

pytestmark = pytest.mark.slow


def words(options: BuildOptions) -> list[str]:
    given = {"--teacher": options.teacher[0], "--corpus": options.corpus[0], "--out": options.out}
    flags = [word for pair in given.items() for word in pair]
    return [*flags, "--workers", "0", "--max-length", "32", "--codec", "topk:4"]


def test_a_dry_run_describes_the_build_that_follows(
    small_build: BuildOptions, tmp_path: Path
) -> None:
    options = dataclasses.replace(small_build, max_length=32, codec="topk:4", shard_tokens=1024)
    before = sorted(tmp_path.rglob("*"))
    with mock.patch.object(source, "Teacher", side_effect=AssertionError("loaded")):
        told = dry_run(options)
    assert sorted(tmp_path.rglob("*")) == before
    assert (told.state, told.done, told.seconds > 0) == ("nothing", 0, True)
    made = build(options)
    assert told.spans == made.spans
    assert made.positions == pytest.approx(told.positions, rel=0.2)
    assert made.bytes == pytest.approx(told.bytes, rel=1.2)  # tiny shards have large headers
    spec = json.loads(Path(options.out, "manifest.json").read_text())
    assert told.fingerprint == spec["fingerprint"]
    again = dry_run(options)
    assert (again.state, again.done) == ("this build", made.spans)
    assert dry_run(dataclasses.replace(options, codec="topk:5")).state == "another build"


def test_a_dry_run_names_a_plan_of_the_same_rows(
    tiny_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my texts.csv").write_text("review,verdict\n" + "a fine film,good\na dull one,bad\n" * 20)
    options = BuildOptions(
        teacher=(str(tiny_classifier),),
        corpus=("my texts.csv",),
        out="-cache",
        task="sequence-classification",
        temperatures=(1.0, 2.5),
        text_column="review",
        label_column="verdict",
        limit=7,
        trust_remote_code=True,
        filter=("verdict=good",),
    )
    words = as_words(options, PlanOptions)
    seen: list[PlanOptions] = []
    with mock.patch("kdcache.commands.plan.plan.plan", side_effect=lambda o, **_: seen.append(o)):
        CliRunner().invoke(cli, ["plan", *words])
    (planned,) = seen
    for field in {f.name for f in dataclasses.fields(options)} - {"temperatures", "codec"}:
        if hasattr(planned, field):
            assert getattr(planned, field) == getattr(options, field), field
    assert planned.temperature_sets == ((1.0, 2.5),)


def test_a_dry_run_of_the_command_prints_it(small_build: BuildOptions) -> None:
    done = CliRunner().invoke(cli, ["build", *words(small_build), "--dry_run"])
    assert done.exit_code == 0, done.output
    assert f"Would build {small_build.out}: about " in done.output
    assert "Next: kdcache plan " in done.output
    assert not Path(small_build.out).exists()
    with pytest.raises(UsageError, match=r"dry_run is for kdcache\.dry_run"):
        build(dataclasses.replace(small_build, dry_run=True))
