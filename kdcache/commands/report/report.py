"""`kdcache report`, from its options to the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kdcache.commands.report.gather import CachePart, Part, RunPart, SweepPart, gather
from kdcache.commands.report.options import ReportOptions
from kdcache.commands.report.page import render_page
from kdcache.files import local_path, output_errors, try_place, write_text
from kdcache.storage import redact


@dataclass(frozen=True)
class ReportResult:
    """The outcome of `report`.

    Attributes:
        out: the page.
        bytes: of it.
        caches: that it shows.
        runs: that it shows.
        sweeps: that it shows.
    """

    out: str
    bytes: int
    caches: int
    runs: int
    sweeps: int


def report(
    options: ReportOptions, *, report: Callable[[str], None] = lambda line: None
) -> ReportResult:
    """Write one self-contained page about caches, runs and sweeps.

    Args:
        options: see `ReportOptions`.
        report: takes a line about what is read.

    Raises:
        UsageError: a path holds nothing that a report knows.
        CorruptCacheError: a cache is damaged.
    """
    out = local_path(options.out)
    try_place(options.out)
    parts: list[Part] = []
    for path in options.paths:
        report(f"reading {redact(path)}")
        parts.append(gather(path, options))
    page = render_page(parts)
    with output_errors(out):
        write_text(out, page)
    count = {kind: sum(isinstance(part, kind) for part in parts) for kind in _KINDS}
    return ReportResult(str(out), len(page.encode()), *count.values())


_KINDS: tuple[type, ...] = (CachePart, RunPart, SweepPart)
