"""Domains: names of the corpora that one cache is built of, and how often training uses each.

Every shard of such a cache belongs to one domain, the name of the corpus that its rows come from. A
cache whose corpora have no names has one domain without a name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kdcache.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
NAME_RULE = "1 to 64 letters, digits, '_', '-' and '.', the first a letter or a digit"
"""What a name may be, for messages."""


def is_name(text: object) -> bool:
    """Whether a text can be the name of a domain: see `NAME_RULE`."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


class Named(NamedTuple):
    """A value of an option with its name, in writing `name=value`."""

    name: str
    value: Any

    def __str__(self) -> str:
        return f"{self.name}={self.value}"


@dataclass(frozen=True)
class Weights:
    """How often an epoch of training uses rows.

    Attributes:
        caches: of the rows of each cache, in their order; none for once each.
        domains: of the rows of a domain by its name, in every cache that has it, in place of its
            cache's; 0 leaves them out.
    """

    caches: tuple[float, ...] = ()
    domains: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, values: Weights | Mapping[str, Any] | Iterable[Any] | None) -> Weights:
        """Read numbers, `NAME=NUMBER` and pairs, or a mapping of names to numbers.

        Raises:
            UsageError: no number, one that cannot be, or a name given twice; a line each.
        """
        if isinstance(values, Weights):
            return values
        pairs = list(values.items()) if isinstance(values, Mapping) else map(_pair, values or ())
        caches: list[float] = []
        domains: dict[str, float] = {}
        wrong = []
        for name, text in pairs:
            shown = text if name is None else f"{name}={text}"
            try:
                weight = float(text)
            except (TypeError, ValueError):
                wrong.append(f"--cache-weight is {shown!r}, expected a number or NAME=NUMBER.")
                continue
            if name in domains:
                wrong.append(f"--cache-weight gives {name} twice. Remove one.")
            elif not math.isfinite(weight) or weight < 0 or (name is None and weight == 0):
                least = "more than 0" if name is None else "0 or more"
                wrong.append(f"--cache-weight is {shown}, expected {least}.")
            elif name is None:
                caches.append(weight)
            else:
                domains[name] = weight
        if wrong:
            raise UsageError("\n".join(wrong))
        return cls(tuple(caches), dict(sorted(domains.items())))

    def of(self, cache: int, domain: str | None) -> float:
        """The weight of the rows of a domain of a cache."""
        if domain is not None and domain in self.domains:
            return self.domains[domain]
        return self.caches[cache] if self.caches else 1.0

    def problems(self, domains: Sequence[Sequence[str]]) -> list[str]:
        """What does not fit caches with these names of domains, a line each."""
        wrong = []
        if self.caches and len(self.caches) != len(domains):
            wrong.append(f"{len(self.caches)} cache weights for {len(domains)} caches.")
        known = list(dict.fromkeys(name for names in domains for name in names))
        there = f"the domains are {', '.join(known)}" if known else "no cache has named domains"
        for name in self.domains.keys() - set(known):
            wrong.append(f"--cache-weight names the domain {name!r}; {there}.")
        return wrong

    def shown(self) -> list[float | str]:
        """As JSON-able values, which `parse` reads; equal weights are equal."""
        return [*self.caches, *(f"{name}={weight!r}" for name, weight in self.domains.items())]


def _pair(value: Any) -> tuple[str | None, Any]:
    if isinstance(value, Named):
        return value.name, value.value
    name, equals, weight = str(value).partition("=")
    return (name.strip(), weight) if equals else (None, value)
