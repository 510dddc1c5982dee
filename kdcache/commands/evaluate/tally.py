"""What an evaluation adds up, of all rows or of those of one domain, and the figures of the sums.

Average precision and Spearman's correlation need all answers in order, so these are kept: 4 bytes a
class and row for each model, and as many for the hard labels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from kdcache.commands.evaluate.in_bytes import InBytes, by_its_own_tokens
from kdcache.commands.evaluate.rows import EvaluationRows
from kdcache.commands.evaluate.scores import DomainScores
from kdcache.humanize import counted
from kdcache.loss import INDEPENDENT, distillation_loss
from kdcache.loss.metrics import (
    Entities,
    Tally,
    are_entities,
    average_precision,
    f1,
    known,
    macro_average_precision,
    macro_f1,
    micro_f1,
    pearson,
    perplexity,
    ratio,
    spearman,
)
from kdcache.metrics import Bin, ModelScores
from kdcache.student.one_answer import ONE_ANSWERS, OneAnswer, little_learnt
from kdcache.student.saved import LoadedModel
from kdcache.targets import DenseTargets, SparseTargets
from kdcache.tasks import IGNORE, TASKS, Answers, labelled

_Targets: TypeAlias = DenseTargets | SparseTargets | None


class _ModelTally(Tally):
    """The answers of one model, and how far they are from the teacher's."""

    confused = False  # whether predictions are counted by class

    def __init__(
        self, task: str, outputs: int, names: Sequence[str] | None, threshold: float
    ) -> None:
        tags = TASKS[task].words and names is not None and are_entities(names)
        entities = Entities(names or ()) if tags else None
        super().__init__(outputs if self.confused else None, entities=entities)
        self.task, self.outputs = task, outputs
        self.logit = float(np.log(threshold) - np.log1p(-threshold))

    def soft_figures(self, *, kl: bool) -> dict[str, float]:
        """Those against the teacher; `kl` if its entropy was subtracted from `soft`."""
        return {
            "kl" if kl else "soft_cross_entropy": ratio(self.soft, self.soft_positions),
            "agreement": ratio(self.agreed, self.known),
        }


class IdTally(_ModelTally):
    """Of distributions: sums alone."""

    def add(self, logits: Tensor, labels: np.ndarray, targets: _Targets) -> np.ndarray:
        """Add positions.

        Args:
            logits: [n, outputs].
            labels: as `kdcache.stream.Batch` has them.
            targets: the teacher's answers, or None.

        Returns:
            The most probable ids, int [n].
        """
        # Double precision costs nothing for classes, and all of the memory for a large vocabulary.
        z = logits.double() if logits.shape[-1] <= 4096 else logits.float()
        parts = distillation_loss(
            z,
            torch.from_numpy(labels).to(z.device),
            DenseTargets(z, 1.0) if targets is None else targets,
            alpha=1.0 if targets is None else 0.5,
            vocab_size=self.outputs,
            count=1,
        )
        self.hard += float(parts.hard)
        if targets is not None:
            self.soft += float(parts.soft) / targets.temperature**2
            self.soft_positions += len(labels)
        confidence, predictions = z.softmax(-1).max(-1)
        found: np.ndarray = predictions.cpu().numpy()
        self.add_predictions(labels, found, confidence.cpu().numpy())
        return found

    def add_best(self, logits: Tensor, labels: np.ndarray) -> np.ndarray:
        """Add positions of which the most probable id is known and nothing else; as `add`."""
        best: np.ndarray = logits.argmax(-1).cpu().numpy()
        self.add_predictions(labels, best, None)
        return best

    def figures(self) -> dict[str, float]:
        """Those against the hard labels by their names in `ModelScores`; NaN if undefined."""
        return {
            "accuracy": ratio(self.correct, self.labelled),
            "cross_entropy": ratio(self.hard, self.labelled),
            "calibration_error": self.calibration.error,
        }


class ClassTally(IdTally):
    """Of distributions over classes."""

    confused = True

    def figures(self) -> dict[str, float]:
        """Of each class, and of entities, besides."""
        found, entities = {**super().figures(), "f1": f1(self.confusion)}, self.entities
        if entities is None:
            return found
        return found | {
            "entity_f1": entities.f1,
            "entity_precision": entities.precision,
            "entity_recall": entities.recall,
        }


