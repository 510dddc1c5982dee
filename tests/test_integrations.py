"""Targets by content in a Hugging Face Trainer, which all adapters share."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_lm
from launched import free_port, torchrun
from loaded import Program
from trainer_contract import ALPHA, STEPS, Log, build, check, steps_of
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    TrainingArguments,
)

import kdcache
from kdcache.errors import KdcacheError, UsageError
from kdcache.integrations.trainer import CachedTrainer, Distillation
from kdcache.tasks import IGNORE

pytestmark = pytest.mark.slow
Rows = list[dict[str, list[int]]]


@pytest.fixture(scope="module")
def rows(tiny_lm: Path, corpus_texts: list[str]) -> Rows:
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    found = []
    for text in corpus_texts[:8]:
        ids = tokenizer(text)["input_ids"][:40]
        found.append({"input_ids": ids, "labels": [IGNORE] * 5 + ids[5:]})
    return found


def written(rows: Rows, path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def cache(rows: Rows, tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("by-content")
    return build(tiny_lm, written(rows, folder / "rows.jsonl"), folder / "cache", max_length=64)


@pytest.fixture(scope="module")
def student(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_lm(tiny_tokenizer, tmp_path_factory.mktemp("student"), seed=5)


def trainer_of(
    student: Path, out: Path, rows: Rows, cache: str, *, loss: Any = None, **more: Any
) -> CachedTrainer:
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": len(rows),
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return CachedTrainer(
        model=AutoModelForCausalLM.from_pretrained(student),
        args=TrainingArguments(str(out), **{**settings, **more}),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(student)),
        distillation=Distillation(cache, alpha=ALPHA, **(loss or {})),
    )


def log_of(trainer: CachedTrainer, **how: Any) -> Log:
    trainer.train(**how)
    return steps_of(trainer.state.log_history)


def test_the_contract(rows: Rows, cache: str, student: Path, tmp_path: Path) -> None:
    def train(name: str, checkpoint: Path | None) -> Log:
        saves = {"save_strategy": "steps", "save_steps": STEPS // 2, "max_steps": STEPS}
        trainer = trainer_of(student, tmp_path / name, rows, cache, **saves)
        return log_of(trainer, resume_from_checkpoint=checkpoint and str(checkpoint))

    check(cache, student, train, tmp_path)


def test_accumulated_batches_are_one(rows: Rows, cache: str, student: Path, tmp_path: Path) -> None:
    whole = log_of(trainer_of(student, tmp_path, rows, cache))
    parts = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
    for workers in (0, 1):
        trainer = trainer_of(
            student, tmp_path, rows, cache, dataloader_num_workers=workers, **parts
        )
        found = log_of(trainer)
        for name in ("loss", "grad_norm", "hard_loss", "soft_loss"):
            assert [line[name] for line in found] == pytest.approx(
                [line[name] for line in whole], rel=1e-4
            ), name


@pytest.mark.parametrize("known", [0, 5])
def test_missed_rows_train_on_their_labels(
    rows: Rows, cache: str, student: Path, tmp_path: Path, known: int
) -> None:
    """Hard labels of all, soft targets of the rows that the cache has."""
    mixed = rows[:known] + [{n: v[::-1] for n, v in row.items()} for row in rows[known:]]
    for row in mixed[known:]:
        row["labels"] = row["input_ids"]
    line = log_of(trainer_of(student, tmp_path, mixed, cache, loss={"on_miss": "hard"}))[0]
    assert line["missed"] == 1 - known / len(rows)

    model = AutoModelForCausalLM.from_pretrained(student)
    lookup = kdcache.TargetLookup(cache)
    collate = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(student))
    total, count = torch.zeros(()), 0
    for i, row in enumerate(mixed):
        batch = dict(collate([row]))
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].detach()
        labels = batch["labels"][:, 1:]
        at = labels != IGNORE
        count += int(at.sum())
        if i < known:
            targets = lookup.lookup(batch["input_ids"], batch["labels"])
            total += kdcache.distillation_loss(
                logits[at], labels[at], targets, alpha=ALPHA, count=1
            ).total
        else:
            total += torch.nn.functional.cross_entropy(logits[at], labels[at], reduction="sum")
    assert line["loss"] == pytest.approx(float(total) / count, abs=1e-5)


def test_an_anchor_and_its_caches_are_kept(
    rows: Rows, tiny_lm: Path, student: Path, cache: str, tmp_path: Path
) -> None:
    corpus = written(rows, tmp_path / "rows.jsonl")
    anchored = build(tiny_lm, corpus, tmp_path / "cache", max_length=64, codec="anchored:6")
    saves = {"save_strategy": "steps", "save_steps": 6}

    def run(name: str, steps: int, **how: Any) -> tuple[CachedTrainer, Log]:
        trainer = trainer_of(student, tmp_path / name, rows, anchored, max_steps=steps, **saves)
        return trainer, log_of(trainer, **how)

    whole, log = run("whole", 12)
    run("halves", 6)
    again, rest = run("halves", 12, resume_from_checkpoint=True)
    theta = whole._student.anchor.theta
    assert 0 < float(theta) == pytest.approx(float(again._student.anchor.theta), rel=1e-4)
    assert [line["loss"] for line in rest[-6:]] == pytest.approx(
        [line["loss"] for line in log[-6:]], abs=1e-5
    )
    assert "soft_cross_entropy" in log[0]
    other = trainer_of(student, tmp_path / "halves", rows, cache, max_steps=18, **saves)
    with pytest.raises(UsageError, match="was trained on other caches"):
        other.train(resume_from_checkpoint=True)


_SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
from test_integrations import log_of, trainer_of

student, out, rows, cache = sys.argv[1:]
rows = json.loads(Path(rows).read_text())
trainer = trainer_of(Path(student), Path(out), rows, cache, per_device_train_batch_size=4)
found = log_of(trainer)
if trainer.args.process_index == 0:
    Path(out, "log.json").write_text(json.dumps(found))
"""


