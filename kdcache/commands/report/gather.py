"""What is at a path: a cache, a run or a sweep, read for the page.

Cost: of a cache its two JSON files, a shard for each shown row and two for the figures of its
targets; of a run its result and its log. Guarantee: nothing is written, and no figure of a file
from elsewhere is taken for a number that is none.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.cache import Cache
from kdcache.cache.generated import GeneratedCorpus
from kdcache.cache.sandbox import Sandbox
from kdcache.cache.shard import ShardData
from kdcache.cache.spec import is_missing
from kdcache.commands.finetune.finetune import RESULT_FILE as TEACHER_FILE
from kdcache.commands.generate.look import GeneratedView, surprises
from kdcache.commands.inspect import default_temperature, inspect
from kdcache.commands.inspect_result import InspectResult, RowView
from kdcache.commands.options import InspectOptions, ReportOptions
from kdcache.commands.run_folder import METRICS_FILE, RESULT_FILE, read_metrics
from kdcache.errors import UsageError, doing
from kdcache.files import local_path
from kdcache.humanize import redacted
from kdcache.storage import open_storage, redact
from kdcache.targets import DenseTargets, with_logits
from kdcache.targets.label_logprob import decode_entropies, decode_logprobs
from kdcache.tasks import TASKS, positions

SWEEP_FILE = "results.json"
_SHARDS = 2  # shards with targets that are looked at
_POSITIONS = 2048  # of a shard, at most
_NUMBERS = 1 << 24  # of decoded logits at a time


@dataclass(frozen=True)
class TargetFigures:
    """Means over positions of a cache's targets at one temperature; None where not known.

    Attributes:
        entropy: nats; at T = 1 as the cache keeps it, else of top-k a lower bound, the tail counted
            as one id.
        best: probability of the most probable id.
        mass: probability on the stored ids.
        entries: ids of a position.
    """

    temperature: float
    entropy: float | None
    best: float | None
    mass: float | None
    entries: float


@dataclass(frozen=True)
class CachePart:
    """A cache.

    Attributes:
        facts: what `inspect` finds.
        figures: of the targets, at each declared temperature.
        positions: of which these are means.
        surprise: minus the teacher's log-probability of labels, in nats.
        notes: of who built it with what.
    """

    facts: InspectResult
    rows: tuple[RowView, ...]
    figures: tuple[TargetFigures, ...]
    positions: int
    surprise: tuple[float, ...]
    notes: dict[str, Any]


@dataclass(frozen=True)
class RunPart:
    """A run of `train`, finished or not, or of `finetune`.

    Attributes:
        finished: whether it has a result.
        options: of the run; empty before it has finished.
        identity: what it was trained on.
        log: the lines of its log: numbers by name.
    """

    path: str
    finished: bool
    options: dict[str, Any]
    identity: dict[str, Any]
    result: dict[str, Any]
    log: tuple[dict[str, float], ...]


@dataclass(frozen=True)
class SweepPart:
    """A sweep: its folder and its table."""

    path: str
    results: dict[str, Any]


Part = CachePart | RunPart | SweepPart


def gather(path: str, options: ReportOptions) -> Part:
    """Read what is at a path.

    Raises:
        UsageError: nothing is there that a report knows, or it is damaged.
        CorruptCacheError: a cache's files contradict each other.
    """
    storage = open_storage(path)
    if storage.exists("spec.json"):
        return _cache(path, options)
    if is_missing(storage):
        raise UsageError(
            f"there is no folder {redact(path)}: expected a cache, run or sweep. Check the path."
        )
    folder = local_path(path, "PATH")
    if any((folder / name).is_file() for name in (RESULT_FILE, TEACHER_FILE, METRICS_FILE)):
        return _run(folder)
    if (folder / SWEEP_FILE).is_file():
        return SweepPart(str(folder), _document(folder / SWEEP_FILE))
    raise UsageError(
        f"{redact(path)} is no cache (it has no spec.json), no run (no {RESULT_FILE} or "
        f"{METRICS_FILE}) and no finished sweep (no {SWEEP_FILE})."
    )


def finite(value: float | None) -> float | None:
    """A finite number; None for another, or where there is none."""
    return None if value is None or not math.isfinite(value) else float(value)


def _document(path: Path) -> dict[str, Any]:
    with doing(f"reading {path}"):
        return dict(redacted(dict(json.loads(path.read_text()))))


def _run(folder: Path) -> RunPart:
    there = [folder / name for name in (RESULT_FILE, TEACHER_FILE) if (folder / name).is_file()]
    document = _document(there[0]) if there else {}
    with doing(f"reading {folder / METRICS_FILE}"):
        lines = read_metrics(folder)
    log = tuple({k: v for k, v in line.items() if finite(v) is not None} for line in lines)
    given = {name: document.get(name, {}) for name in ("options", "identity", "result")}
    return RunPart(str(folder), bool(document), **given, log=log)


# Caches


def _cache(path: str, options: ReportOptions) -> CachePart:
    facts = inspect(InspectOptions(path))
    chosen = np.linspace(0, facts.rows, min(options.rows, facts.rows), endpoint=False).astype(int)
    rows, surprise = [], tuple[float, ...]()
    for number_of_row in np.unique(chosen):
        found = inspect(InspectOptions(path, row=int(number_of_row), top=options.top)).row
        assert found is not None, "it was asked for"
        rows.append(found)
    if isinstance(facts, GeneratedView):
        corpus = GeneratedCorpus.resume(path)
        surprise = surprises(corpus) if corpus.sealed else ()
        return CachePart(facts, tuple(rows), (), 0, surprise, redacted(corpus.notes))
    cache = Cache.resume(path)
    figures: tuple[TargetFigures, ...] = ()
    surprise = ()
    positions = 0
    if cache.sealed and TASKS[cache.spec.task].distribution:
        figures, surprise, positions = _targets(cache)
    return CachePart(facts, tuple(rows), figures, positions, surprise, redacted(cache.notes))


def _targets(cache: Cache) -> tuple[tuple[TargetFigures, ...], tuple[float, ...], int]:
    """Figures of the targets of a few shards, the surprise at their labels, and of how many."""
    temperatures = tuple(cache.spec.temperatures) or (default_temperature(cache),)
    full = [entry for entry in cache.manifest.shards if entry.positions]
    chosen = np.unique(np.linspace(0, len(full) - 1, min(len(full), _SHARDS)).astype(int))
    sums: dict[float, list[np.ndarray]] = {t: [] for t in temperatures}
    surprise: list[float] = []
    with Sandbox() as sandbox:
        for i in chosen:
            with cache.hold(full[i]) as path:
                sandbox.open(path)
                data = cache.parse(path, full[i])
            most = min(_POSITIONS, max(16, _NUMBERS // cache.spec.vocab_size))
            chosen = _spread(len(data.targets), most)
            for t in temperatures:
                sums[t].append(_figures(data, chosen, t))
            surprise += _surprise(cache, data, chosen)
    joined = {t: np.concatenate(parts) for t, parts in sums.items() if parts}
    figures = []
    for t, part in joined.items():
        entropy, best, mass = (None if math.isnan(m) else float(m) for m in part.mean(0)[:3])
        figures.append(TargetFigures(t, entropy, best, mass, float(part.mean(0)[3])))
    return tuple(figures), tuple(surprise), len(next(iter(joined.values()), ()))


def _spread(number: int, most: int) -> np.ndarray:
    """Some of so many numbers, spread evenly."""
    return np.unique(np.linspace(0, number - 1, min(most, number)).astype(int))


def _figures(data: ShardData, chosen: np.ndarray, temperature: float) -> np.ndarray:
    """Entropy, best probability, stored mass and entries of some positions; NaN where unknown."""
    targets = with_logits(data.targets.take(chosen).at(temperature))
    if isinstance(targets, DenseTargets):
        p = torch.softmax(targets.logits.double() / temperature, -1)
        entropy = torch.special.entr(p).sum(-1)
        width = torch.full_like(entropy, p.shape[-1])
        found = [entropy, p.amax(-1), torch.ones_like(entropy), width]
    else:
        weights, tail = targets.weights.double(), targets.tail.double()
        entries = (weights > 0).sum(-1).double()
        unknown = torch.full_like(tail, math.nan)
        found = [unknown, unknown, unknown, entries]
        if targets.exact:
            entropy = torch.special.entr(weights).sum(-1) + torch.special.entr(tail)
            found = [entropy, weights.amax(-1), 1 - tail, entries]
    if temperature == 1 and data.entropy is not None:  # of all ids, stored or not
        found[0] = torch.from_numpy(decode_entropies(data.entropy[chosen])).double()
    return torch.stack(found, -1).numpy()


def _surprise(cache: Cache, data: ShardData, chosen: np.ndarray) -> list[float]:
    """Minus the log-probability of the labels of some positions, where it is known; of as many
    among all labels where some have no soft target.
    """
    if (codes := data.every_logprob) is not None:
        if data.hard_labels is not None:
            chosen = _spread(len(codes), len(chosen))
        return [-float(logprob) for logprob in decode_logprobs(codes[chosen])]
    if TASKS[cache.spec.task].over_ids or not cache.codec().any_temperature:
        return []
    targets = with_logits(data.targets.take(chosen).at(1.0))
    assert isinstance(targets, DenseTargets), "right at any temperature"
    logprobs = torch.log_softmax(targets.logits.double(), -1)
    marked = positions(data.labels, data.task)
    labels = torch.from_numpy(np.asarray(data.labels)[marked][chosen].astype(np.int64))
    known = labels >= 0
    return [float(-x) for x in logprobs[known].gather(-1, labels[known, None])[:, 0]]
