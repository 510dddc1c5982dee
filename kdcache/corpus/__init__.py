"""Corpus: input files of many formats, cut into deterministic spans, read back as records.

Algorithm: patterns are expanded once into an ordered list of files with their sizes. Each file is
cut without reading it: plain line formats by bytes (a span owns the lines that *start* in its
range), Parquet and Arrow by a fraction of their rows. Files that can't be entered in the middle
(compressed files, CSV with quoted newlines, Arrow streams) give record `i` to part `i mod parts`.

Cost: planning is one directory listing, O(files) in time and memory; spans are made on demand. Only
`limit` reads files while planning, up to the limit, and a `.bin` its index. Reading a byte span
costs its bytes; one of Parquet decodes its row group from the beginning. The first part of such a
file costs a process the whole file, the others their share (`kdcache.corpus.parts`).

Guarantee: a span is a pure function of the files' names and sizes and the options, and over all
spans each record comes exactly once; a span may be empty. Records that can't be read raise
`UsageError` or are skipped and counted. A span whose file was written to since it was listed raises
`UsageError`. No more than one record, of `--read max-record-bytes`, is in memory at a time.
"""

from __future__ import annotations

from kdcache.corpus.corpus import Corpus
from kdcache.corpus.files import InputFile
from kdcache.corpus.formats import Reading, Span
from kdcache.corpus.listing import named
from kdcache.corpus.records import FileColumns, LineAt, ReadStats, Record, RecordError, kind_of
from kdcache.corpus.sample import SpanSample, sample_records, sample_spans

__all__ = [
    "Corpus",
    "FileColumns",
    "InputFile",
    "LineAt",
    "ReadStats",
    "Reading",
    "Record",
    "RecordError",
    "Span",
    "SpanSample",
    "kind_of",
    "named",
    "sample_records",
    "sample_spans",
]
