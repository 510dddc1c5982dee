"""The sections of a page, as blocks: texts, facts, tables and charts, without markup.

A cache: what it is, how sure its teacher is, and rows as text, coloured by the teacher's surprise.
Runs and sweeps: curves, figures, and students next to their teachers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from kdcache.cache.figures import domain_table
from kdcache.commands.generate.look import GeneratedView
from kdcache.commands.inspect_result import InspectResult, PositionView, RowView
from kdcache.commands.report.charts import (
    COLOURS,
    Article,
    Block,
    Blocks,
    Cell,
    Coloured,
    Curve,
    Details,
    Facts,
    Guesses,
    Heading,
    Legend,
    Paragraph,
    RowText,
    Table,
    curves,
    histogram,
    level_of,
)
from kdcache.commands.report.gather import CachePart, RunPart, SweepPart, TargetFigures, finite
from kdcache.humanize import counted, duration, number, score, size
from kdcache.metrics import LOSS_PARTS, METRICS, RANKED, run_title
from kdcache.storage import redact
from kdcache.student.figures import FIGURES, figure_of
from kdcache.tasks import CAUSAL_LM, TASKS, TaskType

_FILES = 50


def cache_section(part: CachePart) -> Blocks:
    """All about a cache."""
    found = part.facts
    return [
        Paragraph(_sentence(found), "lead"),
        Facts(found.facts()),
        Table("Domains", *domain_table(found.domains)) if found.domains else None,
        samples_table(found) if isinstance(found, GeneratedView) else None,
        *_figures(part.figures, part.positions, TASKS[found.task]),
        histogram(
            "The teacher's surprise at the labels",
            "nats: minus its log-probability of the label at T = 1",
            part.surprise,
        ),
        _columns(found),
        *(rows_as_text(part.rows, TASKS[found.task]) if part.rows else ()),
        Details("Where it comes from", [Facts(_cache_provenance(part)), _corpus(found)]),
    ]


def samples_table(found: GeneratedView) -> Table:
    """Some answers."""
    rows = [
        (f"{s.row:,}", s.prompt, s.completion, f"{s.tokens:,}", f"{s.nats:.2f}", s.reason)
        for s in found.samples
    ]
    return Table("Samples", ("row", "prompt", "answer", "tokens", "nats", "ended by"), rows)


def _sentence(found: InspectResult) -> str:
    state = "" if found.finished else f" Unfinished: {found.done:,} of {found.spans:,} shards."
    each = found.bytes_per_position
    cost = "" if each is None else f", {each:.1f} B a position"
    teachers = ", ".join(found.teachers) or "a teacher without a name"
    if isinstance(found, GeneratedView):
        return f"Text of {teachers}: {found.rows:,} answers, {size(found.bytes)}{cost}.{state}"
    return (
        f"{found.codec} targets of {teachers} at {found.positions:,} positions: "
        f"{size(found.bytes)}{cost}.{state}"
    )


def _figures(figures: Sequence[TargetFigures], positions: int, task: TaskType) -> Blocks:
    if not figures:
        return []
    notes = []
    if any(f.mass is not None and f.mass < 1 - 1e-9 for f in figures):
        notes.append(
            "Where no entropy is stored (other T, older caches) it is a lower bound: all ids that "
            "are not stored count as one."
        )
    if any(f.mass is None for f in figures):
        notes.append(
            "Entries are drawn: their weights are right on average, so the mass of a single "
            "position is not known, nor is its entropy but where it is stored."
        )
    rows = [
        (f"{f.temperature:g}", *(number(v, 3) for v in (f.entropy, f.best)), number(f.mass),
         number(f.entries, 1))
        for f in figures
    ]  # fmt: skip
    best = f"best {'id' if task.over_ids else 'class'}"
    header = ("T", "entropy, nats", best, "mass stored", "entries")
    title = f"Targets, means over {positions:,} positions"
    return [Table(title, header, rows), *(Paragraph(note, "note") for note in notes)]


def _columns(found: InspectResult) -> Details | None:
    if not found.columns:
        return None
    rows = [(c.name, f"{c.bytes_per_position:.3f}") for c in found.columns]
    title = f"Bytes a position, compressed ({found.sampled_shards} of {found.done} shards)"
    return Details("Columns on disk", [Table(title, ("column", "B a position"), rows)])


def _cache_provenance(part: CachePart) -> list[tuple[str, str]]:
    found = part.facts
    spec = found.spec
    pairs = [("folder", found.cache)]
    for i, teacher in enumerate(spec["teachers"]):
        name = " ".join(("teacher", *found.teachers[i : i + 1]))
        pairs.append((name, f"SHA-256 {teacher.get('sha256')}"))
    pairs += [
        (name, str(spec[name]))
        for name in ("dtype", "seed", "ensemble", "tokenizer")
        if spec.get(name) is not None
    ]
    pairs += [(f"note: {k}", str(v)) for k, v in part.notes.items() if k != "teachers"]
    return pairs


def _corpus(found: InspectResult) -> Table:
    files = found.spec.get("corpus") or []
    names = ("name", "domain") if found.domains else ("name",)
    rows = [
        (
            *(str(f.get(name, "")) for name in names),
            size(f["size"]) if isinstance(f.get("size"), int) else "-",
        )
        for f in files[:_FILES]
    ]
    title = f"Corpus: {len(files):,} files"
    title += f", {len(rows)} of them here" if len(files) > len(rows) else ""
    return Table(title, ("file", *names[1:], "size"), rows, range(len(names)))


# Rows as text

_TEXT = 20_000  # characters of a row's text
_TOKENS = 1024  # of a row as text
_POSITIONS = 128  # of a row in a table
_TOKEN = 80  # characters of a token
_NEW_LINE = "\u21b5"
_GOES_ON = "##"  # begins a token that continues with a word, where blanks are between tokens


def rows_as_text(rows: Sequence[RowView], task: TaskType) -> Blocks:
    """A heading, the meaning of the colours where there are any, and each row."""
    shown: Blocks = [_row(row, task) for row in rows]
    if any(_nats(p, row) is not None for row in rows for p in row.positions):
        what = "a token" if task.over_ids else "a word's label" if task.per_token else "a label"
        about = Paragraph(f"Colour: how surprised the teacher was by {what}, in nats.")
        shown = [about, Legend(), *shown]
    return [Heading("Rows as text"), *shown]


def _row(row: RowView, task: TaskType) -> Article:
    about = "" if row.exact else ", unbiased sample"
    of = f" of {row.domain}" if row.domain else ""
    title = f"Row {row.row}{of}: {row.tokens:,} tokens, T = {row.temperature:g}{about}"
    shown = row.positions[:_POSITIONS]
    cells = [_cells(position, row, task.per_token) for position in shown]
    header = _headings(row, task)
    lines = [[cell[name] for name in header.values()] for cell in cells]
    caption = f"Row {row.row}{', position by position' if task.per_token else ': its answer'}"
    if len(shown) < len(row.positions):
        caption += f": the first {len(shown)} of {len(row.positions):,}"
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
        head = {"place": "place", after: "after", label: "label", "nats": "nats"}
        guesses = {"teacher's best guesses": "guesses", "rest": "rest"}
        return {**head, "entropy": "entropy", **guesses}
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
        pieces.append((token, _look(level_of(_nats(position, row)))))
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
            level = level_of(_nats(position, row))
        if row.between:
            goes_on = text.startswith(_GOES_ON) and text != _GOES_ON
            text = text.removeprefix(_GOES_ON) if goes_on else text
            pieces += [] if goes_on or not pieces else [(row.between, None)]
        pieces.append((_cut(text, _TOKEN), _look(level)))
    return RowText([*pieces, *_more(row.read)])


def _more(tokens: Sequence[object]) -> list[tuple[str, str | None]]:
    return [(" …", "gap")] if len(tokens) > _TOKENS else []


def _cells(position: PositionView, row: RowView, per_token: bool) -> dict[str, Cell]:
    """All that a table may show of a position."""
    nats = _nats(position, row)
    quote = _quoted if per_token else str
    label = position.label_text
    return {
        "place": str(position.place),
        "after": quote(_cut(position.token or "", _TOKEN)),
        "label": "-" if label is None else quote(_cut(label, _TOKEN)),
        "nats": Coloured("-" if nats is None else f"{nats:.2f}", level_of(nats)),
        "entropy": Coloured(number(position.entropy, 2), level_of(position.entropy)),
        "guesses": Guesses(
            [(quote(_cut(g.text, _TOKEN)), f"{g.probability:.3f}") for g in position.guesses]
        ),
        "rest": f"{position.rest:.3f}",
        "score": "-" if position.score is None else score(position.score),
    }


def _nats(position: PositionView, row: RowView) -> float | None:
    """The surprise at the label: kept by the cache, or by the teacher's own guess at T = 1."""
    if position.label_logprob is not None:
        return 0.0 - position.label_logprob  # or 0 would be shown as -0
    own = row.exact and row.temperature == 1
    known = [g.probability for g in position.guesses if g.id == position.label and own]
    return math.log(1 / known[0]) if known and known[0] > 0 else None


