"""What an evaluation adds up, of all rows or of those of one domain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kdcache.commands.evaluate.in_bytes import InBytes
from kdcache.commands.evaluate.independent import IndependentTally
from kdcache.loss.metrics import Tally


@dataclass
class Counts:
    """Sums over some rows.

    Attributes:
        teacher: of the teacher.
        students: of each student that reads the rows as they are.
        in_bytes: over chunks of text, where there are such figures.
        independent: of teacher and students, where answers are no distribution.
        rows: how many rows.
        positions: in them.
        label_nats: minus the sum of the log-probabilities that a language model's cache keeps of
            labels, in nats.
        predicted: labels in it.
        impossible: labels that the teacher gives no probability.
    """

    teacher: Tally
    students: list[Tally]
    in_bytes: InBytes | None = None
    independent: list[IndependentTally] = field(default_factory=list)
    rows: int = 0
    positions: int = 0
    label_nats: float = 0.0
    predicted: int = 0
    impossible: int = 0

    def merge(self, parts: Iterable[Counts]) -> Counts:
        """Add those of other rows; returns itself."""
        for part in parts:
            self.teacher.merge(part.teacher)
            for mine, theirs in zip(self.students, part.students, strict=True):
                mine.merge(theirs)
            for own, others in zip(self.independent, part.independent, strict=True):
                own.merge(others)
            if self.in_bytes is not None and part.in_bytes is not None:
                self.in_bytes.merge(part.in_bytes)
            self.rows += part.rows
            self.positions += part.positions
            self.label_nats += part.label_nats
            self.predicted += part.predicted
            self.impossible += part.impossible
        return self
