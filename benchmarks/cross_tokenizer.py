"""Does a teacher help a student that has another tokenizer?

    python benchmarks/cross_tokenizer.py --corpus novels.jsonl.gz --out WORK_DIR [--quick]
        [--seeds 0 1 2] [--markdown]

The teacher is a Llama of 1.3 M parameters with 2,048 ids of a byte-level BPE, trained once over 3.6
million characters of novels. Its cache (`topk:64`) is of other passages, 800,000 characters, on
which its students learn: a Llama of a third of its width with random weights, with

* a BPE of its own, 2,048 ids of the students' passages;
* single bytes, 257 ids;
* SentencePiece pieces, the 512 ids of another model's tokenizer (`--pieces`);
* the teacher's own ids: what can be reached, distilled as usual.

Each learns from its hard labels alone (alpha = 1), hybrid, and by likelihood (alpha = 0.5), the
last one on hard labels and by `topk:64`. All runs are `kdcache train` with the same rows, order,
number of steps and schedule; the seed is that of order and weights.

Measured on held-out passages in the same rows: bits per byte of the chunks that student and teacher
share, summed and divided by their bytes, which are nearly all for each. *Distance closed* is the
part of the distance from hard labels to what can be reached: gains by seed, by the mean distance.

Finished runs are kept in the work folder: an interrupted benchmark goes on, --kept reports what
there is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from results import keep, machine, table
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcache import BuildOptions, Cache, TrainOptions, build, train
from kdcache.align import Aligner, TokenBytes
from kdcache.commands.demo.teacher import TeacherSizes, make_teacher, make_tokenizer, write_jsonl
from kdcache.corpus import Corpus
from kdcache.files import write_text
from kdcache.stream.cached_rows import cached_rows
from kdcache.tasks import IGNORE
from kdcache.teacher import quiet_transformers

LENGTH, ROWS = 128, 8
TEACHER_IDS, OWN_IDS = 2048, 2048
PARTS = {"held-out": 150_000, "train": 800_000, "teacher": 3_600_000}  # characters
HARD, LIKELIHOOD, HYBRID, USUAL = "hard labels", "likelihood", "hybrid", "`topk:64`, as usual"
OWN, BYTES, PIECES, SAME = "another BPE", "bytes", "SentencePiece", "the teacher's"
STUDENT = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class Student:
    """One kind of student.

    Attributes:
        tokens: what it reads.
        method: what it learns from.
    """

    tokens: str
    method: str


STUDENTS = [
    *(Student(OWN, m) for m in (HARD, HYBRID, LIKELIHOOD)),
    *(Student(SAME, m) for m in (HARD, USUAL)),
    *(Student(t, m) for t in (BYTES, PIECES) for m in (HARD, HYBRID, LIKELIHOOD)),
]


class Work:
    """A folder with the teacher, its caches and the runs.

    Args:
        out: the folder.
        corpus: novels.
        pieces: folder of a SentencePiece tokenizer; None leaves it out.
        quick: little text.
    """

    def __init__(self, out: Path, corpus: str, pieces: str | None, *, quick: bool) -> None:
        self.out, self.corpus, self.quick = out, corpus, quick
        self.tokenizers = {SAME: out / "tokenizer", OWN: out / "bpe", BYTES: out / "bytes"}
        if pieces is not None:
            self.tokenizers[PIECES] = Path(pieces)
        out.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        """Texts, tokenizers, teacher and caches."""
        if not (self.out / "teacher").exists():
            passages = [
                record.values["text"]
                for span in Corpus.open([self.corpus], span_bytes=1 << 40).spans
                for record in Corpus.read(span)
            ]
            random.Random(0).shuffle(passages)
            taken: dict[str, list[str]] = {}
            for name, characters in PARTS.items():
                taken[name] = []
                while sum(map(len, taken[name])) < characters // (20 if self.quick else 1):
                    taken[name].append(passages.pop())
                write_jsonl(self.out / f"{name}.jsonl", taken[name])
            make_tokenizer(taken["teacher"], self.out / "tokenizer", vocab_size=TEACHER_IDS)
            make_tokenizer(taken["train"], self.out / "bpe", vocab_size=OWN_IDS)
            make_tokenizer(taken["train"][:1], self.out / "bytes", vocab_size=257)
            make_teacher(
                taken["teacher"],
                taken["held-out"],
                self.out / "tokenizer",
                self.out / "teacher",
                TeacherSizes(TEACHER_IDS, LENGTH, hidden=192, layers=2, heads=6, epochs=1, seed=0),
                lambda step, steps, loss: print(
                    f"teacher: {step} of {steps}, {loss:.3f}", flush=True
                ),
            )
        write_text(self.out / "student.json", json.dumps(STUDENT))
        for name in ("train", "held-out"):
            build(
                BuildOptions(
                    teacher=(str(self.out / "teacher"),),
                    corpus=(str(self.out / f"{name}.jsonl"),),
                    out=str(self.out / "caches" / name),
                    codec="topk:64",
                    max_length=LENGTH,
                    workers=0,
                )
            )

    def run(self, student: Student, seed: int, *, kept: bool) -> dict[str, Any] | None:
        """Train and measure one student, unless it was done before; see `recovery.py`."""
        name = "".join(c if c.isalnum() else "-" for c in f"{student.tokens} {student.method}")
        path = self.out / "runs" / f"{name}-{seed}.json"
        if path.exists():
            return json.loads(path.read_text())  # type: ignore[no-any-return]
        if kept:
            return None
        path.parent.mkdir(exist_ok=True)
        begin = time.process_time()
        config = self.out / "student.json"
        options: dict[str, Any] = {}
        if student.tokens != SAME:
            method = student.method if student.method in (LIKELIHOOD, HYBRID) else LIKELIHOOD
            options["cross_tokenizer"] = method
            options["student_tokenizer"] = str(self.tokenizers[student.tokens])
        result = train(
            TrainOptions(
                cache=(str(self.out / "caches" / "train"),),
                student=str(config),
                out=str(self.out / "students" / f"{name}-{seed}"),
                alpha=1.0 if student.method == HARD else 0.5,
                learning_rate=4e-3,
                lr_scheduler="cosine",
                warmup=0.05,
                batch_size=ROWS,
                shuffle_shards=1000,
                seed=seed,
                report_to=("none",),
                **options,
            )
        )
        found: dict[str, Any] = {
            "tokens": student.tokens,
            "method": student.method,
            "seed": seed,
            "bits": self.measure(Path(result.out), student.tokens),
            "steps": result.steps,
            "cpu_seconds": round(time.process_time() - begin, 1),
        }
        path.write_text(json.dumps(found))
        print(json.dumps(found), flush=True)
        return found

    @torch.no_grad()
    def measure(self, folder: Path, tokens: str) -> float:
        """Bits per byte of the held-out chunks."""
        cache = Cache.open(str(self.out / "caches" / "held-out"))
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        own = TokenBytes(AutoTokenizer.from_pretrained(self.tokenizers[tokens]))
        aligner = Aligner(TokenBytes(cache.tokenizer()), own)
        nats, size = 0.0, 0
        for shard in range(cache.spec.spans):
            for row in aligner.align(cached_rows(cache, cache.read(shard, targets=False))):
                labels = torch.from_numpy(row.labels)
                logits = model(torch.from_numpy(row.input_ids)[None]).logits[0, labels != IGNORE]
                own_labels = labels[labels != IGNORE]
                losses = torch.nn.functional.cross_entropy(logits, own_labels, reduction="none")
                sums = np.concatenate([[0.0], losses.double().cumsum(0).numpy()])
                nats += float((sums[row.student_spans[:, 1]] - sums[row.student_spans[:, 0]]).sum())
                size += int(row.chunk_bytes.sum())
        return nats / size / math.log(2)


def mean_error(values: Sequence[float], digits: int = 4) -> str:
    """Mean and its standard error; without one for a single value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


