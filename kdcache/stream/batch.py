"""Rows of shards to batches of tensors, by offsets and without a Python loop over numbers.

Cost: each token and target is copied once into the batch.
Guarantee: positions of a batch keep the row-major order of its labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from kdcache.cache.shard import ShardData
from kdcache.errors import UsageError
from kdcache.rows.batches import padded
from kdcache.stream.shard_rows import (
    AlignedRows,
    AlignedShard,
    TextShard,
    positions_of,
    starts_of,
    types_of,
)
from kdcache.targets import SoftTargets
from kdcache.targets.label_logprob import decode_logprobs
from kdcache.tasks import IGNORE, TASKS, labelled, positions

Batch: TypeAlias = dict[str, Any]
"""Tensors by name, and under `targets` the soft targets: see `collate`."""

Tokenize: TypeAlias = Callable[[list[Any], "list[str] | None"], Mapping[str, Tensor]]


def join(parts: Sequence[ShardData]) -> ShardData:
    """One shard's worth of columns from several."""
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    typed = any(part.type_ids is not None for part in parts)
    divided = any(part.starts is not None for part in parts)
    kept = [part.label_logprob for part in parts if part.label_logprob is not None]
    firsts = [part.first for part in parts if part.first is not None]
    sources = [part.source for part in parts if part.source is not None]
    of_sources = [np.diff(p.source_offsets) for p in parts if p.source_offsets is not None]
    data = ShardData(
        task=parts[0].task,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        input_ids=np.concatenate([p.input_ids for p in parts]),
        labels=np.concatenate([p.labels for p in parts]),
        targets=SoftTargets.concat([p.targets for p in parts]),
        type_ids=np.concatenate([types_of(p) for p in parts]) if typed else None,
        texts=_join_texts([p.texts for p in parts], [len(p) for p in parts]),
        text_pairs=_join_texts([p.text_pairs for p in parts], [len(p) for p in parts]),
        label_logprob=np.concatenate(kept) if len(kept) == len(parts) else None,
        starts=np.concatenate([starts_of(p) for p in parts]) if divided else None,
        words=None if parts[0].words is None else [row for p in parts for row in p.words or ()],
        first=np.concatenate(firsts) if firsts else None,
        source=np.concatenate(sources) if sources else None,
        source_offsets=np.cumsum([0, *np.concatenate(of_sources)]) if sources else None,
    )
    aligned = [p.aligned for p in parts if isinstance(p, AlignedShard) and p.aligned is not None]
    if aligned:
        return AlignedShard(**vars(data), aligned=AlignedRows.concat(aligned))
    sizes = [p.label_bytes for p in parts if isinstance(p, TextShard) and p.label_bytes is not None]
    return TextShard(**vars(data), label_bytes=np.concatenate(sizes)) if sizes else data


def _join_texts(texts: Sequence[list[str] | None], rows: Sequence[int]) -> list[str] | None:
    if all(t is None for t in texts):
        return None
    return [text for part, n in zip(texts, rows, strict=True) for text in part or [""] * n]


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
