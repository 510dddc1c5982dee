"""What an evaluation adds up, of all rows or of those of one domain.

What the sums of an evaluation say of each model.

Figures of a model whose answers are no distribution: labels each by itself, or scores.

Average precision and Spearman's correlation need all answers in order, so these are kept: 4 bytes a
class and row for each model, and as many for the hard labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.commands.evaluate.in_bytes import InBytes, by_its_own_tokens
from kdcache.commands.evaluate.rows import EvaluationRows
from kdcache.commands.evaluate.scores import Bin, DomainScores, ModelScores
from kdcache.loss import label_loss, score_loss
from kdcache.loss.metrics import (
    Entities,
    Tally,
    f1,
    known,
    macro_average_precision,
    macro_f1,
    micro_average_precision,
    micro_f1,
    pearson,
    perplexity,
    ratio,
    spearman,
)
from kdcache.student.saved import LoadedModel
from kdcache.targets import DenseTargets
from kdcache.tasks import IGNORE, TASKS, labelled


class IndependentTally:
    """The answers of one model, and how far they are from the teacher's.

    Attributes:
        positions: rows.
        labelled: rows with a hard label.
        known: rows, or classes of rows, of which the teacher's answer is known.
    """

    def __init__(self, task: str, threshold: float) -> None:
        """Start empty.

        Args:
            task: of the model.
            threshold: probability from which a class is predicted.
        """
        self.task, self.scores = task, TASKS[task].answers == "score"
        self.logit = float(np.log(threshold) - np.log1p(-threshold))
        self.positions = self.labelled = self.known = 0
        self.hard = self.soft = self.agreed = 0.0
        self._labels: list[np.ndarray] = []
        self._answers: list[np.ndarray] = []

    def add(self, logits: Tensor, labels: np.ndarray, targets: DenseTargets | None) -> None:
        """Add rows.

        Args:
            logits: [n, classes], or [n, 1] of scores.
            labels: as `kdcache.stream.Batch` has them.
            targets: the teacher's answers, or None.
        """
        z, hard = logits.double(), torch.from_numpy(labels).to(logits.device)
        loss = score_loss if self.scores else label_loss
        parts = loss(z, hard, targets, alpha=0.5, count=1)
        self.hard += float(parts.hard)
        self.positions += len(labels)
        self.labelled += int(labelled(labels, self.task).sum())
        if targets is not None:
            self.soft += float(parts.soft) / targets.temperature**2
            self.known += logits.numel()
            mine, theirs = z >= self.logit, targets.logits >= self.logit
            self.agreed += float((mine == theirs).sum())
        self._labels.append(labels)
        self._answers.append(logits.float().cpu().numpy())

    def merge(self, other: IndependentTally) -> None:
        """Add the rows of another tally."""
        for name in ("positions", "labelled", "known", "hard", "soft", "agreed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._labels += other._labels
        self._answers += other._answers

    def figures(self, *, soft: bool) -> dict[str, Any]:
        """The figures by their names in `ModelScores`; those against the teacher where `soft`."""
        if not self._labels:
            return {}
        labels, answers = np.concatenate(self._labels), np.concatenate(self._answers)
        there = labelled(labels, self.task)
        labels, answers = labels[there], answers[there]
        soft_mean = known(ratio(self.soft, self.positions)) if soft else None
        if self.scores:
            return {
                "mse": known(ratio(self.hard, self.labelled)),
                "pearson": known(pearson(answers[:, 0], labels)),
                "spearman": known(spearman(answers[:, 0], labels)),
                "teacher_mse": soft_mean,
            }
        chosen = answers >= self.logit
        return {
            "cross_entropy": known(self._per_class(labels)),
            "micro_f1": known(micro_f1(labels, chosen)),
            "macro_f1": known(macro_f1(labels, chosen)),
            "micro_average_precision": known(micro_average_precision(labels, answers)),
            "macro_average_precision": known(macro_average_precision(labels, answers)),
            "kl": soft_mean,
            "agreement": known(ratio(self.agreed, self.known)) if soft else None,
        }

    def _per_class(self, labels: np.ndarray) -> float:
        """Binary cross-entropy a class that is known: the loss divides by all classes of a row."""
        classes = labels.shape[-1]
        return ratio(self.hard * classes, int((labels != IGNORE).sum()))


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


def tally_of(counts: Counts) -> Tally | IndependentTally:
    """Positions, of any model that read them all."""
    if counts.independent:
        return counts.independent[1]
    if counts.students:
        return counts.students[0]
    return Tally(positions=counts.positions, labelled=counts.positions)


@dataclass(frozen=True)
class Figures:
    """Makes the figures of models.

    Attributes:
        rows: what they were compared on.
        teacher: that ran beside the students, or None.
        students: those that read the rows as they are.
        all_students: all, in the order in which they were named.
        exact: whether all soft targets were distributions, and not samples of them.
    """

    rows: EvaluationRows
    teacher: LoadedModel | None
    students: Sequence[LoadedModel]
    all_students: Sequence[LoadedModel]
    exact: bool

    @property
    def soft(self) -> bool:
        """Whether there is a teacher, or a cache of its answers."""
        return self.teacher is not None or self.rows.cache is not None

    def of_domain(self, name: str, counts: Counts) -> DomainScores:
        """The figures of a domain."""
        tally = tally_of(counts)
        models = self.of(counts)
        return DomainScores(name, counts.rows, tally.positions, tally.labelled, models)

    def of(self, counts: Counts) -> tuple[ModelScores, ...]:
        """Scores of the teacher, where there is one, and of the students."""
        if counts.independent:
            return tuple(self._independent_scores(counts))
        teacher = [self._teacher_scores(counts)] if self.soft else []
        return (*teacher, *self._student_scores(counts))

    def _independent_scores(self, counts: Counts) -> Iterator[ModelScores]:
        """The figures where answers are no distribution."""
        teacher, *students = counts.independent
        live = None if self.teacher is None else self.teacher.saved
        if self.soft:
            own = teacher.figures(soft=False) if live is not None or self.rows.logits_known else {}
            name = "teacher (cached)" if live is None else live.name
            yield ModelScores(name, "teacher", None if live is None else live.parameters, **own)
        for model, tally in zip(self.students, students, strict=True):
            own = tally.figures(soft=self.soft)
            if self.soft and not self._decides(tally):
                own["agreement"] = None
            yield ModelScores(model.saved.name, "student", model.saved.parameters, **own)

    def _decides(self, tally: IndependentTally) -> bool:
        """Whether the teacher's decisions are known: of a mean of probabilities at another
        temperature only those at 1/2, where the temperature does not matter.
        """
        return self.teacher is not None or self.rows.logits_known or tally.logit == 0

    def _student_scores(self, counts: Counts) -> list[ModelScores]:
        """In the order in which the students were named."""
        found = {
            id(model): self._scores(model, tally)
            for model, tally in zip(self.students, counts.students, strict=True)
        }
        in_bytes = counts.in_bytes
        if in_bytes is not None:
            found |= {id(model): by_its_own_tokens(model) for model, _ in in_bytes.others}
            models = [*self.students, *(model for model, _ in in_bytes.others)]
            for model, sums in zip(models, [*in_bytes.same, *in_bytes.own], strict=True):
                found[id(model)] = in_bytes.with_figures(found[id(model)], sums)
        return [found[id(model)] for model in self.all_students]

    def _scores(self, model: LoadedModel, tally: Tally) -> ModelScores:
        soft = known(ratio(tally.soft, tally.soft_positions))
        return ModelScores(
            name=model.saved.name,
            role="student",
            parameters=model.saved.parameters,
            kl=soft if self.exact else None,
            soft_cross_entropy=None if self.exact else soft,
            agreement=known(ratio(tally.agreed, tally.known)),
            **self._label_scores(tally, known(ratio(tally.hard, tally.labelled))),
        )

    def _teacher_scores(self, counts: Counts) -> ModelScores:
        model, tally = self.teacher, counts.teacher
        hard = None
        if model is not None or self.rows.logits_known:
            hard = known(ratio(tally.hard, tally.labelled))
        elif counts.predicted:  # sparse targets lack the probability of some labels
            hard = counts.label_nats / counts.predicted
        return ModelScores(
            name="teacher (cached)" if model is None else model.saved.name,
            role="teacher",
            parameters=None if model is None else model.saved.parameters,
            bits_per_byte=None if counts.in_bytes is None else counts.in_bytes.teacher_bits,
            **self._label_scores(tally, hard),
        )

    def _label_scores(self, tally: Tally, hard: float | None) -> dict[str, Any]:
        """Figures against the hard labels, with whose cross-entropy `hard`."""
        kind = TASKS[self.rows.task]
        return {
            "accuracy": known(ratio(tally.correct, tally.labelled)),
            "f1": None if kind.over_ids else known(f1(tally.confusion)),
            "cross_entropy": hard,
            "perplexity": perplexity(hard) if kind.perplexity else None,
            "calibration_error": known(tally.calibration.error),
            "calibration": tuple(Bin(*values) for values in tally.calibration.filled()),
            **({} if tally.entities is None else _entity_scores(tally.entities)),
        }

    def notes(self, counts: Counts, why_no_bytes: str) -> Iterable[str]:
        """What a reader must know about figures that are missing or not exact.

        Args:
            counts: of all rows.
            why_no_bytes: why there are no bits per byte, or nothing.
        """
        tally = tally_of(counts)
        if not self.exact and self.students:
            yield (
                "The cache holds samples of the teacher, whose entropy is unknown: soft "
                "cross-entropy is KL plus that entropy, so differences in it are differences in "
                "KL. Use --teacher to measure KL itself."
            )
        elif self.soft and self.teacher is None and not self.rows.dense and self.students:
            yield (
                "The cache holds the teacher's top ids: KL compares these and the sum of all "
                "others, and is at most the full KL. Use --teacher to measure the full KL."
            )
        compared = self.students and not counts.independent
        if self.soft and compared and tally.known < tally.positions:
            yield (
                f"Agreement is over the {tally.known:,} of {tally.positions:,} positions where "
                "the cached sample determines the teacher's most probable id."
            )
        if self.rows.cut:
            what = "sentences" if TASKS[self.rows.task].words else "texts"
            at = f"{self.rows.max_length:,} tokens (--max-length)"
            yield f"{self.rows.cut:,} {what} were cut at {at}."
        if counts.impossible and not self.rows.logits_known:
            yield (
                f"The teacher gives {counts.impossible:,} labels no probability: its "
                "cross-entropy leaves them out."
            )
        if self.soft and counts.independent and not self._decides(counts.independent[0]):
            yield (
                "Agreement is not known: the cache holds a mean of probabilities at "
                f"T = {self.rows.temperature:g}, which decides at T = 1 for --threshold 0.5 alone."
            )
        if counts.in_bytes is not None:
            yield from counts.in_bytes.notes(self.soft)
        elif why_no_bytes:
            yield f"There are no bits per byte: {why_no_bytes}"
        if tally.labelled < tally.positions:
            yield (
                f"{tally.positions - tally.labelled:,} of {tally.positions:,} positions have no "
                "hard label and count only in the soft figures."
            )


def _entity_scores(entities: Entities) -> dict[str, float | None]:
    return {
        "entity_f1": known(entities.f1),
        "entity_precision": known(entities.precision),
        "entity_recall": known(entities.recall),
    }
