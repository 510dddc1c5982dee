"""The result of a plan: the figures of each cache that could be built."""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.commands.plan.fidelity import Fidelity
from kdcache.commands.plan.sample import DomainEstimate

WORKERS = (1, 8, 64)
"""Numbers of workers for which the hours of a build are estimated."""


@dataclass(frozen=True)
class PlannedCache:
    """One codec with one set of declared temperatures.

    Attributes:
        codec: its canonical text.
        temperatures: the declared ones.
        entries: stored a position (for `dense` all ids).
        bytes_per_position: of the targets, on disk.
        row_bytes_per_position: of the rows themselves, on disk: the same for every codec.
        shard_bytes: of a shard's file beside its columns, on disk.
        corpus_bytes: rows and targets of the whole corpus, and the files of all its shards.
        encode_seconds: codec on the teacher's device, a position.
        read_seconds: reading and decoding on one core, a position.
        hours: of building the whole corpus, by number of workers.
        break_even: students from which on a cache costs less time than the teacher online; None
            where it never does.
        fidelity: at each declared temperature.
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


@dataclass(frozen=True)
class PlanResult:
    """The outcome of a plan.

    Attributes:
        teacher: the teachers' names.
        task: one of `kdcache.tasks.TASKS`.
        vocab_size: ids or classes of a target.
        rows: in the sample.
        positions: in the sample.
        compared_positions: of them, compared with the full distribution.
        corpus_positions: in the whole corpus, estimated.
        device: what the teacher ran on.
        dtype: what it computed in.
        teacher_seconds: of its forward, a position.
        clipped_mass: mean probability that it gives to ids outside the vocabulary.
        shards: of the whole cache.
        advice: which codec to take and what it costs, then which for other purposes.
        caches: the grid.
        plot: where the plot is, or None.
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
        encode: of the codec.
        read: of reading and decoding.
    """
    waiting = max(0.0, read - teacher)
    return (teacher + encode) / (teacher - waiting) if waiting < teacher else None