def _look(level: str) -> str:
    return f"t {level}".strip()


def _quoted(text: str) -> str:
    return f"\u2018{text.replace(chr(10), _NEW_LINE)}\u2019"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


# Runs

_LOSSES = ("loss", *LOSS_PARTS)
_LINES = 20  # of a curve as a table
_SETTINGS = 200
_OPTIONS = (
    *("model", "student", "alpha", "temperature", "divergence", "learning_rate", "batch_size"),
    "seed",
)


def compare(runs: Sequence[RunPart]) -> Blocks:
    """Students next to their teachers: a table, and their curves in one pair of axes."""
    rows = [_student(run) for run in runs]
    tasks = {task for run in runs if (task := str(run.result.get("task"))) in TASKS}
    hard = {TASKS[task].hard for task in tasks} or {TASKS[CAUSAL_LM].hard}
    loss, unit = next(iter(hard)) if len(hard) == 1 else ("hard loss", "of its task")
    of_tasks = sorted({name for task in tasks if (name := figure_of(task))}) or ["accuracy"]
    header = ["run", "student", "alpha", "T", "parameters", "steps", loss, "teacher's"]
    header += [" or ".join(_words(name) for name in of_tasks), "soft loss"]
    drawn = list(runs)[:COLOURS]
    charts = []
    for name, title in (("eval_hard_loss", "on the evaluation caches"), ("hard_loss", "training")):
        found = [Curve(_short(run.path), _points(run, name)) for run in drawn]
        named = f"{loss.capitalize()} with the labels, {title}"
        charts.append(curves(named, "step", unit, found))
    more = len(runs) - len(drawn)
    note = f"Curves of the first {len(drawn)} runs; {more} more have their own."
    return [
        Table("Students beside their teachers", header, rows, (0, 1)),
        Paragraph(
            "Of the evaluation caches where a run had some, else of training as last logged. "
            "The teacher's cross-entropy is read from the caches, where they keep it.",
            "note",
        ),
        *charts,
        Paragraph(note, "note") if more else None,
    ]


