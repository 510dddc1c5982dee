"""`kdcache plan`: one pass of the teacher over a sample, and every codec on its logits."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.cache.shard import ShardData, column_bytes, read_shard, write_shard
from kdcache.commands.build.build import measured
from kdcache.commands.build.packer import codes_of
from kdcache.commands.build.prepare import Prepared, check_answers, check_ensemble, prepare
from kdcache.commands.options import PlanOptions
from kdcache.commands.plan.fidelity import FAR, NEAR, FidelityMeter, FullGradient
from kdcache.commands.plan.result import WORKERS, PlannedCache, PlanResult, advice, break_even
from kdcache.commands.plan.sample import CorpusSample, sample_rows
from kdcache.errors import UsageError
from kdcache.humanize import counted
from kdcache.rows import Row
from kdcache.rows.batches import batches
from kdcache.storage import redact
from kdcache.targets import Codec, Hidden, SoftTargets, TargetWriter, position_uniform
from kdcache.targets.device import of_positions
from kdcache.targets.soft import read_ranks
from kdcache.tasks import TASKS
from kdcache.teacher import Slice, Teacher, find_batch_tokens, logits_at, peak_share

_COMPARED = 2048  # positions, at most
_COMPARED_AT_ONCE = 64
_MOST_BYTES = 1 << 31  # of the targets of one codec

Report = Callable[[str], None]


@dataclass
class _Trial:
    """One codec's encoding of the sample so far."""

    writer: TargetWriter
    parts: list[SoftTargets] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.codec: Codec = self.writer.codec
        drawn = self.codec.needs_noise
        self.meters = {t: FidelityMeter(drawn=drawn) for t in self.codec.temperatures}

    def add(self, values: Tensor, u: Tensor, *, timed: bool = True) -> SoftTargets:
        started = _now(values.device)
        encoded = self.codec.encode(values, u)
        if timed:
            self.seconds += _now(values.device) - started
        host = {name: tensor.cpu() for name, tensor in encoded.items()}
        bad = int((~host["finite"]).sum())
        if bad:
            raise UsageError(
                f"the teacher gives NaN or infinite logits at {bad} of {len(values)} positions: "
                "nothing to plan with. Try --dtype float32, or check the model."
            )
        return self.writer.pack(host)


