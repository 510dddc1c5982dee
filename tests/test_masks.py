"""Rows of a masked language model: what is masked, by which rule, and what decides it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kdcache.corpus import Record
from kdcache.errors import UsageError
from kdcache.rows import Row, RowSpec, make_encoder
from kdcache.tasks import IGNORE

TOKENIZERS = Path(__file__).parent / "tiny_tokenizers"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZERS / "wordpiece")


def records(texts: Sequence[str], **more: Any) -> list[Record]:
    return [Record({"text": text}, "t.jsonl", f"line {i}", **more) for i, text in enumerate(texts)]


def encoder_of(tokenizer: Any, **options: Any) -> Any:
    options = {"max_length": 32, "packing": "none", **options}
    return make_encoder(RowSpec(task="masked-lm", **options), tokenizer)


def rows_of(tokenizer: Any, texts: Sequence[str], span: int = 0, **options: Any) -> list[Row]:
    return list(encoder_of(tokenizer, **options).encode(records(texts), span=span))


def before(row: Row) -> np.ndarray:
    """The ids of a row before it was masked."""
    return np.where(row.labels == IGNORE, row.input_ids, row.labels)


def test_a_row_is_a_framed_text_with_its_own_ids_as_labels(
    tokenizer: Any, corpus_texts: list[str]
) -> None:
    texts = [text[:40] for text in corpus_texts[:50]]
    rows = rows_of(tokenizer, texts, max_length=128)
    assert [before(row).tolist() for row in rows] == tokenizer(texts)["input_ids"]
    special = set(tokenizer.all_special_ids)
    for row in rows:
        chosen = row.labels != IGNORE
        n = len(row.input_ids) - 2
        assert chosen.sum() == max(1, int(0.15 * n + 0.5))
        assert not special & set(row.labels[chosen].tolist())
        assert row.type_ids is None
        assert row.text is None


def test_of_the_chosen_8_in_10_are_masked_1_is_another_and_1_stays(
    tokenizer: Any, corpus_texts: list[str]
) -> None:
    rows = rows_of(tokenizer, corpus_texts, max_length=512, packing="split")
    labels, ids = (
        np.concatenate([getattr(row, name)[row.labels != IGNORE] for row in rows])
        for name in ("labels", "input_ids")
    )
    assert len(ids) > 10_000
    masked = ids == tokenizer.mask_token_id
    assert masked.mean() == pytest.approx(0.8, abs=0.01)
    same = ids == labels
    assert same.mean() == pytest.approx(0.1 + 0.1 / 250, abs=0.01)
    others = ids[~masked & ~same]
    assert len(others) / len(ids) == pytest.approx(0.1, abs=0.01)
    # Any id of the vocabulary but the special ones: a padding id in a row would move positions.
    usual = set(range(len(tokenizer))) - set(tokenizer.all_special_ids)
    assert set(others.tolist()) <= usual
    assert len(set(others.tolist())) > 0.9 * len(usual)
    places = np.concatenate([np.flatnonzero(r.labels != IGNORE) / len(r.labels) for r in rows])
    assert np.histogram(places, 4, (0, 1))[0] / len(places) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("packing", ["concat", "none", "split"])
@pytest.mark.parametrize("unit", ["token", "word"])
def test_the_draw_is_a_function_of_seed_span_row_and_place(
    tokenizer: Any, corpus_texts: list[str], packing: str, unit: str
) -> None:
    texts = corpus_texts[:40]

    def drawn(span: int = 3, **options: Any) -> list[Any]:
        found = rows_of(tokenizer, texts, span, packing=packing, mask_unit=unit, **options)
        return [(row.input_ids.tolist(), row.labels.tolist()) for row in found]

    one = drawn()
    assert one == drawn()
    # An encoder that has read another span before draws the same.
    encoder = encoder_of(tokenizer, packing=packing, mask_unit=unit)
    list(encoder.encode(records(texts[:7]), span=1))
    again = encoder.encode(records(texts), span=3)
    assert [(r.input_ids.tolist(), r.labels.tolist()) for r in again] == one
    for other in (drawn(4), drawn(mask_seed=1)):
        assert len(other) == len(one)
        assert sum(a == b for a, b in zip(one, other, strict=True)) < len(one) / 4


def test_joined_documents_have_a_separator_between_and_frames_around_rows(tokenizer: Any) -> None:
    texts = [" ".join(f"a{i}" for i in range(n)) for n in (3, 40, 1, 15)]
    rows = rows_of(tokenizer, texts, packing="concat", max_length=16)
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    bodies = []
    for row in rows:
        ids = before(row)
        assert (ids[0], ids[-1]) == (cls, sep)
        assert len(ids) <= 16
        bodies.append(ids[1:-1])
        assert sep not in (ids[1], ids[-2])  # no separator at the edge of a row
    assert {len(row.input_ids) for row in rows[:-1]} <= {14, 15, 16}
    joined = [i for body in bodies for i in body.tolist() if i != sep]
    assert joined == [
        i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]
    ]
    assert any(sep in body for body in bodies)


def test_a_piece_of_a_document_ends_in_no_separator(tokenizer: Any) -> None:
    parts = [
        Record({"text": "one two"}, "t.txt", "line 1", closes=False),
        Record({"text": "three"}, "t.txt", "line 2", opens=False),
    ]
    (row,) = encoder_of(tokenizer, packing="concat").encode(parts)
    assert tokenizer.sep_token_id not in before(row)[1:-1]


def test_long_documents_are_continued_cut_or_refused(tokenizer: Any) -> None:
    text = " ".join("abcdefghij" for _ in range(20))
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    split = rows_of(tokenizer, [text], packing="split")
    assert [i for row in split for i in before(row)[1:-1].tolist()] == whole
    encoder = encoder_of(tokenizer)
    (cut,) = encoder.encode(records([text]))
    assert before(cut)[1:-1].tolist() == whole[:30]
    assert encoder.truncated == 1
    with pytest.raises(UsageError, match="do not fit one row of 30 and the tokenizer's own"):
        rows_of(tokenizer, [text], packing="whole")


def test_whole_words_are_masked_together(tokenizer: Any, corpus_texts: list[str]) -> None:
    texts = [text[:300] for text in corpus_texts[:100]]
    rows = rows_of(tokenizer, texts, mask_unit="word", max_length=400)
    encoded = tokenizer(texts)
    shares = []
    for i, row in enumerate(rows):
        words = np.array([-1 if w is None else w for w in encoded.word_ids(i)])
        chosen = row.labels != IGNORE
        taken = set(words[chosen].tolist())
        assert np.array_equal(chosen, np.isin(words, sorted(taken))), "no word is chosen in part"
        assert -1 not in taken
        most = max(1, int(0.15 * (words >= 0).sum() + 0.5))
        assert chosen.sum() <= most or len(taken) == 1
        shares.append(chosen.sum() / most)
    assert np.mean(shares) > 0.8
    assert any((rows[i].labels != IGNORE).sum() > 1 for i in range(len(rows)))


def test_each_row_has_something_to_guess(tokenizer: Any) -> None:
    for unit in ("token", "word"):
        rows = rows_of(tokenizer, ["a", "extraordinarily", "b c"], mask_unit=unit)
        assert [int((row.labels != IGNORE).sum()) >= 1 for row in rows] == [True] * 3
    # The one word of this text is longer than the share, and is masked all the same.
    (_, long, _) = rows
    assert (long.labels[1:-1] != IGNORE).all()


@pytest.mark.parametrize("packing", ["concat", "none", "split"])
def test_texts_of_special_tokens_alone_are_left_out_and_counted(
    tokenizer: Any, packing: str
) -> None:
    encoder = encoder_of(tokenizer, packing=packing)
    texts = ["[SEP] [MASK]", "", "a word", " ", "[PAD]"]
    rows = list(encoder.encode(records(texts)))
    assert len(rows) == 1
    assert encoder.empty == 4


def test_special_tokens_in_a_text_are_read_and_never_masked(tokenizer: Any) -> None:
    for seed in range(20):
        (row,) = rows_of(tokenizer, ["a [SEP] b [MASK] c"], mask_share=0.9, mask_seed=seed)
        hidden = row.labels[row.labels != IGNORE].tolist()
        assert not set(hidden) & set(tokenizer.all_special_ids)
        assert len(hidden) == 3


@pytest.mark.parametrize("name", ["roberta", "bare"])
def test_frames_are_the_tokenizers_own(tokenizer: Any, name: str) -> None:
    from tokenizers import processors

    own = AutoTokenizer.from_pretrained(TOKENIZERS / "wordpiece")
    cls, sep = own.cls_token_id, own.sep_token_id
    if name == "roberta":
        own._tokenizer.post_processor = processors.RobertaProcessing(("[SEP]", sep), ("[CLS]", cls))
    else:
        own._tokenizer.post_processor = processors.Sequence([])
    (row,) = rows_of(own, ["one two"], packing="concat")
    want = own("one two")["input_ids"]
    assert before(row).tolist() == want
    assert (want[0] == cls) == (name == "roberta")


def test_what_cannot_be_masked_is_refused_in_one_line(tokenizer: Any) -> None:
    without = AutoTokenizer.from_pretrained(TOKENIZERS / "wordpiece")
    without.mask_token = None
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (without, {}, "the tokenizer has no mask token"),
        (tokenizer, {"max_length": 2}, "adds 2 tokens. Set --max-length to 3 or more"),
        (tokenizer, {"mask_share": 1.0}, "mask_share is 1, expected more than 0 and less than 1"),
        (tokenizer, {"mask_unit": "phrase"}, "mask_unit is 'phrase', expected one of token, word"),
        (tokenizer, {"attend": "document"}, "attend is 'document', which is for packing 'concat'"),
        (tokenizer, {"record_form": "ids"}, "record_form is 'ids', but masked-lm reads texts"),
        (tokenizer, {"record_form": "messages"}, "but masked-lm reads texts"),
        (_one_word(tokenizer), {"mask_unit": "word"}, "does not divide a text into words"),
    ]
    for which, options, message in cases:
        with pytest.raises(UsageError) as error:
            encoder_of(which, **options)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    for options in ({"mask_share": 0.2}, {"mask_unit": "word"}, {"mask_seed": 3}):
        with pytest.raises(UsageError, match="are for masked-lm, leave them out for causal-lm"):
            RowSpec(task="causal-lm", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="text"):
        list(encoder_of(tokenizer).encode([Record({"body": "a"}, "t.jsonl", "line 1")]))


def _one_word(tokenizer: Any) -> Any:
    """The same tokens, of texts that are one word."""
    from tokenizers import Tokenizer, models

    bare = Tokenizer(models.WordPiece({"one": 0, "[UNK]": 1, "[MASK]": 2}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=bare, mask_token="[MASK]", unk_token="[UNK]")


def test_the_identity_of_other_tasks_has_no_masks() -> None:
    assert not [key for key in RowSpec(task="causal-lm").to_dict() if key.startswith("mask")]
    spec = RowSpec(task="masked-lm", mask_seed=5)
    assert spec.to_dict()["mask_share"] == 0.15
    assert spec.to_dict()["mask_seed"] == 5
