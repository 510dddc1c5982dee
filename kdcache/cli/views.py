"""Prints what a build would make.

Prints the result of `demo`.

Prints the result of `sweep`.

Prints tables of domains: of a corpus, of a cache, and of an evaluation during training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from kdcache.cli.tables import number, percent, print_line, print_table
from kdcache.humanize import counted, duration, size
from kdcache.metrics import METRICS, RANKED

if TYPE_CHECKING:
    from kdcache.cache.figures import DomainFigures
    from kdcache.commands.build.dry_run import DryRun
    from kdcache.commands.demo.demo import DemoResult
    from kdcache.commands.plan.sample import DomainEstimate
    from kdcache.commands.sweep.results import SettingScore, SweepResult


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
    if not domains:
        return
    positions = sum(domain.positions for domain in domains)
    filtered = any(domain.filtered is not None for domain in domains)
    labelled = any(domain.teacher_cross_entropy is not None for domain in domains)
    rows = [
        (
            domain.name,
            f"{domain.rows:,}",
            f"{domain.positions:,}",
            percent(domain.positions / max(1, positions)),
            size(domain.bytes),
            f"{domain.skipped:,}",
            *([f"{domain.filtered or 0:,}"] if filtered else []),
            *([number(domain.teacher_cross_entropy)] if labelled else []),
        )
        for domain in domains
    ]
    header = ["domain", "rows", "positions", "share", "size", "skipped"]
    header += ["filtered"] if filtered else []
    header += ["teacher's cross-entropy"] if labelled else []
    print_table(console, header, rows)


def render_figures(figures: Mapping[str, float], console: Console) -> None:
    """Print a line for each domain of an evaluation; nothing where corpora have no names.

    Args:
        figures: by name; those of a domain are `figure/domain`.
        console: where to.
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
