"""The source of an import: rows of ids with the targets that another program wrote beside them.

Of each position the K most probable ids are kept; what is left of 1 is the tail. Nothing is made
up: a position with fewer ids, the same id twice, or more than all probability is refused.

Cost: one pass over the files; memory of a span's rows and targets.
Guarantee: a shard is a pure function of its span and the options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from kdcache.cache import Cache
from kdcache.cache.shard import ShardData
from kdcache.commands.build.packer import Packer, Positions, Steps
from kdcache.commands.build.source import Answers, SpanRows, TargetSource
from kdcache.commands.import_.layouts import LAYOUTS, Columns, Compression, Entries, read_entries
from kdcache.corpus import Corpus, ReadStats, Record, RecordError, Span
from kdcache.rows import Row, RowSpec
from kdcache.rows.ids import SequenceMaker, own_ids
from kdcache.targets import TopK
from kdcache.tasks import CAUSAL_LM, IGNORE

_ROUNDING = 1e-3  # by which 16-bit log-probabilities may sum to more than 1
_LEAST = 0.95  # what all ids together sum to at least: bfloat16 log-probabilities may lose some
_SLICE = 1 << 16  # positions packed at a time


@dataclass(frozen=True)
class ImportSourceOptions:
    """Files with rows and targets.

    Attributes:
        rows: how records become rows.
        layout: whose columns the targets are.
        targets: what they stand beside: `token` or `next`.
        clip: whether probabilities that sum to more than 1 are scaled to 1.
        compression: of DistillKit's columns.
    """

    rows: RowSpec
    layout: str
    targets: str
    clip: bool
    compression: Compression | None = None

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
        assert isinstance(self.codec, TopK), "an import makes top-k targets"
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
        self, options: ImportSourceOptions, tokenizer: object, codec: TopK | None, logprob: bool
    ) -> None:
        self._options, self._codec, self._logprob = options, codec, logprob
        self._rows = SequenceMaker(options.rows, tokenizer)

    def read(self, record: Record) -> tuple[Row, dict[str, np.ndarray]] | None:
        """The row of a record and what the codec packs of its positions; None where it has none.

        Raises:
            RecordError: it cannot be used.
            UsageError: a column is missing.
        """
        entries = read_entries(record, self._options.columns, self._options.compression)
        row, items = self._row(record, entries)
        if row is None:
            return None
        encoded = self._encoded(entries, items)
        if self._logprob:
            encoded["label_logprob"] = self._label_logprob(record, items)
        return row, encoded

    def width(self, record: Record) -> int:
        """How many ids the positions of a record have, at least; 0 without positions."""
        entries = read_entries(record, self._options.columns, self._options.compression)
        _, items = self._row(record, entries)
        return int(entries.counts[items].min()) if len(items) else 0

    def _row(self, record: Record, entries: Entries) -> tuple[Row | None, np.ndarray]:
        """The row, and which item of the targets each of its positions has."""
        none = np.zeros(0, np.int64)
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
        """The K best ids of some items, their log-probabilities, and the tail."""
        assert self._codec is not None
        k, width = self._codec.k, self._codec.vocab_size
        counts = entries.counts[items]
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
        with np.errstate(over="ignore"):
            mass = np.exp(logprobs).sum(1)
        if (mass > 1 + _ROUNDING).any() and not (self._options.clip and np.isfinite(mass).all()):
            raise RecordError(
                f"the probabilities of a position sum to {mass.max():.4g} (--excess clip scales "
                "them to 1)"
            )
        whole = counts >= width  # nothing is left for a tail
        if (mass < _LEAST)[whole].any():
            raise RecordError(
                f"the probabilities of all {width} ids sum to {mass[whole].min():.4g}, expected 1"
            )
        # An id without probability may be what fills a list up, but not among the best.
        slots = np.argsort(-logprobs, axis=1, kind="stable")
        ids, logprobs = (np.take_along_axis(values, slots, 1) for values in (ids, logprobs))
        named = logprobs > -np.inf
        named[:, :k] = True
        if ((ids < 0) | (ids >= width))[named].any():
            wrong = ids[named & ((ids < 0) | (ids >= width))][0]
            raise RecordError(f"a target names {wrong}, which is not an id of the tokenizer")
        ordered = np.sort(np.where(named, ids, -1 - np.arange(ids.shape[1])), 1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise RecordError("a target names an id twice")
        ids, logprobs = ids[:, :k], logprobs[:, :k]
        if not np.isfinite(logprobs[:, 0]).all():
            raise RecordError("a position has no probability on any of its ids")
        logprobs = logprobs - np.log(np.where(whole, mass, np.maximum(mass, 1)))[:, None]
        tail = np.clip(1 - np.exp(logprobs).sum(1), 0, 1)
        return {
            "ids": ids.astype(np.int32),
            "logprobs": logprobs.astype(np.float32),
            "tail": tail[:, None].astype(np.float32),
            "finite": np.ones(len(ids), np.bool_),
        }

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
