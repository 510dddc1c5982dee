"""Small caches, made without a teacher, whose numbers tell which row they belong to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from kdcache.cache import Cache, CacheSpec
from kdcache.cache.sealing import prepare_manifest, seal
from kdcache.cache.shard import ShardData
from kdcache.pretrained import tokenizer_files
from kdcache.rows import Row
from kdcache.targets import Codec, TargetWriter, position_uniform
from kdcache.tasks import IGNORE

CAUSAL, CLASSES = "causal-lm", "sequence-classification"


def make_rows(
    task: str, numbers: Sequence[int], vocab: int, classes: int, seed: int = 0
) -> list[Row]:
    """Rows that carry their number in their first two ids, of 2 to 9 tokens."""
    rows = []
    for number in numbers:
        rng = np.random.default_rng([seed, number])
        ids = rng.integers(0, vocab, int(rng.integers(3, 11))).astype(np.int32)
        ids[:2] = divmod(number, vocab)
        if task == CAUSAL:
            labels = np.where(rng.random(len(ids) - 1) < 0.2, IGNORE, ids[1:]).astype(np.int32)
            rows.append(Row(ids[:-1], labels))
        else:
            label = IGNORE if number % 7 == 6 else number % classes
            types = (np.arange(len(ids)) > 2).astype(np.uint8)
            text = " ".join(f"w{i}" for i in ids)
            rows.append(Row(ids, np.array([label], np.int32), types, text, None))
    return rows


def teacher_logits(rows: Sequence[Row], task: str, width: int) -> torch.Tensor:
    """[positions, width]: a function of the row's number and the place."""
    parts = [np.zeros((0, width))]
    for row in rows:
        number = int(row.input_ids[0]) * 64 + int(row.input_ids[1])
        places = np.flatnonzero(row.labels != IGNORE) if task == CAUSAL else np.arange(1)
        phase = number * 1.7 + places[:, None] * 0.3 + np.arange(width)[None] * 2.1
        parts.append(3 * np.sin(phase))
    return torch.from_numpy(np.concatenate(parts)).float()


def make_shard(
    task: str,
    rows: Sequence[Row],
    codec: Codec,
    width: int,
    seed: int = 0,
    *,
    label_logprob: bool = False,
) -> ShardData:
    """Rows with targets from `teacher_logits`; codes of `label_logprob` by number and place."""
    logits = teacher_logits(rows, task, width)
    n = len(logits)
    u = torch.from_numpy(position_uniform(seed, 0, np.arange(n), np.zeros(n, np.int64)))
    codes = [
        ((int(row.input_ids[0]) * 64 + int(row.input_ids[1])) * 31 + row.positions(task)) % 400
        for row in rows
    ]
    return ShardData.from_rows(
        task,
        rows,
        TargetWriter(codec).write(logits, u),
        np.concatenate([np.zeros(0), *codes]).astype(np.uint16) if label_logprob else None,
    )


def make_cache(
    folder: Path,
    shard_rows: Sequence[int],
    *,
    task: str = CLASSES,
    codec: str = "dense",
    temperatures: tuple[float, ...] = (1.0, 2.0),
    vocab: int = 64,
    classes: int = 3,
    first: int = 0,
    tokenizer: str = "t",
    pad_id: int = 0,
    labelled: bool = True,
    label_logprob: bool = False,
    domains: Sequence[str] = (),
    teachers: int = 1,
) -> Cache:
    """A sealed cache with one shard for each number of rows; rows are numbered from `first` on.

    Where corpora have names, `domains` has that of each shard.
    """
    width = vocab if task == CAUSAL else classes
    spec = CacheSpec(
        task=task,
        teachers=tuple({"sha256": f"{i}", "weight": 1 / teachers} for i in range(teachers)),
        ensemble="mean-probs",
        dtype="float32",
        tokenizer=tokenizer,
        vocab_size=width,
        pad_id=pad_id,
        eos_id=None,
        label_names=tuple(f"c{i}" for i in range(classes)) if task == CLASSES else None,
        corpus=({"name": str(first), "size": 1, "tag": "x"},),
        rows={"max_length": 16, "packing": "none"},
        reading={},
        spans=len(shard_rows),
        codec=codec,
        temperatures=temperatures,
        seed=0,
        label_logprob=label_logprob,
        domains=tuple({"name": name, "spans": 1} for name in domains),
    )
    cache = Cache.create_or_resume(str(folder), spec, tokenizer_files=word_tokenizer(vocab))
    number, entries = first, []
    for span, count in enumerate(shard_rows):
        rows = make_rows(task, range(number, number + count), vocab, classes)
        if not labelled:
            rows = [dataclasses.replace(row, labels=np.full_like(row.labels, -100)) for row in rows]
        shard = make_shard(task, rows, spec.make_codec(), width, label_logprob=label_logprob)
        entries.append(cache.commit(span, shard))
        number += count
    seal(cache, prepare_manifest(cache, entries))
    return Cache.open(str(folder))


def word_tokenizer(vocab: int = 64) -> dict[str, bytes]:
    """Files of a tokenizer whose word `w7` has id 7; 0 pads and 1 is unknown."""
    known = {"[PAD]": 0, "[UNK]": 1} | {f"w{i}": i for i in range(2, vocab)}
    words = Tokenizer(WordLevel(known, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    return tokenizer_files(fast)
