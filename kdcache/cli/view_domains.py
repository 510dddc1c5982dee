"""Prints a table of a cache's domains."""

from __future__ import annotations

from collections.abc import Sequence

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
