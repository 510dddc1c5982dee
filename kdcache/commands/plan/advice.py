"""What a plan recommends: a codec with its costs, in one sentence, then others by purpose.

Of each kind the codec with the fewest bytes that is good enough is named, at the first set of
temperatures:

* where entries are drawn, the noise lengthens the gradient by 5 % at most;
* of a top-k, at most 1 % of the teacher's probability is outside the stored ids; of a dense one, at
  most as much is changed by rounding, or of scores 1 % of their standard deviation.

Where none is, the best. Purposes follow from what the codecs can do and from
`benchmarks/recovery.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kdcache.commands.plan.result import PlannedCache
from kdcache.humanize import duration, size

_LONGER, _MISSED = 1.05, 0.01
_PURPOSES = {
    "anchored": "to train students: its noise vanishes as they near the teacher",
    "sample": "to train students that stay far from the teacher",
    "hidden": "for any temperature and divergence",
    "topk": "for reverse KL, Jensen-Shannon and evaluation",
    "dense": "for any temperature and divergence",
}


def advice(caches: Sequence[PlannedCache], device: str = "cpu") -> str:
    """What to take of a plan's grid, which is not empty, and what that costs; then the others.

    Args:
        caches: the grid.
        device: kind of device that the teacher ran on.
    """
    (first, purpose), *others = recommended(caches)
    at = ", ".join(f"{t:g}" for t in first.temperatures)
    hours = first.hours["1"]
    time = f"{hours:,.0f} {device.upper()}-hours" if hours >= 10 else duration(3600 * hours)
    pays = "but it costs more time than the teacher online however many students there are"
    if first.break_even is not None:
        students = max(1, math.ceil(first.break_even))
        pays = f"which pays from {_students(students)} on"
    text = (
        f"Take {first.codec} at T = {at}: {first.bytes_per_position:,.1f} B per position, "
        f"{size(first.corpus_bytes)} and {time} of one worker for this corpus, {pays}; it is "
        f"{purpose}."
    )
    if others:
        named = "; ".join(
            f"{cache.codec} ({cache.bytes_per_position:,.1f} B) {purpose}"
            for cache, purpose in others
        )
        text += f" Otherwise {named}."
    return text


def _students(count: int) -> str:
    return "the first student" if count == 1 else f"{count:,} students"


def recommended(caches: Sequence[PlannedCache]) -> list[tuple[PlannedCache, str]]:
    """The cache to take of each kind, with its purpose, the most useful kind first."""
    temperatures = caches[0].temperatures
    kinds: dict[str, list[PlannedCache]] = {}
    for cache in caches:
        if cache.temperatures == temperatures:
            kinds.setdefault(_kind(cache), []).append(cache)
    purposes = ((kind, purpose) for kind, purpose in _PURPOSES.items() if kind in kinds)
    return [(min(kinds[kind], key=_rank), purpose) for kind, purpose in purposes]


def _kind(cache: PlannedCache) -> str:
    return cache.codec.partition(":")[0]


def _rank(cache: PlannedCache) -> tuple[float, float]:
    """How far from good enough, then bytes: the smallest is the one to take."""
    longer = max(f.norm_ratio or 0.0 for f in cache.fidelity) - _LONGER
    missed = max(f.missed for f in cache.fidelity) - _MISSED
    by_kind = {"anchored": longer, "sample": longer, "topk": missed, "dense": missed}
    lacks = by_kind.get(_kind(cache), 0.0)
    return (max(lacks, 0.0), cache.bytes_per_position)
