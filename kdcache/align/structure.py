"""What a tokenizer does to text, by its `tokenizer.json`: whether each byte of it is in a token.

Two kinds keep every byte. *Byte-level* ones write a byte as one of 256 printable characters (GPT-2,
Llama 3, Qwen). Those with *byte fallback* write a space as a mark, mostly U+2581, and a character
that they lack as tokens `<0x00>` to `<0xFF>` (Llama 2, Gemma). All others lose something: lower
case, kinds of space, characters that become `<unk>`. They are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from kdcache.errors import UsageError

Prefix = Literal["never", "first", "always"]
State = dict[str, Any]

# The bytes of text in UTF-8 (RFC 3629). SmolLM2 lacks some others: those of control characters and
# of planes where no character is assigned.
TEXT_BYTES: Final = (0x09, 0x0A, 0x0D, *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1))
_KEEPING = {"ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "UnicodeScripts"}


@dataclass(frozen=True)
class Structure:
    """How a tokenizer writes bytes.

    Attributes:
        mark: what a space is written as by a tokenizer with byte fallback; None of a byte-level
            one.
        prefix: where the tokenizer puts a space that the text lacks: `never`, at the `first` token
            of a text, or `always`: behind each added token within it too.
        doubles: whether it puts one before a text that begins with a space, too.
    """

    mark: str | None
    prefix: Prefix
    doubles: bool = False

    @property
    def byte_level(self) -> bool:
        """Whether a byte is one of 256 characters, and not a piece of text or `<0x..>`."""
        return self.mark is None


def structure_of(state: Mapping[str, Any], name: str) -> Structure:
    """What a tokenizer does to bytes.

    Args:
        state: its `tokenizer.json`.
        name: of the tokenizer, for messages.

    Raises:
        UsageError: it may lose bytes.
    """

    def refuse(what: str) -> UsageError:
        return UsageError(
            f"{name} {what}, so its tokens do not give the text back byte by byte. Students of "
            "other tokenizers need byte-level BPE, or byte fallback without a normaliser."
        )

    model = state["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "Unigram")
    if kind not in ("BPE", "Unigram"):
        raise refuse(f"is a {kind} tokenizer")
    if model.get("dropout"):
        raise refuse("drops merges at random")
    for field in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise refuse(f"marks parts of words ({field})")
    byte_level = False
    mark: str | None = None
    prefix: Prefix = "never"
    doubles = False
    for node in nodes(state.get("normalizer")):
        if node["type"] == "ByteLevel":
            byte_level = True
        elif node["type"] == "Prepend":
            mark, prefix, doubles = node["prepend"], "always", True
        elif node["type"] == "Replace" and node["pattern"] == {"String": " "}:
            mark = node["content"]
        elif node["type"] != "NFC" and (
            node["type"] != "Precompiled" or node.get("precompiled_charsmap")
        ):
            raise refuse(f"normalises text ({node['type']})")
    for node in nodes(state.get("pre_tokenizer")):
        if node["type"] not in _KEEPING or node.get("behavior") == "Removed":
            raise refuse(f"leaves out what stands between words ({node['type']})")
        if node["type"] == "ByteLevel":
            byte_level = True
            prefix = "always" if node.get("add_prefix_space") else prefix
        elif node["type"] == "Metaspace":
            mark, prefix = node["replacement"], node.get("prepend_scheme", "always")
    if byte_level and mark is not None:
        raise refuse("mixes two ways to write a space")
    if not byte_level and not model.get("byte_fallback"):
        raise refuse("has no tokens for single bytes")
    if not byte_level and mark is None:
        mark = " "  # written as it is
    return Structure(mark, prefix, doubles)


def faithful(state: Mapping[str, Any], *, prefix: bool) -> State:
    """A `tokenizer.json` that gives the tokens of a text as it is.

    Args:
        state: of a tokenizer that `structure_of` accepts.
        prefix: False leaves out the space before the text, for what continues a text.

    Returns:
        A copy without the model, special tokens around the text, truncation, padding, and the NFC
        normaliser: under it composed text, which is nearly all text, is the same.
    """
    new = copy.deepcopy({k: v for k, v in state.items() if k != "model"})
    new |= {"truncation": None, "padding": None, "post_processor": None}
    dropped = {"NFC"} if prefix else {"NFC", "Prepend"}
    kept = [n for n in nodes(new.get("normalizer")) if n["type"] not in dropped]
    new["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    if not prefix:
        for node in nodes(new.get("pre_tokenizer")):
            if node["type"] == "ByteLevel":
                node["add_prefix_space"] = False
            elif node["type"] == "Metaspace":
                node["prepend_scheme"] = "never"
    return new


def nodes(part: Any) -> Iterator[State]:
    """The steps of a normaliser or a pre-tokenizer, sequences taken apart."""
    if not part:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for inner in part.get("normalizers") or part.get("pretokenizers") or ():
        yield from nodes(inner)
