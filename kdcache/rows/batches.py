"""Rows grouped by length and padded for a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kdcache.rows.spec import Row

Ids = npt.NDArray[np.int64]


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows grouped by length, so that rows times the longest stays within
    `batch_tokens`.

    Every index comes exactly once; a row longer than the budget is a batch by itself.
    """
    batch: list[int] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * longest > batch_tokens:
            yield batch
            batch = []
        if not batch:
            longest = lengths[index]
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

    Rows of documents that do not attend to each other are divided before (`documents_of`).
    """
    assert all(row.starts is None for row in rows), "documents are run apart"
    lengths = np.array([len(row.input_ids) for row in rows])
    columns = {
        "input_ids": padded(np.concatenate([row.input_ids for row in rows]), lengths, pad_id),
        "attention_mask": padded(np.ones(lengths.sum(), np.int64), lengths, 0),
    }
    if rows[0].type_ids is not None:
        types = [np.zeros(len(r.input_ids)) if r.type_ids is None else r.type_ids for r in rows]
        columns["token_type_ids"] = padded(np.concatenate(types), lengths, 0)
    return columns
