"""Conversations: the text that a chat template makes of one, and the parts of it that are learnt.

A student learns from exactly what the model would see, so a conversation is rendered and tokenised
whole, and the learnt parts are found in that text by character offsets. Templates with
`{% generation %}` mark the assistant's parts. In others a message is found by difference: the
conversation is rendered again with other texts in this message, and what differs is the message.
An answer begins behind the prompt for one (`add_generation_prompt`) and ends with the special token
that follows it. So nothing is assumed of a template that shows a message otherwise once more
follows (Qwen3 forgets what was thought before earlier answers).

Cost: a conversation with n learnt messages is rendered once if the template marks them, else n + 3
times, and once more for each answer that no special token follows at once (calls of tools).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import jinja2

from kdcache.corpus import RecordError, kind_of
from kdcache.corpus.records import shorten
from kdcache.errors import UsageError
from kdcache.rows.spec import RowSpec
from kdcache.rows.tokens import Document, checked_text, need_offsets

Message = dict[str, Any]
Range = tuple[int, int]

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ASSISTANT = "assistant"
_THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
_NAMES = ("id", "type", "tool_call_id")  # templates check them


class Chats:
    """Makes documents of conversations by a `RowSpec`; one per encoder."""

    def __init__(self, spec: RowSpec, tokenizer: Any) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self._options = json.loads(spec.chat_template_kwargs or "{}")
        # The chat template without tools and with them: some tokenizers have two.
        self._templates: dict[bool, str] = {}
        self._special: tuple[str, ...] | None = None

    def document(self, messages: Any, tools: Any = None) -> Document:
        """The document of a conversation; empty text where there is nothing to read.

        Args:
            messages: what the column of messages holds.
            tools: what the column of tools holds, if there is one.

        Raises:
            RecordError: The values can't be used, or the template refuses them.
            UsageError: The tokenizer can't serve conversations.
        """
        if messages is None or messages == []:
            return Document("")
        given = _messages(messages, self._spec.messages_column)
        with self._template_for(given, tools) as known:
            if self._marked(known):
                if _listed(given):
                    _check_words(given, self._render(given, known))
                return self._by_marks(given, known)
            text = self._render(given, known)
            _check_words(given, text)
            return Document(text, self._spoken(text, given, known), framed=False)

    def prompt(self, messages: Any, tools: Any = None) -> Document:
        """What a model answers: a conversation up to its last answer, or to the one that is due.

        Raises: as `document` does.
        """
        given = _messages(messages or [], self._spec.messages_column)
        while given and given[-1]["role"] == _ASSISTANT:
            given.pop()
        if not given:
            return Document("")
        with self._template_for(given, tools) as known:
            text = self._render(given, known, prompt=True)
        _check_words(given, text)
        return Document(text, framed=False)

    @contextlib.contextmanager
    def _template_for(self, messages: list[Message], tools: Any) -> Iterator[Any]:
        """Refuse what the template cannot render; gives the tools as it expects them."""
        known = _tools(tools, self._spec.tools_column)
        need_offsets(self._tokenizer, "conversations")
        if not self._tokenizer.chat_template:
            raise UsageError(
                f"column {self._spec.messages_column!r} holds conversations, but the tokenizer has "
                "no chat template. Use an instruct model's, name a file, --chat template=FILE, or "
                "choose --record-form text."
            )
        self._check_tools(messages, known)
        try:
            yield known
        except (jinja2.TemplateError, TypeError) as error:
            # Templates refuse what they don't know, such as two turns of the user in a row.
            raise RecordError(f"the tokenizer's chat template refuses it ({error})") from None

    def _marked(self, tools: Any) -> bool:
        """Whether the template's own marks say what is learnt."""
        if tuple(self._spec.learn) != (_ASSISTANT,):
            return False
        return bool(_GENERATION_TAG.search(self._template(tools)))

    def _template(self, tools: Any) -> str:
        some = tools is not None
        if some not in self._templates:
            self._templates[some] = str(self._tokenizer.get_chat_template(tools=tools))
        return self._templates[some]

    def _check_tools(self, messages: list[Message], tools: Any) -> None:
        """Refuse what the template would leave out without a word."""
        lost = [
            (f"column {self._spec.tools_column!r} describes tools", "tools", tools is not None),
            ("it holds calls of tools", "tool_calls", any("tool_calls" in m for m in messages)),
        ]
        for what, name, there in lost:
            if there and name not in self._template(tools):
                raise RecordError(
                    f"{what}, which the tokenizer's chat template leaves out: it has no {name!r}. "
                    "Name one that has with --chat template=FILE, or remove them"
                )

    def _render(self, messages: Sequence[Message], tools: Any, prompt: bool = False) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                tokenize=False,
                add_generation_prompt=prompt,
                **self._options,
            )
        )

    def _by_marks(self, messages: list[Message], tools: Any) -> Document:
        out = self._tokenizer.apply_chat_template(
            messages,
            tools=tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False, "return_offsets_mapping": True},
            **self._options,
        )
        mask = list(out["assistant_masks"])
        if self._spec.reasoning == "read":
            _unlearn(mask, out["offset_mapping"], self._render(messages, tools))
        return Document("-", framed=False, tokens=(out["input_ids"], mask))

    def _spoken(self, text: str, messages: list[Message], tools: Any) -> list[Range]:
        """The stretches of a rendered conversation that are learnt."""
        found: list[Range] = []
        heads: list[str] | None = None

        def range_of(i: int) -> Range | None:
            other = [*messages[:i], _other(messages[i], _unused(text)), *messages[i + 1 :]]
            return _difference(text, self._render(other, tools))

        for i, message in enumerate(messages):
            if message["role"] not in self._spec.learn:
                continue
            here = range_of(i)
            if here is None:  # the template leaves this message out
                continue
            start, stop = here
            if message["role"] == _ASSISTANT:
                if heads is None:
                    heads = self._heads(messages, max(i, 1), tools)
                start = self._begin(text, start, heads, found, messages[:i], tools)
            found.append((start, self._end(text, stop, i + 1, messages, range_of)))
        if self._spec.reasoning == "read":
            return list(_without(found, list(thoughts(text, found))))
        return found

    def _heads(self, messages: list[Message], i: int, tools: Any) -> list[str]:
        """What the template writes before an answer, and this without a thought it begins with."""
        before = self._render(messages[:i], tools)
        prompt = self._render(messages[:i], tools, prompt=True)
        if not prompt.startswith(before):
            return []
        head = prompt[len(before) :]
        starts = {head, *(head.partition(begin)[0] for begin, _ in _THOUGHTS)}
        return [start for start in starts if start.strip()]

    def _begin(
        self,
        text: str,
        stop: int,
        heads: list[str],
        found: list[Range],
        before: list[Message],
        tools: Any,
    ) -> int:
        """Where an answer begins, if its own words begin at `stop`."""
        least = found[-1][1] if found else 0
        ends = [at + len(head) for head in heads if (at := text.rfind(head, least, stop)) >= 0]
        if ends:
            return max(ends)
        # Some templates write nothing before an answer: then it is what follows the past.
        past = self._render(before, tools) if before and not heads else ""
        return len(past) if past and text.startswith(past) else stop

    def _end(
        self,
        text: str,
        start: int,
        following: int,
        messages: list[Message],
        range_of: Callable[[int], Range | None],
    ) -> int:
        """Where a message ends, if its own words end at `start`: with the next special token."""
        if self._special is None:
            added = self._tokenizer.added_tokens_decoder.values()
            names = {str(token) for token in added if token.special}
            self._special = tuple(names | set(self._tokenizer.all_special_tokens))
        ends = [(at, len(token)) for token in self._special if (at := text.find(token, start)) >= 0]
        if not ends:
            return len(text) if following == len(messages) else start
        at, length = min(ends, key=lambda end: (end[0], -end[1]))
        if text[start:at].strip() and following < len(messages):
            after = range_of(following)
            if after is not None and after[0] < at:
                return start
        return at + length


