"""Several labels a text: what is a transfer set worth to a small student?

    python benchmarks/labels.py --encoder MINILM --novels NOVELS --out WORK_DIR

What is true of the novel that an excerpt of 40 words is from: seven facts, any number of which hold
together. Excerpts of different passages are labelled, unlabelled or for the test. The teacher is an
encoder that is fine-tuned on the labelled ones alone; so it knows no more of these novels than the
student, but more of the language. The students are biLSTMs with words of their own: on the hard
labels, on these and the teacher's answers to the same excerpts, or with a transfer set. Equal steps
for all; three seeds; figures of the test. It is a small case, made in minutes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import kdcache
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.evaluate.options import EvaluateOptions
from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.commands.train.options import TrainOptions

FACTS = {  # what begins the names of the novels of which it is true
    "american": ("Moby-Dick", "Adventures-of-Huckleberry"),
    "russian": ("War-and-Peace", "The-Brothers-Karamazov", "Crime-and"),
    "by a woman": ("Middlemarch", "Jane-Eyre", "Frankenstein", "Pride-and"),
    "by Dickens": ("David-Copperfield", "Great-Expectations", "A-Tale-of"),
    "first person": (
        "Moby-Dick", "Adventures-of-Huckleberry", "David-Copperfield", "Great-Expectations",
        "Jane-Eyre", "Frankenstein", "Dracula", "The-Adventures-of-Sherlock",
    ),
    "from 1880 on": (
        "Ulysses", "Dracula", "Adventures-of-Huckleberry", "The-Adventures-of-Sherlock",
        "The-Brothers-Karamazov",
    ),
    "horror": ("Dracula", "Frankenstein"),
}  # fmt: skip
TASK = "multi-label-classification"
WORDS = 40
SIZES = {"labelled": 400, "transfer": 1400, "test": 400}
SEEDS = (0, 1, 2)
STUDENT: dict[str, Any] = {
    **{"student": "bilstm", "embedding_size": 100, "hidden_size": 64, "dropout": 0.3},
    **{"max_steps": 300, "batch_size": 32, "min_count": 2, "logging_steps": 100},
}
RUNS: dict[str, dict[str, Any]] = {
    "hard labels": {"cache": ("labelled",), "alpha": 1.0},
    "and the teacher": {"cache": ("labelled",), "alpha": 0.3},
    "and the transfer set": {"cache": ("labelled", "transfer"), "alpha": 0.3},
}
FIGURES = ("micro_f1", "macro_f1", "micro_average_precision", "macro_average_precision")


def excerpts(novels: Path) -> list[dict[str, Any]]:
    """One excerpt of each passage with its labels, in a fixed random order."""
    draw, found = random.Random(0), []
    with gzip.open(novels, "rt", encoding="utf-8") as file:
        for line in file:
            passage = json.loads(line)
            words = passage["text"].split()
            start = draw.randrange(max(len(words) - WORDS, 1))
            labels = [fact for fact, names in FACTS.items() if passage["source"].startswith(names)]
            found.append({"text": " ".join(words[start : start + WORDS]), "labels": labels})
    draw.shuffle(found)
    return found


def corpora(novels: Path, out: Path) -> dict[str, Path]:
    """Files of the parts; the transfer set has no labels."""
    records, files = iter(excerpts(novels)), {}
    for name, size in SIZES.items():
        files[name] = out / f"{name}.jsonl"
        some = [next(records) for _ in range(size)]
        if name == "transfer":
            some = [{"text": record["text"]} for record in some]
        files[name].write_text("".join(f"{json.dumps(record)}\n" for record in some))
    return files


def row(name: str, models: list[Any]) -> str:
    """A line of the table."""
    cells = []
    for figure in FIGURES:
        values = [getattr(model, figure) for model in models]
        deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        cells.append(f"{statistics.fmean(values):.3f}{deviation}")
    return f"| {' | '.join([name, *cells])} |"


def main() -> None:
    """Make the teacher, the caches and the students, and print their figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("encoder", "novels", "out"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    given = parser.parse_args()
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    files = corpora(given.novels, out)
    teacher = str(out / "teacher")
    common: dict[str, Any] = {"task": TASK, "max_length": 64}
    kdcache.finetune(
        FinetuneOptions(
            str(given.encoder), (str(files["labelled"]),), teacher,
            epochs=6, batch_size=16, learning_rate=1e-4, freeze=2, **common,
        )
    )  # fmt: skip
    for name, corpus in files.items():
        made = BuildOptions((teacher,), (str(corpus),), str(out / name), workers=0, **common)
        kdcache.build(made)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}, transformers {transformers.__version__}"
    )
    lines = []
    for number, (name, change) in enumerate(RUNS.items()):
        runs = tuple(str(out / f"run-{number}-{seed}") for seed in SEEDS)
        for seed, run in zip(SEEDS, runs, strict=True):
            caches = tuple(str(out / cache) for cache in change["cache"])
            options = {**STUDENT, **change, "cache": caches}
            kdcache.train(TrainOptions(**options, out=run, seed=seed))
        result = kdcache.evaluate(EvaluateOptions(runs, str(out / "test")))
        lines += [row("teacher", list(result.models[:1]))] if number == 0 else []
        lines.append(row(name, list(result.models[1:])))
    print(f"| | {' | '.join(FIGURES)} |\n|---{'|---' * len(FIGURES)}|", *lines, sep="\n")


if __name__ == "__main__":
    main()
