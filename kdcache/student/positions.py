"""The positions of a batch: which of them a language model learns from, and how much.

A rule sees the positions of the labels that one forward pass is given, and three figures of each:

* teacher-entropy: that of the teacher's distribution at T = 1, as the cache keeps it;
* student-entropy: that of the student's own at T = 1, as it is before this step;
* surprise: minus the teacher's log-probability of the label, infinite for one that it cannot give.

`Share` takes the n positions with the largest figure, the share of them rounded to a whole number
and at least one; of equal figures the earlier position. Any function from `PositionFigures` to
weights, of which those of 0 are left out, is a rule as well. States are gathered before the output
layer, so nothing is computed of the positions that were left out. What remains is a mean over the
weights, times the share of positions that the batch is of its step: each batch counts as much as
without a rule. Batches are those of a worker and a slice of accumulation, so the choice depends on
how a step is divided; the same command makes the same one.

Cost: a sort of n numbers, and for the student's entropy one product with the output layer without
gradient (`kdcache.loss.passes`), of the three that the loss of all positions takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from kdcache.errors import UsageError
from kdcache.student.padding import pick
from kdcache.tasks import TASKS, PositionFigure, check_position_share, share_of
from kdcache.teacher.projection import Projection


class PositionFigures:
    """What is known of the n positions of a batch. All are float [n], in nats, without gradient."""

    def __init__(
        self,
        number: int,
        teacher_entropy: Tensor | None,
        label_logprob: Tensor | None,
        student_entropy: Callable[[], Tensor],
    ) -> None:
        """See the properties; `student_entropy` is called where that is asked for."""
        self.number = number
        self._entropy, self._logprob = teacher_entropy, label_logprob
        self._student_entropy = student_entropy

    @property
    def teacher_entropy(self) -> Tensor:
        """Of the teacher's distribution at T = 1.

        Raises:
            UsageError: the batch has none.
        """
        return self._known(self._entropy, "teacher_entropy")

    @property
    def surprise(self) -> Tensor:
        """Minus the teacher's log-probability of the label at T = 1; infinite for none.

        Raises:
            UsageError: the batch has none.
        """
        return -self._known(self._logprob, "label_logprob")

    @cached_property
    def student_entropy(self) -> Tensor:
        """Of the student's distribution at T = 1."""
        return self._student_entropy()

    def _known(self, values: Tensor | None, name: str) -> Tensor:
        if values is None or len(values) != self.number:
            raise UsageError(
                f"the rule of positions reads {name}, and the batch has "
                f"{'none' if values is None else f'{len(values)} for {self.number} positions'}. "
                "Use caches that keep it, or choose by student-entropy."
            )
        return values


@dataclass(frozen=True)
class Share:
    """The positions with the largest figure.

    Attributes:
        figure: by which they are chosen.
        share: of the positions of a batch, above 0, at most 1.
    """

    figure: PositionFigure
    share: float

    def __post_init__(self) -> None:
        check_position_share(self.figure, self.share, f"positions are {self}")

    def __str__(self) -> str:
        return f"{self.figure}:{self.share:g}"

    def indices(self, figures: PositionFigures) -> Tensor:
        """int64 [k], rising: which positions those are."""
        values: Tensor = getattr(figures, self.figure.replace("-", "_"))
        order = values.sort(descending=True, stable=True).indices
        return order[: share_of(figures.number, self.share)].sort().values


PositionRule: TypeAlias = Share | Callable[[PositionFigures], Tensor]
"""A share, or a function to weights [n], 0 or more; positions of weight 0 are left out."""


class Chosen(NamedTuple):
    """Some positions of a batch.

    Attributes:
        at: int64 [k], which of its n positions.
        weights: [k], or None for weights of 1.
        part: sum of the weights by n: the share of the count that these positions stand for.
    """

    at: Tensor
    weights: Tensor | None
    part: float | Tensor

    def weighed(self, values: Tensor) -> Tensor:
        """Values [n] of all positions, at these ones and times their weights: [k]."""
        some = values[self.at]
        return some if self.weights is None else some * self.weights


def check_rule(rule: PositionRule, task: str, divergence: str) -> None:
    """Refuse a rule where it has no meaning.

    Raises:
        UsageError: the task is of no language model, or labels that were drawn would be chosen by
            what they are.
    """
    if not TASKS[task].over_ids:
        raise UsageError(
            f"positions are chosen among the tokens of a language model, and this is {task}. "
            "Leave --positions out."
        )
    if divergence == "policy-gradient" and isinstance(rule, Share) and rule.figure == "surprise":
        raise UsageError(
            "surprise chooses by the label, and a policy gradient over labels that were chosen by "
            "what was drawn is biased. Use --positions teacher-entropy or student-entropy."
        )


def choose(
    rule: PositionRule,
    n: int,
    teacher_entropy: Tensor | None,
    label_logprob: Tensor | None,
    student_entropy: Callable[[], Tensor],
) -> Chosen:
    """The positions that a rule takes of n; for what it may read see `PositionFigures`.

    Raises:
        UsageError: the batch lacks what it reads, or a function gives no weights of these
            positions.
    """
    figures = PositionFigures(n, teacher_entropy, label_logprob, student_entropy)
    if isinstance(rule, Share):
        at = rule.indices(figures)
        return Chosen(at, None, len(at) / n if n else 1.0)
    weights = rule(figures).detach()
    if weights.shape != (n,) or not bool((weights >= 0).all()):
        raise UsageError(
            f"the rule of positions gives {weights.dtype} {list(weights.shape)}, expected a weight "
            f"of 0 or more for each of {n} positions."
        )
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    at, total = weights.nonzero()[:, 0], weights.sum()
    return Chosen(at, weights[at], torch.where(total > 0, total / max(n, 1), 1.0))


def student_entropies(
    values: Tensor,
    at: Tensor,
    width: int | None,
    projection: Projection | None,
    layer: nn.Linear | None,
) -> Tensor:
    """The student's entropies at positions of its states, or of its logits without a layer."""
    from kdcache.loss.passes import linear_entropies, logit_entropies

    own = pick(values.detach(), at)
    if projection is None or layer is None:
        return logit_entropies(own[:, :width])
    made_by = layer.weight[:width], projection.bias(layer)
    return linear_entropies(own, *made_by, cap=projection.cap)
