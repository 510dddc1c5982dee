"""The bytes of each token of a tokenizer, and the tokens of a text byte by byte.

Algorithm: a token's bytes are read from the vocabulary and not from `decode`, which changes text:
it drops incomplete characters, joins spaces, and strips. Only one space depends on a token's
neighbours: SentencePiece and its like put one before a text, which `decode` takes off again.

Cost: one pass over the vocabulary (a second for 256k ids); a row costs one join of its tokens.
Guarantee: a tokenizer that may lose bytes is refused, by its structure and by a trial. The bytes of
`tokenise` are compared with the text as well (see `kdcache.align.aligner`).

Whether each byte of a text is in a token is found in `tokenizer.json`. Two kinds keep every byte.
*Byte-level* ones write a byte as one of 256 printable characters (GPT-2, Llama 3, Qwen). Those with
*byte fallback* write a space as a mark, mostly U+2581, and a character that they lack as tokens
`<0x00>` to `<0xFF>` (Llama 2, Gemma). All others lose something: lower case, kinds of space,
characters that become `<unk>`. They are refused.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer

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


Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_TRIAL = (
    "The Cat sat.  On 12,345 mats!\n\n\tif x == 'y':  # n\u0303o\r\n"
    " \u00e9\ufb01\u2460\uff21 \u4f60\u597d\u3002\u3053\u3093\u306b\u3061\u306f "
    "\U0001f469\u200d\U0001f680\U0001f1e9\U0001f1ea \u0645\u0631\u062d\u0628\u0627 "
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u00ad\u200b\u00a0\u3000\ufeff end "
)


class TokenBytes:
    """A tokenizer seen as bytes.

    Attributes:
        tokens: bytes of each id; empty for special tokens, and for ids that are not a token's.
        widths: int64 [ids], their lengths.
        special: bool [ids], special tokens, such as beginning-of-text and marks of a chat template.
            They have no bytes.
        known: bool [ids], ids of tokens.
        byte_ids: int64 [256], the token that is this byte alone, or -1.
        marks: id of each special token by its text.
        opening: ids that the tokenizer itself puts before a text (mostly the beginning-of-text, or
            none).
        eos_id: id that ends a document, or None.
        filler: id of a row that has no token.
    """

    def __init__(self, tokenizer: Any, name: str = "the tokenizer") -> None:
        """Read a tokenizer.

        Args:
            tokenizer: a Hugging Face tokenizer.
            name: what messages call it, such as `the cache's tokenizer`.

        Raises:
            UsageError: it may lose bytes, or its tokens can't be read.
        """
        self.name = name
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UsageError(
                f"{name} has no tokenizer.json ({type(tokenizer).__name__}): the bytes of its "
                "tokens can't be read. Students of other tokenizers need one."
            )
        state = json.loads(backend.to_str())
        self.structure = structure_of(state, name)
        self._read(state, tokenizer)
        self.opening = _opening(tokenizer)
        self.eos_id: int | None = tokenizer.eos_token_id
        self.filler = next((i for i in (self.eos_id, *self.marks.values()) if i is not None), 0)
        special = set(self.marks.values())
        self._whole, self._continuing = (
            _Encoder(backend, faithful(state, prefix=prefix), special) for prefix in (True, False)
        )
        self._try()

    def _read(self, state: dict[str, Any], tokenizer: Any) -> None:
        """Fill the tables."""
        vocabulary = state["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: pieces with their scores
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        found = {number: self._piece(piece) for piece, number in vocabulary.items()}
        named = set(tokenizer.all_special_ids)
        self.marks: dict[str, int] = {}
        self._added: set[int] = set()
        for token in state["added_tokens"]:
            number, text = token["id"], token["content"]
            self._added.add(number)
            if token["special"] or number in named:
                self.marks[text] = number
                found[number] = b""
            else:
                found[number] = self._text(text)
        size = max(found, default=-1) + 1
        self.tokens = [found.get(number) or b"" for number in range(size)]
        self.widths: Ids = np.array([len(token) for token in self.tokens], np.int64)
        self.special: Mask = np.zeros(size, np.bool_)
        self.special[list(self.marks.values())] = True
        self.known: Mask = np.zeros(size, np.bool_)
        self.known[[number for number, token in found.items() if token is not None]] = True
        self.byte_ids: Ids = np.full(256, -1, np.int64)
        singles = ("<0x{:02X}>".format, _CHARACTERS.__getitem__)[self.structure.byte_level]
        for byte in range(256):
            self.byte_ids[byte] = vocabulary.get(singles(byte), -1)
        # Gemma has a tab as a piece of text alone.
        mark = self.structure.mark or ""
        pieces = [(chr(byte) if byte != 0x20 else mark) in vocabulary for byte in range(0x80)]
        fallback = not self.structure.byte_level
        missing = [b for b in TEXT_BYTES if self.byte_ids[b] < 0]
        missing = [b for b in missing if b >= 0x80 or not (fallback and pieces[b])]
        if missing:
            raise UsageError(
                f"{self.name} has no token for {len(missing)} of the {len(TEXT_BYTES)} bytes of "
                f"text, such as 0x{missing[0]:02X}, so it loses characters. Students of other "
                "tokenizers need one that keeps every byte."
            )

    def _piece(self, piece: str) -> bytes | None:
        """The bytes of an entry of the vocabulary; None if it is not of its tokenizer's form."""
        if self.structure.byte_level:
            try:
                return bytes(_BYTES[character] for character in piece)
            except KeyError:
                return None
        if _FALLBACK.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        return self._text(piece)

    def _text(self, piece: str) -> bytes:
        """Bytes of a piece of text, in which a mark stands for a space."""
        return piece.replace(self.structure.mark or " ", " ").encode("utf-8", "surrogatepass")

    def _try(self) -> None:
        """Compare the bytes of a text of many kinds with those of its tokens."""
        for opens in (True, False):
            for text in (_TRIAL, f" {_TRIAL}"):
                (ids,) = self.tokenise([text], opens=opens)
                if self.text_bytes(ids, text.encode()) is None:
                    raise UsageError(
                        f"{self.name} does not give a text back byte by byte: students of other "
                        "tokenizers need one that does."
                    )

    def __len__(self) -> int:
        return len(self.tokens)

    def decode(self, ids: npt.ArrayLike, begins: npt.ArrayLike | None = None) -> tuple[bytes, Ids]:
        """The bytes of a row, and the byte range of each of its tokens.

        Args:
            ids: integers [L].
            begins: bool [L], tokens with which a text begins, so that a space before them is the
                tokenizer's own. Default: the first, and those behind `opening` or the
                end-of-text. A row that continues a text begins none.

        Returns:
            The bytes, and int64 [L + 1]: token i is `data[starts[i]:starts[i + 1]]`. A special
            token has an empty range, and so has a space of the tokenizer's own.

        Raises:
            UsageError: an id is not a token's.
        """
        row = np.asarray(ids, np.int64)
        self.check(row)
        if begins is None:
            before = np.concatenate([[True], np.isin(row, [*self.opening, self.eos_id or -1])[:-1]])
            begins = before[: len(row)] & ~self.special[row]
        widths = self.widths[row]
        parts = [self.tokens[number] for number in row.tolist()]
        for i in np.flatnonzero(self.own_spaces(row, np.asarray(begins, np.bool_))):
            parts[i] = parts[i][1:]
            widths[i] -= 1
        starts = np.zeros(len(row) + 1, np.int64)
        np.cumsum(widths, out=starts[1:])
        return b"".join(parts), starts

    def own_spaces(self, ids: Ids, begins: Mask) -> Mask:
        """Tokens that begin with a space of the tokenizer's own and not the text's: bool [L].

        Args:
            begins: bool [L], tokens with which a text begins.
        """
        if self.structure.prefix == "never" or not len(ids):
            return np.zeros(len(ids), np.bool_)
        first: Mask = begins.copy()
        if self.structure.prefix == "always":
            first[1:] |= np.isin(ids[:-1], list(self._added))
        for i in np.flatnonzero(first):
            first[i] = self._own_space(ids[i : i + 2])
        return first

    def _own_space(self, ids: Ids) -> bool:
        """Whether the first of some tokens, with which a text begins, has a space before the text.

        Most tokenizers put none before a text that begins with a space. So two spaces are the
        text's, and so is one with nothing behind it. One before a letter can be either's, since
        both texts have the same tokens.
        """
        first_token = self.tokens[int(ids[0])]
        if first_token[:1] != b" " or self.structure.doubles:
            return first_token[:1] == b" "
        if len(first_token) > 1 or len(ids) == 1:
            return first_token[1:2] != b" "
        following = int(ids[1])
        return following not in self._added and self.tokens[following][:1] != b" "

    def check(self, ids: Ids) -> None:
        """Refuse ids that are not a token's.

        Raises:
            UsageError: there is one.
        """
        outside = ~self._known(ids)
        if outside.any():
            raise UsageError(
                f"a row holds {int(ids[outside][0])}, which is not the id of a token of "
                f"{self.name}: its text can't be read. Students of other tokenizers need a cache "
                "without such rows."
            )

    def is_text(self, ids: Ids) -> Mask:
        """Which ids are text, bool [L]: not a special token, nor an id that is not a token's."""
        found = self._known(ids)
        found[found] = ~self.special[ids[found]]
        return found

    def _known(self, ids: Ids) -> Mask:
        inside: Mask = (ids >= 0) & (ids < len(self))
        inside[inside] = self.known[ids[inside]]
        return inside

    def tokenise(self, texts: Sequence[str], *, opens: bool) -> list[Ids]:
        """Tokens of texts, without special ones: what looks like one in a text is text.

        Args:
            opens: whether each begins a text; one that continues a text gets no space before it.

        Returns:
            int64 of each text.
        """
        return (self._whole if opens else self._continuing)(texts)

    def text_bytes(self, ids: Ids, text: bytes) -> Ids | None:
        """The bytes of each token of a text, if they are those of the text.

        Returns:
            int64 [n], how many bytes of the text each token has; None if the tokens have others.
        """
        joined = b"".join([self.tokens[number] for number in ids.tolist()])
        widths = self.widths[ids]
        if joined == text:
            return widths
        if self.structure.prefix != "never" and joined == b" " + text:
            widths[0] -= 1
            return widths
        return None


