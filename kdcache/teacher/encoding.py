"""What is kept of a teacher's answers, computed where they are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from kdcache.targets import Codec
from kdcache.targets.device import of_positions
from kdcache.teacher.memory import Slice


@dataclass(frozen=True)
class Encoding:
    """Makes a cache's numbers of slices of logits.

    Attributes:
        codec: of the cache.
        kept: what the cache keeps of each position besides its target, as `CacheSpec.kept` has it.
        made_for: `TeacherOptions.temperatures`.
    """

    codec: Codec
    kept: Collection[str]
    made_for: tuple[float, ...] = (1.0,)

    def __call__(self, piece: Slice, u: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What is kept of some positions, on their device; the host waits for nothing.

        Args:
            piece: as the teacher yields it.
            u: float64 [n], the codec's noise.
            labels: int64 [n], hard labels.

        Returns:
            What the codec gives, and what the cache keeps besides it, as `of_positions` gives it.
        """
        values = logits_at(piece.read_by(self.codec), self.made_for, self.codec.temperatures)
        encoded = self.codec.encode(values, u)
        if "label_logprob" in self.kept:
            at_one = logits_at(piece.logits, self.made_for, (1.0,))
            read_before = encoded if piece.logits.ndim == 2 else None
            found = of_positions(at_one, labels, read_before, entropy="entropy" in self.kept)
            encoded |= found
            if self.codec.reads_states:  # which may be finite where the logits are not
                encoded["finite"] = encoded["finite"] & ~found["label_logprob"].isnan()
        return encoded


def logits_at(logits: Tensor, made_for: Sequence[float], wanted: Sequence[float]) -> Tensor:
    """The logits of some temperatures.

    Args:
        logits: as `Teacher.logits` yields them.
        made_for: `TeacherOptions.temperatures`.
        wanted: some of these.

    Returns:
        [n, len(wanted), V] of a mean of probabilities; [n, V] as they are of any other teacher.
    """
    if logits.ndim == 2:
        return logits
    return logits[:, [list(made_for).index(t) for t in wanted]]
