"""`kdcache build`: runs the teacher over a corpus once and seals the cache.

options -> spans of the corpus -> teacher's identity -> CacheSpec -> `make_cache`
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

from kdcache.commands.build.driver import Progress
from kdcache.commands.build.layer import with_layer
from kdcache.commands.build.make import BuildResult, CachePlan, make_cache
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.build.prepare import prepare
from kdcache.commands.build.resume import check_made
from kdcache.commands.build.teacher_source import TeacherSourceOptions
from kdcache.corpus.stored import stored
from kdcache.errors import UsageError
from kdcache.storage import redact
from kdcache.teacher import tokenizer_files


def build(
    options: BuildOptions,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> BuildResult:
    """Make a cache, or finish an interrupted one.

    Args:
        options: what to build. `corpus` may be a `Dataset` of the library `datasets`, whose rows
            are written to the folder `OUT.corpus`.
        on_progress: called in this thread, a few times a second at most.
        report: takes a line about what is done before the first progress.

    Raises:
        UsageError: wrong options or input; nothing was written that a later run would trust.
        IncompleteError: interrupted, no space left, or spans set aside; the same command resumes.
    """
    if options.dry_run:
        raise UsageError("dry_run is for kdcache.dry_run, which describes a build.")
    return make_cache(functools.partial(_plan, options), options.out, options, on_progress, report)


def _plan(options: BuildOptions) -> CachePlan:
    options = replace(options, corpus=stored(options.corpus, options.out))
    prepared = with_layer(options, prepare(options))
    return CachePlan(
        prepared.spec,
        tokenizer_files(prepared.tokenizer),
        prepared.ranks,
        {"teachers": [redact(name) for name in options.teacher]},
        prepared.corpus.spans,
        TeacherSourceOptions(
            prepared.rows,
            prepared.teacher,
            prepared.batch_tokens,
            find_batch=prepared.find_batch,
        ),
        prepared.gpus,
        check_made=lambda cache: check_made(cache, prepared.corpus, prepared.rows),
        check_end=prepared.corpus.check_unchanged,
        output_layer=prepared.output_layer,
    )
