"""Options of how records become rows: the group that the commands share.

Options of the rows of a sequence-to-sequence model: the group that the commands share.

Options of the rows of a masked language model: the group that `build`, `plan` and `evaluate`
share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.commands.groups import RecordOptions
from kdcache.errors import UsageError
from kdcache.options import option
from kdcache.tasks import TASKS, Attend, Labels, LabelTokens, MaskUnit, Packing, Reasoning

if TYPE_CHECKING:
    from kdcache.rows import RowSpec

DEFAULT_LENGTH = 1024  # tokens of a row


@dataclass(frozen=True, kw_only=True)
class RowOptions(RecordOptions):
    """How the records of a corpus become rows of tokens with hard labels."""

    heading = "Corpus"

    label_column: str = option(
        "label",
        help="column of the class, the classes or the score; with commas between, one column for "
        "each of several classes. `none` reads no hard labels, even where the column exists. By "
        "default for several classes labels too, for scores score; for words tags, "
        "ner_tags or labels, a list.",
        metavar="NAME",
    )
    label_tokens: LabelTokens = option(
        "first",
        help="which tokens of a word have its tag, and a soft target: the `first`, or `all`.",
    )
    messages_column: str = option(
        "messages",
        help="column of chat messages; where a file has it, its chats become the rows.",
        metavar="NAME",
    )
    tools_column: str = option(
        "tools",
        help="column of the tools that a chat may call, as JSON schemas (optional).",
        metavar="NAME",
    )
    chat_template: str | None = option(
        None,
        help="file with the chat template to use instead of the tokenizer's, and to keep with it.",
        metavar="FILE",
    )
    chat_template_kwargs: str | None = option(
        None,
        help='more variables of the chat template, such as `{"enable_thinking": false}`.',
        metavar="JSON",
    )
    learn: tuple[str, ...] = option(
        ("assistant",),
        help="roles of a chat whose messages have labels, such as `assistant,tool`.",
        comma=True,
        metavar="ROLE",
    )
    reasoning: Reasoning = option(
        "learn",
        help="what an assistant thinks before it speaks (`<think>` to `</think>`): `learn` it, or "
        "only `read` it, without labels.",
    )
    prompt_column: str = option(
        "prompt", help="column of the prompt, used with `completion_column`.", metavar="NAME"
    )
    completion_column: str = option("completion", help="column of the completion.", metavar="NAME")
    max_length: int | None = option(
        None,
        help="tokens of the longest row, at most what the model reads. Default: 1024, or what the "
        "model reads if that is less.",
        metavar="TOKENS",
        at_least=2,
    )
    packing: Packing | None = option(
        None,
        help="`concat` joins documents into full rows, `none` makes one row of each and cuts it "
        "at the longest, `split` continues in further rows, `whole` refuses what does not fit one. "
        "Default: `concat` for language models, `whole` for records of ids.",
    )
    attend: Attend = option(
        "row",
        help="what a token of a row of `concat` attends to: all before it in its `row`, or its own "
        "`document` alone, for teacher and student alike.",
    )
    labels: Labels | None = option(
        None,
        help="records of ids: what the columns labels and loss_mask stand beside: the `token` that "
        "they are about (transformers), or the one before it, whose `next` it is (Megatron); "
        "`none` reads neither. Needed where a file has one.",
    )
    tokenizer: str | None = option(
        None,
        help="records of ids: the tokenizer that made them, which must be the teacher's.",
        metavar="DIR_OR_HUB_ID",
    )

    def ids_problems(self) -> list[str]:
        """What is wrong with the options for records of ids."""
        if self.record_form != "ids":
            given = {"--labels": self.labels, "--tokenizer": self.tokenizer}
            return [
                f"{flag} is for records of ids. Add --record-form ids, or leave it out."
                for flag, value in given.items()
                if value is not None
            ]
        problems = []
        if self.tokenizer is None:
            problems.append(
                "--tokenizer is missing: ids mean nothing without the tokenizer that made them. "
                "Name it, to be compared with the teacher's."
            )
        if self.labels == "next" and self.packing == "concat":
            problems.append(
                "--labels next belongs to rows that end in a label of their own, which --packing "
                "concat would join. Use whole, none or split."
            )
        return problems

    def check_tokenizer(self, teacher: Any) -> None:
        """Refuse ids of another tokenizer than the teacher's.

        Raises:
            UsageError: the named one cannot be loaded, or differs.
        """
        from kdcache.rows.ids import check_tokenizer

        if self.record_form == "ids":
            check_tokenizer(self.tokenizer or "", teacher)

    def set_chat_template(self, tokenizer: Any) -> None:
        """Give a tokenizer the chat template of a file, if one is named.

        Raises:
            UsageError: The file cannot be read.
        """
        if self.chat_template is None:
            return
        try:
            tokenizer.chat_template = Path(self.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--chat-template {self.chat_template}: {error}.") from None

    def row_length(
        self, reach: Iterable[tuple[str, int | None]], default: int = DEFAULT_LENGTH
    ) -> int:
        """Tokens of the longest row.

        Args:
            reach: each model, and the most tokens that it reads; None for no bound.
            default: where the option is not given, and no model reads less.

        Raises:
            UsageError: a model reads less than the option says.
        """
        return longest("--max-length", self.max_length, reach, default)

    def row_spec(
        self, task: str, label_names: tuple[str, ...] | None, *, max_length: int
    ) -> RowSpec:
        """What decides the rows.

        Args:
            task: the task: what the teacher predicts.
            label_names: classes of a classifier.
            max_length: tokens of the longest row, see `row_length`.
        """
        from kdcache.rows import RowSpec

        kind = TASKS[task]
        default = "whole" if self.record_form == "ids" else kind.packing
        return RowSpec(
            task=task,  # type: ignore[arg-type]  # RowSpec checks it
            text_column=self.text_column,
            pair_column=self.pair_column,
            label_column=self.label_column,
            label_names=label_names if kind.named else None,
            max_length=max_length,
            packing=self.packing or default,  # type: ignore[arg-type]
            attend=self.attend,
            messages_column=self.messages_column,
            tools_column=self.tools_column,
            chat_template_kwargs=self.chat_template_kwargs or "",
            learn=self.learn,
            reasoning=self.reasoning,
            prompt_column=self.prompt_column,
            completion_column=self.completion_column,
            record_form=self.record_form,
            on_error=self.on_error,
            labels=self.labels,
            words_column=self.words_column,
            label_tokens=self.label_tokens,
        )


def longest(
    flag: str, asked: int | None, reach: Iterable[tuple[str, int | None]], default: int
) -> int:
    """Tokens of the longest row, or source, that every model reads.

    Args:
        flag: the option that says so, for messages.
        asked: what it says; None if it is not given.
        reach: each model, and the most tokens that it reads; None for no bound.
        default: where the option is not given, and no model reads less.

    Raises:
        UsageError: a model reads less than the option says.
    """
    bounds = [(tokens, name) for name, tokens in reach if tokens]
    least, name = min(bounds, default=(default, ""))
    if asked is None:
        return min(default, least)
    if bounds and asked > least:
        raise UsageError(
            f"{flag} is {asked:,}, but {name} reads at most {least:,} tokens. Use {flag} {least}, "
            "or less."
        )
    return asked


_SOURCE_LENGTH = 1024  # tokens


@dataclass(frozen=True, kw_only=True)
class PairRowOptions(RowOptions):
    """How records become rows, and where the source and the target of one are."""

    heading = "Corpus"

    source_column: str = option(
        "source",
        help="seq2seq: column of the text that the encoder reads; `translation.en` is the field "
        "`en` of the column `translation`.",
        metavar="NAME",
    )
    target_column: str = option(
        "target", help="seq2seq: column of the text that the decoder writes.", metavar="NAME"
    )
    max_source_length: int | None = option(
        None,
        help="seq2seq: tokens of the longest source; `max_length` is of the target. Default: 1024, "
        "or what the model reads if that is less.",
        metavar="TOKENS",
        at_least=1,
    )
    source_lang: str | None = option(
        None,
        help="seq2seq: language of the sources, for tokenizers that mark it, such as `en_XX`.",
        metavar="CODE",
    )
    target_lang: str | None = option(
        None, help="seq2seq: language of the targets, likewise.", metavar="CODE"
    )

    def row_spec(
        self, task: str, label_names: tuple[str, ...] | None, *, max_length: int
    ) -> RowSpec:
        """See `RowOptions.row_spec`."""
        return replace(
            super().row_spec(task, label_names, max_length=max_length),
            source_column=self.source_column,
            target_column=self.target_column,
            source_lang=self.source_lang,
            target_lang=self.target_lang,
        )

    def source_length(self, reach: Sequence[tuple[str, int | None]]) -> int:
        """Tokens of the longest source.

        Args:
            reach: each model, and the most tokens that its encoder reads; None for no bound.

        Raises:
            UsageError: a model reads less than the option says.
        """
        return longest("--max-source-length", self.max_source_length, reach, _SOURCE_LENGTH)

    def of_pairs(self, spec: RowSpec, models: Sequence[Any], role: str) -> RowSpec:
        """A spec with what rows of a source and a target have besides; others as they are.

        Args:
            spec: of the rows.
            models: `TeacherFiles`; the rows have the start of the first one's decoder.
            role: of these, for messages.
        """
        if not TASKS[spec.task].source:
            return spec
        length = self.source_length([(f"{role} {m.name}", m.source_reach) for m in models])
        return replace(
            spec,
            max_source_length=length,
            decoder_start=models[0].decoder_start,
        )


@dataclass(frozen=True, kw_only=True)
class MaskedRowOptions(PairRowOptions):
    """How records become rows, and which tokens of a masked language model's are masked."""

    heading = "Corpus"

    mask_share: float | None = option(
        None,
        help="masked LM: share of the tokens of a row that it has to guess. Default: 0.15.",
        metavar="SHARE",
        above=0,
        below=1,
    )
    mask_unit: MaskUnit = option(
        "token", help="masked LM: choose each `token` by itself, or all those of a `word`."
    )
    mask_seed: int = option(
        0, help="masked LM: seed of the choice, which is by span, row and place."
    )

    def row_spec(
        self, task: str, label_names: tuple[str, ...] | None, *, max_length: int
    ) -> RowSpec:
        """See `RowOptions.row_spec`."""
        spec = super().row_spec(task, label_names, max_length=max_length)
        share = spec.mask_share if self.mask_share is None else self.mask_share
        return replace(spec, mask_share=share, mask_unit=self.mask_unit, mask_seed=self.mask_seed)
