"""The options of `verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kdcache.commands.groups import EngineRunOptions
from kdcache.options import option


@dataclass(frozen=True)
class VerifyOptions(EngineRunOptions):
    """What `kdcache verify` takes: fields have the names of its options."""

    cache: str = option(help="folder or URL of a finished cache.", metavar="CACHE", positional=True)
    teacher: tuple[str, ...] = option(
        (),
        help="folder, URL or hub id of each teacher, in the order of the build, to run again on a "
        "few rows (optional).",
        metavar="DIR_OR_HUB_ID",
    )
    sample: int = option(32, help="number of rows to run again.", metavar="ROWS", at_least=1)
    seed: int = option(0, help="seed that chooses these rows.", at_least=0)
    trust_remote_code: bool = option(False, help="let code that ships with a teacher run.")

    def conflicts(self) -> Sequence[str]:
        """See `Options.conflicts`."""
        return self.engine_conflicts(default="vllm")
