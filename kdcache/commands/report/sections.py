"""The sections of a page, as blocks: texts, facts, tables and charts, without markup.

A cache: what it is and how sure its teacher is. Runs and sweeps: curves, figures, and students
next to their teachers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kdcache.cache.figures import domain_table
from kdcache.commands.generate.look import GeneratedView
from kdcache.commands.inspect_result import InspectResult
from kdcache.commands.report.charts import (
    COLOURS,
    Blocks,
    Curve,
    Details,
    Facts,
    Paragraph,
    Table,
    curves,
    histogram,
)
from kdcache.commands.report.gather import CachePart, RunPart, SweepPart, TargetFigures, number
from kdcache.commands.report.rows import rows_as_text
from kdcache.humanize import counted, duration, size
from kdcache.humanize import number as shown
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
        (
            f"{f.temperature:g}",
            shown(f.entropy, 3),
            shown(f.best, 3),
            shown(f.mass),
            f"{f.entries:,.1f}",
        )
        for f in figures
    ]
    header = ("T", "entropy, nats", f"best {_one(task)}", "mass stored", "entries")
    title = f"Targets, means over {positions:,} positions"
    return [Table(title, header, rows), *(Paragraph(note, "note") for note in notes)]


def _one(task: TaskType) -> str:
    """What one answer is called."""
    return "id" if task.over_ids else "class"


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
    for name, teacher in zip(
        (*found.teachers, *[""] * len(spec["teachers"])), spec["teachers"], strict=False
    ):
        pairs.append((f"teacher {name}".strip(), f"SHA-256 {teacher.get('sha256')}"))
    pairs += [
        (name, str(spec[name]))
        for name in ("dtype", "seed", "ensemble", "tokenizer")
        if spec.get(name) is not None
    ]
    pairs += [(f"note: {k}", str(v)) for k, v in part.notes.items() if k != "teachers"]
    return pairs


def _corpus(found: InspectResult) -> Table:
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
    return Table(title, header, rows, (0, 1) if found.domains else (0,))


_LOSSES = ("loss", *LOSS_PARTS)
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


def compare(runs: Sequence[RunPart]) -> Blocks:
    """Students next to their teachers: a table, and their curves in one pair of axes."""
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
    return [
        Table("Students beside their teachers", header, rows, (0, 1)),
        Paragraph(
            "Of the evaluation caches where a run had some, else of training as last logged. "
            "The teacher's cross-entropy is read from the caches, where they keep it.",
            "note",
        ),
        *charts,
        None if note is None else Paragraph(note, "note"),
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
    series = [Curve(names[name], _points(run, name)) for name in _LOSSES]
    charts.append(curves("Training", "step", "loss", series))
    series = [Curve(names[name], _points(run, f"eval_{name}")) for name in _LOSSES]
    charts.append(curves("Evaluation", "step", "loss", series))
    for name in (*FIGURES.values(), "f1"):
        shown = "F1 of entities" if name == "f1" else name.replace("_", " ").capitalize()
        curve = Curve(shown.lower(), _points(run, f"eval_{name}"))
        unit = "share" if METRICS[name].share else "correlation"
        charts.append(curves(f"{shown} on the evaluation caches", "step", unit, [curve]))
    pairs = [
        (_words(name), "default" if run.options[name] is None else _plain(run.options[name]))
        for name in _OPTIONS
        if name in run.options
    ]
    pairs += [
        (f"{_words(name)}, training", _figure(result[name]))
        for name in RANKED
        if number(result.get(name)) is not None
    ]
    seconds = number(result.get("seconds"))
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
            pairs.append((name.replace("_", " "), _plain(run.options[name])))
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
    found = number(value)
    return "-" if found is None else f"{found:,.4f}"


def _deviation(value: float | None) -> str:
    found = number(value)
    return "" if found is None else f" ± {found:.4f}"


def _count(value: float | None) -> str:
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
