"""TRL: `SFTTrainer` on a cache's targets, `DPOTrainer` on reference log-probabilities of one.

Everything else stays TRL's: datasets, templates, `completion_only_loss`, `assistant_only_loss`,
packing, padding-free batches, PEFT. Without a `distillation` it is TRL's own trainer, whose
prepared `train_dataset`, saved to disk, is what `kdcache build` reads.
"""

from __future__ import annotations

import copy
from typing import Any

from kdcache.errors import UsageError, require
from kdcache.integrations.trainer import CachedTrainer, Distillation

require({"trl": "kdcache.integrations.trl"})

import trl  # noqa: E402 else its own error would come first

__all__ = ["DPOTrainer", "Distillation", "SFTTrainer"]


class SFTTrainer(CachedTrainer, trl.SFTTrainer):  # type: ignore[misc]
    """TRL's `SFTTrainer` with the loss of `CachedTrainer`; see there."""


_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")


class DPOTrainer(trl.DPOTrainer):  # type: ignore[misc]
    """TRL's `DPOTrainer` on files of `kdcache export --layout dpo`, without a reference model.

    TRL 1 makes ids and reference log-probabilities of every dataset anew; this one takes those of
    the files. `max_length` may not cut pairs, whose sums are of all of their ids.
    """

    def __init__(self, model: Any, ref_model: None = None, args: Any = None, **kwargs: Any) -> None:
        """As TRL's, with no `ref_model`.

        Raises:
            UsageError: a reference model, `ld_alpha`, which needs more than sums, another dataset,
                or pairs longer than `max_length`.
        """
        args = args or trl.DPOConfig("DPO")
        if ref_model is not None or args.ld_alpha is not None or args.sync_ref_model:
            raise UsageError(
                "the files hold sums of a reference's log-probabilities: leave ref_model, ld_alpha "
                "and sync_ref_model out."
            )
        args = copy.copy(args)
        args.precompute_ref_log_probs = True  # made already: TRL then loads no reference
        super().__init__(model, args=args, **kwargs)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
        missing = [column for column in _COLUMNS if column not in dataset.column_names]
        if missing:
            raise UsageError(
                f"the {name} dataset has no column {', '.join(missing)}. Make it with kdcache "
                "export --layout dpo."
            )
        most = args.max_length
        for row in dataset.select_columns(_COLUMNS[:3]) if most is not None else ():
            prompt, *answers = (len(row[column]) for column in _COLUMNS[:3])
            if prompt + max(answers) > most:
                raise UsageError(
                    f"a pair of the {name} dataset has {prompt + max(answers)} ids, and max_length "
                    f"is {most}. Raise it, or build the caches with --max-length {most}."
                )
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return dataset
