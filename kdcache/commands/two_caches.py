"""`kdcache export` of two caches whose rows belong together: preference pairs, or two teachers.

Pairs (`--layout dpo CHOSEN REJECTED`): row i of both caches is one prompt, with a preferred answer
and with another one. The last run of labels in a row is its answer; all before it is the prompt,
which must be the same in both. Reference log-probabilities are sums over the answer's labels at
T = 1, as `answer_logprob` has them. Of caches without it, of earlier versions, they are made of the
logits that two `dense` or `hidden` caches give, else of `label_logprob`, whose rounding errors add
up.

Documents (`--layout documents LARGE SMALL`): of each the mean over its labels of LARGE's
log-probability less SMALL's, in nats a token. Large values are text that a large model has learnt
and a small one has not, small ones noise and what is easy: the difference sampling of MiniPLM
(arXiv 2410.17215). Documents that share a row and do not attend to each other are apart; others
are rows. `--select SHARE` keeps the largest, of equal ones the earlier; a label that a teacher
gives no probability counts for neither.

Cost: two passes over both caches' rows, without soft targets but for pairs with logits. Memory of a
shard or two of each cache; eight bytes a document lie in unnamed files beside the output.
Guarantee: rows that do not belong together are refused before a file is written.
"""

from __future__ import annotations

import heapq
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kdcache.cache import Cache, CacheSpec
from kdcache.cache.columns import answer_sums
from kdcache.cache.shard import ShardData
from kdcache.commands.options import ExportOptions
from kdcache.errors import UsageError
from kdcache.files import whole_file
from kdcache.stream.checks import check_every_position
from kdcache.stream.shard_rows import ShardRows, by_document
from kdcache.targets import DenseTargets, with_logits
from kdcache.targets.label_logprob import IMPOSSIBLE, SCALE, decode_logprobs
from kdcache.tasks import CAUSAL_LM, IGNORE, share_of

Floats = npt.NDArray[np.float64]

_SHARES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_EXTREMES = 5
_ENTRIES = 1 << 22  # logits of a block of positions, about
_DOCUMENTS = 1 << 20  # differences of a block


@dataclass(frozen=True)
class Extreme:
    """A document at an end of the differences: its row, its difference and its text."""

    row: int
    difference: float
    text: str


@dataclass(frozen=True)
class Differences:
    """Differences of two teachers' log-probabilities, in nats a token.

    Attributes:
        documents: how many were compared.
        mean: of them.
        quantiles: shares of the documents, and the difference that so many have or exceed not.
        lowest: documents, the smallest difference first.
        highest: documents, the largest first.
    """

    documents: int
    mean: float
    quantiles: tuple[tuple[float, float], ...]
    lowest: tuple[Extreme, ...]
    highest: tuple[Extreme, ...]


