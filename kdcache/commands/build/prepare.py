"""What a build derives from its options before any work: spec, corpus, teacher.

Frequency ranks: ids renumbered so that frequent ones are small, which makes a cache smaller.

The driver counts the tokens to be predicted in the beginnings of a few hundred records, spread over
the corpus; the most frequent id gets rank 0, equal counts go by id. The table is stored once in the
cache and takes 6 to 9 % off the bytes of language-model targets (SmolLM2-135M on novels).

Cost: about 100 thousand tokens are tokenised, half a second; counting all of the corpus would save
another 1 %.
Guarantee: the table is a pure function of the corpus, the row options and the tokenizer. Any table
is correct; a good one makes the cache small.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kdcache.cache import CacheSpec
from kdcache.cluster import cluster_address
from kdcache.commands.build.options import BuildOptions, WorkerOptions
from kdcache.commands.groups import EngineRunOptions
from kdcache.commands.row_options import (
    DEFAULT_LENGTH,
    SOURCE_LENGTH,
    as_written,
    drawn_as_is,
    set_chat_template,
)
from kdcache.corpus import Corpus, named, sample_records, sample_spans
from kdcache.corpus.sample import shortened
from kdcache.errors import UsageError, doing
from kdcache.humanize import size
from kdcache.pretrained import tokenizer_sha256
from kdcache.rows import Row, RowSpec, make_encoder
from kdcache.storage import redact
from kdcache.targets import Codec
from kdcache.tasks import CAUSAL_LM, TASKS
from kdcache.teacher import EngineOptions, TeacherFiles, TeacherOptions
from kdcache.teacher.load import check_states

_SPANS = 16
_READ = 4096  # records of all spans
_RECORDS = 320  # of all spans; up to twice as many are counted
_CHARACTERS = 1 << 10  # of each of them: many beginnings are more representative than one book


def count_ranks(corpus: Corpus, rows: RowSpec, tokenizer: object, vocab_size: int) -> bytes:
    """The rank table of a build.

    Returns:
        The ids that were met, the most frequent first, as little-endian uint32; empty if none was.
    """
    counts = np.zeros(vocab_size, np.int64)
    for row in sampled_rows(corpus, rows, tokenizer):
        labels = row.labels[row.positions(rows.task)]
        labels = labels[labels < vocab_size]
        counts += np.bincount(labels, minlength=vocab_size)
    return ranks_by_count(counts)


def sampled_rows(corpus: Corpus, rows: RowSpec, tokenizer: object) -> Iterator[Row]:
    """Rows of the beginnings of a few hundred records, spread over the corpus."""
    places = sample_spans(corpus, _SPANS)
    for span in places:
        part = sample_records(
            span,
            columns=rows.columns,
            on_error=rows.on_error,
            read=_READ // len(places),
            records=-(-_RECORDS // len(places)),
        )
        records = shortened(part.records, _CHARACTERS)
        with doing(f"encoding {span.records}"):
            yield from make_encoder(rows, tokenizer).encode(records, span=span.index)


def ranks_by_count(counts: np.ndarray) -> bytes:
    """The table of ids that were counted [V], the most frequent first."""
    order = np.argsort(-counts, kind="stable")
    return order[: np.count_nonzero(counts)].astype("<u4").tobytes()


logger = logging.getLogger(__name__)

_TEXT_BYTES_A_TOKEN = 4
_SPAN_SECONDS = 120.0  # of the teacher: two spans are what a preemption costs
# Bytes of weights a second, times tokens, that a teacher gets through: a modest GPU in 16 bits; in
# 32 bits something between a GPU and a CPU.
_SPEED = {"float32": 1e12}
_SPEED_16 = 1e14
_CPU = 1 / 1e11  # the same of a CPU of eight cores: seconds a byte, to tell people
_BATCH_TOKENS = {"cpu": 4096, "gpu": 65536, "engine": 8192}
_MANY_FILES, _SMALL_FILE = 100, 1 << 14  # fewer or larger ones make shards that are worth it
_NAMED_COPIES = 3
_SHARD_BYTES = 1 << 28  # decoded targets of a shard: what a reader holds in memory at a time

# Arguments of an engine that decide its speed and memory; of the numbers at most their rounding.
_NO_MATTER = {
    "block_size", "distributed_executor_backend", "encode_inside", "enforce_eager",
    "gpu_memory_utilization", "kv_cache_memory_bytes", "load_format", "max_num_batched_tokens",
    "max_num_seqs",
}  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """What a build derives from its options before any work.

    Attributes:
        teacher: how a worker loads the teacher.
        batch_tokens: padded tokens of a teacher batch, at most.
        find_batch: whether such a batch is tried first, and halved until it fits the GPU.
        ranks: rank table of the cache; empty for none.
        token_seconds: of the teacher for a token on one worker, very roughly.
        output_layer: file of the teacher's output layer; empty for none.
    """

    spec: CacheSpec
    corpus: Corpus
    rows: RowSpec
    tokenizer: Any
    teacher: TeacherOptions
    batch_tokens: int
    find_batch: bool
    gpus: float
    ranks: bytes
    token_seconds: float = 0.0
    output_layer: bytes = b""

    @property
    def across(self) -> bool:
        """Whether the GPUs of a worker may be on several nodes."""
        return across_nodes(self.teacher, self.gpus)

    @property
    def span_seconds(self) -> float:
        """The same for a span of average size."""
        total, spans = sum(file.size for file in self.corpus.files), max(1, len(self.corpus.spans))
        # Of files that --limit ends early, a span is as long as it was to be.
        size = min(total / spans, float(self.corpus.settings["span_bytes"]))
        return size / _TEXT_BYTES_A_TOKEN * self.token_seconds


def prepare(options: BuildOptions) -> Prepared:
    """Find teacher and corpus and derive everything that decides the bytes of a cache.

    Raises:
        UsageError: options or input that cannot be.
    """
    task = TASKS[options.task]
    given, options, version = options, as_written(options), None
    if options.engine == "vllm":
        from kdcache.teacher.engine import encodes, engine_version

        version = engine_version()
        encodes(options.engine_args, version)
    teachers = [
        TeacherFiles.find(name, trust_remote_code=options.trust_remote_code, weights=False)
        for name in options.teacher
    ]
    for teacher in teachers:
        teacher.check_task(options.task)
        if options.engine == "vllm":
            teacher.check_whole("--engine vllm")
    vocab_size = _agree(teachers, options.task)
    tokenizer = teachers[0].tokenizer
    set_chat_template(options.chat_template, tokenizer)
    options.check_tokenizer(tokenizer)
    check_answers(options.codec or task.codec, options.temperatures, options.task)
    codec = Codec.parse(options.codec or task.codec, options.temperatures, vocab_size)
    check_ensemble(codec, options)
    reach = ((teacher.who, teacher.reach(options.task)) for teacher in teachers)
    default = _tuned_at("max_length", options, teachers, DEFAULT_LENGTH)
    length = options.row_length(reach, default)
    rows = options.row_spec(options.task, teachers[0].label_names, max_length=length)
    default = _tuned_at("max_source_length", options, teachers, SOURCE_LENGTH)
    rows = options.of_pairs(rows, teachers, "teacher", default)
    if task.causal and drawn_as_is(given, rows.packing):
        rows = replace(rows, writer_logprob=True)
    gpus = gpus_of_engine(options)
    dtype = dtype_of(options.dtype, gpus)
    weights = sum(teacher.weight_bytes for teacher in teachers)
    seconds = weights / _SPEED.get(dtype, _SPEED_16)
    corpus = options.open_corpus(
        named(options.corpus),
        span_bytes=functools.partial(_span_bytes, options, codec, rows, seconds),
        # Where each document is a row of its own, what does not fit is cut off anyway.
        divide=task.over_ids and rows.packing in ("concat", "split"),
    )
    warn_of_small_files(corpus)
    ranks = b""
    if task.over_ids and codec.uses_ranks:
        ranks = count_ranks(corpus, rows, tokenizer, vocab_size)
    identity = tuple(corpus.identity())
    warn_of_repeated_files(identity)
    pad_id = tokenizer.pad_token_id
    spec = CacheSpec(
        task=options.task,
        teachers=tuple(
            {"sha256": t.sha256, "weight": w, **engine_facts(options, version)}
            for t, w in zip(teachers, options.weights, strict=True)
        ),
        ensemble=options.ensemble,
        dtype=dtype,
        tokenizer=tokenizer_sha256(tokenizer),
        vocab_size=vocab_size,
        pad_id=pad_id if pad_id is not None else (tokenizer.eos_token_id or 0),
        eos_id=tokenizer.eos_token_id,
        label_names=rows.label_names,
        corpus=identity,
        rows=rows.to_dict(),
        reading=corpus.settings,
        spans=len(corpus.spans),
        codec=str(codec),
        temperatures=codec.temperatures,
        seed=options.seed,
        ranks=hashlib.sha256(ranks).hexdigest() if ranks else None,
        levels=codec.levels,
        label_logprob=task.over_ids,
        entropy=task.over_ids,
        answer_logprob=options.task == CAUSAL_LM and rows.packing in ("none", "whole"),
        domains=tuple(corpus.domains),
        # The code is measured before the first shard.
        positions={"share": options.positions, "entropy_code": 0} if options.positions else None,
    )
    return Prepared(
        spec,
        corpus,
        rows,
        tokenizer,
        teacher=_teacher_options(options, spec, gpus, version),
        batch_tokens=options.batch_tokens
        or _BATCH_TOKENS["engine" if version else "gpu" if gpus else "cpu"],
        find_batch=options.batch_tokens is None and version is None,
        gpus=gpus,
        ranks=ranks,
        token_seconds=seconds if gpus else max(seconds, _CPU * weights),
    )


def _tuned_at(
    name: str, options: BuildOptions, teachers: Sequence[TeacherFiles], usual: int
) -> int:
    """The default of an option of length: what `finetune` gave the teachers, or the usual one."""
    found = [(one.tuned[name], one.who) for one in teachers if name in one.tuned]
    tokens, who = min(found, default=(usual, ""))
    if found and getattr(options, name) not in (None, tokens):
        logger.warning(
            "%s was fine-tuned at --%s %d, and answers at %d here",
            *(who, name.replace("_", "-"), tokens, getattr(options, name)),
        )
    return tokens


def warn_of_small_files(corpus: Corpus) -> None:
    """A span never holds two files, and a shard takes 32 kB without its targets."""
    count, total = len(corpus.files), sum(file.size for file in corpus.files)
    if count >= _MANY_FILES and total < count * _SMALL_FILE:
        logger.warning(
            "the corpus has %d files of %s on average, each of which becomes a shard of its own: "
            "slow, and mostly overhead. Join them first, such as into one JSONL file",
            count,
            size(total / count),
        )


def warn_of_repeated_files(identity: Sequence[dict[str, Any]]) -> None:
    """A file that several patterns name counts once; its copies and links count by themselves."""
    first: dict[tuple[Any, ...], str] = {}
    again = []
    for file in identity:
        if file["size"] and not file["name"].endswith(".idx"):  # equal lengths of other ids
            name = first.setdefault((file["size"], file["kind"], file["tag"]), file["name"])
            if name != file["name"]:
                again.append(f"{redact(file['name'])} is {redact(name)}")
    if again:
        logger.warning(
            "%d files of the corpus are copies of others, by size, beginning and end, or links to "
            "them, and their records count again: %s%s. Leave them out if that is not meant",
            len(again),
            "; ".join(again[:_NAMED_COPIES]),
            "; …" if len(again) > _NAMED_COPIES else "",
        )


def check_answers(codec: str, temperatures: Sequence[float], task: str) -> None:
    """Refuse a codec or temperatures that answers without a distribution have no use for.

    Raises:
        UsageError: a codec that is not dense, or a temperature of a score.
    """
    kind = TASKS[task]
    if not kind.distribution and codec.partition(":")[0] != "dense":
        raise UsageError(
            f"codec {codec} keeps a part of one distribution, and the answers of {task} are not "
            "one. Use --codec dense or dense:float16."
        )
    if not kind.has_temperature and tuple(temperatures) != (1.0,):
        raise UsageError(
            f"--temperatures are {', '.join(f'{t:g}' for t in temperatures)}, but a score has no "
            "temperature. Leave them out."
        )


def check_ensemble(codec: Codec, options: BuildOptions) -> None:
    """Refuse a codec that cannot keep what these teachers say at each declared temperature.

    Raises:
        UsageError: a mean of probabilities at several temperatures, and one set of logits; or
            hidden states of several teachers, or of a classifier.
    """
    if codec.reads_states:
        check_states(options.teacher, options.task)
    means = options.ensemble == "mean-probs" and TASKS[options.task].has_temperature
    if len(options.teacher) > 1 and means and not codec.keeps_means:
        names = ", ".join(f"{t:g}" for t in codec.temperatures)
        raise UsageError(
            f"codec {codec} keeps the mean of several teachers' probabilities at one temperature, "
            f"not at {names}. Declare one with --temperatures, use --codec sample:N, or --ensemble "
            "mean-logits."
        )


def _agree(teachers: Sequence[TeacherFiles], task: str) -> int:
    """The vocabulary size or number of classes of all teachers, which must agree."""
    first = teachers[0]
    for other in teachers[1:]:
        if tokenizer_sha256(other.tokenizer) != tokenizer_sha256(first.tokenizer):
            raise UsageError(
                f"teachers {first.name} and {other.name} have different tokenizers: their "
                "positions are not the same. Build one cache for each."
            )
        if TASKS[task].named and other.label_names != first.label_names:
            raise UsageError(
                f"teachers {first.name} and {other.name} have different classes: "
                f"{first.label_names} and {other.label_names}."
            )
    return min(teacher.vocab_size(task) for teacher in teachers)


def engine_facts(options: EngineRunOptions, version: str | None) -> dict[str, Any]:
    """What the spec states of an engine: all that decides more of a number than its rounding."""
    if version is None:
        return {}
    args = {name: value for name, value in options.engine_args.items() if name not in _NO_MATTER}
    facts = {"name": "vllm", "version": version, "quantization": options.quantization, "args": args}
    return {"engine": facts}


def engine_options(
    options: EngineRunOptions, max_length: int, version: str | None = None
) -> EngineOptions:
    """How vLLM runs a teacher, from a command's options; with a `version` only that one."""
    return EngineOptions(
        max_length=max_length,
        version=version,
        tensor_parallel=options.tensor_parallel,
        pipeline_parallel=options.pipeline_parallel,
        quantization=options.quantization,
        args=options.engine_args,
    )


