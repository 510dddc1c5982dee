"""`kdcache generate`: prompts → immutable shards of what a model wrote, with its log-probabilities.

    options -> spans of the prompts -> model's identity -> GeneratedSpec -> `make_shards`

After planning all is a build's: workers, Ray, faults, resume, seal. With `cache` a build of the
corpus follows, which costs one forward over its rows: it is that build, so its cache is the same.

Cost: one forward a token that is written, in batches. Guarantee: a prompt whose shard is committed
is never answered again, and each sample of each prompt is in the corpus once.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.cache import ShardEntry
from kdcache.cache.generated import GeneratedCorpus, GeneratedSpec
from kdcache.commands.build.build import build, check_made
from kdcache.commands.build.driver import Progress
from kdcache.commands.build.make import BuildResult, ShardPlan, ShardsResult, make_shards
from kdcache.commands.build.packer import Steps
from kdcache.commands.build.prepare import (
    across_nodes,
    dtype_of,
    engine_facts,
    engine_options,
    gpus_of_engine,
    warn_of_repeated_files,
    warn_of_small_files,
)
from kdcache.commands.build.source import Source, SpanRead, Turn, counted_records
from kdcache.commands.generate.options import GenerateOptions, SamplingOptions
from kdcache.commands.row_options import (
    DEFAULT_LENGTH,
    as_written,
    longest,
    set_chat_template,
)
from kdcache.corpus import Corpus, ReadStats, Span, named
from kdcache.errors import UsageError
from kdcache.files import try_output
from kdcache.pretrained import UnreadableError, generation_ends, tokenizer_files, tokenizer_sha256
from kdcache.rows import RowSpec
from kdcache.rows.ids import check_tokenizer
from kdcache.rows.prompts import PromptEncoder
from kdcache.rows.spec import Sampling
from kdcache.storage import open_storage, redact
from kdcache.tasks import CAUSAL_LM
from kdcache.teacher import TeacherFiles, TeacherOptions
from kdcache.teacher.writer import Writer, Writes

logger = logging.getLogger(__name__)

_BATCH_TOKENS = {"cpu": 1 << 14, "gpu": 1 << 17}
_TEXT_BYTES_A_TOKEN = 4


@dataclass(frozen=True, kw_only=True)
class GenerateResult(ShardsResult):
    """The outcome of a generation.

    Attributes:
        tokens: that were written, in the whole corpus.
        stopped: answers that ended by themselves; the others had no room left.
        nats: mean of minus the log-probability of a token that was drawn, at temperature 1.
        model_seconds: of this run in the model, summed over workers.
        cache: of the corpus, where one was asked for.
    """

    corpus: str
    prompts: int
    answers: int
    tokens: int
    stopped: int
    nats: float
    model_seconds: float
    cache: BuildResult | None = None


def generate(
    options: GenerateOptions,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> GenerateResult:
    """Have a model answer prompts, or finish an interrupted generation.

    Args:
        on_progress: called in this thread, a few times a second at most.
        report: takes a line about what is done before the first progress.

    Raises:
        UsageError: wrong options or input; nothing was written that a later run would trust.
        IncompleteError: interrupted, no space left, or spans set aside; the same command resumes.
    """
    if options.dry_run:
        raise UsageError("dry_run is for kdcache.generate_dry, which describes a generation.")
    if options.cache is not None:
        try_output(options.cache, "--cache")
    plan = functools.partial(plan_of, options)
    made = make_shards(plan, options.out, options, on_progress, report)
    shards = made.shards
    answers = sum(s.rows for s in shards)
    result = GenerateResult(
        **made.figures(),
        corpus=redact(options.out),
        prompts=answers // options.samples,
        answers=answers,
        tokens=made.positions,
        stopped=sum(s.stopped or 0 for s in shards),
        nats=sum(s.label_nats or 0.0 for s in shards) / max(1, made.positions),
        model_seconds=made.driver.teacher_seconds,
    )
    if options.cache is None:
        return result
    report(f"building {redact(options.cache)} of it")
    cache = build(options.build_options(), on_progress=on_progress, report=report)
    return dataclasses.replace(result, cache=cache)


def plan_of(options: GenerateOptions) -> ShardPlan:
    """Find model and prompts, and derive everything that decides the text.

    Raises:
        UsageError: options or input that cannot be.
    """
    version = None
    model = TeacherFiles.find(
        options.model, trust_remote_code=options.trust_remote_code, weights=False, role="model"
    )
    model.check_task(CAUSAL_LM)
    if options.engine == "vllm":
        from kdcache.teacher.engine import engine_version

        version = engine_version()
        model.check_whole("--engine vllm")
    options = as_written(options)
    tokenizer = model.tokenizer
    set_chat_template(options.chat_template, tokenizer)
    if options.record_form == "ids":
        check_tokenizer(options.tokenizer or options.model, tokenizer)
    reach = [(f"model {model.name}", model.reach(CAUSAL_LM))]
    length = longest("--max-length", options.max_length, reach, DEFAULT_LENGTH)
    if length <= options.max_new_tokens:
        raise UsageError(
            f"--max-new-tokens is {options.max_new_tokens:,}, and prompt and answer together have "
            f"at most {length:,} (--max-length, or what the model reads). Leave room for prompts."
        )
    rows = _row_spec(options, length)
    gpus = gpus_of_engine(options)
    dtype = dtype_of(options.dtype, gpus)
    corpus = options.open_corpus(
        named(options.corpus), span_bytes=functools.partial(_span_bytes, options)
    )
    warn_of_small_files(corpus)
    identity = tuple(corpus.identity())
    warn_of_repeated_files(identity)
    how = Sampling(
        **{name: getattr(options, name) for name in SamplingOptions.__dataclass_fields__}
    )
    spec = GeneratedSpec(
        model={"sha256": model.sha256, **engine_facts(options, version)},
        dtype=dtype,
        tokenizer=tokenizer_sha256(tokenizer),
        vocab_size=model.vocab_size(CAUSAL_LM),
        ends=_ends(model, tokenizer),
        corpus=identity,
        rows=rows.to_dict(),
        reading=corpus.settings,
        spans=len(corpus.spans),
        max_length=length,
        prompt_tokens=options.prompt_tokens,
        sampling=dataclasses.asdict(how),
    )
    loaded = TeacherOptions(
        names=(options.model,),
        task=CAUSAL_LM,
        dtype=dtype,
        device="cpu" if not gpus else "auto" if gpus > 1 else "cuda",
        trust_remote_code=options.trust_remote_code,
        identities=(model.sha256,),
        engine=engine_options(options, length, version) if version else None,
        role="model",
    )
    batch_tokens = options.batch_tokens or _BATCH_TOKENS["gpu" if gpus else "cpu"]
    return ShardPlan(
        spec=spec,
        tokenizer_files=tokenizer_files(tokenizer),
        ranks=b"",
        notes={"model": redact(options.model)},
        spans=corpus.spans,
        source=WriterSourceOptions(rows, loaded, batch_tokens),
        gpus=gpus,
        span_seconds=120.0,
        across=across_nodes(loaded, gpus),
        check_made=lambda there: check_made(
            there, corpus, functools.partial(_same_prompts, there, rows)
        ),
        check_end=corpus.check_unchanged,
        opening="loading the model",
        kind=GeneratedCorpus,
    )


def _row_spec(options: GenerateOptions, length: int) -> RowSpec:
    """How records become prompts."""
    names = (
        *("text_column", "messages_column", "tools_column", "prompt_column", "on_error"),
        *("completion_column", "record_form", "chat_template_kwargs", "labels"),
    )
    given = {name: getattr(options, name) for name in names}
    return RowSpec(CAUSAL_LM, max_length=length, packing="whole", label_column="none", **given)


def _ends(model: TeacherFiles, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer: those of the model's generation settings, and its tokenizer's."""
    own = generation_ends(model.folder)
    own |= set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    if not own:
        logger.warning(
            "%s names no token that ends a text: all answers have --max-new-tokens", model.who
        )
    return tuple(sorted(own))


