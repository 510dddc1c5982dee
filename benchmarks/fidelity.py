"""Sampled targets of a language model: bytes, noise and bias, and what making them costs a build.

    python benchmarks/fidelity.py --teacher SMOLLM2_135M --corpus novels.jsonl.gz [--markdown]

The teacher reads rows from evenly spaced documents of the corpus; every method sees its logits at
the same positions:

* random sampling (RS-KD, ACL 2025): N draws with replacement, ids and counts, 3 bytes an entry;
* top-k: the K largest probabilities, nothing else; and this package's `topk`;
* `sample:N` with one and with two declared temperatures.

Bytes are those of all datasets of the targets in a shard that `kdcache.cache.shard` writes, with
the rank table that a build of this corpus makes. Noise is the mean of ||target - p||^2 over
positions and seeds. The smallest N with no more noise than 50 random draws is searched for. Bias:
20,000 draws of a few positions, through quantisation and columns, against the full distribution; a
chi-square over ids in standard errors of its own. Build: as in `build_speed.py`, for `sample:20`
and the first documents."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import build_speed
import numpy as np
import torch
from references import random_draws_for, random_sampling, top_k
from results import keep, machine, table
from torch import Tensor

from kdcache.cache.shard import ShardData, column_bytes, write_shard
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.build.prepare import prepare
from kdcache.corpus import Corpus
from kdcache.rows import Row, RowSpec, make_encoder
from kdcache.rows.batches import batches
from kdcache.targets import Codec, SoftTargets, SparseTargets, TargetWriter, TopK, position_uniform
from kdcache.targets.soft import read_ranks
from kdcache.teacher import Teacher

ROW = 256
SLICE = 256


@dataclass
class Positions:
    """The teacher's logits (float16 [n, V]) of some rows, and the corpus's rank table."""

    rows: list[Row]
    logits: Tensor
    rank_to_id: np.ndarray

    def __len__(self) -> int:
        return len(self.logits)

    def slices(self) -> Sequence[tuple[int, Tensor]]:
        """First position, and float32 logits, of a few positions at a time."""
        return [(a, self.logits[a : a + SLICE].float()) for a in range(0, len(self), SLICE)]


@dataclass
class Figures:
    """One line of the table; noise and mass by temperature."""

    name: str
    declared: str
    entries: float
    size: float
    noise: dict[float, float]
    mass: dict[float, float]


def make_positions(options: argparse.Namespace) -> Positions:
    """Rows of `ROW` tokens from the beginning of evenly spaced documents."""
    prepared = prepare(
        BuildOptions((options.teacher,), (options.corpus,), "none", codec="sample:20", workers=0)
    )
    records = [
        r
        for span in Corpus.open([options.corpus], span_bytes=1 << 40).spans
        for r in Corpus.read(span)
    ]
    spec = RowSpec("causal-lm", max_length=ROW, packing="none")
    count = -(-options.positions // ROW)
    rows: list[Row] = []
    # Some documents are too short: more are tried than are wanted.
    for i in np.linspace(0, len(records), 2 * count, endpoint=False).astype(int):
        (row, *_) = [*make_encoder(spec, prepared.tokenizer).encode([records[i]]), None]
        if row is not None and len(row.input_ids) == ROW and len(rows) < count:
            rows.append(row)
    teacher = Teacher(prepared.teacher, prepared.spec.vocab_size)
    logits = torch.cat(
        [
            z.half()
            for batch in batches([ROW] * len(rows), 4 * ROW)
            for z in teacher.logits([rows[i] for i in batch])
        ]
    )
    return Positions(rows, logits, read_ranks(prepared.ranks, prepared.spec.vocab_size))


# ---------------------------------------------------------------------------------- the references


def reference(
    positions: Positions,
    name: str,
    temperature: float,
    size: float,
    draw: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Figures:
    """Figures of a reference method: `size` bytes an entry."""
    entries = noise = mass = 0.0
    for _, logits in positions.slices():
        p = (logits / temperature).softmax(-1)
        ids, weights = draw(p)
        entries += float((weights > 0).sum())
        noise += squared_error(p, ids, weights)
        mass += float((p.gather(1, ids) * (weights > 0)).sum())
    n = len(positions)
    return Figures(
        name,
        f"{temperature:g}",
        entries / n,
        size * entries / n,
        {temperature: noise / n},
        {temperature: mass / n},
    )


def random_reference(
    positions: Positions, temperature: float, draws: int, generator: torch.Generator
) -> Figures:
    """Figures of random sampling, at 3 bytes an entry."""
    draw = partial(random_sampling, draws=draws, generator=generator)
    return reference(positions, f"random sampling, {draws} draws", temperature, 3.0, draw)


def squared_error(p: Tensor, ids: Tensor, weights: Tensor) -> float:
    """Sum of ||target - p||^2."""
    return float(p.clone().scatter_add_(1, ids, -weights).square().sum())


def draws_for(positions: Positions, entries: float) -> int:
    """How many random draws leave so many different ids a position, at T = 1."""
    some = torch.cat([z[::8] for _, z in positions.slices()])
    return random_draws_for(some.double().softmax(-1), entries)


# ------------------------------------------------------------------------------------- the codecs


def store(positions: Positions, codec: Codec, seed: int = 0) -> SoftTargets:
    """Targets as a build stores them."""
    writer = TargetWriter(codec, positions.rank_to_id)
    u = torch.from_numpy(position_uniform(seed, 0, np.arange(len(positions)), 0))
    parts = []
    for start, logits in positions.slices():
        parts.append(writer.write(logits, u[start : start + len(logits)]))
    return SoftTargets.concat(parts)


def measure(positions: Positions, codec: Codec, seeds: int = 1) -> Figures:
    """Bytes, entries, noise and mass of a codec."""
    noise = dict.fromkeys(codec.temperatures, 0.0)
    mass = dict.fromkeys(codec.temperatures, 0.0)
    entries = size = 0.0
    n = len(positions) * seeds
    for seed in range(seeds):
        targets = store(positions, codec, seed)
        counts = codec.counts(targets.columns)
        stored = sum(int(c.sum()) for c in counts.values())
        entries += stored / n if counts else float(codec.columns[0].shape[0]) / seeds
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "shard.h5"
            data = ShardData.from_rows("causal-lm", positions.rows, targets)
            write_shard(path, data, attributes={})
            datasets = column_bytes(path).items()
            size += sum(b for name, b in datasets if name.startswith("targets/")) / n
        for start, logits in positions.slices():
            piece = targets.take(np.arange(start, start + len(logits)))
            for t in codec.temperatures:
                found = piece.at(t)
                assert isinstance(found, SparseTargets)
                p = (logits / t).softmax(-1)
                noise[t] += squared_error(p, found.ids, found.weights) / n
                named = torch.zeros_like(p).scatter_add_(1, found.ids, found.weights) > 0
                mass[t] += float(p[named].sum()) / n
    declared = ", ".join(f"{t:g}" for t in codec.temperatures)
    return Figures(f"`{codec}`", declared, entries, size, noise, mass)


def smallest(
    positions: Positions, temperatures: tuple[float, ...], limits: dict[float, float], high: int
) -> Figures:
    """The fewest draws whose noise stays within the limits (T -> most)."""
    low, found = 1, None
    while high - low > 1:
        middle = (low + high) // 2
        codec = Codec.parse(f"sample:{middle}", temperatures, positions.logits.shape[1])
        figures = measure(positions, codec, seeds=2)
        if all(figures.noise[t] <= most for t, most in limits.items()):
            high, found = middle, figures
        else:
            low = middle
    assert found is not None, "the first guess was too small"
    return found


# ------------------------------------------------------------------------------------------- bias


def excess(weights: Tensor, p: Tensor) -> float:
    """Standard errors by which a chi-square over ids lies above its mean, were `weights` unbiased.

    Ids of one draw are correlated: the spread of the chi-square comes from their correlations. Ids
    met too rarely for an estimate of their variance are pooled.
    """
    rare = (weights != 0).sum(0) < 100
    pooled = torch.cat([weights[:, ~rare], weights[:, rare].sum(-1, keepdim=True)], 1)
    want = torch.cat([p[~rare], p[rare].sum()[None]])
    mean, deviation = pooled.mean(0), pooled.std(0)
    fixed = deviation < 1e-9
    assert torch.allclose(mean[fixed], want[fixed], atol=1e-6)
    z = (mean - want)[~fixed] / (deviation[~fixed] / len(weights) ** 0.5)
    if not z.numel():
        return 0.0
    correlation = torch.corrcoef(pooled[:, ~fixed].T).reshape(z.numel(), z.numel())
    return float((z.square().sum() - z.numel()) / (2 * correlation.square().sum()).sqrt())


def bias(
    positions: Positions, codec: Codec, chosen: Sequence[int], draws: int
) -> dict[float, list[float]]:
    """`excess` of some positions at each declared temperature.

    The ids beyond the 400 most probable ones make one outcome: each of them is met too rarely.
    """
    writer = TargetWriter(codec, positions.rank_to_id)
    found: dict[float, list[float]] = {t: [] for t in codec.temperatures}
    for place in chosen:
        logits = positions.logits[place].float()
        where = torch.full((len(logits),), 400)
        where[logits.topk(400).indices] = torch.arange(400)
        parts: dict[float, list[Tensor]] = {t: [] for t in codec.temperatures}
        for start in range(0, draws, 500):
            u = torch.from_numpy(position_uniform(1, place, 0, np.arange(start, start + 500)))
            targets = writer.write(logits.expand(500, -1), u)
            for t in codec.temperatures:
                sparse = targets.at(t)
                assert isinstance(sparse, SparseTargets)
                full = torch.zeros(500, 401, dtype=torch.float64)
                parts[t].append(full.scatter_add_(1, where[sparse.ids], sparse.weights.double()))
        for t in codec.temperatures:
            p = torch.zeros(401, dtype=torch.float64)
            p.scatter_add_(0, where, (logits.double() / t).softmax(-1))
            found[t].append(excess(torch.cat(parts[t]), p))
    return found


# ------------------------------------------------------------------------------------------- report


def tables(options: argparse.Namespace) -> str:
    """Everything, as markdown."""
    positions = make_positions(options)
    print(f"{len(positions)} positions of {len(positions.rows)} documents", flush=True)
    vocab = positions.logits.shape[1]
    generator = torch.Generator().manual_seed(0)
    random = {t: random_reference(positions, t, 50, generator) for t in (1.0, 2.0)}
    most = {t: figures.noise[t] for t, figures in random.items()}
    lines = [random[1.0], random[2.0]]

    ten, twenty = (
        measure(positions, Codec.parse(f"sample:{n}", (1.0,), vocab), seeds=2) for n in (10, 20)
    )
    one = smallest(positions, (1.0,), {1.0: most[1.0]}, 40)
    two = smallest(positions, (1.0, 2.0), {1.0: most[1.0]}, 40)
    both = smallest(positions, (1.0, 2.0), most, 60)
    draws = draws_for(positions, one.entries)
    equal = random_reference(positions, 1.0, draws, generator)
    lines += [equal, ten, twenty, one, two, both]
    for k in (17, 64):
        lines.append(
            reference(positions, f"top-{k}, 3 bytes an entry", 1.0, 3.0, partial(top_k, k=k))
        )
    for codec in (TopK(vocab, (1.0,), 16), TopK(vocab, (1.0, 2.0), 64)):
        lines.append(measure(positions, codec))
    for line in lines:
        print(line, flush=True)

    chosen = np.linspace(3, len(positions) - 1, options.biased).astype(int).tolist()
    found: dict[str, dict[float, list[float]]] = {}
    for figures, temperatures in ((one, (1.0,)), (two, (1.0, 2.0))):
        chosen_codec = Codec.parse(figures.name.strip("`"), temperatures, vocab)
        found[f"{figures.name}, T = {figures.declared}"] = bias(
            positions, chosen_codec, chosen, options.draws
        )
    print(found, flush=True)
    worst = max(e for by_t in found.values() for values in by_t.values() for e in values)
    ratio = one.noise[1.0] / equal.noise[1.0]
    built = build_against_forward(options)

    goals = [
        (
            f"bytes per position at noise ≤ 50 random draws, T = 1 ({one.name})",
            "≤ 19",
            f"{one.size:.1f}",
            one.size <= 19,
        ),
        (
            f"the same noise at T = 1, declared T = 1 and 2 ({two.name})",
            "≤ 50",
            f"{two.size:.1f}",
            two.size <= 50,
        ),
        ("noise against random sampling at equal entries", "≤ 0.5x", f"{ratio:.2f}x", ratio <= 0.5),
        ("bytes per position of `sample:10`", "≤ 12", f"{ten.size:.1f}", ten.size <= 12),
        (
            f"bias, {options.draws:,} draws: largest of "
            f"{sum(len(v) for by_t in found.values() for v in by_t.values())} chi-squares",
            "≤ 4 s.e.",
            f"{worst:.1f} s.e.",
            worst <= 4,
        ),
        (
            "build against bare forward, wall time",
            "≤ 1.10x",
            f"{built.wall_ratio:.2f}x",
            built.wall_ratio <= 1.1,
        ),
    ]
    goal_rows = [[a, b, c, "yes" if ok else "**no**"] for a, b, c, ok in goals]
    squares = "; ".join(
        f"{name}, at {t:g}: {', '.join(f'{e:+.1f}' for e in values)}"
        for name, by_t in found.items()
        for t, values in by_t.items()
    )
    return "\n\n".join(
        [
            table(["", "goal", "reached", ""], goal_rows),
            figures_table(lines),
            f"{both.name} at T = 1 and 2 is the smallest with no more noise than 50 random draws "
            "have at *each* of the two temperatures. Mass is the teacher's probability on the ids "
            "that are stored: samples represent the other mass on average, top-k never does.",
            "Chi-squares over ids, in standard errors, at positions "
            f"{', '.join(map(str, chosen))}: {squares}.",
            f"Build: {built.positions:,} positions of the first {options.records} documents, "
            f"{built.build.wall:.0f} s wall and {built.build.cpu:.0f} s CPU against "
            f"{built.forward.wall:.0f} s and {built.forward.cpu:.0f} s ({built.wall_ratio:.3f}x, "
            f"{built.cpu_ratio:.3f}x); planning, {built.planning:.1f} s once, is not in it.",
        ]
    )


def figures_table(lines: Sequence[Figures]) -> str:
    """A row for each method."""
    rows = []
    for f in lines:
        noise = [f"{f.noise[t]:.5f}" if t in f.noise else "" for t in (1.0, 2.0)]
        mass = [f"{100 * f.mass[t]:.1f} %" if t in f.mass else "" for t in (1.0, 2.0)]
        rows.append([f.name, f.declared, f"{f.entries:.1f}", f"{f.size:.1f}", *noise, *mass])
    header = ["target", "T declared", "entries", "B per position", "noise, T = 1", "noise, T = 2"]
    return table([*header, "mass, T = 1", "mass, T = 2"], rows)


def build_against_forward(options: argparse.Namespace) -> build_speed.Sides:
    """A build of the first documents with `sample:20`, and the bare forwards of its rows."""
    with tempfile.TemporaryDirectory() as folder:
        build = BuildOptions(
            (options.teacher,),
            (options.corpus,),
            f"{folder}/cache",
            codec="sample:20",
            limit=options.records,
            shard_tokens=4096,
            workers=0,
        )
        return build_speed.measure(build, block=4)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--biased", type=int, default=5, help="positions tested for bias")
    parser.add_argument("--records", type=int, default=20, help="documents that are built")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--markdown", action="store_true", help="keep the result in RESULTS.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = (
        f"`python benchmarks/fidelity.py --teacher {Path(options.teacher).name} --corpus "
        f"{Path(options.corpus).name}`: {options.positions:,} positions in rows of {ROW}; "
        f"{machine()}.\n\n{tables(options)}"
    )
    print(text)
    if options.markdown:
        keep("fidelity", text)


if __name__ == "__main__":
    main()
