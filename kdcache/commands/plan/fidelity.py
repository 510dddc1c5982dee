"""How well stored targets represent the teacher's whole distribution.

For one position with probabilities p at T, and t what the cache holds (weights on a few ids,
nothing on the others):

* noise: E ||t - p||^2, the squared error of a target, which for anchored targets depends on the
  student (`near_noise`: of a student near the teacher);
* bias: ||E t - p||^2, the part of it that averages never take away; all of it where nothing is
  drawn (top-k, dense), nothing where the draw is unbiased (samples);
* mass: the teacher's probability on the ids that are named;
* missed: the sum of |E t - p|, the probability about which a student learns nothing however long it
  is trained: what lies outside the ids of a top-k. A square hardly sees it, since a tail is made of
  many small probabilities; a student does. Of scores, which are not probabilities, it is the mean
  |t - score| by the standard deviation of the scores: a year keeps its digits in float32 alone.

What training feels is the gradient of the loss by the student's logits. It is taken with the loss
itself, `distillation_loss` with alpha = 0 and top-k's tail in a bucket, and compared with the one
from the full distribution, position by position (`angle`, `norm_ratio`) and summed over all
positions (`mean_angle`: the gradient of an output bias; noise averages out in it and bias stays).

The student is a stand-in, the same for every codec: half of the teacher's own logits plus Gaussian
noise of deviation 1. That is flatter than the teacher and wrong about every id, as a small student
is: KL(teacher || student) is about 2 nats for SmolLM2-135M, 0.8 at T = 2. A second one is near the
teacher, as one is after pruning or quantisation: all of its logits plus noise of deviation 1/4,
which is a KL of about 0.03. The nearer a student, the smaller is its gradient, and the larger the
part of the targets' noise in it (`near_angle`).

Cost: about 15 passes over [positions, vocabulary] for each codec and temperature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.loss import INDEPENDENT, Anchor, distillation_loss
from kdcache.targets import AnchoredTargets, DenseTargets, SparseTargets, Targets, with_logits
from kdcache.tasks import IGNORE, Answers

FAR, NEAR = (0.5, 1.0), (1.0, 0.25)
"""What a student has of the teacher's logits, and the deviation of the noise in its own."""


@dataclass(frozen=True)
class Fidelity:
    """Targets against the full distribution at one temperature; means over positions.

    Angles and ratios are None where a gradient that they compare is 0: where teacher and student
    are sure of the same id at every position, as at a low temperature.

    Attributes:
        angle: between the gradients by all logits of all positions, in degrees.
        norm_ratio: length of the targets' gradient by that of the full distribution.
        mean_angle: between the gradients summed over positions, in degrees.
        mean_norm_ratio: lengths of these.
        near_noise: as `noise`, for a student near the teacher.
        near_angle: as `angle`, for that student.
    """

    temperature: float
    noise: float
    bias: float
    mass: float
    missed: float
    angle: float | None
    norm_ratio: float | None
    mean_angle: float | None
    mean_norm_ratio: float | None
    near_noise: float
    near_angle: float | None


class FullGradient:
    """The teacher's distribution and the student's gradient towards it, for some positions."""

    def __init__(
        self,
        logits: Tensor,
        temperature: float,
        generator: torch.Generator,
        student: tuple[float, float] = FAR,
        answers: Answers = "ids",
    ) -> None:
        """Make the stand-in student.

        Args:
            generator: of the CPU, where the student's noise comes from.
            student: FAR or NEAR.
        """
        self.answers, self.independent = answers, INDEPENDENT.get(answers)
        self.logits = logits.float().clone()
        self.temperature = temperature
        noise = torch.randn(logits.shape, generator=generator).to(logits.device)
        share, deviation = student
        self.student = share * self.logits + deviation * noise
        self.p = self._answer(self.logits)
        self.gradient = self.towards(DenseTargets(self.logits, temperature))

    def _answer(self, logits: Tensor) -> Tensor:
        """Probabilities, or scores, from logits."""
        z = logits / self.temperature
        return z.softmax(-1) if self.independent is None else self.independent.answer(z)

    def towards(self, targets: Targets, anchor: Anchor | None = None) -> Tensor:
        """Gradient of the summed soft loss by the student's logits, [n, V]."""
        z = self.student.clone().requires_grad_()
        if self.independent is not None:
            none = self.independent.unlabelled(z.detach())
            loss = self.independent.loss(z, none, targets, alpha=0.0, count=1)
        else:
            none = torch.full((len(z),), IGNORE, device=z.device)
            loss = distillation_loss(z, none, targets, alpha=0.0, count=1, anchor=anchor)
        (gradient,) = torch.autograd.grad(loss.total, z)
        return gradient

    def error(self, targets: DenseTargets | SparseTargets, gradient: Tensor) -> Tensor:
        """t - p of each id, [n, V], where `gradient` is the one towards the targets."""
        if isinstance(targets, DenseTargets):
            return self._answer(targets.logits) - self.p
        if isinstance(targets, AnchoredTargets):  # t is in the gradient alone: T (q - t)
            return (self.gradient - gradient) / self.temperature
        return torch.zeros_like(self.p).scatter_add_(1, targets.ids, targets.weights) - self.p