def _student(run: RunPart) -> tuple[str, ...]:
    evaluated = run.result.get("eval")
    figures = evaluated or run.result
    teacher = "eval_teacher_cross_entropy" if evaluated else "teacher_cross_entropy"
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


def run_section(run: RunPart) -> Blocks:
    """All about a run."""
    result, charts = run.result, []
    names = _names(run.result.get("task"))
    for title, prefix in (("Training", ""), ("Evaluation", "eval_")):
        series = [Curve(names[name], _points(run, prefix + name)) for name in _LOSSES]
        charts.append(curves(title, "step", "loss", series))
    for name in (*FIGURES.values(), "f1"):
        shown = "F1 of entities" if name == "f1" else _words(name).capitalize()
        curve = Curve(shown.lower(), _points(run, f"eval_{name}"))
        unit = "share" if METRICS[name].share else "correlation"
        charts.append(curves(f"{shown} on the evaluation caches", "step", unit, [curve]))
    pairs = [
        (
            name.replace("_", " "),
            "default" if run.options[name] is None else _plain(run.options[name]),
        )
        for name in _OPTIONS
        if name in run.options
    ]
    pairs += [
        (f"{name.replace('_', ' ')}, training", _figure(result[name]))
        for name in RANKED
        if finite(result.get(name)) is not None
    ]
    seconds = finite(result.get("seconds"))
    state = "Finished" if run.finished else "Not finished: the same command continues"
    if seconds is not None:
        state += f" after {_count(result.get('steps'))} steps in {duration(seconds)}"
    return [
        Paragraph(f"{state}.", "lead"),
        Facts(pairs),
        _evaluation(result.get("eval", {}), result.get("one_answer", {})),
        Paragraph(f"It is {_plain(result['warning'])}", "note") if result.get("warning") else None,
        *charts,
        _log(run),
        Details("Where it comes from", [Facts(_run_provenance(run))]),
    ]


