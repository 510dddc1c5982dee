"""Rows of shards to batches of tensors, by offsets and without a Python loop over numbers.

Cost: each token and target is copied once into the batch.
Guarantee: positions of a batch keep the row-major order of its labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from kdcache.cache.shard import ShardData
from kdcache.errors import UsageError
from kdcache.rows.batches import padded
from kdcache.stream.shard_rows import positions_of
from kdcache.targets.label_logprob import decode_logprobs
from kdcache.tasks import IGNORE, TASKS, labelled, positions

Batch: TypeAlias = dict[str, Any]
"""Tensors by name, and under `targets` the soft targets: see `collate`."""

Tokenize: TypeAlias = Callable[[list[Any], "list[str] | None"], Mapping[str, Tensor]]


def collate(
    data: ShardData,
    *,
    pad_id: int,
    temperature: float | None,
    count: float | None = None,
    tokenize: Tokenize | None = None,
) -> Batch:
    """A batch of tensors from some rows.

    Args:
        data: the rows of the batch, in order.
        pad_id: id that fills `input_ids` up on the right.
        temperature: of the soft targets, or None to leave them out (training on hard labels alone).
        count: what the loss is divided by; None for this batch's own count, see below.
        tokenize: text (and second text) to the student's own tensors, such as `input_ids` and
            `attention_mask`; or words to these and `first_tokens`, bool [B, L], True at one token
            of each word. None uses the cached ids.

    Returns:
        `input_ids`, `attention_mask` int64 [B, L], of a source where there is one, beside
        `decoder_input_ids`, which are then what the labels belong to; where documents do not attend
        to each other `position_ids` in place of the mask, 0 where one begins; `token_type_ids`
        int64 [B, L] where there are any; `labels` int64 [B, L] (aligned with the logits: already
        shifted) or [B], of several labels a row [B, C], of scores float32 [B]; `count` float32 [];
        and with a temperature `targets`, `DenseTargets` or `SparseTargets` of the batch's positions
        in row-major order. Where the cache keeps it, `label_logprob` float32 [positions], the
        teacher's log-probability of each label at T = 1 (minus infinity for a label that it cannot
        predict). Where not every position is the first of its word, `first_tokens` bool [positions]
        says which are. `count` is the number of positions the loss is a mean of (without targets:
        of hard labels); infinity gives the batch the weight zero.
    """
    lengths = np.diff(data.offsets)

    def pad(values: np.ndarray, fill: int) -> Tensor:
        return torch.from_numpy(padded(values, lengths, fill))

    per_token = TASKS[data.task].per_token
    labels = data.labels
    if temperature is None and per_token:
        # Without soft targets, a token without a hard label is no position.
        labels = np.where(labelled(labels, data.task), labels, IGNORE)
    if tokenize is not None and data.words is not None and data.first is not None:
        batch: Batch = {name: torch.as_tensor(v) for name, v in tokenize(data.words, None).items()}
        batch["labels"] = _at_words(batch.pop("first_tokens"), data, labels)
    elif tokenize is not None:
        if data.texts is None:
            raise UsageError(
                "the cache holds no texts: this student must use the teacher's tokenizer."
            )
        batch = {
            name: torch.as_tensor(v) for name, v in tokenize(data.texts, data.text_pairs).items()
        }
    elif data.source is not None and data.source_offsets is not None:
        sizes = np.diff(data.source_offsets)
        ones = np.ones(len(data.source), np.int64)
        batch = {
            "input_ids": torch.from_numpy(padded(data.source, sizes, pad_id)),
            "attention_mask": torch.from_numpy(padded(ones, sizes, 0)),
            "decoder_input_ids": pad(data.input_ids, pad_id),
        }
    else:
        batch = {"input_ids": pad(data.input_ids, pad_id)}
        if data.starts is None:
            batch["attention_mask"] = pad(np.ones(len(data.input_ids), np.int64), 0)
        else:
            batch["position_ids"] = position_ids(data.starts, lengths)
        if data.type_ids is not None:
            batch["token_type_ids"] = pad(data.type_ids, 0)
    if "labels" not in batch:
        own = _widest(labels)
        batch["labels"] = pad(own, IGNORE) if per_token else torch.from_numpy(own)
    if data.first is not None and tokenize is None:
        marked = positions(labels, data.task)
        if not data.first[marked].all():  # else each position is the first of a word
            batch["first_tokens"] = torch.from_numpy(data.first[marked])
    if temperature is not None:
        batch["targets"] = data.targets.at(temperature)
    if data.label_logprob is not None:
        batch["label_logprob"] = torch.from_numpy(decode_logprobs(data.label_logprob))
    if count is None:
        count = int(positions_of(data, soft=temperature is not None).sum())
    batch["count"] = torch.tensor(count, dtype=torch.float32)
    return batch


def _at_words(first: Tensor, data: ShardData, labels: np.ndarray) -> Tensor:
    """Labels int64 [B, L] of a student's own tokens: those of the words at their first tokens."""
    assert data.first is not None, "a cache of words marks their first tokens"
    marked = positions(data.labels, data.task)
    if not np.array_equal(marked, data.first):
        raise UsageError(
            "the cache has targets at all tokens of a word, which are the teacher's: this student "
            "must use its tokenizer, or a cache that was built with --label-tokens first."
        )
    words = sum(map(len, data.words or ()))
    if int(first.sum()) != words:
        raise UsageError(
            f"the student's tokenize marks {int(first.sum())} first_tokens for {words} words. It "
            "must mark one for each."
        )
    placed = torch.full(first.shape, IGNORE, dtype=torch.int64)
    placed[first] = torch.from_numpy(labels[marked].astype(np.int64))
    return placed


def _widest(labels: np.ndarray) -> np.ndarray:
    """Labels as torch's losses take them: whole numbers as int64."""
    return labels.astype(np.int64 if labels.dtype.kind == "i" else labels.dtype)


def position_ids(starts: np.ndarray, lengths: np.ndarray) -> Tensor:
    """int64 [B, L]: where in its document each token is; padding counts as a document."""
    begins = padded(starts, lengths, 0).astype(np.bool_)
    rows = np.flatnonzero(lengths < begins.shape[1])
    begins[rows, lengths[rows]] = True
    at = np.arange(begins.shape[1])
    return torch.from_numpy(at - np.maximum.accumulate(np.where(begins, at, 0), 1))
