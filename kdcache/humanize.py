"""Figures as people write them: sizes, durations, counts; and texts that are safe to print."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Those that turn the direction of what follows, too: figures behind a name would read backwards.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """A text that does nothing to a terminal: control characters are written as `\\u001b`.

    Line ends and tabs stay. Names, texts and errors may come from anybody's data.
    """
    return _CONTROL.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


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


def shares(counts: Mapping[str, int]) -> str:
    """Counts with their shares as text: `web 900 (75.0 %), code 300 (25.0 %)`."""
    total = max(1, sum(counts.values()))
    return ", ".join(f"{name} {n:,} ({100 * n / total:.1f} %)" for name, n in counts.items())
