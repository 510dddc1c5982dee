"""`kdcache verify`: checks every file of a cache (`kdcache.cache.check`), and its targets against a
teacher: do they belong to it?

A few random rows go through the teacher again, twice: each by itself, and padded together. Their
logits are encoded as in the build, with the same noise, and compared with the cache's targets.
These can't be equal to the last bit, since other batches, machines and libraries round differently.
The tolerance is measured: the two live runs show how far rounding moves the logits, and noise of
that size, added to the logits of one of them, shows its effect on stored targets (in a top-k it
swaps ids, in a sample it draws others, and quantisation makes steps of all of it).

The difference of two targets is half the sum of the differences of their weights, which is 1 for
targets that share nothing, as a mean over the declared temperatures. For `dense` it is the root
mean square of the logits' differences over that of the logits themselves.

Cost: two forwards of the sampled rows, and six encodings of some positions of each.
Guarantee: the same arguments compare the same positions. Other weights, rows and targets that do
not belong together, or a coarser dtype than the spec's are found, unless their effect is smaller
than that of rounding.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from kdcache.cache import Cache
from kdcache.cache.check import problems
from kdcache.cache.spec import is_generated_at
from kdcache.commands.fidelity import Fidelity, fidelity
from kdcache.commands.options import VerifyOptions
from kdcache.errors import UsageError
from kdcache.rows import Row
from kdcache.rows.batches import batches
from kdcache.storage import open_storage
from kdcache.student.saved import pick_device
from kdcache.targets import (
    Codec,
    DenseTargets,
    HiddenTargets,
    SoftTargets,
    SparseTargets,
    TargetWriter,
    position_uniform,
)
from kdcache.tasks import TASKS
from kdcache.teacher import EngineOptions, Teacher, TeacherFiles, TeacherOptions, logits_at
from kdcache.teacher.probe import spread_of


@dataclass(frozen=True)
class VerifyResult:
    """The result of `verify`.

    Attributes:
        digest: SHA-256 of its manifest: names the exact bytes.
        problems: one line each; none where all is well.
        recheck: cached targets against live ones, if a teacher was named and files are intact.
        compared: the same of a generated corpus, in a sentence.
    """

    cache: str
    digest: str
    shards: int
    rows: int
    problems: tuple[str, ...]
    recheck: Recheck | None
    compared: str | None = None


def verify(options: VerifyOptions) -> VerifyResult:
    """Check every file of a cache and, if a teacher is named, some targets against it.

    Raises:
        UsageError: there is no cache, or the teachers cannot be those of the cache.
        IncompleteError: its build is unfinished.
        CorruptCacheError: its spec or manifest cannot be read.
    """
    storage = open_storage(options.cache)
    if storage.exists("spec.json") and is_generated_at(storage):
        return _verify_text(options)
    cache = Cache.open(options.cache)
    found = [problem.text for problem in problems(cache)]
    rechecked = None
    if options.teacher and not found:
        rechecked = recheck(
            cache,
            options.teacher,
            sample=options.sample,
            seed=options.seed,
            engine=_engine(options, cache),
            trust_remote_code=options.trust_remote_code,
        )
        found += rechecked.problems
    manifest = cache.manifest
    return VerifyResult(
        cache.url, cache.digest, len(manifest.shards), manifest.rows, tuple(found), rechecked
    )


def _verify_text(options: VerifyOptions) -> VerifyResult:
    """The same of a generated corpus, and of the model that wrote it."""
    from kdcache.cache.generated import GeneratedCorpus
    from kdcache.commands.generate.look import recheck_text

    corpus = GeneratedCorpus.open(options.cache)
    found, compared = [problem.text for problem in problems(corpus)], None
    if len(options.teacher) > 1:
        raise UsageError(f"{corpus.url} was written by one model. Name it alone with --teacher.")
    if options.teacher and not found:
        rows, worst, allowed = recheck_text(corpus, options)
        compared = f"{rows} answers scored again: log-probabilities differ by {worst:.2g} of the "
        compared += f"logits' spread at most; rounding explains {allowed:.2g}."
        found += [compared] if worst > allowed else []
    shards = corpus.manifest.shards
    return VerifyResult(
        corpus.url, corpus.digest, len(shards), corpus.manifest.rows, tuple(found), None, compared
    )


def _engine(options: VerifyOptions, cache: Cache) -> EngineOptions | None:
    """The engine that was asked for, else the one of the build, with its arguments where they are
    harmless.

    Raises:
        UsageError: it was built with others, which the user does not give again.
    """
    from kdcache.commands.build.prepare import engine_options

    built = cache.spec.engine or {}
    if options.engine == "transformers" or not (options.engine or built):
        return None
    asked = engine_options(options, cache.spec.max_length)
    args = {"quantization": built.get("quantization"), **built.get("args", {})}
    harmless = {name: args.pop(name) for name in [*args] if _is_harmless(name, args[name])}
    if others := sorted(args.keys() - asked.args.keys()):
        given = " ".join(f"--engine-arg {shlex.quote(f'{n}={_text(args[n])}')}" for n in others)
        raise UsageError(
            f"{cache.url} was built with arguments of the engine that a cache cannot decide, since "
            f"they may name code that runs: {', '.join(others)}. If you trust them, repeat them "
            f"({given}), or give others; or use --engine transformers."
        )
    quantization = asked.quantization or harmless.pop("quantization")
    return dataclasses.replace(asked, quantization=quantization, args={**harmless, **asked.args})


def _is_harmless(name: str, value: object) -> bool:
    """Whether an argument of an engine is a number or a word that chooses among its own ways."""
    plain = value is None or isinstance(value, (bool, int, float))
    return name in _HARMLESS and (plain or re.fullmatch(r"\w+", str(value)) is not None)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# That change what an engine computes, and are none of those that only decide its speed.
_HARMLESS = {
    *("quantization", "kv_cache_dtype", "calculate_kv_scales", "seed", "disable_sliding_window")
}


_LOGITS = 1 << 25  # numbers, of all positions that are compared
_TRIALS = 4
_SLACK = 2.0  # times the largest difference that rounding was seen to make
# Rounding in a model as a share of its logits, at least, since machines differ more than batches
# do: two kernels of attention gave 6e-7, 9e-4 and 8e-3 on a 6-layer encoder.
_ROUNDING = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
_BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}


@dataclass(frozen=True)
class Recheck:
    """The comparison of cached targets with those of a live teacher.

    Attributes:
        same_teacher: whether configuration and weights are those of the build.
        cached: mean difference between cached and live targets.
        live: mean difference between the targets of the two live runs.
        allowed: what rounding explains of `cached`.
        worst: largest mean difference of a row.
        worst_allowed: what rounding explains of `worst`.
        problems: one line each; none where rounding explains all.
        imported: whether another program wrote the targets.
        fidelity: of answers that are one distribution, the certificate at each temperature.
    """

    rows: int
    positions: int
    same_teacher: bool
    cached: float
    live: float
    allowed: float
    worst: float
    worst_allowed: float
    problems: tuple[str, ...]
    imported: bool = False
    fidelity: tuple[Fidelity, ...] = ()


@dataclass
class _Sample:
    """Rows of a cache with their targets at some positions.

    Attributes:
        rows: the rows.
        rows_of: shard, and number in it, of each.
        wanted: which of its positions, counted in the row, are compared.
        noise: float64 [positions], the noise of all of them.
        targets: what the cache holds of them.
    """

    rows: list[Row] = field(default_factory=list)
    rows_of: list[tuple[int, int]] = field(default_factory=list)
    wanted: list[np.ndarray] = field(default_factory=list)
    noise: list[np.ndarray] = field(default_factory=list)
    targets: list[SoftTargets] = field(default_factory=list)


def recheck(
    cache: Cache,
    teachers: Sequence[str],
    *,
    sample: int = 32,
    seed: int = 0,
    engine: EngineOptions | None = None,
    trust_remote_code: bool = False,
) -> Recheck:
    """Run the teachers of a cache again on some of its rows.

    Args:
        teachers: folder or hub id of each, in the order of the build.
        seed: of their choice, and of the choice of positions.
        engine: how vLLM runs the one teacher; None for transformers.

    Raises:
        UsageError: not as many teachers as the cache has, or they have other ids or classes.
    """
    spec = cache.spec
    files = [TeacherFiles.find(name, trust_remote_code=trust_remote_code) for name in teachers]
    _check_teachers(cache, files)
    rng = np.random.default_rng(seed)
    chosen = _choose(cache, sample, rng)
    device = pick_device("auto")
    options = TeacherOptions(
        names=tuple(teachers),
        task=spec.task,
        weights=tuple(float(teacher["weight"]) for teacher in spec.teachers),
        ensemble=spec.ensemble,
        temperatures=spec.temperatures,
        dtype=spec.dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        states=cache.codec().reads_states,
        engine=engine,
    )
    with closing(Teacher(options, spec.vocab_size)) as teacher:
        teacher.probe(chosen.rows)
        sizes = [row.sizes for row in chosen.rows]
        budget = max(_BATCH_TOKENS[device], 2 * max(map(sum, sizes)))
        codec = cache.codec()
        alone = _live(teacher, codec, chosen, [[i] for i in range(len(sizes))])
        together = _live(teacher, codec, chosen, list(batches(sizes, budget)))
        result = _compare(cache, chosen, files, alone, together, rng)
        if TASKS[spec.task].answers not in ("labels", "score"):
            held = SoftTargets.concat(chosen.targets)
            layer = teacher.layer
            read = {} if layer is None or not codec.reads_states else {"logits_of": layer.logits}
            found = [
                fidelity(logits_at(alone, spec.temperatures, (t,)).flatten(1), held.at(t), **read)
                for t in spec.temperatures
            ]
            result = replace(result, fidelity=tuple(found))
    if teacher.layer is not None and not teacher.layer.same(cache.output_layer):
        problem = (
            "the output layer of the cache is not this teacher's, so the logits that are rebuilt "
            "with it are wrong. Build the cache again."
        )
        return replace(result, problems=(problem, *result.problems))
    return result


def _check_teachers(cache: Cache, files: Sequence[TeacherFiles]) -> None:
    spec = cache.spec
    if len(files) != len(spec.teachers):
        raise UsageError(
            f"{cache.url} was built with {len(spec.teachers)} teachers, {len(files)} are named. "
            "Name each with a --teacher, in the order of the build."
        )
    for one in files:
        if TASKS[spec.task].named and one.label_names != spec.label_names:
            raise UsageError(
                f"{one.who} has the classes {one.label_names}, {cache.url} has "
                f"{spec.label_names}: it is not the teacher of this cache."
            )
        one.check_task(spec.task)
        if not TASKS[spec.task].over_ids:
            continue
        width = int(one.config.get_text_config().vocab_size)
        if width < spec.vocab_size:
            raise UsageError(
                f"{one.who} has {width} ids, the targets of {cache.url} have "
                f"{spec.vocab_size}: it is not the teacher of this cache."
            )


def _choose(cache: Cache, sample: int, rng: np.random.Generator) -> _Sample:
    spec = cache.spec
    ends = np.cumsum([entry.rows for entry in cache.manifest.shards])
    numbers = np.sort(rng.choice(ends[-1], min(sample, int(ends[-1])), replace=False))
    spans = np.searchsorted(ends, numbers, side="right")
    most = max(1, _LOGITS // (spec.vocab_size * len(numbers)))
    chosen = _Sample()
    for span in np.unique(spans).tolist():
        data = cache.read(span)
        first = int(ends[span]) - len(data)
        for index in (numbers[spans == span] - first).tolist():
            row = data.row(index)
            every = row.positions(spec.task)
            if not len(every):  # its teacher was sure of all of it
                continue
            some = np.sort(rng.choice(len(every), min(most, len(every)), replace=False))
            chosen.rows.append(row)
            chosen.rows_of.append((span, index))
            chosen.wanted.append(some)
            chosen.noise.append(position_uniform(spec.seed, span, index, every[some]))
            chosen.targets.append(data.targets.take(data.position_offsets[index] + some))
    if not chosen.rows:
        raise UsageError(
            f"none of the {len(numbers)} rows that were drawn has a soft target. Use a larger "
            "--sample."
        )
    return chosen


def _live(
    teacher: Teacher, codec: Codec, chosen: _Sample, groups: Sequence[Sequence[int]]
) -> Tensor:
    """What the codec reads of the wanted positions, row by row as they were chosen.

    Args:
        groups: numbers of the rows that make a batch.
    """
    found: dict[int, Tensor] = {}
    for group in groups:
        rows = [chosen.rows[i] for i in group]
        counts = [len(row.positions(teacher.options.task)) for row in rows]
        starts = np.cumsum(counts) - counts
        wanted = np.concatenate([chosen.wanted[i] + s for i, s in zip(group, starts, strict=True)])
        done, parts = 0, []
        for piece in teacher.slices(rows):
            values = piece.read_by(codec)
            here = wanted[(wanted >= done) & (wanted < done + len(values))] - done
            parts.append(values[torch.from_numpy(here).to(values.device)].float().cpu())
            done += len(values)
        sizes = [len(chosen.wanted[i]) for i in group]
        found.update(zip(group, torch.split(torch.cat(parts), sizes), strict=True))
    return torch.cat([found[i] for i in range(len(chosen.rows))])


def _compare(
    cache: Cache,
    chosen: _Sample,
    files: Sequence[TeacherFiles],
    alone: Tensor,
    together: Tensor,
    rng: np.random.Generator,
) -> Recheck:
    spec, writer = cache.spec, TargetWriter(cache.codec(), cache.rank_to_id)
    noise = torch.from_numpy(np.concatenate(chosen.noise))
    row_of = np.repeat(np.arange(len(chosen.rows)), [len(w) for w in chosen.wanted])
    scale = spread_of(alone)

    def stored(logits: Tensor) -> SoftTargets:
        return writer.write(logits, noise)

    def by_row(one: SoftTargets, other: SoftTargets) -> np.ndarray:
        each = _differences(one, other, spec.vocab_size, scale)
        return np.bincount(row_of, each) / np.bincount(row_of)

    held, live = SoftTargets.concat(chosen.targets), stored(alone)
    moved = (together - alone).square().mean(-1, keepdim=True).sqrt()
    moved = moved.clamp_min(max(float(moved.square().mean().sqrt()), _ROUNDING[spec.dtype] * scale))
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
    explained = [by_row(live, stored(together))]
    if "layout" in spec.reading:  # draws of another program are by other noise
        explained.append(
            by_row(live, writer.write(alone, torch.from_numpy(rng.random(len(alone)))))
        )
    for _ in range(_TRIALS):
        shaken = alone + moved * torch.randn(alone.shape, generator=generator)
        explained.append(by_row(live, stored(shaken)))
    found = by_row(live, held)
    allowed = _SLACK * max(float(rows.mean()) for rows in explained)
    worst_allowed = _SLACK * max(float(rows.max()) for rows in explained)
    same = tuple(one.sha256 for one in files) == tuple(t["sha256"] for t in spec.teachers)
    result = Recheck(
        rows=len(chosen.rows),
        positions=len(alone),
        same_teacher=same,
        cached=float(found.mean()),
        live=float(explained[0].mean()),
        allowed=allowed,
        worst=float(found.max()),
        worst_allowed=worst_allowed,
        problems=(),
        imported="layout" in spec.reading,
    )
    return replace(result, problems=tuple(_problems(result, chosen, found)))


def _differences(one: SoftTargets, other: SoftTargets, vocab_size: int, scale: float) -> np.ndarray:
    """How much the targets of each position differ, float64 [positions]."""
    sums = np.zeros(len(one))
    temperatures = one.codec.temperatures
    for temperature in temperatures:
        a, b = one.at(temperature), other.at(temperature)
        if isinstance(a, DenseTargets):
            assert isinstance(b, DenseTargets), "one codec makes one kind"
            return np.asarray((a.logits - b.logits).double().square().mean(1).sqrt() / scale)
        if isinstance(a, HiddenTargets):
            assert isinstance(b, HiddenTargets), "one codec makes one kind"
            moved = a.states.double() - b.states.double()
            return np.asarray(moved.square().mean(1).sqrt() / scale)
        assert isinstance(b, SparseTargets), "one codec makes one kind"
        apart = torch.zeros(len(one), vocab_size)
        apart.scatter_add_(1, a.ids, a.weights).scatter_add_(1, b.ids, -b.weights)
        sums += (apart.abs().sum(1).double() + (a.tail - b.tail).abs()).numpy() / 2
    return sums / len(temperatures)


def _problems(result: Recheck, chosen: _Sample, found: np.ndarray) -> list[str]:
    figures = (
        f"cached and live targets differ by {result.cached:.2g}, two live runs by "
        f"{result.live:.2g}, and rounding explains {result.allowed:.2g}"
    )
    if result.cached > result.allowed:
        whose = (
            "The teacher is the one of the build, so the cache is wrong"
            if result.same_teacher
            else "It is not the teacher of the build, or what they were imported from is biased"
            if result.imported
            else "The teacher is not the one of the build: its weights or configuration differ"
        )
        return [f"the targets are not those of this teacher: {figures}. {whose}."]
    if result.worst > result.worst_allowed:
        span, row = chosen.rows_of[int(found.argmax())]
        return [
            f"shard {span}, row {row}: its targets are not those of its tokens. They differ from "
            f"the teacher's by {result.worst:.2g}, and rounding explains "
            f"{result.worst_allowed:.2g}; of all rows, {figures}. Build the cache again."
        ]
    return []
