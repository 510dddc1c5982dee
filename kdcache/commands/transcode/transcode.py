"""`kdcache transcode`: another codec or other temperatures of a cache, without its teacher.

    options -> source cache -> CacheSpec (the source's, but for codec and temperatures) ->
    `make_cache`

The spans are the source's, and so is everything of a build after planning: workers, Ray, faults,
resume, seal.

Cost: the source is read once; the codec's arithmetic, and no forward of a teacher.
Guarantee: rows, labels and the log-probabilities of labels are the source's. A sample of a `dense`
cache in float32 is the one that a build with the same seed would have drawn.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable

import numpy as np

from kdcache.cache import Cache
from kdcache.commands.build.driver import Progress
from kdcache.commands.build.make import BuildResult, CachePlan, make_cache
from kdcache.commands.build.prepare import check_answers, gpus_of
from kdcache.commands.build.ranks import ranks_by_count
from kdcache.commands.transcode.cache_source import CacheSourceOptions, SourceShard, check_source
from kdcache.commands.transcode.options import TranscodeOptions
from kdcache.targets import Codec
from kdcache.tasks import IGNORE, TASKS

_COUNTED = 16  # shards whose labels are counted for frequency ranks


def transcode(
    options: TranscodeOptions,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> BuildResult:
    """Make a cache from another, or finish an interrupted one.

    Args:
        options: what to make.
        on_progress: called in this thread, a few times a second at most.
        report: takes a line about what is done before the first progress.

    Raises:
        UsageError: wrong options, or a source whose targets do not determine the new ones.
        IncompleteError: interrupted, no space left, or spans set aside; the same command resumes;
            or the source is not finished.
        CorruptCacheError: the source is damaged.
    """
    return make_cache(functools.partial(_plan, options), options.out, options, on_progress, report)


def _plan(options: TranscodeOptions) -> CachePlan:
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
    return CachePlan(
        dataclasses.replace(
            spec,
            codec=str(codec),
            temperatures=codec.temperatures,
            seed=options.seed,
            ranks=hashlib.sha256(ranks).hexdigest() if ranks else None,
            output_layer=None,
            source={"codec": spec.codec, "digest": digest},
        ),
        _tokenizer_files(source),
        ranks,
        {**source.notes, "source": source.url},
        [
            SourceShard(entry.span, f"{source.url}: shard {entry.name}")
            for entry in source.manifest.shards
        ],
        CacheSourceOptions(source.storage.url, digest, "cuda" if gpus else "cpu"),
        gpus,
        opening="opening the source",
    )


def _tokenizer_files(source: Cache) -> dict[str, bytes]:
    names = (name for name in source.files if name.startswith("tokenizer/"))
    return {name.split("/")[1]: source.read_beside(name) for name in names}


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
