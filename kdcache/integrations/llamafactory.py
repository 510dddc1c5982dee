"""LLaMA-Factory: a launcher that trains on a cache's targets.

    python -m kdcache.integrations.llamafactory config.yaml

The configuration is LLaMA-Factory's, with one key more, whose settings are those of `Distillation`:

    kdcache: {cache: caches/rows, alpha: 0.1}

LLaMA-Factory names its trainer in its stage `sft` and takes no other, so the launcher puts a
subclass in its place and starts the program; it goes under torchrun as `-m` too. `kdcache build`
reads what `tokenized_path` keeps.
"""

from __future__ import annotations

from typing import Any

from kdcache.errors import UsageError, require
from kdcache.integrations.trainer import CachedTrainer, Distillation

require({"llamafactory": "kdcache.integrations.llamafactory"})

from llamafactory.hparams import read_args  # noqa: E402 else its own error would come first
from llamafactory.train.sft import workflow  # noqa: E402
from llamafactory.train.tuner import run_exp  # noqa: E402

_LOSSES = ("use_dft_loss", "use_eaft_loss", "use_asft_loss")


class LlamaFactoryTrainer(CachedTrainer, workflow.CustomSeq2SeqTrainer):  # type: ignore[misc]
    """LLaMA-Factory's trainer of the stage `sft` with the loss of `CachedTrainer`; see there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make the trainer, as LLaMA-Factory does.

        Raises:
            UsageError: another loss is asked for, or the model reads more than ids.
        """
        for name in _LOSSES:
            if getattr(kwargs["finetuning_args"], name, False):
                raise UsageError(f"{name} is another loss than that of kdcache. Leave one out.")
        if kwargs.get("processor") is not None:
            raise UsageError(
                "targets are found by token ids, and this model reads more than these."
            )
        super().__init__(*args, **kwargs)


def main() -> None:
    """Train as the configuration on the command line states.

    Raises:
        UsageError: settings that can't be, or another stage than `sft`.
    """
    config = read_args()
    if not isinstance(config, dict) or not config.get("kdcache"):
        raise UsageError("give a configuration (.yaml) with the key kdcache, the cache's settings.")
    settings = config.pop("kdcache")
    if config.get("stage", "sft") != "sft":
        raise UsageError(f"stage is {config['stage']}; only sft trains on a cache.")
    LlamaFactoryTrainer.distillation = Distillation.of(settings, "kdcache of the configuration")
    workflow.CustomSeq2SeqTrainer = LlamaFactoryTrainer
    run_exp(config)


if __name__ == "__main__":
    main()
