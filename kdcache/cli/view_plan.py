"""Prints the result of `plan`."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rich.console import Console

from kdcache.cli.tables import print_line, print_table
from kdcache.cli.views import render_estimates
from kdcache.commands.plan.result import WORKERS, PlanResult, _set
from kdcache.humanize import counted, duration, number, percent, size
from kdcache.tasks import TASKS

_SMALL_SHARD = 100_000
"""Positions from which on a shard compresses as well as a large one."""


def render_plan(result: PlanResult, console: Console, *, details: bool = False) -> None:
    """Print which codec to take and a short table; with `details` all figures instead."""
    print_line(console, result.advice)
    if not details:
        print_line(console, "")
        _print_short(result, console)
        render_estimates(result.domains, console)
        return
    rate = 1 / result.teacher_seconds if result.teacher_seconds else 0.0
    print_line(
        console,
        f"Sample: {counted(result.rows, 'row')}, {counted(result.positions, 'position')}. "
        f"Teacher: {rate:,.0f} "
        f"positions per second ({result.device}, {result.dtype}). Whole corpus: about "
        f"{result.corpus_positions:,} positions.",
    )
    render_estimates(result.domains, console)
    print_line(console, "")
    _print_costs(result, console)
    print_line(console, "")
    _print_fidelity(result, console)
    for line in [*_notes(result), *_warnings(result)]:
        print_line(console, line)


def _print_short(result: PlanResult, console: Console) -> None:
    """What decides between codecs: bytes, hours, and how far gradients are from the full ones."""
    header = ["codec", "T", "B/position", "corpus", "one worker", "pays from", "missed", "angle"]
    rows = [
        (
            cache.codec,
            _set(cache),
            number(cache.bytes_per_position, 1),
            size(cache.corpus_bytes),
            duration(3600 * cache.hours["1"]),
            "never" if cache.break_even is None else f"{max(1, math.ceil(cache.break_even)):,}",
            percent(max(f.missed for f in cache.fidelity), 1),
            _degrees(_largest(f.mean_angle for f in cache.fidelity)),
        )
        for cache in result.caches
    ]
    print_table(console, header, rows, left=2)
    missed = "probability outside the stored ids, at the worst T"
    if TASKS[result.task].answers == "score":
        missed = "what rounding changes, by the standard deviation of the scores"
    print_line(
        console,
        f"About {result.corpus_positions:,} positions in {counted(result.shards, 'shard')}, by "
        f"{counted(result.rows, 'row')} on {result.device} ({result.dtype}). Missed: {missed}. "
        "Angle: of the mean gradient to the full one. --all prints everything.",
    )
    for line in _warnings(result):
        print_line(console, line)


def _print_costs(result: PlanResult, console: Console) -> None:
    workers = [counted(n, "worker") for n in WORKERS]
    header = [
        "codec",
        "T",
        "entries",
        "B per position",
        "+ rows, B",
        "corpus",
        *workers,
        "break-even",
    ]
    rows = [
        (
            cache.codec,
            _set(cache),
            number(cache.entries, 1),
            number(cache.bytes_per_position, 1),
            number(cache.row_bytes_per_position, 1),
            size(cache.corpus_bytes),
            *(duration(3600 * cache.hours[str(n)]) for n in WORKERS),
            "never" if cache.break_even is None else number(cache.break_even, 2),
        )
        for cache in result.caches
    ]
    print_table(console, header, rows, left=2, title="Cost")


def _print_fidelity(result: PlanResult, console: Console) -> None:
    header = ["codec", "T", "at T", "noise", "bias", "missed", "mass", "angle", "norm"]
    header += ["mean angle", "mean norm", "near angle"]
    rows = [
        (
            cache.codec,
            _set(cache),
            f"{f.temperature:g}",
            _small(f.noise),
            _small(f.bias),
            percent(f.missed, 1),
            percent(f.mass, 1),
            _degrees(f.angle),
            number(f.norm_ratio, 2),
            _degrees(f.mean_angle),
            number(f.mean_norm_ratio, 2),
            _degrees(f.near_angle),
        )
        for cache in result.caches
        for f in cache.fidelity
    ]
    title = f"Fidelity, {result.compared_positions:,} positions"
    print_table(console, header, rows, left=2, title=title)


def _notes(result: PlanResult) -> list[str]:
    notes = [
        "break-even: number of students (passes over the corpus) from which a cache takes less "
        "time than the teacher online, if a student's step takes as long as the teacher's forward.",
        "noise: E||target - p||²; bias: the part that does not average out; missed: probability "
        "outside the stored ids; mass: probability on them. Noise averages out over positions, "
        "missed mass does not.",
        "angle, norm: gradient by a student's logits, compared with that of the full "
        "distribution; mean: summed over positions. The student is simulated: half of the "
        "teacher's logits, plus noise; near: all of them plus a little noise, a KL of about 0.03.",
    ]
    if result.positions < _SMALL_SHARD:
        notes.append(
            f"Bytes are measured on one shard of {result.positions:,} positions; larger ones "
            "compress "
            "a little better."
        )
    return notes


def _warnings(result: PlanResult) -> list[str]:
    """What to know however much is printed."""
    lines = []
    if result.filtered is not None:
        lines.append(f"--filter leaves out about {result.filtered:.0%} of the records.")
    if result.clipped_mass:
        lines.append(
            f"The teacher gives {percent(result.clipped_mass, 4)} of its probability to ids "
            "outside the vocabulary, which are cut off."
        )
    if result.plot is not None:
        lines.append(f"Plot: {result.plot}")
    return lines


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _degrees(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}°"


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}" if value < 1e-3 else f"{value:.4f}"
