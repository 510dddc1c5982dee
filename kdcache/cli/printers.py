"""What a command prints of its outcome on a terminal: one function each, without logic.

A function takes the options and the outcome. It may return the next command, as words; `()` for
none. Without, it is that of the command's row in `kdcache.cli.commands`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cli.display import print_table, terminal
from kdcache.cli.options import echo
from kdcache.humanize import counted, duration, number, redacted, size
from kdcache.metrics import METRICS
from kdcache.options import Options, key_values, options_of
from kdcache.tasks import CAUSAL_LM, TASKS

if TYPE_CHECKING:
    from kdcache.commands.build.build import DryRun
    from kdcache.commands.build.make import BuildResult
    from kdcache.commands.build.options import BuildOptions
    from kdcache.commands.demo.demo import DemoResult
    from kdcache.commands.env import EnvResult
    from kdcache.commands.evaluate.scores import EvaluateResult
    from kdcache.commands.export import ExportResult
    from kdcache.commands.finetune.finetune import FinetuneResult
    from kdcache.commands.finetune.options import FinetuneOptions
    from kdcache.commands.generate.generate import GenerateDryRun, GenerateResult
    from kdcache.commands.generate.options import GenerateOptions
    from kdcache.commands.inspect_result import InspectResult
    from kdcache.commands.options import (
        EvaluateOptions,
        ExportOptions,
        GcOptions,
        InspectOptions,
        PlanOptions,
        PredictOptions,
        RepairOptions,
        VerifyOptions,
    )
    from kdcache.commands.plan.result import PlanResult
    from kdcache.commands.predict import PredictResult
    from kdcache.commands.report.report import ReportResult
    from kdcache.commands.run_folder import TrainResult
    from kdcache.commands.share import ShareResult
    from kdcache.commands.sweep.results import SweepResult
    from kdcache.commands.train.options import TrainOptions
    from kdcache.commands.upkeep import GcResult, RepairResult
    from kdcache.commands.verify import VerifyResult

Next = Sequence[str] | None


def planned(options: PlanOptions, result: PlanResult) -> Next:
    """Print a plan."""
    from kdcache.cli.views import render_plan
    from kdcache.commands.build.options import BuildOptions
    from kdcache.commands.plan.result import recommended

    render_plan(result, terminal(), details=options.all)
    take, _ = recommended(result.caches, result.corpus_positions)[0]
    same = dataclasses.replace(
        options.build_options(),
        codec=take.codec,
        temperatures=take.temperatures,
        out="CACHE",
        workers=None,
    )
    return ("build", *as_words(same, BuildOptions))


def built_dry(options: BuildOptions, result: DryRun) -> Next:
    """Print what a build would make."""
    from kdcache.cli.views import render_dry_run
    from kdcache.commands.options import PlanOptions

    render_dry_run(result, terminal())
    return ("plan", *as_words(dataclasses.replace(options, codec=result.codec), PlanOptions))


def built(options: BuildOptions, result: BuildResult) -> Next:
    """Print what a build has made."""
    _made(result, "teacher")
    if result.missing:  # of other parts, whose commands are the user's
        return ()
    return _training(options.out)


def generated_dry(options: GenerateOptions, result: GenerateDryRun) -> Next:
    """Print what a generation would write."""
    first = f"{result.prompts:,} in the first, of {result.prompt_tokens:.0f} tokens on average"
    rows = [
        ("corpus", f"{result.corpus}: {result.state}, {counted(result.done, 'shard')} there"),
        ("model", f"{result.model}, {result.dtype} on a {result.device}"),
        ("prompts", f"{counted(result.files, 'file')}, {counted(result.spans, 'shard')}; {first}"),
        ("answers", f"{result.samples} each, of {result.max_new_tokens:,} tokens at most"),
        ("fingerprint", result.fingerprint[:16]),
    ]
    print_table(terminal(), ("", ""), rows, left=2)
    same = dataclasses.replace(options, dry_run=False)
    return ("generate", *as_words(same, type(options)))


def generated(options: GenerateOptions, result: GenerateResult) -> Next:
    """Print what a generation has written."""
    if not result.made:
        answers = counted(result.answers, "answer")
        echo(f"{result.corpus} is complete: {answers}. Nothing to do.")
    else:
        ended = f"{result.stopped / max(1, result.answers):.0%} ended by themselves"
        left_out = f"; {counted(result.skipped, 'record')} left out" if result.skipped else ""
        if result.filtered is not None:
            left_out += f"; {counted(result.filtered, 'record')} left out by --filter"
        if result.workers_lost:
            left_out += f"; {counted(result.workers_lost, 'worker')} lost"
        echo(
            f"{result.corpus}: {counted(result.answers, 'answer')} to "
            f"{counted(result.prompts, 'prompt')}, {counted(result.tokens, 'token')} "
            f"({ended}; {result.nats:.3f} nats a token), {size(result.bytes)} in "
            f"{duration(result.seconds)}, model {duration(result.model_seconds)}; "
            f"{result.made:,} of {counted(result.spans, 'shard')} made now{left_out}."
        )
    if result.missing:
        echo(f"This part is made; {counted(result.missing, 'shard')} of other parts are missing.")
        return ()
    if result.cache is None or options.cache is None:
        return ("build", "--teacher", "TEACHER", "--corpus", options.out, "--out", "CACHE")
    _made(result.cache, "teacher")
    return _training(options.cache)


def _training(cache: str) -> Sequence[str]:
    """How to train on a cache, at a temperature that it is for."""
    from kdcache.cache import Cache

    spec = Cache.open(cache).spec
    student = "CONFIG_OR_MODEL" if TASKS[spec.task].over_ids else "bilstm"
    words = ["train", "--cache", cache, "--student", student, "--out", "RUN"]
    if not spec.make_codec().any_temperature and 1.0 not in spec.temperatures:
        words += ["--temperature", f"{spec.temperatures[0]:g}"]
    return words


def transcoded(_: Options, result: BuildResult) -> None:
    """Print what a transcoding has made."""
    _made(result, "codec")


def imported(_: Options, result: BuildResult) -> None:
    """Print what an import has made."""
    _made(result, "reading")


def _made(result: BuildResult, worker: str) -> None:
    if not result.made:
        echo(f"{result.cache} is complete: {counted(result.positions, 'position')}. Nothing to do.")
    else:
        losses = ""
        if result.skipped:
            losses += f"; {counted(result.skipped, 'record')} left out (empty or broken)"
        if result.filtered is not None:
            losses += f"; {counted(result.filtered, 'record')} left out by --filter"
        if result.truncated:
            losses += f"; {counted(result.truncated, 'document')} cut at --max-length"
        if result.clipped_mass > 1e-3:
            losses += f"; {result.clipped_mass:.1%} of the teacher's probability is on ids "
            losses += "outside its tokenizer's vocabulary"
        if result.workers_lost:
            losses += f"; {counted(result.workers_lost, 'worker')} lost, "
            losses += f"{counted(result.redone, 'attempt')} repeated"
        echo(
            f"{result.cache}: {counted(result.rows, 'row')}, "
            f"{counted(result.positions, 'position')}, "
            f"{size(result.bytes)} ({result.bytes_per_position:.1f} B per position, rows "
            f"included) in {duration(result.seconds)}, "
            f"{worker} {duration(result.teacher_seconds)}; "
            f"{result.made:,} of {counted(result.spans, 'shard')} made now{losses}."
        )
        if result.missing:
            echo(
                f"This part is made. {counted(result.missing, 'shard')} of other parts "
                f"{'is' if result.missing == 1 else 'are'} missing; the part that ends last seals "
                "the cache."
            )
    if result.domains:
        from kdcache.cli.views import render_domains

        render_domains(result.domains, terminal())


def exported(options: ExportOptions, result: ExportResult) -> Next:
    """Print what an export has written."""
    from kdcache.cache import Cache

    echo(
        f"{result.out}: {counted(result.files, 'file')}, {counted(result.rows, 'row')}, "
        f"{counted(result.positions, 'position')}, {size(result.bytes)}; {result.made} made now in "
        f"{duration(result.seconds)}."
    )
    if (found := result.differences) is not None:
        print_table(
            terminal(),
            ("documents", f"{found.documents:,}"),
            [("mean difference", f"{found.mean:+.4f} nats a token")]
            + [(f"{share:.0%} have at most", f"{value:+.4f}") for share, value in found.quantiles],
        )
        shown = [
            (f"{one.row:,}", f"{one.difference:+.4f}", " ".join(one.text.split())[:120])
            for one in (*found.highest, *reversed(found.lowest))
        ]
        print_table(terminal(), ("row", "difference", "text"), shown)
    if options.layout == "documents":
        rows = ("--tokenizer", "TEACHER", "--record-form", "ids", "--labels", "next")
        return ("build", "--teacher", "TEACHER", "--corpus", options.out, *rows, "--out", "CACHE")
    if options.layout == "dpo":
        return ()
    (cache,) = options.cache
    spec = Cache.open(cache).spec
    drawn = spec.codec.startswith(("sample", "anchored"))
    if spec.task != CAUSAL_LM or drawn or (options.temperature or spec.temperatures[0]) != 1:
        return ("inspect", cache, "--row", "0")  # an import takes no such targets
    return ("import", "--corpus", options.out, "--tokenizer", "TEACHER", "--out", "CACHE")


def trained(options: TrainOptions, result: TrainResult) -> Next:
    """Print the outcome of a training."""
    from kdcache.cli.views import render_figures
    from kdcache.loss.metrics import perplexity
    from kdcache.student.factory import is_factory

    whole = {name: value for name, value in result.eval.items() if "/" not in name}
    measured = "  ".join(f"{name} {value:.4g}" for name, value in whole.items())
    if not result.made:
        echo(f"{result.out} is complete: {result.steps} steps. Nothing to do. {measured}")
        return ()
    nats = result.eval_teacher_cross_entropy if result.eval else result.teacher_cross_entropy
    shown = number(perplexity(nats), 2)
    teacher = "" if nats is None else f"; teacher's cross-entropy {nats:.4f} ({shown})"
    best = f" (best: step {result.best_step})" if result.best_step is not None else ""
    words = ""
    if result.vocabulary is not None:
        words = f"; vocabulary of {result.vocabulary:,}"
    if result.unknown is not None:
        words += f" (unknown: {result.unknown:.1%} of the words"
        if result.eval_unknown is not None:
            words += f", {result.eval_unknown:.1%} in evaluation"
        words += ")"
    if result.pretrained is not None:
        words += f"; word vectors for {result.pretrained:,} of them"
    if result.cut:
        words += f"; {result.cut:,} labels beyond the longest row left out"
    if result.lost:
        words += f"; {result.lost:,} stretches of text without labels"
    adapted = ""
    if options.lora is not None:
        adapted = f"; an adapter of {result.trained:,} of {result.parameters:,} parameters"
    evaluation = f"; evaluation: {measured}" if measured else ""
    one = result.one_answer
    if known := [f"{name} {one[name]:.4g}" for name in whole if name in one]:
        evaluation += f" (one answer for all: {'  '.join(known)})"
    echo(
        f"{result.out}: {counted(result.steps, 'step')}{best}, {counted(result.rows, 'row')}, loss "
        f"{result.loss:.4f} in {duration(result.seconds)}{words}{adapted}{evaluation}{teacher}."
    )
    render_figures(result.eval, terminal())
    if result.warning:
        more = dataclasses.replace(options, max_steps=None)
        look = ("inspect", options.cache[0], "--row", "0")
        return _longer("train", more, result.epochs / result.steps) or look
    test = (options.eval_cache or ("TEST_CACHE",))[0]
    runs_code = options.trust_remote_code or is_factory(options.student)
    trust = ("--trust-remote-code",) if runs_code else ()
    return ("evaluate", "--student", options.out, "--cache", test, *trust)


def _longer(command: str, options: Any, step: float) -> Sequence[str]:
    """A training that learnt little, with more steps, of so many epochs each; () after many."""
    from kdcache.student.one_answer import ENOUGH_STEPS

    epochs = math.ceil(ENOUGH_STEPS * step)
    if epochs <= options.epochs:
        return ()
    more = dataclasses.replace(options, epochs=epochs, out=f"{options.out}-longer")
    return (command, *as_words(more, type(options)))


def swept(_: Options, result: SweepResult) -> None:
    """Print the outcome of a sweep."""
    from kdcache.cli.views import render_sweep

    render_sweep(result, terminal())


def finetuned(options: FinetuneOptions, result: FinetuneResult) -> Next:
    """Print the outcome of a fine-tuning."""
    from kdcache.commands.build.options import BuildOptions

    figures = ((METRICS[n].title, getattr(result, n, None)) for n in METRICS if n != "loss")
    scores = "".join(f", {title} {value:.4f}" for title, value in figures if value is not None)
    if not result.made:
        echo(f"{result.out} is complete{scores}. Nothing to do.")
        return ()
    if result.truncated:
        source = TASKS[options.task].source
        shown = f"{counted(result.truncated, 'record' if source else 'text')} cut at --max-length"
        shown += " or --seq2seq max-source-length" if source else f" {result.max_length}"
        echo(f"{shown}: the teacher does not see the rest.", err=True)
    echo(
        f"{result.out}: {counted(result.rows, 'row')}, {result.trained:,} of "
        f"{result.parameters:,} parameters trained in {duration(result.seconds)}{scores}."
    )
    if result.warning:
        return _longer("finetune", options, options.epochs / result.steps)
    given = {"teacher": (options.out,), "corpus": ("CORPUS",), "out": "CACHE"}
    return ("build", *_of_texts(BuildOptions, options, **given))


def evaluated(options: EvaluateOptions, result: EvaluateResult) -> Next:
    """Print the figures of students."""
    from kdcache.cli.views import render_evaluation
    from kdcache.commands.options import PredictOptions

    render_evaluation(result, terminal())
    task = TASKS[result.task]
    if (task.over_ids and not task.source) or options.student[0] in result.little_learnt:
        runs = [name for name in options.student if Path(name, "train.json").is_file()]
        parts = [*([options.cache] if options.cache else []), *runs]
        return ("report", *parts, "--out", "report.html") if parts else ()
    given = {"student": options.student[0], "corpus": ("TEXTS",)}
    return ("predict", *_of_texts(PredictOptions, options, **given))


_READING = ("columns", "format", "documents", "delimiter", "task", "trust_remote_code")


def _of_texts(kind: type[Options], options: Options, **given: Any) -> Sequence[str]:
    """Words of another command that reads texts as this one did, with the fields `given`."""
    both = {one.name for one in options_of(kind)} & {*_READING}
    same = {name: getattr(options, name, None) for name in both}
    same = {name: value for name, value in same.items() if value is not None}
    return as_words(kind(**(same | given)), kind)


def predicted(options: PredictOptions, result: PredictResult) -> Next:
    """Print what was predicted into a file; else the predictions were printed themselves."""
    from kdcache.commands.options import EvaluateOptions

    given = {"student": (options.student,), "corpus": ("LABELLED_TEXTS",)}
    words = ("evaluate", *_of_texts(EvaluateOptions, options, **given))
    if options.out is None:
        return words
    line = f"{result.out}: {counted(result.records, 'record')} in {duration(result.seconds)}"
    line += f", {result.skipped} skipped." if result.skipped else "."
    if result.cut:
        line += f" {result.cut:,} words or sources are beyond what it reads."
    if result.unfinished:
        line += f" {result.unfinished:,} targets were not finished at --max-length "
        line += f"{options.max_length}."
    echo(line)
    return words


def inspected(options: InspectOptions, result: InspectResult) -> Next:
    """Print what is in a cache."""
    from kdcache.cli.views import render_inspection

    render_inspection(result, terminal())
    if options.row is None and result.rows:
        return ("inspect", options.cache, "--row", "0")
    return None


def reported(_: Options, result: ReportResult) -> None:
    """Print what is on a page."""
    counts = {"cache": result.caches, "run": result.runs, "sweep": result.sweeps}
    shown = [f"{count} {word}{'s' * (count > 1)}" for word, count in counts.items() if count]
    echo(f"{result.out}: {', '.join(shown)}, {size(result.bytes)}. Open it in a browser.")


def verified(options: VerifyOptions, result: VerifyResult) -> Next:
    """Print what was checked; the problems are printed by every command that has some."""
    if not result.problems:
        echo(
            f"{result.cache}: {counted(result.shards, 'shard')}, "
            f"{counted(result.rows, 'row')}: all good."
        )
    if result.compared is not None and not result.problems:
        echo(result.compared)
    if (check := result.recheck) is not None:
        echo(
            f"{counted(check.rows, 'row')}, {counted(check.positions, 'position')} run again: "
            f"cached and live targets differ by {check.cached:.2g}, two live runs by "
            f"{check.live:.2g}; rounding explains {check.allowed:.2g}."
        )
        for one in check.fidelity:
            echo(f"Fidelity {one.line}")
        if not check.same_teacher and not check.problems:
            echo("The teacher's configuration or weights are not identical to those of the build.")
    return ("repair", options.cache) if result.problems else _training(options.cache)


def repaired(_: RepairOptions, result: RepairResult) -> Next:
    """Print what was removed."""
    for name in result.removed:
        echo(f"{name}: broken, removed")
    for name in result.missing:
        echo(f"{name}: missing")
    if result.removed or result.missing:
        echo("Run the same `kdcache build` command again: it makes only these.")
    elif result.old_digest is None:
        echo(f"{result.cache}: nothing is broken.")
    if result.old_digest is not None:
        echo(f"The digest was {result.old_digest} and is {result.digest} now.")
    return () if result.removed or result.missing else None


def shared(_: Options, result: ShareResult) -> Next:
    """Print what was copied."""
    before = f", {counted(result.present, 'file')} had been there" if result.present else ""
    echo(f"{result.to}: {counted(result.files, 'file')} copied, {size(result.bytes)}{before}.")
    echo(f"digest {result.digest}")
    return None


def collected(options: GcOptions, result: GcResult) -> Next:
    """Print what crashed builds had left."""
    for leftover in result.removed:
        echo(f"{leftover.name}: {size(leftover.bytes)}")
    verb = "would be removed" if result.dry_run else "removed"
    young = f"; {result.young} kept, since a build may be at work" if result.young else ""
    echo(f"{counted(len(result.removed), 'file')} {verb}, {size(result.bytes)}{young}.")
    return ("gc", options.cache) if result.dry_run and result.removed else None


def shown(_: Options, result: DemoResult) -> Next:
    """Print the outcome of the demo."""
    from kdcache.cli.views import render_demo

    render_demo(result, terminal())
    return ("report", *result.folders, "--out", "report.html")


def described(_: Options, result: EnvResult) -> None:
    """Print what is installed."""
    facts = {"kdcache": result.kdcache, "Python": result.python, "system": result.system}
    memory = "" if result.memory_bytes is None else f", {size(result.memory_bytes)}"
    facts["machine"] = f"{result.cores} cores{memory}"
    facts["GPUs"] = "; ".join(result.gpus)
    facts |= {name: version or "not installed" for name, version in result.packages.items()}
    print_table(terminal(), ("", ""), list({**facts, **result.settings}.items()), left=2)


def as_words(options: Options, kind: type[Options]) -> list[str]:
    """How to type what two commands share: options as words for the command of another `kind`,
    without secrets.

    Defaults are left out; `kind` must read a value as its own command writes it.
    """
    known = {one.name for one in options_of(kind)}
    found = []
    for one in options_of(type(options)):
        value = getattr(options, one.name)
        if one.name not in known or value is None or value is False or value == one.default:
            continue
        target, key = one.instead or ("", "")
        if key.replace("-", "_") in key_values(getattr(options, target, ())):
            continue
        if one.comma:
            texts = [",".join(map(_shown, value))]
        else:
            texts = [_shown(item) for item in (value if one.several else (value,))]
        for text in texts:
            if value is True:
                found.append(one.flag)
            else:  # a word that begins with a hyphen would be another option
                found += [f"{one.flag}={text}"] if text.startswith("-") else [one.flag, text]
    return [str(redacted(word)) for word in found]


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
