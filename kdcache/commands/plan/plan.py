"""`kdcache plan`, from its options to its result."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from kdcache.commands.build.prepare import check_answers, check_ensemble, prepare
from kdcache.commands.plan.measure import Report, SamplePass
from kdcache.commands.plan.options import PlanOptions
from kdcache.commands.plan.result import PlanResult, advice
from kdcache.commands.plan.sample import sample_rows
from kdcache.errors import UsageError
from kdcache.humanize import counted
from kdcache.storage import redact
from kdcache.targets import Codec


def plan(options: PlanOptions, *, report: Report | None = None) -> PlanResult:
    """Measure a grid of codecs on a sample of the corpus.

    Args:
        options: what to plan.
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
        advice=advice(caches, run.teacher.device.type),
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
