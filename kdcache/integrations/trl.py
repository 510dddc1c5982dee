"""TRL: `SFTTrainer` on a cache's targets.

Everything else stays TRL's: datasets, templates, `completion_only_loss`, `assistant_only_loss`,
packing, padding-free batches, PEFT. Without a `distillation` it is TRL's own trainer, whose
prepared `train_dataset`, saved to disk, is what `kdcache build` reads.
"""

from __future__ import annotations

from kdcache.errors import require
from kdcache.integrations.trainer import CachedTrainer, Distillation

require({"trl": "kdcache.integrations.trl"})

import trl  # noqa: E402 else its own error would come first

__all__ = ["Distillation", "SFTTrainer"]


class SFTTrainer(CachedTrainer, trl.SFTTrainer):  # type: ignore[misc]
    """TRL's `SFTTrainer` with the loss of `CachedTrainer`; see there."""
