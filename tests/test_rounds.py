"""The example of rounds, whole, on a tiny teacher; the same command again does nothing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parent.parent / "examples/rounds/run.py"


@pytest.mark.end_to_end
def test_students_of_each_kind_of_text_are_compared(
    tiny_lm: Path, text_corpus: Path, tmp_path: Path
) -> None:
    spec = importlib.util.spec_from_file_location("rounds_run", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    student = tmp_path / "student.json"
    config = json.loads((tiny_lm / "config.json").read_text())
    student.write_text(json.dumps(config | {"num_hidden_layers": 1}))
    words = ["--teacher", str(tiny_lm), "--corpus", str(text_corpus), "--student", str(student)]
    words += ["--out", str(tmp_path / "work"), "--seeds", "1", "--rounds", "2", "--rows", "24"]
    words += ["--held-out", "8", "--steps", "2", "--divergence", "reverse-kl", "policy-gradient"]
    example.main(words)
    table = (tmp_path / "work" / "table.md").read_text()
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == [
        "| the beginning",
        "| corpus",
        "| teacher",
        "| own",
        "| own",
    ]
    assert all(float(cell.split(" ± ")[0]) > 0 for row in rows for cell in row[2:4])
    # Each round's text is of the student before it.
    text = tmp_path / "work/seed-0/own-reverse-kl"
    specs = [json.loads((text / f"{n}/text/spec.json").read_text())["spec"] for n in (0, 1)]
    assert specs[0]["model"] != specs[1]["model"]
    written = sorted((tmp_path / "work").rglob("*.parquet"))
    before = [path.stat().st_mtime_ns for path in written]
    example.main(words)
    assert [path.stat().st_mtime_ns for path in written] == before
