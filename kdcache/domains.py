"""Domains: names of the corpora that one cache is built of.

Every shard of such a cache belongs to one domain, the name of the corpus that its rows come from. A
cache whose corpora have no names has one domain without a name.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

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
