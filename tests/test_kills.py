"""Commands killed at steps of their output: run again, they end as if never killed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import further
from kill_points import killed_at

import kdcache
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.import_.options import ImportOptions
from kdcache.commands.options import ExportOptions, TranscodeOptions
from kdcache.errors import UsageError
from kdcache.files import alone

pytestmark = pytest.mark.end_to_end

POINTS = [3, *further(20)]


def kept(folder: Path, *, scratch: bool = True) -> dict[str, bytes]:
    """All files but locks and events, which are no part of what is made, and if asked scratch."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and (scratch or path.suffix != ".tmp")
        and not path.name.endswith(".lock")
        and not str(path.relative_to(folder)).startswith("events")
    }


@pytest.fixture(scope="module")
def built(
    tiny_lm: Path, text_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> BuildOptions:
    """A cache of several shards."""
    options = BuildOptions(
        teacher=(str(tiny_lm),), corpus=(str(text_corpus),), codec="topk:8", temperatures=(1.0,),
        out=str(tmp_path_factory.mktemp("kills") / "cache"), max_length=48, limit=40,
        shard_tokens=700, workers=0,
    )  # fmt: skip
    assert build(options).spans > 2
    return options


@pytest.fixture
def cache(built: BuildOptions) -> str:
    return built.out


def check(
    tmp_path: Path,
    work: Callable[[Any], Any],
    options: Callable[[Path], Any],
    least: int,
    points: int,
    *,
    scratch: bool,
) -> None:
    """Kill at steps from the first to the last; the second run completes what there is.

    Args:
        work: the command.
        options: its options for an output.
        least: steps that it takes at least.
        points: at how many of them it is killed.
        scratch: whether the second run removes what was half written (else `kdcache gc` does).
    """
    steps = killed_at(None, tmp_path / "whole", work, options(tmp_path / "whole"))
    expected = kept(tmp_path / "whole")
    assert steps > least
    for step in np.unique(np.linspace(0, steps - 1, points).astype(int)).tolist():
        folder = tmp_path / str(step)
        killed_at(step, folder, work, options(folder))
        if folder.exists():  # nothing that is there is half
            assert kept(folder, scratch=False).items() <= expected.items()
        work(options(folder))
        assert kept(folder, scratch=scratch) == expected, f"killed before step {step} of {steps}"


@pytest.mark.parametrize("points", POINTS)
def test_a_build(built: BuildOptions, tmp_path: Path, points: int) -> None:
    def options(out: Path) -> BuildOptions:
        return replace(built, out=str(out))

    check(tmp_path, kdcache.build, options, 15, points, scratch=False)
    assert kept(tmp_path / "whole") == kept(Path(built.out))


@pytest.mark.parametrize("points", POINTS)
def test_a_transcoding(cache: str, tmp_path: Path, points: int) -> None:
    def options(out: Path) -> TranscodeOptions:
        return TranscodeOptions(cache, "topk:3", str(out), workers=0)

    check(tmp_path, kdcache.transcode, options, 15, points, scratch=False)


@pytest.mark.parametrize("points", POINTS)
def test_an_export(cache: str, tmp_path: Path, points: int) -> None:
    def options_of(out: Path) -> ExportOptions:
        return ExportOptions(cache, str(out))

    check(tmp_path, kdcache.export, options_of, 10, points, scratch=True)
    # A file that is there is whole, whatever was killed beside it.
    options = ExportOptions(cache, str(tmp_path / "half"))
    steps = killed_at(None, tmp_path / "half", kdcache.export, options)
    (tmp_path / "half").rename(tmp_path / "full")
    killed_at(steps - 2, tmp_path / "half", kdcache.export, options)
    for path in (tmp_path / "half").glob("*.parquet"):
        assert pq.read_table(path).equals(pq.read_table(tmp_path / "full" / path.name))
    # Half a cache's export is not taken for one of other options, nor two at once for one.
    with pytest.raises(UsageError, match="of another cache or of other options"):
        kdcache.export(replace(options, top=2))
    with alone(tmp_path / "half", "export"), pytest.raises(UsageError, match="another export"):
        kdcache.export(options)


@pytest.mark.parametrize("points", POINTS)
def test_an_import(cache: str, tiny_lm: Path, tmp_path: Path, points: int) -> None:
    exported = tmp_path / "exported"
    kdcache.export(ExportOptions(cache, str(exported)))

    def options(out: Path) -> ImportOptions:
        return ImportOptions(
            corpus=(str(exported),), out=str(out), tokenizer=str(tiny_lm), workers=0
        )

    check(tmp_path, kdcache.import_, options, 15, points, scratch=False)
