"""Spans: cutting files into units of work, and reading one unit.

Cost and guarantee: see `kdcache.corpus`.
"""

from __future__ import annotations

import importlib
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any, overload

from kdcache.corpus.files import (
    LINE_KINDS,
    InputFile,
    check_all_unchanged,
    check_unchanged,
    names,
    tags,
)
from kdcache.corpus.formats import Format, Reading, Span
from kdcache.corpus.listing import expand
from kdcache.corpus.records import (
    LineAt,
    Location,
    ReadStats,
    Record,
    RecordError,
    parse_filters,
    passes,
)
from kdcache.corpus.text import TextFiles
from kdcache.domains import Named
from kdcache.errors import UsageError, doing
from kdcache.humanize import counted
from kdcache.storage import redact
from kdcache.tasks import MAX_RECORD_BYTES, Documents, OnError

# Module and class of each format, which are loaded when one of its files is read.
_FORMATS = {
    "jsonl": ("text", "JsonLines"),
    "csv": ("text", "Csv"),
    "tsv": ("text", "Tsv"),
    "conll": ("text", "Conll"),
    "conllu": ("text", "ConllU"),
    "parquet": ("tables", "Parquet"),
    "arrow": ("tables", "Arrow"),
    "bin": ("tables", "IndexedIds"),
    "txt file": ("text", "TextFiles"),
    "txt paragraph": ("text", "TextParagraphs"),
    "txt line": ("text", "TextLines"),
}
# Where a file cannot be split (no disk), each part reads all of it.
MAX_PARTS = 128
_TYPICAL_RATIO = 3  # text to its gzip or zstd size, to guess parts without decompressing


