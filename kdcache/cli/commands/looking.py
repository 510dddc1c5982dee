"""The commands that look at what is there, or clean up; and the demo."""

from __future__ import annotations

import click

from kdcache.cli.options import options_command, print_json
from kdcache.cli.tables import echo, echo_next, print_table, tell, terminal
from kdcache.humanize import counted, size


def _several(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count > 1)}"


def _inspect() -> click.Command:
    from kdcache.commands.options import InspectOptions

    @options_command(
        InspectOptions,
        "kdcache inspect cache",
        "kdcache inspect cache --row 17 --temperature 2",
    )
    def command(options: InspectOptions, as_json: bool) -> None:
        from kdcache.cli.view_inspect import render_inspection
        from kdcache.commands.inspect import inspect

        result = inspect(options)
        if as_json:
            print_json(result)
        else:
            render_inspection(result, terminal())
            if options.row is None and result.rows:
                echo_next("kdcache", "inspect", options.cache, "--row", "0")
            else:
                echo_next("kdcache", "report", options.cache, "--out", "report.html")

    return command


def _verify() -> click.Command:
    from kdcache.commands.options import VerifyOptions

    @options_command(
        VerifyOptions,
        "kdcache verify cache",
        "kdcache verify cache --teacher SmolLM2-135M --sample 64",
    )
    def command(options: VerifyOptions, as_json: bool) -> None:
        from kdcache.commands.verify import verify

        result = verify(options)
        if as_json:
            print_json(result)
        elif not result.problems:
            echo(
                f"{result.cache}: {counted(result.shards, 'shard')}, "
                f"{counted(result.rows, 'row')}: all good."
            )
        if not as_json and (check := result.recheck) is not None:
            echo(
                f"{counted(check.rows, 'row')}, {counted(check.positions, 'position')} run "
                "again: cached and live "
                f"targets differ by {check.cached:.2g}, two live runs by {check.live:.2g}; "
                f"rounding explains {check.allowed:.2g}."
            )
            if not check.same_teacher and not check.problems:
                echo(
                    "The teacher's configuration or weights are not identical to those of the "
                    "build."
                )
        for problem in result.problems:
            echo(problem, err=True)
        if not as_json:
            words = ("train", "--cache", options.cache, "--student", "STUDENT", "--out", "RUN")
            echo_next("kdcache", *(("repair", options.cache) if result.problems else words))
        if result.problems:
            raise click.exceptions.Exit(1)

    return command


def _repair() -> click.Command:
    from kdcache.commands.options import RepairOptions

    @options_command(
        RepairOptions,
        "kdcache repair cache",
        "Then run the same `kdcache build` command to make what was removed.",
    )
    def command(options: RepairOptions, as_json: bool) -> None:
        from kdcache.commands.upkeep import repair

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
        if not (result.removed or result.missing):
            echo_next("kdcache", "inspect", options.cache)

    return command


def _gc() -> click.Command:
    from kdcache.commands.options import GcOptions

    @options_command(
        GcOptions,
        "kdcache gc cache --dry-run",
    )
    def command(options: GcOptions, as_json: bool) -> None:
        from kdcache.commands.upkeep import gc

        result = gc(options)
        if as_json:
            print_json(result)
            return
        for leftover in result.removed:
            echo(f"{leftover.name}: {size(leftover.bytes)}")
        verb = "would be removed" if result.dry_run else "removed"
        young = f"; {result.young} younger than an hour were kept" if result.young else ""
        count = len(result.removed)
        files = counted(count, "file")
        echo(f"{files} {verb}, {size(result.bytes)}{young}.")
        echo_next("kdcache", "gc" if result.dry_run and count else "inspect", options.cache)

    return command


def _report() -> click.Command:
    from kdcache.commands.options import ReportOptions

    @options_command(
        ReportOptions,
        "kdcache report caches/lm runs/hard runs/distilled --out report.html",
        "kdcache report sweeps/novels s3://bucket/cache --rows 5 --out report.html",
    )
    def command(options: ReportOptions, as_json: bool) -> None:
        from kdcache.commands.report.report import report

        result = report(options, report=tell)
        if as_json:
            print_json(result)
            return
        counts = {"cache": result.caches, "run": result.runs, "sweep": result.sweeps}
        shown = ", ".join(_several(count, word) for word, count in counts.items() if count)
        echo(f"{result.out}: {shown}, {size(result.bytes)}. Open it in a browser.")

    return command


def _env() -> click.Command:
    from kdcache.commands.options import EnvOptions

    @options_command(EnvOptions, "kdcache env --json")
    def command(options: EnvOptions, as_json: bool) -> None:
        from kdcache.commands.env import env

        result = env(options)
        if as_json:
            print_json(result)
            return
        facts = {"kdcache": result.kdcache, "Python": result.python, "system": result.system}
        memory = "" if result.memory_bytes is None else f", {size(result.memory_bytes)}"
        facts["machine"] = f"{result.cores} cores{memory}"
        facts["GPUs"] = "; ".join(result.gpus)
        facts |= {name: version or "not installed" for name, version in result.packages.items()}
        print_table(terminal(), ("", ""), list({**facts, **result.settings}.items()), left=2)
        echo_next("kdcache", "demo")

    return command


def _demo() -> click.Command:
    from kdcache.commands.options import DemoOptions

    @options_command(
        DemoOptions,
        "kdcache demo",
    )
    def command(options: DemoOptions, as_json: bool) -> None:
        from kdcache.cli.views import render_demo
        from kdcache.commands.demo.demo import demo

        result = demo(options, report=tell)
        if as_json:
            print_json(result)
        else:
            render_demo(result, terminal())
            echo_next("kdcache", "report", *result.folders, "--out", "report.html")

    return command
