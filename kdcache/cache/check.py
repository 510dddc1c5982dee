"""The problems of a cache: every file is hashed first and opened second.

A manifest may come from anywhere; its hashes only prove that the files are the ones it was written
for. So a shard with the right hash is opened in a sandboxed subprocess first
(`kdcache.cache.sandbox`). Then its values are checked in this process: ids are in the vocabulary,
probabilities are valid.

Cost: every byte is read once and decoded twice; a third of a second for the subprocess.
Guarantee: if `problems` finds none in a sealed cache, every file is as it was written and every
value can be used for training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdcache.cache.cache import Cache
from kdcache.cache.columns import answer_sums
from kdcache.cache.manifest import ShardEntry
from kdcache.cache.sandbox import Sandbox
from kdcache.cache.shard import ShardData, check_ids, read_counts
from kdcache.cache.spec import CacheSpec
from kdcache.cache.store import ShardStore
from kdcache.errors import CorruptCacheError, KdcacheError
from kdcache.targets import AnchoredTargets, DenseTargets, HiddenTargets
from kdcache.targets.label_logprob import SCALE, decode_logprobs, sum_logprobs

_VALUES = 1 << 24  # decoded at a time
# Scratch, logs, and what a hub keeps beside: nothing reads them.
_NOT_OURS = ("tmp", "events", "events.jsonl", "README.md", ".gitattributes")


@dataclass(frozen=True)
class Problem:
    """A problem of a cache.

    Attributes:
        text: the problem and its cure, in a line that names the file.
        stray: whether it is a file that does not belong to the cache, and does no harm.
    """

    file: str
    text: str
    stray: bool = False


def problems(cache: ShardStore[Any]) -> Iterator[Problem]:
    """Check all files of a sealed cache or generated corpus, after its spec and manifest.

    Yields:
        One problem a file at most, as they are found: strays first, the shards in order.
    """
    for name in _strays(cache):
        yield Problem(
            name,
            f"{name} does not belong to this cache, and nothing reads it. Remove it; `kdcache gc` "
            f"removes what crashed builds have left.",
            stray=True,
        )
    broken = set()
    for name in cache.files:
        try:
            cache.check_beside(name)
            if name == "ranks.u32" and isinstance(cache, Cache):
                _ = cache.rank_to_id
        except CorruptCacheError as error:
            yield Problem(name, str(error))
            broken.add(name)
    if not any(name.startswith("tokenizer/") for name in broken):
        try:
            cache.tokenizer()
        except Exception as error:  # of whatever class reads these files
            yield Problem("tokenizer", f"the tokenizer cannot be loaded ({error}).")
    readable = all(name.startswith("tokenizer/") for name in broken)
    with Sandbox() as sandbox:
        for entry in cache.manifest.shards:
            try:
                if isinstance(cache, Cache):
                    check_shard(cache, entry, sandbox, values=readable)
                else:
                    cache.check_shard(entry)
            except KdcacheError as error:
                yield Problem(f"shards/{entry.name}", _naming(entry, str(error)))


def check_shard(
    cache: Cache,
    entry: ShardEntry,
    sandbox: Sandbox,
    *,
    values: bool = True,
) -> None:
    """Check the bytes of a shard, then whether it can be opened, then what it holds.

    Args:
        sandbox: the process that opens it first.
        values: False leaves the values out, where what is needed to read them is broken.

    Raises:
        CorruptCacheError: it is not the one of the manifest, or not what a shard must be.
    """
    with cache.hold(entry, fresh=True) as path:
        sandbox.open(path)
        _, facts = read_counts(path)
        if facts != cache.stated(entry.span, entry.facts):
            raise CorruptCacheError(f"it belongs to another cache ({facts}).")
        if values:
            data = cache.parse(path, entry)
            if entry.hard_labels != (None if data.hard_labels is None else data.ends("hard")[-1]):
                raise CorruptCacheError("its manifest has another number of labels without target.")
            unsure = cache.spec.positions or {"entropy_code": 0}
            if data.entropy is not None and (data.entropy < unsure["entropy_code"]).any():
                raise CorruptCacheError("a target is of a teacher that was sure.")
            check_ids(data, cache.spec, lambda: cache.known_ids)
            check_values(data, cache.spec)
            codes = data.every_logprob
            sums = (None, None) if codes is None else sum_logprobs(codes)
            if sums != (entry.label_nats, entry.impossible_labels):
                raise CorruptCacheError(
                    f"its labels' log-probabilities add up to {sums}, the manifest says otherwise."
                )
            if data.answer_logprob is not None and codes is not None:
                _check_sums(data.answer_logprob, data, codes)


def _check_sums(sums: np.ndarray, data: ShardData, codes: np.ndarray) -> None:
    """Refuse sums of answers that the codes of their labels cannot have come from."""
    levels = codes.astype(np.float64)
    # A code stands for a value less than a step away; the last one also for any value below it.
    low, high = (
        answer_sums(data.every_label, data.offsets, values + sign * (2 * levels + 1) / SCALE)
        for values, sign in ((decode_logprobs(codes), -1), (-(levels**2) / SCALE, 1))
    )
    slack = 1e-6 * np.abs(high)  # of float32
    wrong = (sums + slack < low) | (sums - slack > high)
    if wrong.any():
        row = int(wrong.argmax())
        raise CorruptCacheError(
            f"the answer in its row {row} has a log-probability of {sums[row]:g}, and its labels "
            f"{low[row]:g} to {high[row]:g}."
        )


def check_values(data: ShardData, spec: CacheSpec) -> None:
    """Check the targets of a shard that could be read.

    Cost: the targets are decoded once at each declared temperature, some positions at a time.

    Raises:
        CorruptCacheError: a logit or a weight is impossible.
    """
    targets = data.targets
    counts = sum(targets.codec.counts(targets.columns).values(), np.zeros(len(targets), np.int64))
    width = max(1, int(counts.max(initial=0)))
    step = max(1, _VALUES // (spec.vocab_size if targets.codec.keeps_logits else width))
    for start in range(0, len(targets), step):
        some = targets.take(np.arange(start, min(start + step, len(targets))))
        for temperature in spec.temperatures:
            found = some.at(temperature)
            if isinstance(found, HiddenTargets):
                # States of finite numbers may still make logits beyond what float32 holds.
                if not (found.states.isfinite().all() and found.dense().logits.isfinite().all()):
                    raise CorruptCacheError("a hidden state or its logits are NaN or infinite.")
                break
            if isinstance(found, DenseTargets):
                if not found.logits.isfinite().all():
                    raise CorruptCacheError("a logit is NaN or infinite.")
                break
            inverse = (found.inverse,) if isinstance(found, AnchoredTargets) else ()
            for numbers in (found.weights, found.tail, *inverse):
                if not (numbers.isfinite().all() and (numbers >= 0).all()):
                    raise CorruptCacheError("a weight is negative, NaN or infinite.")


def _strays(cache: ShardStore[Any]) -> Iterator[str]:
    """Names of files and folders in the cache that spec and manifest do not know."""
    ours = {"spec.json", "manifest.json", *cache.files, *_NOT_OURS}
    ours |= {f"shards/{entry.name}" for entry in cache.manifest.shards}
    folders = {name.split("/")[0] for name in ours if "/" in name}
    yield from (name for name in cache.storage.entries() if name not in ours | folders)
    for folder in sorted(folders):
        names = (f"{folder}/{name}" for name in cache.storage.names(folder))
        yield from (name for name in names if name not in ours)


def _naming(entry: ShardEntry, text: str) -> str:
    return text if entry.name in text else f"shard {entry.span}: {entry.name}: {text}"
