"""`kdcache verify`: checks every file of a cache, and its targets against a teacher.

The work is in `kdcache.cache.check` and, for a teacher, `kdcache.commands.verify.recheck`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcache.cache import Cache
from kdcache.cache.check import problems
from kdcache.commands.verify.options import VerifyOptions

if TYPE_CHECKING:
    from kdcache.commands.verify.recheck import Recheck
    from kdcache.teacher import EngineOptions


@dataclass(frozen=True)
class VerifyResult:
    """The result of `verify`.

    Attributes:
        cache: where it is.
        digest: SHA-256 of its manifest: names the exact bytes.
        shards: number of them.
        rows: in all of them.
        problems: one line each; none where all is well.
        recheck: cached targets against live ones, if a teacher was named and files are intact.
    """

    cache: str
    digest: str
    shards: int
    rows: int
    problems: tuple[str, ...]
    recheck: Recheck | None


def verify(options: VerifyOptions) -> VerifyResult:
    """Check every file of a cache and, if a teacher is named, some targets against it.

    Raises:
        UsageError: there is no cache, or the teachers cannot be those of the cache.
        IncompleteError: its build is unfinished.
        CorruptCacheError: its spec or manifest cannot be read.
    """
    cache = Cache.open(options.cache)
    found = [problem.text for problem in problems(cache)]
    recheck = None
    if options.teacher and not found:
        from kdcache.commands.verify.recheck import recheck as compare

        recheck = compare(
            cache,
            options.teacher,
            sample=options.sample,
            seed=options.seed,
            engine=_engine(options, cache),
            trust_remote_code=options.trust_remote_code,
        )
        found += recheck.problems
    manifest = cache.manifest
    return VerifyResult(
        cache.url, cache.digest, len(manifest.shards), manifest.rows, tuple(found), recheck
    )


def _engine(options: VerifyOptions, cache: Cache) -> EngineOptions | None:
    """The engine that was asked for, else the one of the build with its arguments."""
    from kdcache.commands.build.prepare import engine_options

    built = cache.spec.engine or {}
    if options.engine == "transformers" or not (options.engine or built):
        return None
    asked = engine_options(options, cache.spec.max_length)
    return dataclasses.replace(
        asked,
        quantization=asked.quantization or built.get("quantization"),
        args={**built.get("args", {}), **asked.args},
    )
