"""Prints the result of `demo`."""

from __future__ import annotations

from rich.console import Console

from kdcache.cli.tables import number, print_line, print_table
from kdcache.commands.demo.result import DemoResult


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