@pytest.mark.end_to_end
def test_two_processes_take_the_steps_of_one(
    rows: Rows, cache: str, student: Path, tmp_path: Path
) -> None:
    whole = log_of(trainer_of(student, tmp_path, rows, cache))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    here, port = Path(__file__).parent, free_port()
    given = map(str, (here, student, tmp_path / "out", tmp_path / "rows.json", cache))
    words = ("python", "-c", _SCRIPT, *given)
    programs = [
        Program(*words, environment=os.environ | torchrun(rank, 2, port)) for rank in range(2)
    ]
    for program in programs:
        said = program.communicate()
        assert program.returncode == 0, said
    found = json.loads((tmp_path / "out" / "log.json").read_text())
    for name in ("loss", "grad_norm", "hard_loss", "soft_loss"):
        assert [line[name] for line in found] == pytest.approx(
            [line[name] for line in whole], rel=1e-4
        ), name


def test_settings_by_name() -> None:
    text = {"cache": "caches/rows", "alpha": "0.1", "on_miss": "hard"}
    assert Distillation.of(text, "it") == Distillation("caches/rows", alpha=0.1, on_miss="hard")
    for wrong, message in (
        ({"cache": "x", "temprature": 2}, "it: unknown 'temprature', expected cache, temperature"),
        ({"alpha": 0.1}, "it: no cache is named"),
        ({"cache": "x", "alpha": "much"}, "it: could not convert string to float: 'much'"),
    ):
        with pytest.raises(UsageError, match=message):
            Distillation.of(wrong, "it")


def test_a_cache_that_is_not_there_is_refused_first(
    rows: Rows, student: Path, tmp_path: Path
) -> None:
    with pytest.raises(KdcacheError, match="nowhere"):
        trainer_of(student, tmp_path, rows, str(tmp_path / "nowhere"))