@dataclass(frozen=True, slots=True)
class _FileCuts:
    """How one file is cut.

    `cuts` even stretches, of which the first `spans` are in the corpus (all, unless a limit ends it
    earlier). `limit` is `Span`'s: of the last span of a file cut by bytes, of every span of others.
    """

    file: InputFile
    cuts: int
    spans: int
    limit: int | None = None

    def span(self, index: int, k: int, reading: Reading) -> Span:
        file = self.file
        if _by_bytes(file):
            start, stop = (file.size * cut // self.cuts for cut in (k, k + 1))
            limit = self.limit if k == self.spans - 1 else None
            return Span(index, file, start, stop, limit=limit, reading=reading)
        return Span(index, file, 0, file.size, k, self.spans, self.limit, reading)


class Spans(Sequence[Span]):
    """The spans of a corpus in order, made on demand: memory is O(files)."""

    def __init__(self, plans: Sequence[_FileCuts], reading: Reading) -> None:
        self._plans = [plan for plan in plans if plan.spans]
        self._ends = list(accumulate(plan.spans for plan in self._plans))
        self._reading = reading

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
        return self._plans[which].span(index, index - before, self._reading)


@dataclass(frozen=True)
class Corpus:
    """Ordered input files, cut into spans. Made by `Corpus.open`.

    Attributes:
        files: The files, in order, those behind a limit left out.
        spans: Units of work, in order; indexable, made lazily.
        domains: Where corpora have names: `name` and number of `spans` of each stretch of spans,
            in order. A name may have several.
        settings: The options that decide the spans and their records, JSON-able, for a fingerprint;
            `span_bytes` as the number it came to.
    """

    files: Sequence[InputFile]
    spans: Sequence[Span]
    settings: dict[str, Any]
    domains: Sequence[dict[str, Any]] = ()

    @classmethod
    def open(
        cls,
        patterns: Sequence[str | Named],
        *,
        span_bytes: int | Callable[[int], int],
        limit: int | None = None,
        format: str = "auto",
        columns: Sequence[str] | None = None,
        documents: Documents = "file",
        delimiter: str = ",",
        max_record_bytes: int = MAX_RECORD_BYTES,
        split: str | None = None,
        filters: Sequence[str] = (),
        divide: bool = False,
    ) -> Corpus:
        """Find the files and plan their spans.

        Args:
            patterns: Files, folders (recursive), globs (`**` too) or fsspec URLs of these, all
                of them with names (see `kdcache.corpus.listing`) or none; a file that several name
                counts once.
            span_bytes: Bytes of input that a span aims at (compressed files: of their text,
                guessed), or a function that states them by the bytes of all files.
            limit: Only the first so many records, of each name, before any filter. Planning then
                reads the corpus up to there.
            format: `auto` goes by the extension; else the kind of all files (`jsonl`, `txt`,
                `csv`, `tsv`, `conll`, `conllu`, `parquet`, `arrow`).
            columns: Names of the columns of CSV and TSV files *without* a header line, and of those
                of CoNLL; for `.txt` one name instead of `text`. Or pairs `name=theirs`: columns of
                any files renamed.
            documents: What a record of a `.txt` file is: `file`, `paragraph` or `line`.
            split: Which split of folders and globs that hold several; `all` for every file.
            filters: Conditions `column=value`, of renamed columns by their new names; records for
                which they do not hold are left out.
            divide: Let text files that are longer than a span come in pieces, each a record that
                states whether a document begins or ends in it.

        Returns:
            The corpus.

        Raises:
            UsageError: Nothing found, nothing in it, unknown format or options that can't be.
        """
        if limit is not None and limit < 1:
            raise UsageError(
                f"--limit is {limit}; it must be 1 or more (leave it out to read all)."
            )
        given = None if columns is None else tuple(name.strip() for name in columns)
        renames = tuple(_pair(name) for name in given or () if "=" in name)
        if renames and len(renames) < len(given or ()):
            raise UsageError(
                f"--columns is {','.join(given or ())!r}; expected names alone (of files without a "
                "header) or renamed ones alone, such as text=body,label=class."
            )
        named = None if renames else given
        reading = Reading(
            named, documents, delimiter, max_record_bytes, renames, parse_filters(filters)
        )
        files = expand(patterns, format, split)
        domains = list(dict.fromkeys(file.domain for file in files))
        for domain in domains:
            some = [file for file in files if file.domain == domain]
            if not any(file.size for file in some):
                raise UsageError(
                    f"{_shown(patterns, domain)}: the corpus is empty "
                    f"({counted(len(some), 'file')} of 0 bytes). Name files with records in them."
                )
        if named and not any(file.kind in ("csv", "tsv", "txt", "conll") for file in files):
            raise UsageError(
                f"--columns names the columns of headerless CSV, TSV and CoNLL; {files[0].url} is "
                f"{files[0].kind} and has its own. Rename one with --columns NAME=THEIRS, or leave "
                "--columns out."
            )
        if callable(span_bytes):
            span_bytes = span_bytes(sum(file.size for file in files))
        if span_bytes < 1:
            raise UsageError(f"span_bytes is {span_bytes}; it must be 1 or more.")
        whole = documents == "file" and not divide
        plans = [_plan(file, span_bytes, reading, whole) for file in files]
        if limit is not None:
            every, plans = plans, []
            for domain in domains:
                mine = [plan for plan in every if plan.file.domain == domain]
                records, mine = _limited(mine, span_bytes, limit, reading)
                if not records:
                    raise UsageError(
                        f"{_shown(patterns, domain)}: no records. Name files that have some."
                    )
                plans += mine
        settings = {
            "span_bytes": span_bytes,
            "limit": limit,
            "format": format,
            "columns": None if given is None else list(given),
        }
        # What a corpus does not have, or what is as it always was, is not part of its identity.
        if any(file.kind == "txt" for file in files):
            settings["documents"] = documents
        if delimiter != "," and any(file.kind == "csv" for file in files):
            settings["delimiter"] = delimiter
        if filters:
            settings["filters"] = list(filters)
        if max_record_bytes != MAX_RECORD_BYTES:
            settings["max_record_bytes"] = max_record_bytes
        files = [plan.file for plan in plans]
        return cls(files, Spans(plans, reading), settings, _stretches(plans))

    @property
    def documents(self) -> str | None:
        """What a record of the text files is; None where there are none."""
        return self.settings.get("documents")

    def check_unchanged(self) -> None:
        """Compare all files with what they were when they were planned; one request a file.

        Raises:
            UsageError: One was changed or is gone.
        """
        check_all_unchanged(self.files)

    def identity(self) -> list[dict[str, Any]]:
        """What the corpus is, file by file, independent of its location.

        Returns:
            Per file `name` (below the files' nearest common folder), `size` in bytes, `kind`
            (such as `jsonl.gz`), `tag` (SHA-256 of the first and last 64 KiB, 32 hex digits) and,
            where corpora have names, `domain`.
        """
        files = [one for file in self.files for one in (*file.beside, file)]
        named = zip(names(files), files, tags(files), strict=True)
        return [
            {"name": name, "size": file.size, "kind": file.full_kind, "tag": tag}
            | ({} if file.domain is None else {"domain": file.domain})
            for name, file, tag in named
        ]

    @staticmethod
    def read(
        span: Span,
        *,
        columns: Sequence[str] | None = None,
        on_error: OnError = "fail",
        stats: ReadStats | None = None,
        progress: Callable[[], None] = lambda: None,
    ) -> Iterator[Record]:
        """Read a span's records; needs nothing but the span, so any worker can.

        Args:
            columns: Columns that the caller will look at: tables (Parquet, Arrow) are read in these
                only. Missing names are not an error here (`Record.missing` makes one).
            on_error: What a record that can't be read does: `fail` or be `skip`-ped and
                counted.
            progress: Called once in a while before the first record, where that takes long.

        Yields:
            The records in file order.

        Raises:
            UsageError: A bad record with `on_error="fail"`, or a file that can't be opened.
        """
        try:
            stats = ReadStats() if stats is None else stats
            with doing(f"reading {redact(span.file.url)}"):
                yield from _read(span, columns, on_error, stats, progress)
        except Exception:
            # What is wrong with a file that was changed is that it was changed.
            check_unchanged(span.file)
            raise
        check_unchanged(span.file)


def _read(
    span: Span,
    columns: Sequence[str] | None,
    on_error: OnError,
    stats: ReadStats,
    progress: Callable[[], None],
) -> Iterator[Record]:
    file = span.file
    renames, filters = dict(span.reading.renames), span.reading.filters
    if columns is not None:
        columns = [renames.get(name, name) for name in (*columns, *(name for name, _ in filters))]
        columns += [name.partition(".")[0] for name in columns if name in renames.values()]
    location: Location = "start"
    with open_span(span, columns) as reader:
        reader.progress = progress
        try:
            for location, payload in reader.records():
                try:
                    record = reader.record(location, payload).renamed(renames)
                except RecordError as problem:
                    stats.reject(on_error, file.url, location, problem)
                    continue
                if filters and not passes(record, filters):
                    stats.filtered += 1
                    continue
                stats.records += 1
                yield record
        except Exception as error:
            if not reader.damage(error):
                raise
            if not file.compression:
                raise reader.unreadable(error) from error
            cause = f"the {file.compression} stream is cut short or damaged after this ({error})"
            # Every part comes by here; the first counts it.
            stats.reject(on_error, file.url, location, cause, int(span.part == 0))


def open_span(span: Span, columns: Sequence[str] | None = None) -> Format:
    """Open a span's file for reading: see `Format`."""
    kind = span.file.kind
    module, name = _FORMATS[f"txt {span.reading.documents}" if kind == "txt" else kind]
    opened: type[Format] = getattr(importlib.import_module(f"kdcache.corpus.{module}"), name)
    return opened(span, columns)


def _pair(text: str) -> tuple[str, str]:
    name, _, theirs = text.partition("=")
    return name.strip(), theirs.strip()


def _shown(patterns: Sequence[str | Named], domain: str | None) -> str:
    """The patterns of a domain, for messages."""
    mine = (
        str(one)
        for one in patterns
        if domain is None or (isinstance(one, Named) and one.name == domain)
    )
    return f"--corpus {' '.join(map(redact, mine))}"


def _stretches(plans: Sequence[_FileCuts]) -> list[dict[str, Any]]:
    """Names and numbers of spans of the corpora, in the spans' order."""
    found: list[dict[str, Any]] = []
    for plan in plans:
        if plan.file.domain is None or not plan.spans:
            continue
        if not found or found[-1]["name"] != plan.file.domain:
            found.append({"name": plan.file.domain, "spans": 0})
        found[-1]["spans"] += plan.spans
    return found


def _by_bytes(file: InputFile) -> bool:
    return file.kind in LINE_KINDS and not file.sequential


def _plan(file: InputFile, span_bytes: int, reading: Reading, whole: bool) -> _FileCuts:
    if not file.size:
        return _FileCuts(file, 1, 0)
    if file.kind == "txt" and reading.documents == "file" and (whole or file.compression):
        return _FileCuts(file, 1, 1)
    if file.kind == "bin":
        with open_span(_FileCuts(file, 1, 1).span(0, 0, reading)) as ids:
            _, size = ids.size(file.size)
        cuts = max(1, math.ceil(size / span_bytes))
    elif not file.sequential:
        cuts = math.ceil(file.size / span_bytes)
    else:
        size = file.size * (_TYPICAL_RATIO if file.compression else 1)
        cuts = min(math.ceil(size / span_bytes), MAX_PARTS)
    return _FileCuts(file, cuts, cuts)


def _limited(
    plans: Sequence[_FileCuts], span_bytes: int, limit: int, reading: Reading
) -> tuple[int, list[_FileCuts]]:
    """The number of records up to `limit`, and the plans of the files that hold them."""
    kept = []
    left = limit
    for plan in plans:
        if plan.spans:
            records, plan = _count(plan, left, span_bytes, reading)
            left -= records
        kept.append(plan)
        if not left:
            break
    return limit - left, kept


def _count(plan: _FileCuts, left: int, span_bytes: int, reading: Reading) -> tuple[int, _FileCuts]:
    """Count a file's records up to `left`; the plan comes back cut if that many are there."""
    file = plan.file
    with open_span(replace(_FileCuts(file, 1, 1).span(0, 0, reading), limit=left)) as reader:
        if isinstance(reader, TextFiles):  # one document, however many pieces it comes in
            return reader.size(left)[0], plan
        if _by_bytes(file):
            return _count_lines(plan, reader, left)
        records, size = reader.size(left)
    if records < left:
        return records, plan
    # What is behind the limit is never read: parts go by what is before it.
    parts = min(max(math.ceil(size / span_bytes), 1), plan.spans)
    return records, replace(plan, spans=parts, limit=left)


def _count_lines(plan: _FileCuts, reader: Format, left: int) -> tuple[int, _FileCuts]:
    seen = in_last = last = 0
    for location, _ in islice(reader.records(), left):
        assert isinstance(location, LineAt)
        while plan.span(0, last, Reading()).stop <= location.offset:
            last, in_last = last + 1, 0
        in_last += 1
        seen += 1
    if seen < left:
        return seen, plan
    return seen, replace(plan, spans=last + 1, limit=in_last)
