"""Prints what a build would make."""

from __future__ import annotations

from rich.console import Console

from kdcache.cli.tables import print_line, print_table
from kdcache.cli.view_domains import render_estimates
from kdcache.commands.build.dry_run import DryRun
from kdcache.humanize import counted, duration, size


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
