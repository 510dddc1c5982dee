"""`kdcache build --dry-run`: what a build would make, from options, corpus and headers.

Positions are estimated from a sample of the corpus, as `kdcache plan` does; no teacher is loaded.
Bytes come from the codec's rule of thumb and hours from the size of the weights: half or twice of
both is possible. `kdcache plan` measures them.

Cost: a listing of the corpus and a few hundred of its records. Guarantee: nothing is written.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from kdcache.cache import Cache
from kdcache.commands.build.build import measured_before
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.build.prepare import prepare
from kdcache.commands.plan.sample import DomainEstimate, sample_rows
from kdcache.storage import open_storage, redact
from kdcache.tasks import TASKS

_ROWS = 256  # of the sample
_ROW_BYTES = 1.5  # of a token's id, compressed
_KEPT_BYTES = {"label_logprob": 1.1, "entropy": 0.85}  # of a position, compressed
_TEXT_BYTES = 60.0  # of a classifier's row, which keeps its text


@dataclass(frozen=True)
class DryRun:
    """What a build would make.

    Attributes:
        cache: where.
        state: what is there now: "nothing", "this build" or "another build".
        teachers: their names.
        task: one of `kdcache.tasks.TASKS`.
        codec: its canonical text.
        temperatures: the declared ones.
        max_length: tokens of a row, at most.
        files: of the corpus.
        corpus_bytes: of them.
        spans: shards of the cache.
        done: of them there already.
        positions: in the whole corpus, about.
        bytes: of the whole cache, about.
        seconds: of the teacher on one worker for the whole corpus, very roughly.
        device: what the workers would compute on: "CPU" or "GPU".
        dtype: what they would compute in.
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
        same = mine.fingerprint == there.spec.fingerprint
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
