"""Do a few stored ids train a student as well as the teacher's whole distribution?

    python benchmarks/quality.py --corpus novels.jsonl.gz --out WORK_DIR [--markdown]

A tokenizer and a teacher are made from four of every 16 documents; students learn from the
teacher's targets on two others, and are measured on another one. All students of a seed begin with
the same weights and see the same rows in the same order. They learn from the soft targets alone
(alpha = 0), so that nothing but the targets differs; the hard-label student from the labels alone.
The learning rate is the best of four for hard labels, and all students use it.

Targets of this package go through its codec, packed columns and loss; random sampling and top-k are
references (`references.py`) with as many entries a position as `sample:20` has. "Rescaled" is what
peers do at T = 2 with a top-k of T = 1: its probabilities to the power 1 / T, renormalised.

Measured on held-out text: cross-entropy with the labels, KL from the teacher at T = 1 and at T = 2
(nats per position), and the expected calibration error of the most probable id. Bytes per position
are those of the targets of the first 32,768 positions in a real shard; random sampling takes 3
bytes an entry, and top-k what `topk` of as many entries takes. Finished runs are kept in the work
folder, so an interrupted benchmark resumes. `quality_plot.py` draws KL against bytes from the
kept table.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from references import random_draws_for, random_sampling, top_k
from results import keep, machine, table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kdcache.cache.shard import ShardData, column_bytes, write_shard
from kdcache.commands.demo.teacher import TeacherSizes, make_teacher, make_tokenizer
from kdcache.corpus import Corpus
from kdcache.loss import distillation_loss
from kdcache.loss.metrics import Calibration
from kdcache.rows import Row
from kdcache.targets import (
    Codec,
    DenseTargets,
    HiddenTargets,
    SoftTargets,
    SparseTargets,
    TargetWriter,
    position_uniform,
)

Targets = DenseTargets | HiddenTargets | SparseTargets
At = Callable[[np.ndarray], Targets]

VOCABULARY = 2048
LENGTH = 128
BATCH_ROWS = 4
EPOCHS = 2
SIZED = 32_768  # positions whose bytes are measured
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
HARD = "hard labels"


@dataclass(frozen=True)
class Method:
    """What a student learns from.

    Attributes:
        kind: `hard`, `full`, `codec`, `random` or `top`.
        argument: of the kind: a codec's text; the loss's `tail` for `top`, or `rescaled`.
        temperature: of the loss.
        declared: temperatures of a codec.
    """

    kind: str
    argument: str = ""
    temperature: float = 1.0
    declared: tuple[float, ...] = (1.0,)


METHODS = {
    HARD: Method("hard"),
    "full distribution": Method("full"),
    "`sample:10`": Method("codec", "sample:10"),
    "`sample:20`": Method("codec", "sample:20"),
    "`sample:40`": Method("codec", "sample:40"),
    "random sampling": Method("random"),
    "top-k, tail bucket": Method("top", "bucket"),
    "top-k, renormalised": Method("top", "renormalize"),
    "full distribution, T = 2": Method("full", temperature=2.0),
    "`sample:20` of T = {1, 2}, T = 2": Method("codec", "sample:20", 2.0, (1.0, 2.0)),
    "top-k of T = 1, rescaled to T = 2": Method("top", "rescaled", 2.0),
}


# ------------------------------------------------------------------------------- teacher and data


def prepare(options: argparse.Namespace, out: Path) -> None:
    """Tokenizer, teacher, and the teacher's logits (float16) at every position of the students."""
    records = [
        record.values["text"]
        for span in Corpus.open([options.corpus], span_bytes=1 << 40).spans
        for record in Corpus.read(span)
    ]
    parts: dict[str, list[str]] = {"held-out": [], "student": [], "teacher": []}
    places = {0: "held-out", 5: "student", 11: "student"} | dict.fromkeys((2, 7, 9, 14), "teacher")
    for number, text in enumerate(records):
        if number % 16 in places:
            parts[places[number % 16]].append(text)
    if not (out / "tokenizer").exists():
        make_tokenizer(parts["teacher"], out / "tokenizer", vocab_size=VOCABULARY)
    if not (out / "teacher").exists():
        sizes = TeacherSizes(VOCABULARY, LENGTH, hidden=256, layers=4, heads=4, epochs=1, seed=0)
        begin = time.perf_counter()
        make_teacher(
            parts["teacher"],
            parts["held-out"][-20:],
            out / "tokenizer",
            out / "teacher",
            sizes,
            lambda step, steps, loss: print(
                f"teacher: {step} of {steps} steps, held-out {loss:.3f}, "
                f"{time.perf_counter() - begin:.0f} s",
                flush=True,
            ),
        )
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    for name, most in (("student", options.positions), ("held-out", options.held_out)):
        if not (out / f"{name}-logits.npy").exists():
            save_logits(out, name, rows_of(tokenizer, parts[name], most))


