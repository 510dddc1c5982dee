"""Document: a text to tokenise, and which parts of it have labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdcache.corpus import RecordError, kind_of
from kdcache.errors import UsageError


@dataclass(slots=True)  # to make a frozen one takes three times as long, for each record
class Document:
    """A text to tokenise.

    Attributes:
        text: All of it.
        loss_ranges: Stretches [start, stop) of characters to predict; None is everything.
        framed: Whether the tokenizer's BOS and an EOS go around it (a chat template brings its
            own).
        tokens: Ids and loss mask (0/1), where a template has given them already.
    """

    text: str
    loss_ranges: Sequence[tuple[int, int]] | None = None
    framed: bool = True
    tokens: tuple[list[int], list[int]] | None = None


def checked_text(value: Any, column: str) -> str:
    """`value` as text that a tokenizer takes; missing is empty.

    Raises:
        RecordError: It is not text, or holds half a surrogate pair (JSON can, UTF-8 can't).
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RecordError(f"column {column!r} holds {kind_of(value)} where text was expected")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise RecordError(f"column {column!r} holds half of a surrogate pair") from None
    return value


def need_offsets(tokenizer: Any, what: str) -> None:
    """Refuse a tokenizer that does not tell which characters a token stands for.

    Raises:
        UsageError: It doesn't.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"{what} need a tokenizer that returns the characters of each token; "
            f"{type(tokenizer).__name__} can't. Use one with a tokenizer.json."
        )


def frame(tokenizer: Any, *, target: bool = False) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer itself puts before and behind one text; or one target."""
    given = {"text_target" if target else "text": "a"}
    bare, dressed = (
        list(tokenizer(**given, add_special_tokens=special)["input_ids"])
        for special in (False, True)
    )
    before = next(
        (i for i in range(len(dressed)) if bare and dressed[i : i + len(bare)] == bare), None
    )
    return ([], []) if before is None else (dressed[:before], dressed[before + len(bare) :])
