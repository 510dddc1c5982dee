"""Tokens: asking the library itself gives what a call of the tokenizer gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from kdcache.corpus import Record
from kdcache.rows import RowSpec, make_encoder
from kdcache.rows.tokens import _library, tokens_of

TOKENIZERS = Path(__file__).resolve().parent / "tiny_tokenizers"
TEXTS = ["One, two and three.", "", " a", "é\u2028\x00 中文", "long " * 40, "<|end|> x"]


@pytest.fixture(params=["bytes", "pieces", "wordpiece"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZERS / request.param)


@pytest.mark.parametrize(
    "how",
    [
        {"add_special_tokens": False, "truncation": False},
        {"add_special_tokens": True, "truncation": True, "max_length": 9},
    ],
)
@pytest.mark.parametrize("paired", [False, True])
def test_ids_types_and_cuts_are_those_of_a_call(
    tokenizer: Any, how: dict[str, Any], paired: bool
) -> None:
    pairs = TEXTS[::-1] if paired else None
    assert _library(tokenizer) is not None, "the way that is tested"
    # What an earlier call, or the tokenizer's file, has set must not stay.
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    found = list(tokens_of(tokenizer, TEXTS, pairs, **how))
    called = tokenizer(TEXTS, pairs, verbose=False, **how)
    assert [ids for ids, _, _ in found] == called["input_ids"]
    if "token_type_ids" in called:
        assert [types for _, types, _ in found] == called["token_type_ids"]
    else:
        assert all(types is None for _, types, _ in found)
    assert [cut for *_, cut in found] == [bool(e.overflowing) for e in called.encodings]
    assert any(cut for *_, cut in found) == ("max_length" in how)


def test_a_class_that_does_more_in_its_call_is_called(tokenizer: Any) -> None:
    class Upper(type(tokenizer)):  # type: ignore[misc]
        def _encode_plus(self, text: Any, *args: Any, **options: Any) -> Any:
            return super()._encode_plus([one.upper() for one in text], *args, **options)

    class Slow:
        is_fast, eos_token_id = False, 0

        def __call__(self, texts: Any, *_: Any, **options: Any) -> dict[str, Any]:
            return {"input_ids": [[ord(c) for c in text] for text in texts]}

    plain = tokenizer(["AB"], add_special_tokens=False)["input_ids"]
    tokenizer.__class__ = Upper
    assert [ids for ids, _, _ in tokens_of(tokenizer, ["ab"], add_special_tokens=False)] == plain
    assert list(tokens_of(Slow(), ["ab", ""])) == [([97, 98], None, False), ([], None, False)]


def test_rows_of_a_tokenizer_that_was_left_truncating(tokenizer: Any) -> None:
    """As `tokenizer.json` files are that were saved after a call with truncation."""
    spec = RowSpec("sequence-classification", max_length=64)
    text = "word " * 30
    expected = tokenizer(text, truncation=True, max_length=64)["input_ids"]
    tokenizer.backend_tokenizer.enable_truncation(4)
    (row,) = make_encoder(spec, tokenizer).encode([Record({"text": text}, "f", "line 1")])
    assert row.input_ids.tolist() == expected
