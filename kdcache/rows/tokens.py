"""Texts to ids: what a tokenizer's own call gives, at the rate of the library behind it.

A `Document` is a text to tokenise and the parts of it that have labels. A call of a transformers
tokenizer also finds the characters of each token, and copies all of it into Python lists. Where
only ids are wanted, the library `tokenizers` is called itself. A call on one letter comes first: it
sets truncation, padding and special tokens as the call on the texts would. A tokenizer whose class
does more in its call is called as it is.

Cost: 1.0 to 1.1 times the library's; of a tokenizer without it, its own.
Guarantee: the same ids either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from kdcache.corpus import RecordError, kind_of
from kdcache.errors import UsageError

Tokens = tuple[list[int], list[int] | None, bool]
"""Ids of a text, their types (None where the model has none), and whether it was truncated (as far
as the tokenizer tells: slow ones do not)."""

# What every call here asks for. No warning about the model's length: rows are cut to it elsewhere.
_PLAIN = {"padding": False, "return_attention_mask": False, "verbose": False}
# What stands between a call and the library.
_CALLS = ("__call__", "_encode_plus", "_batch_encode_plus", "set_truncation_and_padding")
_TYPES = "token_type_ids"


def tokens_of(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None = None, **how: Any
) -> Iterator[Tokens]:
    """Tokens of texts, or of pairs of texts.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: At least one.
        pairs: The second text of each.
        how: Arguments of its call, such as `add_special_tokens`, `truncation` and `max_length`.
    """
    how = {**_PLAIN, **how}
    library = _library(tokenizer)
    if library is None:
        yield from _called(tokenizer, texts, pairs, how)
        return
    tokenizer("a", None if pairs is None else "a", **how)
    typed = _TYPES in tokenizer.model_input_names
    encode = getattr(library, "encode_batch_fast", library.encode_batch)
    given = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
    for found in encode(given, add_special_tokens=how.get("add_special_tokens", True)):
        yield found.ids, found.type_ids if typed else None, bool(found.overflowing)


def encoded(tokenizer: Any, texts: Sequence[str], *, offsets: bool = False) -> Any:
    """Whole texts without the tokenizer's own tokens, by its call: what `tokens_of` leaves out.

    A `BatchEncoding`, with `input_ids` and, of a fast tokenizer, `word_ids`; with `offsets` also
    the characters of each token, `offset_mapping`.
    """
    more = {"return_offsets_mapping": True} if offsets else {}
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        truncation=False,
        return_token_type_ids=False,
        **_PLAIN,
        **more,
    )


def _library(tokenizer: Any) -> Any:
    """The library's tokenizer behind a fast one; None where a call does more than ask it."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    own = type(tokenizer)
    if any(getattr(own, c, None) is not getattr(PreTrainedTokenizerFast, c, None) for c in _CALLS):
        return None
    return tokenizer.backend_tokenizer


def _called(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, how: dict[str, Any]
) -> Iterator[Tokens]:
    encoded = tokenizer(list(texts), None if pairs is None else list(pairs), **how)
    types = encoded.get(_TYPES)
    told = getattr(encoded, "encodings", None) or [None] * len(texts)
    for i, (ids, text) in enumerate(zip(encoded["input_ids"], told, strict=True)):
        yield ids, None if types is None else types[i], bool(text is not None and text.overflowing)


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
    """Refuse a tokenizer that does not tell which characters a token stands for."""
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
