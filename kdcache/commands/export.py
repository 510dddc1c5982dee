"""`kdcache export`: a cache as Parquet files that any tool for tables reads.

One file a shard, one row a sequence. The columns of a language model's cache are lists with an item
for each token: `input_ids`; `labels`, the id to predict after each token or -100; `target_ids` and
`target_probs`, lists of the ids that the teacher names there and of their probabilities at the
temperature, most probable first, empty where there is no label; `target_tail`, its probability of
all other ids (0 for samples, whose weights stand for all); and `teacher_logprob`, its
log-probability of the label at T = 1, where the cache keeps that. `segment_ids` numbers documents
that share a row and do not attend to each other, where a cache has such. A classifier's cache has
one target a row, and `label`, `text` and `text_pair`. Where a row has several labels each by
itself, `labels` is a list of 1 and 0 (null: not known) and `target_probs` of the teacher's
probabilities, both in the order of the classes, which the metadata name; of scores `label` and
`target_score` are numbers. `domain` names the row's corpus, where corpora have names. Each file's
metadata say under the key `kdcache` what it was made of.

The layout of axolotl's KD plugin has rows with all of their ids, the last label included, and with
each id the distribution that it was predicted by: `target_token_ids`, `target_logprobs`, scaled so
that those of a token sum to 1, and `target_mask`. `position_ids` count from 0 in each document.
Layouts of two caches are in `kdcache.commands.two_caches`.

Cost: one pass over the cache; memory of one decoded shard and of a block of its positions.
Guarantee: a file appears whole. The same command makes only the files that are missing, with the
same bytes, and removes what a killed one left half written; files of another cache or of other
options are refused, and so is a second export into the folder at the same time.
"""

from __future__ import annotations

import fnmatch
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from kdcache.cache import Cache
from kdcache.cache.figures import teacher_entropy
from kdcache.cache.shard import ShardData
from kdcache.commands.options import ExportOptions
from kdcache.commands.two_caches import Differences, DocumentWriter, PairWriter, TwoCaches
from kdcache.errors import UsageError
from kdcache.files import alone, listed, local_path, output_errors, whole_file, write_json
from kdcache.targets import SoftTargets
from kdcache.targets.decoded import DenseTargets, SparseTargets, with_logits
from kdcache.targets.label_logprob import decode_logprobs
from kdcache.tasks import CAUSAL_LM, IGNORE, TASKS, labelled, positions

_ABOUT = "_kdcache.json"  # tools for tables pass such names by
_MOST_IDS = 4096  # of targets that name them all
_ENTRIES = 1 << 22  # of a block of positions, about


@dataclass(frozen=True)
class ExportResult:
    """The outcome of an export.

    Attributes:
        made: how many of them this run made.
        seconds: wall time of this run.
        differences: of the documents of two caches (optional).
    """

    out: str
    files: int
    made: int
    rows: int
    positions: int
    bytes: int
    seconds: float
    differences: Differences | None = None


def export(
    options: ExportOptions, *, report: Callable[[str], None] = lambda _: None
) -> ExportResult:
    """Write a cache's rows and targets at one temperature, or finish an interrupted export.

    Raises:
        UsageError: wrong options, a temperature that the cache does not declare, or a folder with
            something else.
        IncompleteError: the cache is not finished, or no space is left.
    """
    started = time.perf_counter()
    writer = _WRITERS.get(options.layout, _Writer)(options)
    cache = writer.first
    folder = local_path(options.out)
    _refuse_others(folder, writer.about)
    with (
        output_errors(folder, "the files that are written stay valid"),
        alone(folder, "export"),
    ):
        writer.measure(folder)
        _begin(folder, writer.about)
        shards = cache.manifest.shards
        names = [f"part-{i:05d}-of-{len(shards):05d}.parquet" for i in range(len(shards))]
        missing = [i for i, name in enumerate(names) if not (folder / name).is_file()]
        cache.prefetch(missing)
        for i in missing:
            writer.write(i, folder / names[i])
            report(f"{names[i]}: {shards[i].rows:,} rows")
    return ExportResult(
        out=str(folder),
        files=len(names),
        made=len(missing),
        rows=sum(pq.read_metadata(folder / name).num_rows for name in names),
        positions=writer.positions,
        bytes=sum((folder / name).stat().st_size for name in names),
        seconds=time.perf_counter() - started,
        differences=writer.differences,
    )


