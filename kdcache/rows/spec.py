"""Row and RowSpec: one row, and the options that decide how rows are made."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from kdcache.errors import UsageError
from kdcache.tasks import (
    MASKED_LM,
    SEQ2SEQ_LM,
    TASKS,
    Attend,
    Form,
    Labels,
    LabelTokens,
    MaskUnit,
    OnError,
    Packing,
    Reasoning,
    Task,
    check_task,
    positions,
)

DEFAULT_LABEL_COLUMN = "label"
MASK_SHARE = 0.15  # of BERT
SOURCE_LENGTH = 1024  # tokens
LAST_LABEL = -1  # the decoder reads the last label of a row first
ID_COLUMNS = (
    *("input_ids", "labels", "loss_mask"),
    *("attention_mask", "position_ids", "segment_ids"),
)
# Fields that came later: in an identity only where they decide something.
_LATER = {
    "labels": None, "attend": "row", "tools_column": "tools", "chat_template_kwargs": "",
    "learn": ("assistant",), "reasoning": "learn", "words_column": "tokens",
    "label_tokens": "first", "mask_share": None, "mask_unit": "token", "mask_seed": 0,
    "source_column": "source", "target_column": "target", "max_source_length": None,
    "source_lang": None, "target_lang": None, "decoder_start": None,
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One token sequence with its hard labels; the unit of shuffling.

    Attributes:
        input_ids: int32 `[L]`, no padding.
        labels: causal-lm int32 `[L]`, the id to predict after each token or `IGNORE`; masked-lm
            int32 `[L]`, the id that a masked place had or `IGNORE`; token classification int32
            `[L]`, the class of the token's word, `UNLABELLED` if that has none, or `IGNORE`; of
            tasks of whole texts see `kdcache.rows.labels`.
        type_ids: uint8 `[L]` if the tokenizer marks text and pair (BERT does), else None.
        text: Classification only: what was tokenised, so that a student may tokenise it again.
        text_pair: The pair's text, if there is one.
        words: Token classification only: what was tokenised, one for each first token.
        first: bool `[L]`, token classification only: which tokens are the first of their words.
        source: int32 `[S]`, of sequence-to-sequence models: what the encoder reads. `input_ids`
            is then what the decoder reads: its start, and all labels but the last.
        starts: bool `[L]`, where a document begins whose tokens attend to no other document (the
            first token always); None where all tokens of the row attend to those before them.
    """

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[Any]
    type_ids: npt.NDArray[np.uint8] | None = None
    text: str | None = None
    text_pair: str | None = None
    starts: npt.NDArray[np.bool_] | None = None
    words: tuple[str, ...] | None = None
    first: npt.NDArray[np.bool_] | None = None
    source: npt.NDArray[np.int32] | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of the row; of the source and of the decoder, where there is a source."""
        own = len(self.input_ids)
        return (own,) if self.source is None else (len(self.source), own)

    def documents(self) -> list[Row]:
        """The documents that do not attend to each other, in order, each as a row by itself.

        Their positions, one after another, are those of this row. A row without `starts` is
        returned as it is.
        """
        if self.starts is None:
            return [self]
        bounds = [*np.flatnonzero(self.starts).tolist(), len(self.input_ids)]
        return [
            replace(self, input_ids=self.input_ids[a:b], labels=self.labels[a:b], starts=None)
            for a, b in pairwise(bounds)
        ]

    def places(self, task: str) -> npt.NDArray[np.int64]:
        """Indices of the positions, rising: those with a label; the one of a class always."""
        return np.flatnonzero(positions(self.labels, task))


@dataclass(frozen=True)
class RowSpec:
    """How records become rows.

    Attributes:
        task: one of `kdcache.tasks.TASKS`.
        text_column: Column with the text.
        pair_column: Classification: column with the second text, if any.
        label_column: Classification: column with the label. The default stands for the
            `label_columns` of the task, which may be missing (a transfer set); another name must
            be there. Several with commas between: of several labels a text, one for each class.
            `none` or None: no hard labels, whatever the columns.
        label_names: Classification: the teacher's class names in order; None takes any class
            number.
        max_length: Most tokens of a row.
        packing: Language models: `concat` joins documents into full rows; `none` makes one row of
            a document and truncates it; `split` continues it in further rows; `whole` makes one row
            and refuses a document that does not fit.
        attend: Of `concat`: whether a token attends to the whole `row` before it, or to its own
            `document` alone, whose last token then has no label.
        messages_column: Causal LM: column with a conversation, a list of `{"role", "content"}`.
        tools_column: Causal LM: column with the descriptions of the tools of a conversation; it
            may be missing.
        chat_template_kwargs: Causal LM: a JSON object of more variables for the chat template.
        learn: Causal LM: the roles whose messages have labels.
        reasoning: Causal LM: whether what an assistant thinks before it speaks has labels
            (`learn`) or is only `read`.
        prompt_column: Causal LM: column with the part that is only read.
        completion_column: Causal LM: column with the part that has labels.
        record_form: Causal LM: which of these a record is; `auto` goes by the columns that hold
            something, and refuses a record where more than one form does.
        on_error: What a record that can't be encoded does: `fail`, or be `skip`-ped and
            counted.
        labels: Records of ids: what `labels` and `loss_mask` stand beside: the `token` that they
            are about, or the one before it (`next`); `none` reads neither. None refuses records
            that have them.
        words_column: Token classification: column with the words, a list.
        label_tokens: Token classification: which tokens of a word have its label: the `first`, or
            `all`.
        mask_share: Masked LM: share of a row's tokens that are masked; None for other tasks.
        mask_unit: Masked LM: whether a `token` is masked by itself or with all of its `word`.
        mask_seed: Masked LM: seed of the draw, which is by span, row and place.
        source_column: Sequence to sequence: column with the text that the encoder reads.
        target_column: Sequence to sequence: column with the text that the decoder writes.
        max_source_length: Sequence to sequence: most tokens of a source; `max_length` is of the
            target. Default: 1024; None for other tasks.
        source_lang: Sequence to sequence: language of the sources, for tokenizers that mark it.
        target_lang: Sequence to sequence: that of the targets.
        decoder_start: Sequence to sequence: id that the decoder reads first, `LAST_LABEL` where it
            is the last label; None for other tasks. See `kdcache.teacher.quirks`.

    Raises:
        UsageError: Options that can't be; all of them in one message.
    """

    task: Task
    text_column: str = "text"
    pair_column: str | None = None
    label_column: str | None = DEFAULT_LABEL_COLUMN
    label_names: tuple[str, ...] | None = None
    max_length: int = 1024
    packing: Packing = "concat"
    attend: Attend = "row"
    messages_column: str = "messages"
    tools_column: str = "tools"
    chat_template_kwargs: str = ""
    learn: tuple[str, ...] = ("assistant",)
    reasoning: Reasoning = "learn"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    record_form: Form = "auto"
    on_error: OnError = "fail"
    labels: Labels | None = None
    words_column: str = "tokens"
    label_tokens: LabelTokens = "first"
    mask_share: float | None = None
    mask_unit: MaskUnit = "token"
    mask_seed: int = 0
    source_column: str = "source"
    target_column: str = "target"
    max_source_length: int | None = None
    source_lang: str | None = None
    target_lang: str | None = None
    decoder_start: int | None = None

    def __post_init__(self) -> None:
        if self.label_column == "none":
            object.__setattr__(self, "label_column", None)
        check_task(self.task)
        if self.task == MASKED_LM and self.mask_share is None:
            object.__setattr__(self, "mask_share", MASK_SHARE)
        if TASKS[self.task].source and self.max_source_length is None:
            object.__setattr__(self, "max_source_length", SOURCE_LENGTH)
        wrong = [
            f"{name} is {value!r}, expected one of {', '.join(choices)}"
            for name, value, choices in (
                ("packing", self.packing, get_args(Packing)),
                ("attend", self.attend, get_args(Attend)),
                ("record_form", self.record_form, get_args(Form)),
                ("reasoning", self.reasoning, get_args(Reasoning)),
                ("on_error", self.on_error, get_args(OnError)),
                ("labels", self.labels, (None, *get_args(Labels))),
                ("label_tokens", self.label_tokens, get_args(LabelTokens)),
                ("mask_unit", self.mask_unit, get_args(MaskUnit)),
            )
            if value not in choices
        ]
        if self.max_length < 2:
            wrong.append(f"max_length is {self.max_length}, expected 2 or more tokens")
        if self.mask_share is not None and not 0 < self.mask_share < 1:
            wrong.append(f"mask_share is {self.mask_share:g}, expected a number between 0 and 1")
        masks = (self.mask_share, self.mask_unit, self.mask_seed)
        if self.task != MASKED_LM and masks != (None, "token", 0):
            given = "mask_share, mask_unit and mask_seed"
            wrong.append(f"{given} are for {MASKED_LM}, leave them out for {self.task}")
        wrong += self._wrong_pairs()
        if self.record_form not in ("auto", "text", *TASKS[self.task].forms):
            wrong.append(f"record_form is {self.record_form!r}, but {self.task} reads texts")
        if TASKS[self.task].per_token and self.pair_column is not None:
            wrong.append(f"pair_column is for labels of texts, leave it out for {self.task}")
        if self.labels is not None and self.record_form != "ids":
            wrong.append("labels is for records of ids, leave it out for texts")
        if self.labels == "next" and self.packing == "concat":
            wrong.append("labels of the next id end a row, which packing concat would go on with")
        shared = self.packing == "concat" or self.record_form == "ids"
        if self.attend == "document" and not (TASKS[self.task].causal and shared):
            wrong.append(
                "attend is 'document', which is for packing 'concat' and for records of ids of "
                "causal-lm: elsewhere documents do not share a row"
            )
        if not _is_object(self.chat_template_kwargs):
            wrong.append(
                f"chat_template_kwargs is {self.chat_template_kwargs!r}, expected JSON {{}}"
            )
        names = self.label_names
        if names is not None and (not names or len(set(names)) < len(names)):
            wrong.append(f"label_names is {names}, expected different names, at least one")
        if "," in (self.label_column or "") and TASKS[self.task].answers != "labels":
            wrong.append(
                f"label_column is {self.label_column!r}; several columns are for tasks with "
                "several labels a text"
            )
        if names is None and TASKS[self.task].answers == "labels":
            wrong.append(f"label_names is None, and {self.task} needs the classes")
        columns = self.columns
        if len(set(columns)) < len(columns) or not all(columns):
            shown = ", ".join(map(repr, columns))
            wrong.append(f"the columns are {shown}, expected different names")
        if wrong:
            raise UsageError(f"{'; '.join(wrong)}. Correct these options.")

    def _wrong_pairs(self) -> list[str]:
        """What is wrong with the options of sources and targets."""
        if not TASKS[self.task].source:
            languages = (self.source_lang, self.target_lang)
            if (self.max_source_length, *languages, self.decoder_start) != (None,) * 4:
                names = "max_source_length, source_lang, target_lang and decoder_start"
                return [f"{names} are for {SEQ2SEQ_LM}, leave them out for {self.task}"]
            return []
        wrong = []
        if self.source_column == self.target_column:
            wrong.append(f"source_column and target_column are both {self.source_column!r}")
        if self.packing not in ("none", "whole"):
            wrong.append(f"packing is {self.packing!r}; {self.task} has a row for each record")
        if (self.max_source_length or 0) < 1:
            wrong.append(f"max_source_length is {self.max_source_length}, expected 1 or more")
        return wrong

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the encoder uses; a table is read only in these."""
        if TASKS[self.task].source:
            named = (self.source_column, self.target_column)
            # `translation.en` may be the field `en` of the column `translation`.
            both = ((name, name.partition(".")[0]) for name in named)
            return tuple(dict.fromkeys(sum(both, ())))
        if TASKS[self.task].words:
            defaults = TASKS[self.task].label_columns
            chosen = defaults if self.label_column == DEFAULT_LABEL_COLUMN else (self.label_column,)
            return tuple(name for name in (self.words_column, *chosen) if name is not None)
        if not TASKS[self.task].over_ids:
            wanted = (self.text_column, self.pair_column, *self.label_columns)
            return tuple(name for name in wanted if name is not None)
        if not TASKS[self.task].forms:
            return (self.text_column,)
        forms = {
            "text": (self.text_column,),
            "messages": (self.messages_column, self.tools_column),
            "prompt": (self.prompt_column, self.completion_column),
        }
        if self.record_form == "ids":
            return ID_COLUMNS
        return forms.get(self.record_form) or sum(forms.values(), ())

    @property
    def label_by_default(self) -> bool:
        """Whether no column of labels was named: the task's own, which may be missing."""
        return self.label_column == DEFAULT_LABEL_COLUMN

    @property
    def label_by_class(self) -> bool:
        """Whether a column for each class was named."""
        return "," in (self.label_column or "")

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Columns that may hold the labels of a row."""
        if self.label_column is None:
            return ()
        if self.label_by_default:
            named = {self.text_column, self.pair_column}
            return tuple(name for name in TASKS[self.task].label_columns if name not in named)
        return tuple(name.strip() for name in self.label_column.split(","))

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values, for an identity: fields of later versions only where they count."""
        return {k: v for k, v in asdict(self).items() if k not in _LATER or v != _LATER[k]}


def _is_object(text: str) -> bool:
    """Whether a text is a JSON object, or empty."""
    try:
        return isinstance(json.loads(text or "{}"), dict)
    except ValueError:
        return False
