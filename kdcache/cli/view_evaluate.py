"""Prints the result of `evaluate`."""

from __future__ import annotations

from rich.console import Console

from kdcache.cli.tables import number, percent, print_line, print_table
from kdcache.commands.evaluate.scores import EvaluateResult, ModelScores
from kdcache.tasks import TASKS


def render_evaluation(result: EvaluateResult, console: Console) -> None:
    """Print a table of the models."""
    over_ids = TASKS[result.task].over_ids
    sampled = any(m.soft_cross_entropy is not None for m in result.models)
    at = f"T = {result.temperature:g}"
    figures = [("parameters", [number(m.parameters, 0) for m in result.models])]
    figures.append(("accuracy", [percent(m.accuracy) for m in result.models]))
    if over_ids:
        figures.append(("perplexity", [number(m.perplexity, 2) for m in result.models]))
    elif result.label_names is not None:
        binary = len(result.label_names) == 2
        name = f"F1 of {result.label_names[1]}" if binary else "macro F1"
        if any(m.entity_f1 is not None for m in result.models):
            for part in ("f1", "precision", "recall"):
                shares = [percent(getattr(m, f"entity_{part}")) for m in result.models]
                figures.append((f"entity {part.replace('f1', 'F1')}", shares))
        else:
            figures.append((name, [percent(m.f1) for m in result.models]))
    figures.append(("cross-entropy (nats)", [number(m.cross_entropy) for m in result.models]))
    if sampled:
        soft = [number(m.soft_cross_entropy) for m in result.models]
        figures.append((f"soft cross-entropy (nats, {at})", soft))
    else:
        figures.append((f"KL to the teacher (nats, {at})", [number(m.kl) for m in result.models]))
    figures.append(("agreement with the teacher", [percent(m.agreement) for m in result.models]))
    if result.chunks:
        figures.append(
            ("chunk KL to the teacher (nats)", [number(m.chunk_kl) for m in result.models])
        )
        agreed = [percent(m.chunk_agreement) for m in result.models]
        figures.append(("agreement on chunks", agreed))
    if result.bytes:
        figures.append(("bits per byte", [number(m.bits_per_byte) for m in result.models]))
    error = [percent(m.calibration_error) for m in result.models]
    figures.append((f"calibration error ({result.calibration_bins} bins)", error))
    title = f"{result.source}: {result.rows:,} rows, {result.positions:,} positions"
    header = ("", *(_heading(model) for model in result.models))
    print_table(console, header, [(name, *values) for name, values in figures], title=title)
    if result.domains:
        _render_domains(result, console)
        print_line(console, "")
    for note in result.notes:
        print_line(console, note)


def _render_domains(result: EvaluateResult, console: Console) -> None:
    """Print a table for each figure that is known: a line a domain, a column a model."""
    at = f"T = {result.temperature:g}"
    header = ("domain", "rows", "positions", *(_heading(model) for model in result.models))
    for title, figure, shown in (
        ("Cross-entropy (nats)", "cross_entropy", number),
        ("Bits per byte", "bits_per_byte", number),
        (f"KL to the teacher (nats, {at})", "kl", number),
        (f"Soft cross-entropy (nats, {at})", "soft_cross_entropy", number),
        ("Accuracy", "accuracy", percent),
        ("Agreement with the teacher", "agreement", percent),
    ):
        if all(getattr(model, figure) is None for model in result.models):
            continue
        rows = [
            (
                domain.name,
                f"{domain.rows:,}",
                f"{domain.positions:,}",
                *(shown(getattr(model, figure)) for model in domain.models),
            )
            for domain in result.domains
        ]
        print_line(console, "")
        print_table(console, header, rows, title=f"{title} by domain")


def _heading(model: ModelScores) -> str:
    if model.role == "teacher" and not model.name.startswith("teacher"):
        return f"teacher: {model.name}"
    return model.name
