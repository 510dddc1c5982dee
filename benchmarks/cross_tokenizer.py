"""Does a teacher help a student that has another tokenizer?

    python benchmarks/cross_tokenizer.py --corpus novels.jsonl.gz --out WORK_DIR [--quick]
        [--pieces DIR] [--large DIR] [--seeds 0 1 2] [--tune] [--markdown]

The teacher is a Llama of 1.3 M parameters with 2,048 ids of a byte-level BPE, trained once over 3.6
million characters of novels. Its cache (`topk:64`) is of other passages, 800,000 characters, on
which its students learn: a Llama of a third of its width with random weights, with

* a BPE of its own, 2,048 ids of the students' passages;
* single bytes, 257 ids;
* SentencePiece pieces, the 512 ids of another model's tokenizer (`--pieces`);
* a large vocabulary: 49,152 ids of another model's tokenizer (`--large`), the first seed alone;
* the teacher's own ids: what can be reached, distilled as usual.

Each learns from its hard labels alone (alpha = 1), hybrid, and by likelihood, the last one on hard
labels and by `topk:64`. All runs are `kdcache train` with the same rows, order, number of steps and
schedule; the seed is that of order and weights.

`--tune` tries settings, on other passages and with another seed than the runs that are reported:
learning rates for hard labels, and alpha and the likelihoods' temperature for the other two. The
constant CHOSEN has what the reported runs take.

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
from kdcache.stream.text import cached_rows
from kdcache.tasks import IGNORE
from kdcache.teacher import quiet_transformers

LENGTH, ROWS = 128, 8
RATE = 2e-3  # the best of those tried on hard labels
EPOCHS = 3
TEACHER_IDS, OWN_IDS = 2048, 2048
PARTS = {  # characters
    "held-out": 150_000, "train": 800_000, "teacher": 3_600_000,
    "tuning held-out": 100_000, "tuning": 800_000,
}  # fmt: skip
HARD, LIKELIHOOD, HYBRID, USUAL = "hard labels", "likelihood", "hybrid", "`topk:64`, as usual"
OWN, BYTES, PIECES, LARGE = "another BPE", "bytes", "SentencePiece", "SmolLM2's BPE"
SAME = "the teacher's"
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


@dataclass(frozen=True)
class Setting:
    """What a run takes, and `--tune` tries.

    Attributes:
        rate: of learning.
        alpha: weight of the hard labels.
        tau: `--likelihood-temperature`.
    """

    rate: float = RATE
    alpha: float = 0.5
    tau: float = 10.0


STUDENTS = [
    *(Student(OWN, m) for m in (HARD, HYBRID, LIKELIHOOD)),
    *(Student(SAME, m) for m in (HARD, USUAL)),
    *(Student(t, m) for t in (PIECES, BYTES, LARGE) for m in (HARD, HYBRID, LIKELIHOOD)),
]
CHOSEN = {
    HARD: Setting(alpha=1.0),
    USUAL: Setting(alpha=0.1),
    HYBRID: Setting(alpha=0.1),
    LIKELIHOOD: Setting(alpha=0.5, tau=1.0),
}
TUNING_SEED = 100
TRIED = [
    *((HARD, Setting(rate, 1.0)) for rate in (1e-3, 2e-3, 4e-3, 8e-3)),
    *(
        (method, Setting(RATE, alpha, tau))
        for method, taus in ((USUAL, (10.0,)), (HYBRID, (10.0,)), (LIKELIHOOD, (1.0, 10.0)))
        for alpha in (0.5, 0.1)
        for tau in taus
    ),
]


class Work:
    """A folder with the teacher, its caches and the runs.

    Args:
        out: the folder.
        corpus: novels.
        more: folders of further tokenizers.
        quick: little text.
    """

    def __init__(self, out: Path, corpus: str, more: dict[str, Path], *, quick: bool) -> None:
        self.out, self.corpus, self.quick = out, corpus, quick
        self.tokenizers = {SAME: out / "tokenizer", OWN: out / "bpe", BYTES: out / "bytes"}
        self.tokenizers |= more
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
        for name in set(PARTS) - {"teacher"}:
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

    def run(
        self, student: Student, setting: Setting, seed: int, *, kept: bool = False
    ) -> dict[str, Any] | None:
        """Train and measure one student, unless it was done before; see `recovery.py`.

        The seed of tuning has passages of its own.
        """
        tuning = "tuning" if seed == TUNING_SEED else ""
        named = f"{student.tokens} {student.method} {setting.rate} {setting.alpha} {setting.tau}"
        name = "".join(c if c.isalnum() else "-" for c in named)
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
            options["likelihood_temperature"] = setting.tau
        result = train(
            TrainOptions(
                cache=(str(self.out / "caches" / (tuning or "train")),),
                student=str(config),
                out=str(self.out / "students" / f"{name}-{seed}"),
                alpha=setting.alpha,
                learning_rate=setting.rate,
                lr_scheduler="cosine",
                warmup=0.05,
                epochs=EPOCHS,
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
            "setting": vars(setting),
            "bits": self.measure(Path(result.out), student.tokens, f"{tuning} held-out".strip()),
            "steps": result.steps,
            "cpu_seconds": round(time.process_time() - begin, 1),
        }
        path.write_text(json.dumps(found))
        print(json.dumps(found), flush=True)
        return found

    @torch.no_grad()
    def measure(self, folder: Path, tokens: str, part: str = "held-out") -> float:
        """Bits per byte of the held-out chunks."""
        cache = Cache.open(str(self.out / "caches" / part))
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
    chosen = "; ".join(
        f"{method}: alpha {s.alpha:g}"
        + f", likelihood temperature {s.tau:g}" * (method in (HYBRID, LIKELIHOOD))
        for method, s in CHOSEN.items()
        if method != HARD
    )
    return "\n\n".join(
        [
            f"`{command}`; {machine()}.",
            f"{steps} steps of {ROWS} rows ({EPOCHS} epochs), learning rate {RATE:g}; {chosen}. "
            f"The teacher itself: {teacher:.4f} bits per byte. Mean ± standard error over seeds; "
            "differences seed by seed.",
            table(header, rows),
        ]
    )


def tune(work: Work, *, kept: bool) -> str:
    """Runs on the passages for tuning, as a table."""
    rows = []
    for method, setting in TRIED:
        student = Student(SAME if method == USUAL else OWN, method)
        found = work.run(student, setting, TUNING_SEED, kept=kept)
        if found:
            values = [f"{setting.rate:g}", f"{setting.alpha:g}", f"{setting.tau:g}"]
            rows.append([method, *values, f"{found['bits']:.4f}"])
    if not rows:
        return ""
    header = ["learns from", "learning rate", "alpha", "temperature", "bits per byte"]
    return f"Tuning, on other passages and with another seed:\n\n{table(header, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", required=True, help="JSONL of passages with a `text`")
    parser.add_argument("--out", type=Path, required=True, help="work folder")
    parser.add_argument("--pieces", type=Path, help="folder of a SentencePiece tokenizer")
    parser.add_argument("--large", type=Path, help="folder of SmolLM2's tokenizer")
    parser.add_argument("--tune", action="store_true", help="try settings, and nothing else")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", nargs="+", help="only students with these (default: all)")
    parser.add_argument("--quick", action="store_true", help="does it work? One seed, little text")
    parser.add_argument(
        "--kept", action="store_true", help="run nothing: report the runs in the work folder"
    )
    parser.add_argument("--markdown", action="store_true", help="keep the result in RESULTS.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    more = {PIECES: options.pieces, LARGE: options.large}
    more = {tokens: folder for tokens, folder in more.items() if folder is not None}
    with quiet_transformers():
        work = Work(options.out, options.corpus, more, quick=options.quick)
        work.prepare()
        if options.tune:
            print(tune(work, kept=options.kept))
            return
        runs: Runs = {}
        seeds = options.seeds[:1] if options.quick else options.seeds
        for student, seed in itertools.product(STUDENTS, seeds):
            if student.tokens not in (options.tokens or work.tokenizers):
                continue
            if student.tokens == LARGE and seed != seeds[0]:
                continue  # its output layer takes ten times the rest
            found = work.run(student, CHOSEN[student.method], seed, kept=options.kept)
            if found:
                runs.setdefault(student, {})[seed] = found
        text = report(options, runs, work.measure(options.out / "teacher", SAME))
        tried = tune(work, kept=True)
        text += f"\n\n{tried}" if tried else ""
    print(text)
    if options.markdown:
        keep("cross-tokenizer", text)


if __name__ == "__main__":
    main()
