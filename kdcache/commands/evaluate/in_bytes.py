"""Figures that no tokenizer enters: bits per byte, and student against teacher on chunks of text.

A model's *bits per byte* are minus the log2 of its probability of a text, divided by the text's
bytes. They compare any two models on the same bytes, so all models of an evaluation are asked about
the same ones: those of chunks between byte boundaries that the tokens of all models share
(`kdcache.align`). With one tokenizer these are the tokens themselves. Special tokens are not text:
what a model thinks of an end-of-text is in no figure here.

On each chunk teacher and student have a probability, p and q. They are compared as two outcomes,
"this text" and "any other": KL is that of Bernoulli(p) from Bernoulli(q) (Minixhofer, Vulić and
Ponti 2025, arXiv 2503.20083, the divergence that `--cross-tokenizer likelihood` trains on), and
they agree where p and q are on the same side of 1/2.

Cost: one forward of each model with a tokenizer of its own, and some numpy calls a row.
Guarantee: sums in float64 of the log-probabilities of labels; of a cached teacher these are
`label_logprob`, rounded without bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache import loss
from kdcache.align import Aligner, CachedRow, TokenBytes, label_bytes
from kdcache.commands.evaluate.rows import EvaluationRows
from kdcache.errors import UsageError
from kdcache.loss.chunks import compared
from kdcache.metrics import ModelScores
from kdcache.rows import Row
from kdcache.rows.batches import batches, documents_of
from kdcache.stream.text import RowKind
from kdcache.student.saved import LoadedModel, SavedModel
from kdcache.tasks import CAUSAL_LM, IGNORE, TASKS

Floats = np.ndarray


@dataclass
class Sums:
    """Of one model over all chunks.

    Attributes:
        nats: minus its log-probability of them; infinity if it gives one no probability.
        kl: summed divergence from the teacher.
        agreed: chunks of which it finds the same outcome more probable as the teacher.
    """

    nats: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    def merge(self, other: Sums) -> None:
        """Add those over other chunks."""
        self.nats += other.nats
        self.kl += other.kl
        self.agreed += other.agreed


@dataclass
class InBytes:
    """Sums over the chunks of a set, for all models of an evaluation.

    Attributes:
        reader: the tokenizer that made the rows.
        others: students with a tokenizer of their own, and how their rows are made.
        kind: what the rows hold.
        budget: tokens of a batch.
        teacher: its sums; None where what it thinks of the labels is not known.
        same: sums of the students that read the rows as they are.
        own: sums of the others.
        text: bytes of text with a label.
        bytes: those of them in chunks.
        chunks: their number.
        likely: those of them that the teacher finds more probable than not.
        impossible: chunks left out since the teacher gives a label in them no probability.
        lost: stretches that an other's tokens do not have the bytes of.
        cut: labels beyond what an other can read.
    """

    reader: TokenBytes
    others: Sequence[tuple[LoadedModel, Aligner]]
    kind: RowKind
    budget: int
    same: list[Sums]
    teacher: Sums | None = field(default_factory=Sums)
    own: list[Sums] = field(init=False)
    text: int = 0
    bytes: int = 0
    chunks: int = 0
    likely: int = 0
    impossible: int = 0
    lost: int = 0
    cut: int = 0

    def __post_init__(self) -> None:
        self.own = [Sums() for _ in self.others]

    def add(self, rows: Sequence[Row], teacher: Floats | None, same: Sequence[Floats]) -> None:
        """Count some rows.

        Args:
            rows: of the reader's tokenizer.
            teacher: float64 [positions], the teacher's log-probability of each label of the rows,
                in order; None where it is not known.
            same: likewise of each student that reads the rows as they are.
        """
        cached = [CachedRow(row.input_ids, row.labels, row.starts, *self.kind) for row in rows]
        found = [label_bytes(self.reader, row) for row in cached]
        sizes = np.concatenate([size for size, _ in found])
        is_text = np.concatenate([text for _, text in found])
        first = np.cumsum([0, *(len(size) for size, _ in found)])
        edges, covered = np.arange(len(sizes) + 1), np.ones(len(sizes), bool)
        own = []
        for model, aligner in self.others:
            values, inside, ends = self._answers(model, aligner, cached, first)
            edges, covered = np.intersect1d(edges, ends), covered & inside
            own.append(values)
        low, high = edges[:-1], edges[1:]

        def over(values: Floats) -> Floats:
            sums = np.concatenate([[0], np.cumsum(values)])
            return np.asarray(sums[high] - sums[low])

        # Special tokens are chunks by themselves.
        kept = (over(covered) == high - low) & (over(is_text) > 0)
        self.text += int(sizes.sum())
        known = None if teacher is None else _sums(teacher, over)
        if known is None:
            self.teacher = None
        if known is not None:
            self.impossible += int((kept & ~np.isfinite(known)).sum())
            kept &= np.isfinite(known)
        self.bytes += int(over(sizes)[kept].sum())
        self.chunks += int(kept.sum())
        theirs = None if known is None else known[kept]
        if self.teacher is not None and theirs is not None:
            self.teacher.nats -= float(theirs.sum())
            self.likely += int((theirs > -math.log(2)).sum())
        for sums, values in zip([*self.same, *self.own], [*same, *own], strict=True):
            mine = _sums(values, over)[kept]
            sums.nats -= float(mine.sum())
            if theirs is not None and len(mine):
                kl, agreed = compared(torch.from_numpy(theirs), torch.from_numpy(mine))
                sums.kl += float(kl)
                sums.agreed += int(agreed)

    def empty(self) -> InBytes:
        """The same of no rows."""
        same = [Sums() for _ in self.same]
        return InBytes(self.reader, self.others, self.kind, self.budget, same)

    def merge(self, other: InBytes) -> None:
        """Add the sums over other rows."""
        pairs = zip([*self.same, *self.own], [*other.same, *other.own], strict=True)
        for mine, theirs in pairs:
            mine.merge(theirs)
        if self.teacher is None or other.teacher is None:
            self.teacher = None
        else:
            self.teacher.merge(other.teacher)
        for name in ("text", "bytes", "chunks", "likely", "impossible", "lost", "cut"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def teacher_bits(self) -> float | None:
        """The teacher's bits per byte, if there is one that is known."""
        return None if self.teacher is None else self._bits(self.teacher)

    def with_figures(self, scores: ModelScores, sums: Sums) -> ModelScores:
        """A student's figures with those in bytes."""
        compared = bool(self.others) and self.teacher is not None and self.chunks > 0
        return replace(
            scores,
            bits_per_byte=self._bits(sums),
            chunk_kl=sums.kl / self.chunks if compared and math.isfinite(sums.kl) else None,
            chunk_agreement=sums.agreed / self.chunks if compared else None,
        )

    def _bits(self, sums: Sums) -> float | None:
        if not self.bytes or not math.isfinite(sums.nats):
            return None
        return sums.nats / math.log(2) / self.bytes

    def notes(self, soft: bool) -> Iterator[str]:
        """What a reader must know about the figures; `soft`: there is a teacher."""
        if self.others:
            names = ", ".join(model.saved.name for model, _ in self.others)
            share = self.bytes / self.text if self.text else 0
            yield (
                f"{names}: a tokenizer of its own, so figures per token are left out. Bits per "
                f"byte, chunk KL and agreement are over {self.chunks:,} chunks of text between "
                f"byte boundaries that all models share, {share:.1%} of {self.text:,} bytes."
            )
            if self.teacher is not None and self.chunks:
                rate = self.likely / self.chunks
                side, share = ("more", rate) if rate > 0.5 else ("less", 1 - rate)
                yield (
                    f"Agreement on chunks: {share:.1%} is what one answer for all reaches, as the "
                    f"teacher finds so many of them {side} probable than not."
                )
        if soft and self.teacher is None:
            yield (
                "The cache lacks the log-probability of its labels, so the teacher's bits per byte "
                "are not known. Build the cache anew with this kdcache, or name the --teacher."
            )
        if self.impossible:
            yield (
                f"The teacher gives {self.impossible:,} chunks of text no probability: bits per "
                "byte leave them out."
            )
        if any(math.isinf(sums.nats) for sums in (*self.same, *self.own)):
            yield "A student gives some text no probability: it has no bits per byte."
        if self.lost:
            yield (
                f"{self.lost:,} stretches of text are left out, since a student's tokens do not "
                "have their bytes."
            )
        if self.cut:
            yield f"{self.cut:,} labels are beyond the tokens that a student reads in a row."

    def _answers(
        self, model: LoadedModel, aligner: Aligner, cached: Sequence[CachedRow], first: np.ndarray
    ) -> tuple[Floats, np.ndarray, np.ndarray]:
        """What a model with its own tokenizer thinks of the rows' text.

        Returns:
            By positions of the rows: float64, its log-probability of each of its chunks, at the
            first position of that, 0 elsewhere; bool, which are in its chunks. And the ends of its
            chunks, as numbers of positions.
        """
        found = aligner.align(cached)
        rows = [
            Row(row.input_ids.astype(np.int32), row.labels.astype(np.int32), starts=row.starts)
            for row in found
        ]
        self.lost += sum(row.lost for row in found)
        self.cut += sum(row.cut for row in found)
        logprobs = self._logprobs(model, rows)
        counts = [int((row.labels != IGNORE).sum()) for row in found]
        before = np.cumsum([0, *counts])[:-1]
        spans = [len(row.chunk_bytes) for row in found]
        theirs = np.concatenate([row.teacher_spans for row in found])
        theirs = theirs + np.repeat(first[:-1], spans)[:, None]
        ours = np.concatenate([row.student_spans for row in found])
        ours = ours + np.repeat(before, spans)[:, None]
        values = np.zeros(first[-1])
        if len(ours):
            sums = np.concatenate([[0], np.cumsum(np.where(np.isfinite(logprobs), logprobs, 0))])
            lost = np.concatenate([[0], np.cumsum(~np.isfinite(logprobs))])
            begin, end = ours.T
            of_chunks = np.where(lost[end] > lost[begin], -np.inf, sums[end] - sums[begin])
            values[theirs[:, 0]] = of_chunks
        inside = np.zeros(first[-1] + 1, np.int64)
        np.add.at(inside, theirs[:, 0], 1)
        np.add.at(inside, theirs[:, 1], -1)
        return values, np.cumsum(inside)[:-1] > 0, np.unique(theirs)

    def _logprobs(self, model: LoadedModel, rows: Sequence[Row]) -> Floats:
        """float64, of each label of the rows, in order."""
        parts = documents_of(rows)
        counts = [len(part.positions(CAUSAL_LM)) for part in parts]
        first = np.cumsum([0, *counts])
        out = np.zeros(first[-1])
        asked = [i for i, count in enumerate(counts) if count]
        for chosen in batches([len(parts[i].input_ids) for i in asked], self.budget):
            batch = [asked[i] for i in chosen]
            numbers = np.concatenate([np.arange(first[i], first[i + 1]) for i in batch])
            labels = np.concatenate([parts[i].labels for i in batch])
            out[numbers] = answers(model, [parts[i] for i in batch], labels[labels != IGNORE])
        return out