def _span_bytes(options: GenerateOptions, total: int) -> int:
    """Bytes of prompts a span: some hundred, which fill batches and are soon written again."""
    if options.shard_tokens is not None:
        return options.shard_tokens * _TEXT_BYTES_A_TOKEN
    return max(min(max(total // 64, 1 << 14), 1 << 19), total // 100_000)


def _same_prompts(
    there: GeneratedCorpus, rows: RowSpec, tokenizer: Any, span: Span, name: str
) -> bool:
    """Whether a shard answers the prompts of its span."""
    steps = Steps(span.index, lambda: None)
    return there.answers(name, read_prompts(there, rows, tokenizer, span, steps).ids)


@dataclass(frozen=True)
class WriterSourceOptions:
    """Prompts, and the model that answers them.

    Attributes:
        rows: how records become prompts.
        batch_tokens: tokens of prompts and answers in a batch, at most.
    """

    rows: RowSpec
    model: TeacherOptions
    batch_tokens: int

    def open(self, url: str) -> WriterSource:
        """Load the model."""
        return WriterSource(self, GeneratedCorpus.resume(url))


@dataclass(kw_only=True)
class Prompts(SpanRead):
    """The prompts of a span."""

    ids: Sequence[npt.NDArray[np.int32]]


class WriterSource(Source[Span, Prompts]):
    """A loaded model that answers the prompts of a corpus."""

    def __init__(self, options: WriterSourceOptions, corpus: GeneratedCorpus) -> None:
        self.options, self.corpus, spec = options, corpus, corpus.spec
        self.tokenizer: Any = corpus.tokenizer()
        self.batch_tokens = options.batch_tokens
        shared = {
            "vocab_size": spec.vocab_size,
            "ends": spec.ends,
            "tokenizer": self.tokenizer,
        }
        self.writer: Writes
        if options.model.engine is not None:
            from kdcache.teacher.engine.model import EngineWriter

            self.writer = EngineWriter(options.model, spec.drawn, **shared)
        else:
            self.writer = Writer(
                options.model, spec.drawn, **shared, batch_tokens=options.batch_tokens
            )
        self.device, self.takes_turns = self.writer.device.type, self.writer.takes_turns

    def read(self, work: Span, steps: Steps) -> Prompts:
        """See `Source.read`."""
        return read_prompts(self.corpus, self.options.rows, self.tokenizer, work, steps)

    def make(self, work: Span, read: Prompts, steps: Steps, turn: Turn) -> ShardEntry:
        """See `Source.make`."""

        def done(tokens: int) -> None:
            if tokens:
                steps.batch(tokens)
            steps()

        with turn():
            steps.begin(len(read.ids) * self.corpus.spec.drawn.samples)
            answers = self.writer.write(work.index, read.ids, done)
        steps()
        return self.corpus.commit(
            work.index,
            read.ids,
            answers,
            self.tokenizer,
            skipped=read.skipped,
            filtered=read.filtered,
        )

    def close(self) -> None:
        """See `Source.close`."""
        self.writer.close()


def read_prompts(
    corpus: GeneratedCorpus, rows: RowSpec, tokenizer: Any, span: Span, steps: Steps
) -> Prompts:
    """The prompts of a span."""
    spec, stats = corpus.spec, ReadStats()
    longest = max(1, spec.max_length - spec.drawn.max_new_tokens)
    encoder = PromptEncoder(rows, tokenizer, longest, spec.prompt_tokens)
    records = Corpus.read(
        span, columns=rows.columns, on_error=rows.on_error, stats=stats, progress=steps
    )
    ids = [row.input_ids for row in encoder.encode(counted_records(records, steps))]
    return Prompts(
        ids=ids,
        skipped=stats.skipped + encoder.skipped + encoder.empty,
        filtered=stats.filtered if span.reading.filters else None,
        reasons=(*stats.reasons, *encoder.stats.reasons),
    )


@dataclass(frozen=True)
class GenerateDryRun:
    """What a generation would write.

    Attributes:
        state: what is there now: "nothing", "this generation" or "another generation".
        done: of them there already.
        prompts: in a sample of the prompts' files.
        prompt_tokens: mean tokens of a prompt of the sample.
    """

    corpus: str
    state: str
    model: str
    files: int
    spans: int
    done: int
    prompts: int
    prompt_tokens: float
    max_new_tokens: int
    samples: int
    device: str
    dtype: str
    fingerprint: str


def generate_dry(options: GenerateOptions) -> GenerateDryRun:
    """Describe a generation without running it.

    Raises:
        UsageError: the generation would refuse its options or input.
    """
    plan = plan_of(options)
    spec, source = plan.spec, plan.source
    assert isinstance(spec, GeneratedSpec), "it plans a generated corpus"
    assert isinstance(source, WriterSourceOptions), "it plans a generated corpus"
    storage = open_storage(options.out)
    state, done = "nothing", 0
    if storage.exists("spec.json"):
        there = GeneratedCorpus.resume(options.out)
        same = there.spec.fingerprint == spec.fingerprint
        state = "this generation" if same else "another generation"
        done = len(there.committed()) if same else 0
    from kdcache.pretrained import tokenizer_of

    try:
        tokenizer = tokenizer_of(plan.tokenizer_files)
    except UnreadableError as error:
        raise UsageError(f"the tokenizer of {options.model} cannot be kept: {error}.") from error
    first: Any = plan.spans[0]
    seen = read_prompts(
        GeneratedCorpus(storage, spec), source.rows, tokenizer, first, Steps(0, lambda: None)
    )
    return GenerateDryRun(
        corpus=redact(options.out),
        state=state,
        model=redact(options.model),
        files=len({span.file.url for span in plan.spans}),  # type: ignore[attr-defined]
        spans=spec.spans,
        done=done,
        prompts=len(seen.ids),
        prompt_tokens=float(np.mean([len(ids) for ids in seen.ids] or [0])),
        max_new_tokens=options.max_new_tokens,
        samples=options.samples,
        device="GPU" if plan.gpus else "CPU",
        dtype=spec.dtype,
        fingerprint=spec.fingerprint,
    )
