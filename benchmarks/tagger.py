"""A tagger by distillation: how much better is a biLSTM with sentences that nobody has tagged?

    python benchmarks/tagger.py --data DAT --encoder MINILM --transfer WORDS.jsonl --out WORK_DIR

The data are the 900 sentences of CoNLL-2000's chunks (Wall Street Journal, 21,068 words) that ship
with the sources of libwapiti, as `chtrain.txt` and `chtest.txt`: every second one is for training,
the others are dev and test in turn. The transfer set is lists of words without tags. Every student
is trained from one cache by `kdcache.train`, on hard labels alone or with the transfer set, the
best epoch by the F1 of entities (chunks) on dev. The table is of the test part.

Finished steps are kept in the work folder, so an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import kdcache
from kdcache.commands.evaluate.options import EvaluateOptions

COLUMNS = ("tokens", "pos", "tags")
TASK = "token-classification"
BILSTM: dict[str, Any] = {
    "student": "bilstm", "best": "f1", "batch_size": 32, "learning_rate": 2e-3,
    "embedding_size": 100, "hidden_size": 128, "dropout": 0.3,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "hard": {"cache": ("train",), "alpha": 1.0, "epochs": 12},
    "transfer": {
        "cache": ("train", "transfer"), "alpha": 0.1, "temperature": 2.0, "epochs": 4,
    },
}  # fmt: skip


def split(data: Path, out: Path) -> None:
    """Write train, dev and test."""
    sentences = [
        sentence
        for name in ("chtrain.txt", "chtest.txt")
        for sentence in (data / name).read_text().strip().split("\n\n")
        if sentence.strip()
    ]
    rest = sentences[1::2]
    parts = {"train": sentences[::2], "dev": rest[::2], "test": rest[1::2]}
    for name, some in parts.items():
        (out / f"{name}.conll").write_text("\n\n".join(some) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "encoder", "transfer", "out"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    split(given.data, out)
    kdcache.finetune(
        kdcache.FinetuneOptions(
            model=str(given.encoder), task=TASK, corpus=(str(out / "train.conll"),),
            eval_corpus=(str(out / "dev.conll"),), columns=COLUMNS, out=str(out / "teacher"),
            epochs=3, freeze=3, batch_size=16, learning_rate=3e-4, max_length=96,
        )
    )  # fmt: skip
    for name in ("train", "dev", "test", "transfer"):
        corpus = given.transfer if name == "transfer" else out / f"{name}.conll"
        kdcache.build(
            kdcache.BuildOptions(
                teacher=(str(out / "teacher"),), task=TASK, corpus=(str(corpus),),
                columns=None if name == "transfer" else COLUMNS, out=str(out / f"c-{name}"),
                max_length=96, workers=0,
            )
        )  # fmt: skip
    for seed in range(given.seeds):
        for name, options in RUNS.items():
            caches = tuple(str(out / f"c-{cache}") for cache in options["cache"])
            settings = {**BILSTM, **options, "cache": caches, "seed": seed}
            kdcache.train(
                kdcache.TrainOptions(
                    eval_cache=(str(out / "c-dev"),), out=str(out / f"{name}-{seed}"), **settings
                )
            )
    print("| model | chunk F1, % | std | accuracy, % | KL |\n|---|---|---|---|---|")
    for name in RUNS:
        students = tuple(str(out / f"{name}-{seed}") for seed in range(given.seeds))
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
