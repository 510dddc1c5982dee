"""The source of an import: rows of ids with the targets that another program wrote next to them.

Of each position the K most probable ids are kept; what is left of 1 is the tail. Of draws all are
kept. Nothing is made up: a position with fewer ids, the same id twice, or more than all probability
is refused, and draws some of which are missing.

Cost: one pass over the files; memory of a span's rows and targets.
Guarantee: a shard is a pure function of its span and the options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from kdcache.cache import Cache
from kdcache.cache.shard import ShardData
from kdcache.commands.build.packer import Packer, Positions, Steps
from kdcache.commands.build.source import Answers, SpanRows, TargetSource
from kdcache.commands.import_.apart import open_apart, steps_of
from kdcache.commands.import_.layouts import LAYOUTS, Columns, Compression, Entries, read_entries
from kdcache.corpus import Corpus, ReadStats, Record, RecordError, Span
from kdcache.rows import Row, RowSpec
from kdcache.rows.ids import SequenceMaker, own_ids
from kdcache.targets import Sample, TopK
from kdcache.tasks import CAUSAL_LM, IGNORE

_ROUNDING = 1e-3  # by which 16-bit log-probabilities may sum to more than 1
_LEAST = 0.95  # what all ids together sum to at least: bfloat16 log-probabilities may lose some
_SLICE = 1 << 16  # positions packed at a time


@dataclass(frozen=True)
class ImportSourceOptions:
    """Files with rows and targets.

    Attributes:
        targets: what they stand with: `token` or `next`.
        clip: whether probabilities that sum to more than 1 are scaled to 1.
        compression: of DistillKit's columns.
        logits: folder of targets that are apart from the rows.
    """

    rows: RowSpec
    layout: str
    targets: str
    clip: bool
    compression: Compression | None = None
    logits: str | None = None

    @property
    def columns(self) -> Columns:
        """The layout's columns."""
        return LAYOUTS[self.layout]

    @property
    def wanted(self) -> tuple[str, ...]:
        """All columns that are read."""
        return (*self.rows.columns, *self.columns.names)

    def open(self, url: str) -> ImportSource:
        """See `SourceOptions.open`."""
        return ImportSource(self, Cache.resume(url))


@dataclass(kw_only=True)
class TargetRows(SpanRows):
    """The rows of a span with their targets, as the codec packs them."""

    rows: Sequence[Row] = ()
    encoded: dict[str, np.ndarray] = field(default_factory=dict)


class ImportSource(TargetSource[Span, TargetRows]):
    """Reads rows and their targets."""

    def __init__(self, options: ImportSourceOptions, cache: Cache) -> None:
        super().__init__(cache)
        assert isinstance(self.codec, (TopK, Sample)), "an import makes these"
        self.options = options
        self._reader = RowReader(options, cache.tokenizer(), self.codec, cache.spec.label_logprob)

    def read(self, work: Span, steps: Steps) -> TargetRows:
        """See `Source.read`."""
        options, stats, empty = self.options, ReadStats(), 0
        on_error = options.rows.on_error
        found: list[tuple[Row, dict[str, np.ndarray]]] = []
        for record in Corpus.read(work, columns=options.wanted, on_error=on_error, stats=stats):
            steps.record()
            try:
                row = self._reader.read(record)
            except RecordError as problem:
                stats.reject(on_error, record.file, record.location, problem)
                continue
            if row is None:
                empty += 1
            else:
                found.append(row)
        rows = [row for row, _ in found]
        return TargetRows(
            shard=partial(ShardData.from_rows, CAUSAL_LM, rows),
            skipped=stats.skipped + empty,
            filtered=stats.filtered if work.reading.filters else None,
            reasons=tuple(stats.reasons),
            clipped_mass=0.0,
            rows=rows,
            encoded={
                name: np.concatenate([encoded[name] for _, encoded in found])
                for name in (found[0][1] if found else ())
            },
        )

    def answer(self, rows: TargetRows, packer: Packer, steps: Steps) -> Answers:
        """See `Source.answer`."""
        if not rows.rows:
            return [], []
        every = Positions.of(rows.rows, CAUSAL_LM)
        total = len(every.rows)
        parts = []
        starts = range(0, total, _SLICE)
        steps.begin(len(starts))
        for start in starts:
            steps()
            some = {
                name: torch.from_numpy(values[start : start + _SLICE])
                for name, values in rows.encoded.items()
            }
            parts.append(packer.put(some, torch.zeros(()), every, start))
            steps.batch(min(_SLICE, total - start))
        return parts, [np.arange(total)]


