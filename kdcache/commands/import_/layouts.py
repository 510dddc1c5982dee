"""Layouts: where the columns of other programs hold a row's targets.

| layout | targets | stand with |
|---|---|---|
| `kdcache` | `target_ids`, `target_probs`; `teacher_logprob` | the token before |
| `axolotl` | `target_token_ids`, `target_logprobs`, `target_mask` | the token that they are about |
| `distillkit` | as `open-instruct`, or `token_ids`, `top_values` | the token before |
| `open-instruct` | `compressed_logprobs`, `bytepacked_indices` | the token before |
| `llamakd` | `targets`, of `inputs` | the token before |
| `megatron`, `se-kd3x` | in files apart, see `kdcache.commands.import_.apart` | the token before |
| `plain` | `target_ids`, `target_logprobs` or `target_probs` | as --targets has it |

axolotl's are those of its prepared datasets, which its own loader has scaled to sum to 1;
DistillKit and open-instruct, which has taken over its columns, leave the last token out.

DistillKit's compressed log-probabilities are bytes. Of each position `compressed_logprobs` holds,
in this order: `exact_k` numbers of `exact_dtype`; the coefficients of a polynomial in the rank,
which gives the other `k - exact_k`; and bins of quantised differences from it, each a scale and
`num_elements` numbers of `element_bits` bits. With `delta_encoding` all of these are differences
along the ranks. `bytepacked_indices` holds k ids of as many bits as the vocabulary's size `d`
needs. Bits are packed from the highest on.

Source: DistillKit, README (Logit Compression) and `distillkit/compression`, 2025. LlamaKD: its card
and its viewer (`codys12/LlamaKD` on the hub, 2024): `inputs: [1024]`, `targets: [1024, 2, 32]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.corpus import Record, RecordError, kind_of
from kdcache.errors import UsageError

_WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]


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

Read = Callable[[Mapping[str, Any], Sequence[str], "Compression | None"], Entries]


@dataclass(frozen=True)
class Columns:
    """A layout: its columns, and what its targets are.

    Attributes:
        forms: names of columns with targets and how to read them, alternatives.
        labels: what labels stand with, `token` or `next`; None where nothing states it.
        targets: what targets stand with.
        mask: column that states for each entry whether it counts.
        logprob: column of the label's log-probability.
        renamed: columns that have other names than here, as `--columns` gives them.
        others: more columns that are read.
        apart: whether the targets are in other files, see `kdcache.commands.import_.apart`.
        left_padded: whether rows may begin with ends of a text, which are padding.
        draws: whether they are draws, of which sparse weights are right on average only.
        given: what the source's numbers are, for the notes.
    """

    forms: Mapping[tuple[str, ...], Read]
    labels: str | None
    targets: str | None
    mask: str | None = None
    logprob: str | None = None
    renamed: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    apart: bool = False
    left_padded: bool = False
    draws: bool = False
    given: str = "probabilities of the whole vocabulary at T = 1"

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        others = (self.mask, self.logprob, *self.others)
        return (*dict.fromkeys(sum(self.forms, ())), *(name for name in others if name))


def read_entries(record: Record, columns: Columns, compression: Compression | None) -> Entries:
    """The targets of a record.

    Raises:
        RecordError: they cannot be used.
        UsageError: a column is missing.
    """
    values = record.values
    there = [form for form in columns.forms if all(values.get(n) is not None for n in form)]
    if not there:
        wanted = [" with ".join(form) for form in columns.forms]
        raise record.missing(wanted, "--columns NAME=THEIRS, or choose another --layout")
    entries = columns.forms[there[0]](values, there[0], compression)
    if columns.mask is None or values.get(columns.mask) is None:
        return entries
    sizes, flags = _ragged(values[columns.mask], columns.mask)
    if not np.array_equal(sizes, entries.counts) or not set(np.unique(flags)) <= {0, 1}:
        raise RecordError(f"{columns.mask} is not 0 or 1 for each of {there[0][0]}")
    ends = np.cumsum(np.concatenate([[0], entries.counts]))
    before = np.concatenate([[0], np.cumsum(flags)])[ends].astype(np.int64)
    some = np.diff(before)
    if ((some != 0) & (some != entries.counts)).any():
        raise RecordError(f"{columns.mask} hides some of a token's ids, expected all or none")
    return replace(entries, counted=some > 0)


def _unpacked(values: Mapping[str, Any], names: Sequence[str], by: Compression | None) -> Entries:
    """DistillKit's compressed columns."""
    assert by is not None, "it is read when the import is planned"
    packed = [_matrix(values[name], name) for name in names]
    ids, logprobs = by.ids(packed[0]), by.logprobs(packed[1])
    if len(ids) != len(logprobs):
        raise RecordError(f"{names[0]} has {len(ids)} items, {names[1]} {len(logprobs)}")
    counts, everything = np.full(len(ids), ids.shape[1]), np.ones(len(ids), np.bool_)
    return Entries(counts, ids.reshape(-1), logprobs.reshape(-1), everything)