class TwoCaches:
    """Writes shards of a first cache beside the same rows of a second one; base of both layouts."""

    def __init__(self, options: ExportOptions) -> None:
        """Open both.

        Raises:
            UsageError: they do not belong together, or lack what is needed.
        """
        self.first, self.second = map(Cache.open, options.cache)
        self.differences: Differences | None = None
        for cache in (self.first, self.second):
            if cache.spec.task != CAUSAL_LM or not cache.spec.label_logprob:
                raise UsageError(
                    f"--layout {options.layout} takes {CAUSAL_LM} caches that keep the labels' "
                    f"log-probabilities; {cache.url} is none."
                )
        for wrong in check_every_position(self._both, f"--layout {options.layout}"):
            raise UsageError(wrong)
        if self.first.manifest.rows != self.second.manifest.rows:
            raise self._apart(
                f"{self.first.manifest.rows:,} and {self.second.manifest.rows:,} rows"
            )
        ends = [np.cumsum([0, *(s.rows for s in c.manifest.shards)]) for c in self._both]
        self.starts, self._others = ends
        self._read: Callable[[int, bool], ShardData] = lru_cache(1)(
            lambda span, soft: self.second.read(span, targets=soft)
        )
        self.about: dict[str, Any] = {
            "caches": [cache.digest for cache in self._both],
            "layout": options.layout,
            "select": options.select,
            "tokenizer": self.first.spec.tokenizer,
            "teachers": [list(cache.notes.get("teachers", ())) for cache in self._both],
        }

    @property
    def _both(self) -> tuple[Cache, Cache]:
        return self.first, self.second

    def _apart(self, what: str) -> UsageError:
        return UsageError(
            f"{self.first.url} and {self.second.url} have {what}, expected rows that belong "
            "together one by one. Build both from the same records with the same options."
        )

    def pair(self, span: int, soft: bool = False) -> tuple[ShardData, ShardData]:
        """A shard of the first cache that has rows, and the same rows of the second."""
        begin, end = self.starts[span : span + 2].tolist()
        low = int(np.searchsorted(self._others, begin, "right")) - 1
        high = int(np.searchsorted(self._others, end, "left"))
        rows = ShardRows([self._read(i, soft) for i in range(low, high)], soft=soft)
        there = np.arange(begin, end) - self._others[low]
        return self.first.read(span, targets=soft), rows.take(there)

    @property
    def spans(self) -> list[int]:
        """Shards of the first cache that have rows."""
        return [int(span) for span in np.flatnonzero(np.diff(self.starts))]

    def write(self, span: int, path: Path) -> None:
        """Write the file of a shard, whole."""
        table = self.table(span) if span in self.spans else self.schema.empty_table()
        table = table.replace_schema_metadata({"kdcache": json.dumps(self.about)})
        with whole_file(path) as file:
            pq.write_table(table, file, compression="zstd")

    schema: pa.Schema
    positions: int

    def table(self, span: int) -> pa.Table:
        """The rows of a shard that has some."""
        raise NotImplementedError

    def measure(self, folder: Path) -> None:
        """Look at all rows before the first file is written into the folder."""
        raise NotImplementedError


_IDS = pa.list_(pa.int32())


class PairWriter(TwoCaches):
    """Preference pairs with the columns of TRL's `DPOTrainer`."""

    schema = pa.schema(
        {
            **dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), _IDS),
            **dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), pa.float32()),
        }
    )

    def __init__(self, options: ExportOptions) -> None:
        """See `TwoCaches`."""
        super().__init__(options)
        one, other = (cache.spec for cache in self._both)
        if _reference(one) != _reference(other):
            raise self._apart("different teachers")
        if "concat" in (one.packing, other.packing) or "split" in (one.packing, other.packing):
            raise self._apart("rows that are not one record each")
        self.positions = sum(cache.manifest.positions for cache in self._both)
        # Targets are read where the sums are of logits: of older caches, if both have them.
        kept = [cache.spec.answer_logprob for cache in self._both]
        self._soft = not all(kept) and all(map(_exact, self._both))

    def measure(self, folder: Path) -> None:
        """See `TwoCaches.measure`: prompts must be the same, and each answer possible."""
        for span in self.spans:
            both, first = self.pair(span), int(self.starts[span])
            sides = [list(map(_answer, *_rows(data))) for data in both]
            for row, (one, other) in enumerate(zip(*sides, strict=True), first):
                if not np.array_equal(one[0], other[0]):
                    raise self._apart(f"different prompts in row {row} (do they end with a token?)")
            for cache, data in zip(self._both, both, strict=True):
                if data.starts is not None and int(data.starts.sum()) > len(data):
                    raise self._apart("documents that do not see each other in one row")
                sums = _sums(data, _coded)
                if np.isinf(sums).any():
                    row = first + int(np.isinf(sums).argmax())
                    raise UsageError(
                        f"{cache.url}: its teacher gives the answer in row {row} no probability, "
                        "so the pair has no reference. Leave the record out of both."
                    )

    def table(self, span: int) -> pa.Table:
        """See `TwoCaches.table`."""
        sides = []
        for data in self.pair(span, self._soft):
            prompts, answers = zip(*map(_answer, *_rows(data)), strict=True)
            sides.append((prompts, answers, _sums(data, _logprobs)))
        (prompts, chosen, chosen_logps), (_, rejected, rejected_logps) = sides
        return _table(self.schema, prompts, chosen, rejected, chosen_logps, rejected_logps)


def _table(schema: pa.Schema, *columns: Any) -> pa.Table:
    arrays = [pa.array(c, kind) for c, kind in zip(columns, schema.types, strict=True)]
    return pa.table(arrays, schema=schema)


