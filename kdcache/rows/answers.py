"""What a model wrote, and how it was asked to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        samples: answers of each prompt.
        temperature: logits are divided by it; 0 takes the most probable token.
        top_p: share of the probability from which is drawn; 1 for all.
        top_k: number of tokens from which is drawn; 0 for all.
        min_p: least probability of a token, as a share of the largest.
        max_new_tokens: of an answer, at most.
        stop: texts that end an answer.
        seed: of the noise.
    """

    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        ids: int32 [n], the ids that it drew, the last one an end if it stopped by that.
        logprobs: float32 [n], of each of them, at temperature 1 over the whole vocabulary.
        reason: whether it ended by itself or had no room left.
    """

    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    reason: Reason


def text_of(tokenizer: Any, ids: npt.NDArray[np.int32], stop: Sequence[str]) -> str:
    """The text of an answer, up to the first text that ends it."""
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    ends = [at for one in stop if (at := text.find(one)) >= 0]
    return text[: min(ends)] if ends else text
