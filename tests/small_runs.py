"""What small training runs share: students, usual options, an end in the middle, and what a run
logged and saved.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from kdcache.commands.run_folder import TrainProgress

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.0,
}
SMALL = {"embedding_size": 8, "hidden_size": 8, "dense_size": 8}  # of a biLSTM
USUAL = {"batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none"}


def metrics(run: str | Path) -> list[dict[str, Any]]:
    """What a run logged, without wall times."""
    return without_times(Path(run, "metrics.jsonl").read_text())


def without_times(text: str | bytes) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl`, without wall times."""
    lines = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in x.items() if k not in ("seconds", "eval_runtime")} for x in lines]


def losses(run: str | Path) -> list[float]:
    """What a run logged of its training."""
    return [line["loss"] for line in metrics(run) if "loss" in line]


def weights(run: str | Path) -> dict[str, torch.Tensor]:
    """What a run saved."""
    (path,) = Path(run).glob("*model.safetensors")
    return load_file(path)


def same(run: str | Path, other: str | Path) -> bool:
    """Whether two runs logged the same and ended with the same weights, to the bit."""
    mine, theirs = weights(run), weights(other)
    equal = mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in theirs)
    return equal and metrics(run) == metrics(other)


class StopError(Exception):
    """An interruption."""


def stop_at(step: int) -> Callable[[TrainProgress], None]:
    """What ends a training at a step."""

    def on_progress(now: TrainProgress) -> None:
        if now.step >= step:
            raise StopError

    return on_progress