class FidelityMeter:
    """Adds up positions of one codec at one temperature."""

    def __init__(self, *, drawn: bool) -> None:
        """Start empty; `drawn` states whether targets are an unbiased sample."""
        self._drawn = drawn
        self._positions = 0
        self._temperature = math.nan
        self._sums = torch.zeros(10, dtype=torch.float64)
        self._anchors = Anchor(), Anchor()  # theta of each student comes from earlier positions
        self._mean: tuple[Tensor, Tensor] | None = None
        self._scores: tuple[float, float, float] | None = None  # n, mean, summed squares around it

    def add(self, full: FullGradient, near: FullGradient, targets: Targets) -> None:
        """Add positions: the stored targets, on the device of the two students' gradients."""
        targets = with_logits(targets)
        gradient, nearer = (
            student.towards(targets, anchor)
            for student, anchor in zip((full, near), self._anchors, strict=True)
        )
        for anchor in self._anchors:
            anchor.update()
        error, near_error = full.error(targets, gradient), near.error(targets, nearer)
        named = full.p if isinstance(targets, DenseTargets) else _named(full.p, targets)
        if full.independent is not None:  # all of each answer is there
            named = torch.ones(len(full.p))
        if full.answers == "score":
            self._scores = _with_spread(self._scores, full.p.double())
        # Squares of small gradients are below what float32 holds.
        one, other = gradient.double(), full.gradient.double()
        near_one, near_other = nearer.double(), near.gradient.double()
        sums = torch.stack(
            [
                error.double().square().sum(),
                named.double().sum(),
                error.double().abs().sum(),
                (one * other).sum(),
                one.square().sum(),
                other.square().sum(),
                near_error.double().square().sum(),
                (near_one * near_other).sum(),
                near_one.square().sum(),
                near_other.square().sum(),
            ]
        )
        self._sums += sums.cpu()
        self._positions += len(full.p)
        self._temperature = full.temperature
        means = (gradient.sum(0).double(), full.gradient.sum(0).double())
        old = self._mean
        self._mean = means if old is None else (old[0] + means[0], old[1] + means[1])

    def result(self) -> Fidelity:
        """The figures over all positions added."""
        assert self._mean is not None, "positions were added"
        squared, mass, absolute, dot, own, full, near_squared, *near = self._sums.tolist()
        mine, want = self._mean
        if self._scores is not None:
            count, _, squares = self._scores
            spread = math.sqrt(squares / count)
            absolute = absolute / spread if spread else 0.0  # a constant has no digits to keep
        noise = squared / self._positions
        return Fidelity(
            temperature=self._temperature,
            noise=noise,
            bias=0.0 if self._drawn else noise,
            mass=mass / self._positions,
            missed=0.0 if self._drawn else absolute / self._positions,
            angle=_degrees(dot, own, full),
            norm_ratio=_ratio(own, full),
            mean_angle=_degrees(
                float(mine @ want), float(mine.square().sum()), float(want.square().sum())
            ),
            mean_norm_ratio=_ratio(float(mine.square().sum()), float(want.square().sum())),
            near_noise=near_squared / self._positions,
            near_angle=_degrees(*near),
        )


def _with_spread(
    before: tuple[float, float, float] | None, values: Tensor
) -> tuple[float, float, float]:
    """Count, mean, and summed squares around it, with further values (Chan et al. 1983)."""
    n, mean, squares = before or (0.0, 0.0, 0.0)
    more, own = values.numel(), float(values.mean())
    apart, both = own - mean, n + more
    squares += float((values - own).square().sum()) + apart**2 * n * more / both
    return both, mean + apart * more / both, squares


def _named(p: Tensor, targets: SparseTargets) -> Tensor:
    """The teacher's probabilities where a target names an id, 0 elsewhere."""
    weights = torch.zeros_like(p).scatter_add_(1, targets.ids, targets.weights)
    return torch.where(weights > 0, p, 0)


def _degrees(dot: float, one: float, other: float) -> float | None:
    if one <= 0 or other <= 0:
        return None
    return math.degrees(math.acos(max(-1.0, min(1.0, dot / math.sqrt(one) / math.sqrt(other)))))


def _ratio(one: float, other: float) -> float | None:
    return math.sqrt(one) / math.sqrt(other) if other > 0 else None
