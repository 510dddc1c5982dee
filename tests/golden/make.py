"""How the golden caches were made: by the code of version 0.1.0, format version 1.

    python tests/golden/make.py FOLDER

They are the promise that later versions read what earlier ones wrote, so they are never made again:
what comes later adds folders of its own beside them, and only those that are missing are made.
Caches of ten rows in one shard; the rows and logits below are no one's teacher's. Those in `KEEP`
have the log-probabilities of the labels, those in `ENTROPY` the teacher's entropies, those in
`ANSWERS` sums of the former, those in `LEVELS` levels of one byte, the rows of those in `APART`
hold documents that do not attend to each other, and those in `DOMAINS` have shards of corpora with
names; the others are older than that.
`expected.json` holds what the caches must give,
taken from the rows themselves and, for the targets, from what the codecs read right after
they had written: `test_targets.py` is what says that these are right.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from kdcache.cache import Cache, CacheSpec
from kdcache.cache.cache import layer_bytes
from kdcache.cache.sealing import prepare_manifest, seal
from kdcache.cache.shard import ShardData
from kdcache.pretrained import tokenizer_files
from kdcache.rows import Row
from kdcache.targets import (
    AnchoredTargets,
    DenseTargets,
    HiddenTargets,
    OutputLayer,
    SoftTargets,
    position_uniform,
)
from kdcache.targets.device import label_logprobs
from kdcache.targets.label_logprob import encode_entropies, encode_logprobs
from kdcache.targets.soft import ranks_of_ids, read_ranks
from kdcache.tasks import IGNORE, UNLABELLED

VOCABULARY = 300
CLASSES = ("bad", "neutral", "good")
CACHES = {
    "dense": ("sequence-classification", "dense", (1.0,)),
    "topk-1": ("causal-lm", "topk:4", (1.0,)),
    "topk-1-2": ("causal-lm", "topk:4", (1.0, 2.0)),
    "topk-levels": ("causal-lm", "topk:4", (1.0, 2.0)),
    "sample-1": ("causal-lm", "sample:5", (1.0,)),
    "sample-1-2": ("causal-lm", "sample:5", (1.0, 2.0)),
    "hidden-int8": ("causal-lm", "hidden:int8", (1.0, 2.0)),
    "anchored-1-2": ("causal-lm", "anchored:5", (1.0, 2.0)),
    "label-logprob": ("causal-lm", "sample:5", (1.0, 2.0)),
    "entropy": ("causal-lm", "sample:5", (1.0,)),
    "answers": ("causal-lm", "topk:2", (1.0,)),
    "documents": ("causal-lm", "topk:4", (1.0,)),
    "domains": ("causal-lm", "topk:4", (1.0,)),
    "words": ("token-classification", "dense", (1.0,)),
    "labels": ("multi-label-classification", "dense:float16", (1.0, 2.0)),
    "scores": ("regression", "dense", (1.0,)),
    "masked": ("masked-lm", "sample:5", (1.0, 2.0)),
    "pairs": ("seq2seq-lm", "sample:5", (1.0, 2.0)),
}
KEEP = {"label-logprob", "masked", "pairs", "entropy", "answers"}
ENTROPY = {"entropy"}
ANSWERS = {"answers"}
LEVELS = {"topk-levels", "answers"}
APART = {"documents"}
DOMAINS = {"domains": (("web", 6), ("code", 3), ("web", 1))}  # and rows of the shard of each
PAIRS = {"seq2seq-lm": {"max_source_length": 8, "decoder_start": 0}}
WIDTH = 40
SHARDS = (10,)


def rows_of(task: str, rng: np.random.Generator, count: int) -> list[Row]:
    rows = []
    for _ in range(count):
        # Squares: small ids are more frequent, as in a text.
        ids = (VOCABULARY * rng.random(int(rng.integers(4, 9))) ** 2).astype(np.int32)
        if task == "causal-lm":
            labels = np.where(rng.random(len(ids) - 1) < 0.2, IGNORE, ids[1:]).astype(np.int32)
            rows.append(Row(ids[:-1], labels))
            continue
        if task == "seq2seq-lm":
            source = (VOCABULARY * rng.random(int(rng.integers(1, 9))) ** 2).astype(np.int32)
            rows.append(Row(np.append(np.int32(0), ids[:-1]), ids, source=source))
            continue
        if task == "token-classification":
            rows.append(tagged(ids, rng))
            continue
        if task == "masked-lm":
            labels = np.where(rng.random(len(ids)) < 0.4, ids, np.int32(IGNORE))
            labels[0] = ids[0]
            rows.append(Row(np.where(labels == IGNORE, ids, np.int32(2)), labels))
            continue
        label: Any = np.array([int(rng.integers(-1, 3))], np.int32)
        label[label < 0] = IGNORE
        if task == "multi-label-classification":
            label = rng.integers(-1, 2, (1, len(CLASSES))).astype(np.int32)
            label[label < 0] = IGNORE
        if task == "regression":
            score = np.nan if rng.random() < 0.3 else rng.standard_normal()
            label = np.array([score], np.float32)
        types = (np.arange(len(ids)) > 2).astype(np.uint8)
        text = " ".join(f"w{i}" for i in ids[:3]) + " é"
        rows.append(Row(ids, label, types, text, " ".join(f"w{i}" for i in ids[3:])))
    return rows


def tagged(ids: np.ndarray, rng: np.random.Generator) -> Row:
    """A row of words of one or two tokens between two others; some have no label."""
    first = rng.random(len(ids)) < 0.6
    first[:2], first[-1] = (False, True), False
    labels = np.where(first, rng.integers(-1, 3, len(ids)), IGNORE).astype(np.int32)
    labels[labels == -1] = UNLABELLED
    words = tuple(f"w{i}é" for i in ids[first])
    return Row(ids, labels, np.zeros(len(ids), np.uint8), words=words, first=first)


def divided(row: Row, rng: np.random.Generator) -> Row:
    """A row of several documents."""
    starts = rng.random(len(row.input_ids)) < 0.3
    starts[0] = True
    labels = row.labels.copy()
    labels[:-1][starts[1:]] = IGNORE
    return replace(row, labels=labels, starts=starts)


def make(folder: Path, task: str, codec: str, temperatures: tuple[float, ...]) -> dict[str, Any]:
    """One cache, and what it must give."""
    rng = np.random.default_rng(7)
    over_ids = task in ("causal-lm", "masked-lm", "seq2seq-lm")
    named = not over_ids and task != "regression"
    width = len(CLASSES) if named else VOCABULARY if over_ids else 1
    domains = DOMAINS.get(folder.name, ())
    shards = [rows_of(task, rng, count) for count in [n for _, n in domains] or SHARDS]
    apart = folder.name in APART
    if apart:
        shards = [[divided(row, rng) for row in rows] for rows in shards]
    ranks = b""
    if over_ids:
        ids = np.concatenate([row.input_ids for shard in shards for row in shard])
        counts = np.bincount(ids, minlength=width)
        order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        ranks = order.astype("<u4").tobytes()
    layer = b""
    if codec.startswith("hidden"):
        ranks, layer = b"", layer_bytes(layer_of(np.random.default_rng(8)))
    spec = CacheSpec(
        task=task,
        teachers=({"sha256": "0" * 64, "weight": 1.0},),
        ensemble="mean-probs",
        dtype="float32",
        tokenizer="0" * 64,
        vocab_size=width,
        pad_id=0,
        eos_id=None,
        label_names=CLASSES if named else None,
        corpus=({"name": "golden.jsonl", "size": 1, "kind": "jsonl", "tag": "0" * 32},),
        rows={"max_length": 8, "packing": "concat", "attend": "document"}
        if apart
        else {"max_length": 8, "packing": "none", **PAIRS.get(task, {})},
        reading={"span_bytes": 1, "limit": None, "format": "auto", "columns": None},
        spans=len(shards),
        codec=codec,
        temperatures=temperatures,
        seed=0,
        ranks=hashlib.sha256(ranks).hexdigest() if ranks else None,
        levels=folder.name in LEVELS,
        label_logprob=folder.name in KEEP,
        entropy=folder.name in ENTROPY,
        answer_logprob=folder.name in ANSWERS,
        output_layer=hashlib.sha256(layer).hexdigest() if layer else None,
        domains=tuple({"name": name, "spans": 1} for name, _ in domains),
    )
    cache = Cache.create_or_resume(
        str(folder), spec, tokenizer_files=tokenizer(), ranks=ranks, output_layer=layer,
        notes={"kdcache": "0.1.0"},
    )  # fmt: skip
    to_id = read_ranks(ranks, width) if ranks else None
    entries, expected = [], []
    for span, rows in enumerate(shards):
        positions = [len(row.positions(task)) for row in rows]
        n = sum(positions)
        logits = torch.from_numpy(3 * rng.standard_normal((n, width))).float()
        u = torch.from_numpy(position_uniform(0, span, np.arange(n), 0))
        made = cache.codec()
        values = logits[:, :WIDTH] if made.reads_states else logits
        raw = {k: v.numpy() for k, v in made.encode(values, u).items()}
        packed = made.pack(raw, None if to_id is None else ranks_of_ids(to_id))
        targets = SoftTargets(made, packed, to_id)
        codes, entropies, kept = None, None, {}
        if spec.label_logprob:
            labels = np.concatenate([row.labels[row.labels != IGNORE] for row in rows])
            logprobs = label_logprobs(logits, torch.from_numpy(labels).long()).numpy()
            logprobs[3] = -np.inf  # a label that the teacher's output layer lacks
            noise = position_uniform(0, span, np.arange(n), 0, stream=1)
            codes = encode_logprobs(logprobs, noise)
            kept = {"label_logprob": codes.tolist()}
        if spec.entropy:
            found = torch.special.entr(logits.double().softmax(-1)).sum(-1).numpy()
            entropies = encode_entropies(
                found, position_uniform(0, span, np.arange(n), 0, stream=2)
            )
            kept |= {"entropy": entropies.tolist()}
        of_answers = logprobs if spec.answer_logprob else None
        data = ShardData.from_rows(task, rows, targets, codes, entropies, of_answers)
        if data.answer_logprob is not None:
            sums = data.answer_logprob.tolist()
            kept |= {"answer_logprob": [None if np.isinf(x) else round(x, 4) for x in sums]}
        entries.append(cache.commit(span, data))
        expected.append(
            {
                "rows": [
                    {
                        "input_ids": row.input_ids.tolist(),
                        "labels": [None if v != v else v for v in row.labels.tolist()],
                        "type_ids": None if row.type_ids is None else row.type_ids.tolist(),
                        "text": row.text,
                        "text_pair": row.text_pair,
                        **({} if row.starts is None else {"starts": row.starts.tolist()}),
                        **({} if row.words is None else {"words": row.words}),
                        **({} if row.first is None else {"first": row.first.tolist()}),
                        **({} if row.source is None else {"source": row.source.tolist()}),
                    }
                    for row in rows
                ],
                "positions": positions,
                "targets": {f"{t:g}": target_values(targets, t) for t in temperatures},
                **kept,
            }
        )
    seal(cache, prepare_manifest(cache, entries))
    names = {"domains": [name for name, _ in domains]} if domains else {}
    return {"digest": cache.digest, "fingerprint": spec.fingerprint, "shards": expected, **names}


def layer_of(rng: np.random.Generator) -> OutputLayer:
    """An output layer with all that one may have."""
    weight, bias = rng.standard_normal((VOCABULARY, WIDTH)), rng.standard_normal(VOCABULARY)
    tensors = (torch.from_numpy(values).float() for values in (weight, bias))
    layer = OutputLayer(*tensors, scale=0.5, cap=20.0)
    return layer.with_channels(torch.zeros(WIDTH), torch.linspace(1, 6, WIDTH))


def target_values(targets: SoftTargets, temperature: float) -> list[Any]:
    """Of each position: logits or states, or id and weight pairs by id and what is left."""
    found = targets.at(temperature)
    if isinstance(found, DenseTargets):
        return [[round(z, 6) for z in row] for row in found.logits.tolist()]
    if isinstance(found, HiddenTargets):
        return [[round(h, 6) for h in row] for row in found.states.tolist()]
    values = []
    for ids, weights, rest in zip(found.ids, found.weights, found.tail, strict=True):
        sums: dict[int, float] = {}
        for i, w in zip(ids.tolist(), weights.tolist(), strict=True):
            if w > 0:
                sums[i] = sums.get(i, 0.0) + w
        entries = [[i, round(w, 6)] for i, w in sorted(sums.items())]
        values.append({"entries": entries, "rest": round(float(rest), 6)})
    if isinstance(found, AnchoredTargets):
        for value, ids, inverse, heads in zip(
            values, found.ids, found.inverse, found.heads, strict=True
        ):
            drawn = [[int(ids[i]), round(float(inverse[i]), 6)] for i in inverse.nonzero()[:, 0]]
            value |= {"heads": sorted(ids[: int(heads)].tolist()), "inverse": sorted(drawn)}
    return values


def tokenizer() -> dict[str, bytes]:
    """Few words: the ids of the rows need none."""
    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "w2": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return tokenizer_files(
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    )


def main() -> None:
    folder = Path(sys.argv[1])
    file = folder / "expected.json"
    expected = json.loads(file.read_text()) if file.exists() else {}
    missing = {name: facts for name, facts in CACHES.items() if name not in expected}
    expected |= {name: make(folder / name, *facts) for name, facts in missing.items()}
    file.write_text(json.dumps(expected, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