Runs = dict[Student, dict[int, dict[str, Any]]]


def closed(runs: Runs, student: Student) -> str:
    """The part of the distance from its hard labels to what can be reached."""
    hard, best = runs.get(Student(student.tokens, HARD), {}), runs.get(Student(SAME, USUAL), {})
    seeds = [seed for seed in runs[student] if seed in hard and seed in best]
    if not seeds or student.method in (HARD, USUAL):
        return ""
    gains = [hard[s]["bits"] - runs[student][s]["bits"] for s in seeds]
    distance = statistics.fmean(hard[s]["bits"] - best[s]["bits"] for s in seeds)
    return mean_error([gain / distance for gain in gains], digits=2)


def report(options: argparse.Namespace, runs: Runs, teacher: float) -> str:
    """The section of RESULTS.md."""
    rows = []
    for student in STUDENTS:
        found = runs.get(student, {})
        if not found:
            continue
        hard = runs.get(Student(student.tokens, HARD), {})
        gains = [hard[s]["bits"] - run["bits"] for s, run in found.items() if s in hard]
        rows.append(
            [
                student.tokens,
                student.method,
                str(len(found)),
                mean_error([run["bits"] for run in found.values()]),
                mean_error(gains) if gains and student.method != HARD else "",
                closed(runs, student),
            ]
        )
    steps = next(iter(next(iter(runs.values())).values()))["steps"]
    header = ["tokens of the student", "learns from", "seeds", "bits per byte", "gained"]
    header.append("distance closed")
    command = f"python benchmarks/cross_tokenizer.py{' --quick' * options.quick}"
    return "\n\n".join(
        [
            f"`{command}`; {machine()}.",
            f"{steps} steps of {ROWS} rows; the teacher itself: {teacher:.4f} bits per byte. Mean "
            "± standard error over seeds; differences seed by seed.",
            table(header, rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", required=True, help="JSONL of passages with a `text`")
    parser.add_argument("--out", type=Path, required=True, help="work folder")
    parser.add_argument("--pieces", help="folder of a SentencePiece tokenizer")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", nargs="+", help="only students with these (default: all)")
    parser.add_argument("--quick", action="store_true", help="does it work? One seed, little text")
    parser.add_argument(
        "--kept", action="store_true", help="run nothing: report the runs in the work folder"
    )
    parser.add_argument("--markdown", action="store_true", help="keep the result in RESULTS.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with quiet_transformers():
        work = Work(options.out, options.corpus, options.pieces, quick=options.quick)
        work.prepare()
        runs: Runs = {}
        seeds = options.seeds[:1] if options.quick else options.seeds
        for seed, student in itertools.product(seeds, STUDENTS):
            if student.tokens in (options.tokens or work.tokenizers):
                found = work.run(student, seed, kept=options.kept)
                if found:
                    runs.setdefault(student, {})[seed] = found
        text = report(options, runs, work.measure(options.out / "teacher", SAME))
    print(text)
    if options.markdown:
        keep("cross-tokenizer", text)


if __name__ == "__main__":
    main()
