"""What a span worker asks of its source: the rows of a span, then their targets.

A build's source is a corpus and a teacher (`kdcache.commands.build.teacher_source`); that of
`kdcache transcode` is another cache (`kdcache.commands.transcode.cache_source`). All else of a
worker, and all of driver, Ray, faults, resume and seal, is the same for both.
"""

from __future__ import annotations

import concurrent.futures as futures
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import numpy as np

from kdcache.cache import Cache
from kdcache.cache.shard import ShardData
from kdcache.commands.build.activity import Steps
from kdcache.commands.build.packer import Packed, Packer
from kdcache.targets import SoftTargets
from kdcache.targets.label_logprob import Codes


class Work(Protocol):
    """A unit of work: it becomes one shard."""

    @property
    def index(self) -> int:
        """The number of the span, and of its shard."""

    @property
    def records(self) -> str:
        """Where its records are, for a person who looks for them."""

    @property
    def group(self) -> str:
        """What else it should share a worker with: units of one group; empty for none."""


@dataclass
class SpanRows:
    """The rows of a span, read and not yet answered.

    Attributes:
        shard: makes the shard's content of the targets and the codes of the labels'
            log-probabilities, if there are some; all in row-major order.
        skipped: records that were left out, empty or broken.
        filtered: records that filters left out; None where there are no filters.
        truncated: documents that were cut.
        reasons: why the first few records were left out.
        clipped_mass: what is known of it; None where the answers tell.
    """

    shard: Callable[[SoftTargets, Codes | None], ShardData]
    skipped: int = 0
    filtered: int | None = None
    truncated: int = 0
    reasons: tuple[str, ...] = ()
    clipped_mass: float | None = None


Answers: TypeAlias = tuple[list[futures.Future[Packed]], list[np.ndarray]]
"""Slices of a span on their way, and which position of the span, counted row by row, each of their
positions is."""

WorkT = TypeVar("WorkT", bound=Work, contravariant=True)
RowsT = TypeVar("RowsT", bound=SpanRows)


class Source(ABC, Generic[WorkT, RowsT]):
    """Where rows and their targets come from. `read` may run beside `answer`, of another span.

    Attributes:
        device: kind of device that answers.
        batch_tokens: size of a batch, for the events.
        takes_turns: whether it answers one span at a time.
    """

    device: str = "cpu"
    batch_tokens: int = 0
    takes_turns: bool = True

    @abstractmethod
    def read(self, work: WorkT, steps: Steps) -> RowsT:
        """The rows of a span.

        Args:
            work: the span.
            steps: counts what is read, and raises in a stopped worker.

        Raises:
            UsageError: its input is unusable.
        """

    @abstractmethod
    def answer(self, rows: RowsT, packer: Packer, steps: Steps) -> Answers:
        """Have the positions of rows encoded, and packed; never synchronises with the device.

        `steps` counts the batches.
        """

    def close(self) -> None:
        """End what runs beside this process."""


class SourceOptions(Protocol):
    """A source that a worker can open: it is sent to each actor once."""

    def open(self, cache: Cache) -> Source[Any, Any]:
        """The source, for the codec of this cache."""
