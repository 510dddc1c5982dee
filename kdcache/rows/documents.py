"""Documents: a causal-LM record as text plus the parts of it that have labels.

The assistant's tokens are found by character offsets in the rendered conversation, with one
tokenisation of the whole: the student sees exactly what the model would see. Templates with
`{% generation %}` mark them. For other templates the conversation is rendered up to and after each
assistant message, and what the message adds is the assistant's.

Cost: a conversation with n answers is rendered once if the template marks them, else 2n + 1 times.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from kdcache.corpus import Record, RecordError
from kdcache.errors import UsageError
from kdcache.rows.spec import RowSpec

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
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
        kind = type(value).__name__
        raise RecordError(f"column {column!r} holds a {kind} where text was expected")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise RecordError(f"column {column!r} holds half of a surrogate pair") from None
    return value


class DocumentMaker:
    """Makes documents of records by a `RowSpec`; one per encoder."""

    def __init__(self, spec: RowSpec, tokenizer: Any) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        # Whether the chat template marks the assistant's part; None until a conversation comes.
        self._marks: bool | None = None

    def make(self, record: Record) -> Document:
        """The document of a record; empty text where there is nothing to read.

        Raises:
            RecordError: The values can't be used.
            UsageError: The columns or the tokenizer can't serve this kind of record.
        """
        form = self._form(record)
        spec, values = self._spec, record.values
        if form == "text":
            return Document(checked_text(values[spec.text_column], spec.text_column))
        if form == "messages":
            return self._conversation(values[spec.messages_column])
        prompt, completion = (
            _plain(values[column], column)
            for column in (spec.prompt_column, spec.completion_column)
        )
        self._need_offsets("prompt and completion")
        if not completion:
            return Document("")
        text = prompt + completion
        return Document(text, [(len(prompt), len(text))])

    def _form(self, record: Record) -> str:
        spec, values = self._spec, record.values
        columns = {
            "text": (spec.text_column,),
            "messages": (spec.messages_column,),
            "prompt": (spec.prompt_column, spec.completion_column),
        }
        if spec.record_form != "auto":
            for column in columns[spec.record_form]:
                if column not in values:
                    completion = column == spec.completion_column
                    option = "completion" if completion else spec.record_form
                    raise record.missing([column], f"--{option}-column")
            return spec.record_form
        there = [form for form, names in columns.items() if all(name in values for name in names)]
        filled = [form for form in there if all(values[name] is not None for name in columns[form])]
        if len(filled) > 1:
            raise UsageError(
                f"{record.place} holds {' and '.join('+'.join(columns[form]) for form in filled)}, "
                f"more than one form of record. Choose one with --record-form {'|'.join(filled)}."
            )
        if filled or there:
            return (filled or there)[0]
        if "input_ids" in record.columns:
            raise UsageError(
                f"{record.place} has a column 'input_ids' and none of text. If its ids are to be "
                "the rows, add --record-form ids."
            )
        alternatives = [spec.text_column, spec.messages_column, "+".join(columns["prompt"])]
        raise record.missing(alternatives, "--text-column", [spec.text_column])

    def _need_offsets(self, what: str) -> None:
        if not getattr(self._tokenizer, "is_fast", False):
            raise UsageError(
                f"{what} need a tokenizer that returns the characters of each token; "
                f"{type(self._tokenizer).__name__} can't. Use one with a tokenizer.json."
            )

    def _conversation(self, messages: Any) -> Document:
        if messages is None or messages == []:
            return Document("")
        column = self._spec.messages_column
        if not isinstance(messages, list):
            raise RecordError(
                f"column {column!r} holds a {type(messages).__name__} where a list of messages was "
                f"expected"
            )
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise RecordError(
                    f"column {column!r} holds a message that is not "
                    '{"role": "user|assistant|...", "content": "..."}'
                )
            # Some templates take a list of typed parts; what they make of it is theirs to say.
            if not isinstance(message.get("content"), list):
                checked_text(message.get("content"), column)
        if self._marks is None:
            self._marks = bool(_GENERATION_TAG.search(self._template()))
        try:
            if self._marks:
                return self._marked(messages)
            return self._compared(messages)
        except (jinja2.TemplateError, TypeError) as error:
            # Templates refuse what they don't know, such as two turns of the user in a row.
            raise RecordError(f"the tokenizer's chat template refuses it ({error})") from None

    def _template(self) -> str:
        self._need_offsets("conversations")
        try:
            return str(self._tokenizer.get_chat_template())
        except ValueError:
            raise UsageError(
                f"column {self._spec.messages_column!r} holds conversations, but the tokenizer has "
                f"no chat template. Use an instruct model's, or choose --record-form text."
            ) from None

    def _marked(self, messages: list[dict[str, Any]]) -> Document:
        out = self._tokenizer.apply_chat_template(
            messages,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        return Document("-", framed=False, tokens=(out["input_ids"], out["assistant_masks"]))

    def _render(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
        )

    def _compared(self, messages: list[dict[str, Any]]) -> Document:
        text = self._render(messages)
        loss_ranges = []
        for i, message in enumerate(messages):
            if message["role"] != _ASSISTANT:
                continue
            # A template given nothing to render fails; an opening assistant starts the text.
            before = self._render(messages[:i], prompt=True) if i else ""
            after = self._render(messages[: i + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise UsageError(
                    f"the tokenizer's chat template renders message {i + 1} of a conversation "
                    f"differently when more follows, so the assistant's part cannot be located. "
                    f"Use a template that marks it with {{% generation %}} and "
                    f"{{% endgeneration %}}."
                )
            loss_ranges.append((len(before), self._spoken_until(after)))
        return Document(text, loss_ranges, framed=False)

    def _spoken_until(self, text: str) -> int:
        """Where the answer at the end of `text` ends."""
        # White space after the end token is the template's: it has no label.
        end = len(text.rstrip())
        tokens = self._tokenizer.all_special_tokens
        return end if any(text.endswith(token, 0, end) for token in tokens) else len(text)


def _plain(value: Any, column: str) -> str:
    if isinstance(value, list):
        raise RecordError(
            f"column {column!r} holds a list where text was expected; a conversation goes into one "
            f"column, messages"
        )
    return checked_text(value, column)
