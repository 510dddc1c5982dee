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

DistillKit's compressed log-probabilities: bytes to numbers.

Of each position `compressed_logprobs` holds, in this order: `exact_k` numbers of `exact_dtype`; the
coefficients of a polynomial in the rank, which gives the other `k - exact_k`; and bins of quantised
differences from it, each a scale and `num_elements` numbers of `element_bits` bits. With
`delta_encoding` all of these are differences along the ranks. `bytepacked_indices` holds k ids of
as many bits as the vocabulary's size `d` needs. Bits are packed from the highest on.

Source: DistillKit, README (Logit Compression) and `distillkit/compression`, 2025.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.corpus import Record, RecordError, kind_of
from kdcache.errors import UsageError

_WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Compression:
    """A `compression_config.yaml`; see the module.

    Attributes:
        values: its fields, those with a default filled in.
    """

    values: Mapping[str, Any]

    @classmethod
    def parse(cls, values: Any, source: str) -> Compression:
        """Check the fields.

        Raises:
            UsageError: One is missing, or cannot be.
        """
        given = values if isinstance(values, dict) else {}
        filled = {
            "exact_dtype": "float32", "polynomial_terms": [], "term_dtype": "float32",
            "residual_bins": [], "delta_encoding": True, "normalize_t": False, **given,
        }  # fmt: skip
        filled["polynomial_terms"] = filled["polynomial_terms"] or []
        try:
            whole = [filled[name] for name in ("d", "k", "exact_k")]
            bins = [(b["scale_dtype"], b["element_bits"], b["num_elements"])
                    for b in filled["residual_bins"]]  # fmt: skip
            good = (
                all(type(number) is int for number in whole)
                and 2 <= filled["d"] < 1 << 31
                and 0 <= filled["exact_k"] <= filled["k"] <= min(filled["d"], 1 << 16)
                and {filled["exact_dtype"], filled["term_dtype"]} <= _WIDTHS.keys()
                and all(
                    term in ("sqrt", "exp") or (type(term) is int and 0 <= term < 64)
                    for term in filled["polynomial_terms"]
                )
                and all(t in _WIDTHS and 1 <= b <= 62 and n >= 1 for t, b, n in bins)
                and sum(n for _, _, n in bins) <= filled["k"] - filled["exact_k"]
            )
        except (KeyError, TypeError):
            good = False
        if not good:
            raise UsageError(
                f"{source} is not a compression configuration of DistillKit: expected d, k, "
                "exact_k and the like."
            )
        return cls(filled)

    def logprobs(self, data: Bytes) -> Floats:
        """Log-probabilities [positions, k] of `compressed_logprobs` [positions, bytes]."""
        v, at = self.values, 0

        def take(size: int) -> Bytes:
            nonlocal at
            at += size
            if at > data.shape[1]:
                raise RecordError(
                    f"compressed_logprobs has {data.shape[1]} bytes a position, too few for the "
                    "compression configuration"
                )
            return np.ascontiguousarray(data[:, at - size : at])

        exact = _floats(take(v["exact_k"] * _WIDTHS[v["exact_dtype"]]), v["exact_dtype"])
        rest = v["k"] - v["exact_k"]
        terms = v["polynomial_terms"]
        coefficients = _floats(take(len(terms) * _WIDTHS[v["term_dtype"]]), v["term_dtype"])
        ranks = np.linspace(0, 1, rest) if v["normalize_t"] else np.arange(rest, dtype=np.float64)
        basis = np.array([_term(term, ranks) for term in terms]).reshape(len(terms), rest)
        others = coefficients @ basis
        done = 0
        for one in v["residual_bins"]:
            bits, count = one["element_bits"], one["num_elements"]
            scale = _floats(take(_WIDTHS[one["scale_dtype"]]), one["scale_dtype"])
            numbers = unpacked(take((bits * count + 7) // 8), bits, count).astype(np.float64)
            numbers = 2 * numbers - 1 if bits == 1 else numbers - 2.0 ** (bits - 1)
            others[:, done : done + count] += numbers * scale
            done += count
        if at != data.shape[1]:
            raise RecordError(
                f"compressed_logprobs has {data.shape[1]} bytes a position, {at} expected by the "
                "compression configuration"
            )
        found = np.concatenate([exact, others], axis=1)
        return np.cumsum(found, axis=1) if v["delta_encoding"] else found

    def ids(self, data: Bytes) -> npt.NDArray[np.int64]:
        """Ids [positions, k] of `bytepacked_indices` [positions, bytes]."""
        bits = math.ceil(math.log2(self.values["d"]))
        expected = (bits * self.values["k"] + 7) // 8
        if data.shape[1] != expected:
            raise RecordError(
                f"bytepacked_indices has {data.shape[1]} bytes a position, {expected} expected by "
                "the compression configuration"
            )
        return unpacked(data, bits, self.values["k"])


def unpacked(data: Bytes, bits: int, count: int) -> npt.NDArray[np.int64]:
    """The first `count` whole numbers of so many bits each in rows of bytes."""
    flat = np.unpackbits(data, axis=1)[:, : bits * count]
    powers = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    return flat.reshape(len(data), count, bits) @ powers


def _floats(data: Bytes, kind: str) -> Floats:
    if kind == "bfloat16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return data.view(f"<f{_WIDTHS[kind]}").astype(np.float64)


def _term(term: int | str, ranks: Floats) -> Floats:
    if isinstance(term, int):
        return ranks**term
    return np.sqrt(ranks) if term == "sqrt" else np.exp(ranks)


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
