"""A tagger by distillation: how much better is a biLSTM with sentences that nobody has tagged?

    python benchmarks/tagger.py --data DAT --encoder MINILM --novels NOVELS --out WORK_DIR

The data are the 900 sentences of CoNLL-2000's chunks (Wall Street Journal, 21,068 words) that ship
with the sources of libwapiti, as `chtrain.txt` and `chtest.txt`. Every second one is for training:
the first 200 of these with their tags, the other 250 without. The rest are dev and test in turn.
Further sentences without tags are of novels, cut into words by a pattern. The teacher is
fine-tuned on the tagged sentences alone. Every student takes equally many steps by
`kdcache.train`, on hard labels, on hard labels and the teacher's answers to the same sentences, or
with the transfer set; the best checkpoint by the F1 of entities (chunks) on dev. The table is of
the test part.

Finished steps are kept in the work folder, so an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import re
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import kdcache
from kdcache.commands.evaluate.options import EvaluateOptions

COLUMNS = ("tokens", "pos", "tags")
TASK = "token-classification"
TAGGED = 200
NOVELS = 1000  # sentences of them
BILSTM: dict[str, Any] = {
    "student": "bilstm", "best": "f1", "batch_size": 32, "learning_rate": 2e-3,
    "embedding_size": 100, "hidden_size": 128, "dropout": 0.3, "max_steps": 360, "eval_steps": 40,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "hard labels": {"cache": ("train",), "alpha": 1.0},
    "and the teacher": {"cache": ("train",), "alpha": 0.1, "temperature": 2.0},
    "and the transfer set": {
        "cache": ("train", "transfer"), "alpha": 0.1, "temperature": 2.0,
    },
}  # fmt: skip


def split(data: Path, novels: Path, out: Path) -> tuple[str, ...]:
    """Write train, dev and test, and the words of the transfer set; returns all tags."""
    sentences = [
        sentence
        for name in ("chtrain.txt", "chtest.txt")
        for sentence in (data / name).read_text().strip().split("\n\n")
        if sentence.strip()
    ]
    half, rest = sentences[::2], sentences[1::2]
    parts = {"train": half[:TAGGED], "dev": rest[::2], "test": rest[1::2]}
    for name, some in parts.items():
        (out / f"{name}.conll").write_text("\n\n".join(some) + "\n")
    words = [[line.split()[0] for line in one.splitlines()] for one in half[TAGGED:]]
    with gzip.open(novels, "rt", encoding="utf-8") as file:
        texts = [" ".join(json.loads(line)["text"].split()) for line in file]
    found = [
        re.findall(r"\w+|[^\w\s]", sentence)
        for text in texts
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", text)[1:-1]
    ]
    found = [sentence for sentence in found if 5 <= len(sentence) <= 40]
    words += random.Random(0).sample(found, NOVELS)
    lines = (json.dumps({"tokens": sentence}) for sentence in words)
    (out / "transfer.jsonl").write_text("".join(f"{line}\n" for line in lines))
    # The rarest tags are in none of the tagged sentences.
    return tuple(sorted({line.split()[-1] for one in sentences for line in one.splitlines()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "encoder", "novels", "out"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    tags = split(given.data, given.novels, out)
    kdcache.finetune(
        kdcache.FinetuneOptions(
            model=str(given.encoder), task=TASK, corpus=(str(out / "train.conll"),),
            eval_corpus=(str(out / "dev.conll"),), columns=COLUMNS, out=str(out / "teacher"),
            label_names=tags, epochs=8, batch_size=16, learning_rate=1e-4,
            max_length=96,
        )
    )  # fmt: skip
    for name in ("train", "dev", "test", "transfer"):
        corpus = out / ("transfer.jsonl" if name == "transfer" else f"{name}.conll")
        kdcache.build(
            kdcache.BuildOptions(
                teacher=(str(out / "teacher"),), task=TASK, corpus=(str(corpus),),
                columns=None if name == "transfer" else COLUMNS, out=str(out / f"c-{name}"),
                max_length=96, workers=0,
            )
        )  # fmt: skip
    for seed in range(given.seeds):
        for number, options in enumerate(RUNS.values()):
            caches = tuple(str(out / f"c-{cache}") for cache in options["cache"])
            settings = {**BILSTM, **options, "cache": caches, "seed": seed}
            kdcache.train(
                kdcache.TrainOptions(
                    eval_cache=(str(out / "c-dev"),),
                    out=str(out / f"run-{number}-{seed}"),
                    **settings,
                )
            )
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}, transformers {transformers.__version__}"
    )
    print("| model | chunk F1, % | std | accuracy, % | KL |\n|---|---|---|---|---|")
    for number, name in enumerate(RUNS):
        students = tuple(str(out / f"run-{number}-{seed}") for seed in range(given.seeds))
        result = kdcache.evaluate(EvaluateOptions(student=students, cache=str(out / "c-test")))
        teacher, *found = result.models
        f1 = [100 * (one.entity_f1 or 0.0) for one in found]
        accuracy, kl = (
            statistics.mean(getattr(one, key) for one in found) for key in ("accuracy", "kl")
        )
        print(
            f"| biLSTM, {name} | {statistics.mean(f1):.1f} | {statistics.stdev(f1):.1f} "
            f"| {100 * accuracy:.1f} | {kl:.3f} |"
        )
    shares = [100 * (value or 0.0) for value in (teacher.entity_f1, teacher.accuracy)]
    print(f"| teacher | {shares[0]:.1f} | | {shares[1]:.1f} | |")


if __name__ == "__main__":
    main()