class KeptTally(_ModelTally, ABC):
    """Of answers that are not a distribution, which are kept for figures of their order."""

    def __init__(self, *given: Any) -> None:
        """Start empty; see `make_tally`."""
        super().__init__(*given)
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, logits: Tensor, labels: np.ndarray, targets: _Targets) -> None:
        """Add positions; see `IdTally.add`."""
        z, hard = logits.double(), torch.from_numpy(labels).to(logits.device)
        loss = INDEPENDENT[TASKS[self.task].answers].loss
        parts = loss(z, hard, targets, alpha=0.5, count=1)
        there = labelled(labels, self.task)
        self.hard += float(parts.hard)
        self.positions += len(labels)
        self.labelled += int(there.sum())
        if isinstance(targets, DenseTargets):
            self.soft += float(parts.soft) / targets.temperature**2
            self.soft_positions += len(labels)
            self.known += logits.numel()
            self.agreed += int(((z >= self.logit) == (targets.logits >= self.logit)).sum())
        self._kept.append((labels[there], logits.float().cpu().numpy()[there]))

    def add_best(self, logits: Tensor, labels: np.ndarray) -> None:
        """Of the best alone they have no figure; see `IdTally.add_best`."""

    def merge(self, other: Tally) -> None:
        """Add the sums and answers over other positions."""
        super().merge(other)
        assert isinstance(other, KeptTally), "tallies are of one task"
        self._kept += other._kept

    def figures(self) -> dict[str, float]:
        """See `IdTally.figures`; empty where nothing was added."""
        if not self._kept:
            return {}
        labels, answers = (np.concatenate(parts) for parts in zip(*self._kept, strict=True))
        return self._figures(labels, answers)

    @abstractmethod
    def _figures(self, labels: np.ndarray, answers: np.ndarray) -> dict[str, float]:
        """Of the rows with a label."""


class LabelTally(KeptTally):
    """Of labels each by itself."""

    def _figures(self, labels: np.ndarray, answers: np.ndarray) -> dict[str, float]:
        chosen = answers >= self.logit
        # The loss divides by all classes of a row, the figure by those that are known.
        nats = self.hard * labels.shape[-1]
        return {
            "cross_entropy": ratio(nats, int((labels != IGNORE).sum())),
            "micro_f1": micro_f1(labels, chosen),
            "macro_f1": macro_f1(labels, chosen),
            "micro_average_precision": average_precision(labels, answers),
            "macro_average_precision": macro_average_precision(labels, answers),
        }


class ScoreTally(KeptTally):
    """Of scores."""

    def _figures(self, labels: np.ndarray, answers: np.ndarray) -> dict[str, float]:
        return {
            "mse": ratio(self.hard, self.labelled),
            "pearson": pearson(answers[:, 0], labels),
            "spearman": spearman(answers[:, 0], labels),
        }

    def soft_figures(self, *, kl: bool) -> dict[str, float]:
        """The mean squared difference."""
        return {"teacher_mse": ratio(self.soft, self.soft_positions)}


ModelTally: TypeAlias = IdTally | KeptTally
_TALLIES: Mapping[Answers, type[IdTally] | type[KeptTally]] = {
    "ids": IdTally,
    "classes": ClassTally,
    "labels": LabelTally,
    "score": ScoreTally,
}


def make_tally(
    task: str, outputs: int, names: Sequence[str] | None, threshold: float = 0.5
) -> ModelTally:
    """A tally of no positions.

    Args:
        outputs: ids, classes or scores of an answer.
        names: of the classes; entities are counted where they are the tags of some.
        threshold: probability from which a class is predicted, where there may be several.
    """
    return _TALLIES[TASKS[task].answers](task, outputs, names, threshold)


@dataclass
class Counts:
    """Sums over some rows.

    Attributes:
        students: of each student that reads the rows as they are.
        one: of the labels, for one answer for all.
        in_bytes: over chunks of text, where there are such figures.
        label_nats: minus the sum of the log-probabilities that a language model's cache keeps of
            labels, in nats.
        predicted: labels in it.
        impossible: labels that the teacher gives no probability.
    """

    teacher: ModelTally
    students: list[ModelTally]
    one: OneAnswer
    in_bytes: InBytes | None = None
    rows: int = 0
    positions: int = 0
    label_nats: float = 0.0
    predicted: int = 0
    impossible: int = 0

    def merge(self, parts: Iterable[Counts]) -> Counts:
        """Add those of other rows; returns itself."""
        for part in parts:
            self.teacher.merge(part.teacher)
            self.one.merge(part.one)
            for mine, theirs in zip(self.students, part.students, strict=True):
                mine.merge(theirs)
            if self.in_bytes is not None and part.in_bytes is not None:
                self.in_bytes.merge(part.in_bytes)
            for name in ("rows", "positions", "label_nats", "predicted", "impossible"):
                setattr(self, name, getattr(self, name) + getattr(part, name))
        return self


def tally_of(counts: Counts) -> Tally:
    """Positions, of any model that read them all."""
    if counts.students:
        return counts.students[0]
    return Tally(positions=counts.positions, labelled=counts.positions)


