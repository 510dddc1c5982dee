"""What comes with a file chooses neither what runs nor where something is written or read: names,
arguments of engines, modules of the current folder, and texts on their way to a page.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from broken_caches import files, golden_copy, run
from fsspec.implementations.memory import MemoryFile
from make_caches import make_cache
from safetensors.torch import save_file
from test_untrusted import resealed

from kdcache.cache import Cache
from kdcache.commands.options import SweepOptions
from kdcache.commands.sweep.grid import Grid
from kdcache.commands.sweep.sweep import _Sweep
from kdcache.commands.train.store import RunStore
from kdcache.errors import KdcacheError, UsageError
from kdcache.storage import LocalStorage, open_storage
from kdcache.student.checkpoints import STATE_FILE, is_whole, read_state
from kdcache.teacher.memory import weight_bytes
from kdcache.teacher.trust import check_folder

ROOT = Path(__file__).parent.parent

# Names

OUTSIDE = (
    "../../../away",
    "{}/away",
    "a/../../../../away",
    "..",
    ".",
    "",
    "a//b",
    "/",
    "a\0b",
    "a/",
)
"""Names of nothing below a folder; {} stands for a folder elsewhere."""


def _seal(folder: Path, name: Any) -> None:
    (folder / STATE_FILE).write_text(json.dumps({"files": {name: 3}, "crc32": {name: 0}}))


def _of_a_seal(folder: Path, name: str) -> None:
    checkpoint = folder / "a" / "b" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    _seal(checkpoint, name)
    assert not is_whole(checkpoint)
    read_state(checkpoint, contents=True)


def _of_a_run_in_a_store(folder: Path, name: str) -> None:
    store = fsspec.filesystem("memory").store
    seal = {"files": {name: 3}, "sha256": {}}
    for key, data in ((STATE_FILE, json.dumps(seal).encode()), (name, b"abc")):
        path = f"/from-outside/run/checkpoint-2/{key}"
        store[path] = MemoryFile(None, path, data)
    try:
        RunStore("memory://from-outside/run").bring()
    finally:
        store.clear()


def _of_weights(folder: Path, name: str) -> None:
    (folder / "config.json").write_text('{"model_type": "bert"}')
    save_file({"x": torch.ones(1)}, folder / "model.safetensors")
    index = {"weight_map": {"x": f"{name}/x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(KdcacheError, match="outside"):
        weight_bytes(folder, "float32")
    check_folder("teacher x", folder, trust_remote_code=False)


def _of_a_sweep(folder: Path, name: str) -> None:
    make_cache(folder / "cache", [4])
    grid = {"cache": str(folder / "cache"), "student": "bilstm", "grid": {"seed": [1]}}
    (folder / "grid.yaml").write_text(json.dumps(grid))
    (planned,) = Grid.read(str(folder / "grid.yaml")).runs
    (folder / "out").mkdir()
    (folder / "out" / "sweep.json").write_text(json.dumps({"runs": {planned.key: {"name": name}}}))
    _Sweep(SweepOptions(grid=str(folder / "grid.yaml"), out=str(folder / "out")), None)


def _of_a_cache(folder: Path, name: str) -> None:
    cache = golden_copy(folder / "cache")
    resealed(cache / "spec.json", lambda v: v["files"].update({f"tokenizer/{name}": "0" * 64}))
    Cache.open(str(cache))


def _of_a_manifest(folder: Path, name: str) -> None:
    cache = golden_copy(folder / "cache")
    resealed(cache / "manifest.json", lambda v: v["shards"][0].update(name=name))
    Cache.open(str(cache))


def _in_a_storage(verb: str, *more: Any) -> Callable[[Path, str], None]:
    def use(folder: Path, name: str) -> None:
        remote = [open_storage("memory://from-outside")] if name else []  # else the folder itself
        for storage in (LocalStorage(folder), *remote):
            if verb == "hold":
                with pytest.raises(KdcacheError, match="outside"), storage.hold(name):
                    pass
            else:
                with pytest.raises(KdcacheError, match="outside"):
                    getattr(storage, verb)(name, *more)
        raise KdcacheError("outside")

    return use


PLACES = {
    "the seal of a checkpoint": _of_a_seal,
    "a run in a store": _of_a_run_in_a_store,
    "an index of weights": _of_weights,
    "the list of a sweep's runs": _of_a_sweep,
    "the files of a spec": _of_a_cache,
    "the shards of a manifest": _of_a_manifest,
    **{
        f"{verb} of a storage": _in_a_storage(verb, *more)
        for verb, *more in (
            *(("exists",), ("size",), ("read",), ("hold",), ("remove",)),
            *(("write", b"x"), ("create", b"x")),
        )
    },
}


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("place", PLACES)
def test_a_name_from_a_file_stays_in_its_folder(
    place: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCACHE_DISK", str(tmp_path / "here" / "disk"))
    (tmp_path / "here").mkdir()
    (tmp_path / "away").write_bytes(b"abc")
    before = files(tmp_path)
    with pytest.raises((KdcacheError, ValueError)) as refused:
        PLACES[place](tmp_path / "here", name.format(tmp_path))
    assert re.search(r"outside|(spec|manifest)\.json", str(refused.value))
    outside = {path: data for path, data in files(tmp_path).items() if not path.startswith("here/")}
    assert outside == before


def test_what_a_seal_names_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "weights").symlink_to("/dev/zero")  # which has no end
    (tmp_path / STATE_FILE).write_text(
        json.dumps({"files": {"weights": 0}, "crc32": {"weights": 1}})
    )
    with pytest.raises(UsageError, match="lacks weights"):
        read_state(tmp_path, contents=True)


# Processes

PLANTED = (
    *("psutil", "json", "select", "os", "torch", "numpy", "h5py"),
    *("kdcache", "ray", "multiprocessing"),
)
START = {
    "the sandbox": """