class RowReader:
    """Makes a row and its targets of a record."""

    def __init__(
        self,
        options: ImportSourceOptions,
        tokenizer: Any,
        codec: TopK | Sample | None,
        logprob: bool,
    ) -> None:
        self._options, self._codec, self._logprob = options, codec, logprob
        self._rows, self._eos = SequenceMaker(options.rows, tokenizer), tokenizer.eos_token_id

    def read(self, record: Record) -> tuple[Row, dict[str, np.ndarray]] | None:
        """The row of a record and what the codec packs of its positions; None where it has none.

        Raises:
            RecordError: it cannot be used.
            UsageError: a column is missing.
        """
        entries = self._entries(record)
        row, items = self._row(record, entries)
        if row is None:
            return None
        encoded = self._encoded(entries, items)
        if self._logprob:
            encoded["label_logprob"] = self._label_logprob(record, items)
        return row, encoded

    def width(self, record: Record) -> int:
        """How many ids the positions of a record have, at least; 0 without positions."""
        entries = self._entries(record)
        _, items = self._row(record, entries)
        return int(entries.counts[items].min()) if len(items) else 0

    def _entries(self, record: Record) -> Entries:
        if self._options.logits is not None:
            return open_apart(self._options.layout, self._options.logits).entries(record)
        return read_entries(record, self._options.columns, self._options.compression)

    def _row(self, record: Record, entries: Entries) -> tuple[Row | None, np.ndarray]:
        """The row, and which item of the targets each of its positions has."""
        none = np.zeros(0, np.int64)
        if self._options.columns.left_padded:
            record = _unpadded(record, self._eos)
        found = self._rows.make(record)
        if found is None:
            return None, none
        ids, learnt, starts = found.ids, found.mask, found.starts
        length, start = own_ids(record)
        shorter = self._options.targets == "next"
        if len(entries.counts) not in (length, length - shorter):
            raise RecordError(
                f"its targets have {len(entries.counts)} items for {length} input_ids"
            )
        # The item of the distribution that token i was drawn from.
        items = start + np.arange(len(ids)) - shorter
        there = items < len(entries.counts)
        there[0] = False
        if not there[learnt & (np.arange(len(ids)) > 0)].all():
            raise RecordError("its last label has no target")
        learnt = learnt & there
        learnt[there] &= entries.counted[items[there]]
        (positions,) = np.nonzero(learnt)
        if not len(positions):
            return None, none
        stop = int(positions[-1])
        if stop > self._options.rows.max_length:
            raise RecordError(
                f"{stop:,} tokens do not fit one row, --max-length is "
                f"{self._options.rows.max_length:,}"
            )
        labels = np.where(learnt[1 : stop + 1], ids[1 : stop + 1], IGNORE)
        row = Row(
            ids[:stop].astype(np.int32),
            labels.astype(np.int32),
            starts=starts[:stop] if self._options.rows.attend == "document" else None,
        )
        return row, items[positions]

    def _encoded(self, entries: Entries, items: np.ndarray) -> dict[str, np.ndarray]:
        """What the codec packs of some items."""
        assert self._codec is not None
        ids, logprobs = self._ordered(entries, items)
        if isinstance(self._codec, Sample):
            return self._drawn(self._codec, ids, logprobs)
        k, width = self._codec.k, self._codec.vocab_size
        with np.errstate(over="ignore"):
            mass = np.exp(logprobs).sum(1)
        if (mass > 1 + _ROUNDING).any() and not (self._options.clip and np.isfinite(mass).all()):
            raise RecordError(
                f"the probabilities of a position sum to {mass.max():.4g} (--excess clip scales "
                "them to 1)"
            )
        whole = entries.counts[items] >= width  # nothing is left for a tail
        if (mass < _LEAST)[whole].any():
            raise RecordError(
                f"the probabilities of all {width} ids sum to {mass[whole].min():.4g}, expected 1"
            )
        ids, logprobs = ids[:, :k], logprobs[:, :k]
        logprobs = logprobs - np.log(np.where(whole, mass, np.maximum(mass, 1)))[:, None]
        tail = np.clip(1 - np.exp(logprobs).sum(1), 0, 1)
        return {
            "ids": ids.astype(np.int32),
            "logprobs": logprobs.astype(np.float32),
            "tail": tail[:, None].astype(np.float32),
            "finite": np.ones(len(ids), np.bool_),
        }

    def _drawn(self, codec: Sample, ids: np.ndarray, logprobs: np.ndarray) -> dict[str, np.ndarray]:
        """All ids as heads, with units in the proportions of the draws: none is left for chance."""
        weights = np.exp(logprobs)
        lost = 1 - weights.sum(1)
        if (np.abs(lost) > _ROUNDING).any() and not self._options.clip:
            raise RecordError(
                f"the draws of a position sum to {1 - lost[np.abs(lost).argmax()]:.4g}: ids that "
                "were drawn less are missing, so the others are no unbiased sample (--excess clip "
                "scales them to 1)"
            )
        nothing = np.zeros(len(ids), np.int32)
        return {
            "ids": ids.astype(np.int32),
            "values": steps_of(weights, codec.rule.units)[..., None].astype(np.int32),
            "heads": nothing + ids.shape[1],
            "draws": nothing,
            "finite": np.ones(len(ids), np.bool_),
        }

    def _ordered(self, entries: Entries, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids [n, slots] and log-probabilities of some items, falling; checked."""
        assert self._codec is not None
        width, apart = self._codec.vocab_size, self._options.logits is not None
        counts = entries.counts[items]
        k = self._codec.k if isinstance(self._codec, TopK) else int(counts.max(initial=0))
        if (counts < k).any():
            raise RecordError(
                f"a position has {counts.min()} ids, fewer than the {k} of the others (--top "
                f"{counts.min()} keeps as many of each)"
            )
        slots = np.arange(counts.max())
        real = slots < counts[:, None]
        begins = np.cumsum(entries.counts) - entries.counts
        at = np.where(real, begins[items][:, None] + slots, 0)
        ids = entries.ids[at]
        logprobs = np.where(real, entries.logprobs[at], -np.inf)
        if np.isnan(logprobs).any():
            raise RecordError("a log-probability is not a number")
        # An id without probability may be what fills a list up, but not among the best, unless it
        # is by a rule of the layout.
        slots = np.argsort(-logprobs, axis=1, kind="stable")
        ids, logprobs = (np.take_along_axis(values, slots, 1) for values in (ids, logprobs))
        named = logprobs > -np.inf
        if not apart:
            named[:, :k] = True
        if ((ids < 0) | (ids >= width))[named].any():
            wrong = ids[named & ((ids < 0) | (ids >= width))][0]
            raise RecordError(f"a target names {wrong}, which is not an id of the tokenizer")
        ordered = np.sort(np.where(named, ids, -1 - np.arange(ids.shape[1])), 1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise RecordError("a target names an id twice")
        if not np.isfinite(logprobs[:, 0]).all():
            raise RecordError("a position has no probability on any of its ids")
        return ids, logprobs

    def _label_logprob(self, record: Record, items: np.ndarray) -> np.ndarray:
        name = self._options.columns.logprob
        cell = record.values.get(name or "")
        try:
            values = np.array([] if cell is None else cell, np.float32)
        except (TypeError, ValueError):
            values = np.zeros(0, np.float32)
        if values.ndim != 1 or len(values) <= items.max() or np.isnan(values[items]).any():
            raise RecordError(f"{name} has no number for a label")
        return np.asarray(values[items])


def _unpadded(record: Record, eos: int | None) -> Record:
    """A record whose padding, the end of a text at its beginning, is named as such."""
    ids = np.asarray(record.values.get("input_ids", ()))
    if eos is None or record.values.get("attention_mask") is not None or not (ids != eos).any():
        return record
    own = np.arange(len(ids)) >= np.argmax(ids != eos)
    return replace(record, values={**record.values, "attention_mask": own.astype(np.int64)})