def thoughts(text: str, ranges: Sequence[Range]) -> Iterator[Range]:
    """The stretches of a text that were thought before something was said, tags included.

    Args:
        text: The text.
        ranges: Where to look; a thought that begins before such a stretch ends in it.
    """
    for start, stop in ranges:
        for begin, end in _THOUGHTS:
            at = start
            while (close := text.find(end, at, stop)) >= 0:
                opened = text.rfind(begin, at, close)
                if opened < 0 and at > start:
                    at = close + len(end)
                    continue
                after = close + len(end)
                while after < stop and text[after].isspace():
                    after += 1
                yield (opened if opened >= 0 else at), after
                at = after


def _unlearn(mask: list[int], offsets: Sequence[Range], text: str) -> None:
    """Take thoughts out of a mask of tokens."""
    runs: list[Range] = []
    for learnt, (start, stop) in zip(mask, offsets, strict=True):
        if learnt and runs and start <= runs[-1][1]:
            runs[-1] = runs[-1][0], stop
        elif learnt:
            runs.append((start, stop))
    for start, stop in thoughts(text, runs):
        for i, (a, b) in enumerate(offsets):
            if a < stop and b > start:
                mask[i] = 0


def _without(ranges: Sequence[Range], holes: Sequence[Range]) -> Iterator[Range]:
    for start, stop in ranges:
        for a, b in sorted(holes):
            if a < stop and b > start:
                if a > start:
                    yield start, a
                start = b
        if start < stop:
            yield start, stop


