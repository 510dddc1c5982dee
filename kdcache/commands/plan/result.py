"""The result of a plan: the figures of each cache that could be built.

What a plan recommends: a codec with its costs, in one sentence, then others by purpose.

Of each kind the codec with the fewest bytes that is good enough is named, at the first set of
temperatures:

* where entries are drawn, their number is enough for the positions of the corpus (`DRAWN`), over
  which noise averages out;
* of a top-k, at most 1 % of the teacher's probability is outside the stored ids; of a dense one, at
  most as much is changed by rounding, or of scores 1 % of their standard deviation.

Where none is, the nearest. `sample` comes first: what a student begins with is not known here, and
far from its teacher it needs many entries, while `anchored` does with half as many near it. At
other temperatures than 1, where samples are noisier, `hidden` comes before both. The numbers are
from `benchmarks/quality.py` and `benchmarks/recovery.py`; README and FAQ have the same rule.

The plot of `plan`: fidelity against bytes per position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kdcache.commands.plan.fidelity import Fidelity
from kdcache.commands.plan.sample import DomainEstimate
from kdcache.humanize import duration, size
from kdcache.plots import Cloud, Panel, plot_clouds

WORKERS = (1, 8, 64)
"""Numbers of workers for which the hours of a build are estimated."""


@dataclass(frozen=True)
class PlannedCache:
    """One codec with one set of declared temperatures.

    Attributes:
        entries: stored a position (for `dense` all ids).
        bytes_per_position: of the targets, on disk.
        row_bytes_per_position: of the rows themselves, on disk: the same for every codec.
        shard_bytes: of a shard's file besides its columns, on disk.
        corpus_bytes: rows and targets of the whole corpus, and the files of all its shards.
        encode_seconds: codec on the teacher's device, a position.
        read_seconds: reading and decoding on one core, a position.
        hours: of building the whole corpus, by number of workers.
        break_even: students from which on a cache costs less time than the teacher online; None
            where it never does.
    """

    codec: str
    temperatures: tuple[float, ...]
    entries: float
    bytes_per_position: float
    row_bytes_per_position: float
    shard_bytes: int
    corpus_bytes: int
    encode_seconds: float
    read_seconds: float
    hours: dict[str, float]
    break_even: float | None
    fidelity: tuple[Fidelity, ...]

    @property
    def declared(self) -> str:
        """The declared temperatures, as an option."""
        return ",".join(f"{t:g}" for t in self.temperatures)


@dataclass(frozen=True)
class PlanResult:
    """The outcome of a plan.

    Attributes:
        vocab_size: ids or classes of a target.
        positions: in the sample.
        compared_positions: of them, compared with the full distribution.
        corpus_positions: in the whole corpus, estimated.
        device: what the teacher ran on.
        dtype: what it computed in.
        teacher_seconds: of its forward, a position.
        clipped_mass: mean probability that it gives to ids outside the vocabulary.
        shards: of the whole cache.
        advice: which codec to take and what it costs, then which for other purposes.
        filtered: about the share of records that filters leave out; None where there are none.
        domains: of the corpus, where it has names: files, bytes, spans and positions of each.
    """

    teacher: tuple[str, ...]
    task: str
    vocab_size: int
    rows: int
    positions: int
    compared_positions: int
    corpus_positions: int
    device: str
    dtype: str
    teacher_seconds: float
    clipped_mass: float
    shards: int
    advice: str
    caches: tuple[PlannedCache, ...]
    plot: str | None
    filtered: float | None = None
    domains: tuple[DomainEstimate, ...] = ()


def break_even(teacher: float, encode: float, read: float) -> float | None:
    """Students from which on a cache costs less than the teacher online; see the package's text.

    Args:
        teacher: seconds a position of its forward, and, by assumption, of a student's step.
    """
    waiting = max(0.0, read - teacher)
    return (teacher + encode) / (teacher - waiting) if waiting < teacher else None


SMALL = 1_000_000
"""Positions below which a corpus is small: the noise of samples hardly averages out."""
DRAWN = {"sample": (20, 40), "anchored": (10, 20)}
"""N of the codecs that draw, and that for a small corpus."""
_MISSED = 0.01
_PURPOSES = {
    "sample": "for students with random weights or far from the teacher",
    "anchored": "for students that begin near it, pruned or quantised: within a KL of 0.25 nats",
    "hidden": "for any temperature and divergence",
    "topk": "for reverse KL, Jensen-Shannon and evaluation",
    "dense": "for any temperature and divergence",
}


def advice(caches: Sequence[PlannedCache], positions: int, device: str = "cpu") -> str:
    """What to take of a plan's grid, which is not empty, and what that costs; then the others.

    Args:
        device: kind of device that the teacher ran on.
    """
    (first, purpose), *others = recommended(caches, positions)
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


def recommended(caches: Sequence[PlannedCache], positions: int) -> list[tuple[PlannedCache, str]]:
    """The cache to take of each kind, with its purpose, the most useful kind first.

    Args:
        caches: the grid, of which the first set of temperatures counts.
        positions: of the whole corpus.
    """
    temperatures = caches[0].temperatures
    kinds: dict[str, list[PlannedCache]] = {}
    for cache in caches:
        if cache.temperatures == temperatures:
            kinds.setdefault(_kind(cache), []).append(cache)
    order = [kind for kind in _PURPOSES if kind in kinds]
    if any(t != 1 for t in temperatures):
        order.sort(key=lambda kind: kind != "hidden")
    return [(min(kinds[k], key=lambda c: _rank(c, positions)), _PURPOSES[k]) for k in order]


def _kind(cache: PlannedCache) -> str:
    return cache.codec.partition(":")[0]


def _rank(cache: PlannedCache, positions: int) -> tuple[float, float]:
    """How far from good enough, then bytes: the smallest is the one to take."""
    kind, _, argument = cache.codec.partition(":")
    lacks = 0.0
    if kind in DRAWN:
        lacks = DRAWN[kind][positions < SMALL] - int(argument)
    elif kind in ("topk", "dense"):
        lacks = max(f.missed for f in cache.fidelity) - _MISSED
    return (max(lacks, 0.0), cache.bytes_per_position)


def plot_plan(path: str, caches: Sequence[PlannedCache], *, title: str, positions: int) -> None:
    """Draw squared error, and the angle of the mean gradient, against bytes per position."""
    # Side by side, drawn targets look worse than they are: only a bias is left after many steps.
    kinds = {cache.codec.partition(":")[0] for cache in caches}
    both = "topk" in kinds and kinds & {"sample", "anchored"} != set()
    panels = [
        Panel(
            "One target, student near its teacher"
            + both * ": errors of samples average out, those of top-k stay",
            "squared error, E||t - p||²",
            _clouds(caches, "near_noise"),
        ),
        Panel(
            f"All {positions:,} together" + both * ": more positions take samples down, top-k not",
            "angle of the mean gradient (degrees)",
            _clouds(caches, "mean_angle"),
        ),
    ]
    plot_clouds(path, panels, title=title, x_label="bytes per position, targets on disk")


def _clouds(caches: Sequence[PlannedCache], name: str) -> list[Cloud]:
    """A figure of each cache against its bytes; biased ones are hollow."""
    clouds: dict[tuple[str, bool], list[tuple[float, float, str]]] = {}
    for cache in caches:
        kind, _, argument = cache.codec.partition(":")
        for fidelity in cache.fidelity:
            declared = f" of {{{cache.declared}}}" if len(cache.temperatures) > 1 else ""
            biased = kind == "topk"
            label = f"{kind}{' (biased)' if biased else ''}, T = {fidelity.temperature:g}{declared}"
            point = (cache.bytes_per_position, getattr(fidelity, name) or 0.0, argument or kind)
            clouds.setdefault((label, biased), []).append(point)
    return [Cloud(label, tuple(points), hollow) for (label, hollow), points in clouds.items()]
