"""The same question with real weights, a large vocabulary and the field's own quantisers.

    python benchmarks/recovery.py --teacher FOLDER --text PASSAGES --out WORK_DIR [--positions N]

The teacher is any causal language model; its students are those of `examples/recovery/students.py`:

* int4: torchao's fake-quantised int4 weights, groups of 32;
* NVFP4: torchao's own numbers of NVFP4 weights, blocks of 16 with E4M3 scales;
* pruned: the teacher without the tenth of its layers (at least one) of least Block Influence.

They learn from passages of novels, one epoch of N positions, and are measured on the Python
language reference. All else is as in `recovery.py`: the same weights, batches, order and number of
steps for every method, alpha = 0 but for hard labels, runs kept in the work folder, one file each,
so that the same command goes on where it was stopped; --kept reports what there is.

The ghost token is Megatron-LM's rule (`topk_kl_div` of its `cached_logits_loss.py` with
`add_ghost_token`, read in 2026): the log-probabilities of the best k in float16, and one further
token that has what they leave of 1, at least 1e-8, of teacher and of student. `topk`'s own tail is
the teacher's mass outside of the k, measured. *Recovered* is the part of the damage that is gone:
1 - KL / KL before. Errors are standard errors over seeds, that of a ratio over ratios of one seed;
with one seed that of a ratio is over held-out rows, and says nothing of other seeds.

The teacher runs once: all caches but `hidden` are transcoded from its states in float16. With
--precision bf16 the products of training are in bfloat16; measured is in float32. Needs torchao.
Cost with SmolLM2-135M: 120 positions a second of CPU time (bfloat16, AMX); with stories260k
(260,032 parameters) some thousands.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import importlib.util
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from recovery import HARD, Method, Regime, Runs, Work, mean_error
from recovery_fast import quicken
from results import keep, machine, table
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcache import Cache, DistilledStudent, TranscodeOptions, transcode
from kdcache.commands.demo.teacher import documents, write_jsonl
from kdcache.targets import SparseTargets
from kdcache.teacher import quiet_transformers

HERE = Path(__file__).resolve().parent
STUDENTS = HERE.parent / "examples" / "recovery" / "students.py"
FULL, INT8, GHOST = "`hidden:float16`", "`hidden:int8`", "`topk:16`, ghost token"


class GhostStudent(DistilledStudent):
    """Learns from what Megatron-LM stores and makes of a top-k."""

    def forward(self, labels: Any = None, targets: Any = None, **more: Any) -> Any:
        """As its parent, with the weights rounded and the tail inferred."""
        if isinstance(targets, SparseTargets) and targets.exact and self.training:
            stored = targets.weights.log().half().float().exp()  # 0 where no id is kept
            tail = (1 - stored.sum(-1)).clamp_min(1e-8)
            targets = dataclasses.replace(targets, weights=stored, tail=tail)
        return super().forward(labels, targets, **more)


METHODS = {
    FULL: Method("hidden:float16"),
    INT8: Method("hidden:int8"),
    HARD: Method("topk:16", alpha=1.0),
    "`anchored:10`": Method("anchored:10"),
    GHOST: Method("topk:16", student=GhostStudent),
    "`topk:16`, renormalised": Method("topk:16", "renormalize"),
    "`topk:16`, exact tail": Method("topk:16"),
    "`sample:10`": Method("sample:10"),
    "`anchored:20`": Method("anchored:20"),
    "`sample:20`": Method("sample:20"),
    "`topk:64`, exact tail": Method("topk:64"),
    "full distribution": Method("dense:float16"),
}
KINDS = ("int4", "NVFP4", "pruned")


def students() -> Any:
    """The example's students."""
    spec = importlib.util.spec_from_file_location("recovery_students", STUDENTS)
    assert spec is not None, "the file is there"
    assert spec.loader is not None, "it is Python"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class RealWork(Work):
    """A folder with text, caches and runs of a teacher that is there.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options.out, quick=options.quick)
        self.teacher = options.teacher.resolve()
        self.options = options
        self.positions = 2048 if options.quick else options.positions
        self.students = students()
        self.students.TEACHER = str(self.teacher)
        made = dict(
            zip(KINDS, (self._fake("int4"), self._fake("nvfp4"), self._pruned), strict=True)
        )
        self.methods = METHODS
        self.length, self.rows, self.exact = options.length, options.rows, "hidden:float16"
        self.bf16 = options.precision == "bf16"
        self.regimes = {
            kind: Regime(made[kind], rate, options.epochs)
            for kind, rate in zip(KINDS, options.rates, strict=True)
        }

    def prepare(self) -> None:
        """Text: so many passages of the novels that they have the positions; and that held out."""
        if (self.out / "held-out.jsonl").exists():
            return
        tokenizer = AutoTokenizer.from_pretrained(self.teacher)
        lasting = {"train": passages(self.options.text), "held-out": iter(documents()[1])}
        for name, texts in lasting.items():
            left = self.positions if name == "train" else min(self.positions, self.options.held_out)
            chosen = []
            for text in texts:
                chosen.append(text)
                left -= len(tokenizer(text)["input_ids"])
                if left <= 0:
                    break
            write_jsonl(self.out / f"{name}.jsonl", chosen)

    def cache(self, codec: str, seed: int, corpus: str = "train", *, floats: bool = False) -> Cache:
        """As its parent's, but of a `hidden:float16` cache, so that the teacher runs once."""
        if codec.startswith("hidden"):
            return super().cache(codec, 0, corpus)
        source = super().cache("hidden:float16", 0, corpus)
        seed = seed if codec.startswith(("sample", "anchored")) else 0
        out = str(self.out / "caches" / f"{corpus}-{codec.replace(':', '-')}-{seed}-transcoded")
        transcode(TranscodeOptions(source.url, codec=codec, out=out, seed=seed, workers=0))
        return Cache.open(out)

    def _fake(self, kind: str) -> Any:
        made, layer = getattr(self.students, kind), self.students.Nvfp4Linear
        return lambda teacher, seed: quicken(made(None), layer)

    def _pruned(self, teacher: Path, seed: int) -> Any:
        folder = self.out / "pruned"
        if not folder.exists():
            self.students.prune(str(teacher), str(self.out / "train.jsonl"), str(folder))
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def passages(path: Path) -> Iterator[str]:
    """Texts of a file of passages, each 97th first: a novel's own are spread over the file."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    found = [json.loads(line)["text"] for line in data.splitlines()]
    for first in range(97):
        yield from found[first::97]


def of_full(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """A method's KL by that of the reference, with its standard error: by seed where there are
    several, else by held-out row."""
    ratios = [mine["kl"] / full["kl"] for mine, full in pairs]
    if len(ratios) != 1 or "rows" not in pairs[0][0] or "rows" not in pairs[0][1]:
        return f"{mean_error(ratios, 3)}x" if ratios else ""
    rows = zip(pairs[0][0]["rows"], pairs[0][1]["rows"], strict=True)
    apart = [(mine - ratios[0] * full) * count for (mine, count), (full, _) in rows]
    whole = pairs[0][1]["kl"] * sum(count for _, count in pairs[0][1]["rows"])
    spread = statistics.stdev(apart) * len(apart) ** 0.5 / whole if whole > 0 else 0.0
    return f"{ratios[0]:.3f} ± {spread:.3f}x"


def regime_table(runs: Runs, regime: str, before: dict[str, float]) -> str:
    """One row a method."""
    rows = []
    reference = next((name for name in (FULL, INT8) if (regime, name) in runs), FULL)
    full = runs.get((regime, reference), {})
    for method in METHODS:
        found = runs.get((regime, method), {})
        if not found:
            continue
        kl = [run["kl"] for run in found.values()]
        rows.append(
            [
                method,
                ""
                if method == HARD
                else f"{statistics.fmean(r['bytes'] for r in found.values()):,.1f}",
                str(len(found)),
                mean_error(kl, 4),
                of_full([(found[seed], full[seed]) for seed in found if seed in full]),
                f"{1 - statistics.fmean(kl) / before['kl']:.0%}",
                mean_error([run["cross_entropy"] for run in found.values()], 3),
            ]
        )
    header = ["student learns from", "bytes", "seeds", "KL from the teacher", f"of {reference}"]
    return table([*header, "recovered", "cross-entropy"], rows)


def report(work: RealWork, runs: Runs, before: dict[str, dict[str, float]]) -> str:
    """The section of RESULTS.md."""
    import torchao

    name, options = work.teacher.name, work.options
    parts = [
        f"`python benchmarks/recovery.py --teacher {name} --positions {work.positions}`; "
        f"{machine()}, torchao {torchao.__version__}.",
        f"Trained on {work.positions:,} positions of novels in rows of {options.length}, "
        f"{options.rows} rows a step; measured on the Python language reference.",
    ]
    for regime, how in work.regimes.items():
        if not any(kind == regime for kind, _ in runs):
            continue
        parts += [
            f"### {heading(work)}, {regime}",
            f"{how.epochs} epoch{'s' * (how.epochs > 1)}, learning rate {how.rate:g}, from KL "
            f"{before[regime]['kl']:.4f} and cross-entropy {before[regime]['cross_entropy']:.3f}:",
            regime_table(runs, regime, before[regime]),
        ]
    return "\n\n".join(parts)


def heading(work: RealWork) -> str:
    """Of the section."""
    return f"recovery, {work.teacher.name}"


def main_real(options: argparse.Namespace) -> None:
    """Run what is missing, most telling first, and report."""
    torch.set_num_threads(options.threads)
    work = RealWork(options)
    runs: Runs = {}
    with quiet_transformers():
        work.prepare()
        for seed in range(1 if options.quick else options.seeds):
            for regime in options.regimes or KINDS:
                for method in options.only or METHODS:
                    found = work.run(regime, method, seed, kept=options.kept)
                    if found:
                        runs.setdefault((regime, method), {})[seed] = found
        before = {regime: work.before(regime) for regime in {kind for kind, _ in runs}}
    text = report(work, runs, before)
    print(text)
    if options.markdown:
        keep(heading(work), text)
