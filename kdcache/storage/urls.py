"""URLs without the secrets that they may carry."""

from __future__ import annotations

import re

# `user:password@` of an address, and a secret pasted with slashes in it, which the standard would
# take for a port and a path.
_USER = re.compile(r"(?<=://)(?:[^/@?\s]*|[^/@?:\s]+:(?!\d*(?:/|$))\S*)@")
_QUERY = re.compile(r"(?<=://)([^?\s]*)\?\S*")


def is_remote(name: str) -> bool:
    """Whether a name is a URL, and not of a file on this machine."""
    return "://" in name and not name.startswith("file://")


def redact(text: str) -> str:
    """A URL, or a text with URLs in it, without user names, passwords and query strings."""
    return _QUERY.sub(r"\1", _USER.sub("", text))
