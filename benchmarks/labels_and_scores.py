r"""Several labels a text, and a score: what is a transfer set worth to a small student?

    python benchmarks/labels_and_scores.py --encoder MINILM --novels NOVELS.jsonl.gz \
        --sst2 SST2_DIR --out WORK_DIR

Two small cases on real text. *Labels*: which of five facts hold of the book that the beginning of a
passage (400 characters) of 15 novels is from: written by a woman, by an American, translated, told
by one of its people, first printed in 1880 or later. They are facts of the books, looked up, not
judgements of the passages. *Score*: the sentiment of SST-2's sentences as a number, 0 or 1, learnt
as a regression. An encoder is fine-tuned on a part of the texts with labels; its answers to these
and to the others, whose labels nobody sees, make the cache. The students are biLSTMs with words of
their own: on the hard labels alone, on these and the teacher's answers to the same texts, and on
the teacher's answers to all. Equal steps for all; three seeds; figures of texts that nobody saw.

The encoder of the printed table was fine-tuned on SST-2 before: its sentiment is good, which does
not matter to a comparison of students.
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

import kdcache
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.evaluate.options import EvaluateOptions
from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.commands.train.options import TrainOptions

FACTS = ("woman", "american", "translated", "first person", "1880 or later")
BOOKS = {  # the beginning of its name in the corpus, and whether each fact holds
    "War-and-Peace": (0, 0, 1, 0, 0),
    "David-Copperfield": (0, 0, 0, 1, 0),
    "The-Brothers-Karamazov": (0, 0, 1, 0, 1),
    "Middlemarch": (1, 0, 0, 0, 0),
    "Ulysses": (0, 0, 0, 0, 1),
    "Moby-Dick": (0, 1, 0, 1, 0),
    "Crime-and-Punishment": (0, 0, 1, 0, 0),
    "Jane-Eyre": (1, 0, 0, 1, 0),
    "Great-Expectations": (0, 0, 0, 1, 0),
    "Dracula": (0, 0, 0, 1, 1),
    "A-Tale-of-Two-Cities": (0, 0, 0, 0, 0),
    "Pride-and-Prejudice": (1, 0, 0, 0, 0),
    "Adventures-of-Huckleberry-Finn": (0, 1, 0, 1, 1),
    "The-Adventures-of-Sherlock-Holmes": (0, 0, 0, 1, 1),
    "Frankenstein": (1, 0, 0, 1, 0),
}
LABELLED = 800
TESTED = 800
CHARACTERS = 400
STEPS = 500
SEEDS = (0, 1, 2)
STUDENT: dict[str, Any] = {
    **{"student": "bilstm", "embedding_size": 64, "hidden_size": 64, "dropout": 0.3},
    **{"max_steps": STEPS, "batch_size": 32, "min_count": 2, "logging_steps": 100},
}
RUNS: dict[str, dict[str, Any]] = {
    "hard labels": {"cache": "labelled", "alpha": 1.0},
    "and the teacher, same texts": {"cache": "labelled", "alpha": 0.5},
    "and the teacher, transfer set": {"cache": "all", "alpha": 0.5},
    "the teacher alone, transfer set": {"cache": "all", "alpha": 0.0},
}
TASKS = {
    "multi-label-classification": (
        "micro_f1",
        "micro_average_precision",
        "macro_average_precision",
    ),
    "regression": ("pearson", "spearman", "mse"),
}


def novels(path: Path) -> list[dict[str, Any]]:
    """Passages with the facts of their books, in a fixed random order."""
    found = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            facts = next(v for name, v in BOOKS.items() if record["source"].startswith(name))
            labels = [name for name, holds in zip(FACTS, facts, strict=True) if holds]
            found.append({"text": record["text"][:CHARACTERS], "labels": labels})
    random.Random(0).shuffle(found)
    return found


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


def case(task: str, train: list[Any], test: list[Any], encoder: str, out: Path) -> dict[str, Any]:
    """Figures of the teacher and of each student, by seed."""
    out.mkdir(parents=True, exist_ok=True)
    labelled = write(out / "labelled.jsonl", train[:LABELLED])
    every = write(out / "all.jsonl", train, without=LABELLED)
    tested = write(out / "test.jsonl", test[:TESTED])
    teacher = str(out / "teacher")
    common: dict[str, Any] = {"task": task, "max_length": 96}
    kdcache.finetune(
        FinetuneOptions(encoder, (str(labelled),), teacher, epochs=3, batch_size=32, **common)
    )
    for name, corpus in (("labelled", labelled), ("all", every), ("test", tested)):
        kdcache.build(
            BuildOptions((teacher,), (str(corpus),), str(out / name), workers=0, **common)
        )
    figures: dict[str, Any] = {}
    for name, change in RUNS.items():
        for seed in SEEDS:
            run = out / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            options = {**STUDENT, **change, "cache": (str(out / change["cache"]),)}
            kdcache.train(TrainOptions(**options, out=str(run), seed=seed))
            result = kdcache.evaluate(EvaluateOptions((str(run),), str(out / "test")))
            for who, model in (("teacher", result.models[0]), (name, result.models[1])):
                figures.setdefault(who, {})[seed] = {f: getattr(model, f) for f in TASKS[task]}
    return figures


def main() -> None:
    """Run both cases and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("--encoder", "--novels", "--sst2", "--out"):
        parser.add_argument(name, required=True)
    given = parser.parse_args()
    passages = novels(Path(given.novels))
    sst2 = Path(given.sst2)
    data = {
        "regression": (sentences(sst2, "train"), sentences(sst2, "test")),
        "multi-label-classification": (passages[TESTED:], passages[:TESTED]),
    }
    print(f"{platform.machine()}, {os.cpu_count()} cores; kdcache {kdcache.__version__}")
    for task, (train, test) in data.items():
        found = case(task, train, test, given.encoder, Path(given.out) / task)
        print(f"\n{task}: {LABELLED} texts with labels, {len(train) - LABELLED} without\n")
        print("|", " | ".join(["", *(f.replace("_", " ") for f in TASKS[task])]), "|", flush=True)
        print("|---" * (1 + len(TASKS[task])), "|", sep="")
        for who, by_seed in found.items():
            cells = []
            for figure in TASKS[task]:
                values = [seed[figure] for seed in by_seed.values()]
                spread = "" if who == "teacher" else f" ± {statistics.stdev(values):.3f}"
                cells.append(f"{statistics.fmean(values):.3f}{spread}")
            print("|", " | ".join([who, *cells]), "|", flush=True)
        (Path(given.out) / f"{task}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
