"""Probability on the columns of a padded output layer that are not ids.

Cost: one read of the logits on CUDA, by the blocks that sampling uses; plain operations would move
30 bytes a logit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.targets.device.blocks import read_blocks
from kdcache.targets.device.run import run_encoding


def outside_mass(logits: Tensor, width: int) -> Tensor:
    """Probability of the columns from `width` on: float32 [n] for logits [n, V]."""
    run = _outside_by_blocks if logits.is_cuda else _outside
    return run_encoding(run, (logits,), width)["mass"]


def _outside(logits: Tensor, width: int) -> dict[str, Tensor]:
    z = logits.float()
    return {"mass": (torch.logsumexp(z[:, width:], -1) - torch.logsumexp(z, -1)).exp()}


def _outside_by_blocks(logits: Tensor, width: int) -> dict[str, Tensor]:
    blocks = read_blocks(logits, (1.0,))
    outside = (logits[:, width:].float() - blocks.peak).exp().sum(-1)
    return {"mass": outside / blocks.normalizer[:, 0]}
