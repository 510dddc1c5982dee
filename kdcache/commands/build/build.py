"""`kdcache build`: run the teacher over a corpus once and seal the cache.

    options -> spans of the corpus -> teacher's identity -> CacheSpec -> create or resume
    missing spans -> crew: workers read, tokenise, run the teacher, encode, commit
    all spans committed -> seal

Guarantee: the same command is always the way to go on, and a finished cache is never touched again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from kdcache import __version__
from kdcache.cache import Cache, CacheSpec, Manifest
from kdcache.corpus import Corpus, OnError
from kdcache.commands.build.local import LocalCrew
from kdcache.commands.build.on_ray import RayCrew, cluster_address
from kdcache.commands.build.workers import Crew
from kdcache.commands.build.driver import GO_ON, Driver, Interrupt, Progress, interruptible
from kdcache.errors import IncompleteError, UsageError
from kdcache.commands.build.events import EventLog, Tell
from kdcache.commands.build.ranks import count_ranks
from kdcache.rows import Form, Packing, RowSpec, Task
from kdcache.storage import redact
from kdcache.targets import Codec
from kdcache.teacher import (
    Attention,
    TeacherFiles,
    TeacherOptions,
    tokenizer_files,
    tokenizer_sha256,
)
from kdcache.commands.build.worker import Job

logger = logging.getLogger(__name__)

Ensemble = Literal["mean-probs", "mean-logits"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_TEXT_BYTES_A_TOKEN = 4
_SHARD_BYTES = 1 << 28  # decoded targets of a shard: what a reader holds in memory at a time


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
    task: Task = "causal-lm"
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


@dataclass(frozen=True)
class BuildResult:
    """The outcome of a build.

    Attributes:
        cache: where the cache is.
        spans: its shards.
        made: how many of them this run made.
        redone: attempts at them that did not end in a shard and were made again.
        workers_lost: workers that died, hung or went with their node.
        rows: rows in the whole cache.
        positions: positions in the whole cache.
        bytes: bytes of all shards.
        skipped: records in the whole cache's corpus that were left out: empty, or broken with
            `on_error="skip"`.
        truncated: documents that were cut at `max_length`, in the shards that this run made.
        clipped_mass: mean probability of the teacher, a position, on ids outside the vocabulary.
        seconds: wall time of this run.
        teacher_seconds: of it in the teacher, summed over workers.
    """

    cache: str
    spans: int
    made: int
    redone: int
    workers_lost: int
    rows: int
    positions: int
    bytes: int
    skipped: int
    truncated: int
    clipped_mass: float
    seconds: float
    teacher_seconds: float

    @property
    def bytes_per_position(self) -> float:
        """Shard bytes, rows included, a position."""
        return self.bytes / max(1, self.positions)


def build(
    options: BuildOptions, *, on_progress: Callable[[Progress], None] | None = None
) -> BuildResult:
    """Make a cache, or finish one.

    Args:
        options: what to build.
        on_progress: called in this thread, a few times a second at most.

    Raises:
        UsageError: wrong options or input; nothing was written that a later run would trust.
        IncompleteError: interrupted, no space left, or spans set aside; the same command goes on.
    """
    with interruptible() as interrupt:
        try:
            return _build(options, on_progress, interrupt)
        except KeyboardInterrupt:  # while planning or sealing; the driver has more to say
            raise IncompleteError(f"interrupted. {GO_ON}") from None


def _build(
    options: BuildOptions,
    on_progress: Callable[[Progress], None] | None,
    interrupt: Interrupt,
) -> BuildResult:
    begin = time.perf_counter()
    plan = prepare(options)
    cache = Cache.create_or_resume(
        options.out,
        plan.spec,
        tokenizer_files=tokenizer_files(plan.tokenizer),
        ranks=plan.ranks,
        notes={"teachers": [redact(name) for name in options.teacher], "kdcache": __version__},
    )
    log = EventLog(cache.storage)
    driver = Driver(plan.corpus.spans, on_progress, log)
    if not cache.sealed or cache.missing():
        log("start", fingerprint=cache.spec.fingerprint, spans=cache.spec.spans)
        try:
            driver.run(
                functools.partial(_missing, cache, driver),
                lambda: _hire(options, plan, cache, log),
                interrupt,
            )
            _seal(cache, driver)
        except BaseException as error:
            reason = redact(str(error)) or type(error).__name__
            log("stop", made=len(driver.made), lost=driver.lost, reason=reason)
            raise
        else:
            log("sealed", made=len(driver.made), lost=driver.lost, rows=cache.manifest.rows)
        finally:
            log.close()
    manifest = cache.manifest
    return BuildResult(
        cache=redact(options.out),
        spans=cache.spec.spans,
        made=len(driver.made),
        redone=driver.redone,
        workers_lost=driver.lost,
        rows=manifest.rows,
        positions=manifest.positions,
        bytes=manifest.bytes,
        skipped=manifest.skipped,
        truncated=driver.truncated,
        clipped_mass=sum(s.clipped_mass for s in manifest.shards) / manifest.positions,
        seconds=time.perf_counter() - begin,
        teacher_seconds=driver.teacher_seconds,
    )


def _missing(cache: Cache, driver: Driver) -> list[int]:
    """Spans to make, by the listing.

    A shard of a sealed cache that came out with other bytes than its manifest says is not in it,
    and would not be after another try: the seal tells.
    """
    made = driver.made if cache.sealed else {}
    return [span for span in cache.missing() if span not in made]


def _seal(cache: Cache, driver: Driver) -> Manifest:
    manifest = cache.prepare_manifest(driver.made.values())
    if not manifest.rows:
        raise UsageError(
            f"the corpus has no usable row ({manifest.skipped} records skipped): nothing to cache. "
            "Look at its text column, or name another --corpus."
        )
    return cache.seal(manifest)


@dataclass(frozen=True)
class Prepared:
    """What follows from the options of a build before any work is done.

    Attributes:
        spec: of the cache.
        corpus: its files and spans.
        rows: how records become rows.
        tokenizer: the teacher's.
        teacher: how a worker loads the teacher.
        batch_tokens: padded tokens of a teacher batch, at most.
        gpus: GPUs a worker.
        ranks: rank table of the cache; empty for none.
    """

    spec: CacheSpec
    corpus: Corpus
    rows: RowSpec
    tokenizer: Any
    teacher: TeacherOptions
    batch_tokens: int
    gpus: float
    ranks: bytes


def prepare(options: BuildOptions) -> Prepared:
    """Find teacher and corpus and settle everything that decides the bytes of a cache.

    Raises:
        UsageError: options or input that cannot be.
    """
    causal = options.task == "causal-lm"
    teachers = [
        TeacherFiles.find(name, trust_remote_code=options.trust_remote_code)
        for name in options.teacher
    ]
    vocab_size = _agree(teachers, options.task)
    tokenizer = teachers[0].tokenizer
    codec = Codec.parse(
        options.codec or ("sample:20" if causal else "dense"), options.temperatures, vocab_size
    )
    rows = _row_spec(options, teachers[0])
    corpus = Corpus.open(
        options.corpus,
        span_bytes=functools.partial(_span_bytes, options, codec),
        limit=options.limit,
        format=options.format,
        columns=options.columns,
    )
    ranks = b""
    if causal and codec.uses_ranks:
        ranks = count_ranks(corpus, rows, tokenizer, vocab_size)
    gpus = _gpus(options)
    pad_id = tokenizer.pad_token_id
    spec = CacheSpec(
        task=options.task,
        teachers=tuple(
            {"sha256": t.sha256, "weight": w}
            for t, w in zip(teachers, options.weights, strict=True)
        ),
        ensemble=options.ensemble,
        dtype=_dtype(options.dtype, gpus),
        tokenizer=tokenizer_sha256(tokenizer),
        vocab_size=vocab_size,
        pad_id=pad_id if pad_id is not None else (tokenizer.eos_token_id or 0),
        eos_id=tokenizer.eos_token_id,
        label_names=rows.label_names,
        corpus=tuple(corpus.identity()),
        rows=dataclasses.asdict(rows),
        reading=corpus.settings,
        spans=len(corpus.spans),
        codec=str(codec),
        temperatures=codec.temperatures,
        seed=options.seed,
        ranks=hashlib.sha256(ranks).hexdigest() if ranks else None,
    )
    return Prepared(
        spec,
        corpus,
        rows,
        tokenizer,
        teacher=_teacher_options(options, spec.dtype, gpus),
        batch_tokens=options.batch_tokens or (65536 if gpus else 4096),
        gpus=gpus,
        ranks=ranks,
    )


def _agree(teachers: Sequence[TeacherFiles], task: str) -> int:
    """The vocabulary size or number of classes of all teachers, which must be one ensemble."""
    first = teachers[0]
    for other in teachers[1:]:
        if tokenizer_sha256(other.tokenizer) != tokenizer_sha256(first.tokenizer):
            raise UsageError(
                f"teachers {first.name} and {other.name} have different tokenizers: their "
                "positions are not the same. Build one cache for each."
            )
        if task != "causal-lm" and other.label_names != first.label_names:
            raise UsageError(
                f"teachers {first.name} and {other.name} have different classes: "
                f"{first.label_names} and {other.label_names}."
            )
    return min(teacher.vocab_size(task) for teacher in teachers)


def _row_spec(options: BuildOptions, teacher: TeacherFiles) -> RowSpec:
    causal = options.task == "causal-lm"
    return RowSpec(
        task=options.task,
        text_column=options.text_column,
        pair_column=options.pair_column,
        label_column=options.label_column,
        label_names=None if causal else teacher.label_names,
        max_length=_max_length(options, teacher),
        packing=options.packing or ("concat" if causal else "none"),
        messages_column=options.messages_column,
        prompt_column=options.prompt_column,
        completion_column=options.completion_column,
        record_form=options.record_form,
        on_error=options.on_error,
    )


def _teacher_options(options: BuildOptions, dtype: str, gpus: float) -> TeacherOptions:
    return TeacherOptions(
        names=options.teacher,
        task=options.task,
        weights=options.weights,
        ensemble=options.ensemble,
        dtype=dtype,
        device="cpu" if not gpus else "auto" if gpus > 1 else "cuda",
        trust_remote_code=options.trust_remote_code,
        attention=options.attention,
        compile=options.compile,
    )


def _max_length(options: BuildOptions, teacher: TeacherFiles) -> int:
    """A row may not be longer than the teacher's positions reach."""
    config = teacher.config.get_text_config()
    reach = [options.max_length, getattr(config, "max_position_embeddings", None)]
    if options.task != "causal-lm":
        # RoBERTa and its kin begin to count behind the padding's id: they reach two places less far
        # than their configuration says, and their tokenizers know it.
        reach.append(int(teacher.tokenizer.model_max_length))
    return min(int(length) for length in reach if length)


