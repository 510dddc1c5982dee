"""Entities of tagged sequences: their F1 as conlleval and seqeval's default mode define it.

A tag is a prefix and a type: B begins an entity, I goes on with it, E ends one, S is one by itself,
O is none. BIO, IO, IOE and IOBES need no telling apart: an entity begins at B and S, where the type
changes, and at an I or E with no entity before it; it ends before the next such tag, at O, E and S.
The prefixes of BILOU and BMES are read as those of IOBES. Where all entities are of one type, tags
may be prefixes alone, as in B, I, O of key phrases and B, M, E, S of words. An entity is right if
its first word, its last one and its type are.

Cost: some numpy calls a batch. Guarantee: counts of parts add up to those of the whole, as long as
no sequence is divided.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

_TAG = re.compile(r"([BIESLUM])(?:-(.+))?")
_O, _B, _I, _E, _S = range(5)
_CODES = {"B": _B, "I": _I, "M": _I, "E": _E, "L": _E, "S": _S, "U": _S}


def are_entities(names: Sequence[str]) -> bool:
    """Whether classes are the tags of entities: O, and a prefix with a type, such as B-PER.

    Or prefixes alone, with B and an end of them: other letters may be sizes, or parts of speech.
    """
    tags = [_TAG.fullmatch(name) for name in names if name != "O"]
    if len(names) < 2 or not all(tags):
        return False
    bare = [name for name in names if "-" not in name]
    return set(bare) <= {"O"} or ("B" in bare and bool({"O", "E", "L"} & set(bare)))


@dataclass
class Entities:
    """Counts of entities.

    Attributes:
        names: the tags in the order of their numbers, see `are_entities`.
        true: entities of the labels.
        predicted: those of the predictions.
        right: those that are both.
    """

    names: Sequence[str]
    true: int = 0
    predicted: int = 0
    right: int = 0

    def __post_init__(self) -> None:
        tags = [_TAG.fullmatch(name) for name in self.names]
        types = sorted({tag[2] or "" for tag in tags if tag})
        self._codes = np.array([_CODES[tag[1]] if tag else _O for tag in tags])
        self._types = np.array([1 + types.index(tag[2] or "") if tag else 0 for tag in tags])

    def add(self, labels: Array, predictions: Array, lengths: Array) -> None:
        """Count the entities of some sequences.

        Args:
            labels: int [n], the tags of all sequences, one after another.
            predictions: int [n], the predicted ones.
            lengths: int [sequences], words of each.
        """
        ours, theirs = (self._found(tags, lengths) for tags in (labels, predictions))
        self.true += len(ours)
        self.predicted += len(theirs)
        self.right += len(ours & theirs)

    def merge(self, other: Entities) -> None:
        """Add the counts of other sequences."""
        self.true += other.true
        self.predicted += other.predicted
        self.right += other.right

    def _found(self, tags: Array, lengths: Array) -> set[tuple[int, int, int]]:
        """First word, word after the last, and type of each entity; words count over all sequences,
        with one of no entity behind each.
        """
        tags = np.asarray(tags, np.int64)
        lengths = np.asarray(lengths, np.int64)
        ends = np.cumsum(lengths)
        at = np.arange(len(tags)) + np.repeat(np.arange(len(lengths)), lengths) + 1
        codes = np.zeros(len(tags) + len(lengths) + 2, np.int64)
        types = np.zeros(len(codes), np.int64)
        assert not len(ends) or ends[-1] == len(tags), "lengths are those of the sequences"
        codes[at], types[at] = self._codes[tags], self._types[tags]
        before, now = codes[:-1], codes[1:]
        changed = types[:-1] != types[1:]
        begins = np.isin(now, (_B, _S)) | (
            np.isin(now, (_I, _E)) & (changed | np.isin(before, (_O, _E, _S)))
        )
        over = np.isin(before, (_E, _S)) | (
            np.isin(before, (_B, _I)) & (changed | np.isin(now, (_O, _B, _S)))
        )
        (first,) = np.nonzero(begins)
        (after,) = np.nonzero(over)
        kinds = types[1:][first]
        return set(zip(first.tolist(), after.tolist(), kinds.tolist(), strict=True))

    @property
    def precision(self) -> float:
        """Share of the predicted entities that are right; NaN where there are none."""
        return ratio(self.right, self.predicted)

    @property
    def recall(self) -> float:
        """Share of the true entities that were found; NaN where there are none."""
        return ratio(self.right, self.true)

    @property
    def f1(self) -> float:
        """Micro F1, `2 TP / (2 TP + FP + FN)`; NaN where there are no entities at all."""
        return ratio(2 * self.right, self.true + self.predicted)


def ratio(part: float, whole: float) -> float:
    """`part / whole`, NaN if the whole is 0."""
    return part / whole if whole else math.nan
