"""The distillation loss: a readable reference, and a fused linear form for large vocabularies.

For a position with student logits ``z``, hard label ``y`` and the teacher's distribution ``q`` at
temperature ``T``:

    loss = alpha * CE(y, softmax(z)) + (1 - alpha) * T^2 * D(q, softmax(z / T))

summed over positions and divided by `count` (by default their number). ``T^2`` undoes the ``1 /
T^2`` by which a temperature shrinks the soft gradient, so that `alpha` means the same at any T
(Hinton, Vinyals and Dean 2015, section 2.1). A position whose label is -100 trains on the soft part
alone.

=============================  ===================  ===============  =======================
function                       divergences          logits in memory  matrix products
=============================  ===================  ===============  =======================
`distillation_loss`            all                  all, several x   (takes logits)
`sliced_linear_distillation`   all                  one slice        4
`fused_linear_distillation`    forward-kl           one slice        3, as cross-entropy has
`chunk_loss`                   of chunks            all, several x   (takes logits)
=============================  ===================  ===============  =======================

Where the output layer is cut over the ranks of a group (tensor parallelism), the first three take
the slice of each rank; see `kdcache.loss.vocabulary`.

`chunk_loss` is for students with a tokenizer of their own; `fused_linear_distillation` takes their
targets, too.

Answers that are not a distribution have losses of their own, see `kdcache.loss.independent`:
`label_loss` of labels each by itself, and `score_loss`. `INDEPENDENT` has both by what a task's
answers are over.
"""

from __future__ import annotations

from kdcache.loss.anchor import Anchor
from kdcache.loss.chunks import chunk_loss
from kdcache.loss.fused import fused_linear_distillation
from kdcache.loss.independent import INDEPENDENT, label_loss, score_loss
from kdcache.loss.reference import (
    DIVERGENCES,
    TAILS,
    LossParts,
    check_loss,
    check_names,
    distillation_loss,
    label_logprobs,
    linear_logprobs,
    sliced_linear_distillation,
)
from kdcache.loss.vocabulary import VocabSlice

__all__ = [
    "DIVERGENCES",
    "INDEPENDENT",
    "TAILS",
    "Anchor",
    "LossParts",
    "VocabSlice",
    "check_loss",
    "check_names",
    "chunk_loss",
    "distillation_loss",
    "fused_linear_distillation",
    "label_logprobs",
    "label_loss",
    "linear_logprobs",
    "score_loss",
    "sliced_linear_distillation",
]
