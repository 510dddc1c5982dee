"""Resume: checks that the shards of an earlier run belong to the corpus as it is now.

The first run of a build records the version of every file (its time of change, or its ETag) in
`events/corpus.json`, which is no part of the cache: the same corpus makes the same cache wherever
it is. If a later run finds another version, but the same size and ends, the file was copied or its
middle was edited. A shard holds its rows, so the records of each span are read and encoded again
and compared with them, without the teacher.

Cost: none while no file has changed; otherwise reading and tokenising the committed spans of those
that have.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

import numpy as np

from kdcache.cache import Cache, sealing
from kdcache.corpus import Corpus, Span
from kdcache.errors import UsageError
from kdcache.rows import Row, RowSpec, make_encoder
from kdcache.storage import redact

logger = logging.getLogger(__name__)


_FILE = "events/corpus.json"


def check_made(cache: Cache, corpus: Corpus, rows: RowSpec) -> None:
    """Compare the committed shards of files that were written to since the cache was begun.

    Args:
        cache: begun, not sealed.
        corpus: what it is built from, as it is now.
        rows: how its records become rows.

    Raises:
        UsageError: a shard has other rows than its span has now.
    """
    now = json.dumps([file.versions for file in corpus.files]).encode()
    if cache.sealed or cache.storage.create(_FILE, now):
        return
    noted = json.loads(cache.storage.read(_FILE))
    then = zip(corpus.files, noted, strict=True)
    changed = {file.url for file, version in then if file.versions != version}
    made = cache.committed() if changed else {}
    spans = [
        span for span in map(corpus.spans.__getitem__, sorted(made)) if span.file.url in changed
    ]
    if spans:
        logger.warning(
            "%d files were written to since this build began: comparing %d shards with them",
            len(changed),
            len(spans),
        )
    tokenizer = cache.tokenizer() if spans else None
    for span in spans:
        records = Corpus.read(span, columns=rows.columns, on_error=rows.on_error)
        try:
            found = list(make_encoder(rows, tokenizer).encode(records, span=span.index))
            same = _same(cache, span, made[span.index], found)
        except UsageError:  # such records were never made into a shard
            same = False
        if not same:
            raise UsageError(
                f"{redact(span.file.url)}: the file was changed since this build began: shard "
                f"{span.index} was made of other text. Restore the file and run the same command "
                "again, or build the new corpus in another folder."
            )


def _same(cache: Cache, span: Span, name: str, rows: Sequence[Row]) -> bool:
    entry = sealing.shard_entry(cache, span.index, name)
    with cache.hold(entry) as path:
        data = cache.parse(path, entry, targets=False)
    return len(data) == len(rows) and all(
        np.array_equal(mine, theirs)
        for i, row in enumerate(rows)
        for mine, theirs in (
            (row.input_ids, data.row(i).input_ids),
            (row.labels, data.row(i).labels),
            (_starts(row), _starts(data.row(i))),
            (_source(row), _source(data.row(i))),
        )
    )


def _source(row: Row) -> np.ndarray:
    return np.zeros(0) if row.source is None else row.source


def _starts(row: Row) -> np.ndarray:
    return np.zeros(0) if row.starts is None else row.starts
