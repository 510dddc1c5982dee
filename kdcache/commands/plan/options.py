"""The options of `plan`: those of a build, with several codecs and temperatures to compare."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from kdcache.commands.build.options import BuildOptions, Dtype, Ensemble
from kdcache.corpus import OnError
from kdcache.errors import UsageError
from kdcache.rows import Form, Packing
from kdcache.tasks import CAUSAL_LM, SEQUENCE_CLASSIFICATION, Task
from kdcache.teacher import Attention

_CODECS = {
    CAUSAL_LM: ("sample:10", "sample:20", "sample:40", "topk:16", "topk:64"),
    SEQUENCE_CLASSIFICATION: ("dense", "dense:float16"),
}


@dataclass(frozen=True)
class PlanOptions:
    """What `kdcache plan` is asked for; fields bear the names of its options.

    Attributes:
        teacher: folder or hub id of each teacher; several make an ensemble.
        corpus: files, folders, globs or fsspec URLs.
        task: `causal-lm` or `sequence-classification`.
        codec: codecs to compare. Default: `sample:10`, `sample:20`, `sample:40`, `topk:16`,
            `topk:64` for a causal LM, `dense` and `dense:float16` for classification.
        temperatures: sets of declared temperatures to compare. Default: `1` and `1,2`.
        rows: rows of the sample.
        text_column: column of the text.
        pair_column: column of a second text (optional).
        label_column: column of the class.
        columns: names of the columns of files without a header.
        messages_column: column of chat messages; where a file has it, its chats become the rows.
        prompt_column: column of the prompt, beside `completion_column`.
        completion_column: column of the completion.
        record_form: which of these a record is: `text`, `messages`, `prompt`, or `auto`, which goes
            by the columns that hold something.
        format: format of all files, such as `jsonl`; `auto` goes by their names.
        max_length: tokens of the longest row.
        packing: `concat` joins documents into full rows, `none` makes one row of each and cuts it
            at the longest, `split` goes on in further rows. Default: `concat` for a causal LM.
        on_error: `fail` or `skip` for records that cannot be read.
        limit: plan for the first records of the corpus only.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        batch_tokens: padded tokens of a teacher batch. Default: 4096 on a CPU; on a GPU the largest
            of 65536 and its halves that fits.
        attention: `auto`, `sdpa`, `flash_attention_2` or `eager`, as in `build`.
        compile: run the teacher through torch.compile, as in `build`.
        ensemble: `mean-probs` or `mean-logits`.
        teacher_weight: weight of each teacher. Default: all equal.
        trust_remote_code: let code that ships with a teacher run.
        plot: PNG file for a plot of fidelity against bytes (optional).
    """

    teacher: tuple[str, ...]
    corpus: tuple[str, ...]
    task: Task = CAUSAL_LM
    codec: tuple[str, ...] | None = None
    temperatures: tuple[str, ...] | None = None
    rows: int = 64
    text_column: str = "text"
    pair_column: str | None = None
    label_column: str = "label"
    columns: tuple[str, ...] | None = None
    messages_column: str = "messages"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    record_form: Form = "auto"
    format: str = "auto"
    max_length: int = 1024
    packing: Packing | None = None
    on_error: OnError = "fail"
    limit: int | None = None
    dtype: Dtype = "auto"
    batch_tokens: int | None = None
    attention: Attention = "auto"
    compile: bool = False
    ensemble: Ensemble = "mean-probs"
    teacher_weight: tuple[float, ...] | None = None
    trust_remote_code: bool = False
    plot: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.rows < 1:
            problems.append(f"--rows is {self.rows}, expected at least 1")
        try:
            _ = self.temperature_sets
        except ValueError:
            given = " ".join(self.temperatures or ())
            problems.append(
                f"--temperatures are {given}, expected positive numbers, "
                "several of one set with commas: --temperatures 1 --temperatures 1,2"
            )
        folder = Path(self.plot).parent if self.plot else Path()
        if not folder.is_dir():
            problems.append(f"--plot: there is no folder {folder}")
        if problems:
            raise UsageError("; ".join(problems) + ".")
        self.build_options()  # what build would refuse

    @property
    def codecs(self) -> tuple[str, ...]:
        """The codecs to compare."""
        return self.codec or _CODECS[self.task]

    @property
    def temperature_sets(self) -> tuple[tuple[float, ...], ...]:
        """The sets of declared temperatures; ValueError where one is no such set."""
        texts = self.temperatures or ("1", "1,2")
        sets = tuple(tuple(float(t) for t in text.split(",")) for text in texts)
        if not all(math.isfinite(t) and t > 0 for one in sets for t in one):
            raise ValueError(self.temperatures)
        return sets

    def build_options(self) -> BuildOptions:
        """The build of which this is a plan; its codec is the default one."""
        same = {name: getattr(self, name) for name in _SAME}
        return BuildOptions(out="", workers=0, **same)


_SAME = tuple(
    name
    for name in PlanOptions.__dataclass_fields__
    if name in BuildOptions.__dataclass_fields__ and name not in ("codec", "temperatures")
)
