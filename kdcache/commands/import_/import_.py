"""`kdcache import`: a cache of top-k log-probabilities that another program wrote.

    options -> spans of the files -> CacheSpec -> `make_cache`

The cache declares the source's temperature alone, mostly 1: at any other one the mass of the ids
that were left out is not known. What the files say of themselves is kept in the notes.

Cost: one pass over the files. Guarantee: as of a build; the same command resumes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdcache.cache import Cache, CacheSpec
from kdcache.commands.build.driver import Progress
from kdcache.commands.build.make import BuildResult, ShardPlan, make_cache
from kdcache.commands.build.prepare import count_ranks
from kdcache.commands.import_.apart import ID_BITS, SHARES, Apart, open_apart
from kdcache.commands.import_.import_source import ImportSourceOptions, RowReader
from kdcache.commands.import_.layouts import COMPRESSED, LAYOUTS, Compression
from kdcache.commands.import_.options import ImportOptions
from kdcache.corpus import Corpus, ReadStats, RecordError, named
from kdcache.corpus.files import open_bytes
from kdcache.errors import UsageError
from kdcache.files import parse_yaml
from kdcache.pretrained import tokenizer_files, tokenizer_sha256
from kdcache.rows import RowSpec
from kdcache.rows.ids import load_tokenizer
from kdcache.storage import redact
from kdcache.targets import Codec
from kdcache.tasks import CAUSAL_LM, TASKS

_SPAN_BYTES = 1 << 25
_MOST_SPANS = 100_000
_SPEED = 1e7  # bytes that a core imports in a second, roughly
_MOST_CONFIG = 1 << 20
_ABOUT = b"kdcache"
_KINDS = ("parquet", "arrow", "jsonl")
_FOOTERS = 16  # read at a time
_VERSIONS = "events/corpus.json"


def import_(
    options: ImportOptions,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> BuildResult:
    """Make a cache of files with targets, or finish an interrupted import.

    Args:
        on_progress: called in this thread, a few times a second at most.
        report: takes a line about what is done before the first progress.

    Raises:
        UsageError: wrong options or input; nothing was written that a later run would trust.
        IncompleteError: interrupted, no space left, or spans set aside; the same command resumes.
    """
    return make_cache(functools.partial(_plan, options), options.out, options, on_progress, report)


def _plan(options: ImportOptions) -> ShardPlan:
    tokenizer = load_tokenizer(options.tokenizer)
    corpus = _open(options)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    apart = _apart(options, vocab_size)
    about = apart.about if apart else _about(options, corpus, tokenizer_sha256(tokenizer))
    source = _source(options, corpus)
    k, columns = _first(options, corpus, source, tokenizer)
    kind = f"sample:{SHARES}" if source.columns.draws else f"topk:{k}"
    # What others published keeps its precision.
    codec = Codec.parse(kind, (apart.temperature if apart else 1.0,), vocab_size).in_floats()
    ranks = count_ranks(corpus, source.rows, tokenizer, vocab_size) if codec.uses_ranks else b""
    pad_id = tokenizer.pad_token_id
    reading = {**corpus.settings, "layout": source.layout, "targets": source.targets}
    reading |= {"excess": options.excess} if options.excess != "refuse" else {}
    if source.compression is not None:
        reading["compression"] = dict(source.compression.values)
    spec = CacheSpec(
        task=CAUSAL_LM,
        teachers=({"sha256": "", "weight": 1.0},),
        ensemble="mean-probs",
        dtype="float32",
        tokenizer=tokenizer_sha256(tokenizer),
        vocab_size=vocab_size,
        pad_id=pad_id if pad_id is not None else (tokenizer.eos_token_id or 0),
        eos_id=tokenizer.eos_token_id,
        label_names=None,
        corpus=tuple(corpus.identity()),
        rows=source.rows.to_dict(),
        reading=reading,
        spans=len(corpus.spans),
        codec=str(codec),
        temperatures=codec.temperatures,
        seed=0,
        ranks=hashlib.sha256(ranks).hexdigest() if ranks else None,
        label_logprob=source.columns.logprob in columns,
        answer_logprob=source.columns.logprob in columns,
        domains=tuple(corpus.domains),
    )
    teachers = [redact(options.teacher)] if options.teacher else about.get("teachers") or []
    origin = {
        "layout": source.layout,
        "given": source.columns.given,
        "files": [redact(str(name)) for name in options.corpus],
    }
    return ShardPlan(
        spec,
        tokenizer_files(tokenizer),
        ranks,
        {"teachers": teachers, "imported": {**origin, **({"about": about} if about else {})}},
        corpus.spans,
        source,
        0.0,
        sum(file.size for file in corpus.files) / _SPEED / max(1, len(corpus.spans)),
        check_made=functools.partial(_check_made, corpus=corpus),
        check_end=corpus.check_unchanged,
        opening="opening the cache",
    )


def _apart(options: ImportOptions, vocab_size: int) -> Apart | None:
    """Targets in files apart from the rows, where the layout has them there."""
    if options.logits is None:
        return None
    if vocab_size > 1 << ID_BITS:
        raise UsageError(
            f"--layout {options.layout} gives an id {ID_BITS} bits, and --tokenizer has "
            f"{vocab_size:,} ids: those of {1 << ID_BITS:,} and more stand in the files as others, "
            "and nothing tells them apart. Such targets cannot be used; build them anew."
        )
    return open_apart(options.layout, options.logits)


def _open(options: ImportOptions) -> Corpus:
    renamed = () if options.columns else LAYOUTS[options.layout].renamed
    corpus = Corpus.open(
        named(options.corpus),
        span_bytes=lambda total: max(_SPAN_BYTES, total // _MOST_SPANS),
        limit=options.limit,
        format=options.format,
        columns=options.columns or renamed or None,
        max_record_bytes=options.max_record_bytes,
        split=options.split,
        filters=options.filter,
    )
    other = next((file for file in corpus.files if file.kind not in _KINDS), None)
    if other is not None:
        raise UsageError(
            f"{redact(other.url)} is {other.full_kind}, expected {', '.join(_KINDS)}. Name the "
            "files that are meant, or their --format."
        )
    return corpus


def _source(options: ImportOptions, corpus: Corpus) -> ImportSourceOptions:
    layout = LAYOUTS[options.layout]
    rows = RowSpec(
        CAUSAL_LM,
        max_length=options.max_length,
        packing="whole",
        record_form="ids",
        attend=options.attend,
        labels=options.labels or layout.labels,  # type: ignore[arg-type]  # RowSpec checks it
        on_error=options.on_error,
    )
    targets = options.targets or layout.targets
    assert targets is not None, "ImportOptions asks for it"
    return ImportSourceOptions(
        rows,
        options.layout,
        targets,
        options.excess == "clip",
        _compression(options, corpus),
        options.logits,
    )


def _compression(options: ImportOptions, corpus: Corpus) -> Compression | None:
    """The configuration of compressed columns, where there may be some."""
    if COMPRESSED not in LAYOUTS[options.layout].forms:
        return None
    beside = f"{os.path.dirname(corpus.files[0].url)}/compression_config.yaml"
    place = options.compression_config or beside
    try:
        with open_bytes(place) as stream:
            text = stream.read(_MOST_CONFIG)
    except (UsageError, OSError):
        if options.compression_config:
            raise
        return None  # which matters only if a column is compressed
    try:
        document = parse_yaml(text)
    except ValueError as error:
        raise UsageError(f"{redact(place)} is not valid YAML: {error}.") from None
    return Compression.parse(document, redact(place))


def _about(options: ImportOptions, corpus: Corpus, tokenizer: str) -> dict[str, Any]:
    """What files of `kdcache export` say of themselves, of the first one; others say nothing.

    Raises:
        UsageError: the targets of one are not what an import takes.
    """
    names = [file.url for file in corpus.files if file.kind == "parquet"]
    with ThreadPoolExecutor(_FOOTERS) as pool:
        abouts = list(pool.map(_about_one, names))
    for name, about in zip(names, abouts, strict=True):
        if about:
            _refuse_about(redact(name), about, tokenizer)
    return next(iter(abouts), {})


def _about_one(url: str) -> dict[str, Any]:
    try:
        with open_bytes(url) as stream:
            metadata = pq.ParquetFile(stream).schema_arrow.metadata or {}
    except pa.ArrowInvalid:  # a damaged file, which the span that reads it will name
        return {}
    return dict(json.loads(metadata.get(_ABOUT, b"{}")))


def _refuse_about(name: str, about: dict[str, Any], tokenizer: str) -> None:
    task = str(about.get("task"))
    if task != CAUSAL_LM:
        noun = f"a {TASKS[task].noun}" if task in TASKS else repr(task)
        raise UsageError(
            f"{name} holds the targets of {noun}; an import is of a causal language model's. "
            "Train on the cache that it was exported from."
        )
    if about.get("temperature") != 1:
        raise UsageError(
            f"{name} holds probabilities at T = {about.get('temperature')}, from which those at 1 "
            "do not follow. Export at --temperature 1."
        )
    if str(about.get("codec", "")).startswith(("sample", "anchored")):
        raise UsageError(
            f"{name} holds draws ({about['codec']}), not the most probable ids: they cannot become "
            "top-k targets."
        )
    if about.get("tokenizer", tokenizer) != tokenizer:
        raise UsageError(
            f"{name} was exported from a cache of another tokenizer than --tokenizer names: its "
            "ids would be other tokens. Name the tokenizer of that cache's teacher."
        )


def _first(
    options: ImportOptions, corpus: Corpus, source: ImportSourceOptions, tokenizer: Any
) -> tuple[int, tuple[str, ...]]:
    """Ids of a position, and the names of all columns, by the first row with targets."""
    reader = RowReader(source, tokenizer, None, False)
    for span in corpus.spans:
        for record in Corpus.read(span, columns=source.wanted, on_error=options.on_error):
            if COMPRESSED[0] in record.columns and source.compression is None:
                raise UsageError(
                    f"{record.where} has compressed targets, and there is no "
                    "compression_config.yaml beside it. Name it with --compression-config."
                )
            try:
                k = options.top or reader.width(record)
            except RecordError as problem:
                ReadStats().reject(options.on_error, record.file, record.location, problem)
                continue
            if k:
                return k, record.columns
    raise UsageError(
        f"--corpus {' '.join(redact(str(one)) for one in options.corpus)}: no row has targets. "
        "Look at its columns, or choose another --layout."
    )


def _check_made(cache: Cache, corpus: Corpus) -> None:
    """Refuse to continue with shards of files that were written to since."""
    now = json.dumps([file.versions for file in corpus.files]).encode()
    if cache.sealed or cache.storage.create(_VERSIONS, now):
        return
    if cache.committed() and cache.storage.read(_VERSIONS) != now:
        raise UsageError(
            "the files were written to since this import began. Import them into another --out."
        )
