"""The contract of every codec.

A codec is a frozen value: its text (`str(codec)`), its temperatures and its vocabulary determine
the bytes it writes. Its columns are either one value a position or ragged: a ragged column names
its axis, and `Codec.counts` gives how many items of an axis belong to each position, so positions
can be sliced and joined without knowing the codec.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.errors import KdcacheError, UsageError
from kdcache.targets.decoded import Targets

Array: TypeAlias = npt.NDArray[Any]

MAX_VOCABULARY = 2**31 - 1
"""Ids are 32-bit at most; real vocabularies end near 300,000."""


@dataclass(frozen=True)
class Column:
    """One stored array.

    Attributes:
        name: key in the mapping of columns, and the dataset's name in a shard.
        dtype: numpy name of the element type.
        shape: shape of one item; `()` for a scalar.
        per: "position", or the name of a ragged axis: `Codec.counts` states how many of its items
            belong to each position.
        worth: share of a chunk's bytes that deflate may leave, at most; else it is stored as it is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    per: str = "position"
    worth: float = 0.95


class Codec(ABC):
    """Logits in, columns stored, targets at a temperature out.

    Children are frozen dataclasses with the fields `vocab_size`, `temperatures`, and one for what
    follows the kind in a codec's text, of which they take the text too.

    Attributes:
        keeps_logits: whether targets give every logit of a position, stored or rebuilt.
        reads_states: whether `encode` takes the output layer's input instead of logits.
        needs_noise: whether `encode` needs a uniform number for each position.
        levels: whether columns that had floats in earlier versions hold levels of one byte.
    """

    kind: ClassVar[str]
    usage: ClassVar[str]
    keeps_logits: ClassVar[bool] = False
    reads_states: ClassVar[bool] = False
    needs_noise: ClassVar[bool] = False
    _kinds: ClassVar[dict[str, type[Codec]]] = {}

    vocab_size: int
    temperatures: tuple[float, ...]
    levels: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Codec._kinds[cls.kind] = cls

    @staticmethod
    def parse(text: str, temperatures: Sequence[float], vocab_size: int) -> Codec:
        """Build a codec from its text.

        Args:
            text: "dense", "dense:float16", "hidden:int8", "topk:K", "sample:N" or "anchored:N".
            temperatures: the declared temperatures; order and repetition do not matter.
            vocab_size: width V of the teacher's distribution, without padding.

        Raises:
            UsageError: the text is not a codec, or its numbers make no sense.
        """
        kind, colon, argument = text.strip().partition(":")
        if kind not in Codec._kinds or (colon and not argument):
            known = ", ".join(child.usage for child in Codec._kinds.values())
            raise UsageError(f"codec {text!r} is not known. Use one of: {known}.")
        make: Any = Codec._kinds[kind]
        found: Codec = make(vocab_size, tuple(temperatures), argument)
        return found

    @property
    @abstractmethod
    def columns(self) -> tuple[Column, ...]:
        """The arrays as they are stored."""

    def counts(self, columns: Mapping[str, Array]) -> dict[str, Array]:
        """Items of each position in the ragged columns: axis name to integers [positions]."""
        return {}

    def largest_id(self, columns: Mapping[str, Array]) -> int:
        """The largest id, or rank, of all entries; -1 where there is none. Columns are as read."""
        return -1

    @property
    @abstractmethod
    def bytes_per_position(self) -> float:
        """Rough size of a position on disk, for planning; real teachers need 50 % more or less."""

    @property
    def most_entries(self) -> int:
        """Numbers that a decoded position can have, at most."""
        return self.vocab_size

    @property
    def any_temperature(self) -> bool:
        """Whether targets are right at undeclared temperatures too."""
        return self.keeps_logits

    @property
    def keeps_means(self) -> bool:
        """Whether a mean of several teachers' probabilities is kept at every declared T."""
        return len(self.temperatures) == 1

    @property
    def uses_ranks(self) -> bool:
        """True if ids stored as frequency ranks take fewer bytes: those of one byte do not."""
        return not self.keeps_logits and self.vocab_size > 2**8

    @abstractmethod
    def encode(self, logits: Tensor, u: Tensor | None = None) -> dict[str, Tensor]:
        """Reduce logits on their own device. Shapes depend on shapes only: the host waits for
        nothing.

        Args:
            logits: [n, V], any float dtype and device. Masked ids may hold -inf, except for
                `dense`. Or [n, m, V], those of each declared temperature, divided by none: the mean
                of several distributions has no single ones. Codecs without `keeps_means` take no
                m above 1.
            u: float64 [n], uniform in [0, 1), from `position_uniform`; only codecs with
                `needs_noise` use it.

        Returns:
            Padded tensors for `pack`. "finite" is bool [n]: False where the logits of a position
            are unusable. A codec that has read all logits at T = 1 may add "peak" and "normalizer"
            for `kdcache.targets.device.label_logprobs`.
        """

    @abstractmethod
    def pack(
        self, encoded: Mapping[str, Array], id_to_rank: Array | None = None
    ) -> dict[str, Array]:
        """Turn the result of `encode` (as numpy) into stored columns, on a CPU.

        Args:
            encoded: the tensors of `encode` as arrays; slices joined along the first axis are fine.
            id_to_rank: [V] permutation; ids are stored as ranks (frequent ids small) where given.

        Raises:
            KdcacheError: a position with NaN or infinite logits; it is never stored.
        """

    @abstractmethod
    def at(
        self,
        columns: Mapping[str, Array],
        temperature: float,
        rank_to_id: Array | None = None,
    ) -> Targets:
        """Targets at one temperature, on the CPU.

        Args:
            columns: as made by `pack`.
            temperature: a declared one.
            rank_to_id: the inverse of the permutation that `pack` was given, or None for none.

        Raises:
            UsageError: the temperature is not declared.
        """

    def renumber(self, columns: Mapping[str, Array], rank_to_id: Array) -> dict[str, Array]:
        """Columns that were packed with ranks, as if they had been packed with none.

        The same targets, though entries of a position may be in another order.
        """
        return dict(columns)

    def in_floats(self) -> Codec:
        """The codec whose columns hold floats where this one's hold levels."""
        return self

    def check_temperature(self, temperature: float) -> None:
        """Refuse a temperature at which these targets would be wrong.

        Raises:
            UsageError: names the declared temperatures.
        """
        if self.any_temperature:
            canonical_temperatures([temperature])
        else:
            self._temperature_index(temperature)

    def _temperature_index(self, temperature: float) -> int:
        for index, declared in enumerate(self.temperatures):
            if math.isclose(temperature, declared, rel_tol=1e-6):
                return index
        names = ", ".join(f"{t:g}" for t in self.temperatures)
        raise UsageError(
            f"temperature {temperature:g} is not declared by this cache ({self}, temperatures "
            f"{names}), and its targets would be wrong there. Use a declared one, or build again "
            f"with --temperatures."
        )


