"""Prints tables of domains: of a corpus, of a cache, and of an evaluation during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from kdcache.cache.figures import DomainFigures
from kdcache.cli.tables import number, percent, print_table
from kdcache.commands.plan.sample import DomainEstimate
from kdcache.humanize import size


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
