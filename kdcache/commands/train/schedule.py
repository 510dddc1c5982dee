"""Options of `train` that may change over a run: `--alpha 0.9:0.1`."""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.errors import UsageError


@dataclass(frozen=True)
class Schedule:
    """A number that may change linearly over a run.

    Attributes:
        start: value at the first step.
        end: value at the last step.
    """

    start: float
    end: float

    @classmethod
    def parse(cls, value: float | str | Schedule, name: str) -> Schedule:
        """Read `0.5` or `0.9:0.1`.

        Raises:
            UsageError: not one or two numbers.
        """
        if isinstance(value, Schedule):
            return value
        first, _, last = str(value).partition(":")
        try:
            start = float(first)
            end = float(last) if last else start
        except ValueError as error:
            raise UsageError(
                f"{name} is {value!r}, expected a number, or two as start:end of a linear schedule."
            ) from error
        return cls(start, end)

    def at(self, step: int, steps: int) -> float:
        """Value at step `step` (from 0) of a run of `steps`."""
        share = min(1.0, step / max(1, steps - 1))
        return self.start + (self.end - self.start) * share

    @property
    def constant(self) -> bool:
        """Whether it never changes."""
        return self.start == self.end

    def __str__(self) -> str:
        return f"{self.start:g}" if self.constant else f"{self.start:g}:{self.end:g}"
