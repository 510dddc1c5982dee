"""Prints the result of `inspect`."""

from __future__ import annotations

from rich.console import Console

from kdcache.cli.tables import number, percent, print_line, print_table
from kdcache.cli.views import render_domains
from kdcache.commands.inspect import InspectResult, RowView
from kdcache.humanize import counted, score, size
from kdcache.tasks import OUTPUTS, TASKS, Answers

# Headings of a row's table where its label is one for the row, each with what stands below it.
_BEHIND = (("logprob", "logprob"), ("teacher's predictions", "guesses"), ("rest", "rest"))
_OF_ROWS: dict[str, tuple[tuple[str, str], ...]] = {
    "classes": (("label", "label"), ("teacher's probabilities", "guesses"), ("rest", "rest")),
    "labels": (("labels", "label"), ("teacher's probabilities", "guesses")),  # no sum, no rest
    "score": (("score", "label"), ("teacher's", "score")),
}


def render_inspection(result: InspectResult, console: Console) -> None:
    """Print what `inspect` found."""
    kind = OUTPUTS[TASKS[result.task].answers]
    temperatures = ", ".join(f"{t:g}" for t in result.temperatures)
    state = (
        "finished"
        if result.finished
        else f"unfinished: {result.done} of {counted(result.spans, 'shard')}"
    )
    facts = [
        ("task", result.task),
        ("teachers", ", ".join(result.teachers) or "-"),
        *_source(result),
        ("codec", f"{result.codec} over {result.vocab_size:,} {kind}"),
        ("temperatures", temperatures + (" (and any other)" if result.any_temperature else "")),
        ("state", state),
        ("shards", f"{result.done:,}"),
        ("rows", f"{result.rows:,}"),
        ("tokens", f"{result.tokens:,}"),
        ("positions", f"{result.positions:,}"),
        ("skipped records", f"{result.skipped:,}"),
        *([] if result.filtered is None else [("filtered records", f"{result.filtered:,}")]),
        ("clipped mass", percent(result.clipped_mass, 4) + " a position"),
        *_labels(result),
        ("size", size(result.bytes)),
        ("bytes per position", f"{number(result.bytes_per_position, 2)} of the whole files"),
        ("", f"{number(result.target_bytes_per_position, 2)} of the soft targets alone"),
        ("fingerprint", result.fingerprint),
    ]
    if result.digest:
        facts.append(("digest", result.digest))
    print_table(console, ("", ""), facts, left=2, title=result.cache)
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
    if result.row is not None:
        print_line(console, "")
        _render_row(result.row, TASKS[result.task].answers, console)


def _source(result: InspectResult) -> list[tuple[str, str]]:
    """The cache whose targets were encoded anew."""
    source = result.spec.get("source")
    return [("transcoded from", f"{source['codec']} ({source['digest']})")] if source else []


def _labels(result: InspectResult) -> list[tuple[str, str]]:
    """What the teacher thought of the data, where the cache keeps it."""
    if result.teacher_cross_entropy is None:
        return []
    nats = number(result.teacher_cross_entropy)
    name, perplexity = TASKS[result.task].perplexity, number(result.teacher_perplexity, 2)
    lines = [("teacher's cross-entropy", f"{nats} nats a position ({name} {perplexity})")]
    if result.impossible_labels:
        left_out = f"{result.impossible_labels:,}, which are left out of it"
        lines.append(("labels of no probability", left_out))
    return lines


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
            "guesses": "  ".join(f"{quote(g.text)} {g.probability:.3f}" for g in position.guesses),
            "rest": f"{position.rest:.3f}",
            "score": "-" if position.score is None else score(position.score),
        }
        for position in row.positions
    ]
    lines = [[cell[name] for _, name in shown] for cell in cells]
    left = sum(name not in ("rest", "score") for _, name in shown)
    print_table(console, [heading for heading, _ in shown], lines, left=left)
