from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kdcache.cli.views import render_demo
from kdcache.commands.demo.demo import demo
from kdcache.commands.demo.teacher import documents
from kdcache.commands.options import DemoOptions
from kdcache.errors import UsageError


def test_documents_have_every_paragraph_of_the_reference_once() -> None:
    from pydoc_data.topics import topics

    train, held_out = documents()
    paragraphs = [p.strip() for d in train + held_out for p in d.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert {p.strip() for t in topics.values() for p in t.split("\n\n")} - {""} == {*paragraphs}
    assert len(held_out) == pytest.approx(len(train) / 9, abs=1)
    assert sum(map(len, train)) > 250_000


def test_options_tell_all_their_mistakes_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        DemoOptions("x", alpha=1.0, teacher_epochs=0, documents=9)

    assert all(name in str(caught.value) for name in ("alpha", "teacher-epochs", "documents"))


@pytest.mark.end_to_end
def test_small_demo_then_again(tmp_path: Path) -> None:
    more: dict[str, Any] = {"documents": 30, "workers": 0, "teacher_epochs": 1, "student_epochs": 1}
    options = DemoOptions(str(tmp_path / "demo"), **more)
    lines: list[str] = []

    result = demo(options, lines.append)

    steps = ("1/6 corpus", "2/6 tokenizer", "3/6 teacher", "4/6 train cache", "4/6 heldout cache",
             "5/6 hard labels (Llama)", "5/6 distilled (Llama)", "5/6 distilled (GPT-NeoX)",
             "6/6 evaluation")  # fmt: skip
    assert all(any(line.startswith(step) for line in lines) for step in steps)
    assert all(Path(folder).is_dir() for folder in result.folders)
    assert not result.reused
    assert [m.architecture for m in result.models] == ["llama", "llama", "llama", "gpt_neox"]
    teacher, hard, distilled, other = result.models
    assert (teacher.kl, teacher.steps) == (None, None)
    assert len({student.steps for student in (hard, distilled, other)}) == 1
    assert hard.parameters == distilled.parameters < teacher.parameters
    assert hard.teacher_seconds == 0
    # An epoch beside the teacher costs what the build did, or more: steps are rounded up.
    assert (distilled.teacher_seconds or 0) >= result.teacher_seconds > 0
    assert distilled.kl is not None
    assert hard.kl is not None
    assert distilled.kl < hard.kl
    assert (tmp_path / "demo" / "losses.png").read_bytes().startswith(b"\x89PNG")
    runs = [tmp_path / "demo" / name for name in ("student-hard", "student-distilled")]
    begun, soft = (json.loads((run / "train.json").read_text())["options"] for run in runs)
    assert {k for k in begun if begun[k] != soft[k]} == {"out", "alpha", "student"}
    assert Path(begun["student"]).read_text() == Path(soft["student"]).read_text()
    spec = json.loads((tmp_path / "demo" / "train-cache" / "spec.json").read_text())
    assert spec["spec"]["codec"] == options.codec

    again = demo(options, lines.append)

    made = {"corpus", "tokenizer", "teacher", "train cache", "heldout cache"}
    assert made < set(again.reused)
    assert {"hard labels (Llama)", "distilled (Llama)", "distilled (GPT-NeoX)"} < set(again.reused)
    assert again.models == result.models
    assert again.teacher_seconds == result.teacher_seconds
    with pytest.raises(UsageError, match=r"alpha 0\.1 -> 0\.5"):
        demo(DemoOptions(options.out, **more, alpha=0.5))

    console = Console(record=True, width=200)
    render_demo(result, console)
    table = console.export_text()
    for model in result.models:
        assert f"{model.cross_entropy:.3f}" in table
        assert f"{model.parameters:,}" in table
    assert f"{result.bytes_per_position:.1f} bytes per position" in table
