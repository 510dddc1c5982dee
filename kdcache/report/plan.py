"""`kdcache plan`: what a cache would cost and how good its targets would be, before it is built.

The teacher runs in this process on rows from all over the corpus. Each slice of logits goes through
every codec of the grid; the packed targets are written as a real shard, whose bytes are counted,
and some positions are compared with the full distribution (`kdcache.report.fidelity`).

*Hours* are positions of the corpus times the seconds that teacher and codec took a position here,
divided by the workers: workers like this process, nothing waiting for anything else.

*Break-even* is the number of students, one pass over the corpus each, from which on building a
cache and reading it costs less time than running the teacher beside every student. A student's step
is assumed to cost what the teacher's forward costs (forward and backward of a student a third of
its size), and decoding to go on behind that step: only what it takes longer counts.

Cost: one forward of the sample and, for each codec, an encoding of it; the comparison is made for
2,048 positions at most.
Guarantee: apart from the timings, the same command gives the same figures.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kdcache.builder import BuildOptions, Dtype, Prepared, prepare
from kdcache.corpus import OnError
from kdcache.errors import UsageError
from kdcache.ranks import ranks_of_ids, read_ranks
from kdcache.report.fidelity import Fidelity, FidelityMeter, FullGradient
from kdcache.report.sample import CorpusSample, sample_rows
from kdcache.rows import IGNORE, Form, Packing, Row, Task
from kdcache.shard import ShardData, column_bytes, read_shard, write_shard
from kdcache.storage import redact
from kdcache.targets import Codec, SoftTargets, position_uniform
from kdcache.teacher import Attention, Teacher, find_batch_tokens, peak_share
from kdcache.worker import batches

WORKERS = (1, 8, 64)
SMALL_SHARD = 100_000
"""Positions from which on a shard compresses as well as a large one."""

_COMPARED = 2048
_COMPARED_AT_ONCE = 64
_MOST_BYTES = 1 << 31
_CODECS = {
    "causal-lm": ("sample:10", "sample:20", "sample:40", "topk:16", "topk:64"),
    "sequence-classification": ("dense", "dense:float16"),
}

Report = Callable[[str], None]


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
    task: Task = "causal-lm"
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
    ensemble: Literal["mean-probs", "mean-logits"] = "mean-probs"
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


@dataclass(frozen=True)
class PlannedCache:
    """One codec with one set of declared temperatures.

    Attributes:
        codec: its canonical text.
        temperatures: the declared ones.
        entries: stored a position (for `dense` all ids).
        bytes_per_position: of the targets, on disk.
        row_bytes_per_position: of the rows themselves, on disk: the same for every codec.
        corpus_bytes: rows and targets of the whole corpus.
        encode_seconds: codec on the teacher's device, a position.
        read_seconds: reading and decoding on one core, a position.
        hours: of building the whole corpus, by number of workers.
        break_even: students from which on a cache costs less time than the teacher online; None
            where it never does.
        fidelity: at each declared temperature.
    """

    codec: str
    temperatures: tuple[float, ...]
    entries: float
    bytes_per_position: float
    row_bytes_per_position: float
    corpus_bytes: int
    encode_seconds: float
    read_seconds: float
    hours: dict[str, float]
    break_even: float | None
    fidelity: tuple[Fidelity, ...]


@dataclass(frozen=True)
class PlanResult:
    """The outcome of a plan.

    Attributes:
        teacher: the teachers' names.
        task: `causal-lm` or `sequence-classification`.
        vocab_size: ids or classes of a target.
        rows: in the sample.
        positions: in the sample.
        compared_positions: of them, compared with the full distribution.
        corpus_positions: in the whole corpus, estimated.
        device: what the teacher ran on.
        dtype: what it computed in.
        teacher_seconds: of its forward, a position.
        clipped_mass: mean probability that it gives to ids outside the vocabulary.
        caches: the grid.
        plot: where the plot is, or None.
    """

    teacher: tuple[str, ...]
    task: str
    vocab_size: int
    rows: int
    positions: int
    compared_positions: int
    corpus_positions: int
    device: str
    dtype: str
    teacher_seconds: float
    clipped_mass: float
    caches: tuple[PlannedCache, ...]
    plot: str | None


def plan(options: PlanOptions, *, report: Report | None = None) -> PlanResult:
    """Measure a grid of codecs on a sample of the corpus.

    Args:
        options: what to plan.
        report: called with a line on what is going on.

    Raises:
        UsageError: wrong options or input, or a sample that does not fit the memory.
    """
    report = report or (lambda line: None)
    prepared = prepare(options.build_options())
    vocab = prepared.spec.vocab_size
    codecs = _grid(options, vocab)
    sample = sample_rows(prepared.corpus, prepared.rows, prepared.tokenizer, options.rows)
    report(f"{len(sample.rows)} rows of {sample.records} records; loading the teacher")
    run = _Run(prepared, codecs, sample, find_batch=options.batch_tokens is None)
    run.check_memory()
    run.measure(report)
    with tempfile.TemporaryDirectory(prefix="kdcache-plan-") as folder:
        caches = tuple(run.cache(trial, Path(folder) / "shard.h5") for trial in run.trials)
    if options.plot is not None:
        from kdcache.report.plan_view import plot_plan

        names = ", ".join(Path(redact(name)).name for name in options.teacher)
        plot_plan(
            options.plot,
            caches,
            title=f"Targets of {names}: fidelity against bytes",
            positions=run.compared,
        )
    return PlanResult(
        teacher=tuple(redact(name) for name in options.teacher),
        task=options.task,
        vocab_size=vocab,
        rows=len(sample.rows),
        positions=run.positions,
        compared_positions=run.compared,
        corpus_positions=sample.corpus_positions,
        device=_device_name(run.teacher.device),
        dtype=prepared.spec.dtype,
        teacher_seconds=run.seconds / run.positions,
        clipped_mass=float(run.teacher.take_clipped_mass()) / run.positions,
        caches=caches,
        plot=options.plot,
    )


def _grid(options: PlanOptions, vocab: int) -> list[Codec]:
    codecs = [
        Codec.parse(text, temperatures, vocab)
        for temperatures in options.temperature_sets
        for text in options.codecs
    ]
    return list(dict.fromkeys(codecs))


@dataclass
class _Trial:
    """What one codec made of the sample so far."""

    codec: Codec
    ranks: tuple[np.ndarray, np.ndarray] | None
    parts: list[SoftTargets] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        drawn = self.codec.needs_noise
        self.meters = {t: FidelityMeter(drawn=drawn) for t in self.codec.temperatures}

    def add(self, logits: Tensor, u: Tensor, *, timed: bool = True) -> SoftTargets:
        begin = _now(logits.device)
        encoded = self.codec.encode(logits, u)
        if timed:
            self.seconds += _now(logits.device) - begin
        arrays = {name: tensor.cpu().numpy() for name, tensor in encoded.items()}
        bad = int((~arrays["finite"]).sum())
        if bad:
            raise UsageError(
                f"the teacher gives NaN or infinite logits at {bad} of {len(logits)} positions: "
                "nothing to plan with. Try --dtype float32, or check the model."
            )
        to_id, to_rank = self.ranks or (None, None)
        return SoftTargets(self.codec, self.codec.pack(arrays, to_rank), to_id)


class _Run:
    """The teacher's pass over the sample."""

    def __init__(
        self,
        prepared: Prepared,
        codecs: Sequence[Codec],
        sample: CorpusSample,
        *,
        find_batch: bool,
    ) -> None:
        self.prepared, self.sample = prepared, sample
        self._find_batch = find_batch
        self.causal = prepared.spec.task == "causal-lm"
        ranks = None
        if prepared.ranks:
            to_id = read_ranks(prepared.ranks, prepared.spec.vocab_size)
            ranks = (to_id, ranks_of_ids(to_id))
        self.trials = [_Trial(c, ranks if c.uses_ranks else None) for c in codecs]
        # The order of the rows is the same for batches of any size.
        self.rows = [
            sample.rows[i] for batch in self._batches(prepared.batch_tokens) for i in batch
        ]
        self.positions = sum(len(self._wanted(row)) for row in self.rows)
        self.compared = 0
        self.seconds = 0.0

    def _batches(self, tokens: int) -> list[list[int]]:
        return list(batches([len(row.input_ids) for row in self.sample.rows], tokens))

    def _wanted(self, row: Row) -> np.ndarray:
        return np.flatnonzero(row.labels != IGNORE) if self.causal else np.zeros(1, np.int64)

    def check_memory(self) -> None:
        """Refuse a sample whose dense targets would fill the memory."""
        for trial in self.trials:
            size = self.positions * sum(
                np.dtype(c.dtype).itemsize * math.prod(c.shape)
                for c in trial.codec.columns
                if c.per == "position"
            )
            if size > _MOST_BYTES:
                raise UsageError(
                    f"{trial.codec} takes {size / 1e9:.1f} GB for a sample of {self.positions:,} "
                    "positions. Use fewer --rows, or leave this --codec out."
                )

    def measure(self, report: Report) -> None:
        """Run the teacher over the sample and every codec over its logits."""
        self.teacher = Teacher(self.prepared.teacher, self.prepared.spec.vocab_size)
        cut = self._batches(self._batch_tokens())
        # Kernels are chosen and compiled at their first call: not what a long build is made of.
        self._try(cut[0] if self.prepared.teacher.compile else cut[-1][-1:])
        every = max(1, -(-self.positions // _COMPARED))
        at = done = 0
        for batch in cut:
            rows = [self.sample.rows[i] for i in batch]
            u = self._noise(batch)
            place = 0
            slices = iter(self.teacher.logits(rows))
            while (logits := self._next(slices)) is not None:
                piece = u[place : place + len(logits)]
                chosen = np.arange(-at % every, len(logits), every)
                made = [trial.add(logits, piece) for trial in self.trials]
                for trial, part in zip(self.trials, made, strict=True):
                    trial.parts.append(part)
                for start in range(0, len(chosen), _COMPARED_AT_ONCE):
                    self._compare(logits, made, chosen[start : start + _COMPARED_AT_ONCE])
                place += len(logits)
                at += len(logits)
            done += len(batch)
            report(f"teacher: {done} of {len(self.rows)} rows")

    def _batch_tokens(self) -> int:
        """What a build would find: the largest batch that fits a GPU."""
        most = self.prepared.batch_tokens
        if not self._find_batch or self.teacher.device.type != "cuda":
            return most
        return find_batch_tokens(
            lambda tokens: peak_share(lambda: self._try(self._batches(tokens)[0])),
            most,
            max(len(row.input_ids) for row in self.rows),
        )

    def _try(self, batch: Sequence[int]) -> None:
        """Run teacher and codecs over some rows, for nothing but their effects."""
        for logits in self.teacher.logits([self.sample.rows[i] for i in batch]):
            u = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
            for trial in self.trials:
                trial.add(logits, u, timed=False)
        self.teacher.take_clipped_mass()

    def _next(self, slices: object) -> Tensor | None:
        begin = _now(self.teacher.device)
        logits: Tensor | None = next(slices, None)  # type: ignore[call-overload]
        self.seconds += _now(self.teacher.device) - begin
        return logits

    def _noise(self, batch: Sequence[int]) -> Tensor:
        """The numbers of a build with seed 0."""
        parts = [
            position_uniform(0, *self.sample.places[i], self._wanted(self.sample.rows[i]))
            for i in batch
        ]
        u = np.concatenate(parts)
        return torch.from_numpy(u).to(self.teacher.device)

    def _compare(self, logits: Tensor, made: Sequence[SoftTargets], chosen: np.ndarray) -> None:
        """Hold what was stored of some positions of a slice against all of their logits."""
        here = logits[torch.from_numpy(chosen).to(logits.device)]
        taken = [part.take(chosen) for part in made]
        for t in sorted({t for trial in self.trials for t in trial.codec.temperatures}):
            # One student for all temperatures and codecs.
            full = FullGradient(here, t, torch.Generator().manual_seed(self.compared))
            for trial, targets in zip(self.trials, taken, strict=True):
                if t in trial.meters:
                    trial.meters[t].add(full, targets.at(t).to(here.device))
        self.compared += len(chosen)

    def cache(self, trial: _Trial, path: Path) -> PlannedCache:
        """Write the sample with one codec and put its figures together."""
        targets = SoftTargets.concat(trial.parts)
        trial.parts.clear()
        data = ShardData.from_rows(self.prepared.spec.task, self.rows, targets)
        write_shard(path, data, attributes={})
        sizes = column_bytes(path)
        of_rows = sum(n for name, n in sizes.items() if name.startswith("rows/")) / self.positions
        of_targets = sum(sizes.values()) / self.positions - of_rows
        begin = time.perf_counter()
        read_shard(path, trial.codec, ranks=targets.rank_to_id).targets.at(
            trial.codec.temperatures[0]
        )
        read = (time.perf_counter() - begin) / self.positions
        teacher = self.seconds / self.positions
        encode = trial.seconds / self.positions
        hours = self.sample.corpus_positions * (teacher + encode) / 3600
        return PlannedCache(
            codec=str(trial.codec),
            temperatures=trial.codec.temperatures,
            entries=_entries(targets),
            bytes_per_position=of_targets,
            row_bytes_per_position=of_rows,
            corpus_bytes=round(self.sample.corpus_positions * (of_rows + of_targets)),
            encode_seconds=encode,
            read_seconds=read,
            hours={str(n): hours / n for n in WORKERS},
            break_even=break_even(teacher, encode, read),
            fidelity=tuple(meter.result() for meter in trial.meters.values()),
        )


def break_even(teacher: float, encode: float, read: float) -> float | None:
    """Students from which on a cache costs less than the teacher online; see the module's text.

    Args:
        teacher: seconds a position of its forward, and, by assumption, of a student's step.
        encode: of the codec.
        read: of reading and decoding.
    """
    waiting = max(0.0, read - teacher)
    return (teacher + encode) / (teacher - waiting) if waiting < teacher else None


def _entries(targets: SoftTargets) -> float:
    counts = targets.codec.counts(targets.columns)
    if counts:
        return float(sum(n.sum() for n in counts.values()) / len(targets))
    return float(math.prod(targets.codec.columns[0].shape))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
