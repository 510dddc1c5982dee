"""Losses of answers that are not a distribution: labels each by itself, and scores.

With the student's logits z, the teacher's t, hard labels y and a temperature T:

* labels (any number of classes a row): the mean over classes of the binary cross-entropy of
  sigmoid(z) with y, and T^2 times the mean of a divergence between sigmoid(t / T) and
  sigmoid(z / T), each a distribution over two outcomes. KL is zero where they are equal, and T^2
  undoes the 1/T^2 by which a temperature shrinks the gradient, as in Hinton et al. 2015. A class
  that is not known of a row adds nothing to the hard loss.
* score: the squared error, or Huber's loss (Huber 1964), with y and with t alike. A score has no
  temperature.

Cost: [rows, classes] float32, a few times. These losses are the readable form and the fast one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.loss.reference import (
    LossParts,
    check_loss,
    coarse_divergence,
    loss_parts,
    student_width,
)
from kdcache.targets import DenseTargets
from kdcache.tasks import IGNORE, Answers


def label_loss(
    logits: Tensor,
    labels: Tensor,
    targets: DenseTargets | None,
    *,
    alpha: float | Tensor,
    divergence: str = "forward-kl",
    huber_delta: float = 1.0,
    count: float | Tensor | None = None,
) -> LossParts:
    """The loss of several labels a row.

    Args:
        logits: [n, C] of any float dtype; the loss works in float32, or in float64 if they are
            float64.
        labels: [n, C], 1 or 0, -100 where it is not known.
        targets: n positions, at the temperature T of the soft part; None for the hard part alone.
        alpha: weight of the hard loss, 0 to 1; of no effect without targets.
        divergence: "forward-kl", "reverse-kl", "jsd" of each class, or "mse" of the logits.
        huber_delta: of no effect here.
        count: divisor of the sums. Default: n.

    Raises:
        UsageError: a divergence that is not defined here, or logits of another width.
    """
    z = _checked(logits, targets, divergence, "labels")
    known = labels != IGNORE
    truth = labels.to(z).masked_fill(~known, 0)
    each = F.binary_cross_entropy_with_logits(z, truth, reduction="none") * known
    hard = each.mean(-1)
    if targets is None:
        return loss_parts(hard, torch.zeros_like(hard), 1.0, count, None)
    t, temperature = targets.logits.to(z), targets.temperature
    if divergence == "mse":
        soft = (z - t).square().mean(-1)
    else:
        teacher, student = (_two_outcomes(x / temperature) for x in (t, z))
        soft = temperature**2 * coarse_divergence(teacher, student, divergence).mean(-1)
    return loss_parts(hard, soft, alpha, count, None)


def score_loss(
    logits: Tensor,
    labels: Tensor,
    targets: DenseTargets | None,
    *,
    alpha: float | Tensor,
    divergence: str = "mse",
    huber_delta: float = 1.0,
    count: float | Tensor | None = None,
) -> LossParts:
    """The loss of one score a row.

    Args:
        logits: [n, 1]; arguments that are not here are as `label_loss` has them.
        labels: float [n], NaN where there is none.
        targets: n positions of width 1.
        divergence: "mse" e^2, or "huber": e^2 / 2 up to |e| = delta, beyond that
            delta (|e| - delta / 2).
        huber_delta: delta, in units of the score.

    Raises:
        UsageError: a divergence that is not defined here, a temperature, or other logits.
    """
    z = _checked(logits, targets, divergence, "score")[:, 0]

    def error(wanted: Tensor) -> Tensor:
        if divergence == "huber":
            return F.huber_loss(z, wanted, reduction="none", delta=huber_delta)
        return (z - wanted).square()

    known = ~labels.isnan()
    # Not times zero: the gradient of NaN is NaN.
    hard = torch.where(known, error(torch.where(known, labels.to(z), z.detach())), 0.0)
    if targets is None:
        return loss_parts(hard, torch.zeros_like(hard), 1.0, count, None)
    return loss_parts(hard, error(targets.logits.to(z)[:, 0]), alpha, count, None)


def _checked(
    logits: Tensor, targets: DenseTargets | None, divergence: str, answers: Answers
) -> Tensor:
    """The logits in the dtype of the loss, where it is defined."""
    if targets is not None:
        check_loss(targets, divergence=divergence, tail="bucket", answers=answers)
        width = student_width(logits.shape[-1], targets, None)
        if width != logits.shape[-1]:
            raise UsageError(
                f"the student has {logits.shape[-1]} outputs, the targets have {width}. "
                "Both must be of the same classes or scores."
            )
    return logits if logits.dtype == torch.float64 else logits.float()


def _two_outcomes(z: Tensor) -> Tensor:
    """Log-probabilities of a sigmoid, [..., 2]: that a label is there, and that it is not."""
    return torch.stack([F.logsigmoid(z), F.logsigmoid(-z)], -1)


@dataclass(frozen=True)
class Independent:
    """How answers that are not a distribution are learnt and read.

    Attributes:
        loss: `label_loss` or `score_loss`, which take the same arguments.
        answer: from logits over the temperature, in their shape: probabilities, or scores.
        unlabelled: from logits [n, C], the labels of rows without one.
    """

    loss: Callable[..., LossParts]
    answer: Callable[[Tensor], Tensor]
    unlabelled: Callable[[Tensor], Tensor]


INDEPENDENT: Final[Mapping[Answers, Independent]] = {
    "labels": Independent(label_loss, torch.sigmoid, lambda z: torch.full_like(z, IGNORE)),
    "score": Independent(score_loss, lambda z: z, lambda z: torch.full_like(z[:, 0], math.nan)),
}
"""By what a task's answers are over; distributions, over ids or classes, are not among them."""