def rows_of(tokenizer: Any, texts: Sequence[str], positions: int) -> Tensor:
    """Documents joined by EOS and cut into windows with the next id behind them: [rows, L + 1]."""
    joined: list[int] = []
    for text in texts:
        joined += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(joined) > positions:
            break
    return torch.tensor(joined).unfold(0, LENGTH + 1, LENGTH)


@torch.inference_mode()
def save_logits(out: Path, name: str, rows: Tensor) -> None:
    """The rows, and the teacher's logits on them."""
    teacher = AutoModelForCausalLM.from_pretrained(out / "teacher").eval()
    np.save(out / f"{name}-rows.npy", rows.numpy())
    logits = np.lib.format.open_memmap(
        out / "logits.tmp", "w+", np.float16, (len(rows), LENGTH, VOCABULARY)
    )
    for start in range(0, len(rows), 16):
        part = rows[start : start + 16, :-1]
        logits[start : start + len(part)] = teacher(input_ids=part).logits.half().numpy()
    logits.flush()
    (out / "logits.tmp").rename(out / f"{name}-logits.npy")


def load(out: Path, name: str) -> tuple[Tensor, Tensor]:
    """Rows int64 [rows, L + 1] and logits float16 [positions, V] (mapped, not read)."""
    logits = np.load(out / f"{name}-logits.npy", mmap_mode="c")
    rows = torch.from_numpy(np.load(out / f"{name}-rows.npy"))
    return rows, torch.from_numpy(logits).flatten(0, 1)


# ----------------------------------------------------------------------------------------- targets


def stored(
    logits: Tensor, codec: Codec, seed: int, rank_to_id: np.ndarray | None = None
) -> SoftTargets:
    """All positions through a codec, as a build stores them."""
    u = torch.from_numpy(position_uniform(seed, 0, np.arange(len(logits)), 0))
    writer, parts = TargetWriter(codec, rank_to_id), []
    for start in range(0, len(logits), 1024):
        here = slice(start, start + 1024)
        parts.append(writer.write(logits[here].float(), u[here]))
    return SoftTargets.concat(parts)


def entries(targets: SoftTargets) -> float:
    """Stored ids a position."""
    counts = targets.codec.counts(targets.columns)
    return float(sum(int(c.sum()) for c in counts.values())) / len(targets)


