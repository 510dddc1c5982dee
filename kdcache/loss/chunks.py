"""The readable loss of a student with another tokenizer: plain autograd over whole logits.

    loss = alpha * CE + (1 - alpha) * (likelihood + groups)

summed over the student's positions and divided by one count, whatever part a term has: CE with the
student's own labels, and

* likelihood: for each chunk with the teacher's likelihood p and the student's q, ``tau *
  KL(Bernoulli(p ** (1 / tau)) || Bernoulli(q ** (1 / tau)))``. This is approximate likelihood
  matching (Minixhofer, Vulić and Ponti 2025, arXiv 2503.20083: a binarised f-divergence, here with
  the f of KL, of likelihoods to the power of 1 / tau), times tau: the gradient shrinks as 1 / tau,
  and with the factor its size is that of CE at any tau, so `alpha` means the same. For large tau it
  tends to ``a * log(a / b) + b - a`` of the surprisals a = -log p and b = -log q.
* groups: at positions with a distribution over groups of ids, the forward KL of
  `kdcache.loss.reference` between groups; all groups without an entry are one more outcome, the
  tail.

With one tokenizer on both sides each chunk is one token and each group one id: the first is the
binarised KL of the labels, the second the usual loss on sparse targets.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.loss.reference import LossParts, scalar_count
from kdcache.targets import SparseTargets
from kdcache.targets.chunks import ChunkTargets
from kdcache.tasks import IGNORE

# Log-likelihoods this near to 0 count as this: what is left of 1 - p must not vanish altogether.
NEAREST = 1e-30


def chunk_loss(
    logits: Tensor,
    labels: Tensor,
    targets: ChunkTargets,
    *,
    alpha: float | Tensor,
    vocab_size: int | None = None,
    count: float | Tensor | None = None,
) -> LossParts:
    """The readable reference: hard and soft loss of a student with a tokenizer of its own.

    Args:
        logits: [P, V'] of the student's positions; the loss works in float32, or in float64 if they
            are float64.
        labels: int [P], the student's own next ids.
        targets: chunks of the P positions.
        alpha: weight of the hard loss, 0 to 1.
        vocab_size: V, the student's ids; columns from V on take no part. Default: all.
        count: divisor of all sums. Default: P.

    Returns:
        LossParts, connected to `logits`; zeros for P = 0.
    """
    z = logits[:, :vocab_size]
    z = z if z.dtype == torch.float64 else z.float()
    logprobs = F.log_softmax(z, -1)
    valid = labels != IGNORE
    own = logprobs.gather(1, labels.long().masked_fill(~valid, 0)[:, None])[:, 0]
    hard = -(own * valid).sum()
    chunks = len(targets.begin)
    sums = own.new_zeros(chunks + 1).index_add(0, targets.chunk_of(own.device), own)[:chunks]
    soft = binary_divergence(targets.likelihood.to(own), sums, targets.tau).sum()
    if targets.soft is not None and targets.groups is not None and targets.places is not None:
        places = torch.from_numpy(targets.places).to(own.device)
        group = targets.groups.student_on(own.device)
        soft = soft + _groups(logprobs[places], group, targets.groups.count, targets.soft).sum()
    scale = 1 / scalar_count(own, count, None)
    hard, soft = hard * scale, soft * scale
    return LossParts(alpha * hard + (1 - alpha) * soft, hard.detach(), soft.detach())


def binary_divergence(teacher: Tensor, student: Tensor, tau: float) -> Tensor:
    """``tau * KL`` between "this text" and "any other", both probabilities to the power 1 / tau.

    Args:
        teacher: log-likelihoods, at most 0.
        student: likewise.
        tau: above 0.
    """
    p, q = teacher / tau, (student / tau).clamp_max(-NEAREST)
    certain = p > -NEAREST
    # Nothing is left of 1 - p there, not even a NaN for the gradient.
    other = torch.where(certain, -1, p)
    rest = -other.expm1() * (log1mexp(other) - log1mexp(q))
    return tau * (p.exp() * (p - q) + torch.where(certain, 0, rest))


def compared(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over chunks: of the KL between "this text" and "any other", and of the chunks on whose
    more probable outcome both agree.

    Args:
        teacher: log-likelihoods, at most 0, finite.
        student: likewise; may be minus infinity.
    """
    half = -math.log(2)
    agreed = (teacher > half) == (student > half)
    return binary_divergence(teacher, student, 1.0).sum(), agreed.sum()


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` of x below 0, exact near both ends (Mächler 2012, "Accurately computing
    log(1 - exp(-|a|))").
    """
    near = x > -math.log(2)
    # Each branch gets numbers at which its own derivative is finite.
    low, high = torch.where(near, -1, x), torch.where(near, x, -1)
    return torch.where(near, (-high.expm1()).log(), (-low.exp()).log1p())


def _groups(logprobs: Tensor, group: Tensor, count: int, targets: SparseTargets) -> Tensor:
    """Forward KL over groups of each position; cross-entropy of a sample."""
    shape = (len(logprobs), count)
    weights = logprobs.new_zeros(shape).scatter_add(1, targets.ids, targets.weights.to(logprobs))
    mass = logprobs.new_zeros(shape).scatter_add(1, group.expand_as(logprobs), logprobs.exp())
    listed = weights > 0
    log_mass = torch.where(listed, mass, 1).log()
    loss = -(weights * log_mass).sum(-1)
    if not targets.exact:
        return loss
    outside = (mass * ~listed).sum(-1)
    has_tail = outside > 0
    rest = torch.where(has_tail, targets.tail.to(logprobs), 0)
    loss = loss + torch.xlogy(weights, weights).sum(-1) + torch.xlogy(rest, rest)
    return loss - rest * torch.where(has_tail, outside, 1).log()
