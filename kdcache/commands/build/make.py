"""A plan becomes a sealed folder of shards: shared by `build`, `transcode`, `import`, `generate`.

    spec -> create or resume
    missing spans -> workers: read, answer, pack, commit
    all spans committed -> seal

Guarantee: the same plan always resumes, and a finished cache is never changed.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdcache import __version__
from kdcache.cache import Cache, Manifest, ShardEntry
from kdcache.cache.figures import DomainFigures, domain_figures
from kdcache.cache.manifest import filtered_records
from kdcache.cache.sealing import Receipts, prepare_manifest, remove_receipts, seal
from kdcache.cache.spec import Spec
from kdcache.cache.store import ShardStore
from kdcache.cluster import cluster_address
from kdcache.commands.build.driver import GO_ON, Driver, Progress
from kdcache.commands.build.options import WorkerOptions
from kdcache.commands.build.source import SourceOptions, Work
from kdcache.commands.build.workers import EventLog, EventSink, Job, LocalWorkers, Workers
from kdcache.commands.interrupt import Interrupt, interruptible
from kdcache.errors import IncompleteError, UsageError
from kdcache.files import try_output
from kdcache.humanize import counted, size
from kdcache.storage import redact

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardPlan:
    """All that decides a cache or a generated corpus, and how its workers come by it.

    Attributes:
        ranks: rank table; empty for none.
        spans: the units of work, one a shard.
        source: where the workers find rows and targets.
        gpus: GPUs a worker.
        across: whether they may be on several nodes.
        check_made: refuses shards of earlier runs that the source would make differently now.
        check_end: refuses a source that changed meanwhile.
        output_layer: file of the teacher's output layer; empty for none, or where it is there.
        opening: what a worker does before its first span, for people.
    """

    spec: Spec
    tokenizer_files: Mapping[str, bytes]
    ranks: bytes
    notes: Mapping[str, object]
    spans: Sequence[Work]
    source: SourceOptions
    gpus: float
    span_seconds: float
    across: bool = False
    check_made: Callable[[Any], None] = lambda _: None
    check_end: Callable[[], None] = lambda: None
    output_layer: bytes = b""
    opening: str = "loading the teacher"
    kind: type[ShardStore[Any]] = Cache


@dataclass(frozen=True, kw_only=True)
class ShardsResult:
    """The outcome of a run that makes shards.

    Attributes:
        spans: shards of the whole cache or corpus.
        made: how many of them this run made.
        redone: attempts at them that did not end in a shard and were made again.
        workers_lost: workers that died, hung or went with their node.
        bytes: of all shards.
        skipped: records that were left out: empty, or broken with `on_error="skip"`.
        filtered: records that filters left out; None where there are no filters.
        seconds: wall time of this run.
        missing: shards that other parts have yet to make; other counts are then those of this run.
            0 once the cache or corpus is finished.
    """

    spans: int
    made: int
    redone: int
    workers_lost: int
    bytes: int
    skipped: int
    filtered: int | None = None
    seconds: float
    missing: int = 0


@dataclass(frozen=True, kw_only=True)
class BuildResult(ShardsResult):
    """The outcome of a build.

    Attributes:
        cache: where the cache is.
        rows: in the whole cache.
        positions: in the whole cache.
        truncated: documents that were cut at `max_length`, in the shards that this run made.
        clipped_mass: mean probability of the teacher, a position, on ids outside the vocabulary.
        teacher_seconds: of this run in the teacher, summed over workers.
        domains: figures of each, where the corpora have names.
    """

    cache: str
    rows: int
    positions: int
    truncated: int
    clipped_mass: float
    teacher_seconds: float
    domains: tuple[DomainFigures, ...] = ()

    @property
    def bytes_per_position(self) -> float:
        """Shard bytes, rows included, a position."""
        return self.bytes / max(1, self.positions)


def make_cache(
    plan: Callable[[], ShardPlan],
    out: str,
    options: WorkerOptions,
    on_progress: Callable[[Progress], None] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> BuildResult:
    """Make a cache, or finish an interrupted one: see `make_shards`."""
    made = make_shards(plan, out, options, on_progress, report)
    shards = made.shards
    return BuildResult(
        **made.figures(),
        cache=redact(out),
        rows=sum(s.rows for s in shards),
        positions=made.positions,
        truncated=made.driver.truncated,
        clipped_mass=sum(s.clipped_mass for s in shards) / max(1, sum(s.answered for s in shards)),
        teacher_seconds=made.driver.teacher_seconds,
        domains=domain_figures(made.store.spec, shards),
    )


@dataclass(frozen=True)
class Made:
    """What a run has made.

    Attributes:
        store: the cache or corpus.
        shards: all of them; of a part that left some to others, its own.
        missing: number of shards that other parts have yet to make.
    """

    store: ShardStore[Any]
    driver: Driver
    shards: tuple[ShardEntry, ...]
    missing: int
    seconds: float

    @property
    def positions(self) -> int:
        """In the shards."""
        return sum(s.positions for s in self.shards)

    def figures(self) -> dict[str, Any]:
        """Those of `ShardsResult`."""
        return {
            "spans": self.store.spec.spans,
            "made": len(self.driver.made),
            "redone": self.driver.redone,
            "workers_lost": self.driver.lost,
            "bytes": sum(s.bytes for s in self.shards),
            "skipped": sum(s.skipped for s in self.shards),
            "filtered": filtered_records(self.shards),
            "seconds": self.seconds,
            "missing": self.missing,
        }


def make_shards(
    plan: Callable[[], ShardPlan],
    out: str,
    options: WorkerOptions,
    on_progress: Callable[[Progress], None] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Made:
    """Make the shards of a folder and seal it, or finish an interrupted one.

    Args:
        on_progress: called in this thread, a few times a second at most.
        report: takes a line about what is done before the first progress.

    Raises:
        UsageError: wrong options or input; nothing was written that a later run would trust.
        IncompleteError: interrupted, no space left, or spans set aside; the same command resumes.
    """
    started = time.perf_counter()
    with interruptible() as interrupt:
        try:
            try_output(out)
            report("reading what the options name")
            made_of = plan()
            store = made_of.kind.create_or_resume(
                out,
                made_of.spec,
                tokenizer_files=made_of.tokenizer_files,
                ranks=made_of.ranks,
                output_layer=made_of.output_layer,
                notes={**made_of.notes, "kdcache": __version__},
            )
            try:
                driver = Driver(made_of.spans, on_progress, share=options.share, started=started)
                missing = _make(made_of, options, store, driver, report, interrupt)
            finally:
                store.release()
        except KeyboardInterrupt:  # while planning or sealing; the driver has more to say
            raise IncompleteError(f"interrupted. {GO_ON}") from None
    shards = tuple(driver.made.values()) if missing else store.manifest.shards
    return Made(store, driver, shards, len(missing), time.perf_counter() - started)


def _make(
    plan: ShardPlan,
    options: WorkerOptions,
    cache: ShardStore[Any],
    driver: Driver,
    report: Callable[[str], None],
    interrupt: Interrupt,
) -> list[int]:
    """Make what is missing; returns the spans that are left to other parts."""
    plan.check_made(cache)
    log = EventLog(cache.storage)
    receipts = Receipts(cache.storage)
    driver.tell = log
    missing: list[int] = []
    if cache.sealed and not cache.missing():
        return missing
    committed = cache.committed()
    if committed:
        sizes = cache.storage.sizes("shards")
        driver.stored = sum(sizes.get(name, 0) for name in committed.values())
        count = f"{len(committed):,} of {cache.spec.spans:,} shards"
        report(f"resuming {redact(cache.url)}: {count} are there, {size(driver.stored)}")
    share = options.share
    left = len({*range(cache.spec.spans)[share.start :: share.step]} - committed.keys())
    log("start", fingerprint=cache.spec.fingerprint, spans=cache.spec.spans)
    try:
        if not cache.sealed:
            driver.keep = receipts.add
        driver.run(
            functools.partial(_missing, cache, driver),
            lambda: start_workers(options, plan, cache, left, log, report),
            interrupt,
        )
        plan.check_end()
        receipts.close()  # before a seal removes them
        missing = _missing(cache, driver) if options.part else []
        if not missing:
            _seal(cache, driver)
    except BaseException as error:
        reason = redact(str(error)) or type(error).__name__
        log("stop", made=len(driver.made), lost=driver.lost, reason=reason)
        raise
    else:
        if missing:
            log("part made", made=len(driver.made), lost=driver.lost, missing=len(missing))
        else:
            log("sealed", made=len(driver.made), lost=driver.lost, rows=cache.manifest.rows)
    finally:
        receipts.close()
        log.close()
    return missing


def _missing(cache: ShardStore[Any], driver: Driver) -> list[int]:
    """The missing spans, from the listing.

    A shard of a sealed cache that came out with other bytes than its manifest states is not in it,
    and a retry would not change that: the seal reports it.
    """
    made = driver.made if cache.sealed else {}
    return [span for span in cache.missing() if span not in made]


def _seal(cache: ShardStore[Any], driver: Driver) -> Manifest:
    manifest = prepare_manifest(cache, driver.made.values())
    filtered = filtered_records(manifest.shards)
    if not manifest.rows:  # so that the same --out takes another corpus, or other columns
        for name in cache.committed().values():
            cache.storage.remove(f"shards/{name}")
    if not manifest.rows and not manifest.skipped and not filtered:
        raise UsageError("the corpus has no rows: nothing to cache. Name files that have some.")
    if not manifest.rows:
        raise UsageError(
            f"the corpus has no usable row ({_left_out(manifest.skipped, filtered)}): nothing to "
            "cache. Look at its text column and at --filter, or name another --corpus."
        )
    for domain in domain_figures(cache.spec, manifest.shards):
        if not domain.rows:
            logger.warning(
                "the corpus %s has no usable row (%s): look at its text column, and at --filter",
                domain.name,
                _left_out(domain.skipped, domain.filtered),
            )
    manifest = seal(cache, manifest)
    remove_receipts(cache.storage)
    return manifest


def _left_out(skipped: int, filtered: int | None) -> str:
    """What became of records, for messages."""
    text = f"{counted(skipped, 'record')} skipped"
    return text if filtered is None else f"{text}, {filtered:,} filtered"


# Seconds of one worker: to start Ray, and a teacher in each of its workers, takes as long.
_SOON = 60.0


def start_workers(
    options: WorkerOptions,
    plan: ShardPlan,
    cache: ShardStore[Any],
    left: int,
    tell: EventSink,
    report: Callable[[str], None] = lambda line: None,
) -> Workers:
    """The workers that the options ask for, for the spans that are left.

    Without a number of workers, and without a cluster, this process makes one span, or what takes
    less than a minute.
    """
    job = Job(cache.storage.url, plan.source)
    # What only a Ray can give.
    asked = (options.workers, options.cpus_per_worker, options.gpus_per_worker)
    few = left == 1 or left * plan.span_seconds < _SOON
    alone = few and not any(asked) and not cluster_address(options.address)
    if options.without_ray or alone:
        why = "one shard" if left == 1 else "less than a minute of work"
        chosen = f"working in this process ({why}; --workers 2 would ask Ray for two workers): "
        report(f"{'' if options.without_ray else chosen}{plan.opening}")
        return LocalWorkers(job)
    from kdcache.commands.build.on_ray import RayWorkers

    report(f"starting workers on Ray (--workers 0 needs none), then {plan.opening}")
    return RayWorkers(job, options, gpus=plan.gpus, across=plan.across, tell=tell)
