"""`kdcache transcode`: another codec or other temperatures of a cache, without its teacher.

    options -> source cache -> CacheSpec (the source's, but for codec and temperatures) ->
    `make_cache`

The spans are the source's, and so is everything of a build after planning: workers, Ray, faults,
resume, seal. Logits that determine the new targets are read a slice of positions at a time, in the
order of the rows; top-k targets are narrowed as they are.

Cost: the source is read once; the codec's arithmetic, and no forward of a teacher. Memory of one
decoded shard of the source for each span in flight, and one slice of logits.
Guarantee: rows, labels and the log-probabilities of labels are the source's. Noise is keyed by
position, so a sample is the one that a build with the source's logits would have drawn.
"""

from __future__ import annotations

import concurrent.futures as futures
import dataclasses
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from kdcache.cache import Cache
from kdcache.cache.shard import ShardData
from kdcache.commands.build.driver import Progress
from kdcache.commands.build.make import BuildResult, ShardPlan, make_cache
from kdcache.commands.build.packer import Packed, Packer, Positions, Steps
from kdcache.commands.build.prepare import check_answers, gpus_of, ranks_by_count
from kdcache.commands.build.source import Answers, SpanRows, TargetSource
from kdcache.commands.options import TranscodeOptions
from kdcache.errors import UsageError
from kdcache.targets import (
    Codec,
    DenseTargets,
    SoftTargets,
    SparseTargets,
    Targets,
    TopK,
    with_logits,
)
from kdcache.tasks import IGNORE, TASKS, positions
from kdcache.teacher.memory import slice_positions

Sent = TypeVar("Sent", Tensor, Targets)


@dataclass(frozen=True)
class SourceShard:
    """A unit of work: a shard of the source, which becomes that of the same span.

    Attributes:
        index: the span.
        group: of units that share what a worker keeps: there is none.
    """

    index: int
    records: str
    group: str = ""


@dataclass(frozen=True)
class CacheSourceOptions:
    """A sealed cache to read from.

    Attributes:
        digest: its digest, so that it is the same one for every worker.
        device: "cpu" or "cuda", where new targets are computed.
    """

    url: str
    digest: str
    device: str

    def open(self, url: str) -> CacheSource:
        """Open it for the codec of a new cache."""
        source = Cache.open(self.url)
        if source.digest != self.digest:
            raise UsageError(f"{source.url} was replaced meanwhile. Run the command again.")
        return CacheSource(source, Cache.resume(url), self.device)


@dataclass(kw_only=True)
class StoredRows(SpanRows):
    """A shard of the source, as far as it is needed."""

    data: ShardData | None = None


class CacheSource(TargetSource[SourceShard, StoredRows]):
    """A sealed cache whose targets are encoded anew."""

    def __init__(self, source: Cache, cache: Cache, device: str) -> None:
        super().__init__(cache)
        self.source, self.device = source, device
        width = source.spec.vocab_size
        self.batch_tokens = slice_positions(device, width, 4)
        self._from = source.codec()

    def read(self, work: SourceShard, steps: Steps) -> StoredRows:
        """See `Source.read`."""
        entry = self.source.manifest.shards[work.index]
        data = self.source.read(work.index)
        return StoredRows(
            shard=partial(_with_targets, data),
            skipped=entry.skipped,
            filtered=entry.filtered,
            clipped_mass=entry.clipped_mass,
            data=data,
        )

    @torch.inference_mode()
    def answer(self, rows: StoredRows, packer: Packer, steps: Steps) -> Answers:
        """See `Source.answer`."""
        assert rows.data is not None, "it was read"
        targets, at = rows.data.targets, positions_of(rows.data)
        total = len(targets)
        order = [np.arange(total)]
        if isinstance(self._from, TopK):
            assert isinstance(self.codec, TopK), "checked when it was planned"
            done: futures.Future[Packed] = futures.Future()
            done.set_result(Packed(narrowed(targets, self.codec), {}, np.float32(0)))
            return [done], order
        uniform = self._send(torch.from_numpy(at.noise(packer.seed, packer.span)))
        none = torch.zeros((), device=self.device)
        parts = []
        starts = range(0, total, self.batch_tokens)
        steps.begin(len(starts))
        for start in starts:
            steps()
            piece = slice(start, min(start + self.batch_tokens, total))
            some = targets.take(np.arange(piece.start, piece.stop))
            logits = self._logits(some)
            parts.append(packer.put(self.codec.encode(logits, uniform[piece]), none, at, start))
            steps.batch(piece.stop - start)
        return parts, order if parts else []

    def _logits(self, targets: SoftTargets) -> Tensor:
        """Logits [n, V] of some positions of the source, float32, on the device."""
        found = with_logits(self._send(targets.at(targets.codec.temperatures[0])))
        assert isinstance(found, DenseTargets), "checked when it was planned"
        return found.logits

    def _send(self, values: Sent) -> Sent:
        """Copy to the device, without waiting for what it has still to do."""
        if self.device == "cuda":
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)


