"""What every adapter must do, whatever the trainer: on the rows that it prepared itself.

The loss of its first step is that of `kdcache train`; a run learns; a resumed run takes the steps
of one that was not stopped. A step holds all rows, so no order of rows matters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kdcache

ALPHA, TEMPERATURE, STEPS, ROWS = 0.25, 1.0, 20, 6
TEXTS = [
    "Once upon a time there was a little girl named Lily. She liked to play in the park.",
    "One day, Tom and his dog went to the big tree. They saw a red bird and sang with it.",
    "The cat was sad. Her ball was lost in the grass, so she asked a mouse to help her look.",
    "Ben had a toy car. He gave it to Sue, and they were friends for a long time after that.",
    "It was a sunny day. Mom made a cake and the children ate it all.",
    "A frog jumped in the water. Splash! The fish laughed, and the frog laughed too.",
]

Log = list[dict[str, Any]]
Train = Callable[[str, Path | None], Log]
"""Train on a cache in a folder of that name, from a checkpoint or not: the log of each step."""


def make_student(teacher: Path, folder: Path) -> Path:
    """The teacher with its weights disturbed, so that there is something to learn."""
    model = AutoModelForCausalLM.from_pretrained(teacher)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight += 0.3 * weight.std() * noise
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    return folder


def build(teacher: Path, corpus: Path, out: Path, *, codec: str = "topk:32", **options: Any) -> str:
    """A cache of prepared rows."""
    kdcache.build(
        kdcache.BuildOptions(
            teacher=(str(teacher),),
            corpus=(str(corpus),),
            out=str(out),
            record_form="ids",
            labels="token",
            tokenizer=str(teacher),
            codec=codec,
            workers=0,
            **options,
        )
    )
    return str(out)


def build_texts(teacher: Path, folder: Path, codec: str) -> kdcache.Cache:
    """A cache of 17 rows: of five batches of four rows the last has one, and a worker has none."""
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in (TEXTS * 5)[:27]))
    kdcache.build(
        kdcache.BuildOptions(
            teacher=(str(teacher),),
            corpus=(str(corpus),),
            out=str(folder / "cache"),
            codec=codec,
            max_length=64,
            workers=0,
        )
    )
    return kdcache.Cache.open(str(folder / "cache"))


def mean_loss(line: Mapping[str, float]) -> float:
    """The loss of a step of its parts, which no trainer rounds."""
    return ALPHA * line["hard_loss"] + (1 - ALPHA) * line["soft_loss"]


def first_loss(cache: str, student: Path, out: Path) -> float:
    """What `kdcache train` has as the loss of its first step, on all rows of a cache."""
    rows = kdcache.Cache.open(cache).manifest.rows
    kdcache.train(
        kdcache.TrainOptions(
            cache=(cache,),
            student=str(student),
            out=str(out),
            alpha=ALPHA,
            temperature=TEMPERATURE,
            max_steps=1,
            batch_size=rows,
            logging_steps=1,
        )
    )
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return mean_loss(next(line for line in lines if "hard_loss" in line))


def check(cache: str, student: Path, train: Train, work: Path) -> None:
    """The contract. Only steps from one checkpoint compare: not every trainer seeds an adapter."""
    whole = train("whole", None)
    want = first_loss(cache, student, work / "reference")
    assert mean_loss(whole[0]) == pytest.approx(want, abs=1e-5)
    assert mean_loss(whole[-1]) < 0.8 * mean_loss(whole[0])
    assert len(whole) == STEPS
    rest = train("rest", work / "whole" / f"checkpoint-{STEPS // 2}")
    assert [mean_loss(line) for line in rest] == pytest.approx(
        [mean_loss(line) for line in whole[-len(rest) :]], abs=1e-5
    )
    assert len(rest) in (STEPS // 2, STEPS)
    assert not (work / "rest" / f"checkpoint-{STEPS // 2}").exists()  # it did not begin anew


def steps_of(history: Log) -> Log:
    """The lines of a Trainer's log that are of steps."""
    return [line for line in history if "hard_loss" in line]
