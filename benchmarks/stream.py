"""What reading a cache costs: positions a second, the first batch, memory.

    python benchmarks/stream.py [--markdown]                      # logits made up, 128,256 ids
    python benchmarks/stream.py --logits smollm2_logits.npy       # a teacher's, [positions, V]
    python benchmarks/stream.py --ranks [--markdown]              # 4 alone: ranks of a cluster
    python benchmarks/stream.py --states [--markdown]             # 5 alone: hidden states

The logits of some thousand positions are encoded with the real codecs, again and again with new
noise, and shards are filled with the outcome in random order: rows of 1,024 positions, frequency
ranks, files as a build writes them. Made-up logits fall with the logarithm of an id's rank, as in
Zipf's law, with Gaussian noise on top and a sharpness of its own for each position; they give about
as many entries a position as SmolLM2 does on real text. Larger caches repeat a few shards by hard
links; the system's page cache holds them all, so disks are not measured.

1. One epoch of one cache, in stages. Each line is a stage alone, on the same shards, but for the
   last, which is all of `TargetStream`: threads, order, batches and the rest. CPU seconds of the
   whole process (`time.process_time`), which count all threads; the best of some rounds.
2. The first batch of a cache of 1,000 shards, from its URL on, in a new process.
3. Peak resident memory of a new process that reads some hundred batches of caches of different
   size, less what its imports took. Needs Linux.
4. Ranks of trainings with many workers, each in a new process of its own: what a rank reads, its
   first batch, its memory, and its CPU time a position, beside one worker that reads everything.
   A rank works alone here: the sum of the counts, 8 bytes a step over the network, is left out.
5. Hidden states by type and width D: the stages of 1, what a batch holds of each position, which is
   what goes to a GPU, and the peak memory of 3. States are Gaussian, which deflate shrinks a little
   less than SmolLM2's.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from results import keep, machine, memory_mib, table
from torch import Tensor

from kdcache.cache import Cache, CacheSpec
from kdcache.cache.cache import layer_bytes
from kdcache.cache.sealing import prepare_manifest, seal
from kdcache.cache.shard import ShardData
from kdcache.rows import Row
from kdcache.stream import ShardRows, TargetStream, order
from kdcache.targets import Codec, Hidden, OutputLayer, SoftTargets, TargetWriter, position_uniform
from kdcache.targets.soft import read_ranks

STATES = (("int8", 1024), ("int8", 2048), ("int8", 4096), ("float16", 4096), ("bfloat16", 4096))
CODECS = (("sample:20", (1.0,)), ("sample:20", (1.0, 2.0)), ("topk:64", (1.0,)))
ROW = 1024
SLICE = 256
WHOLE = "all of `TargetStream`, to tensors"
DISTINCT = 8  # shards of a cache that are not links to others


def teacher(options: argparse.Namespace) -> Iterator[Tensor]:
    """Logits of some positions at a time, float32 [SLICE, V]."""
    if options.logits:
        saved = np.load(options.logits, mmap_mode="r")
        for first in range(0, len(saved), SLICE):
            yield torch.from_numpy(saved[first : first + SLICE].astype(np.float32))
        return
    generator = torch.Generator().manual_seed(0)
    usual = -(torch.arange(options.vocab) + 2.7).log()
    for _ in range(0, options.positions, SLICE):
        sharp = torch.empty(SLICE, 1).uniform_(0.6, 2.8, generator=generator)
        yield sharp * (usual + 2 * torch.randn(SLICE, options.vocab, generator=generator))


def rank_table(options: argparse.Namespace) -> bytes:
    """The ids by falling probability over all positions, as `ranks.u32` keeps them."""
    total = sum(logits.softmax(-1).double().sum(0) for logits in teacher(options))
    assert isinstance(total, Tensor)
    return total.argsort(descending=True, stable=True).numpy().astype("<u4").tobytes()


def make_targets(codec: Codec, ranks: np.ndarray, options: argparse.Namespace) -> SoftTargets:
    """Each position's target, `--draws` times with other noise."""
    writer, parts = TargetWriter(codec, ranks), []
    for part, logits in enumerate(teacher(options)):
        for draw in range(options.draws):
            places = np.arange(len(logits)) + part * SLICE
            u = torch.from_numpy(position_uniform(0, draw, places, 0))
            parts.append(writer.write(logits, u))
    return SoftTargets.concat(parts)