def _with_targets(data: ShardData, targets: SoftTargets, **_: np.ndarray) -> ShardData:
    return dataclasses.replace(data, targets=targets)


def positions_of(data: ShardData) -> Positions:
    """Row, token and label of each position of a shard, in row-major order."""
    rows = np.repeat(np.arange(len(data)), np.diff(data.position_offsets))
    flat = np.flatnonzero(positions(data.labels, data.task)) if len(data) else rows
    tokens = flat - data.offsets[rows] if len(data.labels) == len(data.input_ids) else 0 * rows
    return Positions(rows, tokens, np.zeros(0, np.int64))


def narrowed(targets: SoftTargets, codec: TopK) -> SoftTargets:
    """Top-k targets with fewer ids, at some of the temperatures.

    The ids that are left out go into the tail, with what they weigh at each temperature; the others
    keep their weights.
    """
    assert isinstance(targets.codec, TopK), "top-k targets"
    tails = []
    for temperature in codec.temperatures:
        found = targets.at(temperature)
        assert isinstance(found, SparseTargets), "top-k targets are sparse"
        tails.append(found.tail + found.weights[:, codec.k :].sum(-1))
    ids, surprises = targets.columns["ids"], targets.codec.surprises(targets.columns)
    columns = codec.stored(
        ids[:, : codec.k], surprises[:, : codec.k], torch.stack(tails, -1).clamp_max(1).numpy()
    )
    return SoftTargets(codec, columns, targets.rank_to_id)


def check_source(source: Codec, codec: Codec) -> None:
    """Refuse targets that do not determine the new ones.

    Raises:
        UsageError: states why, and what would do.
    """
    if isinstance(source, TopK):
        if not isinstance(codec, TopK) or codec.k > source.k:
            raise UsageError(
                f"{source} targets lack what {codec} needs: from them, only topk of {source.k} ids "
                "or fewer can be made. Transcode a dense cache, or build with the teacher."
            )
    elif codec.reads_states:
        raise UsageError(
            f"{codec} keeps the teacher's hidden states, which no cache's logits determine. Build "
            "it with the teacher."
        )
    elif not source.keeps_logits:
        raise UsageError(
            f"{source} targets are draws from the teacher's distributions, from which those cannot "
            "be found again. Transcode a dense or hidden cache, or build with the teacher."
        )
    for temperature in codec.temperatures:
        source.check_temperature(temperature)


_SPEED = 1e8  # logits that a core encodes in a second, roughly
_COUNTED = 16  # shards in which labels are counted for frequency ranks


def transcode(
    options: TranscodeOptions,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> BuildResult:
    """Make a cache from another, or finish an interrupted one.

    Args:
        on_progress: called in this thread, a few times a second at most.
        report: takes a line about what is done before the first progress.

    Raises:
        UsageError: wrong options, or a source whose targets do not determine the new ones.
        IncompleteError: interrupted, no space left, or spans set aside; the same command resumes;
            or the source is not finished.
        CorruptCacheError: the source is damaged.
    """
    return make_cache(functools.partial(_plan, options), options.out, options, on_progress, report)


def _plan(options: TranscodeOptions) -> ShardPlan:
    source = Cache.open(options.cache)
    spec = source.spec
    temperatures = options.temperatures or spec.temperatures
    check_answers(options.codec, temperatures, spec.task)
    codec = Codec.parse(options.codec, temperatures, spec.vocab_size)
    check_source(source.codec(), codec)
    ranks = b""
    if TASKS[spec.task].over_ids and codec.uses_ranks:
        ranks = source.read_beside("ranks.u32") if spec.ranks else _count_ranks(source)
    gpus = gpus_of(options)
    digest = source.digest
    return ShardPlan(
        dataclasses.replace(
            spec,
            codec=str(codec),
            temperatures=codec.temperatures,
            seed=options.seed,
            ranks=hashlib.sha256(ranks).hexdigest() if ranks else None,
            levels=codec.levels,
            output_layer=None,
            source={"codec": spec.codec, "digest": digest},
        ),
        source.tokenizer_files(),
        ranks,
        {**source.notes, "source": source.url},
        [
            SourceShard(entry.span, f"{source.url}: shard {entry.name}")
            for entry in source.manifest.shards
        ],
        CacheSourceOptions(source.storage.url, digest, "cuda" if gpus else "cpu"),
        gpus,
        source.manifest.positions * spec.vocab_size / _SPEED / max(1, spec.spans),
        opening="opening the source",
    )


def _count_ranks(source: Cache) -> bytes:
    """A table of frequency ranks by the labels of a few shards, spread over the source."""
    full = [entry.span for entry in source.manifest.shards if entry.positions]
    chosen = np.unique(np.linspace(0, len(full) - 1, min(len(full), _COUNTED)).astype(int))
    counts = np.zeros(source.spec.vocab_size, np.int64)
    for i in chosen:
        labels = source.read(full[i], targets=False).labels
        labels = labels[(labels != IGNORE) & (labels < len(counts))]
        counts += np.bincount(labels, minlength=len(counts))
    return ranks_by_count(counts)
