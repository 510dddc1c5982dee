"""Which targets bring a student back to its teacher, and at how many bytes?

    python benchmarks/recovery.py --out WORK_DIR [--quick] [--markdown]

The teacher is the demo's: a Llama of 1 M parameters and 1,024 ids, trained on the Python language
reference. Its students learn from the same text, in three regimes:

* from scratch: a Llama of half its width with random weights;
* healed: the teacher without one of its two layers;
* low-bit: the teacher itself with the weights of its layers rounded to 3 bits in every forward pass
  (the gradient goes straight through the rounding).

Everything between teacher and student is the package: `build` writes a cache for each codec (and
for each seed where it draws), `DistillationTrainer` streams it into a `DistilledStudent`. All
students of a regime and a seed begin with the same weights and take the same batches in the same
order for as many steps; they learn from the soft targets alone (alpha = 0), the hard-label student
from the labels alone. The seed is that of the order, of random weights and of the draw; a stored
draw is the same in every epoch.

Measured on held-out text, against the teacher's logits in float32: KL from the teacher and
cross-entropy with the labels, nats a position, T = 1. The error after a mean is its standard error
over seeds: standard deviation by the root of their number. *Gap closed* is the part of the distance
from `sample:10` to the full distribution that a method closes (empty where that distance is not
twice its standard error); differences are taken seed by seed, since the students of a seed share
weights and order. Bytes are those of the targets in the caches that were trained on.

Finished runs are kept in the work folder, so an interrupted benchmark resumes, and --kept reports
what there is. Cost: about 25 minutes of one core. --quick takes little text and one seed: it shows
that the script works, its figures mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from results import keep, machine, table
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
    set_seed,
)

from kdcache import (
    BuildOptions,
    Cache,
    DistillationTrainer,
    DistilledStudent,
    InspectOptions,
    TargetStream,
    build,
    inspect,
)
from kdcache.commands.demo.teacher import (
    TeacherSizes,
    documents,
    make_teacher,
    make_tokenizer,
    write_jsonl,
)
from kdcache.plots import Cloud, Panel, plot_clouds
from kdcache.targets import Codec
from kdcache.tasks import CAUSAL_LM
from kdcache.teacher import quiet_transformers

HERE = Path(__file__).resolve().parent
VOCABULARY, LENGTH, BATCH_ROWS = 1024, 128, 4
BITS = 3
HARD, FULL, USUAL = "hard labels", "full distribution", "`sample:10`"


@dataclass(frozen=True)
class Method:
    """What a student learns from.

    Attributes:
        codec: of the cache.
        tail: of the loss, for top-k.
        alpha: weight of the hard labels.
        student: its loss.
        floats: whether a top-k is stored as imports are, in float16, and not in levels of a byte.
    """

    codec: str
    tail: str = "bucket"
    alpha: float = 0.0
    student: type[DistilledStudent] = DistilledStudent
    floats: bool = False


METHODS = {
    HARD: Method("topk:17", alpha=1.0),
    FULL: Method("dense:float16"),
    "`hidden:int8`": Method("hidden:int8"),
    USUAL: Method("sample:10"),
    "`sample:20`": Method("sample:20"),
    "`sample:40`": Method("sample:40"),
    "`anchored:10`": Method("anchored:10"),
    "`anchored:20`": Method("anchored:20"),
    "`topk:17`, tail bucket": Method("topk:17"),
    "`topk:64`, tail bucket": Method("topk:64"),
    "`topk:100`, tail bucket": Method("topk:100"),
    "`topk:17` in float16, tail bucket": Method("topk:17", floats=True),
    "`topk:64` in float16, tail bucket": Method("topk:64", floats=True),
    "`topk:17`, renormalised": Method("topk:17", "renormalize"),
    "`topk:64`, renormalised": Method("topk:64", "renormalize"),
    "`topk:100`, renormalised": Method("topk:100", "renormalize"),
}


# ---------------------------------------------------------------------------------------- students


def from_scratch(teacher: Path, seed: int) -> Any:
    """A Llama of half the teacher's width, with random weights."""
    set_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
    )


def pruned(teacher: Path, seed: int) -> Any:
    """The teacher without its last layer."""
    student = AutoModelForCausalLM.from_pretrained(teacher)
    student.model.layers = student.model.layers[:1]
    student.config.num_hidden_layers = 1
    return student