def _evaluation(figures: Mapping[str, float], one: Mapping[str, float]) -> Table | None:
    if not figures:
        return None
    rows = [(_words(_plain(k)), _figure(v), _figure(one.get(k))) for k, v in figures.items()]
    header = ("figure", "value", "one answer for all")
    return Table("On the evaluation caches", header, rows[:_LINES])


def _log(run: RunPart) -> Details | None:
    """The curves as numbers, for those who do not see them."""
    lines = [line for line in run.log if "loss" in line or "eval_loss" in line]
    if not lines:
        return None
    step = max(1, -(-len(lines) // _LINES))
    known = (*_LOSSES, *(f"eval_{name}" for name in (*_LOSSES, *FIGURES.values())))
    names = [name for name in known if any(name in line for line in lines)]
    rows = [
        (_count(line.get("step")), *(_figure(line.get(name)) for name in names))
        for line in [*lines[:-1][::step], lines[-1]]
    ]
    header = ("step", *map(_words, names))
    return Details("Curves as numbers", [Table("Curves as numbers", header, rows)])


def _run_provenance(run: RunPart) -> list[tuple[str, str]]:
    pairs = [("folder", redact(run.path))]
    for name in ("cache", "eval_cache"):
        if run.options.get(name):
            pairs.append((_words(name), _plain(run.options[name])))
    digests = run.identity.get("caches")
    if digests:
        pairs.append(("digests of the caches", _plain(digests)))
    skipped = {"cache", "eval_cache", "out", *_OPTIONS}
    given = {k: v for k, v in run.options.items() if k not in skipped and v not in (None, [], "")}
    return [*pairs, *((str(name), _plain(value)) for name, value in given.items())]


# Sweeps


def sweep_section(sweep: SweepPart) -> Blocks:
    """All about a sweep: its settings, best first."""
    settings, ranked, runs = (sweep.results[n] for n in ("settings", "ranked_by", "runs"))
    names = _names(sweep.results.get("task"))
    where = "the evaluation caches" if sweep.results["evaluated"] else "training, as last logged"
    crossed = list(dict.fromkeys(k for s in settings for k in s["setting"]))
    figures = [n for n in RANKED[:-1] if any(n in s["mean"] for s in settings)]
    rows = []
    for setting in settings[:_SETTINGS]:
        mean, spread = setting["mean"], setting["deviation"]
        cells = [_figure(mean.get(n)) + _deviation(spread.get(n)) for n in figures]
        words = [_plain(setting["setting"].get(name, "-")) for name in crossed] or ["all runs"]
        count = f"{len(setting['runs']):,}"
        rows.append((*words, count, *cells, _count(setting["parameters"])))
    header = [*crossed, "runs"] if crossed else ["setting", "runs"]
    header += [names[name] for name in figures] + ["parameters"]
    more = len(settings) - len(rows)
    return [
        Paragraph(
            f"{counted(len(runs), 'run')} of {counted(len(settings), 'setting')}, best first "
            f"by {names[ranked]}; figures of {where}.",
            "lead",
        ),
        Table("Settings, means over seeds", header, rows, range(max(1, len(crossed)))),
        Paragraph(f"{more:,} more settings are left out.", "note") if more else None,
        Details("Where it comes from", [Facts([("folder", redact(sweep.path))])]),
    ]


# Values of files, as text


def _names(task: str | None) -> dict[str, str]:
    """What the figures of a task are called: the loss of scores is not a cross-entropy."""
    return {name: run_title(name, task) for name in RANKED}


def _points(run: RunPart, name: str) -> tuple[tuple[float, float], ...]:
    return tuple((line["step"], line[name]) for line in run.log if name in line and "step" in line)


def _figure(value: float | None) -> str:
    return number(finite(value))


def _deviation(value: float | None) -> str:
    found = finite(value)
    return "" if found is None else f" ± {found:.4f}"


def _count(value: float | None) -> str:
    return number(finite(value), 0)


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
