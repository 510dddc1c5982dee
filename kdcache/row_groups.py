"""What decides how records become rows: groups of options, one for each kind of rows.

Commands take the groups that their tasks need, and `kdcache.rows.RowSpec` has all of them: a new
option of rows is a field here. One that came after the first version states `later=True`, so that
what was built without it keeps its identity. Imports nothing heavy: a help shows them.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.options import Options, option
from kdcache.tasks import Attend, Form, Labels, LabelTokens, MaskUnit, OnError, Packing, Reasoning


@dataclass(frozen=True, kw_only=True)
class TextGroup(Options):
    """Records of texts, pairs of texts or words."""

    heading = "Corpus"

    text_column: str = option("text", instead=("columns", "text"))
    pair_column: str | None = option(None, instead=("columns", "pair"))
    words_column: str = option("tokens", instead=("columns", "tokens"), later=True)
    record_form: Form = option(
        "auto",
        help="which columns make a record: the text, the messages of a chat, a prompt with its "
        "completion, or ids (`input_ids`); `auto` decides among the first three by the columns "
        "that are not empty. Classifiers read texts.",
    )
    on_error: OnError = option("fail", help="what to do with records that cannot be read.")


@dataclass(frozen=True, kw_only=True)
class LabelGroup(Options):
    """Hard labels."""

    heading = "Rows"

    label_column: str | None = option(
        "label",
        help="column of the class, as a number or a name; of several classes a text (a list of "
        "names, or one column for each class, with commas between); of the score. `none` reads no "
        "hard labels, even where the column exists. By default for several classes labels too, "
        "for scores score; for words tags, ner_tags or labels, a list.",
        metavar="NAME",
    )


@dataclass(frozen=True, kw_only=True)
class LengthGroup(Options):
    """The length of rows."""

    heading = "Rows"

    max_length: int | None = option(
        None,
        help="tokens of the longest row, at most what the model reads. Default: 1024, or what the "
        "model reads if that is less; of a teacher of `finetune` the length it was tuned at.",
        metavar="TOKENS",
        at_least=2,
    )
    packing: Packing | None = option(
        None,
        help="`concat` joins documents into full rows, `none` makes one row of each and cuts it "
        "at the longest, `split` continues in further rows, `whole` refuses what does not fit one. "
        "Default: `concat` for language models, `whole` for records of ids.",
    )


@dataclass(frozen=True, kw_only=True)
class WordGroup(Options):
    """Words that each have a tag."""

    heading = "Rows of taggers (token-classification)"

    label_tokens: LabelTokens = option(
        "first",
        help="which tokens of a word have its tag, and a soft target: the `first`, or `all`.",
        later=True,
    )


@dataclass(frozen=True, kw_only=True)
class PromptGroup(Options):
    """Columns of chats, and of prompts with their completions."""

    heading = "Rows of chats (causal-lm)"

    messages_column: str = option("messages", instead=("columns", "messages"))
    tools_column: str = option("tools", instead=("columns", "tools"), later=True)
    prompt_column: str = option("prompt", instead=("columns", "prompt"))
    completion_column: str = option("completion", instead=("columns", "completion"))
    chat_template_kwargs: str | None = option(None, instead=("chat", "template-kwargs"), later=True)


@dataclass(frozen=True, kw_only=True)
class ChatGroup(PromptGroup):
    """Chats, and prompts with their completions."""

    heading = PromptGroup.heading

    learn: tuple[str, ...] = option(
        ("assistant",), instead=("chat", "learn"), comma=True, later=True
    )
    reasoning: Reasoning = option("learn", instead=("chat", "reasoning"), later=True)


@dataclass(frozen=True, kw_only=True)
class IdGroup(Options):
    """Rows that several documents share, and records of ids."""

    heading = "Rows of documents packed together, or of ids (causal-lm)"

    attend: Attend = option(
        "row",
        help="what a token of a row of `concat` attends to: all before it in its `row`, or its own "
        "`document` alone, for teacher and student alike.",
        later=True,
    )
    labels: Labels | None = option(
        None,
        help="records of ids: what the columns labels and loss_mask stand beside: the `token` that "
        "they are about (transformers), or the one before it, whose `next` it is (Megatron); "
        "`none` reads neither. Needed where a file has one.",
        later=True,
    )


@dataclass(frozen=True, kw_only=True)
class SourceGroup(Options):
    """Sources that an encoder reads."""

    heading = "Rows of sources and targets (seq2seq-lm)"

    source_column: str = option("source", instead=("columns", "source"), later=True)
    max_source_length: int | None = option(
        None, instead=("seq2seq", "max-source-length"), at_least=1, later=True
    )
    source_lang: str | None = option(None, instead=("seq2seq", "source-lang"), later=True)
    target_lang: str | None = option(None, instead=("seq2seq", "target-lang"), later=True)


@dataclass(frozen=True, kw_only=True)
class PairGroup(SourceGroup):
    """Sources and their targets."""

    heading = SourceGroup.heading

    target_column: str = option("target", instead=("columns", "target"), later=True)


@dataclass(frozen=True, kw_only=True)
class MaskGroup(Options):
    """Which tokens of a masked language model's rows are masked."""

    heading = "Rows of masked tokens (masked-lm)"

    mask_share: float | None = option(None, instead=("mask", "share"), above=0, below=1, later=True)
    mask_unit: MaskUnit = option("token", instead=("mask", "unit"), later=True)
    mask_seed: int = option(0, instead=("mask", "seed"), later=True)
