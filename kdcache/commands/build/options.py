"""The options of `build`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from kdcache.corpus import OnError
from kdcache.errors import UsageError
from kdcache.rows import Form, Packing
from kdcache.tasks import CAUSAL_LM, Task
from kdcache.teacher import (
    Attention,
)

Ensemble = Literal["mean-probs", "mean-logits"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class BuildOptions:
    """What `kdcache build` is asked for; fields bear the names of its options.

    Attributes:
        teacher: folder or hub id of each teacher; several make an ensemble.
        corpus: files, folders, globs or fsspec URLs.
        out: folder or URL of the cache.
        task: `causal-lm` or `sequence-classification`.
        codec: `dense`, `dense:float16`, `topk:K` or `sample:N`. Default: `dense` for
            classification and `sample:20` for a causal LM.
        temperatures: the temperatures a student may train at (`dense` allows any).
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
        limit: use only the first records of the corpus.
        workers: number of Ray workers; `auto` for as many as there is room, 0 for this
            process without Ray.
        gpus_per_worker: GPUs a worker. Default: one on a cluster; on this machine, one where there
            are any.
        address: Ray address. Default: RAY_ADDRESS, else a Ray of this process.
        hang_seconds: a Ray worker in which nothing moves for so long (no record read, no batch
            finished) is replaced.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        batch_tokens: padded tokens of a teacher batch. Default: 4096 on a CPU; on a GPU the largest
            of 65536 and its halves that fits.
        attention: `auto` (FlashAttention 2 where it is installed and works, else the choice of
            transformers), `sdpa`, `flash_attention_2` or `eager`.
        compile: run the teacher through torch.compile; pays on long builds.
        shard_tokens: target size of a shard in tokens. Default: by corpus and codec.
        seed: seed of the `sample` codec.
        ensemble: `mean-probs` or `mean-logits`.
        teacher_weight: weight of each teacher. Default: equal.
        trust_remote_code: let code that ships with a teacher run.
    """

    teacher: tuple[str, ...]
    corpus: tuple[str, ...]
    out: str
    task: Task = CAUSAL_LM
    codec: str | None = None
    temperatures: tuple[float, ...] = (1.0,)
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
    workers: int | None = None
    gpus_per_worker: float | None = None
    address: str | None = None
    hang_seconds: float = 600.0
    dtype: Dtype = "auto"
    batch_tokens: int | None = None
    attention: Attention = "auto"
    compile: bool = False
    shard_tokens: int | None = None
    seed: int = 0
    ensemble: Ensemble = "mean-probs"
    teacher_weight: tuple[float, ...] | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not self.teacher:
            problems.append("--teacher is missing: name a folder or a hub id")
        if not self.corpus:
            problems.append("--corpus is missing: name files, folders, globs or URLs")
        for name, words in (
            ("task", Task),
            ("ensemble", Ensemble),
            ("dtype", Dtype),
            ("attention", Attention),
        ):
            if getattr(self, name) not in get_args(words):
                expected = ", ".join(get_args(words))
                problems.append(f"--{name} is {getattr(self, name)!r}, expected one of {expected}")
        if not self.temperatures or min(self.temperatures) <= 0:
            problems.append(f"--temperatures are {self.temperatures}, expected positive numbers")
        if self.teacher_weight and len(self.teacher_weight) != len(self.teacher):
            given = len(self.teacher_weight)
            problems.append(f"{given} --teacher-weight for {len(self.teacher)} --teacher")
        if self.teacher_weight and min(self.teacher_weight) <= 0:
            problems.append("--teacher-weight must be positive")
        for name in ("limit", "batch_tokens", "shard_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"--{name.replace('_', '-')} is {value}, expected at least 1")
        if self.workers is not None and self.workers < 0:
            problems.append(f"--workers is {self.workers}, expected auto, 0 or more")
        if not self.hang_seconds > 0:
            problems.append(f"--hang-seconds is {self.hang_seconds}, expected a positive number")
        if problems:
            raise UsageError("; ".join(problems) + ".")

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each teacher, summing to 1."""
        given = self.teacher_weight or (1.0,) * len(self.teacher)
        return tuple(w / sum(given) for w in given)
