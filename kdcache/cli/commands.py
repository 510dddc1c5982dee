"""The commands: options in, one function of the package called, its outcome printed. No logic.

A command imports its options when it is created, and what does its work when it runs: a help or a
wrong option needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click
from rich.console import Console

from kdcache.cli.options import options_command, print_json
from kdcache.cli.tables import echo, echo_next, number, print_table
from kdcache.cli.volume import is_quiet
from kdcache.humanize import duration, size
from kdcache.tasks import CAUSAL_LM, SEQUENCE_CLASSIFICATION

if TYPE_CHECKING:
    from kdcache.commands.build.make import BuildResult
    from kdcache.commands.build.options import BuildOptions


def load(name: str) -> click.Command:
    """The command of that name."""
    maker: Callable[[], click.Command] = globals()[f"_{name}"]
    return maker()


def _tell(line: str) -> None:
    """What a command says on its way."""
    if not is_quiet():
        echo(line, err=True)


def _report_made(result: BuildResult, worker: str = "teacher") -> None:
    """What a build, or a transcoding, has done."""
    if not result.made:
        echo(f"{result.cache} is complete: {result.positions:,} positions. Nothing to do.")
    else:
        losses = ""
        if result.skipped:
            losses += f"; {result.skipped:,} records left out (empty or broken)"
        if result.truncated:
            losses += f"; {result.truncated:,} documents cut at --max-length"
        if result.clipped_mass > 1e-3:
            losses += f"; {result.clipped_mass:.1%} of the teacher's probability is on ids "
            losses += "outside its tokenizer's vocabulary"
        if result.workers_lost:
            losses += f"; {result.workers_lost} workers lost, {result.redone} attempts repeated"
        echo(
            f"{result.cache}: {result.rows:,} rows, {result.positions:,} positions, "
            f"{size(result.bytes)} ({result.bytes_per_position:.1f} B per position, rows "
            f"included) in {duration(result.seconds)}, "
            f"{worker} {duration(result.teacher_seconds)}; "
            f"{result.made} of {result.spans} shards made now{losses}."
        )
        if result.missing:
            echo(
                f"This part is made. {result.missing} shards of other parts are missing; the "
                "part that ends last seals the cache."
            )


def _build() -> click.Command:
    from kdcache.commands.build.options import BuildOptions

    @options_command(
        BuildOptions,
        "kdcache build --teacher bert-sst2 --task sequence-classification \\",
        "    --corpus train.tsv --out cache",
        "kdcache build --teacher SmolLM2-135M --corpus 's3://bucket/text/*.parquet' \\",
        "    --codec sample:20 --temperatures 1,2 --address auto --out s3://bucket/cache",
        "Run the same command again to continue where it stopped.",
    )
    def command(options: BuildOptions, as_json: bool) -> None:
        if options.dry_run:
            _dry_run(options, as_json)
            return
        from kdcache.cli.display import BuildDisplay

        with BuildDisplay(quiet=as_json) as display:
            from kdcache.commands.build.build import build

            result = build(options, on_progress=display, report=display.report)
        if as_json:
            print_json(result)
            return
        _report_made(result)
        student = "CONFIG_OR_MODEL" if options.task == CAUSAL_LM else "bilstm"
        echo_next("kdcache", "train", "--cache", options.out, "--student", student, "--out", "RUN")

    return command


def _dry_run(options: BuildOptions, as_json: bool) -> None:
    from kdcache.cli.view_dry_run import render_dry_run
    from kdcache.commands.build.dry_run import dry_run

    result = dry_run(options)
    if as_json:
        print_json(result)
        return
    render_dry_run(result, Console())
    words = [f"--teacher={name}" for name in options.teacher]
    words += [f"--corpus={name}" for name in options.corpus]
    echo_next("kdcache", "plan", *words, "--task", options.task, "--codec", result.codec)


def _transcode() -> click.Command:
    from kdcache.commands.transcode.options import TranscodeOptions

    @options_command(
        TranscodeOptions,
        "kdcache transcode caches/dense --codec sample:20 --temperatures 1,2 --out caches/sample",
        "kdcache transcode caches/topk64 --codec topk:16 --out caches/topk16 --workers 0",
        "Run the same command again to continue where it stopped.",
    )
    def command(options: TranscodeOptions, as_json: bool) -> None:
        from kdcache.cli.display import TranscodeDisplay

        with TranscodeDisplay(quiet=as_json) as display:
            from kdcache.commands.transcode.transcode import transcode

            result = transcode(options, on_progress=display, report=display.report)
        if as_json:
            print_json(result)
            return
        _report_made(result, "codec")
        echo_next("kdcache", "inspect", options.out, "--row", "0")

    return command


def _export() -> click.Command:
    from kdcache.commands.export.options import ExportOptions

    @options_command(
        ExportOptions,
        "kdcache export caches/topk64 --out tables/topk64",
        "kdcache export caches/hidden --top 64 --temperature 2 --out tables/hidden-t2",
        "Run the same command again to continue where it stopped.",
    )
    def command(options: ExportOptions, as_json: bool) -> None:
        from kdcache.commands.export.export import export

        result = export(options, report=_tell)
        if as_json:
            print_json(result)
        else:
            echo(
                f"{result.out}: {result.files} files, {result.rows:,} rows, {result.positions:,} "
                f"positions, {size(result.bytes)}; {result.made} made now in "
                f"{duration(result.seconds)}."
            )

    return command


def _import() -> click.Command:
    from kdcache.commands.import_.options import ImportOptions

    @options_command(
        ImportOptions,
        "kdcache import --from parquet --corpus 'tables/*.parquet' --tokenizer TEACHER --out cache",
        "kdcache import --layout distillkit --corpus logits/ --tokenizer TEACHER --out cache",
        "kdcache import --layout plain --targets next --columns target_ids=top_ids \\",
        "    --corpus top.parquet --tokenizer TEACHER --out cache",
        "Run the same command again to continue where it stopped.",
    )
    def command(options: ImportOptions, as_json: bool) -> None:
        from kdcache.cli.display import ImportDisplay

        with ImportDisplay(quiet=as_json) as display:
            from kdcache.commands.import_.import_ import import_

            result = import_(options, on_progress=display, report=display.report)
        if as_json:
            print_json(result)
            return
        _report_made(result, "reading")
        echo_next("kdcache", "inspect", options.out, "--row", "0")

    return command


def _plan() -> click.Command:
    from kdcache.commands.plan.options import PlanOptions

    @options_command(
        PlanOptions,
        "kdcache plan --teacher SmolLM2-135M --corpus text.jsonl --plot plan.png",
        "kdcache plan --teacher SmolLM2-135M --corpus text.jsonl --rows 16 \\",
        "    --codec sample:20 --codec topk:32 --temperatures 1 --temperatures 1,2,4",
    )
    def command(options: PlanOptions, as_json: bool) -> None:
        from kdcache.cli.view_plan import render_plan
        from kdcache.commands.plan.plan import plan

        result = plan(options, report=_tell)
        if as_json:
            print_json(result)
        else:
            render_plan(result, Console(), details=options.all)

    return command


def _train() -> click.Command:
    from kdcache.commands.train.options import TrainOptions

    @options_command(
        TrainOptions,
        "kdcache train --cache cache --student bilstm --temperature 2 --out run \\",
        "    --epochs 20 --eval-cache dev-cache --patience 3",
        "kdcache train --cache cache --student config.json --alpha 0.5 --out run",
        "Run the same command again to continue from the last checkpoint.",
    )
    def command(options: TrainOptions, as_json: bool) -> None:
        from kdcache.cli.display import TrainDisplay

        silent = options.place is not None and options.place.rank > 0  # the first one reports
        with TrainDisplay(quiet=as_json or silent) as display:
            from kdcache.commands.train.train import train
            from kdcache.loss.metrics import perplexity

            result = train(options, on_progress=display, report=display.report)
        if silent:
            return
        if as_json:
            print_json(result)
            return
        measured = "  ".join(f"{name} {value:.4g}" for name, value in result.eval.items())
        if not result.made:
            echo(f"{result.out} is complete: {result.steps} steps. Nothing to do. {measured}")
            return
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
        adapted = ""
        if options.lora is not None:
            adapted = f"; an adapter of {result.trained:,} of {result.parameters:,} parameters"
        echo(
            f"{result.out}: {result.steps} steps{best}, {result.rows:,} rows, loss "
            f"{result.loss:.4f} in {duration(result.seconds)}"
            + words
            + adapted
            + (f"; evaluation: {measured}" if measured else "")
            + teacher
            + "."
        )
        test = (options.eval_cache or ("TEST_CACHE",))[0]
        echo_next("kdcache", "evaluate", "--student", options.out, "--cache", test)

    return command


def _sweep() -> click.Command:
    from kdcache.commands.sweep.options import SweepOptions

    @options_command(
        SweepOptions,
        "kdcache sweep grid.yaml --out sweeps/novels",
        "kdcache sweep grid.yaml --out sweeps/novels --workers 8 --gpus-per-run 0.5",
        "Run the same command again to continue; a grid with more values only adds runs. A grid:",
        "    cache: caches/novels",
        "    eval-cache: caches/held-out",
        "    grid:",
        "      student: [tiny.json, small.json]",
        "      alpha: [0.1, 0.5, 1.0]",
        "      seed: [0, 1, 2]",
    )
    def command(options: SweepOptions, as_json: bool) -> None:
        from kdcache.cli.display import SweepDisplay
        from kdcache.cli.view_sweep import render_sweep

        with SweepDisplay(quiet=as_json) as display:
            from kdcache.commands.sweep.sweep import sweep

            result = sweep(options, on_progress=display)
        if as_json:
            print_json(result)
        else:
            render_sweep(result, Console())

    return command


def _finetune() -> click.Command:
    from kdcache.commands.finetune.options import FinetuneOptions

    @options_command(
        FinetuneOptions,
        "kdcache finetune --model bert-base --corpus train.tsv --eval-corpus dev.tsv --out teacher",
        "kdcache finetune --model bert-base --corpus train.tsv --out teacher \\",
        "    --train-last 4 --head-width 192",
    )
    def command(options: FinetuneOptions, as_json: bool) -> None:
        from kdcache.cli.display import TrainDisplay

        with TrainDisplay(quiet=as_json) as display:
            from kdcache.commands.finetune.finetune import finetune

            result = finetune(options, on_progress=display, report=display.report)
        if as_json:
            print_json(result)
            return
        scores = "" if result.accuracy is None else f", accuracy {result.accuracy:.4f}"
        scores += "" if result.f1 is None else f", F1 {result.f1:.4f}"
        if not result.made:
            echo(f"{result.out} is complete{scores}. Nothing to do.")
            return
        if result.truncated:
            shown = f"{result.truncated:,} texts were cut at --max-length {options.max_length}"
            echo(f"{shown}: the teacher does not see the rest.", err=True)
        echo(
            f"{result.out}: {result.rows:,} rows, {result.trained:,} of {result.parameters:,} "
            f"parameters trained in {duration(result.seconds)}{scores}."
        )
        words = ("--task", SEQUENCE_CLASSIFICATION, "--corpus", "CORPUS", "--out", "CACHE")
        echo_next("kdcache", "build", "--teacher", options.out, *words)

    return command


def _evaluate() -> click.Command:
    from kdcache.commands.evaluate.options import EvaluateOptions

    @options_command(
        EvaluateOptions,
        "kdcache evaluate --student run --cache test-cache",
        "kdcache evaluate --student run-a --student run-b --corpus test.tsv --teacher bert-sst2",
    )
    def command(options: EvaluateOptions, as_json: bool) -> None:
        from kdcache.cli.view_evaluate import render_evaluation
        from kdcache.commands.evaluate.evaluate import evaluate

        result = evaluate(options)
        if as_json:
            print_json(result)
        else:
            render_evaluation(result, Console())

    return command


def _report() -> click.Command:
    from kdcache.commands.report.options import ReportOptions

    @options_command(
        ReportOptions,
        "kdcache report caches/lm runs/hard runs/distilled --out report.html",
        "kdcache report sweeps/novels s3://bucket/cache --rows 5 --out report.html",
    )
    def command(options: ReportOptions, as_json: bool) -> None:
        from kdcache.commands.report.report import report

        result = report(options, report=_tell)
        if as_json:
            print_json(result)
            return
        counts = {"cache": result.caches, "run": result.runs, "sweep": result.sweeps}
        shown = ", ".join(_several(count, word) for word, count in counts.items() if count)
        echo(f"{result.out}: {shown}, {size(result.bytes)}. Open it in a browser.")

    return command


def _several(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count > 1)}"


def _predict() -> click.Command:
    from kdcache.commands.predict.options import PredictOptions

    @options_command(
        PredictOptions,
        "kdcache predict --student run --corpus new.jsonl --out labelled.jsonl",
        "echo 'a joy from start to end' | kdcache predict --student run --corpus -",
    )
    def command(options: PredictOptions, as_json: bool) -> None:
        from kdcache.commands.predict.predict import predict

        result = predict(options)
        if options.out is not None:
            if as_json:
                print_json(result)
            else:
                echo(
                    f"{result.out}: {result.records:,} records in {duration(result.seconds)}"
                    + (f", {result.skipped} skipped" if result.skipped else "")
                    + "."
                )

    return command


def _inspect() -> click.Command:
    from kdcache.commands.inspect.options import InspectOptions

    @options_command(
        InspectOptions,
        "kdcache inspect cache",
        "kdcache inspect cache --row 17 --temperature 2",
    )
    def command(options: InspectOptions, as_json: bool) -> None:
        from kdcache.cli.view_inspect import render_inspection
        from kdcache.commands.inspect.inspect import inspect

        result = inspect(options)
        if as_json:
            print_json(result)
        else:
            render_inspection(result, Console())

    return command


def _verify() -> click.Command:
    from kdcache.commands.verify.options import VerifyOptions

    @options_command(
        VerifyOptions,
        "kdcache verify cache",
        "kdcache verify cache --teacher SmolLM2-135M --sample 64",
    )
    def command(options: VerifyOptions, as_json: bool) -> None:
        from kdcache.commands.verify.verify import verify

        result = verify(options)
        if as_json:
            print_json(result)
        elif not result.problems:
            echo(f"{result.cache}: {result.shards} shards, {result.rows:,} rows: all good.")
        if not as_json and (check := result.recheck) is not None:
            echo(
                f"{check.rows} rows, {check.positions:,} positions run again: cached and live "
                f"targets differ by {check.cached:.2g}, two live runs by {check.live:.2g}; "
                f"rounding explains {check.allowed:.2g}."
            )
            if not check.same_teacher and not check.problems:
                echo(
                    "The teacher's configuration or weights are not identical to those of the "
                    "build."
                )
        if result.problems:
            for problem in result.problems:
                echo(problem, err=True)
            raise click.exceptions.Exit(1)

    return command


def _repair() -> click.Command:
    from kdcache.commands.repair.options import RepairOptions

    @options_command(
        RepairOptions,
        "kdcache repair cache",
        "Then run the same `kdcache build` command to make what was removed.",
    )
    def command(options: RepairOptions, as_json: bool) -> None:
        from kdcache.commands.repair.repair import repair

        result = repair(options)
        if as_json:
            print_json(result)
            return
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

    return command


def _gc() -> click.Command:
    from kdcache.commands.gc.options import GcOptions

    @options_command(
        GcOptions,
        "kdcache gc cache --dry-run",
    )
    def command(options: GcOptions, as_json: bool) -> None:
        from kdcache.commands.gc.gc import gc

        result = gc(options)
        if as_json:
            print_json(result)
            return
        for leftover in result.removed:
            echo(f"{leftover.name}: {size(leftover.bytes)}")
        verb = "would be removed" if result.dry_run else "removed"
        young = f"; {result.young} younger than an hour were kept" if result.young else ""
        count = len(result.removed)
        files = "1 file" if count == 1 else f"{count} files"
        echo(f"{files} {verb}, {size(result.bytes)}{young}.")

    return command


def _env() -> click.Command:
    from kdcache.commands.env.options import EnvOptions

    @options_command(EnvOptions, "kdcache env --json")
    def command(options: EnvOptions, as_json: bool) -> None:
        from kdcache.commands.env.env import env

        result = env(options)
        if as_json:
            print_json(result)
            return
        facts = {"kdcache": result.kdcache, "Python": result.python, "system": result.system}
        memory = "" if result.memory_bytes is None else f", {size(result.memory_bytes)}"
        facts["machine"] = f"{result.cores} cores{memory}"
        facts["GPUs"] = "; ".join(result.gpus)
        facts |= {name: version or "not installed" for name, version in result.packages.items()}
        print_table(Console(), ("", ""), list({**facts, **result.settings}.items()), left=2)

    return command


def _demo() -> click.Command:
    from kdcache.commands.demo.options import DemoOptions

    @options_command(
        DemoOptions,
        "kdcache demo --out demo",
    )
    def command(options: DemoOptions, as_json: bool) -> None:
        from kdcache.cli.view_demo import render_demo
        from kdcache.commands.demo.demo import demo

        result = demo(options, report=_tell)
        if as_json:
            print_json(result)
        else:
            render_demo(result, Console())

    return command
