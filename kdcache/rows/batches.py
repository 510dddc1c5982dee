"""Rows grouped by length and padded for a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kdcache.rows.spec import Row

Ids = npt.NDArray[np.int64]
Size: TypeAlias = "int | tuple[int, ...]"


def batches(sizes: Sequence[Size], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows grouped by length, so that rows times the longest stays within
    `batch_tokens`.

    Every index comes exactly once; a row longer than the budget is a batch by itself.

    Args:
        sizes: tokens of each row, or those of its parts (`Row.sizes`), which are padded each to
            the longest.
        batch_tokens: the budget.
    """
    batch: list[int] = []
    parts = [(size,) if isinstance(size, int) else tuple(size) for size in sizes]
    longest: tuple[int, ...] = ()
    for index in sorted(range(len(parts)), key=lambda i: tuple(-part for part in parts[i])):
        grown = tuple(map(max, longest or parts[index], parts[index]))
        if batch and (len(batch) + 1) * sum(grown) > batch_tokens:
            yield batch
            batch, grown = [], parts[index]
        longest = grown
        batch.append(index)
    if batch:
        yield batch


def runs(lengths: Sequence[int], batch_tokens: int) -> Iterator[slice]:
    """As `batches`, of rows that stay in their order."""
    start = longest = 0
    for index, length in enumerate(lengths):
        if index > start and (index + 1 - start) * max(longest, length) > batch_tokens:
            yield slice(start, index)
            start, longest = index, 0
        longest = max(longest, length)
    if len(lengths) > start:
        yield slice(start, len(lengths))


def documents_of(rows: Sequence[Row]) -> list[Row]:
    """What attends to itself alone, in order: rows, or the documents of those that hold several."""
    return [document for row in rows for document in row.documents()]


def padded(values: npt.NDArray[np.generic], lengths: npt.NDArray[np.integer], fill: int) -> Ids:
    """Rows that lie one after another, filled up on the right: int64 [rows, longest].

    Args:
        values: of all rows, joined.
        lengths: of each row.
        fill: what stands behind shorter rows.
    """
    real = np.arange(lengths.max(initial=0)) < lengths[:, None]
    out = np.full(real.shape, fill, np.int64)
    out[real] = values
    return out


def pad_rows(rows: Sequence[Row], pad_id: int) -> dict[str, Ids]:
    """`input_ids`, `attention_mask` and, if the first row has them, `token_type_ids`.

    Of rows with a source these are of the source, and the decoder's are `decoder_input_ids`. Rows
    of documents that do not attend to each other are divided before (`documents_of`).
    """
    assert all(row.starts is None for row in rows), "documents are run apart"
    own = [row.input_ids if row.source is None else row.source for row in rows]
    lengths = np.array([len(ids) for ids in own])
    columns = {
        "input_ids": padded(np.concatenate(own), lengths, pad_id),
        "attention_mask": padded(np.ones(lengths.sum(), np.int64), lengths, 0),
    }
    if rows[0].source is not None:
        sizes = np.array([len(row.input_ids) for row in rows])
        decoder = np.concatenate([row.input_ids for row in rows])
        columns["decoder_input_ids"] = padded(decoder, sizes, pad_id)
    if rows[0].type_ids is not None:
        types = [np.zeros(len(r.input_ids)) if r.type_ids is None else r.type_ids for r in rows]
        columns["token_type_ids"] = padded(np.concatenate(types), lengths, 0)
    return columns
