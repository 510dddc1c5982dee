"""Bytes of tokens, and rows tokenised anew: no byte lost, none twice, no label that is not due."""

from __future__ import annotations

import itertools
import json
import os
from functools import cache
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kdcache.align import Aligner, Alignment, CachedRow, TokenBytes, label_bytes
from kdcache.align.aligner import settled, texts_in
from kdcache.errors import UsageError
from kdcache.tasks import IGNORE

HERE = Path(__file__).parent / "tiny_tokenizers"
EXAMPLES = int(os.environ.get("KDCACHE_TEST_EXAMPLES", "60"))  # thousands find rarer things
NAMES = ("bytes", "pieces", "unigram", "metaspace", "first")
LIKE_REAL = ("qwen", "gemma")  # what is particular about the tokenizers of Qwen3 and Gemma 2
TEXTS = st.lists(
    st.one_of(
        st.sampled_from([*"the boat cat saw  \n\t.,'1234", "<think>", "<|im_start|>"]),
        st.sampled_from(
            "éñ\u0303\u0301ﬁ①\uff21你好。こ\U0001f469\u200d\U0001f680\U0001f1e9\u0e31\u00ad"
        ),
        st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"),
    ),
    max_size=40,
).map("".join)


def fast(tokenizer: Tokenizer, **names: str) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@cache
def hf(name: str) -> Any:
    """Tokenizers of all kinds that keep bytes."""
    if name in ("bytes", "pieces"):
        return AutoTokenizer.from_pretrained(HERE / name)
    if name == "qwen":
        # NFC, parts of numbers, and added tokens that are text, numbered behind special ones.
        state = json.loads((HERE / "bytes" / "tokenizer.json").read_text())
        digits = {"type": "Split", "pattern": {"Regex": r"\p{N}"}, "behavior": "Isolated"}
        parts = [digits | {"invert": False}, state["pre_tokenizer"] | {"use_regex": False}]
        state |= {"normalizer": {"type": "NFC"}, "post_processor": None}
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        state["added_tokens"] += [
            flags | {"id": 460, "content": "<|im_start|>", "special": True},
            flags | {"id": 462, "content": "<think>", "special": False},
        ]
        return fast(Tokenizer.from_str(json.dumps(state)), eos_token="<|end|>")
    if name == "gemma":
        # No space of its own, spaces are marks, and a tab is a piece and no byte.
        state = json.loads((HERE / "pieces" / "tokenizer.json").read_text())
        vocabulary = state["model"]["vocab"]
        vocabulary["\t"] = vocabulary.pop("<0x09>")
        state["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        state["pre_tokenizer"] = None
        return fast(Tokenizer.from_str(json.dumps(state)), eos_token="</s>", unk_token="<unk>")
    state = json.loads((HERE / "pieces" / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    if name == "unigram":
        pieces = [(piece, -float(len(vocabulary) - len(piece))) for piece in vocabulary]
        model: Any = models.Unigram(pieces, 0, True)
        tokenizer = Tokenizer(model)
    else:
        state |= {"normalizer": None, "post_processor": None}
        tokenizer = Tokenizer.from_str(json.dumps(state))
    scheme = "first" if name == "first" else "always"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return fast(tokenizer, eos_token="</s>", unk_token="<unk>")


@cache
def table(name: str) -> TokenBytes:
    return TokenBytes(hf(name), name)


@pytest.mark.parametrize("name", [*NAMES, *LIKE_REAL])
@settings(max_examples=EXAMPLES, deadline=None)
@given(text=TEXTS)
def test_no_byte_is_lost_and_none_is_there_twice(name: str, text: str) -> None:
    tokens = table(name)
    for opens in (True, False):
        (ids,) = tokens.tokenise([text], opens=opens)
        widths = tokens.text_bytes(ids, text.encode())
        assert widths is not None
        assert widths.sum() == len(text.encode())
    # What the tokenizer itself makes of the text, read back from the ids alone.
    ids = np.array(
        hf(name)(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], np.int64
    )
    data, starts = tokens.decode(ids)
    metaspace = name in ("unigram", "metaspace", "first")
    if metaspace and text[:1] == " " and text[1:2] != " ":
        text = text[1:]  # Metaspace gives " a" and "a" the same tokens
    text = normalize("NFC", text) if name == "qwen" else text
    assert data == text.encode()
    assert starts[0] == 0
    assert starts[-1] == len(data)
    assert (np.diff(starts) >= 0).all()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=EXAMPLES, deadline=None)
@given(ids=st.lists(st.integers(0, 447), max_size=20))
def test_any_ids_have_bytes_whatever_characters_they_cut(name: str, ids: list[int]) -> None:
    """Ids that no text becomes: bytes of half characters, special tokens anywhere."""
    tokens = table(name)
    data, starts = tokens.decode(np.array(ids, np.int64), np.zeros(len(ids), bool))
    assert len(data) == starts[-1]
    for i, number in enumerate(ids):
        part, whole = data[starts[i] : starts[i + 1]], tokens.tokens[number]
        behind_a_mark = i > 0 and tokens.structure.prefix == "always" and tokens.special[ids[i - 1]]
        assert part == (whole[1:] if behind_a_mark and has_own_space(tokens, ids[i:]) else whole)
    assert b"".join(part for part, _ in texts_in(data)) == data
    for part, text in texts_in(data):
        assert text is None or text.encode() == part


def has_own_space(tokens: TokenBytes, ids: list[int]) -> bool:
    """Whether a text of these tokens, up to the first special one, begins with a space that the
    tokenizer put there. Only "pieces" puts one before a space."""
    text = list(itertools.takewhile(lambda number: not tokens.special[number], ids))
    data = b"".join(tokens.tokens[number] for number in text)
    if tokens.name == "pieces" or (data == b" " and len(text) == len(ids)):
        return data[:1] == b" "
    return data[:1] == b" " and data[1:2] not in (b"", b" ")


@pytest.mark.parametrize("name", ["pieces", "unigram", "metaspace", "first"])
@pytest.mark.parametrize("text", [" ", "  ", "  a", "   the boat", "a", "a  "])
def test_spaces_before_a_text_are_its_own(name: str, text: str) -> None:
    """As many as it has: most tokenizers put none before a text that begins with one."""
    tokens = table(name)
    ids = [*hf(name)(text, add_special_tokens=False)["input_ids"], tokens.eos_id]
    data, _ = tokens.decode(np.array([tokens.eos_id, *ids], np.int64))
    assert data == text.encode()


def test_special_tokens_have_no_bytes_and_text_that_looks_like_one_has() -> None:
    tokens = table("bytes")
    data, starts = tokens.decode([0, 50, 1])
    assert starts.tolist() == [0, 0, 1, 1]
    assert len(data) == 1
    (ids,) = tokens.tokenise(["a<|end|>b"], opens=True)
    assert not tokens.special[ids].any()
    assert tokens.opening == [0]
    assert tokens.eos_id == 1


def test_a_tokenizer_that_loses_bytes_is_refused() -> None:
    with pytest.raises(UsageError, match="is a WordPiece tokenizer"):
        TokenBytes(AutoTokenizer.from_pretrained(HERE / "wordpiece"), "the cache's tokenizer")
    byte_level = json.loads((HERE / "bytes" / "tokenizer.json").read_text())
    pieces = json.loads((HERE / "pieces" / "tokenizer.json").read_text())
    without = {k: v for k, v in pieces["model"]["vocab"].items() if k != "<0xE2>"}
    wrong = {
        "Lowercase": byte_level | {"normalizer": {"type": "Lowercase"}},
        "NFKC": byte_level | {"normalizer": {"type": "NFKC"}},
        "Replace": byte_level
        | {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}},
        "WhitespaceSplit": byte_level
        | {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "WhitespaceSplit"}, byte_level["pre_tokenizer"]],
            }
        },
        "no tokens for single bytes": pieces
        | {"model": pieces["model"] | {"byte_fallback": False}},
        "no token for 1 of the 209 bytes": pieces | {"model": pieces["model"] | {"vocab": without}},
        "at random": byte_level | {"model": byte_level["model"] | {"dropout": 0.1}},
    }
    for message, state in wrong.items():
        with pytest.raises(UsageError, match=message) as caught:
            TokenBytes(fast(Tokenizer.from_str(json.dumps(state))), "student x")
        assert str(caught.value).startswith("student x ")
        assert "\n" not in str(caught.value)


