"""Figures by the textbook: forwards without batches and formulas in numpy, which share no code with
the reports.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from kdcache.cache import Cache
from kdcache.tasks import IGNORE


def logprobs_of(logits: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
    """Log-softmax in float64 by numpy."""
    z = logits.double().numpy() / temperature
    z = z - z.max(-1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(-1, keepdims=True)))


def naive_ece(confidence: np.ndarray, correct: np.ndarray, bins: int) -> float:
    """Expected calibration error, a bin at a time."""
    total = 0.0
    for i in range(bins):
        low, high = i / bins, (i + 1) / bins
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            total += inside.sum() / len(confidence) * gap
    return total


def class_logits(folder: Path, cache: str) -> torch.Tensor:
    """A classifier's logits for the texts of a cache's first shard."""
    texts = Cache.open(cache).read(0).texts
    assert texts is not None
    return text_logits(folder, texts)


@torch.no_grad()
def text_logits(folder: Path, texts: Iterable[str]) -> torch.Tensor:
    """A classifier's logits, one text of at most 64 tokens at a time: no padding, no batches."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = [
        model(**tokenizer(t, truncation=True, max_length=64, return_tensors="pt")).logits
        for t in texts
    ]
    return torch.cat(parts)


@torch.no_grad()
def word_logits(run: Path, texts: list[str]) -> torch.Tensor:
    """Logits of the biLSTM in a run's folder, one text at a time."""
    return text_logits(run, texts)


@lru_cache
@torch.no_grad()
def lm_logits(folder: Path, cache: str, width: int = 300) -> tuple[torch.Tensor, np.ndarray]:
    """A causal LM's logits and labels of every position of a cache, a row at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    opened = Cache.open(cache)
    logits, labels = [], []
    for span in range(opened.spec.spans):
        data = opened.read(span)
        for i in range(len(data)):
            row = data.row(i)
            wanted = row.labels != IGNORE
            out = model(torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0]
            logits.append(out[torch.from_numpy(wanted)][:, :width])
            labels.append(row.labels[wanted])
    return torch.cat(logits), np.concatenate(labels)


def plain(render: Any, result: Any) -> str:
    """What a function prints to a file."""
    out = io.StringIO()
    render(result, Console(file=out, width=40))
    return out.getvalue()
