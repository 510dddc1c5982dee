"""Which defaults of the biLSTM learn soonest, over five sets of texts?

    python benchmarks/bilstm.py --shared SHARED --seeds 2

Hard labels alone, and otherwise what `kdcache train` does by default: AdamW at 1e-3 with a linear
decay, 32 rows a step, gradients of norm 1 at most. The sets: sentences of SST-2, all and 500 of
them; reviews of twelve such sentences, three quarters of which are of the review's class; passages
and sentences of 15 novels, whose class is the novel. Accuracy on held-out texts after a third of
the steps and at the end; the commonest class beside it.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import random
import re
import statistics
import time
from pathlib import Path

import torch
from results import keep, machine, table
from torch.nn import functional

from kdcache.student.load import load_student
from kdcache.student.tokens import StudentInfo, student_tokenize

Texts = list[tuple[str, int]]
BATCH, RATE = 32, 1e-3


def sst2(shared: Path, name: str) -> Texts:
    """The sentences of a split."""
    lines = (shared / "data/sst2" / f"{name}.tsv").read_text().splitlines()
    return [(text, int(label)) for text, label in (line.rsplit("\t", 1) for line in lines)]


def reviews(sentences: Texts, count: int, rng: random.Random) -> Texts:
    """Long reviews: nine sentences of the review's class and three of the other, shuffled."""
    of_class = [[text for text, label in sentences if label == k] for k in (0, 1)]
    found = []
    for i in range(count):
        some = rng.sample(of_class[i % 2], 9) + rng.sample(of_class[1 - i % 2], 3)
        rng.shuffle(some)
        found.append((" . ".join(some), i % 2))
    return found


def novels(shared: Path, rng: random.Random) -> Texts:
    """Passages of 15 novels."""
    with gzip.open(shared / "data/gutenberg/novels.jsonl.gz", "rt") as file:
        records = [json.loads(line) for line in file]
    names = sorted({record["source"] for record in records})
    found = [(record["text"], names.index(record["source"])) for record in records]
    rng.shuffle(found)
    return found


def sentences_of(passages: Texts) -> Texts:
    """One sentence of at least eight words from the middle of each passage."""
    found = []
    for text, label in passages:
        parts = [part for part in re.split(r"(?<=[.!?])\s+", text) if len(part.split()) >= 8]
        if parts:
            found.append((parts[len(parts) // 2], label))
    return found


def sets(shared: Path) -> dict[str, tuple[Texts, Texts, int, int]]:
    """Training and held-out texts, epochs, and the words of a row at most."""
    rng = random.Random(0)
    train, test = sst2(shared, "train"), sst2(shared, "test")
    rng.shuffle(train)
    passages = novels(shared, rng)
    short = sentences_of(passages)
    return {
        "SST-2": (train, test, 3, 64),
        "SST-2, 500 rows": (train[:500], test, 12, 64),
        "long reviews": (reviews(train, 500, rng), reviews(test, 400, rng), 6, 256),
        "novels, passages": (passages[:500], passages[1000:1400], 9, 96),
        "novels, sentences": (short[:2000], short[3000:3600], 6, 40),
    }


def run(
    data: tuple[Texts, Texts, int, int], options: dict[str, object], seed: int
) -> tuple[float, float]:
    """Accuracy after a third of the steps and at the end."""
    train, test, epochs, length = data
    classes = max(label for _, label in train) + 1
    info = StudentInfo(
        task="sequence-classification",
        vocab_size=1,
        num_labels=classes,
        label_names=tuple(map(str, range(classes))),
        max_length=length,
        texts=(text for text, _ in train),
        seed=seed,
    )
    model = load_student("bilstm", info, options=options)
    tokenize = student_tokenize(model, "bilstm", info)

    def batch(rows: Texts) -> tuple[torch.Tensor, torch.Tensor]:
        ids = tokenize([text for text, _ in rows])["input_ids"]
        return ids, torch.tensor([label for _, label in rows])

    def accuracy() -> float:
        model.eval()
        right = 0
        with torch.inference_mode():
            for i in range(0, len(test), 100):
                ids, labels = batch(test[i : i + 100])
                right += int((model(ids).logits.argmax(-1) == labels).sum())
        model.train()
        return right / len(test)

    rng = random.Random(seed)
    torch.manual_seed(seed)
    steps = epochs * -(-len(train) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    third = 0.0
    for epoch in range(epochs):
        rows = rng.sample(train, len(train))
        for i in range(0, len(rows), BATCH):
            ids, labels = batch(rows[i : i + BATCH])
            loss = functional.cross_entropy(model(ids).logits, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            decay.step()
        if epoch + 1 == epochs // 3:
            third = accuracy()
    return third, accuracy()


def main() -> None:
    """Train every variant on every set, and keep the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="sets to measure, printed and not kept")
    given = parser.parse_args()
    variants: dict[str, dict[str, object]] = {
        "last": {"pooling": "last"},
        "max": {"pooling": "max"},
    }
    rows, begin = [], time.perf_counter()
    for name, data in sets(given.shared).items():
        if given.only and name not in given.only:
            continue
        counted = collections.Counter(label for _, label in data[1])
        cells = [f"{100 * max(counted.values()) / len(data[1]):.1f}"]
        for options in variants.values():
            found = [run(data, options, seed) for seed in range(given.seeds)]
            cells.append(
                " → ".join(
                    f"{100 * statistics.mean(part):.1f}" for part in zip(*found, strict=True)
                )
            )
            print(name, options, found, f"{time.perf_counter() - begin:.0f} s", flush=True)
        steps = data[2] * -(-len(data[0]) // BATCH)
        rows.append([name, f"{len(data[0]):,}", str(steps), *cells])
    header = ["texts", "rows", "steps", "commonest class", *(f"`{name}`" for name in variants)]
    text = (
        f"`python benchmarks/bilstm.py --seeds {given.seeds}`; {machine()}. Test accuracy in "
        "percent after a third of the steps → at the end, hard labels, means over seeds.\n\n"
    )
    print(text := text + table(header, rows))
    if not given.only:
        keep("Defaults of the biLSTM", text)


if __name__ == "__main__":
    main()
