"""Spans: cutting files into units of work, and reading one unit.

Cost and guarantee: see `kdcache.corpus`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any, overload

from kdcache.corpus import files as input_files
from kdcache.corpus.files import LINE_KINDS, InputFile, is_dealt
from kdcache.corpus.formats import (
    DECOMPRESSION_ERRORS,
    Raws,
    open_span,
    parse,
    table_size,
)
from kdcache.corpus.records import LineAt, OnError, ReadStats, Record, RecordError
from kdcache.errors import UsageError

# Each part of a dealt file decompresses all of it; so often, that costs less than a teacher's pass.
MAX_PARTS = 128
_TYPICAL_RATIO = 3  # text to its gzip or zstd size, to guess parts without decompressing


@dataclass(frozen=True, slots=True)
class Span:
    """A unit of work: a stretch of one file, which becomes exactly one shard.

    Attributes:
        index: Its place among the corpus's spans.
        file: Absolute path or URL.
        kind: `jsonl`, `txt`, `csv`, `tsv`, `parquet` or `arrow`.
        start: First byte; the span owns the lines that start in [start, stop). 0 where parts count.
        stop: Byte after the last; the file's size where parts count.
        part: Which of `parts` of a table or of a file that can't be cut by bytes.
        parts: 1 for files cut by bytes.
        limit: If not None, only the first `limit` records of [start, stop), before parts are
            dealt.
        compression: `""`, `gz` or `zst`.
        columns: Names of a headerless table's columns; None means that the first line names them.
    """

    index: int
    file: str
    kind: str
    start: int
    stop: int
    part: int = 0
    parts: int = 1
    limit: int | None = None
    compression: str = ""
    columns: tuple[str, ...] | None = None

    @property
    def records(self) -> str:
        """Where its records are, for a person who looks for them."""
        if _by_parts(self):
            which = f"every {self.parts}th record from record {self.part + 1} on"
        elif self.kind in LINE_KINDS:
            which = f"the lines that start in bytes {self.start}-{self.stop}"
        else:
            which = f"rows: stretch {self.part + 1} of {self.parts} even ones"
        within = "" if self.limit is None else f", of the first {self.limit}"
        return f"{self.file}: {which}{within}"

    def to_dict(self) -> dict[str, Any]:
        """The span as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Span:
        """The span that `to_dict` wrote."""
        columns = values.get("columns")
        return cls(**{**values, "columns": None if columns is None else tuple(columns)})


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one file is cut.

    `cuts` even stretches, of which the first `spans` are in the corpus (all, unless a limit ends it
    earlier). `limit` is `Span`'s: of the last span of a file cut by bytes, of every span of others.
    """

    file: InputFile
    cuts: int
    spans: int
    limit: int | None = None

    def span(self, index: int, k: int, columns: tuple[str, ...] | None) -> Span:
        file = self.file
        if _by_bytes(file):
            start, stop = (file.size * cut // self.cuts for cut in (k, k + 1))
            limit = self.limit if k == self.spans - 1 else None
            return Span(index, file.url, file.kind, start, stop, limit=limit, columns=columns)
        return Span(
            index,
            file.url,
            file.kind,
            0,
            file.size,
            k,
            self.spans,
            self.limit,
            file.compression,
            columns,
        )


class Spans(Sequence[Span]):
    """The spans of a corpus in order, made on demand: memory is O(files)."""

    def __init__(self, plans: Sequence[_Plan], columns: tuple[str, ...] | None) -> None:
        self._plans = [plan for plan in plans if plan.spans]
        self._ends = list(accumulate(plan.spans for plan in self._plans))
        self._columns = columns

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Span: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Span]: ...
    def __getitem__(self, index: int | slice) -> Span | Sequence[Span]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"span {index} of {len(self)}")
        index %= len(self)
        which = bisect_right(self._ends, index)
        before = self._ends[which - 1] if which else 0
        return self._plans[which].span(index, index - before, self._columns)


@dataclass(frozen=True)
class Corpus:
    """Ordered input files, cut into spans. Made by `Corpus.open`.

    Attributes:
        files: The files, in order, those behind a limit left out.
        spans: Units of work, in order; indexable, made lazily.
        settings: The options that decide the spans and their records, JSON-able, for a fingerprint;
            `span_bytes` as the number it came to.
    """

    files: Sequence[InputFile]
    spans: Sequence[Span]
    settings: dict[str, Any]

    @classmethod
    def open(
        cls,
        patterns: Sequence[str],
        *,
        span_bytes: int | Callable[[int], int],
        limit: int | None = None,
        format: str = "auto",
        columns: Sequence[str] | None = None,
    ) -> Corpus:
        """Find the files and plan their spans.

        Args:
            patterns: Files, folders (recursive), globs (`**` too) or fsspec URLs of these; a file
                that several name counts once.
            span_bytes: Bytes of input that a span aims at (compressed files: of their text,
                guessed), or a function that says them by the bytes of all files.
            limit: Only the first so many records. Planning then reads the corpus up to there.
            format: `auto` goes by the extension; else the kind of all files (`jsonl`, `txt`,
                `csv`, `tsv`, `parquet`, `arrow`).
            columns: Names of the columns of CSV and TSV files *without* a header line; for `.txt`
                one name instead of `text`.

        Returns:
            The corpus.

        Raises:
            UsageError: Nothing found, nothing in it, unknown format or options that can't be.
        """
        if limit is not None and limit < 1:
            raise UsageError(
                f"--limit is {limit}; it must be 1 or more (leave it out to read all)."
            )
        named = None if columns is None else _checked_columns(columns)
        files = input_files.expand(patterns, format)
        if not any(file.size for file in files):
            raise UsageError(
                f"--corpus {' '.join(patterns)}: the corpus is empty ({len(files)} files of 0 "
                f"bytes). Name files with records in them."
            )
        if named and not any(file.kind in ("csv", "tsv", "txt") for file in files):
            raise UsageError(
                f"--columns names the columns of headerless CSV and TSV; {files[0].url} is "
                f"{files[0].kind} and has its own. Leave --columns out."
            )
        if callable(span_bytes):
            span_bytes = span_bytes(sum(file.size for file in files))
        if span_bytes < 1:
            raise UsageError(f"span_bytes is {span_bytes}; it must be 1 or more.")
        plans = [_plan(file, span_bytes) for file in files]
        if limit is not None:
            records, plans = _limited(plans, span_bytes, limit, named)
            if not records:
                raise UsageError(
                    f"--corpus {' '.join(patterns)}: no records. Name files that have some."
                )
        settings = {
            "span_bytes": span_bytes,
            "limit": limit,
            "format": format,
            "columns": None if named is None else list(named),
        }
        return cls([plan.file for plan in plans], Spans(plans, named), settings)

    def identity(self) -> list[dict[str, Any]]:
        """What the corpus is, file by file, independent of its location.

        Returns:
            Per file `name` (below the files' nearest common folder), `size` in bytes, `kind`
            (such as `jsonl.gz`) and `tag` (SHA-256 of the first and last 64 KiB, 32 hex
            digits).
        """
        names = input_files.names(self.files)
        return [
            {"name": name, "size": file.size, "kind": _full_kind(file), "tag": tag}
            for name, file, tag in zip(names, self.files, input_files.tags(self.files), strict=True)
        ]

    @staticmethod
    def read(
        span: Span,
        *,
        columns: Sequence[str] | None = None,
        on_error: OnError = "fail",
        stats: ReadStats | None = None,
    ) -> Iterator[Record]:
        """Read a span's records; needs nothing but the span, so any worker can.

        Args:
            span: What to read.
            columns: Columns that the caller will look at: tables (Parquet, Arrow) are read in these
                only. Missing names are not an error here (`Record.missing` makes one).
            on_error: What a record that can't be read does: `fail` or be `skip`-ped and
                counted.
            stats: Where to count.

        Yields:
            The records in file order.

        Raises:
            UsageError: A bad record with `on_error="fail"`, or a file that can't be opened.
        """
        stats = ReadStats() if stats is None else stats
        source, rows = open_span(span, columns)
        if _by_parts(span):
            rows = _dealt(rows, span)
        elif span.limit is not None and span.parts == 1:
            rows = _first(rows, span.limit)
        location: str | LineAt = "start"
        try:
            with closing(rows):
                for location, payload in rows:
                    try:
                        values = parse(payload, span.kind, source)
                    except RecordError as problem:
                        stats.reject(on_error, span.file, location, problem)
                        continue
                    stats.records += 1
                    yield Record(values, span.file, location, source)
        except DECOMPRESSION_ERRORS as error:
            if not span.compression:
                raise
            cause = f"the {span.compression} stream is cut short or damaged after this ({error})"
            # Every part comes by here; the first counts it.
            stats.reject(on_error, span.file, location, cause, count=int(span.part == 0))


def _by_bytes(file: InputFile) -> bool:
    return file.kind in LINE_KINDS and not is_dealt(file.kind, file.compression)


def _by_parts(span: Span) -> bool:
    return is_dealt(span.kind, span.compression)


def _first(rows: Raws, limit: int) -> Raws:
    for _, row in zip(range(limit), rows, strict=False):
        yield row


def _dealt(rows: Raws, span: Span) -> Raws:
    if span.limit is not None:
        rows = _first(rows, span.limit)
    return (row for i, row in enumerate(rows) if i % span.parts == span.part)


def _full_kind(file: InputFile) -> str:
    return f"{file.kind}.{file.compression}" if file.compression else file.kind


def _checked_columns(columns: Sequence[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in columns)
    if not names or not all(names) or len(set(names)) < len(names):
        raise UsageError(
            f"--columns is {','.join(columns)!r}; expected different names, such as text,label."
        )
    return names


def _plan(file: InputFile, span_bytes: int) -> _Plan:
    if not file.size:
        return _Plan(file, 1, 0)
    if not is_dealt(file.kind, file.compression):
        cuts = math.ceil(file.size / span_bytes)
    else:
        size = file.size * (_TYPICAL_RATIO if file.compression else 1)
        cuts = min(math.ceil(size / span_bytes), MAX_PARTS)
    return _Plan(file, cuts, cuts)


def _limited(
    plans: Sequence[_Plan], span_bytes: int, limit: int, columns: tuple[str, ...] | None
) -> tuple[int, list[_Plan]]:
    """How many records there are up to `limit`, and the plans of the files that hold these."""
    kept = []
    left = limit
    for plan in plans:
        if plan.spans:
            records, plan = _count(plan, left, span_bytes, columns)
            left -= records
        kept.append(plan)
        if not left:
            break
    return limit - left, kept


def _count(
    plan: _Plan, left: int, span_bytes: int, columns: tuple[str, ...] | None
) -> tuple[int, _Plan]:
    """Count a file's records up to `left`; the plan comes back cut if that many are there."""
    file = plan.file
    whole = replace(_Plan(file, 1, 1).span(0, 0, columns), limit=left)
    if _by_bytes(file):
        return _count_lines(plan, whole, left)
    records, size = table_size(whole) if file.kind not in LINE_KINDS else _dealt_size(whole, left)
    if records < left:
        return records, plan
    # What is behind the limit is never read: parts go by what is before it.
    parts = min(max(math.ceil(size / span_bytes), 1), plan.spans)
    return records, replace(plan, spans=parts, limit=left)


def _count_lines(plan: _Plan, whole: Span, left: int) -> tuple[int, _Plan]:
    seen = in_last = last = 0
    for location, _ in _first(open_span(whole, None)[1], left):
        assert isinstance(location, LineAt)
        while plan.span(0, last, None).stop <= location.offset:
            last, in_last = last + 1, 0
        in_last += 1
        seen += 1
    if seen < left:
        return seen, plan
    return seen, replace(plan, spans=last + 1, limit=in_last)


def _dealt_size(whole: Span, left: int) -> tuple[int, int]:
    """Records of a dealt file up to `left`, and the bytes (CSV: characters) of these."""
    seen = size = 0
    try:
        for _, payload in _first(open_span(whole, None)[1], left):
            seen += 1
            if isinstance(payload, bytes):
                size += len(payload)
            elif isinstance(payload, list):
                size += sum(map(len, payload))
    except DECOMPRESSION_ERRORS:
        # Reading meets the same damage, and says so or skips what is behind it.
        if not whole.compression:
            raise
    return seen, size
