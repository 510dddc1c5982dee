"""The options of `report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from kdcache.files import file_problems
from kdcache.options import Options, option

_MOST_PATHS = 200


@dataclass(frozen=True)
class ReportOptions(Options):
    """What `kdcache report` takes: fields have the names of its options."""

    paths: tuple[str, ...] = option(
        help="caches (folders or URLs), and folders of runs and sweeps.",
        metavar="PATH",
        positional=True,
    )
    _: KW_ONLY
    out: str = option("report.html", help="the page.", metavar="FILE.html", output=True)
    rows: int = option(3, help="rows of each cache to show as text.", at_least=0, at_most=20)
    top: int = option(3, help="predictions to show at each position.", at_least=1, at_most=20)

    def conflicts(self) -> Sequence[str]:
        """See `Options.conflicts`."""
        problems = []
        if not 0 < len(self.paths) <= _MOST_PATHS:
            problems.append(f"{len(self.paths)} paths, expected 1 to {_MOST_PATHS}.")
        return [*problems, *file_problems(self.out, "--out")]
