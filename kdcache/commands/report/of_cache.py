"""The section about a cache: what it is, how sure its teacher is, and rows as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kdcache.commands.inspect.inspect import InspectResult, PositionView, RowView
from kdcache.commands.report.charts import histogram
from kdcache.commands.report.gather import CachePart, TargetFigures
from kdcache.commands.report.html import Html, details, element, facts, join, table
from kdcache.humanize import score, size
from kdcache.tasks import OUTPUTS, TASKS, TaskType

_TEXT = 20_000  # characters of a row's text
_TOKENS = 1024  # of a row as text
_POSITIONS = 128  # of a row in a table
_TOKEN = 80  # characters of a token
_FILES = 50
_NEW_LINE = "\u21b5"
_GOES_ON = "##"  # begins a token that goes on with a word, where blanks are between tokens

LEVELS = (0.5, 1.0, 2.0, 4.0, 6.0)
"""Nats of surprise from which on a token has the next colour."""


def cache_section(part: CachePart) -> Html:
    """All about a cache."""
    found = part.facts
    return join(
        [
            element("p", _sentence(found), class_="lead"),
            facts(_facts(found)),
            _domains(found),
            _figures(part.figures, part.positions, TASKS[found.task]),
            histogram(
                "The teacher's surprise at the labels",
                "nats: minus its log-probability of the label at T = 1",
                part.surprise,
            ),
            _columns(found),
            *(_rows(part.rows, TASKS[found.task]) if part.rows else ()),
            details("Where it comes from", facts(_provenance(part)), _corpus(found)),
        ]
    )


def _sentence(found: InspectResult) -> str:
    state = "" if found.finished else f" Unfinished: {found.done:,} of {found.spans:,} shards."
    each = found.bytes_per_position
    cost = "" if each is None else f", {each:.1f} B a position"
    teachers = ", ".join(found.teachers) or "a teacher without a name"
    return (
        f"{found.codec} targets of {teachers} at {found.positions:,} positions: "
        f"{size(found.bytes)}{cost}.{state}"
    )


def _facts(found: InspectResult) -> list[tuple[str, str]]:
    kind = OUTPUTS[TASKS[found.task].answers]
    temperatures = ", ".join(f"{t:g}" for t in found.temperatures)
    pairs = [
        ("task", found.task),
        ("targets", f"{found.codec} over {found.vocab_size:,} {kind}"),
        ("temperatures", temperatures + (" and any other" if found.any_temperature else "")),
        ("rows", f"{found.rows:,}"),
        ("tokens", f"{found.tokens:,}"),
        ("positions", f"{found.positions:,}"),
        ("shards", f"{found.done:,}"),
        ("size", size(found.bytes)),
    ]
    if found.target_bytes_per_position is not None:
        pairs.append(("soft targets alone", f"{found.target_bytes_per_position:.2f} B a position"))
    if found.teacher_cross_entropy is not None:
        name = TASKS[found.task].perplexity
        perplexity = found.teacher_perplexity
        shown = "-" if perplexity is None else f"{perplexity:.2f}"  # beyond what a float holds
        nats = f"{found.teacher_cross_entropy:.4f} nats ({name} {shown})"
        pairs.append(("teacher's cross-entropy", nats))
    if found.clipped_mass:
        pairs.append(("mass outside the vocabulary", f"{found.clipped_mass:.3%}"))
    if found.skipped:
        pairs.append(("records left out", f"{found.skipped:,}"))
    if found.filtered is not None:
        pairs.append(("records filtered", f"{found.filtered:,}"))
    return pairs


def _domains(found: InspectResult) -> Html | None:
    """The corpora with names that it was built of."""
    if not found.domains:
        return None
    rows = [
        (
            domain.name,
            f"{domain.rows:,}",
            f"{domain.positions:,}",
            f"{domain.positions / max(1, found.positions):.1%}",
            size(domain.bytes),
            "-" if domain.teacher_cross_entropy is None else f"{domain.teacher_cross_entropy:.4f}",
        )
        for domain in found.domains
    ]
    header = ("domain", "rows", "positions", "share", "size", "teacher's cross-entropy, nats")
    return table("Domains", header, rows)


def _figures(figures: Sequence[TargetFigures], positions: int, task: TaskType) -> Html | None:
    if not figures:
        return None

    def shown(value: float | None, digits: int = 3) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    bound = any(f.mass is not None and f.mass < 1 - 1e-9 for f in figures)
    notes = []
    if bound:
        notes.append("The entropy is a lower bound: all ids that are not stored count as one.")
    if any(f.mass is None for f in figures):
        notes.append(
            "Entries are drawn: their weights are right on average, so entropy and mass of a "
            "single position are not known."
        )
    return join(
        [
            table(
                f"Targets, means over {positions:,} positions",
                ("T", "entropy, nats", f"best {_one(task)}", "mass stored", "entries"),
                [
                    (
                        f"{f.temperature:g}",
                        shown(f.entropy),
                        shown(f.best),
                        shown(f.mass, 4),
                        f"{f.entries:,.1f}",
                    )
                    for f in figures
                ],
            ),
            *(element("p", note, class_="note") for note in notes),
        ]
    )


def _one(task: TaskType) -> str:
    """What one answer is called."""
    return "id" if task.over_ids else "class"


def _columns(found: InspectResult) -> Html | None:
    if not found.columns:
        return None
    rows = [(c.name, f"{c.bytes_per_position:.3f}") for c in found.columns]
    title = f"Bytes a position, compressed ({found.sampled_shards} of {found.done} shards)"
    return details("Columns on disk", table(title, ("column", "B a position"), rows))


def _provenance(part: CachePart) -> list[tuple[str, str]]:
    found = part.facts
    spec = found.spec
    pairs = [("folder", found.cache), ("fingerprint", found.fingerprint)]
    if found.digest:
        pairs.append(("digest", found.digest))
    for name, teacher in zip(
        (*found.teachers, *[""] * len(spec["teachers"])), spec["teachers"], strict=False
    ):
        pairs.append((f"teacher {name}".strip(), f"SHA-256 {teacher.get('sha256')}"))
    pairs += [
        (name, str(spec[name]))
        for name in ("dtype", "seed", "ensemble", "tokenizer")
        if spec.get(name) is not None
    ]
    if spec.get("source"):
        pairs.append(("transcoded from", f"{spec['source']}"))
    pairs += [(f"note: {k}", str(v)) for k, v in part.notes.items() if k != "teachers"]
    return pairs


def _corpus(found: InspectResult) -> Html | None:
    files = found.spec.get("corpus") or []
    rows = [
        (
            str(f.get("name", "")),
            *([str(f.get("domain", ""))] if found.domains else []),
            size(f["size"]) if isinstance(f.get("size"), int) else "-",
        )
        for f in files[:_FILES]
    ]
    more = len(files) - len(rows)
    title = f"Corpus: {len(files):,} files" + (f", {len(rows)} of them here" if more else "")
    header = ("file", "domain", "size") if found.domains else ("file", "size")
    return table(title, header, rows, texts=(0, 1) if found.domains else (0,))


# Rows


def _rows(rows: Sequence[RowView], task: TaskType) -> list[Html]:
    shown = [element("h3", "Rows as text"), *(_row(row, task) for row in rows)]
    coloured = any(_nats(p, _is_exact(row)) is not None for row in rows for p in row.positions)
    if not coloured:
        return shown
    legend = [
        element("li", element("span", "abc", class_=f"t s{i}"), f" {_range(i)}")
        for i in range(len(LEVELS) + 1)
    ]
    what = "a token" if task.over_ids else "a word's label" if task.per_token else "a label"
    return [
        shown[0],
        element("p", f"Colour: how surprised the teacher was by {what}, in nats."),
        element("ul", *legend, class_="keys"),
        *shown[1:],
    ]


def _range(level: int) -> str:
    if level == 0:
        return f"below {LEVELS[0]:g}"
    return (
        f"{LEVELS[level - 1]:g} or more"
        if level == len(LEVELS)
        else (f"{LEVELS[level - 1]:g} to {LEVELS[level]:g}")
    )


def _row(row: RowView, task: TaskType) -> Html:
    per_token = task.per_token
    about = "" if row.exact else ", unbiased sample"
    of = f" of {row.domain}" if row.domain else ""
    title = f"Row {row.row}{of}: {row.tokens:,} tokens, T = {row.temperature:g}{about}"
    texts = (
        [_tokens(row, task)]
        if per_token
        else [
            element("p", _cut(text, _TEXT), class_="row")
            for text in (row.text, row.text_pair)
            if text is not None
        ]
    )
    shown = row.positions[:_POSITIONS]
    cells = [_cells(position, per_token, _is_exact(row)) for position in shown]
    header = _headings(row, task)
    lines = [[cell[name] for name in header.values()] for cell in cells]
    caption = f"Row {row.row}, position by position" if per_token else f"Row {row.row}: its answer"
    if len(shown) < len(row.positions):
        caption += f": the first {len(shown)} of {len(row.positions):,}"
    left = [i for i, name in enumerate(header.values()) if name in ("after", "label", "guesses")]
    inner = table(caption, tuple(header), lines, texts=left)
    opened = inner if not per_token else details("Position by position", inner)
    return element("article", element("h4", title), *texts, opened)


def _headings(row: RowView, task: TaskType) -> dict[str, str]:
    """The headings of a row's table, each with the cell below it: see `_cells`."""
    if task.per_token:
        after, label = row.heads
        head = {"place": "place", after: "after", label: "label", "nats": "nats"}
        return {**head, "teacher's best guesses": "guesses", "rest": "rest"}
    if task.answers == "score":
        return {"score": "label", "teacher's": "score"}
    if task.answers == "labels":  # whose probabilities have no sum, and so no rest
        return {"labels": "label", "teacher's probabilities": "guesses"}
    return {"label": "label", "nats": "nats", "teacher's probabilities": "guesses", "rest": "rest"}


