"""A few records from all over a corpus, for decisions made before it is read whole.

Algorithm: evenly spaced spans are sampled, and the first of each domain that has none. A file that
cannot be entered in the middle is sampled once, however many of its spans are chosen, since they
all begin at its first records. From the first records of a span every n-th is kept; n doubles each
time twice as many are kept as are needed, so they are evenly spaced however long the span is.

Cost: for each span, a bounded number of records read, and twice the needed number held.
Guarantee: the same corpus and numbers give the same records.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from kdcache.corpus.corpus import Corpus
from kdcache.corpus.formats import Span
from kdcache.corpus.records import ReadStats, Record
from kdcache.tasks import OnError

_CHARACTERS_AN_ID = 4


@dataclass(frozen=True)
class SpanSample:
    """Some records of one span of a corpus.

    Attributes:
        span: where from; a whole file, if it cannot be entered in the middle.
        records: evenly spaced among those that were read.
        stride: each of them represents so many.
        between: characters of all records from the first of them up to the last one.
        passed: share of the file's records that the corpus's filters keep, as far as it was read.
        filtered: records that the filters left out on the way.
    """

    span: Span
    records: Sequence[Record]
    stride: int
    characters: int
    between: int
    read: int
    read_characters: int
    passed: float = 1.0
    filtered: int = 0


def sample_spans(corpus: Corpus, most: int) -> list[Span]:
    """Evenly spaced spans to sample, `most` or one of each domain, in corpus order."""
    chosen: dict[tuple[str, int], Span] = {}
    count = min(most, len(corpus.spans))
    even = np.linspace(0, len(corpus.spans), count, endpoint=False).astype(int)
    for index in _of_every_domain(corpus, even.tolist()):
        span = corpus.spans[index]
        if span.file.sequential or span.group:
            span = replace(span, part=0, parts=1)
        chosen.setdefault((span.file.url, span.start), span)
    return list(chosen.values())


def _of_every_domain(corpus: Corpus, spans: Sequence[int]) -> list[int]:
    """Spans, and the first one of each domain that has none among them."""
    met = {corpus.spans[span].file.domain for span in spans}
    added, first = [], 0
    for stretch in corpus.domains:
        if stretch["name"] not in met:
            met.add(stretch["name"])
            added.append(first)
        first += stretch["spans"]
    return sorted([*spans, *added])


def sample_records(
    span: Span,
    *,
    columns: Sequence[str] | None,
    on_error: OnError,
    read: int,
    records: int,
    characters: int = 0,
) -> SpanSample:
    """Take evenly spaced records from the first `read` of a span.

    Args:
        read: records that are read at most.
        records: how many are wanted, at least, if there are so many; up to twice as many come.
        characters: how many are wanted in them, at least.

    Raises:
        UsageError: a record cannot be read.
    """
    stats = ReadStats()
    found = Corpus.read(span, columns=columns, on_error=on_error, stats=stats)
    sample = _evenly(span, islice(found, read), records, characters)
    passed = stats.records / max(1, stats.records + stats.filtered)
    return replace(sample, passed=passed, filtered=stats.filtered)


def _evenly(span: Span, found: Iterable[Record], records: int, characters: int) -> SpanSample:
    kept: list[tuple[Record, int]] = []  # with the characters before it
    stride, held, before, number = 1, 0, 0, -1
    for number, record in enumerate(found):
        size = length(record)
        if number % stride == 0:
            kept.append((record, before))
            held += size
        before += size
        while len(kept) >= 2 * records and held >= 2 * characters:
            kept = kept[::2]
            stride, held = 2 * stride, sum(length(record) for record, _ in kept)
    between = kept[-1][1] - kept[0][1] if kept else 0
    return SpanSample(
        span, [record for record, _ in kept], stride, held, between, number + 1, before
    )


def length(record: Record) -> int:
    """Characters of a record's values."""
    return sum(map(_length, record.values.values()))


def _length(value: object) -> int:
    if isinstance(value, np.ndarray):  # of ids: about as many characters as their text
        return _CHARACTERS_AN_ID * len(value)
    if isinstance(value, list) and value and isinstance(value[0], np.ndarray):
        return sum(map(_length, value))
    return len(value if isinstance(value, str) else repr(value))


def shortened(records: Iterable[Record], characters: int) -> Iterator[Record]:
    """The records with no text, and no array of ids, longer than so many characters."""
    for record in records:
        values = {
            name: value[:characters]
            if isinstance(value, str)
            else value[: characters // _CHARACTERS_AN_ID]
            if isinstance(value, np.ndarray)
            else value
            for name, value in record.values.items()
        }
        yield replace(record, values=values, cut=True)
