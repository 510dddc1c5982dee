"""`kdcache verify`: checks every file of a cache, and its targets against a teacher.

The work is in `kdcache.cache.check` and, for a teacher, `kdcache.commands.recheck`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcache.cache import Cache
from kdcache.cache.check import problems
from kdcache.errors import UsageError

if TYPE_CHECKING:
    from kdcache.commands.recheck import Recheck


@dataclass(frozen=True)
class VerifyOptions:
    """What `kdcache verify` is asked for; fields bear the names of its options.

    Attributes:
        cache: folder or URL of a finished cache.
        teacher: folder or hub id of each teacher, in the order of the build, to run again on a few
            rows (optional).
        sample: number of these rows.
        seed: of their choice.
        trust_remote_code: let code that ships with a teacher run.
    """

    cache: str
    teacher: tuple[str, ...] = ()
    sample: int = 32
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        wrong = []
        if not self.cache:
            wrong.append("no cache is named: give its folder or URL")
        if self.sample < 1:
            wrong.append(f"--sample is {self.sample}, expected at least 1")
        if self.seed < 0:
            wrong.append(f"--seed is {self.seed}, expected 0 or more")
        if wrong:
            raise UsageError("; ".join(wrong) + ".")


@dataclass(frozen=True)
class VerifyResult:
    """What `verify` found.

    Attributes:
        cache: where it is.
        digest: SHA-256 of its manifest: names the exact bytes.
        shards: number of them.
        rows: in all of them.
        problems: one line each; none where all is well.
        recheck: cached targets beside live ones, where a teacher was named and files are whole.
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
        UsageError: there is no cache, or the teachers cannot be its own.
        IncompleteError: its build has not finished.
        CorruptCacheError: its spec or manifest cannot be read.
    """
    cache = Cache.open(options.cache)
    found = [problem.text for problem in problems(cache)]
    recheck = None
    if options.teacher and not found:
        from kdcache.commands.recheck import recheck as compare

        recheck = compare(
            cache,
            options.teacher,
            sample=options.sample,
            seed=options.seed,
            trust_remote_code=options.trust_remote_code,
        )
        found += recheck.problems
    manifest = cache.manifest
    return VerifyResult(
        cache.url, cache.digest, len(manifest.shards), manifest.rows, tuple(found), recheck
    )
