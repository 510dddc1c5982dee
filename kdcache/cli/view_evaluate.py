"""Prints the result of `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from kdcache.cli.tables import number, percent, print_line, print_table
from kdcache.commands.evaluate.scores import EvaluateResult, ModelScores
from kdcache.humanize import counted
from kdcache.metrics import METRICS


def render_evaluation(result: EvaluateResult, console: Console) -> None:
    """Print a table of the models."""
    figures = [("parameters", [number(m.parameters, 0) for m in result.models])]
    figures += [(result.title(name), _values(name, result.models)) for name in result.shown()]
    title = (
        f"{result.source}: {counted(result.rows, 'row')}, {counted(result.positions, 'position')}"
    )
    header = ("", *(_heading(model) for model in result.models))
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