def make_shard(targets: SoftTargets, positions: int, seed: int) -> ShardData:
    """Rows of random ids, as frequent as Zipf has them, with targets in random order."""
    rng = np.random.default_rng(seed)
    count = positions // ROW * ROW
    vocab = targets.codec.vocab_size
    ids = np.minimum(rng.zipf(1.2, count + 1) - 1, vocab - 1).astype(np.int32)
    rows = [Row(ids[a : a + ROW], ids[a + 1 : a + ROW + 1]) for a in range(0, count, ROW)]
    return ShardData.from_rows(
        "causal-lm", rows, targets.take(rng.integers(0, len(targets), count))
    )


def make_cache(
    folder: Path,
    codec: Codec,
    shards: Iterable[ShardData],
    ranks: bytes,
    spans: int,
    layer: bytes = b"",
) -> str:
    """A sealed cache of `spans` shards, those after the given ones linked to them."""
    spec = CacheSpec(
        task="causal-lm",
        teachers=({"sha256": "0", "weight": 1.0},),
        ensemble="mean-probs",
        dtype="float32",
        tokenizer="none",
        vocab_size=codec.vocab_size,
        pad_id=0,
        eos_id=None,
        label_names=None,
        corpus=(),
        rows={"max_length": ROW, "packing": "concat"},
        reading={},
        spans=spans,
        codec=str(codec),
        temperatures=codec.temperatures,
        seed=0,
        ranks=hashlib.sha256(ranks).hexdigest() if ranks else None,
        levels=codec.levels,
        output_layer=hashlib.sha256(layer).hexdigest() if layer else None,
    )
    given: dict[str, Any] = {"tokenizer_files": {}, "ranks": ranks, "output_layer": layer}
    cache = Cache.create_or_resume(str(folder), spec, **given)
    entries = [cache.commit(span, shard) for span, shard in enumerate(shards)]
    for span in range(len(entries), spans):
        entry = entries[span % DISTINCT]
        name = f"{span:05d}-{entry.sha256[:16]}.h5"
        os.link(folder / "shards" / entry.name, folder / "shards" / name)
        entries.append(dataclasses.replace(entry, span=span, name=name))
    seal(cache, prepare_manifest(cache, entries))
    return str(folder)


# ------------------------------------------------------------------------------------ what it costs