@torch.inference_mode()
def answers(model: LoadedModel, rows: Sequence[Row], labels: np.ndarray) -> Floats:
    """float64, a model's log-probability of each label of a batch of its own rows."""
    done, found = 0, []
    for piece in model.logits(rows, model.saved.tokenizer_sha256, 1 << 30):
        found.append(label_logprobs(piece, labels[done : done + len(piece)]))
        done += len(piece)
    assert done == len(labels), "the model answers every position"
    return np.concatenate(found)


def label_logprobs(logits: Tensor, labels: np.ndarray) -> Floats:
    """float64 [n]: log-probabilities of labels [n] by logits [n, V]."""
    number = torch.from_numpy(labels.astype(np.int64)).to(logits.device)
    return np.asarray(loss.label_logprobs(logits, number).cpu().numpy(), np.float64)


def _sums(values: Floats, over: Callable[[Floats], Floats]) -> Floats:
    """Of stretches; minus infinity where one value is."""
    finite = np.isfinite(values)
    return np.where(over(~finite) > 0, -np.inf, over(np.where(finite, values, 0)))


def other_tokenizers(saved: Sequence[SavedModel], rows: EvaluationRows) -> list[bool]:
    """Which models have another vocabulary than the rows.

    Raises:
        UsageError: a model has that is a teacher, or of a task where no text is read anew.
    """
    other = [False] * len(saved)
    if TASKS[rows.task].rereads:
        return other  # each reads the texts by itself
    ours: Any = None
    for i, model in enumerate(saved):
        if model.tokenizer is None or model.tokenizer_sha256 == rows.tokenizer_sha256:
            continue
        ours = rows.tokenizer() if ours is None else ours
        theirs = model.tokenizer
        # Added tokens and templates may differ: only the meaning of each id of text counts.
        added = {*ours.get_added_vocab(), *theirs.get_added_vocab()}
        unlike = ours.get_vocab().items() ^ theirs.get_vocab().items()
        differ = len({token for token, _ in unlike} - added)
        other[i] = differ > 0
        if other[i] and (model.role == "teacher" or rows.task != CAUSAL_LM):
            raise UsageError(
                f"{model.who} has another vocabulary than {rows.source}: {differ:,} "
                "tokens have other ids or none. Evaluate on a cache built for this vocabulary."
            )
    return other


def with_aligners(
    reader: TokenBytes, models: Sequence[LoadedModel]
) -> list[tuple[LoadedModel, Aligner]]:
    """Students next to what makes their rows.

    Raises:
        UsageError: a student's tokenizer loses bytes.
    """
    return [
        (model, Aligner(reader, TokenBytes(saved.tokenizer, f"student {saved.name}"), saved.reach))
        for model in models
        for saved in (model.saved,)
    ]


def by_its_own_tokens(model: LoadedModel) -> ModelScores:
    """The figures of a student with a tokenizer of its own: none by positions of the rows."""
    return ModelScores(model.saved.name, "student", model.saved.parameters)
