"""Places where nothing can be written: refused in one line, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import kdcache
from kdcache.cli.commands import load
from kdcache.errors import UsageError
from kdcache.options import Options, options_of

# Words of each command with an output; those that look at their input first have a real one.
WORDS = {
    "build": "--teacher none --corpus none --out {}",
    "transcode": "none --codec topk:4 --out {}",
    "import": "--corpus none --tokenizer none --out {}",
    "export": "{cache} --out {}",
    "generate": "--model none --corpus none --out {}",
    "generate --cache": "--model none --corpus none --out {out} --cache {}",
    "pull CACHE": "{cache} {}",
    "train": "--cache {cache} --student bilstm --out {}",
    "sweep": "{grid} --out {} --workers 0",
    "finetune": "--model none --corpus none --out {}",
    "predict": "--student none --corpus none --out {}",
    "report": "none --out {}",
    "demo": "--out {}",
    "evaluate --plot": "--student none --cache none --plot {}",
    "train --plot": "--cache none --student bilstm --out {out} --plot {}",
    "plan --plot": "--teacher none --corpus none --plot {}",
}


@pytest.fixture(scope="module")
def known(class_cache: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("known")
    grid = folder / "grid.yaml"
    grid.write_text(f"cache: {class_cache}\nstudent: bilstm\ngrid:\n  seed: [0, 1]\n")
    return {"cache": class_cache, "grid": str(grid), "out": str(folder / "run")}


@pytest.mark.parametrize("place", ["/proc/x", "/sys/x", "/dev/null/x", "below a file"])
@pytest.mark.parametrize("named", WORDS)
def test_a_place_that_takes_nothing_is_refused_in_a_line(
    named: str, place: str, known: dict[str, str], tmp_path: Path
) -> None:
    if "--plot" in named:
        pytest.importorskip("matplotlib")
    file = tmp_path / "file"
    file.write_text("")
    path = str(file / "x") if place == "below a file" else place
    name, _, option = named.partition(" ")
    words = WORDS[named].format(path, **known).split()
    result = CliRunner().invoke(load(name), words)
    assert isinstance(result.exception, UsageError), (result.output, result.exception)
    message = str(result.exception)
    assert len(message.splitlines()) == 1, message
    assert (option or "--out") in message, message
    assert path[:30] in message, message
    assert list(tmp_path.iterdir()) == [file]


def test_every_option_of_an_output_is_tried() -> None:
    found = set()
    for name in dir(kdcache):
        kind = getattr(kdcache, name)
        if isinstance(kind, type) and issubclass(kind, Options):
            for one in options_of(kind):
                shown = one.metavar if one.positional else one.flag
                words = f"{name.removesuffix('Options').lower()} {shown}".removesuffix(" --out")
                assert one.output or one.name not in ("out", "plot"), words
                if one.output:
                    found.add(words)
    assert found == set(WORDS)