def _tokens(row: RowView, task: TaskType) -> Html:
    """The tokens in order, each coloured by the teacher's surprise at it, or at its label."""
    if row.read:
        return _read_tokens(row, task)
    if not row.positions:  # of another program's cache
        return element("p", _cut(row.text, _TEXT), class_="row")
    parts: list[Html] = []
    first = row.positions[0]
    if first.token is not None:
        parts.append(element("span", _cut(first.token, _TOKEN), class_="t"))
    before, ended = first.place, False
    for position in row.positions[:_TOKENS]:
        if position.place > before + 1:
            parts.append(element("span", " … ", class_="gap"))
        before = position.place
        token = _cut(position.label_text or "", _TOKEN).replace("\n", _NEW_LINE)
        if ended and not token.startswith(_NEW_LINE):  # of empty lines only the first is broken
            parts.append(Html("\n"))
        ended = token.endswith(_NEW_LINE)
        parts.append(
            element(
                "span",
                token,
                class_=f"t {_level(_nats(position, _is_exact(row)))}".strip(),
            )
        )
    if len(row.positions) > _TOKENS:
        parts.append(element("span", " …", class_="gap"))
    return element("p", *parts, class_="row")


def _read_tokens(row: RowView, task: TaskType) -> Html:
    """All tokens of a row that is read whole; in place of those that were masked their labels."""
    labels = {position.place: position for position in row.positions}
    parts: list[Html] = []
    for place, token in enumerate(row.read[:_TOKENS]):
        position = labels.get(place)
        text, level = token, ""
        if position is not None and position.label_text is not None:
            text = position.label_text if task.over_ids else token
            level = _level(_nats(position, _is_exact(row)))
        if row.between:
            goes_on = text.startswith(_GOES_ON) and text != _GOES_ON
            text = text.removeprefix(_GOES_ON) if goes_on else text
            parts += [] if goes_on or not parts else [Html(row.between)]
        parts.append(element("span", _cut(text, _TOKEN), class_=f"t {level}".strip()))
    if len(row.read) > _TOKENS:
        parts.append(element("span", " …", class_="gap"))
    return element("p", *parts, class_="row")


def _cells(position: PositionView, per_token: bool, exact: bool) -> dict[str, str]:
    """All that a table may show of a position."""
    nats = _nats(position, exact)
    quote = _quoted if per_token else str
    guesses = element(
        "ul",
        *(
            element(
                "li",
                element("bdi", quote(_cut(g.text, _TOKEN))),  # or Arabic would turn the figure, too
                " ",
                element("b", f"{g.probability:.3f}"),
            )
            for g in position.guesses
        ),
        class_="guesses",
    )
    label = position.label_text
    return {
        "place": str(position.place),
        "after": quote(_cut(position.token or "", _TOKEN)),
        "label": "-" if label is None else quote(_cut(label, _TOKEN)),
        "nats": element("span", "-" if nats is None else f"{nats:.2f}", class_=f"t {_level(nats)}"),
        "guesses": guesses,
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