def stored_bytes(out: Path, codec: Codec) -> float:
    """Bytes per position of the targets in a shard, ids as frequency ranks like in a build."""
    token_rows, logits = load(out, "student")
    some = token_rows[: SIZED // LENGTH].numpy().astype(np.int32)
    counts = np.bincount(some[:, 1:].ravel(), minlength=VOCABULARY)
    rank_to_id = np.argsort(-counts, kind="stable")
    targets = stored(logits[: some[:, 1:].size], codec, 0, rank_to_id)
    data = ShardData.from_rows("causal-lm", [Row(r[:-1], r[1:]) for r in some], targets)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.h5"
        write_shard(path, data, attributes={})
        sizes = column_bytes(path).items()
        return sum(b for name, b in sizes if name.startswith("targets/")) / len(targets)


def bytes_of(out: Path, method: Method, entries: float) -> float:
    """Bytes per position of a method's targets."""
    if method.kind == "hard":
        return 0.0
    if method.kind == "random":
        return 3 * entries
    texts = {"full": "dense:float16", "top": f"topk:{round(entries)}"}
    text = texts.get(method.kind, method.argument)
    return stored_bytes(out, Codec.parse(text, method.declared, VOCABULARY))


def kept(logits: Tensor, draw: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Ids and weights of all positions from a reference method at T = 1."""
    parts = [draw(logits[a : a + 1024].float().softmax(-1)) for a in range(0, len(logits), 1024)]
    return torch.cat([ids for ids, _ in parts]), torch.cat([w for _, w in parts])


def make_targets(logits: Tensor, method: Method, seed: int, like: float) -> tuple[At, float]:
    """A function from positions to targets, and the entries a position.

    Args:
        logits: of all positions.
        method: what is kept of them.
        seed: of the draws.
        like: entries a position that a reference may have.
    """
    if method.kind in ("hard", "full"):
        # Hard labels: the targets have weight zero.
        return (
            lambda at: DenseTargets(logits[torch.from_numpy(at)].float(), method.temperature)
        ), float(VOCABULARY)
    if method.kind == "codec":
        targets = stored(logits, Codec.parse(method.argument, method.declared, VOCABULARY), seed)
        return (lambda at: targets.take(at).at(method.temperature)), entries(targets)
    if method.kind == "random":
        some = logits[:: len(logits) // 512].double().softmax(-1)
        draws = random_draws_for(some, like)
        generator = torch.Generator().manual_seed(seed)
        draw = functools.partial(random_sampling, draws=draws, generator=generator)
        ids, weights = kept(logits, draw)
    else:
        ids, weights = kept(logits, functools.partial(top_k, k=round(like)))
        if method.argument == "rescaled":
            weights = weights ** (1 / method.temperature)
            weights /= weights.sum(-1, keepdim=True)
    exact = method.kind == "top" and method.argument != "rescaled"
    rest = 1 - weights.sum(-1) if exact else torch.zeros(len(ids))

    def at(positions: np.ndarray) -> SparseTargets:
        where = torch.from_numpy(positions)
        return SparseTargets(
            ids[where], weights[where], rest[where].clamp(min=0), exact, method.temperature
        )

    return at, float((weights > 0).sum()) / len(ids)


# ---------------------------------------------------------------------------------------- students


def train(rows: Tensor, at: At, method: Method, seed: int, rate: float) -> Any:
    """One student; the order of rows and its first weights go by the seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    student = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(student.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.1)
    steps = EPOCHS * (len(rows) // BATCH_ROWS)
    warmup = max(1, steps // 20)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, (steps - s) / (steps - warmup))
    )
    generator = torch.Generator().manual_seed(seed)
    alpha = 1.0 if method.kind == "hard" else 0.0
    tail = "renormalize" if method.argument == "renormalize" else "bucket"
    for _ in range(EPOCHS):
        order = torch.randperm(len(rows), generator=generator)
        for chosen in order[: len(rows) // BATCH_ROWS * BATCH_ROWS].split(BATCH_ROWS):
            batch = rows[chosen]
            positions = (chosen[:, None] * LENGTH + torch.arange(LENGTH)).flatten().numpy()
            loss = distillation_loss(
                student(input_ids=batch[:, :-1], use_cache=False).logits.flatten(0, 1),
                batch[:, 1:].flatten(),
                at(positions),
                alpha=alpha,
                tail=tail,
            ).total
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return student.eval()


@torch.inference_mode()
def measure(student: Any, rows: Tensor, logits: Tensor) -> dict[str, float]:
    """Cross-entropy, KL at both temperatures and calibration error; logits None for the teacher."""
    calibration = Calibration()
    sums = {"ce": 0.0, "kl-1": 0.0, "kl-2": 0.0}
    for start in range(0, len(rows), 16):
        batch = rows[start : start + 16]
        labels = batch[:, 1:].flatten()
        z = logits[start * LENGTH : start * LENGTH + len(labels)].float()
        own = z if student is None else student(input_ids=batch[:, :-1]).logits.flatten(0, 1)
        sums["ce"] += float(torch.nn.functional.cross_entropy(own, labels, reduction="sum"))
        for t in (1.0, 2.0):
            p, q = (z / t).log_softmax(-1), (own / t).log_softmax(-1)
            sums[f"kl-{t:g}"] += float((p.exp() * (p - q)).sum())
        confidence, guess = own.softmax(-1).max(-1)
        calibration.add(confidence.numpy(), (guess == labels).numpy())
    found = {name: value / (len(rows) * LENGTH) for name, value in sums.items()}
    return {**found, "ece": calibration.error}


def one(out: Path, name: str, seed: int, rate: float, like: float) -> dict[str, float]:
    """Train and measure one student, unless it was done before."""
    kind = "".join(c if c.isalnum() else "-" for c in name)
    path = out / "runs" / f"{kind}-{seed}-{rate:g}.json"
    if path.exists():
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    torch.set_num_threads(1)
    rows, logits = load(out, "student")
    begin = time.process_time()
    at, count = make_targets(logits, METHODS[name], seed, like)
    student = train(rows, at, METHODS[name], seed, rate)
    found = {**measure(student, *load(out, "held-out")), "entries": count}
    found["cpu-seconds"] = time.process_time() - begin
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found))
    print(f"{name}, seed {seed}, rate {rate:g}: {found}", flush=True)
    return found


# ------------------------------------------------------------------------------------------ report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--out", required=True, help="work folder")
    parser.add_argument("--positions", type=int, default=200_000, help="that students learn from")
    parser.add_argument("--held-out", type=int, default=60_000, help="positions to measure on")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--markdown", action="store_true", help="keep the result in RESULTS.md")
    options = parser.parse_args()
    torch.set_num_threads(options.jobs)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    prepare(options, out)
    _, logits = load(out, "student")
    some = stored(logits[:4096], Codec.parse("sample:20", (1.0,), VOCABULARY), 0)
    run = functools.partial(one, out, like=entries(some))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, context) as pool:
        tried = {rate: pool.submit(run, HARD, 0, rate) for rate in RATES}
        rate = min(RATES, key=lambda r: tried[r].result()["ce"])
        jobs = [
            (name, pool.submit(run, name, seed, rate))
            for seed in range(options.seeds)
            for name in METHODS
        ]
        found: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
        for name, job in jobs:
            found[name].append(job.result())
    teacher = measure(None, *load(out, "held-out"))
    sizes = {name: bytes_of(out, METHODS[name], found[name][0]["entries"]) for name in METHODS}
    tried_ce = {r: j.result()["ce"] for r, j in tried.items()}
    text = report(options, found, sizes, teacher, tried_ce, rate)
    print(text)
    if options.markdown:
        keep("quality", text)


def report(
    options: argparse.Namespace,
    found: dict[str, list[dict[str, float]]],
    sizes: dict[str, float],
    teacher: dict[str, float],
    tried: dict[float, float],
    rate: float,
) -> str:
    """Means over seeds and their standard deviations, as markdown."""
    names = ("ce", "kl-1", "kl-2", "ece")
    rows = [["teacher", "", "", "", *(f"{teacher[n]:.4f}" for n in names)]]
    for name, runs in found.items():
        cells = []
        for n in names:
            values = [run[n] for run in runs]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}")
        count = runs[0]["entries"]
        kept = "" if name == HARD else f"{count:.1f}" if count < VOCABULARY else f"{VOCABULARY:,}"
        size = f"{sizes[name]:,.1f}" if sizes[name] else ""
        rows.append([name, kept, size, str(len(runs)), *cells])
    header = ["student learns from", "entries", "bytes", "seeds", "cross-entropy"]
    return "\n".join(
        [
            f"`python benchmarks/quality.py --corpus {Path(options.corpus).name}`: "
            f"{options.positions:,} positions, {EPOCHS} epochs, {options.held_out:,} held out, "
            f"vocabulary {VOCABULARY:,}; {machine()}.",
            "",
            table([*header, "KL, T = 1", "KL, T = 2", "calibration error"], rows),
            "",
            "Mean ± standard deviation over seeds, nats per position. Learning rate of all "
            "students: "
            f"{rate:g}, the best for hard labels of "
            + ", ".join(f"{r:g} ({ce:.3f})" for r, ce in tried.items())
            + ".",
        ]
    )


if __name__ == "__main__":
    main()
