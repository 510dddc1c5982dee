"""Should documents that share a row read each other? What it does to a teacher and to its student.

    python benchmarks/attend.py --corpus novels.jsonl.gz --teacher STORIES260K --out WORK_DIR
        [--reader SMOLLM2] [--markdown]

Documents are paragraphs of novels of 300 characters or more, in the order of the book, where what
stands before a document belongs to it, and shuffled, where it does not. Each corpus is built twice,
with `--attend row` and `--attend document`; students of one seed begin with the same weights, learn
from all of the teacher's hidden states (alpha = 0.1), and are measured on held-out documents, alone
and in rows.

The teacher's cross-entropy is that of the labels which both builds have: a document's first token
has none where documents do not read each other, and would weigh on the other side alone. `--reader`
is a second teacher, of which only that is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
from results import keep, machine, table

import kdcache
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.evaluate.options import EvaluateOptions
from kdcache.commands.train.options import TrainOptions
from kdcache.corpus import Corpus
from kdcache.targets.label_logprob import decode_logprobs
from kdcache.tasks import IGNORE

MODES = ("row", "document")
LEAST = 300  # characters of a document
STUDENT = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def documents(corpus: str) -> Iterator[tuple[int, str]]:
    """Paragraphs, joined until they are long enough, with the number of their passage."""
    passages = (
        record.values["text"]
        for span in Corpus.open([corpus], span_bytes=1 << 40).spans
        for record in Corpus.read(span)
    )
    for number, passage in enumerate(passages):
        text = ""
        for paragraph in passage.split("\n\n"):
            text = f"{text}\n\n{paragraph.strip()}".strip()
            if len(text) >= LEAST:
                yield number, text
                text = ""


def write(path: Path, texts: list[str], characters: int, shuffled: bool) -> Path:
    """The first documents, up to a number of characters."""
    sizes = np.cumsum([len(text) for text in texts])
    chosen = texts[: int(np.searchsorted(sizes, characters)) + 1]
    if shuffled:
        random.Random(0).shuffle(chosen)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
    return path


def build(teacher: str, corpus: Path, attend: str, codec: str) -> str:
    """A cache beside its corpus."""
    out = f"{corpus.with_suffix('')}-{Path(teacher).name}-{attend}"
    kdcache.build(
        BuildOptions(
            (teacher,), (str(corpus),), out, attend=attend, codec=codec, max_length=512, workers=0
        )
    )
    return out


def nats(row: str, document: str) -> tuple[float, float]:
    """The teacher's cross-entropy of the labels that both caches have."""
    sums, count = np.zeros(2), 0
    whole, apart = kdcache.Cache.open(row), kdcache.Cache.open(document)
    for shard in range(whole.spec.spans):
        a, b = whole.read(shard, targets=False), apart.read(shard, targets=False)
        for i in range(min(len(a), len(b))):
            mine, theirs = a.row(i), b.row(i)
            n = len(theirs.labels)
            assert np.array_equal(mine.input_ids[:n], theirs.input_ids)
            assert a.label_logprob is not None
            assert b.label_logprob is not None
            one, other = (
                decode_logprobs(part.label_logprob[slice(*part.position_offsets[i : i + 2])])
                for part in (a, b)
            )
            kept = (theirs.labels != IGNORE)[mine.labels[:n] != IGNORE]
            sums -= one[: len(kept)][kept].sum(), other.sum()
            count += len(other)
    return float(sums[0] / count), float(sums[1] / count)


def train(cache: str, config: Path, seed: int, out: str) -> str:
    """A student of one cache."""
    if not (Path(out) / "train.json").exists():
        kdcache.train(
            TrainOptions(
                cache=(cache,), student=str(config), out=out, alpha=0.1, seed=seed, epochs=2,
                batch_size=8, learning_rate=3e-3, warmup=0.05, lr_scheduler="cosine",
                logging_steps=100,
            )
        )  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--reader")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--characters", type=int, default=1_500_000)
    parser.add_argument("--held-out", type=int, default=150_000)
    parser.add_argument("--read", type=int, default=60_000, help="characters for the reader")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    config = options.out / "student.json"
    config.write_text(json.dumps(STUDENT))
    found = list(documents(options.corpus))
    learnt = [text for number, text in found if number % 16 in (5, 11)]
    held_out = [text for number, text in found if number % 16 == 0]
    teachers, students = [], []
    for name, shuffled in (("as in the book", False), ("shuffled", True)):
        folder = options.out / name.replace(" ", "-")
        folder.mkdir(exist_ok=True)
        corpus = write(folder / "train.jsonl", learnt, options.characters, shuffled)
        test = write(folder / "test.jsonl", held_out, options.held_out, shuffled)
        caches = {mode: build(options.teacher, corpus, mode, "hidden:float16") for mode in MODES}
        tests = {mode: build(options.teacher, test, mode, "hidden:float16") for mode in MODES}
        found_nats = [(Path(options.teacher).name, nats(tests["row"], tests["document"]))]
        if options.reader:
            some = write(folder / "read.jsonl", held_out, options.read, shuffled)
            pair = [build(options.reader, some, mode, "topk:4") for mode in MODES]
            found_nats.append((Path(options.reader).name, nats(*pair)))
        teachers += [[name, who, *(f"{x:.3f}" for x in pair)] for who, pair in found_nats]
        print(*teachers, sep="\n", flush=True)
        for learns in MODES:
            scores = []
            for seed in range(options.seeds):
                run = train(caches[learns], config, seed, str(folder / f"{learns}-{seed}"))
                scores.append(
                    [
                        kdcache.evaluate(EvaluateOptions(student=(run,), cache=tests[mode])).models[
                            1
                        ]
                        for mode in MODES
                    ]
                )
            cells = [
                f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}"
                for at in range(2)
                for values in (
                    [score[at].kl for score in scores],
                    [score[at].cross_entropy for score in scores],
                )
            ]
            students.append([name, learns, *cells])
            print(students[-1], flush=True)
    text = (
        f"{machine()}. Two epochs of {options.characters:,} characters in documents of about "
        f"{LEAST}, {options.seeds} seeds; rows of 512 tokens.\n\nThe teacher's cross-entropy over "
        "the labels that both have (nats):\n\n"
        + table(["documents", "teacher", "`--attend row`", "`--attend document`"], teachers)
        + "\n\nStudents, on held-out documents in rows and alone (mean and deviation over "
        "seeds):\n\n"
        + table(
            ["documents", "trained with", "KL, rows", "cross-entropy, rows", "KL, documents",
             "cross-entropy, documents"],
            students,
        )
    )  # fmt: skip
    print(text)
    if options.markdown:
        keep("Documents that share a row", text)


if __name__ == "__main__":
    main()
