"""The notebooks of examples/ run as they are, and are kept in git without outputs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_docs import ROOT, desk

__all__ = ["desk"]  # a fixture: a folder with everything the documents name

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "examples/notebooks").glob("*.ipynb"))}
# Cells are executed in order in one module, as a kernel does, and each is printed first.
_KERNEL = """
import json, sys
names = {"__name__": "__main__"}
for path in sys.argv[1:]:
    for cell in json.loads(open(path, encoding="utf-8").read())["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            print(f">>> {cell['id']}", flush=True)
            exec(compile(source, cell["id"], "exec"), names)
"""


def execute(where: Path, *names: str) -> list[str]:
    """Run notebooks in one process; what each cell of code printed, after its id."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", _KERNEL, *(str(NOTEBOOKS[name]) for name in names)],
        cwd=where, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.split(">>> ")[1:]


def the_one(printed: list[str], part: str) -> list[str]:
    """Lines of the one cell that printed this."""
    (found,) = (cell for cell in printed if part in cell)
    return found.splitlines()[1:]


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=NOTEBOOKS)
def test_outputs_are_stripped(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    book: dict[str, Any] = json.loads(text)
    assert text == json.dumps(book, indent=1, ensure_ascii=False) + "\n"  # small differences in git
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert set(book["metadata"]) == {"kernelspec", "language_info"}
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in book["cells"]:
        code = cell["cell_type"] == "code"
        assert cell["metadata"] == {}
        assert not code or (cell["outputs"], cell["execution_count"]) == ([], None)
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | (
            {"execution_count", "outputs"} if code else set()
        )


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=NOTEBOOKS)
def test_links_of_a_notebook_lead_somewhere(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    links = re.findall(r"\]\((?!https?:)([^)\s#]+)", text)
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_a_classifier(desk: Path) -> None:
    printed = execute(desk, "classifier")
    shown = [line for line in the_one(printed, "T = 4") if "T = 1" in line]
    for line in shown:
        shares = map(float, re.findall(r"([\d.]+)%", line))
        assert sum(shares) == pytest.approx(100, abs=0.2)
    assert len(shown) == 5
    _heading, *table = the_one(printed, "agreement")
    assert [line.split()[0] for line in table] == [
        "teacher", "notebook/runs/hard", "notebook/runs/kl", "notebook/runs/mse"
    ]  # fmt: skip
    assert (desk / "notebook/runs/mse/model.safetensors").is_file()


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_a_language_model_and_its_cache(desk: Path) -> None:
    pytest.importorskip("matplotlib", reason="the notebook draws curves")
    printed = execute(desk, "language_model", "reading_a_cache")
    assert the_one(printed, "Take ")
    said = the_one(printed, "T = 3")
    assert [line[:5] for line in said] == ["T = 1", "T = 2", "T = 3"]
    assert "not declared" in said[2]
    assert len([line for line in the_one(printed, "; expected: ") if line.startswith("after")]) == 5
    assert the_one(printed, "targets/")