def _byte_level() -> dict[str, int]:
    """The byte of each of GPT-2's 256 characters: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_level()
_CHARACTERS = {byte: character for character, byte in _BYTES.items()}
_FALLBACK = re.compile("<0x[0-9A-F]{2}>")
_NO_MODEL = {"type": "BPE", "vocab": {}, "merges": []}


class _Encoder:
    """A tokenizer of text alone, which shares the model of another one.

    It has no special tokens: `<|end|>` in a text is seven characters.
    """

    def __init__(self, backend: Tokenizer, state: dict[str, Any], special: Collection[int]) -> None:
        steps = Tokenizer.from_str(json.dumps(state | {"model": _NO_MODEL, "added_tokens": []}))
        self._tokenizer = Tokenizer(backend.model)
        if steps.normalizer is not None:
            self._tokenizer.normalizer = steps.normalizer
        if steps.pre_tokenizer is not None:
            self._tokenizer.pre_tokenizer = steps.pre_tokenizer
        added = [t for t in state["added_tokens"] if t["id"] not in special]
        self._tokenizer.add_tokens(
            [AddedToken(**{k: v for k, v in token.items() if k != "id"}) for token in added]
        )
        # They are numbered anew, behind the model's own.
        number_of = self._tokenizer.get_added_tokens_decoder().items()
        numbers = {token.content: number for number, token in number_of}
        mine = [numbers[token["content"]] for token in added]
        ids = [token["id"] for token in added]
        self._table = np.arange(max([0, self._tokenizer.get_vocab_size(), *mine]) + 1)
        self._table[mine] = ids

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._table[np.asarray(one.ids, np.int64)] for one in found]


def _opening(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before a text."""
    bare, dressed = (
        list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True)
    )
    before = next(
        (i for i in range(len(dressed)) if bare and dressed[i : i + len(bare)] == bare), 0
    )
    return [int(number) for number in dressed[:before]]
