"""1,000 mutants of shards, manifests and specs (10,000 before a release), each with hashes that
vouch for it.

Processes of their own read them (`fuzz_reader.py`): an error of ours or the right values is all
that may come of it, in bounded memory and time. Where HDF5 itself dies of a mutant or never ends,
`Sandbox` must survive the same file.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import further
from fuzz_reader import mutate

from kdcache.cache import Cache
from kdcache.cache.sandbox import Sandbox
from kdcache.errors import CorruptCacheError

GOLDEN = Path(__file__).parent / "golden"
READER = Path(__file__).parent / "fuzz_reader.py"
PROCESSES = 2
PATIENCE = 60.0  # seconds for one mutant, and for the start of a process


def outcomes(folders: list[Path], first: int, mutants: int) -> Iterator[tuple[int, str]]:
    """Number and outcome of each mutant; `died` or `hung` where a process did."""
    while first < mutants:
        numbers = map(str, (first, mutants, PROCESSES))
        words = [sys.executable, str(READER), *numbers, *map(str, folders)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            begun, hung = None, False
            for line in lines(process):
                if line is None:
                    hung = True
                    process.kill()
                    break
                number, _, outcome = line.partition(" ")
                begun = int(number)
                if outcome:
                    yield begun, outcome
                    first, begun = begun + PROCESSES, None
            message = process.stderr.read().decode()[-500:]
        if process.returncode == 0:
            return
        assert begun is not None, f"the reader does not start: {message}"
        yield begun, "hung" if hung else f"died of {process.returncode}"
        first = begun + PROCESSES


def lines(process: subprocess.Popen[bytes]) -> Iterator[str | None]:
    """What a process prints, whole lines; None when nothing has come for too long."""
    assert process.stdout is not None
    rest = b""
    while True:
        if not select.select([process.stdout], [], [], PATIENCE)[0]:
            yield None
        data = os.read(process.stdout.fileno(), 1 << 16)
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        yield from (line.decode() for line in whole)


def shard_folder(folder: Path, name: str) -> Path:
    """What a reader needs of a golden cache's shard."""
    cache = Cache.open(str(GOLDEN / name))
    (entry,) = cache.manifest.shards
    ranks = None if cache.rank_to_id is None else cache.rank_to_id.tolist()
    facts = {"spec": cache.spec.to_dict(), "ranks": ranks, "counts": vars(entry.counts)}
    folder.mkdir()
    (folder / "facts.json").write_text(json.dumps(facts))
    (folder / "original.h5").write_bytes(cache.storage.read(f"shards/{entry.name}"))
    return folder


def document_folder(folder: Path, name: str) -> Path:
    (folder / "cache").mkdir(parents=True)
    for document in ("spec.json", "manifest.json"):
        shutil.copy(GOLDEN / "topk-1-2" / document, folder / "cache")
    (folder / "which").write_text(name)
    return folder


@pytest.mark.end_to_end
@pytest.mark.parametrize("mutants", [400, *further(10_000)])
def test_mutants_are_refused_or_read_right(
    mutants: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = [shard_folder(tmp_path / name, name) for name in ("sample-1-2", "topk-1", "dense")]
    documents = [document_folder(tmp_path / n, n) for n in ("manifest.json", "spec.json")]
    folders = [*shards, *documents, *documents]
    with ThreadPoolExecutor(PROCESSES) as pool:
        parts = list(pool.map(lambda i: dict(outcomes(folders, i, mutants)), range(PROCESSES)))
    found = {number: outcome for part in parts for number, outcome in part.items()}
    assert sorted(found) == list(range(mutants))

    fatal = [number for number, outcome in found.items() if outcome.startswith(("died", "hung"))]
    wrong = {n: o for n, o in found.items() if n not in fatal and o not in ("right", "refused")}
    kinds = {
        kind: Counter(o for n, o in found.items() if (n % len(folders) < len(shards)) == of_shards)
        for kind, of_shards in (("shards", True), ("documents", False))
    }
    with capsys.disabled():
        sys.stdout.write(f"\n{kinds}\n")
    assert wrong == {}
    for counted in kinds.values():
        assert counted["refused"] > counted.total() // 4, "these are too tame to show anything"
    assert len(fatal) <= 10
    for number in fatal:
        folder = folders[number % len(folders)]
        data = (folder / "original.h5").read_bytes()
        (folder / "fatal.h5").write_bytes(mutate(data, np.random.default_rng([7, number])))
        with Sandbox() as sandbox:
            with pytest.raises(CorruptCacheError):
                sandbox.open(folder / "fatal.h5")
            sandbox.open(folder / "original.h5")  # and goes on
