"""Where a cache is expected and none is: what is there instead, in one line, by every command."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from kdcache.cli.commands import load
from kdcache.errors import UsageError

WORDS = {
    "inspect": "{}",
    "verify": "{}",
    "gc": "{}",
    "repair": "{}",
    "report": "{} --out {out}/page.html",
    "export": "{} --out {out}/export",
    "transcode": "{} --codec topk:4 --out {out}/other",
    "train": "--cache {} --student bilstm --out {out}/run",
    "train --eval-cache": "--cache {cache} --eval-cache {} --student bilstm --out {out}/run",
    "evaluate": "--student {student} --cache {}",
}


def message(named: str, url: str, tmp_path: Path, class_cache: str, student: Path) -> str:
    words = WORDS[named].format(url, out=tmp_path, cache=class_cache, student=student)
    result = CliRunner().invoke(load(named.partition(" ")[0]), words.split())
    assert isinstance(result.exception, UsageError), (result.output, result.exception)
    found = str(result.exception)
    assert len(found.splitlines()) == 1, found
    return found


@pytest.mark.parametrize("named", WORDS)
def test_what_is_there_instead_is_said(
    named: str, tmp_path: Path, class_cache: str, word_student: Path
) -> None:
    def of(url: str) -> str:
        return message(named, url, tmp_path, class_cache, word_student)

    there = tmp_path / "there"
    assert of(str(there)).startswith(f"there is no folder {there}: expected a cache")
    assert "there is no folder memory://nowhere/cache: " in of("memory://nowhere/cache")
    there.mkdir()
    if named == "report":  # which shows other folders, too
        return
    assert of(str(there)) == f"{there} is not a kdcache cache: it is empty."
    (there / "notes.txt").touch()
    assert "is not a kdcache cache: it has no spec.json" in of(str(there))
    kinds = {"checkpoint-3": "a run", "adapter_config.json": "a model", "train.json": "a run"}
    for name, kind in {**kinds, "sweep.json": "a sweep", "_kdcache.json": "an export"}.items():
        (there / name).touch()
        if name == "_kdcache.json":
            (there / "sweep.json").unlink()
            (there / "train.json").unlink()
        assert f"{there} is the folder of {kind}, not of a cache." in of(str(there))


def test_a_manifest_without_its_spec_has_nothing_to_clear(
    tmp_path: Path, class_cache: str, word_student: Path
) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    found = message("gc", str(tmp_path), tmp_path, class_cache, word_student)
    assert found.endswith("is not a kdcache cache: it has no spec.json.")
