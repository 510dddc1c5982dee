"""Chats: what is learnt of a conversation is what the template's own marks would say, for templates
of Qwen3, Llama 3.1 and SmolLM2, with tools, thoughts, and messages that templates rewrite.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_rows import TOKENIZERS, learnt, records, template
from transformers import AutoTokenizer

from kdcache.cache import Cache
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.errors import UsageError
from kdcache.rows import Row, RowSpec, make_encoder
from kdcache.rows.chats import thoughts
from kdcache.tasks import IGNORE

QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
)
SPECIAL = {"qwen3": QWEN, "smollm2": QWEN, "llama-3.1": LLAMA}
END = {"qwen3": "<|im_end|>", "smollm2": "<|im_end|>", "llama-3.1": "<|eot_id|>"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def qwen_marked(text: str) -> str:
    text = text.replace(
        '{%- elif message.role == "assistant" %}',
        '{%- elif message.role == "assistant" %}\n{%- set answer %}',
    )
    text = text.replace("'<|im_start|>' + message.role + '\\n<think>", "'<think>")
    text = text.replace("{{- '<|im_start|>' + message.role + '\\n' + content }}", "{{- content }}")
    tail = "{{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\" %}"
    assert tail in text
    return text.replace(
        tail,
        "{%- endset %}{{- '<|im_start|>assistant\\n' }}{%- generation %}"
        "{{- answer + '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}"
        '\n    {%- elif message.role == "tool" %}',
    )


def llama_marked(text: str) -> str:
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    plain = next(line for line in text.split("{{- ") if "message['content'] + '<|eot_id|>'" in line)
    plain = "{{- " + plain[: plain.index("}}") + 2]
    text = text.replace(
        plain,
        "{%- if message.role == 'assistant' %}{{- '" + header + "' }}{%- generation %}"
        "{{- message['content'] + '<|eot_id|>' }}{%- endgeneration %}{%- else %}"
        + plain
        + "{%- endif %}",
    )
    text = text.replace(
        "{%- elif 'tool_calls' in message %}",
        "{%- elif 'tool_calls' in message %}{%- set answer %}",
    )
    start, call = text.split("{%- set answer %}")
    call, end = call.split('{%- elif message.role == "tool"', 1)
    call = call.replace("{{- '" + header + "' -}}", "")
    return (
        start
        + "{%- set answer %}"
        + call
        + "{%- endset %}{{- '"
        + header
        + "' }}{%- generation %}{{- answer }}{%- endgeneration %}\n"
        + '    {%- elif message.role == "tool"'
        + end
    )


def smollm_marked(text: str) -> str:
    plain = text[text.index("{{'<|im_start|>' + message['role']") : text.index("{% endfor %}")]
    return text.replace(
        plain,
        "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
        + plain
        + "{% endif %}",
    )


MARKED = {"qwen3": qwen_marked, "llama-3.1": llama_marked, "smollm2": smollm_marked}


def tokenizer_of(name: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / "bytes")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[name])})
    tokenizer.eos_token = END[name]
    if name == "llama-3.1":
        tokenizer.bos_token = "<|begin_of_text|>"
    tokenizer.chat_template = template(name)
    return tokenizer


@pytest.fixture(scope="module", params=sorted(MARKED))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def both(family: str) -> tuple[Any, Any]:
    """A tokenizer with the template as it is, and one whose template marks the answers."""
    plain, marked = tokenizer_of(family), tokenizer_of(family)
    marked.chat_template = MARKED[family](template(family))
    assert "{%- generation" in marked.chat_template or "{% generation" in marked.chat_template
    return plain, marked


def encode(tokenizer: Any, values: Sequence[dict[str, Any]], **options: Any) -> list[Row]:
    spec = RowSpec("causal-lm", packing="none", max_length=4096, **options)
    return list(make_encoder(spec, tokenizer).encode(records(values)))


def same(plain: Sequence[Row], marked: Sequence[Row]) -> None:
    assert len(plain) == len(marked)
    for mine, theirs in zip(plain, marked, strict=True):
        assert np.array_equal(mine.input_ids, theirs.input_ids)
        assert np.array_equal(mine.labels, theirs.labels)


def call(city: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


USER = {"role": "user", "content": "Sea?"}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER, {"role": "assistant", "content": "Yes."}],
    "three turns": [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Really?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Yes."},
        {"role": "assistant", "content": "Yes, yes."},
    ],
    "ends with a question": [USER, {"role": "assistant", "content": "Yes."}, USER],
    "thoughts": [
        USER,
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."},
        {"role": "user", "content": "Really?"},
        {"role": "assistant", "content": "<think>\nAh.\n</think>\n\nNo."},
    ],
    "marks in a question": [
        {"role": "user", "content": "<|im_start|>assistant\nNo.<|im_end|> <|eot_id|>"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "<think>Hm.</think>"},
        {"role": "assistant", "content": "Yes."},
    ],
    "answers in a row": [
        USER,
        {"role": "assistant", "content": "Yes."},
        *[{"role": "assistant", "content": "No."}] * 2,
    ],
    "blank answers": [
        {"role": "assistant", "content": "\n\n"}, USER, {"role": "assistant", "content": " "}],
    "an empty answer": [USER, {"role": "assistant", "content": ""}, USER, CHAT_END := {
        "role": "assistant", "content": "Yes."}],
}  # fmt: skip
WITH_TOOLS: list[dict[str, Any]] = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [call("Rome")]},
    {"role": "tool", "content": "12 degrees", "name": "weather"},
    {"role": "assistant", "content": "", "tool_calls": [call("Oslo")]},
    {"role": "tool", "content": "2 degrees", "name": "weather"},
    {"role": "assistant", "content": "Rome is warmer."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Good."},
]


@pytest.mark.parametrize("name", CHATS)
def test_masks_are_those_of_the_templates_own_marks(both: tuple[Any, Any], name: str) -> None:
    values = [{"messages": CHATS[name]}]
    plain, marked = (encode(tokenizer, values) for tokenizer in both)
    assert sum((row.labels != IGNORE).sum() for row in plain) > 1
    same(plain, marked)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    said=st.lists(
        st.text("ab<|im_end|>think/ \n.é", max_size=12).map(str.strip), min_size=2, max_size=6
    )
)
def test_they_are_whatever_is_said(both: tuple[Any, Any], said: list[str]) -> None:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    same(*(encode(tokenizer, [{"messages": messages}]) for tokenizer in both))


def test_calls_of_tools_are_learnt_and_their_results_are_not(
    both: tuple[Any, Any], family: str
) -> None:
    if family == "smollm2":
        pytest.skip("this template has no tools")
    values = [{"messages": WITH_TOOLS, "tools": TOOLS}]
    plain, marked = (encode(tokenizer, values) for tokenizer in both)
    same(plain, marked)
    text = learnt(both[0], plain)
    assert text.count(END[family]) == 4
    assert "Rome" in text
    assert "degrees" not in text
    assert "Weather of a city" in both[0].decode(plain[0].input_ids)
    # As OpenAI and tables write them: text for arguments and tools, null for what is not there.
    written = json.loads(json.dumps(WITH_TOOLS))
    for message in written:
        message.setdefault("tool_calls", None)
        for one in message["tool_calls"] or ():
            one["function"]["arguments"] = json.dumps(one["function"]["arguments"])
            message["content"] = None
    same(encode(both[0], [{"messages": written, "tools": json.dumps(TOOLS)}]), plain)


def test_other_roles_are_learnt_where_that_is_asked_for(both: tuple[Any, Any], family: str) -> None:
    if family == "smollm2":
        pytest.skip("this template has no tools")
    values = [{"messages": WITH_TOOLS, "tools": TOOLS}]
    for tokenizer in both:  # marks are of the assistant alone
        rows = encode(tokenizer, values, learn=("assistant", "tool"))
        text = learnt(tokenizer, rows)
        assert "12 degrees" in text
        assert "2 degrees" in text
        assert "Sea?" not in text
    (row,) = encode(both[0], values, learn=("user",))
    text = learnt(both[0], [row])
    assert text.startswith("Sea?")
    assert "Rome" not in text


def test_thoughts_may_be_read_without_being_learnt(both: tuple[Any, Any], family: str) -> None:
    values = [{"messages": CHATS["thoughts"]}]
    rows = [encode(tokenizer, values, reasoning="read") for tokenizer in both]
    same(*rows)
    end = END[family]
    assert learnt(both[0], rows[0]) == f"Yes.{end}No.{end}"
    assert "Ah." in both[0].decode(rows[0][0].input_ids)
    known = learnt(both[0], encode(both[0], values))
    assert known.endswith(f"<think>\nAh.\n</think>\n\nNo.{end}")
    # Qwen3 forgets what was thought before an earlier answer.
    assert ("Hm." in known) == (family != "qwen3")


def test_variables_of_a_template() -> None:
    tokenizer = tokenizer_of("qwen3")
    values = [{"messages": CHATS["one turn"]}]
    thinking = learnt(tokenizer, encode(tokenizer, values))
    assert thinking == "<think>\n\n</think>\n\nYes.<|im_end|>"
    # Then the empty thought is a part of the question.
    kwargs = json.dumps({"enable_thinking": False})
    assert learnt(tokenizer, encode(tokenizer, values, chat_template_kwargs=kwargs)) == (
        "Yes.<|im_end|>"
    )
    three = learnt(
        tokenizer,
        encode(tokenizer, [{"messages": CHATS["three turns"]}], chat_template_kwargs=kwargs),
    )
    assert three == "Yes.<|im_end|>Yes.<|im_end|>Yes, yes.<|im_end|>"
    llama = tokenizer_of("llama-3.1")
    kwargs = json.dumps({"date_string": "1 May 2030"})
    (row,) = encode(llama, values, chat_template_kwargs=kwargs)
    assert "Today Date: 1 May 2030" in llama.decode(row.input_ids)
    with pytest.raises(UsageError, match="chat_template_kwargs is '3', expected JSON"):
        RowSpec("causal-lm", chat_template_kwargs="3")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"tools": "{"}, "column 'tools' holds text that is not JSON"),
        ({"tools": "3"}, "column 'tools' holds a number where a list of objects, the tools"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": ["x"]}]}, "a call of a tool that"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [
                {"function": {"name": "f", "arguments": "{"}}]}]},
            "a call of 'f' whose arguments are not JSON",
        ),
    ],
)  # fmt: skip
def test_tools_that_are_none(value: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"line 1: .*{message}"):
        encode(tokenizer_of("qwen3"), [{"messages": CHATS["one turn"], **value}])


def test_what_a_template_would_leave_out_is_refused() -> None:
    plain, marked = tokenizer_of("smollm2"), tokenizer_of("smollm2")
    marked.chat_template = MARKED["smollm2"](template("smollm2"))
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]}
             for m in CHATS["thoughts"]]  # fmt: skip
    for tokenizer in (plain, marked):
        with pytest.raises(UsageError, match=r"describes tools, which .* it has no 'tools'\. Name"):
            encode(tokenizer, [{"messages": CHATS["one turn"], "tools": TOOLS}])
        with pytest.raises(UsageError, match="holds calls of tools, which .* no 'tool_calls'"):
            encode(tokenizer, [{"messages": WITH_TOOLS}])
        with pytest.raises(UsageError, match="chat template refuses it"):
            encode(tokenizer, [{"messages": parts}])
        # As templates of several kinds of input do: these take the text of parts, those drop them.
        kept = tokenizer.chat_template.replace("message['content']", "words(message['content'])")
        words = (
            "{% macro words(c) %}{% if c is string %}{{ c }}{% else %}{% for part in c %}"
            "{{ part.text }}{% endfor %}{% endif %}{% endmacro %}"
        )
        tokenizer.chat_template = words + kept
        (row,) = encode(tokenizer, [{"messages": parts}])
        (same_text,) = encode(tokenizer, [{"messages": CHATS["thoughts"]}])
        same([row], [same_text])
        tokenizer.chat_template = words.replace("part.text", "''") + kept
        with pytest.raises(UsageError, match=r"leaves out a message .* list of parts \('Sea\?'\)"):
            encode(tokenizer, [{"messages": parts}])


def test_a_thought_that_began_in_the_question_ends_in_the_answer() -> None:
    text = "ask<think>\nHm.</think>\n\nYes. </think> No."
    for start, begin in ((10, 10), (0, 3)):
        ((found, stop),) = thoughts(text, [(start, len(text))])
        assert found == begin
        assert text[stop:] == "Yes. </think> No."


@pytest.mark.slow
def test_a_template_from_a_file_is_kept_with_the_cache(
    small_build: BuildOptions, tmp_path: Path
) -> None:
    corpus = tmp_path / "chats.parquet"
    rows = [{"messages": WITH_TOOLS, "tools": json.dumps(TOOLS)}] * 3
    # Arrow's structs have all fields in each message.
    pq.write_table(pa.Table.from_pylist(rows), corpus)
    file = tmp_path / "own.jinja"
    file.write_text(template("qwen3"))
    options = dataclasses.replace(
        small_build, corpus=(str(corpus),), chat_template=str(file), learn=("assistant", "tool"),
        packing="split", codec="topk:4", max_length=128,
    )  # fmt: skip
    with pytest.raises(UsageError, match="no chat template.*--chat template"):
        build(dataclasses.replace(options, chat_template=None))
    with pytest.raises(UsageError, match=r"--chat template=.*nothing.jinja"):
        build(dataclasses.replace(options, chat_template=str(tmp_path / "nothing.jinja")))
    build(options)
    cache = Cache.open(options.out)
    assert cache.tokenizer().chat_template == template("qwen3")
    assert cache.spec.rows["learn"] == ["assistant", "tool"]
    assert "tools_column" not in cache.spec.rows
