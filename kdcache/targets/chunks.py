"""Targets of a student that reads the same text by another tokenizer.

A *chunk* is a stretch of text between two byte boundaries that the tokens of both sides share. Its
log-likelihood is the sum of the log-probabilities of its tokens, so teacher and student can be
compared on it whatever their vocabularies are (Minixhofer, Vulić and Ponti 2025, "Universal
Cross-Tokenizer Distillation via Approximate Likelihood Matching", arXiv 2503.20083).

At a shared boundary whole distributions can be compared too, on *groups* of ids, the outcomes that
both vocabularies can express: a set of teacher's ids and one of student's ids that begin with the
same bytes (`Groups`). Positions are those of the student: its labels, row after row.

Within one of the teacher's tokens (student " cat", "e", "gory", teacher " category"), the teacher's
distribution before the word still predicts what follows " cat": the entries that the student would
also begin with " cat" are kept, and their weights, divided by the sum, go to the student's next
tokens. An entry that ends there has an unknown next token, so its weight is the tail's. The entries
must be probabilities (top-k): of a sample a quotient of two sums is biased. Ids outside the top-k
are assumed to be distributed as its entries are; the label is always among them, by its own
probability.

Cost: a few passes over [chunks, K] for each further token of the longest one; finished rows drop
out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.targets.decoded import SparseTargets

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Groups:
    """Outcomes that two vocabularies share: groups of ids of each.

    Group 0 is that of ids without a counterpart.

    Attributes:
        teacher: int64 [V], the group of each of the teacher's ids.
        student: int64 [V'], the group of each of the student's ids.
        count: G, the number of groups.
    """

    teacher: Tensor
    student: Tensor
    count: int

    @staticmethod
    def of(
        teacher: Sequence[bytes],
        student: Sequence[bytes],
        pairs: Mapping[int, int] | None = None,
    ) -> Groups:
        """Group the ids of two vocabularies by their bytes.

        An id belongs together with the longest id of the other side that its bytes begin with: a
        text that one side begins with " cat", the other begins with " ca", if that is the longest
        it has. Ids with the same bytes on both sides are always together. So each group has one
        byte string that is an id of both sides, all its ids begin with it, and no id is in two.

        Args:
            teacher: the bytes of each id; none where it stands for no text.
            student: likewise.
            pairs: teacher's ids without bytes, such as the end of a text, and their like.
        """
        theirs, ours = set(filter(None, teacher)), set(filter(None, student))
        roots: dict[bytes, int] = {}

        def group(token: bytes, other: set[bytes], own: set[bytes]) -> int:
            """Shorten the bytes, by the ids of each side in turn, until both sides have them."""
            while token and not (token in other and token in own):
                starts = (token[:n] for n in range(len(token), 0, -1))
                token = next((start for start in starts if start in other), b"")
                own, other = other, own
            return roots.setdefault(token, len(roots) + 1) if token else 0

        of_teacher = [group(token, ours, theirs) for token in teacher]
        of_student = [group(token, theirs, ours) for token in student]
        count = len(roots) + 1
        for mine, like in (pairs or {}).items():
            of_teacher[mine] = of_student[like] = count
            count += 1
        return Groups(torch.tensor(of_teacher), torch.tensor(of_student), count)

    @staticmethod
    def single(teacher: int, student: int) -> Groups:
        """Each id a group, for a student of the teacher's tokenizer.

        Args:
            teacher: V, ids of the teacher's targets; those from V' on have no counterpart.
            student: V', ids of the student.
        """
        number = torch.arange(1, student + 1)
        beyond = number.new_zeros(max(teacher - student, 0))
        return Groups(torch.cat([number[:teacher], beyond]), number, student + 1)

    def of_targets(self, targets: SparseTargets) -> SparseTargets:
        """Sparse targets over the teacher's ids as targets over groups.

        What a student cannot express joins the tail; of a sample, which has none, it is left out.
        """
        ids = self.teacher[targets.ids]
        lost = (ids == 0) | ~self._reached[ids]
        weights = targets.weights.masked_fill(lost, 0)
        tail = targets.tail
        if targets.exact:
            tail = tail + (targets.weights * lost).sum(-1)
        return SparseTargets(ids, weights, tail, targets.exact, targets.temperature)

    def of_student(self, targets: SparseTargets) -> SparseTargets:
        """Sparse targets over the student's ids as targets over groups."""
        return replace(targets, ids=self.student[targets.ids])

    def student_on(self, device: torch.device) -> Tensor:
        """`student` on a device, copied there once."""
        if device not in self._copies:
            self._copies[device] = self.student.to(device)
        return self._copies[device]

    @cached_property
    def members(self) -> tuple[Tensor, Tensor]:
        """int64 [V'], the student's ids by group, and int64 [G + 1], where each group begins."""
        ends = torch.bincount(self.student, minlength=self.count).cumsum(0)
        return self.student.argsort(stable=True), torch.cat([ends.new_zeros(1), ends])

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}

    @cached_property
    def _reached(self) -> Tensor:
        found = torch.zeros(self.count, dtype=torch.bool)
        found[self.student] = True
        return found


