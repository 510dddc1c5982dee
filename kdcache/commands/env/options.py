"""The options of `env`."""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.options import Options


@dataclass(frozen=True)
class EnvOptions(Options):
    """`kdcache env` takes none."""
