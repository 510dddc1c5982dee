"""ms-swift: `swift sft` on a cache's targets, by a file for its `--external_plugins`.

    from kdcache.integrations.swift import use
    use(cache="caches/rows", alpha=0.1)

ms-swift encodes rows while it trains and keeps no ids, so this module is also a program: it runs
swift's own loader and template over a data set, with the options of `swift export`, and saves what
`kdcache build` reads.

    python -m kdcache.integrations.swift --model … --dataset … --output_dir prepared
"""

from __future__ import annotations

import sys
from typing import Any

from kdcache.errors import UsageError, require
from kdcache.integrations.trainer import CachedTrainer, Distillation

require({"swift": "kdcache.integrations.swift"})

from swift.dataset import EncodePreprocessor  # noqa: E402 else its own error would come first
from swift.pipelines.export.cached_dataset import ExportCachedDataset  # noqa: E402
from swift.trainers import Seq2SeqTrainer, TrainerFactory  # noqa: E402

_OWN = ("compute_loss_func", "logits_to_keep", "text_position_ids", "channel")


class SwiftTrainer(CachedTrainer, Seq2SeqTrainer):  # type: ignore[misc]
    """ms-swift's trainer of language models with the loss of `CachedTrainer`; see there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make the trainer, as ms-swift does.

        Raises:
            UsageError: the model reads more than ids, or rows are divided over workers.
        """
        super().__init__(*args, **kwargs)
        if self.model_meta.is_multimodal:
            raise UsageError(
                "targets are found by token ids, and this model reads more than these."
            )
        if self.template.sequence_parallel_size > 1:
            raise UsageError(
                "targets are found by whole rows, and --sequence_parallel_size divides them over "
                "workers. Use data parallelism."
            )

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch; what is for ms-swift's own loss is left out where it has targets."""
        if "kdcache" in inputs:
            if "loss_scale" in inputs:
                raise UsageError("a --loss_scale with weights other than 0 and 1 is not supported.")
            inputs = {name: value for name, value in inputs.items() if name not in _OWN}
        return super().compute_loss(model, inputs, *args, **kwargs)


def use(**settings: Any) -> None:
    """Let `swift sft` train on caches.

    Args:
        settings: those of `Distillation`, by name.

    Raises:
        UsageError: settings that can't be.
    """
    SwiftTrainer.distillation = Distillation.of(settings, "use() of kdcache.integrations.swift")
    TrainerFactory.TRAINER_MAPPING["causal_lm"] = f"{__name__}.{SwiftTrainer.__name__}"


class _Prepare(ExportCachedDataset):  # type: ignore[misc]
    """What `swift export --to_cached_dataset` saves, encoded."""

    def _post_process_datasets(self, datasets: list[Any]) -> list[Any]:
        return [rows and self._encoded(rows) for rows in datasets]

    def _encoded(self, rows: Any) -> Any:
        """The rows with the ids and labels that the trainer makes of them."""
        encoded = EncodePreprocessor(self.template)(rows, num_proc=self.args.dataset_num_proc)
        return encoded.select_columns(["input_ids", "labels", "lengths"])


if __name__ == "__main__":
    _Prepare([*sys.argv[1:], "--to_cached_dataset", "true"]).main()
