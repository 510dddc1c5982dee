"""How a student with a tokenizer of its own reads the rows of a cache: their texts or words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.errors import UsageError
from kdcache.pretrained import UnreadableError, read_tokenizer
from kdcache.rows import WordReader
from kdcache.rows.batches import padded
from kdcache.rows.words import ReadWords
from kdcache.student.info import StudentInfo
from kdcache.tasks import TASKS
from kdcache.teacher.reach import reach_of

_NO_BOUND = 1 << 20  # tokenizers without a longest row have a model_max_length beyond it

Tokenize = Callable[[Sequence[Any], Sequence[str] | None], Mapping[str, Tensor]]
"""Texts of a batch (and second texts) to tensors [B, L]; or sentences, each a list of words, to
tensors with a `first_tokens` bool [B, L] among them: the first token of each word."""


def student_tokenize(
    student: nn.Module, name: str, info: StudentInfo, *, trust_remote_code: bool = False
) -> Tokenize | None:
    """How a student turns texts or words into tensors, or None if it uses the cached ids.

    A module may bring a method `tokenize`, a new bilstm its words, a folder its tokenizer (none is
    needed if it is the cache's).

    Args:
        student: what `load_student` returned for `name`.
        name: see `load_student`.
        info: the cache's side.
        trust_remote_code: run code that the folder brings.
    """
    if not TASKS[info.task].rereads:
        return None
    own = getattr(student, "tokenize", None)
    if own is not None:
        return own  # type: ignore[no-any-return]
    tokenizer = getattr(student, "tokenizer", None) or tokenizer_of(name, trust_remote_code)
    if tokenizer is None or same_tokenizer(tokenizer, info.tokenizer):
        return None
    reach = reach_of(student) or _NO_BOUND
    if TASKS[info.task].words:
        return WordTokenize(tokenizer, reach)
    if tokenizer.pad_token_id is None:
        raise UsageError(
            f"the tokenizer of student {name} has no padding token, which batches of texts need. "
            "Set pad_token in its tokenizer_config.json, and pad_token_id in config.json."
        )
    return HfTokenize(tokenizer, min(info.max_length, reach))


@dataclass(frozen=True)
class HfTokenize:
    """A Hugging Face tokenizer as a function from texts to padded tensors.

    Attributes:
        tokenizer: any `PreTrainedTokenizerBase`.
        max_length: longer rows are cut.
    """

    tokenizer: Any
    max_length: int

    def __call__(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> Mapping[str, Tensor]:
        """Tokenise a batch; int64 [B, L] each."""
        second = None if pairs is None else list(pairs)
        out = self.tokenizer(
            list(texts),
            second,
            truncation=True,
            max_length=self.max_length,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        return dict(out)


@dataclass(frozen=True)
class WordTokenize:
    """A Hugging Face tokenizer as a function from sentences of words to padded tensors.

    No row is cut, since each word has a target.

    Attributes:
        tokenizer: a fast one.
        reach: most tokens that the student reads.
    """

    tokenizer: Any
    reach: int = _NO_BOUND

    @cached_property
    def _reader(self) -> WordReader:
        return WordReader(self.tokenizer)

    def read(self, sentences: Sequence[Sequence[str]]) -> list[ReadWords]:
        """The tokens of each sentence.

        Raises:
            UsageError: a word has no token, or a row is longer than the model's longest.
        """
        found: list[ReadWords] = []
        most = min(self.reach, self.tokenizer.model_max_length)
        for words, one in zip(sentences, self._reader.read(sentences), strict=True):
            if isinstance(one, str):
                raise UsageError(f"the student cannot read {words[:20]}: {one}.")
            if len(one.ids) > most:
                raise UsageError(
                    f"the student reads at most {most} tokens, and a row has {len(one.ids)} of its "
                    "tokens. Build with a smaller --max-length."
                )
            found.append(one)
        return found

    def __call__(
        self, sentences: Sequence[Sequence[str]], pairs: Sequence[str] | None = None
    ) -> Mapping[str, Tensor]:
        """Tokenise a batch; int64 [B, L] each, and `first_tokens` bool [B, L]."""
        rows = self.read(sentences)
        lengths = np.array([len(row.ids) for row in rows])

        def pad(columns: Sequence[np.ndarray], fill: int) -> Tensor:
            return torch.from_numpy(padded(np.concatenate(columns), lengths, fill))

        batch = {
            "input_ids": pad([row.ids for row in rows], self.tokenizer.pad_token_id or 0),
            "attention_mask": pad([np.ones(n, np.int64) for n in lengths], 0),
            "first_tokens": pad([row.first for row in rows], 0).bool(),
        }
        types = [row.type_ids for row in rows if row.type_ids is not None]
        if types:
            batch["token_type_ids"] = pad(types, 0)
        return batch


def tokenizer_of(name: str, trust: bool) -> Any:
    """The tokenizer of a folder, or None; a hub id's is not fetched for the comparison alone."""
    if not any(
        (Path(name) / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")
    ):
        return None
    try:
        return read_tokenizer(name, trust_remote_code=trust)
    except UnreadableError as error:
        raise UsageError(f"student {name} has no usable tokenizer: {error}.") from error


def same_tokenizer(a: Any, b: Any) -> bool:
    """Whether two tokenizers give the same ids."""
    if b is None:
        return False
    sample = "The Quick-brown fox, isn't it? Naïve 123."
    return bool(a.get_vocab() == b.get_vocab() and a(sample)["input_ids"] == b(sample)["input_ids"])
