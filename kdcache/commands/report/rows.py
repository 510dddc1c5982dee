"""Rows of a cache as text, coloured by the teacher's surprise, and as tables of positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kdcache.commands.inspect_result import PositionView, RowView
from kdcache.commands.report.charts import (
    Article,
    Block,
    Blocks,
    Cell,
    Coloured,
    Details,
    Guesses,
    Heading,
    Legend,
    Paragraph,
    RowText,
    Table,
)
from kdcache.humanize import number, score
from kdcache.tasks import TaskType

_TEXT = 20_000  # characters of a row's text
_TOKENS = 1024  # of a row as text
_POSITIONS = 128  # of a row in a table
_TOKEN = 80  # characters of a token
_NEW_LINE = "\u21b5"
_GOES_ON = "##"  # begins a token that continues with a word, where blanks are between tokens

LEVELS = (0.5, 1.0, 2.0, 4.0, 6.0)
"""Nats of surprise from which on a token has the next colour."""


def rows_as_text(rows: Sequence[RowView], task: TaskType) -> Blocks:
    """A heading, the meaning of the colours where there are any, and each row."""
    shown: Blocks = [_row(row, task) for row in rows]
    if any(_nats(p, _is_exact(row)) is not None for row in rows for p in row.positions):
        what = "a token" if task.over_ids else "a word's label" if task.per_token else "a label"
        about = Paragraph(f"Colour: how surprised the teacher was by {what}, in nats.")
        shown = [about, Legend([_range(i) for i in range(len(LEVELS) + 1)]), *shown]
    return [Heading("Rows as text"), *shown]


def _range(level: int) -> str:
    if level == 0:
        return f"below {LEVELS[0]:g}"
    return (
        f"{LEVELS[level - 1]:g} or more"
        if level == len(LEVELS)
        else (f"{LEVELS[level - 1]:g} to {LEVELS[level]:g}")
    )


def _row(row: RowView, task: TaskType) -> Article:
    about = "" if row.exact else ", unbiased sample"
    of = f" of {row.domain}" if row.domain else ""
    title = f"Row {row.row}{of}: {row.tokens:,} tokens, T = {row.temperature:g}{about}"
    shown = row.positions[:_POSITIONS]
    cells = [_cells(position, task.per_token, _is_exact(row)) for position in shown]
    header = _headings(row, task)
    lines = [[cell[name] for name in header.values()] for cell in cells]
    what = "position by position" if task.per_token else "its answer"
    of_all = f" of {len(row.positions):,}"
    caption = f"Row {row.row}, {what}" if task.per_token else f"Row {row.row}: {what}"
    if len(shown) < len(row.positions):
        caption += f": the first {len(shown)}{of_all}"
    left = [i for i, name in enumerate(header.values()) if name in ("after", "label", "guesses")]
    inner = Table(caption, tuple(header), lines, left)
    if task.per_token:
        return Article(title, [_tokens(row, task), Details("Position by position", [inner])])
    texts = [Paragraph(_cut(t, _TEXT), "row") for t in (row.text, row.text_pair) if t is not None]
    return Article(title, [*texts, inner])


def _headings(row: RowView, task: TaskType) -> dict[str, str]:
    """The headings of a row's table, each with the cell below it: see `_cells`."""
    if task.per_token:
        after, label = row.heads
        head = {
            "place": "place",
            after: "after",
            label: "label",
            "nats": "nats",
            "entropy": "entropy",
        }
        return {**head, "teacher's best guesses": "guesses", "rest": "rest"}
    classes = {"label": "label", "nats": "nats", "teacher's probabilities": "guesses"}
    return {
        "classes": {**classes, "rest": "rest"},
        "labels": {"labels": "label", "teacher's probabilities": "guesses"},  # no sum, no rest
        "score": {"score": "label", "teacher's": "score"},
    }[task.answers]


def _tokens(row: RowView, task: TaskType) -> Block:
    """The tokens in order, each coloured by the teacher's surprise at it, or at its label."""
    if row.read:
        return _read_tokens(row, task)
    if not row.positions:  # of another program's cache
        return Paragraph(_cut(row.text, _TEXT), "row")
    first = row.positions[0]
    pieces: list[tuple[str, str | None]] = []
    if first.token is not None:
        pieces.append((_cut(first.token, _TOKEN), "t"))
    before, ended = first.place, False
    for position in row.positions[:_TOKENS]:
        if position.place > before + 1:
            pieces.append((" … ", "gap"))
        before = position.place
        token = _cut(position.label_text or "", _TOKEN).replace("\n", _NEW_LINE)
        if ended and not token.startswith(_NEW_LINE):  # of empty lines only the first is broken
            pieces.append(("\n", None))
        ended = token.endswith(_NEW_LINE)
        pieces.append((token, _look(_level(_nats(position, _is_exact(row))))))
    return RowText([*pieces, *_more(row.positions)])


def _read_tokens(row: RowView, task: TaskType) -> RowText:
    """All tokens of a row that is read whole; in place of those that were masked their labels."""
    labels = {position.place: position for position in row.positions}
    pieces: list[tuple[str, str | None]] = []
    for place, token in enumerate(row.read[:_TOKENS]):
        position = labels.get(place)
        text, level = token, ""
        if position is not None and position.label_text is not None:
            text = position.label_text if task.over_ids else token
            level = _level(_nats(position, _is_exact(row)))
        if row.between:
            goes_on = text.startswith(_GOES_ON) and text != _GOES_ON
            text = text.removeprefix(_GOES_ON) if goes_on else text
            pieces += [] if goes_on or not pieces else [(row.between, None)]
        pieces.append((_cut(text, _TOKEN), _look(level)))
    return RowText([*pieces, *_more(row.read)])


def _look(level: str) -> str:
    return f"t {level}".strip()


def _more(tokens: Sequence[object]) -> list[tuple[str, str | None]]:
    return [(" …", "gap")] if len(tokens) > _TOKENS else []


def _cells(position: PositionView, per_token: bool, exact: bool) -> dict[str, Cell]:
    """All that a table may show of a position."""
    nats = _nats(position, exact)
    quote = _quoted if per_token else str
    label = position.label_text
    return {
        "place": str(position.place),
        "after": quote(_cut(position.token or "", _TOKEN)),
        "label": "-" if label is None else quote(_cut(label, _TOKEN)),
        "nats": Coloured("-" if nats is None else f"{nats:.2f}", _level(nats)),
        "entropy": Coloured(number(position.entropy, 2), _level(position.entropy)),
        "guesses": Guesses(
            [(quote(_cut(g.text, _TOKEN)), f"{g.probability:.3f}") for g in position.guesses]
        ),
        "rest": f"{position.rest:.3f}",
        "score": "-" if position.score is None else score(position.score),
    }


def _nats(position: PositionView, exact: bool) -> float | None:
    """The surprise at the label: kept by the cache, or of an `exact` guess at T = 1."""
    if position.label_logprob is not None:
        return 0.0 - position.label_logprob  # or 0 would be shown as -0
    known = [g.probability for g in position.guesses if g.id == position.label and exact]
    return math.log(1 / known[0]) if known and known[0] > 0 else None


def _is_exact(row: RowView) -> bool:
    """Whether its probabilities are the teacher's own, at T = 1."""
    return row.exact and row.temperature == 1


def _level(nats: float | None) -> str:
    return "" if nats is None else f"s{sum(nats >= level for level in LEVELS)}"


def _quoted(text: str) -> str:
    return f"\u2018{text.replace(chr(10), _NEW_LINE)}\u2019"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