class Rounded(nn.Module):
    """Weights on 2^BITS - 1 levels a row, symmetric around zero; the gradient is the identity's."""

    def forward(self, weight: Tensor) -> Tensor:  # noqa: D102
        scale = weight.detach().abs().amax(1, keepdim=True) / (2 ** (BITS - 1) - 1)
        return weight + ((weight / scale).round() * scale - weight).detach()


def low_bit(teacher: Path, seed: int) -> Any:
    """The teacher with the weights of its layers rounded; embeddings stay as they are."""
    student = AutoModelForCausalLM.from_pretrained(teacher)
    for module in student.model.layers.modules():
        if type(module) is nn.Linear:
            parametrize.register_parametrization(module, "weight", Rounded())
    return student


@dataclass(frozen=True)
class Regime:
    """One kind of student.

    Attributes:
        make: from the teacher's folder and a seed.
        rate: peak of the learning rate.
        epochs: over the text.
    """

    make: Callable[[Path, int], Any]
    rate: float
    epochs: int = 1


REGIMES = {
    "from scratch": Regime(from_scratch, 4e-3),
    "healed": Regime(pruned, 1e-3),
    "low-bit": Regime(low_bit, 5e-4),
}


# -------------------------------------------------------------------------------------------- work


class Work:
    """A folder with the teacher, its caches and the runs.

    Attributes:
        methods: what students learn from.
        regimes: the kinds of students.
        length: tokens of a row.
        rows: of a step.
        exact: codec of the held-out targets.
        bf16: whether products of training are in bfloat16, as `kdcache train --precision bf16`.

    Args:
        out: the folder.
        quick: little text.
    """

    methods, regimes = METHODS, REGIMES
    length, rows, exact, bf16 = LENGTH, BATCH_ROWS, "dense", False

    def __init__(self, out: Path, *, quick: bool) -> None:
        self.out, self.quick = out, quick
        self.teacher = out / "teacher"
        out.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        """Text, tokenizer and teacher."""
        if self.teacher.exists():
            return
        train, held_out = documents(40 if self.quick else None)
        write_jsonl(self.out / "train.jsonl", train)
        write_jsonl(self.out / "held-out.jsonl", held_out)
        make_tokenizer(train, self.out / "tokenizer", vocab_size=VOCABULARY)
        make_teacher(
            train,
            held_out,
            self.out / "tokenizer",
            self.teacher,
            TeacherSizes(VOCABULARY, LENGTH, hidden=192, layers=2, heads=6, epochs=6, seed=0),
            lambda step, steps, loss: print(f"teacher: {step} of {steps}, {loss:.3f}", flush=True),
        )

    def cache(self, codec: str, seed: int, corpus: str = "train", *, floats: bool = False) -> Cache:
        """A cache of the teacher; caches of codecs that draw nothing are shared by all seeds."""
        seed = seed if codec.startswith(("sample", "anchored")) else 0
        name = f"{corpus}-{codec.replace(':', '-')}-{seed}{'-floats' * floats}"
        made = Codec.parse
        in_floats = staticmethod(lambda *a: made(*a).in_floats() if floats else made(*a))
        with mock.patch.object(Codec, "parse", in_floats):
            build(
                BuildOptions(
                    teacher=(str(self.teacher),),
                    corpus=(str(self.out / f"{corpus}.jsonl"),),
                    out=str(self.out / "caches" / name),
                    codec=codec,
                    max_length=self.length,
                    workers=0,
                    seed=seed,
                )
            )
        return Cache.open(str(self.out / "caches" / name))

    def run(self, regime: str, method: str, seed: int, *, kept: bool) -> dict[str, Any] | None:
        """Train and measure one student, unless it was done before.

        Args:
            regime: of the student.
            method: what it learns from.
            seed: of order, weights and draw.
            kept: train nothing; None where there is no such run yet.
        """
        how = self.regimes[regime]
        name = "".join(c if c.isalnum() else "-" for c in f"{regime} {method}")
        path = self.out / "runs" / f"{name}-{seed}-{how.rate:g}-{how.epochs}.json"
        if path.exists():
            return json.loads(path.read_text())  # type: ignore[no-any-return]
        if kept:
            return None
        path.parent.mkdir(exist_ok=True)
        begin = time.process_time()
        cache = self.cache(self.methods[method].codec, seed, floats=self.methods[method].floats)
        size = inspect(InspectOptions(cache=cache.url)).target_bytes_per_position
        student = self.train(cache, how, self.methods[method], seed)
        found = {
            "regime": regime,
            "method": method,
            "seed": seed,
            "bytes": 0.0 if method == HARD else size,
            **self.measure(student),
            "cpu_seconds": round(time.process_time() - begin, 1),
        }
        path.write_text(json.dumps(found))
        print(json.dumps(found | {"rows": len(found["rows"])}), flush=True)
        return found

    def before(self, regime: str) -> dict[str, Any]:
        """The measures of a student that has not been trained."""
        return self.measure(DistilledStudent(self.regimes[regime].make(self.teacher, 0), CAUSAL_LM))

    def train(self, cache: Cache, regime: Regime, method: Method, seed: int) -> DistilledStudent:
        """One student."""
        student = method.student(
            regime.make(self.teacher, seed),
            CAUSAL_LM,
            alpha=method.alpha,
            tail=method.tail,
            vocab_size=cache.spec.vocab_size,
        )
        stream = TargetStream(
            cache,
            batch_size=self.rows,
            seed=seed,
            temperature=None if method.alpha == 1 else 1.0,
            group=1000,  # the order is the same, however many bytes a position takes
            drop_last=True,
        )
        trainer = DistillationTrainer(
            model=student,
            args=TrainingArguments(
                str(self.out / "trainer"),
                num_train_epochs=regime.epochs,
                learning_rate=regime.rate,
                weight_decay=0.0,
                adam_beta2=0.98,
                lr_scheduler_type="cosine",
                warmup_steps=regime.epochs * stream.steps // 20,
                save_strategy="no",
                logging_steps=50,
                seed=seed,
                bf16=self.bf16,
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=stream,
        )
        trainer.train()
        return student

    @torch.no_grad()
    def measure(self, student: DistilledStudent) -> dict[str, Any]:
        """KL from the teacher and cross-entropy, means over held-out positions; and KL by row."""
        cache = self.cache(self.exact, 0, "held-out")
        student.eval()
        student.alpha = 0.0
        rows = []
        for batch in TargetStream(cache, batch_size=1, shuffle=False):
            out = student(**batch)
            rows.append((float(out.soft_loss), float(out.hard_loss), float(batch["count"])))
        positions = sum(count for *_, count in rows)
        kl, ce = (sum(row[i] * row[2] for row in rows) / positions for i in (0, 1))
        return {"kl": kl, "cross_entropy": ce, "rows": [row[::2] for row in rows]}


# ------------------------------------------------------------------------------------------ report

FIELDS = ("regime", "method", "seed", "bytes", "kl", "cross_entropy")
Runs = dict[tuple[str, str], dict[int, dict[str, Any]]]


def error(values: Sequence[float]) -> float:
    """Standard error of the mean of at least two values."""
    return statistics.stdev(values) / len(values) ** 0.5


def mean_error(values: Sequence[float], digits: int = 4) -> str:
    """Mean and its standard error; without one for a single value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {error(values):.{digits}f}"


def closed(runs: Runs, regime: str, method: str) -> str:
    """The part of the distance from `sample:10` to the full distribution, where there is one.

    Its standard error is that of the distance from `sample:10`, by seed.
    """
    mine, usual, full = (runs.get((regime, name), {}) for name in (method, USUAL, FULL))
    gap = [usual[seed]["kl"] - full[seed]["kl"] for seed in usual if seed in full]
    if len(gap) < 2 or statistics.fmean(gap) < 2 * error(gap):
        return ""
    gains = [usual[seed]["kl"] - mine[seed]["kl"] for seed in mine if seed in usual]
    return mean_error([gain / statistics.fmean(gap) for gain in gains], digits=2)


def full_on(runs: Runs, regime: str, method: str) -> float:
    """KL that the full distribution ends with, on the seeds of a method."""
    return statistics.fmean(runs[regime, FULL][seed]["kl"] for seed in runs[regime, method])


def regime_table(runs: Runs, regime: str) -> str:
    """One row a method."""
    rows = []
    for method in METHODS:
        found = runs.get((regime, method), {})
        if not found:
            continue
        kl = [run["kl"] for run in found.values()]
        full = full_on(runs, regime, method)
        size = statistics.fmean(run["bytes"] for run in found.values())
        rows.append(
            [
                method,
                f"{size:,.1f}" if size else "",
                str(len(found)),
                mean_error(kl, 5),
                f"{statistics.fmean(kl) / full:.2f}x",
                "" if method in (USUAL, FULL) else closed(runs, regime, method),
                mean_error([run["cross_entropy"] for run in found.values()]),
            ]
        )
    header = ["student learns from", "bytes", "seeds", "KL from the teacher", "of full"]
    return table([*header, "gap closed", "cross-entropy"], rows)


def report(options: argparse.Namespace, runs: Runs, before: dict[str, dict[str, Any]]) -> str:
    """The section of RESULTS.md."""
    parts = [
        f"`python benchmarks/recovery.py{' --quick' * options.quick}`; {machine()}.",
        "Mean ± standard error over seeds, nats a held-out position; bytes a position of targets.",
    ]
    for regime, how in REGIMES.items():
        start = f", from KL {before[regime]['kl']:.4f}" if regime != "from scratch" else ""
        parts += [
            f"### recovery, {regime}",
            f"{how.epochs} epoch{'s' * (how.epochs > 1)}, learning rate {how.rate:g}{start}:",
            regime_table(runs, regime),
        ]
    return "\n\n".join(parts)


def draw(runs: Runs, path: Path) -> None:
    """KL against bytes, a panel a regime, the same colours in each.

    As a multiple of the full distribution's on the same seeds: not every method has the same ones.
    """
    stored = [name for name, how in METHODS.items() if name != HARD and not how.floats]
    drawn = [m for m in stored if any((r, m) in runs for r in REGIMES)]
    panels = []
    for regime in REGIMES:
        clouds: dict[str, list[tuple[float, float, str]]] = {}
        for method in drawn:
            kind, _, how = method.replace("`", "").partition(", ")
            name, _, argument = kind.partition(":")
            points = clouds.setdefault(f"{name}, {how}" if how else name, [])
            found = list(runs.get((regime, method), {}).values())
            if found:
                size, kl = (statistics.fmean(run[f] for run in found) for f in ("bytes", "kl"))
                points.append((size, kl / full_on(runs, regime, method), argument or "all"))
        hard = [run["kl"] for run in runs.get((regime, HARD), {}).values()]
        hard = [statistics.fmean(hard) / full_on(runs, regime, HARD)] if hard else []
        panels.append(
            Panel(
                regime + (f" (hard labels: {hard[0]:.3g})" if hard else ""),
                "KL from the teacher, of the full distribution's",
                [
                    Cloud(label, points, label.startswith("topk"))
                    for label, points in clouds.items()
                ],
            )
        )
    plot_clouds(
        path,
        panels,
        title="How near the teacher a student ends, against the bytes of its targets",
        x_label="bytes per position, targets on disk",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="work folder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="only these methods")
    parser.add_argument("--quick", action="store_true", help="does it work? One seed, little text")
    parser.add_argument(
        "--kept", action="store_true", help="run nothing: report the runs in the work folder"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="keep the result in RESULTS.md, recovery.csv, docs"
    )
    parser.add_argument("--teacher", type=Path, help="a model's folder: see recovery_real.py")
    real = parser.add_argument_group("with --teacher")
    real.add_argument(
        "--text", type=Path, help="passages to learn from: JSON lines, or .gz of them"
    )
    real.add_argument("--positions", type=int, default=200_000)
    real.add_argument("--held-out", type=int, default=16_384, help="positions")
    real.add_argument("--length", type=int, default=256)
    real.add_argument("--rows", type=int, default=4)
    real.add_argument("--epochs", type=int, default=1)
    real.add_argument("--rates", type=float, nargs=3, help="of int4, NVFP4, pruned")
    real.add_argument("--regimes", nargs="+", help="only these regimes")
    real.add_argument("--threads", type=int, default=1)
    real.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    options = parser.parse_args()
    if options.teacher is not None:
        from recovery_real import main_real

        main_real(options)
        return
    torch.set_num_threads(1)
    with quiet_transformers():
        work = Work(options.out, quick=options.quick)
        work.prepare()
        seeds = range(1 if options.quick else options.seeds)
        runs: Runs = {}
        for seed, method, regime in itertools.product(seeds, options.only or METHODS, REGIMES):
            found = work.run(regime, method, seed, kept=options.kept)
            if found:
                runs.setdefault((regime, method), {})[seed] = found
        before = {regime: work.before(regime) for regime in REGIMES}
    text = report(options, runs, before)
    print(text)
    if options.markdown:
        keep("recovery", text)
        draw(runs, HERE.parent / "docs" / "recovery.png")
        with (HERE / "recovery.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(run for by_seed in runs.values() for run in by_seed.values())


if __name__ == "__main__":
    main()
