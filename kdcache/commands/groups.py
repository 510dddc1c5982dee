"""Groups of options that several commands share, and the objects they make."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kdcache.choices import (
    MAX_RECORD_BYTES,
    Attend,
    Attention,
    Device,
    Documents,
    Dtype,
    Engine,
    Ensemble,
    Form,
    Labels,
    LabelTokens,
    OnError,
    Packing,
    Precision,
    Reasoning,
    Scheduler,
)
from kdcache.domains import Named
from kdcache.errors import UsageError
from kdcache.extras import needs
from kdcache.options import Options, option
from kdcache.tasks import TASKS

if TYPE_CHECKING:
    from kdcache.corpus import Corpus
    from kdcache.rows import RowSpec

logger = logging.getLogger(__name__)

DEFAULT_LENGTH = 1024  # tokens of a row


@dataclass(frozen=True, kw_only=True)
class RecordOptions(Options):
    """How the records of a corpus are read."""

    heading = "Corpus"

    text_column: str = option("text", help="column of the text.", metavar="NAME")
    pair_column: str | None = option(
        None, help="column of a second text (optional).", metavar="NAME"
    )
    words_column: str = option(
        "tokens", help="column of the words that each have a tag, a list.", metavar="NAME"
    )
    columns: tuple[str, ...] | None = option(
        None,
        help="names of the columns of files without a header; or new names for columns of any "
        "file, such as `text=body`.",
        comma=True,
        metavar="NAME",
    )
    filter: tuple[str, ...] = option(
        (),
        help="keep only records whose column has this value; repeat it for other values of the "
        "column, or for other columns, which must hold too.",
        metavar="COLUMN=VALUE",
    )
    format: str = option(
        "auto", help="format of all files, such as `jsonl`; `auto` decides by their names."
    )
    documents: Documents = option(
        "file",
        help="what one document of a `.txt` file is: all of it, a paragraph (up to a blank line) "
        "or a line.",
    )
    delimiter: str = option(
        ",", help="what separates the fields of CSV files.", metavar="CHARACTER"
    )
    split: str | None = option(
        None,
        help='split to read of folders that hold several, such as train; or "all" for every file.',
        metavar="NAME",
    )
    max_record_bytes: int = option(
        MAX_RECORD_BYTES, help="longest record; a longer one cannot be read.", at_least=1
    )
    record_form: Form = option(
        "auto",
        help="which columns make a record: the text, the messages of a chat, a prompt with its "
        "completion, or ids (`input_ids`); `auto` decides among the first three by the columns "
        "that are not empty. Classifiers read texts.",
    )
    on_error: OnError = option("fail", help="what to do with records that cannot be read.")
    limit: int | None = option(
        None,
        help="use only the first records of the corpus, or of each named one, counted before "
        "`filter`.",
        metavar="RECORDS",
        at_least=1,
    )

    def open_corpus(
        self,
        patterns: Sequence[str | Named],
        *,
        span_bytes: int | Callable[[int], int],
        divide: bool = False,
    ) -> Corpus:
        """Find the files of `patterns` and plan their spans; see `Corpus.open`."""
        from kdcache.corpus import Corpus

        corpus = Corpus.open(
            patterns,
            span_bytes=span_bytes,
            limit=self.limit,
            format=self.format,
            columns=self.columns,
            documents=self.documents,
            delimiter=self.delimiter,
            max_record_bytes=self.max_record_bytes,
            split=self.split,
            filters=self.filter,
            divide=divide,
        )
        if corpus.documents is not None:
            logger.warning("text files: each %s is one document (--documents)", corpus.documents)
        return corpus


@dataclass(frozen=True, kw_only=True)
class RowOptions(RecordOptions):
    """How the records of a corpus become rows of tokens with hard labels."""

    heading = "Corpus"

    label_column: str = option(
        "label",
        help="column of the class, the classes or the score; with commas between, one column for "
        "each of several classes. `none` reads no hard labels, even where the column exists. By "
        "default for several classes `labels` too, for scores `score`; for words `tags`, "
        "`ner_tags` or `labels`, a list.",
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


_OURS = {  # arguments of an engine that kdcache decides, and the option for them, if there is one
    **dict.fromkeys(("model", "runner", "convert", "pooler_config", "enable_prefix_caching"), ""),
    **{
        "tensor_parallel_size": "--tensor-parallel",
        "pipeline_parallel_size": "--pipeline-parallel",
    },
    **{"quantization": "--quantization", "dtype": "--dtype", "max_model_len": "--max-length"},
    **{"trust_remote_code": "--trust-remote-code"},
}


@dataclass(frozen=True, kw_only=True)
class EngineRunOptions(Options):
    """What runs the teacher."""

    heading = "Engine"

    engine: Engine | None = option(
        None,
        help="what runs the teacher: `transformers`, or `vllm` for one causal LM of any size. "
        "Default: `transformers`; of `verify`, the one of the build.",
    )
    tensor_parallel: int = option(
        1, help="GPUs that share each layer (vLLM).", metavar="GPUS", at_least=1
    )
    pipeline_parallel: int = option(
        1, help="groups of GPUs that share the layers (vLLM).", metavar="GROUPS", at_least=1
    )
    quantization: str | None = option(
        None,
        help="of the weights, as vLLM names it, such as `fp8`. Default: the checkpoint's own.",
        metavar="NAME",
    )
    engine_arg: tuple[str, ...] = option(
        (),
        help="a further argument of the engine, such as `gpu_memory_utilization=0.7` (vLLM).",
        metavar="KEY=VALUE",
    )

    def engine_conflicts(self, default: Engine = "transformers") -> list[str]:
        """What is wrong with the engine's options, where `default` runs without `engine`."""
        given = [
            flag
            for flag, value in (
                ("--tensor-parallel", self.tensor_parallel > 1),
                ("--pipeline-parallel", self.pipeline_parallel > 1),
                ("--quantization", self.quantization is not None),
                ("--engine-arg", bool(self.engine_arg)),
            )
            if value
        ]
        problems = []
        if given and (self.engine or default) != "vllm":
            problems.append(
                f"--engine vllm alone takes {', '.join(given)}. Add it, or leave these."
            )
        for arg in self.engine_arg:
            name, equals, _ = arg.partition("=")
            if not (name and equals):
                problems.append(f"--engine-arg is {arg!r}, expected KEY=VALUE.")
            elif (ours := _OURS.get(name.replace("-", "_"))) is not None:
                instead = f" Use {ours}." if ours else ""
                problems.append(f"--engine-arg {name} is what kdcache decides.{instead}")
        return problems

    @property
    def engine_args(self) -> dict[str, Any]:
        """The further arguments: numbers, true, false, null and JSON as such, others as text."""
        found: dict[str, Any] = {}
        for arg in self.engine_arg:
            name, _, value = arg.partition("=")
            try:
                found[name.replace("-", "_")] = json.loads(value)
            except ValueError:
                found[name.replace("-", "_")] = value
        return found