def test_the_trial_finds_what_the_structure_does_not_show() -> None:
    state = json.loads((HERE / "bytes" / "tokenizer.json").read_text())
    token = {"id": 448, "content": "sat.", "special": False, "single_word": False}
    state["added_tokens"].append(token | {"lstrip": True, "rstrip": True, "normalized": False})
    with pytest.raises(UsageError, match="byte by byte"):
        TokenBytes(fast(Tokenizer.from_str(json.dumps(state))))


def test_text_that_is_not_composed_keeps_its_bytes_under_nfc() -> None:
    state = json.loads((HERE / "bytes" / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "NFC"}
    tokens = TokenBytes(fast(Tokenizer.from_str(json.dumps(state)), eos_token="<|end|>"))
    text = "n\u0303a"
    (ids,) = tokens.tokenise([text], opens=True)
    assert tokens.text_bytes(ids, text.encode()) is not None


# Rows of documents, and what must come of them, found slowly


def row_of(
    tokens: TokenBytes, texts: list[str], *, framed: bool = True
) -> tuple[np.ndarray, list[bool]]:
    """Ids of documents end to end as `kdcache build` lays them, and which begin a text."""
    ids: list[int] = []
    begins: list[bool] = []
    for text in texts:
        (body,) = tokens.tokenise([text], opens=True)
        opening = tokens.opening if framed else []
        ids += [*opening, *body.tolist(), *([tokens.eos_id] if framed else [])]
        begins += [*[False] * len(opening), *[i == 0 for i in range(len(body))]]
        begins += [False] if framed else []
    return np.array(ids, np.int64), begins


def cached(ids: np.ndarray, labels: np.ndarray | None = None, **values: Any) -> CachedRow:
    """A row of ids, the last of which is a label."""
    following = ids[1:] if labels is None else np.where(labels, ids[1:], IGNORE)
    return CachedRow(ids[:-1], following, **values)


def units_of(tokens: TokenBytes, ids: np.ndarray, begins: list[bool]) -> list[list[Any]]:
    """Of each token what it covers: bytes, or its id if it is special."""
    out: list[list[Any]] = []
    for i, (number, first) in enumerate(zip(ids.tolist(), begins, strict=True)):
        data = tokens.tokens[number]
        own_space = first and tokens.structure.prefix != "never"
        own_space = own_space and has_own_space(tokens, ids[i:].tolist())
        out.append([("mark", number)] if tokens.special[number] else list(data[own_space:]))
    return out


def check_against_bytes(
    teacher: TokenBytes,
    student: TokenBytes,
    row: CachedRow,
    begins: list[bool],
    likes: dict[int, list[int]],
    found: Alignment,
) -> None:
    """Find labels and chunks by walking over single bytes, and compare.

    `likes` has the student's ids of each of the teacher's marks, `begins` what begins a text.
    """
    ids = np.concatenate([row.input_ids, row.labels[-1:]])
    covered = units_of(teacher, ids, begins)
    labelled = [False, *(row.labels != IGNORE).tolist()]
    line = [(unit, labelled[i]) for i, units in enumerate(covered) for unit in units]
    teacher_ends = np.cumsum([0, *map(len, covered)]).tolist()

    # The student's tokens, matched with the line one by one.
    own = np.concatenate([found.input_ids, found.labels[-1:]])
    own = own[own != IGNORE].tolist()
    if own == [student.filler] and not len(found.chunk_bytes):
        return  # nothing of the row can be read
    at, spans, inserted = 0, [], []
    for place, number in enumerate(own):
        data = student.tokens[number]
        while at < len(line) and isinstance(line[at][0], tuple) and not likes.get(line[at][0][1]):
            at += 1  # a mark that the student lacks
        if student.special[number]:
            mark = line[at][0] if at < len(line) else None
            like = likes[mark[1]] if isinstance(mark, tuple) else []
            if number in like:
                spans.append((at, at + (number == like[-1])))
                inserted.append(False)
            else:
                assert number in student.opening, "what the cached row does not have"
                spans.append((at, at))
                inserted.append(True)
        else:
            # A space before a text is the student's own where the bytes do not go on with it.
            rest, ends = [], True
            for unit, _ in line[at:]:
                if isinstance(unit, tuple):
                    ends = bool(likes.get(unit[1]))  # the student's text goes on past others
                    break
                rest.append(unit)
            following = b"".join(student.tokens[i] for i in _until_mark(student, own[place:]))
            fits = bytes(rest).startswith(following) or following.startswith(bytes(rest))
            # Spaces alone fit one space less, too: here the student has one more than the text.
            fits = fits and not (ends and following == b" " + bytes(rest))
            data = data if fits else data[1:]
            assert bytes(rest[: len(data)]) == data, "bytes lost, added or changed"
            spans.append((at, at + len(data)))
            inserted.append(False)
        at = spans[-1][1]

    # Labels: never of bytes that the cached row was not asked about.
    asked = [number != IGNORE for number in found.labels.tolist()]
    asked = [False, *asked][: len(own)]
    for place, ((start, stop), is_asked) in enumerate(zip(spans, asked, strict=True)):
        units = line[start : max(stop, start + 1)]
        due = bool(units) and all(flag for _, flag in units) and not inserted[place] and place > 0
        assert due or not is_asked, f"token {place} has a label that is not due"

    # Chunks: between boundaries that both have, where each token on both sides has a label.
    mine = [i for i in range(len(own)) if not inserted[i]]
    student_ends = {b for i in mine for b in spans[i]}
    shared = sorted(student_ends & set(teacher_ends))
    chunks = []
    for low, high in itertools.pairwise(shared):
        first = teacher_ends.index(low)
        theirs = range(first, teacher_ends.index(high))
        ours = [i for i in mine if low <= spans[i][0] < high]
        full = sum(spans[i][1] - spans[i][0] for i in ours) == high - low
        due = [labelled[i] for i in theirs] + [asked[i] for i in ours]
        if full and theirs and ours and all(due):
            size = sum(not isinstance(unit, tuple) for unit, _ in line[low:high])
            theirs_before = sum(labelled[:first]), sum(labelled[: theirs[-1] + 1])
            ours_before = sum(asked[: ours[0]]), sum(asked[: ours[-1] + 1])
            chunks.append((*theirs_before, *ours_before, size))
    got = np.concatenate(
        [found.teacher_spans, found.student_spans, found.chunk_bytes[:, None]], 1
    ).tolist()
    assert [tuple(values) for values in got] == chunks
    assert found.lost == 0


def _until_mark(tokens: TokenBytes, ids: list[int]) -> list[int]:
    end = next((i for i, number in enumerate(ids) if tokens.special[number]), len(ids))
    return ids[:end]


def likes_of(teacher: TokenBytes, student: TokenBytes) -> dict[int, list[int]]:
    """By hand: what begins and what ends a document."""
    likes = {number: list(student.opening) for number in teacher.opening[-1:]}
    if teacher.eos_id is not None and student.eos_id is not None:
        likes[teacher.eos_id] = [student.eos_id]
    return likes


PAIRS = [
    *((a, b) for a in NAMES for b in NAMES),
    *(("qwen", "gemma"), ("gemma", "qwen"), ("qwen", "pieces"), ("bytes", "gemma")),
]


@pytest.mark.parametrize(("a", "b"), PAIRS)
@settings(max_examples=max(EXAMPLES // 6, 5), deadline=None)
@given(data=st.data())
def test_chunks_and_labels_are_those_that_single_bytes_show(a: str, b: str, data: Any) -> None:
    """Documents end to end, cut anywhere, with labels anywhere."""
    teacher, student = table(a), table(b)
    texts = data.draw(st.lists(TEXTS, min_size=1, max_size=4))
    ids, begins = row_of(teacher, texts)
    if len(ids) < 2:
        return
    start = data.draw(st.integers(0, len(ids) - 2))
    stop = data.draw(st.integers(start + 2, len(ids)))
    mask = data.draw(st.lists(st.booleans(), min_size=stop - start - 1, max_size=stop - start - 1))
    mask[-1] = True  # rows end at their last label
    row = cached(ids[start:stop], np.array(mask) | data.draw(st.booleans()))
    own = begins[start:stop]
    own[0] = False  # in the middle of a document, as far as the row shows
    (found,) = Aligner(teacher, student).align([row])
    check_against_bytes(teacher, student, row, own, likes_of(teacher, student), found)


@pytest.mark.parametrize("name", NAMES)
def test_with_one_tokenizer_on_both_sides_each_token_is_a_chunk(name: str) -> None:
    tokens = table(name)
    ids, _ = row_of(tokens, ["The boat saw the cat.", "A cat, 12 boats; \U0001f469 and more"])
    (found,) = Aligner(tokens, tokens).align([cached(ids, opens=True)])
    assert found.input_ids.tolist() == ids[:-1].tolist()
    assert found.labels.tolist() == ids[1:].tolist()
    each = [[i, i + 1] for i in range(len(ids) - 1)]
    assert found.teacher_spans.tolist() == found.student_spans.tolist() == each


def test_the_first_token_after_a_prompt_and_one_across_its_end() -> None:
    teacher, student = table("bytes"), table("pieces")
    prompt, answer = teacher.tokenise(["said th", "e boat saw"], opens=False)
    ids = np.concatenate([teacher.opening, prompt, answer, [teacher.eos_id]])
    mask = np.arange(1, len(ids)) > len(prompt)
    row = cached(ids, mask)
    (found,) = Aligner(teacher, student).align([row])
    sequence = np.concatenate([found.input_ids, found.labels[-1:]])
    text = [student.tokens[i] for i in sequence]
    labelled = [i + 1 for i, label in enumerate(found.labels) if label != IGNORE]
    # "the" stands across the border: it has no label, and what follows it has one.
    across = text.index(b" the") if b" the" in text else text.index(b"the")
    assert across not in labelled
    assert labelled[0] == across + 1
    assert b"".join(text[i] for i in labelled) == b" boat saw"
    assert found.chunk_bytes.sum() == len(b" boat saw")
    spoken = teacher.decode(answer, np.zeros(len(answer), bool))[0]
    assert spoken == b"e boat saw"


def test_a_space_of_the_students_own_has_a_label_where_what_follows_has_one() -> None:
    teacher, student = table("bytes"), table("first")
    ids, _ = row_of(teacher, ["the boat", "\u4f60 cat"])
    (found,) = Aligner(teacher, student).align([cached(ids, opens=True)])
    (end, _) = np.flatnonzero(np.append(found.input_ids, found.labels[-1]) == student.eos_id)
    assert student.tokens[found.input_ids[end + 1]] == b" "
    assert found.labels[end] == found.input_ids[end + 1]


def test_one_side_alone_opens_documents() -> None:
    with_it, without = table("bytes"), table("metaspace")
    assert with_it.opening
    assert not without.opening
    # The student's is put in, read and never asked for.
    ids, _ = row_of(without, ["the boat", "the cat"])
    (found,) = Aligner(without, with_it).align([cached(ids, opens=True)])
    (opening,) = with_it.opening
    places = np.flatnonzero(found.input_ids == opening)
    assert len(places) == 2
    assert places[0] == 0
    assert found.labels[places[1] - 1] == IGNORE
    assert found.labels[places[1]] == found.input_ids[places[1] + 1]
    assert found.labels[0] == IGNORE  # the cached row was not asked about its first token
    # The teacher's becomes nothing, and what the student cannot know is not asked.
    ids, _ = row_of(with_it, ["the boat", "the cat"])
    (found,) = Aligner(with_it, without).align([cached(ids)])
    assert found.labels[0] != IGNORE
    assert not without.special[found.input_ids[0]]
    first = len(without.tokens[found.input_ids[0]]) - 1  # its own space
    assert found.chunk_bytes.sum() == len("the boatthe cat") - first


def test_a_row_that_stops_within_a_document_leaves_its_last_word_out() -> None:
    assert settled("the walk") == "the"
    assert settled("the walk  ") == "the"
    assert settled("one\n\n") == ""
    assert settled("\u4f60" * 40) == "\u4f60" * 24
    tokens = table("bytes")
    ids, _ = row_of(tokens, ["the cat saw the boats"])
    (found,) = Aligner(tokens, table("pieces")).align([cached(ids[:-2])])
    text = b"".join(table("pieces").tokens[i] for i in found.labels if i != IGNORE)
    assert text == b" the cat saw the"


def test_a_row_that_stops_within_its_only_word_asks_for_nothing() -> None:
    """Nor for the space of the tokenizer's own before it."""
    tokens = table("first")
    ids, _ = row_of(tokens, ["the boat", "  catcatcat"])
    (found,) = Aligner(tokens, table("pieces")).align([cached(ids[:-1])])
    last = found.labels[found.labels != IGNORE][-1]
    assert last == table("pieces").eos_id


def test_one_token_that_ends_documents_and_opens_them() -> None:
    """OPT puts its end-of-text before a text, too."""
    state = json.loads((HERE / "bytes" / "tokenizer.json").read_text())
    template = state["post_processor"]
    for part in template["single"]:
        if "SpecialToken" in part:
            part["SpecialToken"]["id"] = "<|end|>"
    template["special_tokens"] = {"<|end|>": {"id": "<|end|>", "ids": [1], "tokens": ["<|end|>"]}}
    tokenizer = fast(Tokenizer.from_str(json.dumps(state)), eos_token="<|end|>")
    teacher, student = TokenBytes(tokenizer), table("pieces")
    assert teacher.opening == [teacher.eos_id] == [1]
    ids, _ = row_of(teacher, ["the boat", "the cat"])
    assert ids.tolist().count(1) == 4
    for row in (cached(ids, opens=True), cached(ids)):
        (found,) = Aligner(teacher, student).align([row])
        own = [int(i) for i in [*found.input_ids, found.labels[-1]] if student.special[i]]
        assert own == [*student.opening, student.eos_id] * 2
        assert found.chunk_bytes.sum() == len("the boatthe cat")
        (back,) = Aligner(teacher, teacher).align([row])
        assert [*back.input_ids.tolist(), back.labels[-1]] == ids.tolist()


def test_rows_that_cut_a_character() -> None:
    tokens = table("bytes")
    (ids,) = tokens.tokenise(["a\u4f60b cat \u4f60"], opens=False)
    assert len(tokens.tokens[ids[1]]) == 1  # one byte of three
    (found,) = Aligner(tokens, table("pieces")).align([cached(ids[2:-1])])
    pieces = table("pieces")
    assert found.input_ids[:2].tolist() == [pieces.byte_ids[0xBD], pieces.byte_ids[0xA0]]
    assert (found.labels[:1] == IGNORE).all()
    assert b"".join(pieces.tokens[i] for i in found.labels if i != IGNORE) == b"b"


def test_documents_that_do_not_attend_to_each_other() -> None:
    teacher, student = table("bytes"), table("metaspace")
    ids, _ = row_of(teacher, ["the boat", "the cat"])
    starts = ids == teacher.opening[0]
    mask = ~starts[1:]
    row = cached(ids, mask, starts=starts[:-1])
    (found,) = Aligner(teacher, student).align([row])
    assert found.starts is not None
    places = np.flatnonzero(found.starts)
    assert len(places) == 2
    assert places[0] == 0
    # Nothing before it is seen, so a document's first token is not asked about.
    assert found.labels[places[1] - 1] == IGNORE
    assert student.eos_id == found.input_ids[places[1] - 1]
    (back,) = Aligner(teacher, teacher).align([row])
    assert back.starts is not None
    assert back.starts.tolist() == starts[:-1].tolist()


def test_marks_of_a_chat_become_their_like_or_nothing() -> None:
    def with_marks(name: str, *marks: str) -> TokenBytes:
        tokenizer = AutoTokenizer.from_pretrained(HERE / name)
        tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
        return TokenBytes(tokenizer, name)

    teacher = with_marks("bytes", "<|user|>", "<|tool|>")
    student = with_marks("pieces", "<|user|>")
    user, tool = teacher.marks["<|user|>"], teacher.marks["<|tool|>"]
    said, answer = teacher.tokenise(["the cat", "a boat"], opens=False)
    ids = np.concatenate([[user], said, [teacher.eos_id, tool], answer, [teacher.eos_id]])
    (found,) = Aligner(teacher, student).align([cached(ids, opens=True)])
    sequence = [*found.input_ids.tolist(), int(found.labels[-1])]
    special = [i for i in sequence if student.special[i]]
    # The end-of-text behind a message opens no new document.
    assert special == [*student.opening, student.marks["<|user|>"], *[student.eos_id] * 2]
    assert found.chunk_bytes.sum() == len("the cata boat")
    assert (found.chunk_bytes == 0).sum() == 2


def test_within_a_single_document_an_end_of_text_begins_no_other() -> None:
    """Chat templates like Mistral's end each turn with it, and text has the marks between."""
    teacher, student = table("first"), table("bytes")
    turns = [teacher.tokenise([text], opens=False)[0] for text in ("[ASK] the cat", " a boat")]
    ids = np.concatenate([turns[0], [teacher.eos_id], turns[1], [teacher.eos_id]])
    (found,) = Aligner(teacher, student).align([cached(ids, opens=True, single=True)])
    special = [i for i in [*found.input_ids, found.labels[-1]] if student.special[i]]
    assert special == [*student.opening, student.eos_id, student.eos_id]
    # The space behind it is the text's: the tokenizer puts one before the whole text alone.
    assert student.decode(found.input_ids, np.zeros(len(found.input_ids), bool))[0] == (
        b"[ASK] the cat a boat"
    )
    (joined,) = Aligner(teacher, student).align([cached(ids, opens=True)])
    special = [i for i in [*joined.input_ids, joined.labels[-1]] if student.special[i]]
    assert special == [*student.opening, student.eos_id] * 2


@pytest.mark.parametrize("divided", [False, True])
def test_a_mark_that_becomes_what_opens_a_text_is_enough(divided: bool) -> None:
    """A template may write it though the tokenizer puts none before a text."""
    tokenizer = AutoTokenizer.from_pretrained(HERE / "pieces")
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"post_processor": None}
    plain = fast(Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>")
    teacher, student = TokenBytes(plain), table("pieces")
    assert teacher.opening == []
    (opening,) = student.opening
    assert teacher.marks["<s>"] == opening
    (body,) = teacher.tokenise(["the boat"], opens=False)
    ids = np.array([opening, *body, teacher.eos_id] * 2)
    starts = np.array(ids == opening)[:-1] if divided else None
    (found,) = Aligner(teacher, student).align([cached(ids, starts=starts, opens=True)])
    own = [int(i) for i in [*found.input_ids, found.labels[-1]] if student.special[i]]
    assert own == [opening, student.eos_id] * 2
    assert found.starts is None or found.input_ids[found.starts].tolist() == [opening] * 2


def test_a_row_that_would_be_too_long_is_cut_and_counted() -> None:
    teacher, student = table("pieces"), table("bytes")
    ids, _ = row_of(teacher, ["\u4f60" * 30])
    row = cached(ids, opens=True)
    (whole,) = Aligner(teacher, student).align([row])
    (found,) = Aligner(teacher, student, max_length=20).align([row])
    assert len(found.input_ids) == len(found.labels) == 20
    assert found.cut == len(whole.input_ids) - 20
    assert found.student_spans.max() == 20
    assert found.input_ids.tolist() == whole.input_ids[:20].tolist()


def test_text_with_the_mark_for_a_space_has_no_labels() -> None:
    teacher, student = table("bytes"), table("pieces")
    ids, _ = row_of(teacher, ["a\u2581b", "the cat"])
    (found,) = Aligner(teacher, student).align([cached(ids)])
    assert found.lost == 1
    assert found.chunk_bytes.sum() == len("the cat")


def test_odd_rows() -> None:
    teacher, student = table("bytes"), table("metaspace")
    for row in (
        CachedRow(np.array([0]), np.array([IGNORE])),
        CachedRow(np.array([0]), np.array([0])),
        CachedRow(np.array([1]), np.array([1])),
        CachedRow(np.array([50]), np.array([IGNORE])),
    ):
        (found,) = Aligner(teacher, student).align([row])
        assert len(found.input_ids) == len(found.labels) >= 1
    assert Aligner(teacher, student).align([]) == []
    with pytest.raises(UsageError, match="a row holds 448, which is not the id of a token"):
        Aligner(teacher, student).align([CachedRow(np.array([448]), np.array([5]))])


def test_an_id_without_a_token_is_no_text() -> None:
    """Vocabularies have gaps, and corpora of ids may use them: a model reads these as others."""
    state = json.loads((HERE / "bytes" / "tokenizer.json").read_text())
    state["model"]["vocab"]["of_its_own"] = 460
    tokens = TokenBytes(fast(Tokenizer.from_str(json.dumps(state)), eos_token="<|end|>"))
    gap = 455
    assert not tokens.known[gap]
    (body,) = tokens.tokenise(["the boat"], opens=True)
    for stray in (gap, len(tokens) + 7):
        row = cached(np.array([stray, *body, stray, *body, stray], np.int64), opens=True)
        sizes, is_text = label_bytes(tokens, row)
        assert sizes.sum() == 2 * len("the boat")
        assert is_text.tolist() == (row.labels != stray).tolist()
        assert (sizes[~is_text] == 0).all()
        with pytest.raises(UsageError, match=f"a row holds {stray}, which .* without such rows"):
            Aligner(tokens, table("bytes")).align([row])