def _reference(spec: CacheSpec) -> tuple[Any, ...]:
    """What decides the log-probabilities of a cache's teachers."""
    quantization = (spec.engine or {}).get("quantization")
    return spec.teachers, spec.ensemble, spec.dtype, quantization


def _exact(cache: Cache) -> bool:
    """Whether its targets give the labels' log-probabilities at T = 1 better than their codes."""
    codec = cache.codec()
    return codec.keeps_logits and (codec.any_temperature or 1.0 in codec.temperatures)


def _rows(data: ShardData) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ids and labels of each row."""
    ids, labels = (np.split(v, data.offsets[1:-1]) for v in (data.input_ids, data.labels))
    return ids, labels


def _answer(ids: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a row's prompt and of its answer, whose last one is a label alone."""
    there = np.flatnonzero(labels != IGNORE)
    gaps = np.flatnonzero(np.diff(there) > 1)
    begin = int(there[gaps[-1] + 1 if len(gaps) else 0]) + 1
    every = np.append(ids[: there[-1] + 1], labels[there[-1]])
    return every[:begin], every[begin:]


def _sums(data: ShardData, logprobs: Callable[[ShardData], Floats]) -> Floats:
    """The log-probability of each row's answer: as it is kept, or of those of all labels."""
    if data.answer_logprob is not None:
        return data.answer_logprob.astype(np.float64)
    return answer_sums(data.labels, data.offsets, logprobs(data))


def _coded(data: ShardData) -> Floats:
    assert data.label_logprob is not None, "the spec says so"
    return decode_logprobs(data.label_logprob).astype(np.float64)


