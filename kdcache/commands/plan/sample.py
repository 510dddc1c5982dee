"""Rows from all over a corpus, and an estimate of the corpus's size in positions.

Evenly spaced spans of the corpus are sampled (`kdcache.corpus.sample`) and their records are
encoded as in a build. Positions per stored byte of what was encoded, times the bytes of all files,
is the size of the corpus in positions. Where corpora have names, each is estimated by itself.

The estimate is close for uncompressed files. For compressed ones the sample's compression ratio
stands for all, and a sample compresses a little worse than its whole file.

Cost: a few thousand records are read.
Guarantee: the same corpus and options give the same rows.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kdcache.corpus import Corpus, LineAt, Record, SpanSample, sample_records, sample_spans
from kdcache.corpus.corpus import open_span
from kdcache.errors import UsageError
from kdcache.rows import Row, RowSpec, make_encoder

_CHARACTERS_A_TOKEN = 6  # more than most scripts have, so that a full row comes out
_ALL = 1 << 62
_READ = 4096  # records of all spans, more only where more rows are wanted


@dataclass(frozen=True)
class DomainEstimate:
    """A named corpus, and about how large it is.

    Attributes:
        positions: about so many.
        filtered: about the share of records that filters leave out; None where there are none.
    """

    name: str
    files: int
    bytes: int
    spans: int
    positions: int
    filtered: float | None = None


@dataclass
class _Domain:
    """What was read of a domain.

    Attributes:
        unfiltered: records of its files that those read stand for, before filters.
        positions: in all rows of these records.
        stored: bytes that the records take in their files.
        looked: bytes of the spans that were looked into.
        kept: of these, in proportion to the records that filters keep.
        empty: of these, in spans of which filters keep nothing.
    """

    unfiltered: float = 0.0
    positions: int = 0
    stored: float = 0.0
    looked: float = 0.0
    kept: float = 0.0
    empty: float = 0.0

    @property
    def filtered(self) -> float:
        """Share of records that filters leave out."""
        return 1 - self.kept / self.looked if self.looked else 0.0


@dataclass
class CorpusSample:
    """Some rows of a corpus, their origin, and the estimated size of the whole.

    Attributes:
        origins: span, and number of the row in it, of each.
        records: read for it; more than the rows need, where a row is a small part of a record.
        corpus_positions: estimate of the positions in the whole corpus.
        filtered: about the share of records that filters leave out; None where there are none.
        domains: the same of each domain, where corpora have names.
    """

    rows: list[Row] = field(default_factory=list)
    origins: list[tuple[int, int]] = field(default_factory=list)
    records: int = 0
    corpus_positions: int = 0
    filtered: float | None = None
    domains: tuple[DomainEstimate, ...] = ()


def sample_rows(corpus: Corpus, spec: RowSpec, tokenizer: Any, rows: int) -> CorpusSample:
    """Take about `rows` rows, spread over the corpus.

    Args:
        rows: how many are wanted; there are fewer only where the corpus has fewer.

    Raises:
        UsageError: no row could be made, or a record cannot be read.
    """
    sample = CorpusSample()
    read: dict[str | None, _Domain] = {}
    places = sample_spans(corpus, rows)
    for done, span in enumerate(places):
        # Samples that are short of rows leave theirs to the following ones.
        wanted = -(-(rows - len(sample.rows)) // (len(places) - done))
        part = sample_records(
            span,
            columns=spec.columns,
            on_error=spec.on_error,
            read=max(wanted, _READ // len(places)),
            records=wanted,
            characters=wanted * spec.max_length * _CHARACTERS_A_TOKEN,
        )
        found = list(make_encoder(spec, tokenizer).encode(part.records, span=span.index))
        domain = read.setdefault(span.file.domain, _Domain())
        domain.positions += sum(len(row.positions(spec.task)) for row in found)
        sample.records += len(part.records)
        domain.unfiltered += len(part.records) / (part.passed or 1)
        domain.stored += _stored(part)
        if part.read + part.filtered:
            size = (span.stop - span.start) / span.parts
            domain.looked += size
            domain.kept += size * part.passed
            domain.empty += size * (not part.read)
        chosen = np.linspace(0, len(found), min(wanted, len(found)), endpoint=False).astype(int)
        sample.rows += [found[i] for i in chosen]
        sample.origins += [(span.index, int(i)) for i in chosen]
    if not sample.rows:
        raise UsageError(
            "no row could be made of the first records of the corpus: nothing to plan with. Look "
            "at its text column and at --filter, or name another --corpus."
        )
    estimates = {name: _estimate(corpus, name, domain) for name, domain in read.items()}
    sample.corpus_positions = sum(estimate.positions for estimate in estimates.values())
    if corpus.settings.get("filters"):
        sizes = {name: estimate.bytes for name, estimate in estimates.items()}
        left_out = sum(domain.filtered * sizes[name] for name, domain in read.items())
        sample.filtered = left_out / max(1, sum(sizes.values()))
    names = dict.fromkeys(str(stretch["name"]) for stretch in corpus.domains)
    sample.domains = tuple(estimates[name] for name in names)
    return sample


def _estimate(corpus: Corpus, name: str | None, read: _Domain) -> DomainEstimate:
    """How large a domain is, by what was read of it."""
    files = [file for file in corpus.files if file.domain == name]
    size = sum(file.size for file in files)
    positions = read.positions * size / max(read.stored, 1)
    positions *= 1 - read.empty / max(read.looked, 1)
    if corpus.settings["limit"] is not None and read.unfiltered:
        # Filters come after the limit.
        positions = min(positions, corpus.settings["limit"] * read.positions / read.unfiltered)
    spans = sum(stretch["spans"] for stretch in corpus.domains if stretch["name"] == name)
    # What was read is certain.
    positions = max(round(positions), read.positions)
    filtered = read.filtered if corpus.settings.get("filters") else None
    return DomainEstimate(name or "", len(files), size, spans, positions, filtered)


def _stored(part: SpanSample) -> float:
    """Bytes that these records take in their file; guessed where it is compressed."""
    span, records = part.span, part.records
    if not records:
        return 0.0
    if span.file.kind in ("parquet", "arrow", "bin"):
        with open_span(span) as reader:
            total = reader.size(_ALL)[0]
        # Records of a period may all be short: their characters count, not their number.
        share = part.characters * part.read / max(part.read_characters, 1)
        return span.file.size * share / max(total * part.passed, 1)
    first, last = records[0].location, records[-1].location
    if isinstance(first, LineAt) and isinstance(last, LineAt) and part.between:
        return (last.offset - first.offset) / part.between * part.characters
    plain = "".join(_line(span.file.kind, record) for record in records).encode()
    size = len(zlib.compress(plain)) if span.file.compression else len(plain)
    return size / part.passed  # those that filters leave out are taken to be as long


def _line(kind: str, record: Record) -> str:
    if kind == "jsonl":
        return json.dumps(record.values, ensure_ascii=False) + "\n"
    return "\t".join(str(value) for value in record.values.values()) + "\n"
