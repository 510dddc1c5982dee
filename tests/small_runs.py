"""What small training runs share: a student, usual options, and what a run logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
USUAL = {"batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none"}


def metrics(run: str | Path) -> list[dict[str, Any]]:
    """What a run logged, without wall times."""
    return without_times(Path(run, "metrics.jsonl").read_text())


def without_times(text: str | bytes) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl`, without wall times."""
    lines = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in x.items() if k not in ("seconds", "eval_runtime")} for x in lines]
