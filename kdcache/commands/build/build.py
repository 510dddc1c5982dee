"""`kdcache build`: runs the teacher over a corpus once and seals the cache.

    options -> spans of the corpus -> teacher's identity -> CacheSpec -> create or resume
    missing spans -> workers: read, tokenise, run the teacher, encode, commit
    all spans committed -> seal

Guarantee: the same command always resumes, and a finished cache is never changed.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from kdcache.cache import Cache, Manifest
from kdcache.cache.receipts import Receipts, remove_receipts
from kdcache.commands.build.driver import GO_ON, Driver, Progress
from kdcache.commands.build.events import EventLog, EventSink
from kdcache.commands.build.local import LocalWorkers
from kdcache.commands.build.on_ray import RayWorkers
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.build.prepare import Prepared, prepare
from kdcache.commands.build.resume import check_made
from kdcache.commands.build.worker import Job
from kdcache.commands.build.workers import Workers
from kdcache.commands.interrupt import Interrupt, interruptible
from kdcache.errors import IncompleteError, UsageError
from kdcache.storage import redact
from kdcache.teacher import (
    tokenizer_files,
)
from kdcache.version import __version__

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildResult:
    """The outcome of a build.

    Attributes:
        cache: where the cache is.
        spans: its shards.
        made: how many of them this run made.
        redone: attempts at them that did not end in a shard and were made again.
        workers_lost: workers that died, hung or went with their node.
        rows: rows in the whole cache.
        positions: positions in the whole cache.
        bytes: bytes of all shards.
        skipped: records in the whole cache's corpus that were left out: empty, or broken with
            `on_error="skip"`.
        truncated: documents that were cut at `max_length`, in the shards that this run made.
        clipped_mass: mean probability of the teacher, a position, on ids outside the vocabulary.
        seconds: wall time of this run.
        teacher_seconds: of it in the teacher, summed over workers.
        missing: shards that other parts have yet to make; rows, positions, bytes and the like are
            then those of this run. 0 once the cache is finished.
    """

    cache: str
    spans: int
    made: int
    redone: int
    workers_lost: int
    rows: int
    positions: int
    bytes: int
    skipped: int
    truncated: int
    clipped_mass: float
    seconds: float
    teacher_seconds: float
    missing: int = 0

    @property
    def bytes_per_position(self) -> float:
        """Shard bytes, rows included, a position."""
        return self.bytes / max(1, self.positions)


def build(
    options: BuildOptions, *, on_progress: Callable[[Progress], None] | None = None
) -> BuildResult:
    """Make a cache, or finish an interrupted one.

    Args:
        options: what to build.
        on_progress: called in this thread, a few times a second at most.

    Raises:
        UsageError: wrong options or input; nothing was written that a later run would trust.
        IncompleteError: interrupted, no space left, or spans set aside; the same command resumes.
    """
    with interruptible() as interrupt:
        try:
            return _build(options, on_progress, interrupt)
        except KeyboardInterrupt:  # while planning or sealing; the driver has more to say
            raise IncompleteError(f"interrupted. {GO_ON}") from None


def _build(
    options: BuildOptions,
    on_progress: Callable[[Progress], None] | None,
    interrupt: Interrupt,
) -> BuildResult:
    begin = time.perf_counter()
    plan = prepare(options)
    cache = Cache.create_or_resume(
        options.out,
        plan.spec,
        tokenizer_files=tokenizer_files(plan.tokenizer),
        ranks=plan.ranks,
        notes={"teachers": [redact(name) for name in options.teacher], "kdcache": __version__},
    )
    try:
        return _make(options, plan, cache, begin, on_progress, interrupt)
    finally:
        cache.release()


def _make(
    options: BuildOptions,
    plan: Prepared,
    cache: Cache,
    begin: float,
    on_progress: Callable[[Progress], None] | None,
    interrupt: Interrupt,
) -> BuildResult:
    check_made(cache, plan.corpus, plan.rows)
    log = EventLog(cache.storage)
    receipts = Receipts(cache.storage)
    driver = Driver(plan.corpus.spans, on_progress, log, share=options.share)
    missing: list[int] = []
    if not cache.sealed or cache.missing():
        log("start", fingerprint=cache.spec.fingerprint, spans=cache.spec.spans)
        try:
            if not cache.sealed:
                driver.keep = receipts.add
            driver.run(
                functools.partial(_missing, cache, driver),
                lambda: _start_workers(options, plan, cache, log),
                interrupt,
            )
            plan.corpus.check_unchanged()
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
    shards = tuple(driver.made.values()) if missing else cache.manifest.shards
    positions = sum(s.positions for s in shards)
    return BuildResult(
        cache=redact(options.out),
        spans=cache.spec.spans,
        made=len(driver.made),
        redone=driver.redone,
        workers_lost=driver.lost,
        rows=sum(s.rows for s in shards),
        positions=positions,
        bytes=sum(s.bytes for s in shards),
        skipped=sum(s.skipped for s in shards),
        truncated=driver.truncated,
        clipped_mass=sum(s.clipped_mass for s in shards) / max(1, positions),
        seconds=time.perf_counter() - begin,
        teacher_seconds=driver.teacher_seconds,
        missing=len(missing),
    )


def _missing(cache: Cache, driver: Driver) -> list[int]:
    """The missing spans, from the listing.

    A shard of a sealed cache that came out with other bytes than its manifest says is not in it,
    and a retry would not change that: the seal reports it.
    """
    made = driver.made if cache.sealed else {}
    return [span for span in cache.missing() if span not in made]


def _seal(cache: Cache, driver: Driver) -> Manifest:
    manifest = cache.prepare_manifest(driver.made.values())
    if not manifest.rows:
        raise UsageError(
            f"the corpus has no usable row ({manifest.skipped} records skipped): nothing to cache. "
            "Look at its text column, or name another --corpus."
        )
    manifest = cache.seal(manifest)
    remove_receipts(cache.storage)
    return manifest


def _start_workers(options: BuildOptions, plan: Prepared, cache: Cache, tell: EventSink) -> Workers:
    job = Job(
        cache.storage.url,
        plan.rows,
        plan.teacher,
        plan.batch_tokens,
        find_batch=options.batch_tokens is None,
    )
    if options.workers == 0:
        return LocalWorkers(job)
    return RayWorkers(
        job,
        workers=options.workers,
        gpus=plan.gpus,
        address=options.address,
        cpus=options.cpus_per_worker,
        max_workers=options.max_workers,
        hang_seconds=options.hang_seconds,
        wait_minutes=options.wait_minutes,
        tell=tell,
    )
