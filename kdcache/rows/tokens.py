"""Texts to ids: what a tokenizer's own call gives, at the rate of the library behind it.

A call of a transformers tokenizer also has the library `tokenizers` find the characters of each
token, and copies all that is known of each text into Python lists. Where ids are all that is wanted
the library is asked itself, for ids alone. A call on one letter comes first: it sets truncation,
padding and special tokens as the call on the texts would. A tokenizer whose class does more in its
call is called as it is.

Cost: 1.0 to 1.1 times the library's; of a tokenizer without it, its own.
Guarantee: the same ids either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

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
        texts: One or more.
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

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: One or more.
        offsets: Whether the characters of each token are wanted (`offset_mapping`).

    Returns:
        A `BatchEncoding`, with `input_ids` and, of a fast tokenizer, `word_ids`.
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