@dataclass(frozen=True, kw_only=True)
class TeacherRunOptions(EngineRunOptions):
    """How the teacher runs."""

    heading = "Teacher"

    dtype: Dtype = option("auto", help="compute type; `auto` is bfloat16 on a GPU, else float32.")
    batch_tokens: int | None = option(
        None,
        help="padded tokens of a teacher batch. Default: 4096 on a CPU; on a GPU the largest of "
        "65536 and its halves that fits.",
        metavar="TOKENS",
        at_least=1,
    )
    attention: Attention = option(
        "auto",
        help="`auto` is FlashAttention 2 where it is installed and works, else the choice of "
        "transformers.",
    )
    compile: bool = option(
        False, help="run the teacher through torch.compile; pays on long builds."
    )
    ensemble: Ensemble = option("mean-probs", help="how several teachers become one.")
    teacher_weight: tuple[float, ...] | None = option(
        None, help="weight of each teacher. Default: equal.", metavar="WEIGHT", above=0
    )
    trust_remote_code: bool = option(False, help="let code that ships with a teacher run.")


@dataclass(frozen=True, kw_only=True)
class InferenceOptions(Options):
    """How finished models run."""

    heading = "Models"

    batch_tokens: int | None = option(
        None,
        help="padded tokens of a batch. Default: by device.",
        metavar="TOKENS",
        at_least=1,
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", help="compute type of all models."
    )
    device: Device = option("auto", help="where they run.")
    trust_remote_code: bool = option(False, help="let code that ships with a model run.")


@dataclass(frozen=True, kw_only=True)
class LearningOptions(Options):
    """How a model is trained."""

    heading = "Learning"

    epochs: float = option(1.0, help="passes over the rows.", above=0, decides="nothing")
    batch_size: int = option(
        32, help="rows of one step, over all workers and accumulated slices.", at_least=1
    )
    learning_rate: float | None = option(None, help="peak.", above=0)
    weight_decay: float = option(0.0, help="of AdamW.", at_least=0)
    warmup: float = option(
        0.0,
        help="warm-up steps of the learning rate; below 1 a share of the run.",
        at_least=0,
    )
    lr_scheduler: Scheduler = option("linear", help="shape of the learning rate.")
    precision: Precision = option(
        "auto",
        help="of the computation; weights stay float32. `auto` is `bf16` on a GPU that has it, "
        "otherwise `float32`; `fp16` scales the loss.",
    )
    seed: int = option(0, help="seed of the order, of random weights and of dropout.", at_least=0)
    logging_steps: int = option(
        10, help="steps between reports of progress.", at_least=1, decides="nothing"
    )
    trust_remote_code: bool = option(
        False, help="let code that ships with the model run.", decides="student"
    )


@dataclass(frozen=True, kw_only=True)
class PlotOptions(Options):
    """A picture of the outcome."""

    plot: str | None = option(
        None,
        help="PNG file for a plot of the figures (optional; extra `plot`).",
        metavar="FILE.png",
        decides="nothing",
    )

    def plot_problems(self) -> list[str]:
        """What is wrong with the file."""
        folder = Path(self.plot).parent if self.plot else Path()
        return [] if folder.is_dir() else [f"--plot: there is no folder {folder}."]

    def check_plot(self) -> None:
        """Refuse a plot that cannot be drawn, before the work that it is to show.

        Raises:
            UsageError: matplotlib is not installed.
        """
        if self.plot is not None:
            with needs("plot", "--plot"):
                importlib.import_module("matplotlib")


def form_problems(record_form: Form, task: str | None) -> list[str]:
    """What is wrong with a form of records for a task."""
    kind = TASKS.get(task or "")
    if kind is not None and record_form not in ("auto", "text", *kind.forms):
        return [
            f"--record-form is '{record_form}': a {kind.noun} reads texts. Name their column with "
            "--text-column."
        ]
    return []