from pathlib import Path
from kdcache.cache.sandbox import Sandbox
from kdcache.errors import CorruptCacheError
try:
    Sandbox().open(Path("nothing.h5"))
except CorruptCacheError:
    pass
""",
    "the engine's guard": """
from kdcache.teacher.engine.process import Guard
guard = Guard()
guard.started()
guard.close()
""",
    "Ray": """
import ray
from kdcache.cluster import at_home, connect
assert connect(None)
def look(folder):
    import json, numpy, select, kdcache.cluster
    at_home(folder)
    import multiprocessing
ray.get(ray.remote(look).remote(os.getcwd()))
""",
}


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(one, marks=[pytest.mark.end_to_end, pytest.mark.exhaustive])
        if one == "Ray"
        else one
        for one in START
    ],
)
@pytest.mark.slow
def test_a_process_that_is_started_takes_no_module_of_the_current_folder(
    what: str, tmp_path: Path
) -> None:
    """As the program does: its own process has the folder of the program first, not this one."""
    for name in PLANTED:
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')"
        )
    code = f"import os, sys; sys.path[:] = {sys.path!r}; os.chdir({str(tmp_path)!r})\n{START[what]}"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


def test_one_place_starts_processes() -> None:
    starts = re.compile(
        r"\bsubprocess\.[a-zA-Z]|\bmultiprocessing\.|os\.(exec|spawn|fork|system|popen)|Popen\("
    )
    found = {
        path.name
        for path in (ROOT / "kdcache").rglob("*.py")
        if starts.search(re.sub(r"subprocess\.(Popen\[|PIPE|DEVNULL)", "", path.read_text()))
    }
    assert found == {"cluster.py"}


# Texts

HOSTILE = "bad\r\n\r\n# owned <script>\x1b[2J|](http://x) `code`\u202e"


def test_a_name_from_a_cache_stays_in_its_cell_of_a_model_card(tmp_path: Path) -> None:
    cache, out = tmp_path / "cache", tmp_path / "run"
    make_cache(cache, [20], temperatures=(1.0,))
    resealed(cache / "spec.json", lambda v: v["notes"].update(teachers=[HOSTILE]))
    words = ["--student", "bilstm", "--temperature", "1", "--max-steps", "1", "--out", str(out)]
    result = run("train", "--cache", str(cache), *words)
    assert result.exit_code == 0, result.output
    card = (out / "README.md").read_bytes().decode()
    (line,) = (line for line in re.split(r"[\r\n]", card) if "owned" in line)
    assert line.startswith("| teacher | bad")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", card)
    cell = line.removeprefix("| teacher | ").removesuffix(" |")
    assert not re.search(r"(?<!\\)[|<`\[\]]", cell)


def test_a_key_of_a_file_reaches_no_terminal_raw(tmp_path: Path) -> None:
    options = tmp_path / "options.yaml"
    options.write_text(json.dumps({HOSTILE: 1, "seed": HOSTILE}))
    for words in (
        ("train", "--config", str(options)),
        ("build", "--config", str(options), "--workers", HOSTILE),
        (HOSTILE,),
        ("inspect", f"--{HOSTILE}"),
        (f"--{HOSTILE}",),
    ):
        result = run(*words)
        assert result.exit_code == 2
        assert "owned" in result.output
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", result.output), ascii(
            result.output
        )
