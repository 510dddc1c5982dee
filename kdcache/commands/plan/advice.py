"""One sentence on a plan's grid: which codec for which purpose.

Of each kind the codec with the fewest bytes that is good enough is named, at the first set of
temperatures:

* where entries are drawn, the noise lengthens the gradient by 5 % at most;
* of a top-k, at most 1 % of the teacher's probability is outside the stored ids.

Where none is, the best. Purposes follow from what the codecs can do and from
`benchmarks/recovery.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from kdcache.commands.plan.result import PlannedCache

_LONGER, _MISSED = 1.05, 0.01
_PURPOSES = {
    "anchored": "to train students: its noise vanishes as they near the teacher",
    "sample": "to train students that stay far from the teacher",
    "hidden": "for any temperature and divergence",
    "topk": "for reverse KL, Jensen-Shannon and evaluation",
    "dense": "for any temperature and divergence",
}


def advice(caches: Sequence[PlannedCache]) -> str:
    """The sentence about a plan's grid, which is not empty."""
    temperatures = caches[0].temperatures
    kinds: dict[str, list[PlannedCache]] = {}
    for cache in caches:
        if cache.temperatures == temperatures:
            kinds.setdefault(_kind(cache), []).append(cache)
    named = []
    for kind, purpose in _PURPOSES.items():
        if kind in kinds:
            cache = min(kinds[kind], key=_rank)
            named.append(
                f"{cache.codec} ({cache.bytes_per_position:,.1f} B per position) {purpose}"
            )
    at = ", ".join(f"{t:g}" for t in temperatures)
    return f"At T = {at} take {'; '.join(named)}."


def _kind(cache: PlannedCache) -> str:
    return cache.codec.partition(":")[0]


def _rank(cache: PlannedCache) -> tuple[float, float]:
    """How far from good enough, then bytes: the smallest is the one to take."""
    longer = max(f.norm_ratio for f in cache.fidelity) - _LONGER
    missed = max(f.missed for f in cache.fidelity) - _MISSED
    lacks = {"anchored": longer, "sample": longer, "topk": missed}.get(_kind(cache), 0.0)
    return (max(lacks, 0.0), cache.bytes_per_position)
