"""Prints the result of `evaluate`."""

from __future__ import annotations

from typing import TypeAlias

from rich.console import Console

from kdcache.cli.tables import number, percent, print_line, print_table
from kdcache.commands.evaluate.scores import EvaluateResult, ModelScores
from kdcache.humanize import counted
from kdcache.tasks import TASKS

Figures: TypeAlias = list[tuple[str, list[str]]]


def render_evaluation(result: EvaluateResult, console: Console) -> None:
    """Print a table of the models."""
    figures = [("parameters", [number(m.parameters, 0) for m in result.models])]
    figures += _FIGURES.get(TASKS[result.task].answers, _of_distributions)(result)
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
    at = f"T = {result.temperature:g}"
    nats = "nats a class" if TASKS[result.task].answers == "labels" else "nats"
    header = ("domain", "rows", "positions", *(_heading(model) for model in result.models))
    entities = any(model.entity_f1 is not None for model in result.models)
    for title, figure, shown in (
        (f"Cross-entropy ({nats})", "cross_entropy", number),
        ("Bits per byte", "bits_per_byte", number),
        (f"KL to the teacher ({nats}, {at})", "kl", number),
        (f"Soft cross-entropy (nats, {at})", "soft_cross_entropy", number),
        ("Accuracy", "accuracy", percent),
        ("Entity F1", "entity_f1", percent),
        (_f1_of(result), "f1", percent),
        ("Micro F1", "micro_f1", percent),
        ("Macro F1", "macro_f1", percent),
        ("Micro average precision", "micro_average_precision", percent),
        ("Macro average precision", "macro_average_precision", percent),
        ("Pearson correlation", "pearson", number),
        ("Spearman correlation", "spearman", number),
        ("Mean squared error", "mse", number),
        ("Mean squared difference from the teacher", "teacher_mse", number),
        ("Agreement with the teacher", "agreement", percent),
    ):
        if figure == "f1" and entities:
            continue  # as in the table of all rows
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


def _of_distributions(result: EvaluateResult) -> Figures:
    perplexity, models = TASKS[result.task].perplexity, result.models
    at = f"T = {result.temperature:g}"
    figures = [("accuracy", [percent(m.accuracy) for m in models])]
    if perplexity is not None:
        figures.append((perplexity, [number(m.perplexity, 2) for m in models]))
    elif result.label_names is not None:
        if any(m.entity_f1 is not None for m in models):
            for part in ("f1", "precision", "recall"):
                shares = [percent(getattr(m, f"entity_{part}")) for m in models]
                figures.append((f"entity {part.replace('f1', 'F1')}", shares))
        else:
            figures.append((_f1_of(result), [percent(m.f1) for m in models]))
    figures.append(("cross-entropy (nats)", [number(m.cross_entropy) for m in models]))
    if any(m.soft_cross_entropy is not None for m in models):
        soft = [number(m.soft_cross_entropy) for m in models]
        figures.append((f"soft cross-entropy (nats, {at})", soft))
    else:
        figures.append((f"KL to the teacher (nats, {at})", [number(m.kl) for m in models]))
    figures.append(("agreement with the teacher", [percent(m.agreement) for m in models]))
    if result.chunks:
        figures.append(("chunk KL to the teacher (nats)", [number(m.chunk_kl) for m in models]))
        agreed = [percent(m.chunk_agreement) for m in models]
        figures.append(("agreement on chunks", agreed))
    if result.bytes:
        figures.append(("bits per byte", [number(m.bits_per_byte) for m in models]))
    error = [percent(m.calibration_error) for m in models]
    figures.append((f"calibration error ({result.calibration_bins} bins)", error))
    return figures


def _of_labels(result: EvaluateResult) -> Figures:
    models, at = result.models, f"T = {result.temperature:g}"
    precise = f"from {result.threshold:g}"
    return [
        (f"micro F1 ({precise})", [percent(m.micro_f1) for m in models]),
        (f"macro F1 ({precise})", [percent(m.macro_f1) for m in models]),
        ("micro average precision", [percent(m.micro_average_precision) for m in models]),
        ("macro average precision", [percent(m.macro_average_precision) for m in models]),
        ("cross-entropy (nats a class)", [number(m.cross_entropy) for m in models]),
        (f"KL to the teacher (nats a class, {at})", [number(m.kl) for m in models]),
        ("agreement with the teacher", [percent(m.agreement) for m in models]),
    ]


def _of_scores(result: EvaluateResult) -> Figures:
    models = result.models
    return [
        ("Pearson correlation", [number(m.pearson) for m in models]),
        ("Spearman correlation", [number(m.spearman) for m in models]),
        ("mean squared error", [number(m.mse) for m in models]),
        ("the same to the teacher", [number(m.teacher_mse) for m in models]),
    ]


_FIGURES = {"labels": _of_labels, "score": _of_scores}


def _f1_of(result: EvaluateResult) -> str:
    names = result.label_names or ()
    return f"F1 of {names[1]}" if len(names) == 2 else "macro F1"


def _heading(model: ModelScores) -> str:
    if model.role == "teacher" and not model.name.startswith("teacher"):
        return f"teacher: {model.name}"
    return model.name