class SamplePass:
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
        table, size = prepared.ranks, prepared.spec.vocab_size
        ranks = read_ranks(table, size) if table else None
        self.trials = [
            _Trial(TargetWriter(codec, ranks if codec.uses_ranks else None)) for codec in codecs
        ]
        self.temperatures = tuple(sorted({t for codec in codecs for t in codec.temperatures}))
        self.labels = prepared.spec.label_logprob  # these are at T = 1
        self.made_for = tuple(sorted({*self.temperatures, *([1.0] if self.labels else [])}))
        self.kept: list[dict[str, np.ndarray]] = []
        # The order of the rows is the same for batches of any size.
        self.rows = [
            sample.rows[i] for batch in self._batches(prepared.batch_tokens) for i in batch
        ]
        self.positions = sum(len(self._positions_of(row)) for row in self.rows)
        self.compared = 0
        self.seconds = 0.0

    def _batches(self, tokens: int) -> list[list[int]]:
        return list(batches([row.sizes for row in self.sample.rows], tokens))

    def _positions_of(self, row: Row) -> np.ndarray:
        return row.positions(self.prepared.spec.task)

    def _check_memory(self) -> None:
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
        states = any(trial.codec.reads_states for trial in self.trials)
        options = replace(self.prepared.teacher, temperatures=self.made_for, states=states)
        self.teacher = Teacher(options, self.prepared.spec.vocab_size)
        with closing(self.teacher):
            self._measure(report)

    def _measure(self, report: Report) -> None:
        self.teacher.probe(self.sample.rows)
        self._give_layer()
        self._check_memory()
        cut = self._batches(self._batch_tokens())
        # Kernels are chosen and compiled at their first call: not what a long build is made of.
        self._try(cut[0] if self.prepared.teacher.compile else cut[-1][-1:])
        every = max(1, -(-self.positions // _COMPARED))
        at = done = 0
        for batch in cut:
            rows = [self.sample.rows[i] for i in batch]
            u = self._noise(batch)
            if self.labels:
                labels = np.concatenate([row.labels[self._positions_of(row)] for row in rows])
            first = 0
            slices = self.teacher.slices(rows)
            while (found := self._next(slices)) is not None:
                logits = found.logits
                piece = u[first : first + len(logits)]
                chosen = np.arange(-at % every, len(logits), every)
                if self.labels:
                    some = torch.from_numpy(labels[first : first + len(logits)].astype(np.int64))
                    at_one = logits_at(logits, self.made_for, (1.0,))
                    values = of_positions(at_one, some, entropy=self.prepared.spec.entropy)
                    noise = partial(self._noise_of, batch, slice(first, first + len(logits)))
                    self.kept.append(codes_of({n: v.cpu() for n, v in values.items()}, noise))
                made = [trial.add(self._of(found, trial), piece) for trial in self.trials]
                for trial, part in zip(self.trials, made, strict=True):
                    trial.parts.append(part)
                for start in range(0, len(chosen), _COMPARED_AT_ONCE):
                    self._compare(logits, made, chosen[start : start + _COMPARED_AT_ONCE])
                first += len(logits)
                at += len(logits)
            done += len(batch)
            report(f"teacher: {done} of {len(self.rows)} rows")

    def _of(self, piece: Slice, trial: _Trial) -> Tensor:
        values = piece.read_by(trial.codec)
        return logits_at(values, self.made_for, trial.codec.temperatures)

    def _give_layer(self) -> None:
        """Give codecs of hidden states the teacher's output layer, as a build does."""
        layer = self.teacher.layer
        if layer is None:
            return
        for trial in self.trials:
            if isinstance(trial.codec, Hidden):
                if trial.codec.needs_channels and layer.mean is None:
                    most = self.prepared.batch_tokens
                    layer = measured(self.teacher, layer, self.sample.rows, most)
                trial.codec = trial.codec.with_layer(layer)
                trial.writer = TargetWriter(trial.codec)

    def _batch_tokens(self) -> int:
        """What a build would find: the largest batch that fits a GPU."""
        most = self.prepared.batch_tokens
        if not self._find_batch or self.teacher.device.type != "cuda":
            return most
        return find_batch_tokens(
            lambda tokens: peak_share(
                lambda: self._try(self._batches(tokens)[0]), self.teacher.gpus
            ),
            most,
            max(sum(row.sizes) for row in self.rows),
        )

    def _try(self, batch: Sequence[int]) -> None:
        """Run teacher and codecs over some rows and discard the results."""
        for piece in self.teacher.slices([self.sample.rows[i] for i in batch]):
            u = torch.zeros(len(piece.logits), dtype=torch.float64, device=piece.logits.device)
            for trial in self.trials:
                trial.add(self._of(piece, trial), u, timed=False)
        self.teacher.take_clipped_mass()

    def _next(self, slices: Iterator[Slice]) -> Slice | None:
        started = _now(self.teacher.device)
        found = next(slices, None)
        self.seconds += _now(self.teacher.device) - started
        return found

    def _noise(self, batch: Sequence[int]) -> Tensor:
        """The codec's numbers, on the device."""
        return torch.from_numpy(self._noise_of(batch, slice(None))).to(self.teacher.device)

    def _noise_of(self, batch: Sequence[int], piece: slice, **which: Any) -> np.ndarray:
        """The numbers of some positions in a build with seed 0; see `position_uniform`."""
        rows = [(*self.sample.origins[i], self._positions_of(self.sample.rows[i])) for i in batch]
        return np.concatenate([position_uniform(0, *row, **which) for row in rows])[piece]

    def _compare(self, logits: Tensor, made: Sequence[SoftTargets], chosen: np.ndarray) -> None:
        """Compare the stored targets of some positions of a slice with all of their logits."""
        here = logits[torch.from_numpy(chosen).to(logits.device)]
        taken = [part.take(chosen) for part in made]
        answers = TASKS[self.prepared.spec.task].answers
        for t in self.temperatures:
            # The same two students for all codecs.
            whole = logits_at(here, self.made_for, (t,)).reshape(len(here), -1)
            full, near = (
                FullGradient(
                    whole, t, torch.Generator().manual_seed(self.compared), student, answers
                )
                for student in (FAR, NEAR)
            )
            for trial, targets in zip(self.trials, taken, strict=True):
                if t in trial.meters:
                    trial.meters[t].add(full, near, targets.at(t).to(here.device))
        self.compared += len(chosen)

    def cache(self, trial: _Trial, path: Path) -> PlannedCache:
        """Write the sample with one codec and collect its figures."""
        targets = SoftTargets.concat(trial.parts)
        trial.parts.clear()
        names = self.kept[0].keys() & self.prepared.spec.kept if self.kept else ()
        kept = {name: np.concatenate([part[name] for part in self.kept]) for name in names}
        data = ShardData.from_rows(self.prepared.spec.task, self.rows, targets, **kept)
        write_shard(path, data, attributes={})
        sizes = column_bytes(path)
        overhead = path.stat().st_size - sum(sizes.values())
        of_rows = sum(n for name, n in sizes.items() if name.startswith("rows/")) / self.positions
        of_targets = sum(sizes.values()) / self.positions - of_rows
        started = time.perf_counter()
        read_shard(
            path,
            trial.codec,
            ranks=targets.rank_to_id,
            kept=self.prepared.spec.kept,
        ).targets.at(trial.codec.temperatures[0])
        read = (time.perf_counter() - started) / self.positions
        teacher = self.seconds / self.positions
        encode = trial.seconds / self.positions
        hours = self.sample.corpus_positions * (teacher + encode) / 3600
        return PlannedCache(
            codec=str(trial.codec),
            temperatures=trial.codec.temperatures,
            entries=_entries(targets),
            bytes_per_position=of_targets,
            row_bytes_per_position=of_rows,
            shard_bytes=overhead,
            corpus_bytes=round(self.sample.corpus_positions * (of_rows + of_targets))
            + self.prepared.spec.spans * overhead,
            encode_seconds=encode,
            read_seconds=read,
            hours={str(n): hours / n for n in WORKERS},
            break_even=break_even(teacher, encode, read),
            fidelity=tuple(meter.result() for meter in trial.meters.values()),
        )


def _entries(targets: SoftTargets) -> float:
    counts = targets.codec.counts(targets.columns)
    if counts:
        return float(sum(n.sum() for n in counts.values()) / len(targets))
    return float(math.prod(targets.codec.columns[0].shape))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def plan(options: PlanOptions, *, report: Report | None = None) -> PlanResult:
    """Measure a grid of codecs on a sample of the corpus.

    Args:
        report: called with a line on the current step.

    Raises:
        UsageError: wrong options or input, or a sample that does not fit the memory.
    """
    report = report or (lambda line: None)
    options.check_plot()
    prepared = prepare(options.build_options())
    vocab = prepared.spec.vocab_size
    codecs = _grid(options, vocab)
    sample = sample_rows(prepared.corpus, prepared.rows, prepared.tokenizer, options.rows)
    report(f"{len(sample.rows)} rows of {sample.records} records; loading the teacher")
    run = SamplePass(prepared, codecs, sample, find_batch=prepared.find_batch)
    run.measure(report)
    with tempfile.TemporaryDirectory(prefix="kdcache-plan-") as folder:
        caches = tuple(run.cache(trial, Path(folder) / "shard.h5") for trial in run.trials)
    if options.plot is not None:
        from kdcache.commands.plan.result import plot_plan

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
        shards=prepared.spec.spans,
        advice=advice(caches, sample.corpus_positions, run.teacher.device.type),
        caches=caches,
        plot=options.plot,
        filtered=sample.filtered,
        domains=sample.domains,
    )


def _grid(options: PlanOptions, vocab: int) -> list[Codec]:
    for text in options.codecs:
        for temperatures in options.temperature_sets:
            check_answers(text, temperatures, options.task)
    codecs = [
        Codec.parse(text, temperatures, vocab)
        for temperatures in options.temperature_sets
        for text in options.codecs
    ]
    build_options = options.build_options()
    fit = []
    for codec in dict.fromkeys(codecs):
        try:
            check_ensemble(codec, build_options)
            fit.append(codec)
        except UsageError:
            if options.codec is not None:
                raise  # it was asked for
    return fit


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {counted(torch.get_num_threads(), 'thread')}"
