"""The commands that make models or use them: train, sweep, finetune, evaluate and predict."""

from __future__ import annotations

import click

from kdcache.cli.options import options_command, print_json
from kdcache.cli.tables import echo, echo_next, number, terminal
from kdcache.humanize import counted, duration
from kdcache.tasks import TASKS


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
            from kdcache.cli.views import render_figures
            from kdcache.commands.train.train import train
            from kdcache.loss.metrics import perplexity

            result = train(options, on_progress=display, report=display.report)
        if silent:
            return
        if as_json:
            print_json(result)
            return
        whole = {name: value for name, value in result.eval.items() if "/" not in name}
        measured = "  ".join(f"{name} {value:.4g}" for name, value in whole.items())
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
        if result.pretrained is not None:
            words += f"; word vectors for {result.pretrained:,} of them"
        if result.cut:
            words += f"; {result.cut:,} labels beyond the longest row left out"
        if result.lost:
            words += f"; {result.lost:,} stretches of text without labels"
        adapted = ""
        if options.lora is not None:
            adapted = f"; an adapter of {result.trained:,} of {result.parameters:,} parameters"
        echo(
            f"{result.out}: {counted(result.steps, 'step')}{best}, "
            f"{counted(result.rows, 'row')}, loss "
            f"{result.loss:.4f} in {duration(result.seconds)}"
            + words
            + adapted
            + (f"; evaluation: {measured}" if measured else "")
            + teacher
            + "."
        )
        render_figures(result.eval, terminal())
        test = (options.eval_cache or ("TEST_CACHE",))[0]
        echo_next("kdcache", "evaluate", "--student", options.out, "--cache", test)

    return command


def _sweep() -> click.Command:
    from kdcache.commands.options import SweepOptions

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
        from kdcache.cli.views import render_sweep

        with SweepDisplay(quiet=as_json) as display:
            from kdcache.commands.sweep.sweep import sweep

            result = sweep(options, on_progress=display)
        if as_json:
            print_json(result)
        else:
            render_sweep(result, terminal())
            echo_next("kdcache", "report", options.out)

    return command


def _finetune() -> click.Command:
    from kdcache.commands.finetune.options import FinetuneOptions

    @options_command(
        FinetuneOptions,
        "kdcache finetune --model bert-base --corpus train.tsv --eval-corpus dev.tsv --out teacher",
        "kdcache finetune --model bert-base --corpus train.tsv --out teacher \\",
        "    --train-last 4 --head-width 192",
        "kdcache finetune --model t5-small --task seq2seq-lm --corpus pairs.jsonl --out teacher",
    )
    def command(options: FinetuneOptions, as_json: bool) -> None:
        from kdcache.cli.display import FinetuneDisplay

        with FinetuneDisplay(quiet=as_json) as display:
            from kdcache.commands.finetune.finetune import finetune

            result = finetune(options, on_progress=display, report=display.report)
        if as_json:
            print_json(result)
            return
        figures = {
            "accuracy": result.accuracy,
            "F1": result.f1,
            "micro F1": result.micro_f1,
            "average precision": result.average_precision,
            "Pearson": result.pearson,
            "Spearman": result.spearman,
            "mean squared error": result.mse,
            "cross-entropy": result.cross_entropy,
        }
        known = {name: value for name, value in figures.items() if value is not None}
        scores = "".join(f", {name} {value:.4f}" for name, value in known.items())
        if not result.made:
            echo(f"{result.out} is complete{scores}. Nothing to do.")
            return
        if result.truncated:
            shown = f"{result.truncated:,} texts were cut at --max-length {options.max_length}"
            if TASKS[options.task].source:
                shown = f"{result.truncated:,} records were cut at --max-length"
                shown += " or --max-source-length"
            echo(f"{shown}: the teacher does not see the rest.", err=True)
        echo(
            f"{result.out}: {counted(result.rows, 'row')}, {result.trained:,} of "
            f"{result.parameters:,} "
            f"parameters trained in {duration(result.seconds)}{scores}."
        )
        words = ("--task", options.task, "--corpus", "CORPUS", "--out", "CACHE")
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
            render_evaluation(result, terminal())
            echo_next("kdcache", "predict", "--student", options.student[0], "--corpus", "TEXTS")

    return command


def _predict() -> click.Command:
    from kdcache.commands.predict.options import PredictOptions

    @options_command(
        PredictOptions,
        "kdcache predict --student run --corpus new.jsonl --out labelled.jsonl",
        "echo 'a joy from start to end' | kdcache predict --student run --corpus -",
        "kdcache predict --student tagger --corpus sentences.conll",
        "kdcache predict --student t5-small --corpus sources.jsonl --out pairs.jsonl",
    )
    def command(options: PredictOptions, as_json: bool) -> None:
        from kdcache.commands.predict.predict import predict

        result = predict(options)
        if options.out is not None:
            if as_json:
                print_json(result)
            else:
                what = "words or sources are"
                echo(
                    f"{result.out}: {counted(result.records, 'record')} in "
                    f"{duration(result.seconds)}"
                    + (f", {result.skipped} skipped" if result.skipped else "")
                    + "."
                    + (f" {result.cut:,} {what} beyond what it reads." if result.cut else "")
                    + (
                        f" {result.unfinished:,} targets were not finished at --max-length "
                        f"{options.max_length}."
                        if result.unfinished
                        else ""
                    )
                )
        if not as_json:
            labelled = ("--student", options.student, "--corpus", "LABELLED_TEXTS")
            echo_next("kdcache", "evaluate", *labelled)

    return command
