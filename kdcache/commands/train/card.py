"""The model card of a run: `README.md` next to the student, as model hubs show it.

`train --plot`: the curves of a run, from its `metrics.jsonl`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from kdcache import __version__
from kdcache.commands.run_folder import TrainResult, read_metrics
from kdcache.commands.train.prepare import RunPlan
from kdcache.humanize import markdown, shares
from kdcache.metrics import RANKED, run_title
from kdcache.plots import Chart, Level, Line, plot_charts
from kdcache.storage import redact
from kdcache.tasks import CAUSAL_LM, TASKS

CARD_FILE = "README.md"
_DIGEST = re.compile("`[0-9a-f]{64}`")  # of a manifest
_PER_TOKEN = (
    "Losses are per token of this model's tokenizer. Models of other tokenizers compare by bits "
    "per byte: `kdcache evaluate` gives those of all of them on the same bytes."
)


def model_card(plan: RunPlan, result: TrainResult, model_type: str | None) -> str:
    """What was distilled from what, how well, and how to load it.

    Args:
        model_type: of the student as transformers knows it; None for a `module:function`.
    """
    options, spec = plan.options, plan.caches[0].spec
    name = plan.out.name
    task = TASKS[spec.task]
    header: dict[str, Any] = {
        "library_name": "peft" if options.lora else "transformers" if model_type else "kdcache",
        "pipeline_tag": task.pipeline,
        "tags": ["knowledge-distillation", "kdcache"],
    }
    if options.lora and not Path(options.student).exists():
        header["base_model"] = redact(options.student)
    teachers = dict.fromkeys(str(t) for c in plan.caches for t in c.notes.get("teachers", ()))
    initial = f"{options.init_from} (SHA-256 {plan.weights.get('init_sha256')})"
    trained = f"{result.parameters:,}"
    if options.lora:
        trained += f", of which {result.trained or 0:,} are trained"
    loss = (
        "hard labels alone"
        if options.hard_only
        else f"alpha {options.alphas} on the hard labels, the rest {options.divergence} at "
        f"T = {options.temperatures}"
    )
    if options.cross_tokenizer and not options.hard_only:
        loss = (
            f"alpha {options.alphas} on the hard labels, the rest {options.cross_tokenizer} across "
            f"tokenizers with T = {options.likelihood_temperature:g}"
        )
    own = options.student_tokenizer or options.student
    facts = [
        ("task", spec.task),
        ("teacher", ", ".join(teachers) or "unknown"),
        ("student began as", options.student),
        *([("with the weights of", initial)] if options.init_from else []),
        *([("adapter", f"LoRA, {options.adapter}")] if options.lora else []),
        *([("tokenizer", f"its own, of {own}")] if options.cross_tokenizer else []),
        ("parameters", trained),
        ("loss", loss),
        ("training", f"{result.steps:,} steps of {options.batch_size} rows, {result.rows:,} rows"),
        *([("rows of an epoch", shares(result.epoch_rows))] if result.epoch_rows else []),
        ("seed", str(options.seed)),
        ("kdcache", __version__),
    ]
    caches = [
        (url, cache.spec.codec, f"{cache.manifest.rows:,}", f"`{cache.digest}`", corpus)
        for url, cache in zip(options.cache, plan.caches, strict=True)
        for corpus in (", ".join(str(f["name"]) for f in cache.spec.corpus[:3]),)
    ]
    measured: dict[str, Any] = {"training loss": result.loss}
    measured |= {f"evaluation: {key}": value for key, value in result.eval.items()}
    # Its own models are registered with transformers by the import.
    first = "import kdcache\n" if not model_type or model_type.startswith("kdcache-") else ""
    call = "kdcache.load_student"
    if options.lora:
        first = "import kdcache\n"  # merges it into its base, with a classifier's own classes
    elif model_type:
        first += f"from transformers import {task.auto}\n"
        call = f"{task.auto}.from_pretrained"
    trust = "" if model_type else f", trust_remote_code={True}"  # the code that made it
    load = f"{first}\nmodel = {call}({json.dumps(name)}{trust})"
    return (
        "\n\n".join(
            [
                f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
                f"# {markdown(name)}",
                "A student that was trained on the cached answers of its teacher with kdcache.",
                table(("", ""), facts),
                "## Data",
                table(("cache", "codec", "rows", "SHA-256 of its manifest", "corpus"), caches),
                "## Figures",
                table(("figure", "value"), [(k, f"{v:.4f}") for k, v in measured.items()]),
                *([_PER_TOKEN] if task.causal else []),
                "## Use",
                f"```python\n{load}\n```",
            ]
        )
        + "\n"
    )


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table whose cells are texts from anywhere."""
    lines = [header, ("---",) * len(header), *rows]
    cells = ([c if _DIGEST.fullmatch(c) else markdown(c) for c in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


_LOSSES = {  # of the log, the first charts
    "loss": "loss (what is minimised)",
    "hard_loss": "",
    "soft_loss": "divergence from the teacher, times T²",
    "soft_cross_entropy": "cross-entropy with the teacher, times T²",
}


def plot_run(path: str, result: TrainResult) -> None:
    """Draw what a run logged, training and evaluation, next to its teacher's cross-entropy."""
    charts = charts_of(read_metrics(Path(result.out)), result)
    note = "" if result.best_step is None else f"the student is that of step {result.best_step}"
    plot_charts(path, charts, title=Path(result.out).name, note=note)


def charts_of(lines: Sequence[dict[str, Any]], result: TrainResult) -> list[Chart]:
    """One chart for each figure that was logged."""
    levels = {
        "teacher, training": result.teacher_cross_entropy,
        "teacher, evaluation": result.eval_teacher_cross_entropy,
    }
    charts = []
    hard, unit = TASKS[result.task or CAUSAL_LM].hard
    for figure in dict.fromkeys((*_LOSSES, *RANKED)):
        said = _LOSSES.get(figure, run_title(figure))
        y_label = said or f"{hard} with the labels ({unit})"
        drawn = [
            line
            for label, key in (("training", figure), ("evaluation", f"eval_{figure}"))
            if (line := _line(label, key, lines)).x
        ]
        if drawn:
            beside = levels.items() if figure == "hard_loss" else ()
            known = [Level(label, value) for label, value in beside if value is not None]
            charts.append(Chart("", "step", y_label, drawn, known))
    if len(charts) == 2 and charts[0].lines == charts[1].lines:
        del charts[0]  # hard labels alone: the loss is the cross-entropy
    return charts


def _line(label: str, key: str, lines: Sequence[dict[str, Any]]) -> Line:
    found = [(line["step"], line[key]) for line in lines if key in line]
    return Line(label, [step for step, _ in found], [value for _, value in found])
