"""Spans left: which of the waiting spans a worker gets.

Spans of one group (the parts of a compressed file) share what a worker makes for the first of them,
so a worker is given the group that it has begun, until that is used up; then the next span or group
in the corpus's order that nobody has begun; and at last a part of what others are at.

Cost: constant a span while groups are left that nobody has begun; then one look at each begun one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class SpansLeft:
    """A queue of span numbers."""

    def __init__(self, group_of: Callable[[int], str]) -> None:
        """Begin empty; `group_of` gives the group of a span, empty for none."""
        self._group_of = group_of
        self._line: deque[int | str] = deque()  # spans of no group, and groups nobody has begun
        self._groups: dict[str, deque[int]] = {}  # those with spans left
        self._workers: dict[str, int] = {}  # how many have begun each group
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, span: int) -> None:
        """Put a span at the end."""
        self._add(span, first=False)

    def appendleft(self, span: int) -> None:
        """Put a span at the beginning, or at that of its group."""
        self._add(span, first=True)

    def take(self, group: str) -> int:
        """The next span, of that group as long as it has any."""
        self._count -= 1
        if group in self._groups:
            return self._next(group)
        while self._line:
            first = self._line.popleft()
            if isinstance(first, int):
                return first
            if first in self._groups:
                return self._begin(first)
        return self._begin(max(self._groups, key=self._share))

    def _add(self, span: int, *, first: bool) -> None:
        self._count += 1
        group = self._group_of(span)
        queue: deque[int] | deque[int | str] = self._line
        if group:
            if group not in self._groups and group not in self._workers:
                self._line.append(group)
            queue = self._groups.setdefault(group, deque())
        (queue.appendleft if first else queue.append)(span)

    def _share(self, group: str) -> float:
        """How many of its spans a further worker would make."""
        return len(self._groups[group]) / (1 + self._workers.get(group, 0))

    def _begin(self, group: str) -> int:
        self._workers[group] = self._workers.get(group, 0) + 1
        return self._next(group)

    def _next(self, group: str) -> int:
        spans = self._groups[group]
        span = spans.popleft()
        if not spans:
            del self._groups[group]
        return span
