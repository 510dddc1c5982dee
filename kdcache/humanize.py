"""Figures as people write them: sizes, durations, counts; and texts and values that are safe to
print and to write: without secrets, and without characters that a reader would take for commands.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Those that turn the direction of what follows, too: figures behind a name would read backwards.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

_MARKDOWN = re.compile(r"([\\`*\[\]<>|])")
# `user:password@` of an address, and a secret pasted with slashes in it, which the standard would
# take for a port and a path.
_USER = re.compile(r"(?<=://)(?:[^/@?\s]*|[^/@?:\s]+:(?!\d*(?:/|$))\S*)@")
_QUERY = re.compile(r"(?<=://)([^?\s]*)\?\S*")
# Names of secrets, by their last word; a special token of a tokenizer is none.
_KIND = (
    r"(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)(?<!image_)(?<!audio_)"
    r"(?:token|passw(?:or)?d|secret|credentials?|authorization|(?:api|access|secret)[_-]?key)"
)
_SECRET = re.compile(rf"(?:^|[\W_]|auth|access){_KIND}$", re.IGNORECASE)
_GIVEN = re.compile(
    rf"(?<![\w-])((?:[\w-]{{0,60}}(?:[_-]|auth|access))?{_KIND}(?:=|[\"']\s?:\s?))"
    r"(?:\"[^\"]*\"|'[^']*'|[^\s\"',;&)}\]]+)",
    re.IGNORECASE,
)


def printable(text: str) -> str:
    """A text that does nothing to a terminal: control characters are written as `\\u001b`.

    Line ends and tabs stay. Names, texts and errors may come from anybody's data.
    """
    return _CONTROL.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def markdown(text: str) -> str:
    """A text as one line of Markdown, in which nothing of it is markup."""
    return _MARKDOWN.sub(r"\\\1", " ".join(printable(redacted(text)).split()))


def redact(text: str) -> str:
    """A URL, or a text with URLs in it, without user names, passwords and query strings."""
    return _QUERY.sub(r"\1", _USER.sub("", text))


def redacted(value: Any) -> Any:
    """A JSON-able value as it may be written: entries whose names are those of secrets are left
    out, and texts, as by `redact`, lose what they give to such names too (`hf_token=***`).

    All that is written goes through it: logs, events, notes, cards, results, and of a spec what an
    engine was given. So the same work with another secret, or without one, is the same work.
    """
    if isinstance(value, str):
        return _GIVEN.sub(r"\1***", redact(value))
    if isinstance(value, Mapping):
        return {k: redacted(v) for k, v in value.items() if not _SECRET.search(str(k))}
    return [redacted(one) for one in value] if isinstance(value, (list, tuple)) else value


def counted(number: float, thing: str) -> str:
    """A number of things as text: `1 shard`, `2,000 shards`, `0.5 GPUs`."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {thing}{'' if number == 1 else 's'}"


def score(value: float) -> str:
    """A float32 as text, to the last digit that it has: `1234567.2`, `0.1`, `2`."""
    import numpy as np  # not needed by commands that only answer wrong options

    exact = np.float32(value)
    if 1e-4 <= abs(exact) < 1e9 or exact == 0:
        return np.format_float_positional(exact, trim="-")
    return str(exact)


def duration(seconds: float) -> str:
    """Seconds as text: `8 s`, `3 min 20 s`, `5 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """Bytes as text: `12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def number(value: float | None, digits: int = 4) -> str:
    """A figure of a table; `-` where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def percent(value: float | None, digits: int = 2) -> str:
    """A share as a percentage; `-` where there is none."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def shares(counts: Mapping[str, int]) -> str:
    """Counts with their shares as text: `web 900 (75.0 %), code 300 (25.0 %)`."""
    total = max(1, sum(counts.values()))
    return ", ".join(f"{name} {n:,} ({100 * n / total:.1f} %)" for name, n in counts.items())