def canonical_temperatures(temperatures: Sequence[float]) -> tuple[float, ...]:
    """Sort and deduplicate declared temperatures; refuse none, and others than positive numbers."""
    values = tuple(sorted({float(t) for t in temperatures}))
    if not values or not all(math.isfinite(t) and t > 0 for t in values):
        raise UsageError(
            f"temperatures are {list(temperatures)}, expected one or more positive numbers."
        )
    return values


def check_vocabulary(vocab_size: int, least: int = 2) -> None:
    """Refuse a vocabulary that is too small to learn from, or too large for the ids."""
    if not least <= vocab_size <= MAX_VOCABULARY:
        raise UsageError(
            f"the vocabulary has {vocab_size} ids, expected {least} to {MAX_VOCABULARY}."
        )


def positive_int(given: int | str, usage: str) -> int:
    """Read the number of a codec such as "topk:64"."""
    text = str(given)
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UsageError(f"codec has {text!r} for its number, expected {usage}.")
    return int(text)


def check_logits(logits: Tensor, vocab_size: int, temperatures: int = 1) -> Tensor:
    """Fail early on a slice of the wrong width: an error of the caller, not of the user.

    Returns the logits, [n, V] where those of one temperature are given.
    """
    shape = tuple(logits.shape[1:])
    if shape not in ((vocab_size,), (temperatures, vocab_size)) or not logits.is_floating_point():
        raise ValueError(
            f"logits are {logits.dtype} {list(logits.shape)}, "
            f"expected floats [positions, {vocab_size}]"
        )
    return logits[:, 0] if shape[:-1] == (1,) else logits


def refuse_bad_positions(finite: Array) -> None:
    """Raise if a position's logits are NaN or infinite: such a position is never stored."""
    if not finite.all():
        first = int(np.argmin(finite))
        raise KdcacheError(
            f"{int((~finite).sum())} of {len(finite)} positions have NaN or infinite logits, the "
            f"first is position {first} of this slice. Check the teacher's weights and dtype "
            f"(float16 overflows; use bfloat16 or float32)."
        )


def id_dtype(vocab_size: int) -> str:
    """Smallest unsigned type that numbers the vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def running_sum(values: Array, dtype: npt.DTypeLike = np.int64) -> Array:
    """`np.cumsum` of one axis, in a new array; see `sum_up_`."""
    return sum_up_(values.astype(dtype))


def sum_up_(values: Array) -> Array:
    """`np.cumsum` of one axis, in place.

    torch keeps the sum in a register where numpy goes through memory: a fifth of the time. Neither
    uses more than this thread.
    """
    torch.from_numpy(values).cumsum_(0)
    return values


def owners(counts: Array) -> Array:
    """Which run each item belongs to: i, `counts[i]` times, of every i (int64).

    What `np.repeat(np.arange(len(counts)), counts)` gives, but for runs of a few items in half the
    time.
    """
    ends = running_sum(counts)
    total = int(ends[-1]) if len(ends) else 0
    # One is added where a run begins; empty runs begin where the next one does.
    return sum_up_(np.bincount(ends[:-1], minlength=total)[:total])


def ragged_items(starts: Array, counts: Array) -> Array:
    """Indices `starts[i] .. starts[i] + counts[i] - 1` of every i, one run after another (int64).

    Args:
        starts: int64 [runs].
        counts: integers [runs].
    """
    used = np.flatnonzero(counts)
    return run_items(starts[used], counts[used])[0]


def run_items(starts: Array, counts: Array) -> tuple[Array, Array]:
    """`ragged_items` of non-empty runs, and the index of each run's first (int64)."""
    ends = running_sum(counts)
    first = ends - counts
    # A running sum of ones, reset where a run begins.
    items = np.ones(int(ends[-1]) if len(ends) else 0, np.int64)
    items[first] = starts
    items[first[1:]] -= starts[:-1] + counts[:-1] - 1
    return sum_up_(items), first
