"""A loss whose vocabulary is cut over ranks is that of one process; see `on_ranks.py`."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

PROGRAM = Path(__file__).with_name("on_ranks.py")
(CHECKS,) = (
    [name.id for name in node.value.elts]  # type: ignore[attr-defined]
    for node in ast.parse(PROGRAM.read_text()).body
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CHECKS"
)


# Of three ranks one is neither first nor last, and the cuts are uneven.
RANKS = [pytest.param(n, marks=() if n == 3 else pytest.mark.exhaustive) for n in (2, 3, 4)]


@cache
def outcomes(ranks: int) -> dict[str, str | None]:
    """What each check found, on so many processes; they import PyTorch once."""
    with TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, PROGRAM, str(ranks), folder],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, str | None] = json.loads((Path(folder) / "results.json").read_text())
    return found


@pytest.mark.end_to_end
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("check", CHECKS)
def test_a_cut_vocabulary_gives_the_loss_of_a_whole_one(check: str, ranks: int) -> None:
    found = outcomes(ranks)[check]
    assert found is None, found
