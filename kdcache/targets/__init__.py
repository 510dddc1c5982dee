"""Soft targets: the teacher's distribution at each position, for a file and for a student's loss.

A `Codec` turns logits into stored columns and columns into targets at a temperature. The kinds:

===============  ==========================================  ===================================
codec            at each declared temperature                good for
===============  ==========================================  ===================================
``dense``        every logit (any temperature)               classifiers, small vocabularies
``hidden:TYPE``  every logit, rebuilt (any temperature)      any loss on a language model
``topk:K``       K probabilities and the mass of the tail    inspection, reverse divergences
``sample:N``     unbiased sparse weights                     language models
===============  ==========================================  ===================================

`anchored:N` is `sample:N` with what lets a student that is near its teacher take the noise off.
`Codec.encode` runs on the teacher's device (fixed shapes, no synchronisation with the host),
`Codec.pack` on a CPU thread (ragged, quantised), `Codec.at` in the student's data loader.
"""

from __future__ import annotations

from kdcache.targets.base import Codec, Column
from kdcache.targets.chunks import ChunkTargets, Groups
from kdcache.targets.decoded import (
    AnchoredTargets,
    DenseTargets,
    HiddenTargets,
    LabelTargets,
    SparseTargets,
    Targets,
    with_logits,
)
from kdcache.targets.dense import Dense
from kdcache.targets.hidden import Hidden
from kdcache.targets.label_logprob import Stream, position_uniform
from kdcache.targets.output_layer import OutputLayer
from kdcache.targets.sample import Anchored, Sample
from kdcache.targets.soft import SoftTargets, TargetWriter
from kdcache.targets.topk import TopK

__all__ = [
    "Anchored",
    "AnchoredTargets",
    "ChunkTargets",
    "Codec",
    "Column",
    "Dense",
    "DenseTargets",
    "Groups",
    "Hidden",
    "HiddenTargets",
    "LabelTargets",
    "OutputLayer",
    "Sample",
    "SoftTargets",
    "SparseTargets",
    "Stream",
    "TargetWriter",
    "Targets",
    "TopK",
    "position_uniform",
    "with_logits",
]
