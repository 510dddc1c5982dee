"""The targets of a row as its file has them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
