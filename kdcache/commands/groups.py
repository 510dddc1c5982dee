"""Groups of options that several commands share, and the objects they make."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kdcache.domains import Named
from kdcache.errors import UsageError
from kdcache.files import file_problems, try_output
from kdcache.lora import Lora
from kdcache.options import Options, key_values, option
from kdcache.row_groups import TextGroup
from kdcache.tasks import (
    MAX_RECORD_BYTES,
    TASKS,
    Attention,
    Device,
    Documents,
    Dtype,
    Engine,
    Ensemble,
    Form,
    Precision,
    Scheduler,
)

if TYPE_CHECKING:
    from kdcache.corpus import Corpus

logger = logging.getLogger(__name__)


def worker_range(flag: str, value: int | str, least: int = 1) -> tuple[int, int]:
    """The smallest and the largest number of workers of `N` or `MIN:MAX`.

    Raises:
        UsageError: it is neither.
    """
    first, colon, last = str(value).partition(":")
    if first.isdecimal() and (last.isdecimal() or not colon):
        low, high = int(first), int(last or first)
        if least <= low <= high:
            return low, high
    raise UsageError(
        f"{flag} is {value}, expected a number of at least {least}, or two as min:max."
    )


@dataclass(frozen=True, kw_only=True)
class RecordOptions(TextGroup):
    """How the records of a corpus are read."""

    heading = "Corpus"

    columns: tuple[str, ...] | None = option(
        None,
        help="names for columns that have others in the files, such as `text=review,label=stars`: "
        "text, pair, label, tokens (words), messages, tools, prompt, completion, source, target, "
        "input_ids. `source=translation.en` is the field `en` of a column. A `pair` is read where "
        "it is named. Or all names of files without a header: `text,label`.",
        comma=True,
        metavar="NAME[=THEIRS]",
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
    read: tuple[str, ...] = option(
        (),
        help="how files are read: `documents=line` or `paragraph` (up to a blank line) if a `.txt` "
        "file is not one document; what separates the fields of CSV, such as `delimiter=;` or "
        "`delimiter=tab` (quotes enclose fields of CSV and have no meaning in TSV, unless "
        "`format` is csv); `max-record-bytes` of the longest record that can be read (64 MiB).",
        comma=True,
        keys=True,
        metavar="KEY=VALUE",
    )
    documents: Documents = option("file", instead=("read", "documents"))
    delimiter: str = option(",", instead=("read", "delimiter"))
    split: str | None = option(
        None,
        help='split to read of folders that hold several, such as train; or "all" for every file.',
        metavar="NAME",
    )
    max_record_bytes: int = option(
        MAX_RECORD_BYTES, instead=("read", "max-record-bytes"), at_least=1
    )
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
            delimiter="\t" if self.delimiter == "tab" else self.delimiter,
            max_record_bytes=self.max_record_bytes,
            split=self.split,
            filters=self.filter,
            divide=divide,
        )
        if corpus.documents is not None:
            logger.warning(
                "text files: each %s is one document (--read documents)", corpus.documents
            )
        return corpus


# Arguments of an engine that kdcache decides, and the option for them, if there is one.
_OURS = {
    **dict.fromkeys(("model", "runner", "convert", "pooler_config", "enable_prefix_caching"), ""),
    **{"dtype": "--dtype", "max_model_len": "--max-length"},
    **{"trust_remote_code": "--trust-remote-code"},
}
_FIELDS = ("tensor_parallel_size", "pipeline_parallel_size", "quantization")  # fields of their own


@dataclass(frozen=True, kw_only=True)
class EngineRunOptions(Options):
    """What runs the teacher."""

    heading = "Engine (language models that need several GPUs)"

    engine: Engine | None = option(
        None,
        help="what runs the teacher: `transformers`, or `vllm` for one causal LM of any size. "
        "Default: `transformers`; of `verify`, the one of the build.",
        extra="vllm",
    )
    tensor_parallel: int = option(1, instead=("engine_arg", "tensor_parallel_size"), at_least=1)
    pipeline_parallel: int = option(1, instead=("engine_arg", "pipeline_parallel_size"), at_least=1)
    quantization: str | None = option(None, instead=("engine_arg", "quantization"))
    engine_arg: tuple[str, ...] = option(
        (),
        help="an argument of vLLM, such as `tensor_parallel_size=4` (GPUs that share each layer), "
        "`pipeline_parallel_size=2` (groups of GPUs that share the layers), `quantization=fp8` "
        "(default: the checkpoint's own) or `gpu_memory_utilization=0.7`.",
        metavar="KEY=VALUE",
    )

    def engine_conflicts(self, default: Engine = "transformers") -> list[str]:
        """What is wrong with the engine's options, where `default` runs without `engine`."""
        problems = []
        fields = (self.tensor_parallel, self.pipeline_parallel, self.quantization)
        if (self.engine or default) != "vllm" and (self.engine_arg or fields != (1, 1, None)):
            problems.append("--engine vllm alone takes --engine-arg. Add it, or leave this out.")
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
        """Those without a field: numbers, true, false, null and JSON as such, others as text."""
        found: dict[str, Any] = {}
        for name, value in key_values(self.engine_arg).items():
            if name not in _FIELDS:
                try:
                    found[name] = json.loads(value)
                except ValueError:
                    found[name] = value
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
    threshold: float = option(
        0.5,
        help="of several labels a text: probability from which a class is one of them.",
        above=0,
        below=1,
    )
    trust_remote_code: bool = option(False, help="let code that ships with a model run.")

    def budget(self, device: str) -> int:
        """Padded tokens of a batch on a device."""
        return self.batch_tokens or (4096 if device == "cpu" else 32768)


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
class LoraOptions(Options):
    """What of a model is trained."""

    heading = "Model"

    lora: str | None = option(
        None,
        help="train only a low-rank adapter of a Hugging Face model, and the head of an encoder "
        "(kdcache[lora]), such as `r=16,alpha=32,dropout=0.05,targets=q_proj+v_proj`. Default: "
        "alpha twice r, no dropout, targets all-linear.",
        metavar="r=R[,alpha=A][,targets=NAMES]",
        extra="lora",
        decides="student",
    )

    @property
    def adapter(self) -> Lora | None:
        """The adapter that is trained; None trains all weights."""
        return None if self.lora is None else Lora.parse(self.lora)


@dataclass(frozen=True, kw_only=True)
class PlotOptions(Options):
    """A picture of the outcome."""

    plot: str | None = option(
        None,
        help="PNG file for a plot of the figures (optional; extra `plot`).",
        metavar="FILE.png",
        output=True,
        extra="plot",
        decides="nothing",
    )

    def plot_problems(self) -> list[str]:
        """What is wrong with the file."""
        return file_problems(self.plot, "--plot")

    def check_plot(self) -> None:
        """Refuse a plot whose file cannot be written, before the work that it is to show.

        Raises:
            UsageError: so it is.
        """
        if self.plot is not None:
            try_output(self.plot, "--plot")


def form_problems(record_form: Form, task: str | None) -> list[str]:
    """What is wrong with a form of records for a task."""
    kind = TASKS.get(task or "")
    if kind is not None and record_form not in ("auto", "text", *kind.forms):
        return [
            f"--record-form is '{record_form}': a {kind.noun} reads texts. Name their column with "
            "--columns text=THEIRS."
        ]
    return []