@dataclass(frozen=True, eq=False)
class ChunkTargets:
    """What a student of another tokenizer learns from the teacher, at T = 1.

    Attributes:
        size: P, the number of the student's positions.
        begin: int64 [C] on the host, the first position of each chunk.
        end: int64 [C] on the host, the position after its last; chunks are in order and apart.
        likelihood: float32 [C], the teacher's log-likelihood of each chunk: finite, at most 0.
        tau: likelihoods are compared as ``p ** (1 / tau)``.
        positions: int64 [m] on the host, in order: positions with a distribution over groups.
        soft: those distributions; None where there are none.
        groups: what their ids are.
    """

    size: int
    begin: Integers
    end: Integers
    likelihood: Tensor
    tau: float = 1.0
    positions: Integers | None = None
    soft: SparseTargets | None = None
    groups: Groups | None = None

    temperature = 1.0

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise UsageError(f"tau is {self.tau:g}; it must be above 0.")

    @property
    def exact(self) -> bool:
        """Whether the soft part of a loss is zero for a student that agrees with its teacher."""
        return self.soft is None or self.soft.exact

    def __len__(self) -> int:
        """Number of positions."""
        return self.size

    def __getitem__(self, part: slice) -> ChunkTargets:
        """Consecutive positions that cut no chunk, as `cuts` gives them."""
        start, stop, _ = part.indices(self.size)
        a, b = np.searchsorted(self.begin, (start, stop))
        assert not b or self.end[b - 1] <= stop, "a slice cuts no chunk"
        changed: dict[str, Any] = {
            "size": stop - start,
            "begin": self.begin[a:b] - start,
            "end": self.end[a:b] - start,
            "likelihood": self.likelihood[a:b],
        }
        if self.positions is not None and self.soft is not None:
            c, d = np.searchsorted(self.positions, (start, stop))
            changed |= {"positions": self.positions[c:d] - start, "soft": self.soft[c:d]}
        return replace(self, **changed)

    def cuts(self, step: int) -> Iterator[slice]:
        """Slices of about `step` positions, and of more where a single chunk has more."""
        start = 0
        while start < self.size:
            stop = min(start + step, self.size)
            chunk = int(np.searchsorted(self.end, stop, side="right"))  # the first that ends later
            if chunk < len(self.end) and self.begin[chunk] < stop:
                before = int(self.begin[chunk])
                stop = before if before > start else int(self.end[chunk])
            yield slice(start, stop)
            start = stop

    def chunk_of(self, device: torch.device) -> Tensor:
        """int64 [P]: the chunk of each position, C where it is in none."""
        chunk = np.full(self.size, len(self.begin), np.int64)
        lengths = self.end - self.begin
        first = np.cumsum(lengths) - lengths
        inside = np.arange(lengths.sum()) + np.repeat(self.begin - first, lengths)
        chunk[inside] = np.repeat(np.arange(len(lengths)), lengths)
        return torch.from_numpy(chunk).to(device, non_blocking=True)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> ChunkTargets:
        """Copy to a device, except for what a host plans slices with."""
        return self._changed(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ChunkTargets:
        """Copy to page-locked memory."""
        return self._changed(lambda value: value.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """See `SparseTargets.record_stream`."""
        for values in (self.likelihood, self.soft):
            if values is not None:
                values.record_stream(stream)

    def _changed(self, change: Callable[[Any], Any]) -> ChunkTargets:
        soft = None if self.soft is None else change(self.soft)
        return replace(self, likelihood=change(self.likelihood), soft=soft)


def inside_chunks(
    targets: SparseTargets,
    labels: Integers,
    logprobs: np.ndarray,
    spans: Integers,
    read: Integers,
    paths: np.ndarray,
) -> Iterator[tuple[Integers, SparseTargets]]:
    """Distributions over the student's ids at the second, third, … token of chunks.

    Args:
        targets: over the teacher's ids where each of C chunks begins; exact.
        labels: int64 [C], the teacher's token that is there.
        logprobs: [C], its log-probability.
        spans: int64 [C, 2], the student's positions of each chunk.
        read: int64 [P], the student's labels.
        paths: int [V, n], the student's tokens of each of the teacher's ids, then -1 at least once.

    Yields:
        int64 [m] positions, and m targets over the student's ids, for one token after the other.
        Positions at which the student's tokens are not those of the label's path have none.
    """
    assert targets.exact, "quotients of a sample's weights are biased"
    ids, weights = targets.ids.numpy(), targets.weights.numpy()
    known = ((ids == labels[:, None]) & (weights > 0)).any(1)
    # Not below what float32 holds: a sum of weights is never 0.
    own = np.where(known, 0, np.exp(np.maximum(logprobs, -80.0)))
    ids = np.concatenate([ids, labels[:, None]], 1)
    weights = np.concatenate([weights, own[:, None]], 1)
    chunks = np.arange(len(spans))
    for depth in range(1, paths.shape[1]):
        at = spans[chunks, 0] + depth
        goes_on = (at < spans[chunks, 1]) & (paths[labels[chunks], depth] >= 0)
        chunks, at, ids, weights = (x[goes_on] for x in (chunks, at, ids, weights))
        before = read[at - 1]
        same = paths[labels[chunks], depth - 1] == before
        chunks, at, before, ids, weights = (x[same] for x in (chunks, at, before, ids, weights))
        if not len(chunks):
            return
        weights = np.where(paths[ids, depth - 1] == before[:, None], weights, 0)
        following = paths[ids, depth]
        over = following < 0
        total = weights.sum(1)
        yield (
            at,
            SparseTargets(
                torch.from_numpy(np.where(over, 0, following).astype(np.int64)),
                torch.from_numpy((np.where(over, 0, weights) / total[:, None]).astype(np.float32)),
                torch.from_numpy(((weights * over).sum(1) / total).astype(np.float32)),
                True,
                targets.temperature,
            ),
        )