def _logprobs(values: Mapping[str, Any], names: Sequence[str], _: Any = None) -> Entries:
    """A list of ids and one of log-probabilities for each token."""
    (counts, ids), (others, numbers) = (_ragged(values[name], name) for name in names)
    if not np.array_equal(counts, others):
        raise RecordError(f"{names[0]} and {names[1]} have different lengths")
    if ids.dtype.kind not in "iu":
        raise RecordError(f"{names[0]} holds something else than whole numbers in its lists")
    return Entries(counts, ids.astype(np.int64), numbers.astype(np.float64), counts > 0)


def _probs(values: Mapping[str, Any], names: Sequence[str], _: Any = None) -> Entries:
    """The same with probabilities."""
    entries = _logprobs(values, names)
    if (entries.logprobs < 0).any():
        raise RecordError(f"{names[1]} holds a number below 0")
    with np.errstate(divide="ignore"):
        return replace(entries, logprobs=np.log(entries.logprobs))


def _stacked(values: Mapping[str, Any], names: Sequence[str], _: Any = None) -> Entries:
    """LlamaKD's pairs of lists for each token: K log-probabilities, then their ids as floats."""
    (name,) = names
    try:
        pairs = np.stack([np.stack(list(pair)) for pair in values[name]]).astype(np.float64)
    except (TypeError, ValueError):
        pairs = np.zeros(0)
    if pairs.ndim != 3 or pairs.shape[1] != 2:
        raise RecordError(f"{name} is not a list of log-probabilities and one of ids a token")
    logprobs, ids = pairs[:, 0], pairs[:, 1]
    if (ids % 1 != 0).any():
        raise RecordError(f"{name} holds something else than whole numbers as its second lists")
    counts, everything = np.full(len(ids), ids.shape[1]), np.ones(len(ids), np.bool_)
    return Entries(counts, ids.reshape(-1).astype(np.int64), logprobs.reshape(-1), everything)


_SCALED = "probabilities scaled to sum to 1: what their source left out is lost"
LAYOUTS: Mapping[str, Columns] = {
    "kdcache": Columns({("target_ids", "target_probs"): _probs}, "next", "next", logprob=LOGPROB),
    "axolotl": Columns(
        {("target_token_ids", "target_logprobs"): _logprobs}, "token", "token",
        mask="target_mask", given=_SCALED,
    ),
    "distillkit": Columns(
        {COMPRESSED: _unpacked, ("token_ids", "top_values"): _logprobs}, "token", "next"
    ),
    "open-instruct": Columns({COMPRESSED: _unpacked}, "token", "next"),
    "llamakd": Columns(
        {("targets",): _stacked}, None, "next", renamed=("input_ids=inputs",), left_padded=True
    ),
    "megatron": Columns({}, None, "next", others=("index",), apart=True),
    "se-kd3x": Columns(
        {}, None, "next", apart=True, draws=True, given="draws, in steps of 1/127, at its own T"
    ),
    "plain": Columns(
        {("target_ids", "target_logprobs"): _logprobs, ("target_ids", "target_probs"): _probs},
        None, None, given="probabilities, by the user's word",
    ),
}  # fmt: skip


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
