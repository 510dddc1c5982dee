"""`kdcache build`: runs the teacher over a corpus once and seals the cache.

options -> spans of the corpus -> teacher's identity -> CacheSpec -> `make_cache`

Resume: checks that the shards of an earlier run belong to the corpus as it is now.

The first run of a build records the version of every file (its time of change, or its ETag) in
`events/corpus.json`, which is not part of the cache: the same corpus makes the same cache wherever
it is. If a later run finds another version, but the same size and ends, the file was copied or its
middle was edited. A shard holds its rows, so the records of each span are read and encoded again
and compared with them, without the teacher.

Cost: none while no file has changed; otherwise reading and tokenising the committed spans of those
that have.

The teacher's output layer, for targets that are hidden states: made once, before the first span.

The teacher is loaded once more for it: in this process, or on a node of the cluster where the build
runs on one. Its layer is found and proved (`kdcache.teacher.probe`), and for `hidden:int8`
the means and deviations of its states' channels are measured on a sample of the corpus. Then all
workers read the layer from the cache: the bytes of a cache do not depend on them.

Cost: loading the teacher, and some 8,000 tokens for `int8`. A build that is resumed takes the layer
that is there.
Guarantee: on one kind of machine the layer is a pure function of the teacher, the corpus and the
row options. On another kind the measured means may differ in their last digits; that makes another
cache, and never a mixed one, since the spec has the hash of the file.

A dry run describes a build from options, corpus and headers. Positions are estimated from a sample
of the corpus, as `kdcache plan` does; no teacher is loaded. Bytes come from the codec's rule of
thumb and hours from the size of the weights: half or twice of both is possible. It costs a listing
of the corpus and a few hundred of its records, and nothing is written.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kdcache.cache import Cache, CacheSpec, sealing
from kdcache.cache.cache import layer_bytes
from kdcache.cache.store import ShardStore
from kdcache.cluster import Need, cluster_address
from kdcache.commands.build.driver import Progress
from kdcache.commands.build.make import BuildResult, ShardPlan, make_cache
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.build.prepare import Prepared, prepare, sampled_rows
from kdcache.commands.build.source import TeacherSourceOptions
from kdcache.commands.plan.sample import DomainEstimate, sample_rows
from kdcache.corpus import Corpus, Span
from kdcache.corpus.stored import stored
from kdcache.errors import UsageError
from kdcache.humanize import counted
from kdcache.pretrained import tokenizer_files
from kdcache.rows import Row, RowSpec, make_encoder
from kdcache.rows.batches import batches, documents_of
from kdcache.storage import open_storage, redact
from kdcache.targets import Hidden, OutputLayer
from kdcache.targets.device import of_positions
from kdcache.targets.label_logprob import encode_entropies
from kdcache.tasks import TASKS
from kdcache.teacher import Slice, Teacher, TeacherOptions
from kdcache.teacher.memory import logits_at

logger = logging.getLogger(__name__)


_FILE = "events/corpus.json"


def check_made(
    store: ShardStore[Any], corpus: Corpus, same: Callable[[Any, Span, str], bool]
) -> None:
    """Compare the committed shards of files that were written to since the first run.

    Args:
        same: by tokenizer, span and name of a shard, whether that is what its span makes now.

    Raises:
        UsageError: a shard was made of something else.
    """
    job = "build" if isinstance(store, Cache) else "generation"
    now = json.dumps([file.versions for file in corpus.files]).encode()
    if store.sealed or store.storage.create(_FILE, now):
        return
    noted = json.loads(store.storage.read(_FILE))
    then = zip(corpus.files, noted, strict=True)
    changed = {file.url for file, version in then if file.versions != version}
    made = store.committed() if changed else {}
    spans = [
        span for span in map(corpus.spans.__getitem__, sorted(made)) if span.file.url in changed
    ]
    if spans:
        logger.warning(
            "%d files were written to since this %s began: comparing %d shards with them",
            len(changed),
            job,
            len(spans),
        )
    tokenizer = store.tokenizer() if spans else None
    for span in spans:
        try:
            kept = same(tokenizer, span, made[span.index])
        except UsageError:  # such records were never made into a shard
            kept = False
        if not kept:
            raise UsageError(
                f"{redact(span.file.url)}: the file was changed since this {job} began: "
                f"shard {span.index} was made of other text. Restore the file and run the same "
                "command again, or choose another folder for the new text."
            )


def _same_rows(cache: Cache, rows: RowSpec, tokenizer: Any, span: Span, name: str) -> bool:
    """Whether a shard has the rows of its span."""
    records = Corpus.read(span, columns=rows.columns, on_error=rows.on_error)
    found = list(make_encoder(rows, tokenizer).encode(records, span=span.index))
    entry = sealing.shard_entry(cache, span.index, name)
    with cache.hold(entry) as path:
        data = cache.parse(path, entry, targets=False)
    if data.hard_labels is not None:
        from kdcache.cache.unsure import every_label

        data = every_label(data)
    return len(data) == len(found) and all(
        np.array_equal(getattr(row, name), getattr(data.row(i), name))
        for i, row in enumerate(found)
        for name in ("input_ids", "labels", "starts", "source")
    )


_TOKENS = 1 << 13


def with_measured(
    options: BuildOptions, plan: Prepared, report: Callable[[str], None] = lambda line: None
) -> Prepared:
    """A build's plan with what the teacher is asked before the first shard: its output layer, where
    the codec needs one, and how unsure it must be, where targets are of some positions alone.

    Raises:
        UsageError: the teacher's logits are not its output layer's alone.
    """
    codec, positions = plan.spec.make_codec(), plan.spec.positions
    if not isinstance(codec, Hidden) and positions is None:
        return plan
    adopted = measured_before(options.out, plan.spec)
    if adopted is not None:
        return dataclasses.replace(plan, spec=adopted)
    channels = isinstance(codec, Hidden) and codec.needs_channels
    rows = _sample(plan) if positions is not None or channels else []
    if positions is not None:
        report("loading the teacher to measure its entropy, once before the first shard")
        code = _once(options, plan, measured_code, rows, report, positions["share"])
        found = {"share": positions["share"], "entropy_code": code}
        plan = dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, positions=found))
    if not isinstance(codec, Hidden):
        return plan
    report("loading the teacher for its output layer, once before the first shard")
    made = _once(options, plan, make_layer, rows if channels else [], report)
    sha256 = hashlib.sha256(made).hexdigest()
    spec = dataclasses.replace(plan.spec, output_layer=sha256)
    return dataclasses.replace(plan, spec=spec, output_layer=made)


def _once(
    options: BuildOptions,
    plan: Prepared,
    function: Callable[..., Any],
    rows: Sequence[Row],
    report: Callable[[str], None],
    *more: Any,
) -> Any:
    """Have a function ask the teacher about rows, where a worker would be."""
    arguments = (plan.teacher, plan.spec.vocab_size, rows, plan.batch_tokens, *more)
    if not options.without_ray and cluster_address(options.address):
        from kdcache.commands.build.on_ray import run_once

        need = Need(plan.gpus, across=plan.across)
        return run_once(function, *arguments, need=need, address=options.address)
    made = function(*arguments, report=report)
    torch.cuda.empty_cache()  # the workers' teachers need the room
    return made


def measured_code(
    teacher: TeacherOptions,
    vocab_size: int,
    rows: Sequence[Row],
    batch_tokens: int,
    share: float,
    report: Callable[[str], None] = lambda line: None,
) -> int:
    """The code of a teacher's entropy that a share of the positions of rows reach.

    Args:
        rows: of the corpus.
        share: of the positions.
    """
    from kdcache.cache.unsure import code_of_share

    codes = [np.zeros(0, np.uint8)]
    if not rows:  # the build finds out why
        return 0
    with closing(Teacher(teacher, vocab_size)) as one:
        one.probe(rows)
        rows = documents_of(rows)  # as the build asks about them
        for piece in _answers(one, rows, batch_tokens, "its entropy", report):
            logits = logits_at(piece.logits, teacher.temperatures, (1.0,))
            none = torch.zeros(len(logits), dtype=torch.int64)
            found = of_positions(logits, none, entropy=True)["entropy"].cpu().numpy()
            # Logits that are not finite are refused where their span is built.
            codes.append(encode_entropies(np.nan_to_num(found), np.full(len(found), 0.5)))
    return code_of_share(np.concatenate(codes), share)


def make_layer(
    teacher: TeacherOptions,
    vocab_size: int,
    rows: Sequence[Row],
    batch_tokens: int,
    report: Callable[[str], None] = lambda line: None,
) -> bytes:
    """The file of a teacher's output layer.

    Args:
        rows: by which to measure the channels; none to leave that out.
    """
    ids = np.arange(16, dtype=np.int32) % vocab_size
    with closing(Teacher(teacher, vocab_size)) as one:
        source = ids if TASKS[teacher.task].source else None
        one.probe(rows or [Row(ids, ids, source=source)])
        assert one.layer is not None, "states are asked for"
        layer = one.layer
        return layer_bytes(measured(one, layer, rows, batch_tokens, report) if rows else layer)


def measured(
    teacher: Teacher,
    layer: OutputLayer,
    rows: Sequence[Row],
    batch_tokens: int,
    report: Callable[[str], None] = lambda line: None,
) -> OutputLayer:
    """A layer with the means and units of its channels, by the states of some rows."""
    count, sums = 0, torch.zeros(2, layer.width, dtype=torch.float64)
    for piece in _answers(teacher, rows, batch_tokens, "the channels of its states", report):
        assert piece.states is not None, "they are asked for"
        x = piece.states.double()
        sums += torch.stack([x.sum(0), x.square().sum(0)]).cpu()
        count += len(x)
    mean, square = sums / max(count, 1)
    return layer.with_channels(mean, (square - mean.square()).clamp_min(0).sqrt())


def _answers(
    teacher: Teacher,
    rows: Sequence[Row],
    batch_tokens: int,
    what: str,
    report: Callable[[str], None],
) -> Iterator[Slice]:
    done = 0
    for batch in batches([row.sizes for row in rows], batch_tokens):
        yield from teacher.slices([rows[i] for i in batch])
        done += len(batch)
        report(f"measuring {what}: {done:,} of {counted(len(rows), 'row')}")


def measured_before(out: str, spec: CacheSpec) -> CacheSpec | None:
    """The spec of a cache that this build resumes, with what was measured, if there is one."""
    storage = open_storage(out)
    if not storage.exists("spec.json"):
        return None
    there = Cache.read_spec(storage).spec
    sha256, positions = there.output_layer, there.positions
    if (positions or {}).get("share") != (spec.positions or {}).get("share"):
        return None
    found = dataclasses.replace(spec, output_layer=sha256, positions=positions)
    here = sha256 is None or storage.exists(f"output_layer-{sha256[:16]}.safetensors")
    hidden = isinstance(spec.make_codec(), Hidden)
    same = hidden == (sha256 is not None) and not there.differences(found.in_form_of(there))
    return found if here and same else None


def _sample(plan: Prepared) -> list[Row]:
    """Rows from all over the corpus, of some 8,000 tokens together."""
    rows = list(sampled_rows(plan.corpus, plan.rows, plan.tokenizer))
    tokens = sum(sum(row.sizes) for row in rows)
    wanted = min(len(rows), max(1, len(rows) * _TOKENS // max(tokens, 1)))
    return [rows[i * len(rows) // wanted] for i in range(wanted)]


def build(
    options: BuildOptions,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> BuildResult:
    """Make a cache, or finish an interrupted one.

    Args:
        options: what to build. `corpus` may be a `Dataset` of the library `datasets`, whose rows
            are written to the folder `OUT.corpus`.
        on_progress: called in this thread, a few times a second at most.
        report: takes a line about what is done before the first progress.

    Raises:
        UsageError: wrong options or input; nothing was written that a later run would trust.
        IncompleteError: interrupted, no space left, or spans set aside; the same command resumes.
    """
    if options.dry_run:
        raise UsageError("dry_run is for kdcache.dry_run, which describes a build.")
    return make_cache(
        functools.partial(_plan, options, report), options.out, options, on_progress, report
    )


def _plan(options: BuildOptions, report: Callable[[str], None]) -> ShardPlan:
    options = replace(options, corpus=stored(options.corpus, options.out))
    prepared = with_measured(options, prepare(options), report)
    return ShardPlan(
        prepared.spec,
        tokenizer_files(prepared.tokenizer),
        prepared.ranks,
        {"teachers": [redact(name) for name in options.teacher]},
        prepared.corpus.spans,
        TeacherSourceOptions(
            prepared.rows,
            prepared.teacher,
            prepared.batch_tokens,
            find_batch=prepared.find_batch,
        ),
        prepared.gpus,
        prepared.span_seconds,
        prepared.across,
        check_made=lambda cache: check_made(
            cache, prepared.corpus, functools.partial(_same_rows, cache, prepared.rows)
        ),
        check_end=prepared.corpus.check_unchanged,
        output_layer=prepared.output_layer,
    )


_ROWS = 256  # of the sample
_ROW_BYTES = 1.5  # of a token's id, compressed
_KEPT_BYTES = {"label_logprob": 1.1, "entropy": 0.85}  # of a position, compressed
_TEXT_BYTES = 60.0  # of a classifier's row, which keeps its text


@dataclass(frozen=True)
class DryRun:
    """What a build would make.

    Attributes:
        state: what is there now: "nothing", "this build" or "another build".
        teachers: their names.
        done: of them there already.
        positions: in the whole corpus, about.
        bytes: of the whole cache, about.
        seconds: of the teacher on one worker for the whole corpus, very roughly.
        device: what the workers would compute on: "CPU" or "GPU".
        fingerprint: of the spec; None where a build asks the teacher first: for its output layer,
            or for the entropy from which on it is unsure.
        filtered: about the share of records that filters leave out; None where there are none.
        domains: of the corpus, where it has names: files, bytes, spans and positions of each.
    """

    cache: str
    state: str
    teachers: tuple[str, ...]
    task: str
    codec: str
    temperatures: tuple[float, ...]
    max_length: int
    files: int
    corpus_bytes: int
    spans: int
    done: int
    positions: int
    bytes: int
    seconds: float
    device: str
    dtype: str
    fingerprint: str | None
    filtered: float | None = None
    domains: tuple[DomainEstimate, ...] = ()


def dry_run(options: BuildOptions) -> DryRun:
    """Describe a build without running it.

    Raises:
        UsageError: the build would refuse its options or input.
    """
    prepared = prepare(options)
    spec, codec = prepared.spec, prepared.spec.make_codec()
    sample = sample_rows(prepared.corpus, prepared.rows, prepared.tokenizer, _ROWS)
    tokens = sum(len(row.input_ids) for row in sample.rows)
    sampled = sum(len(row.positions(options.task)) for row in sample.rows)
    tokens_each = tokens / max(1, sampled)
    rows_bytes = _ROW_BYTES * tokens_each + _TEXT_BYTES * TASKS[options.task].texts
    rows_bytes += sum(_KEPT_BYTES.get(name, 0) for name in spec.kept)
    positions = sample.corpus_positions
    share = 1.0 if spec.positions is None else spec.positions["share"]
    storage = open_storage(options.out)
    state, done = "nothing", 0
    if storage.exists("spec.json"):
        there = Cache.resume(options.out)
        # The output layer, and the entropy from which on a teacher is unsure, are found by a build
        # before its first span.
        mine = dataclasses.replace(spec, output_layer=there.spec.output_layer)
        if spec.positions is not None:
            mine = measured_before(options.out, spec) or spec
        same = mine.in_form_of(there.spec).fingerprint == there.spec.fingerprint
        state, done = ("this build", len(there.committed())) if same else ("another build", 0)
    return DryRun(
        cache=redact(options.out),
        state=state,
        teachers=tuple(redact(name) for name in options.teacher),
        task=options.task,
        codec=str(codec),
        temperatures=spec.temperatures,
        max_length=prepared.rows.max_length,
        files=len(prepared.corpus.files),
        corpus_bytes=sum(file.size for file in prepared.corpus.files),
        spans=spec.spans,
        done=done,
        positions=positions,
        bytes=round(positions * (share * codec.bytes_per_position + rows_bytes)),
        seconds=positions * tokens_each * prepared.token_seconds,
        device="GPU" if prepared.gpus else "CPU",
        dtype=spec.dtype,
        fingerprint=None if codec.reads_states or spec.positions else spec.fingerprint,
        filtered=sample.filtered,
        domains=sample.domains,
    )