def _refuse_others(folder: Path, about: dict[str, Any]) -> None:
    """Refuse a folder whose files are not of this export."""
    with output_errors(folder):
        names = listed(folder)
    if "spec.json" in names:
        raise UsageError(f"--out {folder} is a cache. Name another folder.")
    if _ABOUT in names:
        if json.loads((folder / _ABOUT).read_text()) != about:
            raise UsageError(
                f"--out {folder} holds files of another cache or of other options (see {_ABOUT}). "
                "Name another folder."
            )
    elif fnmatch.filter(names, "*.parquet"):
        raise UsageError(f"--out {folder} holds other Parquet files. Name another folder.")


def _begin(folder: Path, about: dict[str, Any]) -> None:
    """Note what a folder's files are of; remove what a killed export was writing."""
    _refuse_others(folder, about)  # none has begun there since
    for left in folder.glob(".*.tmp"):
        left.unlink()
    if not (folder / _ABOUT).is_file():
        write_json(folder / _ABOUT, about)


class _Writer:
    """Writes shards of one cache as files."""

    differences = None

    def __init__(self, options: ExportOptions) -> None:
        cache = self.first = Cache.open(*options.cache)
        codec, spec = cache.codec(), cache.spec
        self.positions = cache.manifest.positions
        declared = codec.temperatures
        self.temperature = options.temperature or (1.0 if 1.0 in declared else declared[0])
        codec.check_temperature(self.temperature)
        self.top, self.most = options.top, codec.most_entries
        if codec.keeps_logits and self.top is None and spec.vocab_size > _MOST_IDS:
            raise UsageError(
                f"{codec} targets name all {spec.vocab_size:,} ids of each position. Keep the best "
                "with --top, such as --top 64."
            )
        if codec.needs_noise and self.top is not None:
            raise UsageError(
                f"{codec} targets are right on average over all their ids: the largest would "
                "be biased. Leave --top out."
            )
        self.axolotl = options.layout == "axolotl"
        if self.axolotl and (spec.task != CAUSAL_LM or codec.needs_noise):
            raise UsageError(
                f"{cache.url} has {codec} targets for {spec.task}; axolotl's plugin takes the "
                f"most probable ids of {CAUSAL_LM}. Leave --layout out, or export a topk cache."
            )
        if self.top is not None and TASKS[spec.task].answers in _INDEPENDENT:
            raise UsageError(f"--top keeps a part of a distribution. Leave it out for {spec.task}.")
        self.about = {
            "cache": cache.digest,
            "codec": spec.codec,
            "task": spec.task,
            "temperature": self.temperature,
            "top": self.top,
            "vocab_size": spec.vocab_size,
            "tokenizer": spec.tokenizer,
            "labels": "next",
            "teachers": list(cache.notes.get("teachers", ())),
        }
        if self.axolotl:
            self.about |= {"layout": options.layout, "labels": "token"}
        if TASKS[spec.task].answers == "labels":
            self.about["classes"] = list(spec.label_names or ())

    def measure(self, folder: Path) -> None:
        """See `TwoCaches.measure`: there is nothing to look at."""

    def write(self, span: int, path: Path) -> None:
        """Write the file of a shard, whole."""
        data, domain = self.first.read(span), self.first.manifest.shards[span].domain
        with whole_file(path) as file:
            writer: Any = None
            for rows in self._blocks(data):
                table = self._table(data, rows, domain)
                writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
                writer.write_table(table)
            writer.close()

    def _blocks(self, data: ShardData) -> Iterator[range]:
        """Stretches of rows with about as many entries; one without rows where there are none."""
        most = min(self.top or self.most, self.most)
        positions_at_once = max(1, _ENTRIES // max(most, 64))
        start, offsets = 0, data.position_offsets
        while True:
            stop = int(np.searchsorted(offsets, offsets[start] + positions_at_once, "right")) - 1
            stop = min(max(stop, start + 1), len(data))
            yield range(start, stop)
            start = stop
            if start >= len(data):
                return

    def _table(self, data: ShardData, rows: range, domain: str | None) -> pa.Table:
        per_token = TASKS[data.task].per_token
        if self.axolotl:
            return self._with_tokens(data, rows)
        tokens = slice(data.offsets[rows.start], data.offsets[rows.stop])
        positions_here = slice(data.position_offsets[rows.start], data.position_offsets[rows.stop])
        ends = data.offsets[rows.start : rows.stop + 1] - tokens.start
        labels = data.labels[tokens] if per_token else data.labels[rows.start : rows.stop]
        there = positions(labels, data.task)
        every = data.every_label[tokens] if per_token else labels
        independent = _INDEPENDENT.get(TASKS[data.task].answers)
        if independent is None:
            own = {"label": pa.array(labels, pa.int32(), mask=labels == IGNORE)}
            counts, ids, probs, tail = self._decoded(
                data.targets, positions_here.start, positions_here.stop
            )
            per = np.zeros(len(labels), np.int64)
            per[there] = counts
            values = {
                "target_ids": _lists(per, pa.array(ids, pa.int32())),
                "target_probs": _lists(per, pa.array(probs, pa.float32())),
                "target_tail": _spread(tail, there),
            }
        else:
            taken = data.targets.take(np.arange(positions_here.start, positions_here.stop)).at(
                self.temperature
            )
            assert isinstance(taken, DenseTargets), "their targets are dense"
            own, values = independent(labels, taken)
        if (codes := data.every_logprob) is not None:
            begin, end = (data.position_offsets + data.ends("hard"))[[rows.start, rows.stop]]
            logprobs = decode_logprobs(codes[begin:end])
            values["teacher_logprob"] = _spread(logprobs, positions(every, data.task))
        known = teacher_entropy(data, np.arange(positions_here.start, positions_here.stop))
        if known is not None:
            values["teacher_entropy"] = _spread(known, there)
        columns = {"input_ids": _list_of(ends, pa.array(data.input_ids[tokens], pa.int32()))}
        if per_token:
            hard = np.where(labelled(every, data.task), every, IGNORE)
            columns["labels"] = _list_of(ends, pa.array(hard, pa.int32()))
            columns |= {name: _list_of(ends, column) for name, column in values.items()}
            if data.starts is not None:
                segments = pa.array(np.cumsum(data.starts[tokens]), pa.int32())
                columns["segment_ids"] = _list_of(ends, segments)
            if data.source is not None and data.source_offsets is not None:
                bounds = data.source_offsets[rows.start : rows.stop + 1]
                ids = pa.array(data.source[bounds[0] : bounds[-1]], pa.int32())
                columns["source_ids"] = _list_of(bounds - bounds[0], ids)
            if data.words is not None and data.first is not None:
                columns["first_tokens"] = _list_of(ends, pa.array(data.first[tokens]))
                columns["words"] = pa.array(
                    data.words[rows.start : rows.stop], pa.list_(pa.string())
                )
        else:
            columns |= own
            for name, texts in (("text", data.texts), ("text_pair", data.text_pairs)):
                if texts is not None:
                    columns[name] = pa.array(texts[rows.start : rows.stop], pa.string())
            columns |= values
        if domain is not None:
            columns["domain"] = pa.array([domain] * len(rows), pa.string())
        return pa.table(columns).replace_schema_metadata({"kdcache": json.dumps(self.about)})

    def _with_tokens(self, data: ShardData, rows: range) -> pa.Table:
        """The layout of axolotl: what a token was predicted by stands with it."""
        first, last = data.position_offsets[rows.start], data.position_offsets[rows.stop]
        counts, ids, probs, _ = self._decoded(data.targets, first, last)
        owner = np.repeat(np.arange(len(counts)), counts)
        probs = probs / np.bincount(owner, probs, len(counts))[owner]
        per, own_ids, own_labels, at, used = [], [], [], [], 0
        every = data.every_label
        for begin, end in pairwise(data.offsets[rows.start : rows.stop + 1].tolist()):
            labels, there = every[begin:end], np.flatnonzero(data.labels[begin:end] != IGNORE)
            at_labels = np.flatnonzero(labels != IGNORE)
            size = max(end - begin, int(at_labels[-1]) + 2 if len(at_labels) else 0)
            row, learnt = np.zeros(size, np.int64), np.full(size, IGNORE)
            row[: end - begin] = data.input_ids[begin:end]
            row[at_labels + 1] = learnt[at_labels + 1] = labels[at_labels]
            amount = np.zeros(size, np.int64)
            amount[there + 1] = counts[used : used + len(there)]
            used += len(there)
            starts = (
                np.zeros(end - begin, np.bool_) if data.starts is None else data.starts[begin:end]
            )
            begun = np.where(np.append(starts, False)[:size], np.arange(size), 0)
            at.append(np.arange(size) - np.maximum.accumulate(begun))
            per.append(amount)
            own_ids.append(row)
            own_labels.append(learnt)
        ends = np.cumsum([0, *map(len, own_ids)])

        def tokens(parts: list[np.ndarray], kind: Any) -> pa.Array:
            return _list_of(ends, pa.array(np.concatenate([np.zeros(0, np.int64), *parts]), kind))

        def entries(values: pa.Array) -> pa.Array:
            return _list_of(ends, _lists(np.concatenate([np.zeros(0, np.int64), *per]), values))

        mask = [np.ones(len(part), np.int64) for part in own_ids]
        columns = {
            "input_ids": tokens(own_ids, pa.int32()),
            "attention_mask": tokens(mask, pa.int8()),
            "labels": tokens(own_labels, pa.int64()),
            "position_ids": tokens(at, pa.int64()),
            "target_token_ids": entries(pa.array(ids, pa.int64())),
            "target_logprobs": entries(pa.array(np.log(probs), pa.float32())),
            "target_mask": entries(pa.array(np.ones(len(ids), np.int64))),
        }
        return pa.table(columns).replace_schema_metadata({"kdcache": json.dumps(self.about)})

    def _decoded(self, targets: SoftTargets, start: int, stop: int) -> tuple[np.ndarray, ...]:
        """Of the positions [start, stop) what `_entries` gives, decoded some at a time: a block has
        whole rows, and --top keeps a part of what is decoded.
        """
        step = max(1, _ENTRIES // self.most)
        parts = [
            self._entries(targets.take(np.arange(first, min(first + step, stop))))
            for first in range(start, max(stop, start + 1), step)
        ]
        return tuple(map(np.concatenate, zip(*parts, strict=True)))

    def _entries(self, targets: SoftTargets) -> tuple[np.ndarray, ...]:
        """Of all positions, one after another: how many ids, ids, probabilities; and the tail."""
        found = with_logits(targets.at(self.temperature))
        if isinstance(found, SparseTargets):
            weights = found.weights.double().numpy()
            tail = found.tail.double().numpy()
            position, slot = np.nonzero(weights)
            ids, probs = found.ids.numpy()[position, slot], weights[position, slot]
            if not found.exact:  # an id that was drawn twice has two entries
                width = targets.codec.vocab_size
                keys, which = np.unique(position * width + ids, return_inverse=True)
                probs = np.bincount(which, probs, len(keys))
                position, ids = np.divmod(keys, width)
        else:
            probs = (found.logits.double() / self.temperature).softmax(-1).numpy()
            position, ids = np.indices(probs.shape).reshape(2, -1)
            probs, tail = probs.reshape(-1), np.zeros(len(targets))
        order = np.lexsort((ids, -probs, position))
        position, ids, probs = position[order], ids[order], probs[order]
        counts = np.bincount(position, minlength=len(targets))
        if self.top is not None:
            rank = np.arange(len(position)) - np.repeat(np.cumsum(counts) - counts, counts)
            kept = rank < self.top
            tail = tail + np.bincount(position[~kept], probs[~kept], len(targets))
            ids, probs, counts = ids[kept], probs[kept], np.minimum(counts, self.top)
        return counts, ids, probs, tail


_Columns: TypeAlias = dict[str, pa.Array]


def _many(labels: np.ndarray, targets: DenseTargets) -> tuple[_Columns, _Columns]:
    p = torch.sigmoid(targets.logits.double() / targets.temperature).float().numpy()
    ends = np.arange(len(labels) + 1) * labels.shape[1]
    flat = pa.array(labels.reshape(-1), pa.int8(), mask=labels.reshape(-1) == IGNORE)
    probs = _list_of(ends, pa.array(p.reshape(-1), pa.float32()))
    return {"labels": _list_of(ends, flat)}, {"target_probs": probs}


def _scores(labels: np.ndarray, targets: DenseTargets) -> tuple[_Columns, _Columns]:
    scores = pa.array(targets.logits[:, 0].numpy(), pa.float32())
    hard = pa.array(labels, pa.float32(), mask=np.isnan(labels))
    return {"label": hard}, {"target_score": scores}


_WRITERS: dict[str, type[TwoCaches]] = {"dpo": PairWriter, "documents": DocumentWriter}

# Columns of labels and of targets where answers are not a distribution.
_INDEPENDENT = {"labels": _many, "score": _scores}


def _list_of(ends: np.ndarray, values: pa.Array) -> pa.Array:
    """Lists that lie one after another, by where each begins and the last ends."""
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), values)


def _lists(counts: np.ndarray, values: pa.Array) -> pa.Array:
    return _list_of(np.concatenate([[0], np.cumsum(counts)]), values)


def _spread(values: np.ndarray, there: np.ndarray) -> pa.Array:
    """A value for each token or row, null where it has no target."""
    out = np.zeros(len(there), np.float32)
    out[there] = values
    return pa.array(out, pa.float32(), mask=~there)
