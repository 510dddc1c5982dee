"""Prints results: of `plan`, a dry run, `demo`, `sweep`, `evaluate`, `inspect`; and domains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from kdcache.cli.display import print_line, print_table
from kdcache.humanize import counted, duration, number, percent, score, size
from kdcache.metrics import METRICS, RANKED
from kdcache.tasks import TASKS, Answers

if TYPE_CHECKING:
    from kdcache.cache.figures import DomainFigures
    from kdcache.commands.build.build import DryRun
    from kdcache.commands.demo.demo import DemoResult
    from kdcache.commands.evaluate.scores import EvaluateResult
    from kdcache.commands.inspect_result import InspectResult, RowView
    from kdcache.commands.plan.result import PlanResult
    from kdcache.commands.plan.sample import DomainEstimate
    from kdcache.commands.sweep.results import SettingScore, SweepResult
    from kdcache.metrics import ModelScores


def render_estimates(domains: Sequence[DomainEstimate], console: Console) -> None:
    """Print a line for each domain of a corpus; nothing where corpora have no names."""
    if not domains:
        return
    filtered = any(domain.filtered is not None for domain in domains)
    positions = sum(domain.positions for domain in domains)
    rows = [
        (
            domain.name,
            f"{domain.files:,}",
            size(domain.bytes),
            f"{domain.spans:,}",
            f"{domain.positions:,}",
            percent(domain.positions / max(1, positions)),
            *([percent(domain.filtered, 0)] if filtered else []),
        )
        for domain in domains
    ]
    header = ["domain", "files", "size", "shards", "about positions", "share"]
    print_table(console, [*header, *(["filtered"] if filtered else [])], rows)


def render_domains(domains: Sequence[DomainFigures], console: Console) -> None:
    """Print a line for each domain; nothing where corpora have no names."""
    if domains:
        from kdcache.cache.figures import domain_table

        print_table(console, *domain_table(domains))


def render_figures(figures: Mapping[str, float], console: Console) -> None:
    """Print a line for each domain of an evaluation; nothing where corpora have no names.

    Args:
        figures: by name; those of a domain are `figure/domain`.
    """
    of_domains = [key.split("/") for key in figures if "/" in key]
    if not of_domains:
        return
    names = list(dict.fromkeys(name for name, _ in of_domains))
    rows = [
        (domain, *(number(figures.get(f"{name}/{domain}")) for name in names))
        for domain in dict.fromkeys(domain for _, domain in of_domains)
    ]
    print_table(console, ["domain", *names], rows, title="Evaluation by domain")


def render_dry_run(result: DryRun, console: Console) -> None:
    """Print what a build would make: one sentence, then the facts."""
    left = {
        "nothing": "",
        "this build": f" {result.done:,} of its shards are there: only the others are made.",
        "another build": " Another cache is there: this build would be refused. Choose another "
        "--out.",
    }[result.state]
    print_line(
        console,
        f"Would build {result.cache}: about {result.positions:,} positions in "
        f"{counted(result.spans, 'shard')}, {size(result.bytes)}.{left}",
    )
    temperatures = ", ".join(f"{t:g}" for t in result.temperatures)
    hours = f"very roughly {duration(result.seconds)} of one {result.device} ({result.dtype})"
    facts = [
        ("teachers", ", ".join(result.teachers)),
        ("task", result.task),
        ("codec", f"{result.codec} at T = {temperatures}"),
        ("corpus", f"{counted(result.files, 'file')}, {size(result.corpus_bytes)}"),
        *(
            []
            if result.filtered is None
            else [("filter", f"leaves out about {result.filtered:.0%} of the records")]
        ),
        ("rows", f"of {result.max_length:,} tokens at most"),
        (
            "bytes",
            f"about {result.bytes / max(1, result.positions):,.1f} a position, rows included",
        ),
        ("time", hours),
        ("fingerprint", result.fingerprint or "known once the output layer is made"),
    ]
    print_table(console, ("", ""), facts, left=2)
    render_estimates(result.domains, console)
    print_line(
        console, "Nothing was written. Bytes and time are rules of thumb; plan measures them."
    )


def render_demo(result: DemoResult, console: Console) -> None:
    """Print the comparison, and what the teacher cost."""
    header = ("model", "parameters", "CE", "perplexity", "KL", "training", "online teacher")
    lines = [
        (
            model.name,
            f"{model.parameters:,}",
            number(model.cross_entropy, 3),
            number(model.perplexity, 1),
            number(model.kl, 3),
            f"{model.train_seconds:.0f} s",
            "-" if model.teacher_seconds is None else f"{model.teacher_seconds:.0f} s",
        )
        for model in result.models
    ]
    title = "On held-out documents: cross-entropy and KL to the teacher in nats per token"
    print_table(console, header, lines, title=title)
    beside = sum(model.teacher_seconds or 0.0 for model in result.models)
    print_line(
        console,
        f"The cache: {result.positions:,} positions, {result.bytes_per_position:.1f} bytes per "
        f"position. Teacher: {result.teacher_seconds:.1f} s, paid once; running it online with "
        f"the distilled students would have taken {beside:.1f} s.",
    )
    if result.plot is not None:
        print_line(console, f"Loss curves: {result.plot}")


def render_sweep(result: SweepResult, console: Console) -> None:
    """Print the table of settings."""

    options = list(result.settings[0].setting)
    seeds = result.runs[0].seed is not None
    known = [name for name in RANKED if any(name in s.mean for s in result.settings)]
    if _mixed(result):
        known.remove("loss")
    header = [*(name.replace("_", "-") for name in options), *(["seeds"] if seeds else [])]
    header += [*(result.name_of(name) for name in known), "training", "parameters"]
    rows = [
        [
            *setting.setting.values(),
            *([str(len(setting.runs))] if seeds else []),
            *(_figure(setting, name) for name in known),
            duration(setting.seconds),
            number(setting.parameters, 0),
        ]
        for setting in result.settings
    ]
    means = ", means and standard deviations over seeds" if seeds else ""
    title = f"{result.name_of(result.ranked_by)} first: {result.source}{means}"
    print_table(console, header, rows, left=len(options), title=title)
    for line in _notes(result):
        print_line(console, line)


def _mixed(result: SweepResult) -> bool:
    """Whether the runs were trained on losses that do not compare."""
    return bool({"alpha", "temperature", "loss"} & set(result.settings[0].setting))


def _notes(result: SweepResult) -> Iterable[str]:
    if _mixed(result):
        yield (
            "Soft losses can be compared only at the same temperature. The training loss, "
            "weighted with each run's alpha and T, is in the files."
        )
    if not result.evaluated:
        yield "No eval-cache was given: figures are those of the last steps of training."
    if len(result.runs) < result.combinations:
        yield (
            f"{counted(result.combinations, 'combination')} make "
            f"{counted(len(result.runs), 'run')}: the others differ "
            "only in options that do not affect the student, such as the temperature at alpha 1 or "
            "with mse."
        )
    total = duration(sum(run.seconds for run in result.runs))
    yield (
        f"{counted(len(result.runs), 'run')}, {result.made} of them now, {total} of training in "
        "all: "
        f"{result.out}/results.json, .csv, .png"
    )


def _figure(setting: SettingScore, name: str) -> str:

    value, deviation = setting.mean.get(name), setting.deviation.get(name)
    shown = percent if METRICS[name].share else number
    if value is None or deviation is None:
        return shown(value)
    if METRICS[name].share:
        return f"{100 * value:.2f}±{100 * deviation:.2f} %"
    return f"{shown(value)}±{deviation:.4f}"


def render_evaluation(result: EvaluateResult, console: Console) -> None:
    """Print a table of the models."""
    models = [*result.models, *([result.one_answer] if result.one_answer else [])]
    figures = [("parameters", [number(m.parameters, 0) for m in models])]
    figures += [(result.title(name), _values(name, models)) for name in result.shown()]
    title = (
        f"{result.source}: {counted(result.rows, 'row')}, {counted(result.positions, 'position')}"
    )
    header = ("", *map(_heading, models))
    print_table(console, header, [(name, *values) for name, values in figures], title=title)
    if result.domains:
        _render_domains(result, console)
        print_line(console, "")
    for note in result.notes:
        print_line(console, note)


def _render_domains(result: EvaluateResult, console: Console) -> None:
    """Print a table for each figure that is known: a line a domain, a column a model."""
    header = ("domain", "rows", "positions", *(_heading(model) for model in result.models))
    for name in result.shown():
        if not METRICS[name].by_domain or not result.has(name):
            continue
        rows = [
            (
                domain.name,
                f"{domain.rows:,}",
                f"{domain.positions:,}",
                *_values(name, domain.models),
            )
            for domain in result.domains
        ]
        title = result.title(name)
        print_line(console, "")
        print_table(console, header, rows, title=f"{title[0].upper()}{title[1:]} by domain")


def _values(name: str, models: Sequence[ModelScores]) -> list[str]:
    shown = percent if METRICS[name].share else number
    digits = {"perplexity": 2}.get(name, 4)
    values = (getattr(model, name) for model in models)
    return [percent(v) if shown is percent else number(v, digits) for v in values]


def _heading(model: ModelScores) -> str:
    if model.role == "teacher" and not model.name.startswith("teacher"):
        return f"teacher: {model.name}"
    return model.name


# Headings of a row's table where its label is one for the row, each with what stands below it.
_BEHIND = (
    ("logprob", "logprob"),
    ("entropy", "entropy"),
    ("teacher's predictions", "guesses"),
    ("rest", "rest"),
)
_OF_ROWS: dict[str, tuple[tuple[str, str], ...]] = {
    "classes": (("label", "label"), ("teacher's probabilities", "guesses"), ("rest", "rest")),
    "labels": (("labels", "label"), ("teacher's probabilities", "guesses")),  # no sum, no rest
    "score": (("score", "label"), ("teacher's", "score")),
}


def render_inspection(result: InspectResult, console: Console) -> None:
    """Print what `inspect` found."""
    print_table(console, ("", ""), result.facts(), left=2, title=result.cache)
    if result.domains:
        print_line(console, "")
        render_domains(result.domains, console)
    if result.columns:
        shards = f"{result.sampled_shards} of {counted(result.done, 'shard')}"
        print_line(console, "")
        print_table(
            console,
            ("column", "B/position"),
            [(c.name, f"{c.bytes_per_position:.3f}") for c in result.columns],
            title=f"Columns, compressed ({shards})",
        )
    if samples := getattr(result, "samples", ()):
        print_line(console, "")
        rows = [(str(s.row), s.prompt, s.completion, str(s.tokens), s.reason) for s in samples]
        header = ("row", "prompt", "answer", "tokens", "ended by")
        print_table(console, header, rows, left=3, title="Samples")
    if result.row is not None:
        print_line(console, "")
        _render_row(result.row, TASKS[result.task].answers, console)


def _render_row(row: RowView, answers: Answers, console: Console) -> None:
    of = f" of {row.domain}" if row.domain else ""
    about = "" if row.exact else ", unbiased sample"
    print_line(
        console,
        f"Row {row.row}{of} (shard {row.shard}, {counted(row.tokens, 'token')}), "
        f"T = {row.temperature:g}{about}",
        style="bold",
    )
    print_line(console, row.text)
    if row.text_pair is not None:
        print_line(console, row.text_pair)
    print_line(console, "")
    per_token = any(p.token is not None for p in row.positions)
    quote = repr if per_token else str
    of_tokens = (("place", "place"), (row.heads[0], "token"), (row.heads[1], "label"), *_BEHIND)
    shown = of_tokens if per_token else _OF_ROWS[answers]
    cells = [
        {
            "place": str(position.place),
            "token": repr(position.token),
            "label": "-" if position.label_text is None else quote(position.label_text),
            "logprob": number(position.label_logprob, 2),
            "entropy": number(position.entropy, 2),
            "guesses": "  ".join(f"{quote(g.text)} {g.probability:.3f}" for g in position.guesses),
            "rest": f"{position.rest:.3f}",
            "score": "-" if position.score is None else score(position.score),
        }
        for position in row.positions
    ]
    lines = [[cell[name] for _, name in shown] for cell in cells]
    left = sum(name not in ("rest", "score") for _, name in shown)
    print_table(console, [heading for heading, _ in shown], lines, left=left)


_SMALL_SHARD = 100_000
"""Positions from which on a shard compresses as well as a large one."""


def render_plan(result: PlanResult, console: Console, *, details: bool = False) -> None:
    """Print which codec to take and a short table; with `details` all figures instead."""
    print_line(console, result.advice)
    if not details:
        print_line(console, "")
        _print_short(result, console)
        render_estimates(result.domains, console)
        return
    rate = 1 / result.teacher_seconds if result.teacher_seconds else 0.0
    print_line(
        console,
        f"Sample: {counted(result.rows, 'row')}, {counted(result.positions, 'position')}. "
        f"Teacher: {rate:,.0f} "
        f"positions per second ({result.device}, {result.dtype}). Whole corpus: about "
        f"{result.corpus_positions:,} positions.",
    )
    render_estimates(result.domains, console)
    print_line(console, "")
    _print_costs(result, console)
    print_line(console, "")
    _print_fidelity(result, console)
    for line in [*_meanings(result), *_warnings(result)]:
        print_line(console, line)


def _print_short(result: PlanResult, console: Console) -> None:
    """What decides between codecs: bytes, hours, and how far gradients are from the full ones."""
    header = ["codec", "T", "B/position", "corpus", "one worker", "pays from", "missed", "angle"]
    rows = [
        (
            cache.codec,
            cache.declared,
            number(cache.bytes_per_position, 1),
            size(cache.corpus_bytes),
            duration(3600 * cache.hours["1"]),
            "never" if cache.break_even is None else f"{max(1, math.ceil(cache.break_even)):,}",
            percent(max(f.missed for f in cache.fidelity), 1),
            _degrees(_largest(f.mean_angle for f in cache.fidelity)),
        )
        for cache in result.caches
    ]
    print_table(console, header, rows, left=2)
    missed = "probability outside the stored ids, at the worst T"
    if TASKS[result.task].answers == "score":
        missed = "what rounding changes, by the standard deviation of the scores"
    print_line(
        console,
        f"About {result.corpus_positions:,} positions in {counted(result.shards, 'shard')}, by "
        f"{counted(result.rows, 'row')} on {result.device} ({result.dtype}). Missed: {missed}. "
        "Angle: of the mean gradient to the full one. --all prints everything.",
    )
    for line in _warnings(result):
        print_line(console, line)


def _print_costs(result: PlanResult, console: Console) -> None:
    numbers = list(result.caches[0].hours)
    workers = [counted(int(n), "worker") for n in numbers]
    header = [
        "codec",
        "T",
        "entries",
        "B per position",
        "+ rows, B",
        "corpus",
        *workers,
        "break-even",
    ]
    rows = [
        (
            cache.codec,
            cache.declared,
            number(cache.entries, 1),
            number(cache.bytes_per_position, 1),
            number(cache.row_bytes_per_position, 1),
            size(cache.corpus_bytes),
            *(duration(3600 * cache.hours[n]) for n in numbers),
            "never" if cache.break_even is None else number(cache.break_even, 2),
        )
        for cache in result.caches
    ]
    print_table(console, header, rows, left=2, title="Cost")


def _print_fidelity(result: PlanResult, console: Console) -> None:
    header = ["codec", "T", "at T", "noise", "bias", "missed", "mass", "angle", "norm"]
    header += ["mean angle", "mean norm", "near angle"]
    rows = [
        (
            cache.codec,
            cache.declared,
            f"{f.temperature:g}",
            _small(f.noise),
            _small(f.bias),
            percent(f.missed, 1),
            percent(f.mass, 1),
            _degrees(f.angle),
            number(f.norm_ratio, 2),
            _degrees(f.mean_angle),
            number(f.mean_norm_ratio, 2),
            _degrees(f.near_angle),
        )
        for cache in result.caches
        for f in cache.fidelity
    ]
    title = f"Fidelity, {result.compared_positions:,} positions"
    print_table(console, header, rows, left=2, title=title)


def _meanings(result: PlanResult) -> list[str]:
    """What the figures are."""
    notes = [
        "break-even: number of students (passes over the corpus) from which a cache takes less "
        "time than the teacher online, if a student's step takes as long as the teacher's forward.",
        "noise: E||target - p||²; bias: the part that does not average out; missed: probability "
        "outside the stored ids; mass: probability on them. Noise averages out over positions, "
        "missed mass does not.",
        "angle, norm: gradient by a student's logits, compared with that of the full "
        "distribution; mean: summed over positions. The student is simulated: half of the "
        "teacher's logits, plus noise; near: all of them plus a little noise, a KL of about 0.03.",
    ]
    if result.positions < _SMALL_SHARD:
        notes.append(
            f"Bytes are measured on one shard of {result.positions:,} positions; larger ones "
            "compress "
            "a little better."
        )
    return notes


def _warnings(result: PlanResult) -> list[str]:
    """What to know however much is printed."""
    lines = []
    if result.filtered is not None:
        lines.append(f"--filter leaves out about {result.filtered:.0%} of the records.")
    if result.clipped_mass:
        lines.append(
            f"The teacher gives {percent(result.clipped_mass, 4)} of its probability to ids "
            "outside the vocabulary, which are cut off."
        )
    if result.plot is not None:
        lines.append(f"Plot: {result.plot}")
    return lines


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _degrees(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}°"


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}" if value < 1e-3 else f"{value:.4f}"
