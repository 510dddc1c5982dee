"""Options of how records become rows, which the commands share, and the `RowSpec` of them.

What decides rows is in `kdcache.row_groups`, with help, bounds and defaults.

A corpus that `generate` wrote is read as what it is (`as_written`): records of ids, labels at the
tokens that they are about, the corpus's own tokenizer, and its length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kdcache.commands.groups import RecordOptions
from kdcache.domains import Named
from kdcache.errors import CorruptCacheError, UsageError
from kdcache.options import option
from kdcache.row_groups import (
    ChatGroup,
    IdGroup,
    LabelGroup,
    LengthGroup,
    MaskGroup,
    PairGroup,
    SourceGroup,
    WordGroup,
)
from kdcache.tasks import TASKS

if TYPE_CHECKING:
    from kdcache.cache.generated import GeneratedCorpus
    from kdcache.rows import RowSpec

DEFAULT_LENGTH = 1024  # tokens of a row


@dataclass(frozen=True, kw_only=True)
class ChatOptions(ChatGroup):
    """Chats, and prompts with their completions."""

    heading = ChatGroup.heading

    chat: tuple[str, ...] = option(
        (),
        help="`template=FILE` to use instead of the tokenizer's, and to keep with it; more "
        'variables of a template, such as `template-kwargs={"enable_thinking": false}`; roles '
        "whose messages have labels, such as `learn=assistant,tool`; `reasoning=read` for thoughts "
        "(`<think>` to `</think>`) that are read and have no labels.",
        keys=True,
        metavar="KEY=VALUE",
    )
    chat_template: str | None = option(None, instead=("chat", "template"))


@dataclass(frozen=True, kw_only=True)
class IdOptions(IdGroup):
    """Rows that several documents share, and records of ids."""

    heading = IdGroup.heading

    tokenizer: str | None = option(
        None,
        help="records of ids: the tokenizer that made them, which must be the teacher's.",
        metavar="DIR_OR_HUB_ID",
    )


@dataclass(frozen=True, kw_only=True)
class SourceOptions(SourceGroup):
    """Sources that an encoder reads."""

    heading = SourceGroup.heading

    seq2seq: tuple[str, ...] = option(
        (),
        help="tokens of the longest source, such as `max-source-length=512` (`max_length` is of "
        "the target; default: 1024, or what the model reads if that is less), and for tokenizers "
        "that mark languages `source-lang=en_XX` and `target-lang`.",
        comma=True,
        keys=True,
        metavar="KEY=VALUE",
    )


@dataclass(frozen=True, kw_only=True)
class MaskOptions(MaskGroup):
    """Which tokens of a masked language model's rows are masked."""

    heading = MaskGroup.heading

    mask: tuple[str, ...] = option(
        (),
        help="`share=0.15` of the tokens of a row that the model has to guess, each `unit=token` "
        "by itself or all those of a `unit=word`, and the `seed=0` of their choice.",
        comma=True,
        keys=True,
        metavar="KEY=VALUE",
    )


@dataclass(frozen=True, kw_only=True)
class RowOptions(RecordOptions, LabelGroup, LengthGroup, WordGroup, ChatOptions, IdOptions):
    """How the records of a corpus become rows of tokens with hard labels."""

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
        if self.record_form == "ids":
            from kdcache.rows.ids import check_tokenizer

            check_tokenizer(self.tokenizer or "", teacher)

    def row_length(
        self, reach: Iterable[tuple[str, int | None]], default: int = DEFAULT_LENGTH
    ) -> int:
        """Tokens of the longest row.

        Args:
            default: where the option is not given, and no model reads less.

        Raises:
            UsageError: a model reads less than the option states.
        """
        return longest("--max-length", self.max_length, reach, default)

    def row_spec(
        self, task: str, label_names: tuple[str, ...] | None, *, max_length: int
    ) -> RowSpec:
        """What decides the rows.

        Args:
            label_names: classes of a classifier.
            max_length: tokens of the longest row, see `row_length`.
        """
        from kdcache.rows import RowSpec

        kind, known = TASKS[task], {field.name for field in fields(self)}
        given = {f.name: getattr(self, f.name) for f in fields(RowSpec) if f.name in known}
        given |= {
            "task": task,
            "label_column": self.label_column or "none",
            "label_names": label_names if kind.named else None,
            "max_length": max_length,
            "max_source_length": None,  # see `of_pairs`
            "packing": self.packing or ("whole" if self.record_form == "ids" else kind.packing),
        }
        given = {name: value for name, value in given.items() if value is not None}
        return RowSpec(**given)


