"""Groups of options that several commands share, and the objects they make."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kdcache.domains import Named
from kdcache.errors import needs
from kdcache.files import file_problems, try_place
from kdcache.options import Options, option
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
    OnError,
    Precision,
    Scheduler,
)

if TYPE_CHECKING:
    from kdcache.corpus import Corpus

logger = logging.getLogger(__name__)


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
        output=True,
        decides="nothing",
    )

    def plot_problems(self) -> list[str]:
        """What is wrong with the file."""
        return file_problems(self.plot, "--plot")

    def check_plot(self) -> None:
        """Refuse a plot that cannot be drawn, before the work that it is to show.

        Raises:
            UsageError: matplotlib is not installed, or its file cannot be written.
        """
        if self.plot is not None:
            try_place(self.plot, "--plot")
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