def _span_bytes(options: BuildOptions, codec: Codec, total: int) -> int:
    """Bytes of corpus a span: small enough to hold in memory and to share out, few in all."""
    if options.shard_tokens is not None:
        return options.shard_tokens * _TEXT_BYTES_A_TOKEN
    per_position = codec.bytes_per_position if options.task == "causal-lm" else 1.0
    most = int(_SHARD_BYTES / max(1.0, per_position)) * _TEXT_BYTES_A_TOKEN
    # 64 spans or more, of 4 MiB at most, unless that made more than 100,000 of them.
    share = max(min(1 << 22, max(1 << 16, total // 64)), total // 100_000)
    return max(1 << 12, min(share, most))


def _gpus(options: BuildOptions) -> float:
    if options.workers == 0:
        asked = 1.0 if options.gpus_per_worker is None else options.gpus_per_worker
        return asked * torch.cuda.is_available()
    if options.gpus_per_worker is not None:
        return options.gpus_per_worker
    # A cluster is rented for its GPUs. It may have none yet, and the driver's own machine does not
    # tell.
    return 1.0 if cluster_address(options.address) else float(torch.cuda.is_available())


def _dtype(name: str, gpus: float) -> str:
    if name == "auto":
        return "bfloat16" if gpus else "float32"
    return name


def _hire(options: BuildOptions, plan: Prepared, cache: Cache, tell: Tell) -> Crew:
    job = Job(
        cache.storage.url,
        plan.rows,
        plan.teacher,
        plan.batch_tokens,
        find_batch=options.batch_tokens is None,
    )
    if options.workers == 0:
        return LocalCrew(job)
    return RayCrew(
        job,
        workers=options.workers,
        gpus=plan.gpus,
        address=options.address,
        hang_seconds=options.hang_seconds,
        tell=tell,
    )
