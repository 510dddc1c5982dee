"""Documents: a causal-LM record as text plus the parts of it that have labels."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from kdcache.corpus import Record, RecordError
from kdcache.errors import UsageError
from kdcache.rows.spec import RowSpec
from kdcache.rows.tokens import Document, checked_text, need_offsets

if TYPE_CHECKING:
    from kdcache.rows.chats import Chats


class DocumentMaker:
    """Makes documents of records by a `RowSpec`; one per encoder."""

    def __init__(self, spec: RowSpec, tokenizer: Any) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self._columns = {
            "text": (spec.text_column,),
            "messages": (spec.messages_column,),
            "prompt": (spec.prompt_column, spec.completion_column),
        }
        # The forms that find all their columns among some names: most files have one set of names.
        self._there = lru_cache(64)(
            lambda given: [form for form, own in self._columns.items() if {*own} <= {*given}]
        )

    @cached_property
    def _chats(self) -> Chats:
        from kdcache.rows.chats import Chats

        return Chats(self._spec, self._tokenizer)

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
            return self._chats.document(values[spec.messages_column], values.get(spec.tools_column))
        prompt, completion = (
            _plain(values[column], column)
            for column in (spec.prompt_column, spec.completion_column)
        )
        need_offsets(self._tokenizer, "prompt and completion")
        if not completion:
            return Document("")
        text = prompt + completion
        return Document(text, [(len(prompt), len(text))])

    def _form(self, record: Record) -> str:
        spec, values, columns = self._spec, record.values, self._columns
        if spec.record_form != "auto":
            for column in columns[spec.record_form]:
                if column not in values:
                    completion = column == spec.completion_column
                    option = "completion" if completion else spec.record_form
                    raise record.missing([column], f"--columns {option}=THEIRS")
            return spec.record_form
        there = self._there(tuple(values))
        if len(there) == 1:
            return there[0]
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
        raise record.missing(alternatives, "--columns text=THEIRS", [spec.text_column])


def _plain(value: Any, column: str) -> str:
    if isinstance(value, list):
        raise RecordError(
            f"column {column!r} holds a list where text was expected; a conversation goes into one "
            f"column, messages"
        )
    return checked_text(value, column)
