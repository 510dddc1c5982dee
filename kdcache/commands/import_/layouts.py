"""Layouts: where the columns of other programs hold a row's targets.

| layout | targets | stand beside |
|---|---|---|
| `kdcache` | `target_ids`, `target_probs`; `teacher_logprob` | the token before |
| `axolotl` | `target_token_ids`, `target_logprobs`, `target_mask` | the token that they are about |
| `distillkit` | as `open-instruct`, or `token_ids`, `top_values` | the token before |
| `open-instruct` | `compressed_logprobs`, `bytepacked_indices` | the token before |
| `plain` | `target_ids`, `target_logprobs` or `target_probs` | as --targets says |

axolotl's are those of its prepared datasets, which its own loader has scaled to sum to 1;
DistillKit and open-instruct, which has taken over its columns, leave the last token out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdcache.commands.import_.compressed import Compression
from kdcache.corpus import Record, RecordError, kind_of

COMPRESSED = ("bytepacked_indices", "compressed_logprobs")
LOGPROB = "teacher_logprob"


@dataclass(frozen=True)
class Columns:
    """The columns of a layout.

    Attributes:
        pairs: columns of ids and of their log-probabilities or probabilities, alternatives.
        labels: what labels stand beside, `token` or `next`; None where nothing says.
        targets: what targets stand beside.
        mask: column that says for each entry whether it counts.
        logprob: column of the label's log-probability.
    """

    pairs: tuple[tuple[str, str], ...]
    labels: str | None
    targets: str | None
    mask: str | None = None
    logprob: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        others = (self.mask, self.logprob)
        return (*dict.fromkeys(sum(self.pairs, ())), *(name for name in others if name))


LAYOUTS: Mapping[str, Columns] = {
    "kdcache": Columns((("target_ids", "target_probs"),), "next", "next", logprob=LOGPROB),
    "axolotl": Columns(
        (("target_token_ids", "target_logprobs"),), "token", "token", mask="target_mask"
    ),
    "distillkit": Columns((COMPRESSED, ("token_ids", "top_values")), "token", "next"),
    "open-instruct": Columns((COMPRESSED,), "token", "next"),
    "plain": Columns(
        (("target_ids", "target_logprobs"), ("target_ids", "target_probs")), None, None
    ),
}
_PROBS = ("target_probs",)


@dataclass(frozen=True)
class Entries:
    """The targets of a row as its file has them: of each item a number of ids.

    Attributes:
        counts: int64 [items].
        ids: int64, of all items one after another.
        logprobs: float64, likewise.
        counted: bool [items], whether there is a target at all.
    """

    counts: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    counted: np.ndarray


def read_entries(record: Record, columns: Columns, compression: Compression | None) -> Entries:
    """The targets of a record.

    Raises:
        RecordError: they cannot be used.
        UsageError: a column is missing.
    """
    values = record.values
    there = [pair for pair in columns.pairs if all(values.get(n) is not None for n in pair)]
    if not there:
        wanted = [" with ".join(pair) for pair in columns.pairs]
        raise record.missing(wanted, "--columns NAME=THEIRS, or choose another --layout")
    pair = there[0]
    if pair == COMPRESSED:
        assert compression is not None, "it is read when the import is planned"
        packed = [_matrix(values[name], name) for name in pair]
        ids, logprobs = compression.ids(packed[0]), compression.logprobs(packed[1])
        counts = np.full(len(ids), ids.shape[1])
        if len(ids) != len(logprobs):
            raise RecordError(f"{pair[0]} has {len(ids)} items, {pair[1]} {len(logprobs)}")
        everything = np.ones(len(ids), np.bool_)
        return Entries(counts, ids.reshape(-1), logprobs.reshape(-1), everything)
    (counts, ids), (others, numbers) = (_ragged(values[name], name) for name in pair)
    if not np.array_equal(counts, others):
        raise RecordError(f"{pair[0]} and {pair[1]} have different lengths")
    if ids.dtype.kind not in "iu":
        raise RecordError(f"{pair[0]} holds something else than whole numbers in its lists")
    if pair[1] in _PROBS:
        if (numbers < 0).any():
            raise RecordError(f"{pair[1]} holds a number below 0")
        with np.errstate(divide="ignore"):
            numbers = np.log(numbers)
    counted = counts > 0
    if columns.mask is not None and values.get(columns.mask) is not None:
        sizes, flags = _ragged(values[columns.mask], columns.mask)
        if not np.array_equal(sizes, counts) or not set(np.unique(flags)) <= {0, 1}:
            raise RecordError(f"{columns.mask} is not 0 or 1 for each of {pair[0]}")
        ends = np.cumsum(np.concatenate([[0], counts]))
        before = np.concatenate([[0], np.cumsum(flags)])[ends].astype(np.int64)
        some = np.diff(before)
        if ((some != 0) & (some != counts)).any():
            raise RecordError(f"{columns.mask} hides some of a token's ids, expected all or none")
        counted = some > 0
    return Entries(counts, ids.astype(np.int64), numbers.astype(np.float64), counted)


def _ragged(cell: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """How many numbers each item of a list has, and all of them; a missing item has none."""
    if not isinstance(cell, (list, np.ndarray)):
        raise RecordError(f"{name} holds {kind_of(cell)} where lists were expected")
    try:
        items = [np.asarray(() if item is None else item) for item in cell]
    except ValueError:
        items = [np.zeros((), object)]
    if any(item.ndim != 1 or (len(item) and item.dtype.kind not in "iuf") for item in items):
        raise RecordError(f"{name} holds something else than lists of numbers")
    full = [item for item in items if len(item)]
    counts = np.array([len(item) for item in items], np.int64)
    return counts, np.concatenate(full) if full else np.zeros(0, np.int64)


def _matrix(cell: Any, name: str) -> np.ndarray:
    counts, flat = _ragged(cell, name)
    if len(set(counts.tolist())) > 1 or (len(flat) and not 0 <= flat.min() <= flat.max() <= 255):
        raise RecordError(f"{name} is not as many bytes for each token")
    return np.asarray(flat, np.uint8).reshape(len(counts), -1 if len(flat) else 0)
