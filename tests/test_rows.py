"""Rows: labels aligned with the logits, nothing lost or repeated, and only what is to be learnt."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from kdcache.corpus import FileColumns, Record
from kdcache.errors import UsageError
from kdcache.rows import Row, RowSpec, make_encoder
from kdcache.rows.batches import pad_rows, padded
from kdcache.tasks import IGNORE

PATIENT = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WORDS = st.text("abc xyz.\né", max_size=60)

LAST_ONLY = "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}"
STRICT = "{{ raise_exception('roles must alternate') }}"
TOKENIZERS = Path(__file__).resolve().parent / "tiny_tokenizers"


def template(name: str) -> str:
    return (TOKENIZERS / "templates" / f"{name}.jinja").read_text()


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def llama(request: pytest.FixtureRequest) -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZERS / request.param)


@pytest.fixture(scope="module")
def bert() -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZERS / "wordpiece")


@pytest.fixture(params=["bytes", "pieces"])
def chat(request: pytest.FixtureRequest) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / request.param)
    tokenizer.chat_template = template("chatml")
    return tokenizer


def records(values: Iterable[dict[str, Any]]) -> list[Record]:
    return [Record(value, "data.jsonl", f"line {i}") for i, value in enumerate(values, 1)]


def encode(tokenizer: Any, values: Iterable[dict[str, Any]], **options: Any) -> list[Row]:
    spec = RowSpec("causal-lm", **options)
    return list(make_encoder(spec, tokenizer).encode(records(values)))


def document(tokenizer: Any, text: str) -> list[int]:
    return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def learnt(tokenizer: Any, rows: Sequence[Row]) -> str:
    return tokenizer.decode([t for row in rows for t in row.labels if t != IGNORE])


def check(row: Row, length: int) -> None:
    assert row.input_ids.dtype == row.labels.dtype == np.int32
    assert 0 < len(row.input_ids) == len(row.labels) <= length
    assert row.labels[-1] != IGNORE
    # Inside a row the next id is the label, where there is one.
    inside = row.labels[:-1] != IGNORE
    assert (row.labels[:-1][inside] == row.input_ids[1:][inside]).all()


class TestPlainText:
    @PATIENT
    @given(texts=st.lists(WORDS, max_size=12), length=st.integers(2, 40))
    def test_concat_predicts_every_token_but_the_first_once(
        self, llama: Any, texts: list[str], length: int
    ) -> None:
        rows = encode(llama, ({"text": text} for text in texts), max_length=length)
        whole = [t for text in texts if text.strip() for t in document(llama, text)]
        assert [t for row in rows for t in row.input_ids] == whole[:-1]
        assert [t for row in rows for t in row.labels] == whole[1:]
        assert all(len(row.input_ids) == length for row in rows[:-1])
        for row in rows:
            check(row, length)

    @PATIENT
    @given(texts=st.lists(WORDS, max_size=6), length=st.integers(2, 40))
    def test_split_does_so_for_each_document(
        self, llama: Any, texts: list[str], length: int
    ) -> None:
        for text in texts:
            rows = encode(llama, [{"text": text}], max_length=length, packing="split")
            whole = document(llama, text) if text.strip() else []
            assert [t for row in rows for t in row.input_ids] == whole[:-1]
            assert [t for row in rows for t in row.labels] == whole[1:]
        together = encode(
            llama, ({"text": text} for text in texts), max_length=length, packing="split"
        )
        for row in together:
            check(row, length)

    def test_none_truncates_with_the_next_id_as_last_label(self, llama: Any) -> None:
        text = "Once upon a time there was a girl."
        whole = document(llama, text)
        spec = RowSpec("causal-lm", packing="none", max_length=5)
        encoder = make_encoder(spec, llama)
        (row,) = encoder.encode(records([{"text": text}]))
        assert row.input_ids.tolist() == whole[:5]
        assert row.labels.tolist() == whole[1:6]
        assert encoder.truncated == 1
        for length, truncated in ((len(whole) - 1, 0), (len(whole) - 2, 1), (999, 0)):
            encoder = make_encoder(RowSpec("causal-lm", packing="none", max_length=length), llama)
            (row,) = encoder.encode(records([{"text": text}]))
            assert len(row.labels) == min(length, len(whole) - 1)
            assert encoder.truncated == truncated

    def test_empty_documents_are_passed_over_and_counted(self, llama: Any) -> None:
        for packing in ("concat", "none", "split"):
            encoder = make_encoder(RowSpec("causal-lm", packing=packing), llama)
            values = [{"text": text} for text in ("", " \n", None, "a")]
            (row,) = encoder.encode(records(values))
            assert [row.input_ids[0], *row.labels] == document(llama, "a")
            assert encoder.empty == 3
            assert list(encoder.encode([])) == []

    def test_batches_do_not_show(self, llama: Any) -> None:
        texts = [f"text number {i}" * (i % 5) for i in range(700)]
        rows = encode(llama, ({"text": text} for text in texts), max_length=64)
        whole = [t for text in texts if text for t in document(llama, text)]
        assert [t for row in rows for t in row.labels] == whole[1:]

    def test_a_tokenizer_that_adds_eos_gets_no_second_one(self, llama: Any, bert: Any) -> None:
        bert.eos_token = "[SEP]"
        try:
            (row,) = encode(bert, [{"text": "a film"}])
        finally:
            bert.eos_token = None
        assert [row.input_ids[0], *row.labels] == bert("a film")["input_ids"]

    def test_a_tokenizer_without_eos_is_refused(self, bert: Any) -> None:
        with pytest.raises(UsageError, match=r"no end-of-sequence token.*eos_token"):
            encode(bert, [{"text": "a"}])

    def test_no_warning_about_long_documents(self, llama: Any, caplog: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            encode(llama, [{"text": "long " * 2_000}])
        assert not caplog.records

    def test_rows_own_their_memory(self, llama: Any) -> None:
        for row in encode(llama, [{"text": "long " * 500}], max_length=32):
            assert row.input_ids.base is None
            assert row.labels.base is None


class TestChat:
    messages = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Really?"},
        {"role": "assistant", "content": "No."},
    )

    @pytest.mark.parametrize(
        "name", ["chatml", "chatml-marked", "headers", "instruct", "no-system"]
    )
    @pytest.mark.parametrize("packing", ["concat", "none", "split"])
    def test_only_the_assistant_is_learnt(self, chat: Any, name: str, packing: str) -> None:
        chat.chat_template = template(name)
        messages = list(self.messages[name == "no-system" :])
        (row,) = encode(chat, [{"messages": messages}], packing=packing)
        check(row, 1024)
        # Where a template puts white space before an answer is its own affair.
        eos = chat.eos_token
        answers = [answer.strip() for answer in learnt(chat, [row]).split(eos)]
        assert answers == ["A cat.", "No.", ""]
        # All that comes before is read; what comes after the last answer is not.
        full = chat.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert row.input_ids.tolist() == full[: len(row.input_ids)]
        (last,) = np.nonzero(row.labels != IGNORE)
        assert row.labels[last[-1]] == chat.eos_token_id

    def test_conversations_without_an_answer_are_counted(self, chat: Any) -> None:
        for name in ("chatml", "chatml-marked"):
            chat.chat_template = template(name)
            encoder = make_encoder(RowSpec("causal-lm"), chat)
            values: list[dict[str, Any]] = [{"messages": list(self.messages[:2])}, {"messages": []}]
            assert list(encoder.encode(records(values))) == []
            assert encoder.empty == 2

    def test_what_a_template_leaves_out_is_not_learnt(self, chat: Any) -> None:
        chat.chat_template = LAST_ONLY
        (row,) = encode(chat, [{"messages": list(self.messages)}])
        assert chat.decode(row.input_ids) + learnt(chat, [row])[-1] == "No."

    def test_no_template(self, llama: Any) -> None:
        with pytest.raises(UsageError, match=r"no chat template.*--record-form text"):
            encode(llama, [{"messages": list(self.messages)}])

    def test_a_template_that_raises_is_a_bad_record(self, chat: Any) -> None:
        chat.chat_template = STRICT
        with pytest.raises(UsageError, match=r"data.jsonl: line 1: .*roles must alternate"):
            encode(chat, [{"messages": list(self.messages)}])
        encoder = make_encoder(RowSpec("causal-lm", on_error="skip"), chat)
        assert list(encoder.encode(records([{"messages": list(self.messages)}]))) == []
        assert encoder.skipped == 1

    @pytest.mark.parametrize(
        "messages",
        ["hello", [{"from": "human", "value": "x"}], ["x"], [{"role": 1}], {"role": "a"}],
    )
    def test_messages_of_another_shape(self, chat: Any, messages: Any) -> None:
        with pytest.raises(
            UsageError, match="line 1: column .messages. holds (text|a message|an object)"
        ):
            encode(chat, [{"messages": messages}])


class TestPromptAndCompletion:
    @pytest.mark.parametrize(
        ("prompt", "completion"),
        [("Say a word:", " tree"), ("", "Once"), ("Two\n", "lines\nof text"), ("a b", "c d")],
    )
    def test_only_the_completion_and_eos_are_learnt(
        self, llama: Any, prompt: str, completion: str
    ) -> None:
        (row,) = encode(llama, [{"prompt": prompt, "completion": completion}])
        check(row, 1024)
        assert [*row.input_ids, row.labels[-1]] == document(llama, prompt + completion)
        assert row.labels[-1] == llama.eos_token_id
        said = learnt(llama, [row]).removesuffix(llama.eos_token)
        assert said.strip().endswith(completion.strip())
        # A token may straddle the border, but nothing before it is learnt.
        assert len(said.strip()) <= len(completion.strip()) + 3

    def test_a_prompt_longer_than_the_row_leaves_nothing(self, llama: Any) -> None:
        value = {"prompt": "long " * 50, "completion": "x"}
        spec = RowSpec("causal-lm", packing="none", max_length=8)
        encoder = make_encoder(spec, llama)
        assert list(encoder.encode(records([value]))) == []
        assert encoder.truncated == 1

    def test_split_keeps_only_rows_with_labels(self, llama: Any) -> None:
        value = {"prompt": "long " * 50, "completion": "x"}
        rows = encode(llama, [value], packing="split", max_length=8)
        assert len(rows) <= 2
        assert learnt(llama, rows).endswith(f"x{llama.eos_token}")

    def test_empty_completion_is_counted(self, llama: Any) -> None:
        encoder = make_encoder(RowSpec("causal-lm"), llama)
        values = [{"prompt": "a", "completion": ""}]
        assert list(encoder.encode(records(values))) == []
        assert encoder.empty == 1

    def test_all_forms_in_one_stream(self, chat: Any) -> None:
        said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
        rows = encode(
            chat,
            [
                {"text": "plain"},
                {"prompt": "p", "completion": " c"},
                {"messages": said, "text": None},
                {"text": "end"},
            ],
            packing="none",
        )
        assert [learnt(chat, [row]).strip() for row in rows] == [
            f"{answer}{chat.eos_token}" for answer in ("plain", "c", "r", "end")
        ]


class TestColumns:
    def test_two_forms_at_once_are_refused_until_one_is_chosen(self, llama: Any) -> None:
        value = {"text": "a", "prompt": "p", "completion": "c"}
        with pytest.raises(
            UsageError, match=r"text and prompt\+completion.*--record-form text\|pr"
        ):
            encode(llama, [value])
        (row,) = encode(llama, [value], record_form="text")
        assert [row.input_ids[0], *row.labels] == document(llama, "a")

    def test_unknown_column_names_those_there_are(self, llama: Any) -> None:
        with pytest.raises(UsageError, match=r"1 has no column 'text'.*'body'.*--columns text="):
            encode(llama, [{"body": "a"}])
        with pytest.raises(UsageError, match=r"no column 'completion'.*--columns completion="):
            encode(llama, [{"prompt": "a"}], record_form="prompt")

    @pytest.mark.parametrize("value", [7, ["a"], {"a": 1}, b"bytes", "\ud800"])
    def test_a_text_that_is_none(self, llama: Any, value: Any) -> None:
        with pytest.raises(UsageError, match=r"data.jsonl: line 2: column 'text' holds"):
            encode(llama, [{"text": "a"}, {"text": value}])
        encoder = make_encoder(RowSpec("causal-lm", on_error="skip"), llama)
        assert len(list(encoder.encode(records([{"text": "a"}, {"text": value}])))) == 1
        assert encoder.skipped == 1
        assert encoder.stats.reasons[0].startswith("data.jsonl: line 2: column 'text'")

    def test_columns_to_read(self) -> None:
        assert RowSpec("causal-lm", record_form="text", text_column="body").columns == ("body",)
        forms = ("text", "messages", "tools", "prompt", "completion")
        assert RowSpec("causal-lm").columns == forms
        spec = RowSpec("sequence-classification", pair_column="b", label_column=None)
        assert spec.columns == ("text", "b")


def classify(tokenizer: Any, values: Iterable[dict[str, Any]], **options: Any) -> list[Row]:
    spec = RowSpec("sequence-classification", **{"max_length": 32, **options})
    return list(make_encoder(spec, tokenizer).encode(records(values)))


class TestClassification:
    names = ("negative", "positive")

    def test_rows_are_what_the_tokenizer_says(self, bert: Any) -> None:
        rows = classify(bert, [{"text": "a fine film", "label": 1}, {"text": "bad " * 60}])
        assert rows[0].input_ids.tolist() == bert("a fine film")["input_ids"]
        assert rows[0].input_ids.dtype == np.int32
        assert rows[0].labels.tolist() == [1]
        assert rows[0].text == "a fine film"
        assert rows[0].text_pair is None
        assert rows[1].labels.tolist() == [IGNORE]
        assert len(rows[1].input_ids) == 32
        assert rows[1].text == "bad " * 60

    def test_pairs_have_types(self, bert: Any) -> None:
        (row,) = classify(bert, [{"text": "a b", "other": "c"}], pair_column="other")
        expected = bert("a b", "c")
        assert row.input_ids.tolist() == expected["input_ids"]
        assert row.type_ids is not None
        assert row.type_ids.dtype == np.uint8
        assert row.type_ids.tolist() == expected["token_type_ids"]
        assert row.text_pair == "c"

    def test_a_tokenizer_without_types(self, llama: Any) -> None:
        (row,) = classify(llama, [{"text": "a b", "label": 0}])
        assert row.type_ids is None

    @pytest.mark.parametrize(
        ("label", "expected"),
        [
            (1, 1),
            ("1", 1),
            (" 0 ", 0),
            ("positive", 1),
            (True, 1),
            (1.0, 1),
            (None, IGNORE),
            ("", IGNORE),
            (" ", IGNORE),
            (float("nan"), IGNORE),
            (-100, IGNORE),
            ("-100", IGNORE),
        ],
    )
    def test_labels(self, bert: Any, label: Any, expected: int) -> None:
        (row,) = classify(bert, [{"text": "a", "label": label}], label_names=self.names)
        assert row.labels.tolist() == [expected]
        assert row.labels.dtype == np.int32

    @pytest.mark.parametrize("label", [2, "2", -1, "good", 0.5, float("inf"), [1], "9" * 5000])
    def test_a_label_outside_the_classes(self, bert: Any, label: Any) -> None:
        values = [{"text": "a", "label": 0}, {"text": "b", "label": label}]
        # Never skipped: the classes are wrong, not the record.
        with pytest.raises(UsageError, match=r"data.jsonl: line 2: label is .*1 \(positive\)"):
            classify(bert, values, label_names=self.names, on_error="skip")

    @pytest.mark.parametrize("label", [1, "1", 1.0, " 1", "01"])
    @pytest.mark.parametrize("names", [("1", "2"), ("1", "unknown"), ("1", "0", "-1")])
    def test_a_name_that_looks_like_a_number_is_the_name(
        self, bert: Any, label: Any, names: tuple[str, ...]
    ) -> None:
        (row,) = classify(bert, [{"text": "a", "label": label}], label_names=names)
        assert row.labels.tolist() == [0]

    @pytest.mark.parametrize("label", [0, "0", 0.0, 3])
    def test_beside_such_names_a_number_is_no_index(self, bert: Any, label: Any) -> None:
        with pytest.raises(
            UsageError, match=r"label is .*not one of the teacher's classes: 1, 2\."
        ):
            classify(bert, [{"text": "a", "label": label}], label_names=("1", "2"))

    def test_a_label_column_that_was_named_must_be_there(self, bert: Any) -> None:
        with pytest.raises(UsageError, match=r"no column 'lable'.*--label-column"):
            classify(bert, [{"text": "a", "label": 1}], label_column="lable")
        (row,) = classify(bert, [{"text": "a", "label": 1}], label_column=None)
        assert row.labels.tolist() == [IGNORE]

    def test_a_headerless_table_proposes_columns(self, bert: Any) -> None:
        record = Record(
            {"good": "x", "1": "0"}, "a.tsv", "line 2", FileColumns(("good", "1"), True)
        )
        encoder = make_encoder(RowSpec("sequence-classification"), bert)
        with pytest.raises(UsageError, match="--columns text,label"):
            list(encoder.encode([record]))

    def test_empty_texts_are_counted(self, bert: Any) -> None:
        encoder = make_encoder(RowSpec("sequence-classification"), bert)
        values = [{"text": "", "label": 1}, {"text": "a", "label": 1}]
        assert len(list(encoder.encode(records(values)))) == 1
        assert encoder.empty == 1

    def test_texts_that_are_cut_are_counted(self, bert: Any) -> None:
        encoder = make_encoder(RowSpec("sequence-classification", max_length=32), bert)
        values = [{"text": "a film"}, {"text": "bad " * 30}, {"text": "bad " * 31}]
        assert [len(row.input_ids) for row in encoder.encode(records(values))] == [4, 32, 32]
        assert encoder.truncated == 1

    def test_no_room_for_text(self, bert: Any) -> None:
        with pytest.raises(UsageError, match=r"adds 3 tokens.*--max-length to 5"):
            classify(bert, [], max_length=4, pair_column="other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "translation"}, "task is 'translation', expected one of causal-lm"),
        ({"packing": "tight"}, "packing is 'tight'"),
        ({"max_length": 1}, "max_length is 1"),
        ({"pair_column": "b"}, "pair_column is for labels of texts"),
        ({"label_names": ("a", "a")}, "label_names"),
        ({"prompt_column": "text"}, "expected different names"),
        (
            {"on_error": "ignore", "record_form": "chat"},
            "record_form is 'chat'.*on_error is 'ignore'",
        ),
    ],
)
def test_row_spec_checks_itself(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RowSpec(**{"task": "causal-lm", **options})


def test_places_with_a_soft_target() -> None:
    ids = np.arange(4, dtype=np.int32)
    row = Row(ids, np.array([7, IGNORE, 0, IGNORE], np.int32))
    assert row.positions("causal-lm").tolist() == [0, 2]
    unlabelled = Row(ids, np.array([IGNORE], np.int32))
    assert unlabelled.positions("sequence-classification").tolist() == [0]


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(0, 9),
    st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_rows_are_padded_on_the_right(lengths: list[int], pad_id: int, typed: list[bool]) -> None:
    rows = [
        Row(
            np.arange(1, n + 1, dtype=np.int32) + 10 * i,
            np.array([0], np.int32),
            np.ones(n, np.uint8) if typed[i] else None,
        )
        for i, n in enumerate(lengths)
    ]
    batch = pad_rows(rows, pad_id)
    assert ("token_type_ids" in batch) == typed[0]
    for i, row in enumerate(rows):
        n, rest = lengths[i], max(lengths) - lengths[i]
        assert batch["input_ids"][i].tolist() == [*row.input_ids, *[pad_id] * rest]
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * rest
        if typed[0]:
            assert batch["token_type_ids"][i].tolist() == [int(typed[i])] * n + [0] * rest
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}
    assert padded(np.zeros(0), np.zeros(2, np.int64), 7).shape == (2, 0)
