"""The section about a cache: what it is, how sure its teacher is, and rows as text.

The sections about runs and sweeps: curves, figures, and students beside their teachers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcache.commands.inspect import InspectResult, PositionView, RowView
from kdcache.commands.report.gather import CachePart, RunPart, SweepPart, TargetFigures, number
from kdcache.commands.report.html import (
    COLOURS,
    Curve,
    Html,
    curves,
    details,
    element,
    facts,
    histogram,
    join,
    table,
)
from kdcache.humanize import counted, duration, score, size
from kdcache.storage import redact
from kdcache.student.figures import FIGURES, figure_of
from kdcache.tasks import CAUSAL_LM, OUTPUTS, TASKS, TaskType

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
            details("Where it comes from", facts(_cache_provenance(part)), _corpus(found)),
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


def _cache_provenance(part: CachePart) -> list[tuple[str, str]]:
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


_NAMES = {
    "loss": "loss",
    "hard_loss": "cross-entropy",
    "soft_loss": "soft loss",
    "soft_cross_entropy": "soft cross-entropy",
}
_SCORES = ("accuracy", "f1", "micro_f1", "pearson", *_NAMES)  # of a result
_FIGURES = ("accuracy", "f1", "micro_f1", "pearson", "hard_loss", "soft_loss", "soft_cross_entropy")
_LINES = 20  # of a curve as a table
_SETTINGS = 200
_OPTIONS = (
    "model",
    "student",
    "alpha",
    "temperature",
    "divergence",
    "learning_rate",
    "batch_size",
    "seed",
)


def compare(runs: Sequence[RunPart]) -> Html:
    """Students beside their teachers: a table, and their curves in one pair of axes."""
    rows = [_student(run) for run in runs]
    tasks = {task for run in runs if (task := str(run.result.get("task"))) in TASKS}
    hard = {TASKS[task].hard for task in tasks} or {TASKS[CAUSAL_LM].hard}
    loss, unit = next(iter(hard)) if len(hard) == 1 else ("hard loss", "of its task")
    of_tasks = sorted({name for task in tasks if (name := figure_of(task))}) or ["accuracy"]
    header = ["run", "student", "alpha", "T", "parameters", "steps", loss, "teacher's"]
    header += [" or ".join(name.replace("_", " ") for name in of_tasks), "soft loss"]
    drawn = list(runs)[:COLOURS]
    charts = []
    for name, title in (("eval_hard_loss", "on the evaluation caches"), ("hard_loss", "training")):
        found = [Curve(_short(run.path), _points(run, name)) for run in drawn]
        named = f"{loss.capitalize()} with the labels, {title}"
        chart = curves(named, "step", unit, found)
        charts.append(chart)
    more = len(runs) - len(drawn)
    note = f"Curves of the first {len(drawn)} runs; {more} more have their own." if more else None
    return join(
        [
            table("Students beside their teachers", header, rows, texts=(0, 1)),
            element(
                "p",
                "Of the evaluation caches where a run had some, else of training as last logged. "
                "The teacher's cross-entropy is read from the caches, where they keep it.",
                class_="note",
            ),
            *charts,
            None if note is None else element("p", note, class_="note"),
        ]
    )


def _student(run: RunPart) -> tuple[str, ...]:
    evaluated = run.result.get("eval")
    figures = evaluated if isinstance(evaluated, dict) and evaluated else run.result
    teacher = "eval_teacher_cross_entropy" if figures is evaluated else "teacher_cross_entropy"
    soft = figures.get("soft_loss")
    return (
        _short(run.path),
        _plain(run.options.get("student") or run.options.get("model"))
        if run.finished
        else "unfinished",
        _plain(run.options.get("alpha")),
        _plain(run.options.get("temperature")),
        _count(run.result.get("parameters")),
        _count(run.result.get("steps") or (run.log[-1].get("step") if run.log else None)),
        _figure(figures.get("hard_loss")),
        _figure(run.result.get(teacher)),
        _figure(next((figures[n] for n in FIGURES.values() if n in figures), None)),
        _figure(soft if soft is not None else figures.get("soft_cross_entropy")),
    )


def run_section(run: RunPart) -> Html:
    """All about a run."""
    result, charts = run.result, []
    names = _names(run.result.get("task"))
    series = [Curve(title, _points(run, name)) for name, title in names.items()]
    charts.append(curves("Training", "step", "loss", series))
    series = [Curve(title, _points(run, f"eval_{name}")) for name, title in names.items()]
    charts.append(curves("Evaluation", "step", "loss", series))
    for name in (*FIGURES.values(), "f1"):
        shown = "F1 of entities" if name == "f1" else name.replace("_", " ").capitalize()
        curve = Curve(shown.lower(), _points(run, f"eval_{name}"))
        unit = "correlation" if name == "pearson" else "share"
        charts.append(curves(f"{shown} on the evaluation caches", "step", unit, [curve]))
    pairs = [
        (_words(name), "default" if run.options[name] is None else _plain(run.options[name]))
        for name in _OPTIONS
        if name in run.options
    ]
    pairs += [
        (f"{_words(name)}, training", _figure(result[name]))
        for name in _SCORES
        if number(result.get(name)) is not None
    ]
    seconds = number(result.get("seconds"))
    state = "Finished" if run.finished else "Not finished: the same command continues"
    if seconds is not None:
        state += f" after {_count(result.get('steps'))} steps in {duration(seconds)}"
    return join(
        [
            element("p", f"{state}.", class_="lead"),
            facts(pairs),
            _evaluation(result.get("eval")),
            *charts,
            _log(run),
            details("Where it comes from", facts(_run_provenance(run))),
        ]
    )


def _evaluation(figures: object) -> Html | None:
    if not isinstance(figures, dict) or not figures:
        return None
    rows = [(_words(_plain(name)), _figure(value)) for name, value in figures.items()]
    return table("On the evaluation caches", ("figure", "value"), rows[:_LINES])


def _log(run: RunPart) -> Html | None:
    """The curves as numbers, for those who do not see them."""
    lines = [line for line in run.log if "loss" in line or "eval_loss" in line]
    if not lines:
        return None
    step = max(1, -(-len(lines) // _LINES))
    known = (*_NAMES, *(f"eval_{name}" for name in (*_NAMES, *FIGURES.values())))
    names = [name for name in known if any(name in line for line in lines)]
    rows = [
        (_count(line.get("step")), *(_figure(line.get(name)) for name in names))
        for line in [*lines[:-1][::step], lines[-1]]
    ]
    header = ("step", *map(_words, names))
    return details("Curves as numbers", table("Curves as numbers", header, rows))


def _run_provenance(run: RunPart) -> list[tuple[str, str]]:
    pairs = [("folder", redact(run.path))]
    for name in ("cache", "eval_cache"):
        if run.options.get(name):
            pairs.append((name.replace("_", " "), _plain(run.options[name])))
    digests = run.identity.get("caches")
    if digests:
        pairs.append(("digests of the caches", _plain(digests)))
    skipped = {"cache", "eval_cache", "out", *_OPTIONS}
    given = {k: v for k, v in run.options.items() if k not in skipped and v not in (None, [], "")}
    return [*pairs, *((str(name), _plain(value)) for name, value in given.items())]


# Sweeps


def sweep_section(sweep: SweepPart) -> Html:
    """All about a sweep: its settings, best first."""
    settings = [s for s in _list(sweep.results.get("settings")) if isinstance(s, dict)]
    ranked, names = _plain(sweep.results.get("ranked_by")), _names(sweep.results.get("task"))
    evaluated = sweep.results.get("evaluated")
    where = "the evaluation caches" if evaluated else "training, as last logged"
    crossed = list(dict.fromkeys(k for s in settings for k in _dict(s.get("setting"))))
    figures = [n for n in _FIGURES if any(n in _dict(s.get("mean")) for s in settings)]
    rows = []
    for setting in settings[:_SETTINGS]:
        values, mean = _dict(setting.get("setting")), _dict(setting.get("mean"))
        spread = _dict(setting.get("deviation"))
        cells = [_figure(mean.get(n)) + _deviation(spread.get(n)) for n in figures]
        words = [_plain(values.get(name, "-")) for name in crossed] or ["all runs"]
        count = f"{len(_list(setting.get('runs'))):,}"
        rows.append((*words, count, *cells, _count(setting.get("parameters"))))
    header = [*(str(name) for name in crossed), "runs"] if crossed else ["setting", "runs"]
    header += [names.get(name, _words(name)) for name in figures] + ["parameters"]
    runs = _list(sweep.results.get("runs"))
    more = len(settings) - len(rows)
    return join(
        [
            element(
                "p",
                f"{counted(len(runs), 'run')} of {counted(len(settings), 'setting')}, best first "
                f"by {names.get(ranked, _words(ranked))}; figures of {where}.",
                class_="lead",
            ),
            table("Settings, means over seeds", header, rows, texts=range(max(1, len(crossed)))),
            element("p", f"{more:,} more settings are left out.", class_="note") if more else None,
            details("Where it comes from", facts([("folder", redact(sweep.path))])),
        ]
    )


# Values of files, as text


def _names(task: object) -> dict[str, str]:
    """What the losses of a task are called: that of scores with their labels is no entropy."""
    hard = {"hard_loss": TASKS[str(task)].hard[0]} if str(task) in TASKS else {}
    return {**_NAMES, **hard}


def _points(run: RunPart, name: str) -> tuple[tuple[float, float], ...]:
    return tuple((line["step"], line[name]) for line in run.log if name in line and "step" in line)


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _figure(value: object) -> str:
    found = number(value)
    return "-" if found is None else f"{found:,.4f}"


def _deviation(value: object) -> str:
    found = number(value)
    return "" if found is None else f" ± {found:.4f}"


def _count(value: object) -> str:
    found = number(value)
    return "-" if found is None else f"{found:,.0f}"


def _plain(value: object) -> str:
    """A value of an options file, cut where it is long."""
    values = value if isinstance(value, list) else [value]
    shown = ", ".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in values)
    shown = "-" if value is None else redact(shown)
    return shown if len(shown) <= 300 else f"{shown[:300]}…"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _short(path: str) -> str:
    """The last two folders of a path."""
    return "/".join(Path(redact(path)).parts[-2:])[-60:]