def set_chat_template(name: str | None, tokenizer: Any) -> None:
    """Give a tokenizer the chat template of a file, if one is named.

    Raises:
        UsageError: The file cannot be read.
    """
    if name is None:
        return
    try:
        tokenizer.chat_template = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--chat template={name}: {error}.") from None


def longest(
    flag: str, asked: int | None, reach: Iterable[tuple[str, int | None]], default: int
) -> int:
    """Tokens of the longest row, or source, that every model reads.

    Args:
        reach: each model, and the most tokens that it reads; None for no bound.

    Raises:
        UsageError: a model reads less than the option states.
    """
    bounds = [(tokens, name) for name, tokens in reach if tokens]
    least, name = min(bounds, default=(default, ""))
    if asked is None:
        return min(default, least)
    if bounds and asked > least:
        raise UsageError(
            f"{flag} is {asked:,}, but {name} reads at most {least:,} tokens. Set it to {least}, "
            "or less."
        )
    return asked


SOURCE_LENGTH = 1024  # tokens


@dataclass(frozen=True, kw_only=True)
class PairRowOptions(RowOptions, PairGroup, SourceOptions):
    """How records become rows, sources and targets among them."""

    def of_pairs(
        self, spec: RowSpec, models: Sequence[Any], role: str, default: int = SOURCE_LENGTH
    ) -> RowSpec:
        """A spec with what rows of a source and a target have besides; others as they are.

        Args:
            models: `TeacherFiles`; the rows have the start of the first one's decoder.

        Raises:
            UsageError: a model reads less than the option states.
        """
        if not TASKS[spec.task].source:
            return spec
        reach = [(f"{role} {m.name}", m.source_reach) for m in models]
        length = longest("--seq2seq max-source-length", self.max_source_length, reach, default)
        return replace(
            spec,
            max_source_length=length,
            decoder_start=models[0].decoder_start,
        )


@dataclass(frozen=True, kw_only=True)
class MaskedRowOptions(PairRowOptions, MaskOptions):
    """How records become rows of any kind."""


OptionsT = TypeVar("OptionsT", bound=Any)
_AS_IT_IS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}


def drawn_as_is(options: Any, packing: str) -> bool:
    """Whether all is text that models drew from their own distributions, each a row by itself.

    Then the log-probabilities that `generate` keeps are of what drew it.
    """
    if options.record_form != "auto" or packing != "whole":
        return False
    corpora = [open_generated(one) for one in _paths(options.corpus)]
    return bool(corpora) and all(
        one is not None and _AS_IT_IS.items() <= dict(one.spec.sampling).items() for one in corpora
    )


def as_written(options: OptionsT) -> OptionsT:
    """The options with which a corpus is read; others than generated corpora as they are.

    Raises:
        UsageError: generated corpora next to others.
        IncompleteError: a generation is not finished.
    """
    if options.record_form != "auto":
        return options
    corpora = [found for one in _paths(options.corpus) if (found := open_generated(one))]
    if not corpora:
        return options
    if len(corpora) < len(options.corpus):
        raise UsageError(
            f"{corpora[0].url} is a corpus that generate wrote, and the others are not. Build a "
            "cache of each: training takes several with --cache."
        )
    for corpus in corpora:
        extra = set(corpus.storage.names("shards")) - {s.name for s in corpus.manifest.shards}
        if extra:
            raise UsageError(
                f"{corpus.url} has {len(extra)} files that are not in its manifest. Remove what "
                f"crashed runs left with kdcache gc {corpus.url}."
            )
    (length, url) = max((c.spec.max_length, c.storage.url) for c in corpora)
    return replace(
        options,
        record_form="ids",
        labels="token",
        tokenizer=options.tokenizer or f"{url}/tokenizer",
        max_length=options.max_length or length,
    )


def _paths(corpora: Sequence[Any]) -> list[str]:
    values = (one.value if isinstance(one, Named) else one for one in corpora)
    return [value for value in values if isinstance(value, str)]


def open_generated(url: str) -> GeneratedCorpus | None:
    """The generated corpus in a folder; None where there is none.

    Raises:
        IncompleteError: it is not finished.
    """
    from kdcache.cache.spec import from_text, is_generated
    from kdcache.storage import open_storage, redact

    if any(mark in url for mark in "*?[") or url.endswith((".jsonl", ".parquet", ".txt", ".gz")):
        return None
    try:
        storage = open_storage(url)
        if not storage.exists("spec.json"):
            return None
        spec = from_text(storage.read("spec.json"), f"{redact(url)}/spec.json").get("spec")
    except (OSError, CorruptCacheError, UsageError):
        return None  # no folder; what is there is read as any other
    if not is_generated(spec):
        return None
    from kdcache.cache.generated import GeneratedCorpus

    return GeneratedCorpus.open(url)