def _teacher_options(
    options: BuildOptions, spec: CacheSpec, gpus: float, version: str | None
) -> TeacherOptions:
    return TeacherOptions(
        names=options.teacher,
        task=options.task,
        weights=options.weights,
        ensemble=options.ensemble,
        # A mean of distributions is made at each: the labels' log-probabilities are at T = 1.
        temperatures=tuple(sorted({*spec.temperatures, *([1.0] if spec.label_logprob else [])})),
        dtype=spec.dtype,
        device="cpu" if not gpus else "auto" if gpus > 1 else "cuda",
        trust_remote_code=options.trust_remote_code,
        attention=options.attention,
        compile=options.compile,
        identities=tuple(str(teacher["sha256"]) for teacher in spec.teachers),
        states=spec.make_codec().reads_states,
        engine=engine_options(options, spec.max_length, version) if version else None,
    )


def _span_bytes(
    options: BuildOptions, codec: Codec, rows: RowSpec, seconds: float, total: int
) -> int:
    """Bytes of corpus a span: small enough to hold in memory and to share out, few in all.

    Args:
        seconds: that the teacher needs for a token, roughly: no more than the spec decides it, so
            that every run of a build has the same spans.
    """
    if options.shard_tokens is not None:
        return options.shard_tokens * _TEXT_BYTES_A_TOKEN
    per_token = codec.bytes_per_position if TASKS[options.task].per_token else 1.0
    if rows.mask_share is not None:  # only masked tokens are positions
        per_token *= rows.mask_share
    most = int(_SHARD_BYTES / max(1.0, per_token)) * _TEXT_BYTES_A_TOKEN
    # 64 spans or more, of 4 MiB at most, unless that made more than 100,000 of them; with a slow
    # teacher of two minutes at most, unless that made more than 400,000.
    share = max(min(1 << 22, max(1 << 16, total // 64)), total // 100_000)
    slow = max(1 << 16, int(_SPAN_SECONDS / max(seconds, 1e-12)) * _TEXT_BYTES_A_TOKEN)
    return max(1 << 12, min(share, max(slow, total // 400_000), most))


def across_nodes(teacher: TeacherOptions, gpus: float) -> bool:
    """Whether the GPUs of a worker may be on several nodes: those of an engine over Ray may."""
    return gpus > 0 and teacher.engine is not None and teacher.engine.over_ray


def gpus_of_engine(options: Any) -> float:
    """GPUs of a worker; an engine's follow from its processes."""
    gpus = gpus_of(options)
    if not gpus or options.engine != "vllm":
        return gpus
    needed = options.tensor_parallel * options.pipeline_parallel
    if options.gpus_per_worker not in (None, needed):
        raise UsageError(
            f"--worker gpus is {options.gpus_per_worker:g}, the engine needs {needed} GPUs "
            "(tensor_parallel_size times pipeline_parallel_size). Leave it out."
        )
    return float(needed)


def gpus_of(options: WorkerOptions) -> float:
    """GPUs of a worker, by the options and by what there is."""
    if options.without_ray:
        asked = 1.0 if options.gpus_per_worker is None else options.gpus_per_worker
        return asked * torch.cuda.is_available()
    if options.gpus_per_worker is not None:
        return options.gpus_per_worker
    # A cluster is rented for its GPUs. It may have none yet, and the driver's own machine does not
    # tell.
    return 1.0 if cluster_address(options.address) else float(torch.cuda.is_available())


def dtype_of(name: str, gpus: float) -> str:
    """The compute type that `auto` stands for."""
    if name == "auto":
        return "bfloat16" if gpus else "float32"
    return name