def _logprobs(data: ShardData) -> Floats:
    """The teacher's log-probability of each label at T = 1; any number of one that has none."""
    if not len(data.targets):
        return _coded(data)
    labels = data.labels[data.labels != IGNORE].astype(np.int64)
    step = max(1, _ENTRIES // data.targets.codec.vocab_size)
    found = []
    for at in range(0, len(labels), step):
        some = np.arange(at, min(at + step, len(labels)))
        targets = with_logits(data.targets.take(some).at(1.0))
        assert isinstance(targets, DenseTargets), "see _exact"
        logprobs = targets.logits.double().log_softmax(-1).numpy()
        found.append(logprobs[some - at, np.minimum(labels[some], logprobs.shape[1] - 1)])
    return np.concatenate(found)


class DocumentWriter(TwoCaches):
    """Documents, with how far two teachers differ about them."""

    schema = pa.schema(
        {
            "row": pa.int64(),
            "input_ids": _IDS,
            "labels": _IDS,
            "text": pa.string(),
            **dict.fromkeys(("logprob", "other_logprob", "difference"), pa.float32()),
        }
    )

    def __init__(self, options: ExportOptions) -> None:
        """See `TwoCaches`."""
        super().__init__(options)
        self.about["labels"] = "next"
        self.share, self.positions = options.select, self.first.manifest.positions
        self._tokenizer = self.first.tokenizer()

    def table(self, span: int) -> pa.Table:
        """See `TwoCaches.table`."""
        one = self._compare(span)
        number = self._begins[span] + np.arange(len(one.row))
        least, last = self._least
        chosen = (one.difference > least) | ((one.difference == least) & (number <= last))
        picked = np.flatnonzero(chosen)
        ids, labels = one.cut(one.data.input_ids, picked), one.cut(one.data.labels, picked)
        means = (values[picked] for values in (*one.means, one.difference))
        return _table(self.schema, one.row[picked], ids, labels, list(map(self._text, ids)), *means)

    def measure(self, folder: Path) -> None:
        """Compare all documents, and find the smallest difference that is written."""
        self._begins = np.zeros(len(self.starts), np.int64)
        ends: list[list[_End]] = [[], []]
        with tempfile.TemporaryFile(dir=folder) as plain, tempfile.TemporaryFile(dir=folder) as own:
            for span in self.spans:
                some = self._compare(span)
                for file in (plain, own):
                    file.write(some.difference.tobytes())
                first = int(self._begins[span])
                self._begins[span + 1 :] = first + len(some.row)
                for end, sign in zip(ends, (-1, 1), strict=True):
                    known = [*end, *some.outermost(sign, first)]
                    end[:] = heapq.nlargest(_EXTREMES, known, key=lambda one: one[:2])
            if not self._begins[-1]:
                raise UsageError(f"{self.first.url} has no document with a label to compare.")
            ordered = _mapped(own)
            ordered.sort()
            self._least = self._threshold(_mapped(plain), ordered)
            at = [round(share * (len(ordered) - 1)) for share in _SHARES]
            quantiles = tuple(zip(_SHARES, ordered[at].tolist(), strict=True))
            lowest, highest = (
                tuple(Extreme(row, sign * value, self._text(ids)) for value, _, row, ids in end)
                for end, sign in zip(ends, (-1, 1), strict=True)
            )
            mean = float(ordered.mean())
            self.differences = Differences(len(ordered), mean, quantiles, lowest, highest)

    def _threshold(self, values: Floats, ordered: Floats) -> tuple[float, int]:
        """The smallest difference that is written, and the last document of that difference."""
        count = share_of(len(values), 1.0 if self.share is None else self.share)
        least = float(ordered[-count])
        equal = count - (len(values) - int(np.searchsorted(ordered, least, "right")))
        for begin in range(0, len(values), _DOCUMENTS):
            there = begin + np.flatnonzero(values[begin : begin + _DOCUMENTS] == least)
            if equal <= len(there):
                return least, int(there[equal - 1])
            equal -= len(there)
        raise AssertionError("the smallest one is among them")

    def _compare(self, span: int) -> _Compared:
        """The documents of a shard that have a label, beside the other teacher's."""
        data = one, other = self.pair(span)
        names = ("offsets", "input_ids", "labels", "starts")
        if not all(np.array_equal(*(getattr(side, name) for side in data)) for name in names):
            begin, end = self.starts[span : span + 2].tolist()
            raise self._apart(f"different ids or labels among the rows {begin} to {end - 1}")
        rows, one, other = one.offsets, *map(by_document, data)
        codes = [np.asarray(side.label_logprob).astype(np.int64) for side in (one, other)]
        known = np.logical_and(*(code != IMPOSSIBLE for code in codes))
        labels, *nats = (
            np.diff(np.append(0, np.cumsum(values * known))[one.position_offsets])
            for values in (np.ones_like(known), *(code**2 for code in codes))
        )
        there = np.flatnonzero(labels)
        own, others = (-sums[there] / SCALE / labels[there] for sums in nats)
        row = np.searchsorted(rows, one.offsets[there], "right") - 1 + self.starts[span]
        difference = (nats[1] - nats[0])[there] / SCALE / labels[there]
        return _Compared(one, there, row, (own, others), difference)

    def _text(self, ids: np.ndarray) -> str:
        return str(self._tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))


# Of a document at an end: difference times sign, minus its number, row and ids.
_End: TypeAlias = tuple[float, int, int, np.ndarray]


@dataclass(frozen=True)
class _Compared:
    """Documents of a shard.

    Attributes:
        data: the shard, by document.
        there: int64 [n], which of its documents have a label.
        row: int64 [n], the row of the cache that each is in.
        means: float64 [n] each, the two teachers' log-probabilities.
        difference: float64 [n], of the two.
    """

    data: ShardData
    there: np.ndarray
    row: np.ndarray
    means: tuple[Floats, Floats]
    difference: Floats

    def cut(self, values: np.ndarray, some: np.ndarray) -> list[np.ndarray]:
        """The values of some documents, of those of all tokens."""
        offsets = self.data.offsets
        return [values[offsets[i] : offsets[i + 1]] for i in self.there[some].tolist()]

    def outermost(self, sign: int, first: int) -> Iterator[_End]:
        """Its documents with the largest difference times sign; `first` is the number of one."""
        some = np.argsort(-sign * self.difference, kind="stable")[:_EXTREMES]
        for i, ids in zip(some.tolist(), self.cut(self.data.input_ids, some), strict=True):
            yield sign * float(self.difference[i]), -first - i, int(self.row[i]), ids


def _mapped(file: BinaryIO) -> Floats:
    file.flush()
    return np.memmap(file, np.float64, "r+")