@dataclass(frozen=True)
class Figures:
    """Makes the figures of models.

    Attributes:
        teacher: that ran with the students, or None.
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
        teacher = [self._teacher_scores(counts)] if self.soft else []
        return (*teacher, *self._student_scores(counts))

    def _decides(self, tally: ModelTally) -> bool:
        """Whether the teacher's decisions are known: of a mean of probabilities at another
        temperature only those at 1/2, where the temperature does not matter.
        """
        known = self.teacher is not None or self.rows.logits_known
        return known or tally.logit == 0 or not isinstance(tally, LabelTally)

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

    def _scores(self, model: LoadedModel, tally: ModelTally) -> ModelScores:
        found = tally.soft_figures(kl=self.exact or self.rows.entropies_known) if self.soft else {}
        if not self._decides(tally):
            found["agreement"] = math.nan
        saved = model.saved
        return self._named(saved.name, "student", saved.parameters, tally, tally.figures() | found)

    def _teacher_scores(self, counts: Counts) -> ModelScores:
        live, tally = None if self.teacher is None else self.teacher.saved, counts.teacher
        found = tally.figures()
        if live is None and not self.rows.logits_known:
            # Sparse targets lack the probability of some labels.
            found["cross_entropy"] = ratio(counts.label_nats, counts.predicted)
        if counts.in_bytes is not None and counts.in_bytes.teacher_bits is not None:
            found["bits_per_byte"] = counts.in_bytes.teacher_bits
        name = "teacher (cached)" if live is None else live.name
        parameters = None if live is None else live.parameters
        return self._named(name, "teacher", parameters, tally, found)

    def _named(
        self,
        name: str,
        role: str,
        parameters: int | None,
        tally: ModelTally,
        found: Mapping[str, float],
    ) -> ModelScores:
        figures: dict[str, Any] = {figure: known(value) for figure, value in found.items()}
        if TASKS[self.rows.task].perplexity:
            figures["perplexity"] = perplexity(figures["cross_entropy"])
        bins = tuple(Bin(*values) for values in tally.calibration.filled())
        return ModelScores(name, role, parameters, calibration=bins, **figures)

    def one_answer(self, counts: Counts) -> ModelScores | None:
        """Scores of one answer for all, where there are labels."""
        figures: dict[str, Any] = counts.one.figures()
        if not figures:
            return None
        del figures["hard_loss"]
        if TASKS[self.rows.task].perplexity:
            figures["perplexity"] = perplexity(figures["cross_entropy"])
        name = ONE_ANSWERS[TASKS[self.rows.task].answers]
        return ModelScores(name, "baseline", None, **figures)

    def little_learnt(self, counts: Counts) -> dict[str, str]:
        """What to say of each student that is hardly better than one answer for all."""
        one, task = counts.one.figures(), self.rows.task
        found = {}
        for model, scores in zip(self.students, counts.students, strict=True):
            saved = model.saved
            if wrong := little_learnt(task, scores.figures(), one, "here", saved.steps):
                found[saved.name] = f"{saved.name} is {wrong}"
        return found

    def notes(self, counts: Counts, why_no_bytes: str) -> Iterable[str]:
        """What a reader must know about figures that are missing or not exact.

        Args:
            why_no_bytes: why there are no bits per byte, or nothing.
        """
        tally = tally_of(counts)
        yield from self.little_learnt(counts).values()
        if self.students and not self.exact and self.rows.entropies_known:
            yield (
                "The cache holds samples of the teacher: KL is right on average over their draws, "
                "not at each position. Use --teacher to measure it exactly."
            )
        elif self.students and not self.exact:
            yield (
                "The cache holds samples of the teacher: soft cross-entropy is KL plus the "
                "teacher's entropy, so differences in it are differences in KL. Use --teacher to "
                "measure KL itself."
            )
        elif self.soft and self.teacher is None and not self.rows.dense and self.students:
            yield (
                "The cache holds the teacher's top ids: KL compares these and the sum of all "
                "others, and is at most the full KL. Use --teacher to measure the full KL."
            )
        if self.soft and self.students and tally.known < tally.positions:
            yield (
                f"Agreement is over the {tally.known:,} of {tally.positions:,} positions where "
                "the cached sample determines the teacher's most probable id."
            )
        if self.rows.cut:
            what = counted(self.rows.cut, "sentence" if TASKS[self.rows.task].words else "text")
            at = f"{self.rows.max_length:,} tokens (--max-length)"
            yield f"{what} cut at {at}."
        if counts.impossible and not self.rows.logits_known:
            yield (
                f"The teacher gives {counts.impossible:,} labels no probability: its "
                "cross-entropy leaves them out."
            )
        if self.soft and not self._decides(counts.teacher):
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