def _messages(messages: Any, column: str) -> list[Message]:
    """Messages as templates expect them.

    Tables write null for what a message lacks, and calls of tools come as JSON in a string.
    """
    if not isinstance(messages, list):
        raise RecordError(
            f"column {column!r} holds {kind_of(messages)} where a list of messages was expected"
        )
    out = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RecordError(
                f"column {column!r} holds a message that is not "
                '{"role": "user|assistant|...", "content": "..."}'
            )
        # Some templates take a list of typed parts; what they make of it is theirs to say.
        if not isinstance(message.get("content"), list):
            checked_text(message.get("content"), column)
        kept = {k: v for k, v in message.items() if v is not None or k == "content"}
        if kept.get("tool_calls"):
            kept["content"] = kept.get("content") or ""
            kept["tool_calls"] = [_call(call, column) for call in kept["tool_calls"]]
        else:
            kept.pop("tool_calls", None)
        out.append(kept)
    return out


def _call(call: Any, column: str) -> Any:
    call = _filled(call)
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise RecordError(
            f"column {column!r} holds a call of a tool that is not "
            '{"function": {"name": "...", "arguments": {...}}}'
        )
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise RecordError(
                f"column {column!r} holds a call of {inner['name']!r} whose arguments are not JSON"
            ) from None
    inner = {**inner, "arguments": arguments}
    return {**call, "function": inner} if "function" in call else inner


def _listed(messages: Sequence[Message]) -> list[str]:
    """The texts of contents that are lists of parts, without what was thought."""
    contents = (m["content"] for m in messages if isinstance(m.get("content"), list))
    parts = (part.get("text") for parts in contents for part in parts if isinstance(part, dict))
    texts = [part for part in parts if isinstance(part, str)]
    for text, (_, close) in product(range(len(texts)), _THOUGHTS):
        texts[text] = texts[text].rpartition(close)[2]
    return [text.strip() for text in texts]


def _check_words(messages: Sequence[Message], text: str) -> None:
    """Refuse a rendered conversation that has lost contents which are lists of parts."""
    for words in _listed(messages):
        if words not in text:
            raise RecordError(
                "the tokenizer's chat template leaves out a message whose content is a list of "
                f"parts ({shorten(words)!r}). Write the content as text"
            )


def _tools(tools: Any, column: str) -> list[Any] | None:
    """Descriptions of tools as templates expect them; None where there are none."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except ValueError:
            raise RecordError(f"column {column!r} holds text that is not JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError(
            f"column {column!r} holds {kind_of(tools)} where a list of objects, the tools, was "
            "expected"
        )
    return [_filled(tool) for tool in tools]


def _filled(value: Any) -> Any:
    """Without the nulls that tables write for what is not there."""
    if isinstance(value, dict):
        return {k: _filled(v) for k, v in value.items() if v is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def _unused(text: str) -> str:
    """A character that a text does not have."""
    return next(mark for mark in map(chr, range(0xE000, 0xF8FF)) if mark not in text)


def _other(message: Message, mark: str) -> Message:
    """The message with other words, and as many."""

    def change(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: v if k in _NAMES else change(v) for k, v in value.items()}
        if isinstance(value, list):
            return [change(item) for item in value]
        return mark if value != "" else value

    changed = {k: v if k == "role" else change(v) for k, v in message.items()}
    if changed == message:  # it has no words
        changed["content"] = mark
    return changed


def _difference(text: str, other: str) -> Range | None:
    """The stretch of a text that another one has not; None if they are equal."""
    if text == other:
        return None
    most = min(len(text), len(other))
    start = _agree(lambda n: text[:n] == other[:n], most)
    stop = _agree(lambda n: text[len(text) - n :] == other[len(other) - n :], most - start)
    return start, len(text) - stop


def _agree(equal: Callable[[int], bool], most: int) -> int:
    """The largest number for which they are equal, if they are for all smaller ones."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if equal(middle) else (low, middle - 1)
    return low
