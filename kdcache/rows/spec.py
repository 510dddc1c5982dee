"""Row and RowSpec: one row, and the options that decide how rows are made.

Answer and Sampling: what a model wrote, and how it was asked to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kdcache.errors import UsageError
from kdcache.options import again, option, options_of
from kdcache.row_groups import (
    ChatGroup,
    IdGroup,
    LabelGroup,
    LengthGroup,
    MaskGroup,
    PairGroup,
    TextGroup,
    WordGroup,
)
from kdcache.tasks import IGNORE, MASKED_LM, SEQ2SEQ_LM, TASKS, Packing, Task, check_task, positions

DEFAULT_LABEL_COLUMN = "label"
MASK_SHARE = 0.15  # of BERT
SOURCE_LENGTH = 1024  # tokens
LAST_LABEL = -1  # the decoder reads the last label of a row first
ID_MASKS = ("loss_mask", "completion_mask", "assistant_masks")
ID_COLUMNS = (
    *("input_ids", "labels", *ID_MASKS),
    *("attention_mask", "position_ids", "segment_ids", "seq_lengths"),
)
LOGPROBS = "logprobs"
# The order of fields in a spec.json; others follow as they are declared.
_ORDER = (
    *("task", "text_column", "pair_column", "label_column", "label_names", "max_length", "packing"),
    *("attend", "messages_column", "tools_column", "chat_template_kwargs", "learn", "reasoning"),
    *("prompt_column", "completion_column", "record_form", "on_error", "labels", "words_column"),
    *("label_tokens", "mask_share", "mask_unit", "mask_seed", "source_column", "target_column"),
    *("max_source_length", "source_lang", "target_lang", "decoder_start"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One token sequence with its hard labels; the unit of shuffling.

    Attributes:
        input_ids: int32 `[L]`, no padding.
        labels: causal-lm int32 `[L]`, the id to predict after each token or `IGNORE`; masked-lm
            int32 `[L]`, the id that a masked position had or `IGNORE`; token classification int32
            `[L]`, the class of the token's word, `UNLABELLED` if that has none, or `IGNORE`; of
            tasks of whole texts see `kdcache.rows.labels`.
        type_ids: uint8 `[L]` if the tokenizer marks text and pair (BERT does), else None.
        text: Classification only: what was tokenised, so that a student may tokenise it again.
        text_pair: The pair's text, if there is one.
        words: Token classification only: what was tokenised, one for each first token.
        first: bool `[L]`, token classification only: which tokens are the first of their words.
        source: int32 `[S]`, of sequence-to-sequence models: what the encoder reads. `input_ids`
            is then what the decoder reads: its start, and all labels but the last.
        starts: bool `[L]`, where a document begins that attends to no other document (the
            first token always); None where all tokens of the row attend to those before them.
        writer_logprob: uint16 `[P]`, of each position of a generated text: the code
            (`kdcache.targets.label_logprob`) of its writer's log-probability of the label.
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
    writer_logprob: npt.NDArray[np.uint16] | None = None

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

    def positions(self, task: str) -> npt.NDArray[np.int64]:
        """Indices of the positions, rising: those with a label; the one of a class always."""
        return np.flatnonzero(positions(self.labels, task))


@dataclass(frozen=True)
class RowSpec(
    MaskGroup, PairGroup, WordGroup, IdGroup, ChatGroup, LengthGroup, LabelGroup, TextGroup
):
    """How records become rows: the options of `kdcache.row_groups`, for one task and model.

    `label_column` None reads no hard labels. The default stands for the `label_columns` of the
    task, which may be missing (a transfer set); another name must be there.

    Raises:
        UsageError: Options that can't be; all of them in one message.
    """

    task: Task = option(help="one of `kdcache.tasks.TASKS`.")
    _: KW_ONLY
    label_names: tuple[str, ...] | None = option(
        None, help="the teacher's class names in order; None takes any class number."
    )
    max_length: int = again(LengthGroup, "max_length", 1024)
    packing: Packing = again(LengthGroup, "packing", "concat")
    decoder_start: int | None = option(
        None,
        help="id that the decoder of a sequence-to-sequence model reads first, `LAST_LABEL` where "
        "it is the last label. See `kdcache.teacher.quirks`.",
        later=True,
    )
    writer_logprob: bool = option(
        False,
        help="whether records of ids have the log-probability of each learnt id (`logprobs`), by "
        "the model that drew it.",
        later=True,
    )

    def __post_init__(self) -> None:
        if self.label_column == "none":
            object.__setattr__(self, "label_column", None)
        check_task(self.task)
        if self.task == MASKED_LM and self.mask_share is None:
            object.__setattr__(self, "mask_share", MASK_SHARE)
        if TASKS[self.task].source and self.max_source_length is None:
            object.__setattr__(self, "max_source_length", SOURCE_LENGTH)
        if self.chat_template_kwargs == "":
            object.__setattr__(self, "chat_template_kwargs", None)
        wrong = []
        for one in options_of(type(self)):
            value = getattr(self, one.name)
            problem = one.unlike(value) or one.wrong(value)
            wrong += [problem.replace(one.spelled, one.name).rstrip(".")] if problem else []
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
            return (*ID_COLUMNS, LOGPROBS) if self.writer_logprob else ID_COLUMNS
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
        later = {one.name: one.default for one in options_of(type(self)) if one.later}
        values = asdict(self)
        names = sorted(values, key=lambda n: _ORDER.index(n) if n in _ORDER else len(_ORDER))
        return {n: values[n] for n in names if n not in later or values[n] != later[n]}


def _is_object(text: str | None) -> bool:
    """Whether a text is a JSON object, or empty."""
    try:
        return isinstance(json.loads(text or "{}"), dict)
    except ValueError:
        return False


def no_label(task: str, width: int | None = None) -> npt.NDArray[Any]:
    """The labels of a row that has none.

    Args:
        task: one with labels of rows.
        width: number of classes; of no effect but for `labels`.
    """
    answers = TASKS[task].answers
    if answers == "score":
        return np.array([np.nan], np.float32)
    return np.full((1, width or 1) if answers == "labels" else 1, IGNORE, np.int32)


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        samples: answers of each prompt.
        temperature: logits are divided by it; 0 takes the most probable token.
        top_p: share of the probability from which is drawn; 1 for all.
        top_k: number of tokens from which is drawn; 0 for all.
        min_p: least probability of a token, as a share of the largest.
        max_new_tokens: of an answer, at most.
        stop: texts that end an answer.
        seed: of the noise.
    """

    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        ids: int32 [n], the ids that it drew, the last one an end if it stopped by that.
        logprobs: float32 [n], of each of them, at temperature 1 over the whole vocabulary.
        reason: whether it ended by itself or had no room left.
    """

    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    reason: Literal["stop", "length"]


def text_of(tokenizer: Any, ids: npt.NDArray[np.int32], stop: Sequence[str]) -> str:
    """The text of an answer, up to the first text that ends it."""
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    ends = [at for one in stop if (at := text.find(one)) >= 0]
    return text[: min(ends)] if ends else text
