"""DistillKit's compressed log-probabilities: bytes to numbers.

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

from kdcache.corpus import RecordError
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
