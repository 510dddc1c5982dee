"""Scores: what is a transfer set worth to a small student?

    python benchmarks/scores.py --teacher MINILM_SST2 --sst2 SST2_DIR --out WORK_DIR

The sentiment of SST-2's sentences as a number, 0 or 1, learnt as a regression. The teacher is a
classifier of two classes that was fine-tuned on all of SST-2's training sentences: its score is
half the difference of its two logits in units of their mean size, plus 1/2, which is a linear
head of one output. It is right about far more sentences than a student can be from few labels.
The students are biLSTMs with words of their own: on the hard labels of a few hundred sentences
alone, and on these and the teacher's scores of them and of others. Equal steps for all; three
seeds; figures of test sentences. It is a small case, made in minutes: the gain is that of more
text, which the teacher makes useful.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import kdcache
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.evaluate.options import EvaluateOptions
from kdcache.commands.train.options import TrainOptions

LABELLED = 300  # sentences with hard labels
TRANSFER = 800  # sentences that the teacher alone scores
TESTED = 300
TOKENS = 40
STEPS = 150
SEEDS = (0, 1, 2)
STUDENT: dict[str, Any] = {
    **{"student": "bilstm", "embedding_size": 64, "hidden_size": 32, "dropout": 0.3},
    **{"max_steps": STEPS, "batch_size": 32, "min_count": 2, "logging_steps": 100},
}
RUNS: dict[str, dict[str, Any]] = {
    "hard labels": {"cache": "labelled", "alpha": 1.0},
    "and the teacher, with the transfer set": {"cache": "all", "alpha": 0.3},
}
FIGURES = ("pearson", "spearman", "mse")


def sentences(folder: Path, name: str) -> list[dict[str, Any]]:
    """SST-2's sentences with 0 or 1, in a fixed random order."""
    lines = (folder / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
    found = []
    for line in lines:
        text, _, label = line.rpartition("\t")
        found.append({"text": text, "score": float(label)})
    random.Random(0).shuffle(found)
    return found


def write(path: Path, records: list[dict[str, Any]], *, without: int | None = None) -> Path:
    """JSONL; records from `without` on lose their labels."""
    kept = [
        r if without is None or i < without else {"text": r["text"]} for i, r in enumerate(records)
    ]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in kept))
    return path


def as_score(classifier: str, records: list[dict[str, Any]], out: Path) -> str:
    """A regression model of the classifier's logits."""
    model = AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    with torch.inference_mode():
        texts = [record["text"] for record in records]
        logits = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits
    size = float((logits[:, 1] - logits[:, 0]).abs().mean())
    head = model.classifier
    score = torch.nn.Linear(head.in_features, 1)
    with torch.no_grad():
        score.weight[0] = (head.weight[1] - head.weight[0]) / (2 * size)
        score.bias[0] = (head.bias[1] - head.bias[0]) / (2 * size) + 0.5
    model.classifier = score
    model.config.id2label, model.config.label2id = {0: "LABEL_0"}, {"LABEL_0": 0}
    model.config.problem_type = "regression"
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return str(out)


def main() -> None:
    """Make the teacher, the caches and the students, and print their figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("--teacher", "--sst2", "--out"):
        parser.add_argument(name, required=True)
    given = parser.parse_args()
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    train = sentences(Path(given.sst2), "train")[: LABELLED + TRANSFER]
    files = {
        "labelled": write(out / "labelled.jsonl", train[:LABELLED]),
        "all": write(out / "all.jsonl", train, without=LABELLED),
        "test": write(out / "test.jsonl", sentences(Path(given.sst2), "test")[:TESTED]),
    }
    print(f"{platform.machine()}, {os.cpu_count()} cores; kdcache {kdcache.__version__}")
    teacher = as_score(given.teacher, train[:32], out / "teacher")
    for name, corpus in files.items():
        common: dict[str, Any] = {"task": "regression", "max_length": TOKENS, "workers": 0}
        kdcache.build(BuildOptions((teacher,), (str(corpus),), str(out / name), **common))
    print("|", " | ".join(["", *FIGURES]), "|\n|---" + "|---" * len(FIGURES), "|", sep="")
    for number, (name, change) in enumerate(RUNS.items()):
        found = []
        for seed in SEEDS:
            run = out / f"run-{number}-{seed}"
            options = {**STUDENT, **change, "cache": (str(out / change["cache"]),)}
            kdcache.train(TrainOptions(**options, out=str(run), seed=seed))
            result = kdcache.evaluate(EvaluateOptions((str(run),), str(out / "test")))
            found.append(result.models[1])
        if number == 0:
            first = result.models[0]
            print("| teacher |", " | ".join(f"{getattr(first, f):.3f}" for f in FIGURES), "|")
        cells = []
        for figure in FIGURES:
            values = [getattr(model, figure) for model in found]
            cells.append(f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}")
        print("|", " | ".join([name, *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