def best(work: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """CPU and wall seconds, each the least of some rounds."""
    cpu, wall = [], []
    for _ in range(rounds):
        started = time.process_time(), time.perf_counter()
        work()
        cpu.append(time.process_time() - started[0])
        wall.append(time.perf_counter() - started[1])
    return min(cpu), min(wall)


def columns(cache: Cache) -> None:
    """All that HDF5 does: bytes of files to arrays."""
    for entry in cache.manifest.shards:
        path = Path(cache.storage.url, "shards", entry.name)
        with h5py.File(path, "r", locking=False) as file:
            for group in ("rows", "targets"):
                for dataset in file[group].values():
                    dataset[...]


def stages(url: str, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """CPU and wall seconds that each stage takes for a whole cache."""
    cache = Cache.open(url)
    spans, temperature = range(cache.spec.spans), cache.spec.temperatures[-1]

    def epoch() -> None:
        for _ in TargetStream(url, batch_size=options.batch, temperature=temperature):
            pass

    return {
        "HDF5 alone: read, gunzip, checksum": best(lambda: columns(cache), options.rounds),
        "the same, hashed, with counts and labels": best(
            lambda: run(cache.read, spans), options.rounds
        ),
        **batches(ShardRows([cache.read(span) for span in spans]), temperature, options),
        WHOLE: best(epoch, options.rounds),
    }


def batches(
    pool: ShardRows, temperature: float, options: argparse.Namespace
) -> dict[str, tuple[float, float]]:
    """The two main stages of making batches from rows in memory."""
    order = np.random.default_rng(0).permutation(len(pool))
    picks = [order[a : a + options.batch] for a in range(0, len(order), options.batch)]
    some = [pool.take(pick).targets for pick in picks[:4]]

    def decode(index: int) -> None:
        some[index % len(some)].at(temperature)

    return {
        "pick the rows of batches": best(lambda: run(pool.take, picks), options.rounds),
        "decode": best(lambda: run(decode, range(len(picks))), options.rounds),
    }


def run(work: Callable[[Any], object], items: Iterable[Any]) -> None:
    """Do it for each, and let go of what comes."""
    for item in items:
        work(item)


def watch(url: str, options: argparse.Namespace) -> dict[str, float]:
    """What `watched` finds, in a process of its own."""
    command = [sys.executable, __file__, "--watch", url]
    for name in ("batch", "batches", "rounds", "threads", "world", "rank-shards"):
        command += [f"--{name}", str(getattr(options, name.replace("-", "_")))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def watched(options: argparse.Namespace) -> dict[str, float]:
    """Seconds to the first batch, wall and CPU; peak memory before it and after some, MiB."""
    before = memory_mib()
    wall, cpu = time.perf_counter(), time.process_time()
    batches = iter(TargetStream(options.watch, batch_size=options.batch))
    next(batches)
    found = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    for _ in range(options.batches):
        next(batches, None)
    return found | {"before": before, "peak": memory_mib()}


def speed(ranks: bytes, scratch: Path, options: argparse.Namespace) -> str:
    """Stages of an epoch, for each codec."""
    header, lines = ["CPU time a position, µs"], []
    for text, temperatures in CODECS:
        codec = Codec.parse(text, temperatures, options.vocab)
        targets = make_targets(codec, read_ranks(ranks, options.vocab), options)
        shards = (make_shard(targets, options.shard, seed) for seed in range(DISTINCT))
        url = make_cache(scratch / f"{len(header)}", codec, shards, ranks, DISTINCT)
        manifest = Cache.open(url).manifest
        found, n = stages(url, options), manifest.positions
        cpu, wall = found[WHOLE]
        weights = targets.at(temperatures[-1]).weights  # type: ignore[union-attr]
        header.append(f"`{text}`, T = {', '.join(f'{t:g}' for t in temperatures)}")
        lines.append(
            {stage: f"{seconds / n * 1e6:.3f}" for stage, (seconds, _) in found.items()}
            | {
                "**positions a second of CPU time**": f"**{n / cpu / 1e6:.2f} M**",
                "positions a second by the clock": f"{n / wall / 1e6:.2f} M",
                "entries a position": f"{(weights > 0).sum() / len(weights):.1f}",
                "stored bytes per position": f"{manifest.bytes / n:.1f}",
            }
        )
        print(header[-1], lines[-1], flush=True)
    return table(header, [[stage, *(line[stage] for line in lines)] for stage in lines[0]])


def states(_: bytes, scratch: Path, options: argparse.Namespace) -> str:
    """The same of hidden states, with what a batch holds and the memory of a reader."""
    header, lines = ["CPU time a position, µs"], []
    for dtype, width in STATES:
        generator = torch.Generator().manual_seed(0)
        sizes = torch.logspace(-1, 1, width)
        some = torch.randn(4096, width, generator=generator) * sizes
        layer = OutputLayer(torch.randn(1024, width, generator=generator))
        layer = layer.with_channels(some.mean(0), some.std(0))
        codec = Hidden(1024, (1.0,), dtype, layer)
        targets = TargetWriter(codec).write(some)
        size = int(options.shard_bytes / codec.bytes_per_position)
        shards = (make_shard(targets, size, seed) for seed in range(DISTINCT))
        url = make_cache(
            scratch / f"{dtype}-{width}", codec, shards, b"", DISTINCT, layer_bytes(layer)
        )
        manifest, found = Cache.open(url).manifest, stages(url, options)
        batch: Any = next(iter(TargetStream(url, batch_size=1)))["targets"]
        held = sum(tensor.nbytes for tensor in batch._tensors().values())
        memory = watch(url, options)
        n, header = manifest.positions, [*header, f"`hidden:{dtype}`, D = {width:,}"]
        lines.append(
            {stage: f"{seconds / n * 1e6:.2f}" for stage, (seconds, _) in found.items()}
            | {
                "stored bytes per position": f"{manifest.bytes / n:,.0f}",
                "bytes of a batch per position": f"{held / len(batch):,.0f}",
                "memory above imports, MiB": f"{memory['peak'] - memory['before']:,.0f}",
            }
        )
        print(header[-1], lines[-1], flush=True)
        shutil.rmtree(url)
    return table(header, [[stage, *(line[stage] for line in lines)] for stage in lines[0]])


def scale(ranks: bytes, scratch: Path, options: argparse.Namespace) -> str:
    """First batch and memory, by the size of the cache."""
    codec = Codec.parse("sample:20", (1.0,), options.vocab)
    targets = make_targets(codec, read_ranks(ranks, options.vocab), options)
    lines = []
    for size in (options.shard // 2, options.large_shard):
        shards = [make_shard(targets, size, seed) for seed in range(DISTINCT)]
        for spans in (10, 100, 1000):
            url = make_cache(scratch / f"{size}-{spans}", codec, shards, ranks, spans)
            cache = Cache.open(url)
            found = watch(url, options)
            lines.append(
                [
                    f"{spans:,}",
                    f"{size:,}",
                    f"{cache.manifest.bytes / 2**30:.2f}",
                    f"{TargetStream(cache, batch_size=options.batch).group}",
                    f"{found['seconds']:.2f}",
                    f"{found['cpu']:.2f}",
                    f"{found['peak'] - found['before']:,.0f}",
                ]
            )
            print(lines[-1], flush=True)
    header = [
        "shards",
        "positions each",
        "GiB",
        "shards a group",
        "first batch, s",
        "CPU s for it",
        "memory above imports, MiB",
    ]
    return table(header, lines)


def ranked(options: argparse.Namespace) -> dict[str, float]:
    """What one rank costs, in this process: its first batch, and some batches after the first."""
    before = memory_mib()
    wall, cpu = time.perf_counter(), time.process_time()
    world = options.world
    stream = TargetStream(
        options.watch,
        batch_size=options.batch * world,
        rank=world * 3 // 7,
        world_size=world,
        sum_over=int,
    )
    batches = stream.batches(1 << 20)
    next(batches)
    found = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    # Whole groups, and whole epochs where they are short, after the first of them.
    entries = stream.caches[0].manifest.shards
    each = entries[0].rows // options.batch
    unit = min(stream.group * each, stream.steps)
    for _ in range(unit):
        next(batches)
    costs = []
    for _ in range(options.rounds):
        cpu, positions = time.process_time(), 0
        for _ in range(-(-options.rank_shards * each // unit) * unit):
            positions += int(next(batches)["labels"].numel())
        costs.append((time.process_time() - cpu) / positions)
    found["position"] = min(costs)
    batches.close()  # type: ignore[attr-defined]
    found |= {"before": before, "peak": memory_mib()}
    rows, touched = [entry.rows for entry in entries], 0
    some = range(0, world, world // 16 + 1)
    for stretch in some:
        for part in order(0, 0, rows, stream.group, streams=world, stream=stretch):
            touched += sum(entries[shard].bytes for shard in np.unique(part[:, 0]))
    return found | {"bytes": touched / len(some)}


def ranks(table_of_ranks: bytes, scratch: Path, options: argparse.Namespace) -> str:
    """One rank of many, by the number of ranks and the size of the cache."""
    codec = Codec.parse("sample:20", (1.0,), options.vocab)
    targets = make_targets(codec, read_ranks(table_of_ranks, options.vocab), options)
    shards = [make_shard(targets, options.rank_shard, seed) for seed in range(DISTINCT)]
    lines = []
    for spans in (1000, 100_000):
        url = make_cache(scratch / f"ranks-{spans}", codec, shards, table_of_ranks, spans)
        size, alone = Cache.open(url).manifest.bytes, 0.0
        for world in (1, 64, 1024):
            options.world = world
            found = watch(url, options)
            alone = alone or found["position"]
            lines.append(
                [
                    f"{spans:,}",
                    f"{world:,}",
                    f"{found['bytes'] / 2**20:,.1f}",
                    f"{found['bytes'] / (size / world):.3f}",
                    f"{found['seconds']:.2f}",
                    f"{found['cpu']:.2f}",
                    f"{found['peak'] - found['before']:,.0f}",
                    f"{world / found['position'] / 1e6:,.1f} M",
                    f"{alone / found['position']:.2f}",
                ]
            )
            print(lines[-1], flush=True)
    header = [
        "shards",
        "ranks",
        "MiB a rank and epoch",
        "of its share",
        "first batch, s",
        "CPU s for it",
        "memory above imports, MiB",
        "positions a second of CPU time, all ranks",
        "of linear",
    ]
    return table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--logits", help="saved by numpy: [positions, V], floats; default: made up")
    add("--vocab", type=int, default=128_256, help="ids of made-up logits")
    add("--positions", type=int, default=4096, help="positions of made-up logits")
    add("--draws", type=int, default=8, help="times each position is encoded")
    add("--shard", type=int, default=1 << 18, help="positions of a shard where stages are timed")
    add("--large-shard", type=int, default=1 << 20, help="positions of a shard of large corpora")
    add("--batch", type=int, default=32, help="rows of a batch")
    add("--batches", type=int, default=800, help="batches read before memory is looked at")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--scratch", help="folder for the caches; default: the system's")
    add("--markdown", action="store_true", help="keep the outcome in RESULTS.md")
    add("--ranks", action="store_true", help="only 4, kept in a section of its own")
    add("--states", action="store_true", help="only 5, kept in a section of its own")
    add("--shard-bytes", type=float, default=2**26, help="of a shard of hidden states, about")
    add("--rank-shard", type=int, default=1 << 17, help="positions of a shard where ranks read")
    add("--rank-shards", type=int, default=15, help="shards a rank reads in a round")
    add("--watch", help=argparse.SUPPRESS)
    add("--world", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.watch is not None:
        print(json.dumps(ranked(options) if options.world else watched(options)))
        return
    if options.logits:
        options.vocab = np.load(options.logits, mmap_mode="r").shape[1]
    made_by = (ranks,) if options.ranks else (states,) if options.states else (speed, scale)
    usual = b"" if options.states else rank_table(options)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        tables = [make(usual, Path(scratch), options) for make in made_by]
    source = "logits of a teacher" if options.logits else "made-up logits"
    source = "made-up states" if options.states else f"{source}, {options.vocab:,} ids"
    load = f"load average {os.getloadavg()[0]:.0f}"
    text = "\n\n".join([f"{source}; {machine()}; {load}.", *tables])
    print(text)
    if options.markdown:
        section, command = ("stream-ranks", " --ranks") if options.ranks else ("stream", "")
        if options.states:
            section, command = "stream-states", " --states"
        keep(section, f"`python benchmarks/stream.py{command}`: {text}")


if __name__ == "__main__":
    main()
