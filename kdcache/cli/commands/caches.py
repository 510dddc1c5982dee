"""The commands that make a cache, or a table of it: build, transcode, plan, export and import."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from kdcache.cli.options import options_command, print_json
from kdcache.cli.tables import echo, echo_next, tell, terminal
from kdcache.humanize import counted, duration, size
from kdcache.tasks import TASKS

if TYPE_CHECKING:
    from kdcache.commands.build.make import BuildResult
    from kdcache.commands.build.options import BuildOptions


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
        if result.missing:  # of other parts, whose commands are the user's
            return
        student = "CONFIG_OR_MODEL" if TASKS[options.task].over_ids else "bilstm"
        echo_next("kdcache", "train", "--cache", options.out, "--student", student, "--out", "RUN")

    return command


def _dry_run(options: BuildOptions, as_json: bool) -> None:
    from kdcache.cli.views import render_dry_run
    from kdcache.commands.build.dry_run import dry_run
    from kdcache.commands.plan.options import PlanOptions
    from kdcache.options import as_words

    result = dry_run(options)
    if as_json:
        print_json(result)
        return
    render_dry_run(result, terminal())
    same = dataclasses.replace(options, codec=result.codec)
    echo_next("kdcache", "plan", *as_words(same, PlanOptions))


def _report_made(result: BuildResult, worker: str = "teacher") -> None:
    """What a build, or a transcoding, has done."""
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


def _transcode() -> click.Command:
    from kdcache.commands.options import TranscodeOptions

    @options_command(
        TranscodeOptions,
        "kdcache transcode caches/dense --codec sample:20 --temperatures 1,2 --out caches/sample",
        "kdcache transcode caches/topk64 --codec topk:16 --out caches/topk16 --workers 0",
        "Run the same command again to continue where it stopped.",
    )
    def command(options: TranscodeOptions, as_json: bool) -> None:
        from kdcache.cli.display import TranscodeDisplay

        with TranscodeDisplay(quiet=as_json) as display:
            from kdcache.commands.transcode import transcode

            result = transcode(options, on_progress=display, report=display.report)
        if as_json:
            print_json(result)
            return
        _report_made(result, "codec")
        echo_next("kdcache", "inspect", options.out, "--row", "0")

    return command


def _export() -> click.Command:
    from kdcache.commands.options import ExportOptions

    @options_command(
        ExportOptions,
        "kdcache export caches/topk64 --out tables/topk64",
        "kdcache export caches/hidden --top 64 --temperature 2 --out tables/hidden-t2",
        "Run the same command again to continue where it stopped.",
    )
    def command(options: ExportOptions, as_json: bool) -> None:
        from kdcache.commands.export import export

        result = export(options, report=tell)
        if as_json:
            print_json(result)
        else:
            echo(
                f"{result.out}: {counted(result.files, 'file')}, {counted(result.rows, 'row')}, "
                f"{counted(result.positions, 'position')}, {size(result.bytes)}; {result.made} "
                "made now in "
                f"{duration(result.seconds)}."
            )
            words = ("--corpus", options.out, "--tokenizer", "TEACHER", "--out", "CACHE")
            echo_next("kdcache", "import", *words)

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
        from kdcache.commands.build.options import BuildOptions
        from kdcache.commands.plan.plan import plan
        from kdcache.commands.plan.result import recommended
        from kdcache.options import as_words

        result = plan(options, report=tell)
        if as_json:
            print_json(result)
        else:
            render_plan(result, terminal(), details=options.all)
            take, _ = recommended(result.caches)[0]
            same = dataclasses.replace(
                options.build_options(),
                codec=take.codec,
                temperatures=take.temperatures,
                out="CACHE",
                workers=None,
            )
            echo_next("kdcache", "build", *as_words(same, BuildOptions))

    return command
