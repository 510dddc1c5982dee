"""What targets by content cost, beside the stream on the same cache; and an index of many keys.

    python benchmarks/lookup.py [--markdown]

1. Random rows of a cache of `sample:20` (rows of 512 positions, made-up logits as in `stream.py`),
   in batches as a collator of transformers makes them, against an epoch of `TargetStream`, in
   turns. CPU seconds of the whole process; the best of some rounds. The system's page cache holds
   all files: disks are not measured. Reported beside it: the first lookup, which indexes the cache
   and decodes each shard once.
2. The same where every lookup opens its shard's decoded rows anew, as in a cache of more shards
   than a process keeps mapped (`_OPEN`).
3. An index of `--keys` made-up keys: seconds and memory to make and to open it, and to find keys.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import stream
import torch
from results import keep, machine, memory_mib, table

from kdcache.cache import Cache
from kdcache.stream import TargetStream, content, lookup
from kdcache.stream.content import RECORD, RowIndex
from kdcache.stream.lookup import TargetLookup
from kdcache.targets import Codec
from kdcache.targets.soft import read_ranks
from kdcache.tasks import IGNORE

BATCH = 32
ROW = 512
SHARDS = 8
GROWS = """\
With the keys grow the file and the time to make it, which is mostly the reading of their rows (the
line "the index" above, on one core); memory is that of one run of 4 million keys, and pages of the
mapped file that the system may take back. 10^9 rows are 24 GB beside the cache, and as much again
while they are merged."""


def batches(cache: Cache) -> list[dict[str, torch.Tensor]]:
    """All rows in random order, as a trainer has them: a label beside its own id."""
    parts = [cache.read(span, targets=False) for span in range(cache.spec.spans)]
    ids = np.concatenate([part.input_ids for part in parts]).reshape(-1, ROW)
    last = np.concatenate([part.labels for part in parts]).reshape(-1, ROW)[:, -1:]
    rows = np.concatenate([ids, last], 1)[np.random.default_rng(0).permutation(len(ids))]
    found = []
    for begin in range(0, len(rows), BATCH):
        input_ids = torch.from_numpy(rows[begin : begin + BATCH].astype(np.int64))
        labels = input_ids.clone()
        labels[:, 0] = IGNORE
        found.append({"input_ids": input_ids, "labels": labels})
    return found


def cpu(work: Callable[[], Any]) -> float:
    """CPU seconds of this process."""
    started = time.process_time()
    work()
    return time.process_time() - started


def speed(scratch: Path, options: argparse.Namespace) -> list[list[str]]:
    """Lines of the first table."""
    stream.ROW = ROW
    codec = Codec.parse("sample:20", (1.0,), options.vocab)
    ranks = stream.rank_table(options)
    targets = stream.make_targets(codec, read_ranks(ranks, options.vocab), options)
    shards = (stream.make_shard(targets, options.shard, seed) for seed in range(SHARDS))
    with patch.object(stream.CacheSpec, "__init__", _whole(stream.CacheSpec.__init__)):
        url = stream.make_cache(scratch / "cache", codec, shards, ranks, SHARDS)
    cache = Cache.open(url)
    mixed = batches(cache)
    positions = cache.manifest.positions

    def epoch() -> None:
        for _ in TargetStream(url, batch_size=BATCH):
            pass

    def looked_up(one: TargetLookup) -> None:
        for batch in mixed:
            one.lookup(**batch)

    one = TargetLookup(cache)
    indexed = cpu(lambda: one._indexes)
    decoded = cpu(lambda: looked_up(one))
    costs: dict[str, list[float]] = {"stream": [], "lookup": [], "opened anew": []}
    for _ in range(options.rounds):
        costs["stream"].append(cpu(epoch))
        costs["lookup"].append(cpu(lambda: looked_up(one)))
        with patch.object(lookup, "_OPEN", 1):
            costs["opened anew"].append(cpu(lambda: looked_up(one)))
    usual = min(costs["stream"])
    named = {
        "an epoch of `TargetStream`": usual,
        "the same rows by `TargetLookup`, in random order": min(costs["lookup"]),
        "the same, with one shard mapped at a time": min(costs["opened anew"]),
        "the first time: each shard decoded": decoded,
        "the first time: the index": indexed,
    }
    size = sum(path.stat().st_size for path in Path(os.environ["KDCACHE_DISK"]).glob("*.rows"))
    print(
        f"decoded {size / positions:.1f} bytes a position, stored "
        f"{cache.manifest.bytes / positions:.1f}"
    )
    return [
        [
            name,
            f"{cost / positions * 1e6:.3f}",
            f"{positions / cost / 1e6:.2f} M",
            f"{usual / cost:.2f}",
        ]
        for name, cost in named.items()
    ] + [
        [
            "bytes a position: stored, decoded",
            f"{cache.manifest.bytes / positions:.1f}",
            f"{size / positions:.1f}",
            "",
        ]
    ]


def _whole(init: Any) -> Any:
    """Of a spec: rows that are found by content."""

    def made(self: Any, **values: Any) -> None:
        init(self, **{**values, "rows": {"max_length": ROW, "packing": "whole"}})

    return made


class _Cache:
    """As much of a cache as making an index needs."""

    digest = "00" * 32


def index(scratch: Path, options: argparse.Namespace) -> list[list[str]]:
    """Lines of the second table."""
    lines = []
    for keys in (options.keys // 10, options.keys):
        before = memory_mib(most=False)
        making = content._Making(_Cache(), scratch)  # type: ignore[arg-type]
        making._scratch = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 closed by `making`
        making._ends = [0]
        rng, started = np.random.default_rng(0), time.perf_counter()
        for begin in range(0, keys, content._RUN):
            records = np.zeros(min(content._RUN, keys - begin), RECORD)
            for name in ("high", "low"):
                records[name] = rng.integers(0, 2**64, len(records), np.uint64)
            records["row"] = np.arange(len(records))
            making.add(records)
        with (scratch / "keys").open("w+b") as file:
            making(file)
        made, peak = time.perf_counter() - started, memory_mib() - before
        started = time.perf_counter()
        opened = RowIndex(scratch / "keys", _Cache.digest)
        opening = time.perf_counter() - started
        some = opened.records[rng.integers(0, keys, (1000, BATCH))]
        wanted = [[r.tobytes()[:16] for r in one] for one in some]
        started = time.perf_counter()
        places = [opened.find(one) for one in wanted]
        finding = (time.perf_counter() - started) / (1000 * BATCH)
        assert all(place is not None for one in places for place in one)
        size = (scratch / "keys").stat().st_size
        lines.append(
            [
                f"{keys:,}",
                f"{size / keys:.3f}",
                f"{made:.1f}",
                f"{peak:,.0f}",
                f"{opening * 1e3:.2f}",
                f"{finding * 1e6:.1f}",
            ]
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--vocab", type=int, default=128_256, help="ids of made-up logits")
    add("--positions", type=int, default=1024, help="positions of made-up logits")
    add("--draws", type=int, default=8, help="times each position is encoded")
    add("--shard", type=int, default=1 << 17, help="positions of a shard")
    add("--keys", type=int, default=10**7, help="made-up keys of an index")
    add("--rounds", type=int, default=3)
    add("--markdown", action="store_true", help="keep the outcome in RESULTS.md")
    options = parser.parse_args()
    options.logits = None
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["KDCACHE_DISK"] = f"{scratch}/disk"
        keys = index(Path(scratch), options)  # first: memory is the peak of the process
        rows = speed(Path(scratch), options)
    head = ["", "CPU time a position, µs", "positions a second of CPU time", "of the stream"]
    many = ["keys", "bytes a key", "s to make", "MiB for it", "ms to open", "µs to find a key"]
    load = f"load average {os.getloadavg()[0]:.0f}"
    what = f"`sample:20`, T = 1, rows of {ROW}, batches of {BATCH}"
    text = f"{what}; {machine()}; {load}.\n\n{table(head, rows)}\n\n{table(many, keys)}\n\n{GROWS}"
    print(text)
    if options.markdown:
        keep("lookup", f"`python benchmarks/lookup.py`: {text}")


if __name__ == "__main__":
    main()
