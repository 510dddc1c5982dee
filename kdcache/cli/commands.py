"""The commands as a table: options in, one function of the package called, its outcome printed.

Everything is named, not imported: `import kdcache` takes the public names from these rows, and a
help or a wrong option needs no torch. Names are `MODULE:NAME` inside of kdcache.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import click

_CONTINUE = "Run the same command again to continue where it stopped."


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command.

    Attributes:
        help: what it does, in one sentence.
        options: the class of its options, whose module imports nothing heavy.
        function: takes these options, and `on_progress` and `report` if it has such parameters.
        result: the class of its outcome.
        printer: of `kdcache.cli.printers`: takes the options and the outcome. What it returns, if
            anything, is the next command instead of `next`; `()` for none.
        display: of `kdcache.cli.display`: shows progress; empty where the function is quick.
        examples: lines of worked examples, shown as they are.
        next: what to type next, with fields of the options in braces.
        dry_run: what is done instead with the option of this name.
    """

    help: str
    options: str
    function: str
    result: str
    printer: str
    display: str = ""
    examples: tuple[str, ...] = ()
    next: str = ""
    dry_run: Command | None = None


COMMANDS = {
    "plan": Command(
        help="Measure what a cache would cost and how good it would be, on a sample.",
        options="commands.options:PlanOptions",
        function="commands.plan.plan:plan",
        result="commands.plan.result:PlanResult",
        printer="planned",
        examples=(
            "kdcache plan --teacher SmolLM2-135M --corpus text.jsonl --plot plan.png",
            "kdcache plan --teacher SmolLM2-135M --corpus text.jsonl --rows 16 \\",
            "    --codec sample:20 --codec topk:32 --temperatures 1 --temperatures 1,2,4",
        ),
    ),
    "build": Command(
        help="Run the teacher over a corpus once and cache its soft targets.",
        options="commands.build.options:BuildOptions",
        function="commands.build.build:build",
        result="commands.build.make:BuildResult",
        printer="built",
        display="BuildDisplay",
        examples=(
            "kdcache build --teacher bert-sst2 --task sequence-classification \\",
            "    --corpus train.tsv --out cache",
            "kdcache build --teacher SmolLM2-135M --corpus 's3://bucket/text/*.parquet' \\",
            "    --codec sample:20 --temperatures 1,2 --address auto --out s3://bucket/cache",
            _CONTINUE,
        ),
        dry_run=Command(
            help="Print what a build would make.",
            options="commands.build.options:BuildOptions",
            function="commands.build.build:dry_run",
            result="commands.build.build:DryRun",
            printer="built_dry",
        ),
    ),
    "generate": Command(
        help="Have a model answer prompts, with its log-probabilities: a corpus that build reads.",
        options="commands.generate.options:GenerateOptions",
        function="commands.generate.generate:generate",
        result="commands.generate.generate:GenerateResult",
        printer="generated",
        display="GenerateDisplay",
        examples=(
            "kdcache generate --model SmolLM2-135M-Instruct --corpus prompts.jsonl \\",
            "    --samples 4 --temperature 0.8 --out fresh",
            "kdcache generate --model runs/student --corpus text.jsonl --prompt-tokens 16 \\",
            "    --max-new-tokens 128 --out rounds/1/text",
            "kdcache generate --model TEACHER --corpus chats.jsonl --out fresh \\",
            "    --cache caches/fresh --codec topk:64",
            _CONTINUE,
        ),
        dry_run=Command(
            help="Print what a generation would write.",
            options="commands.generate.options:GenerateOptions",
            function="commands.generate.generate:generate_dry",
            result="commands.generate.generate:GenerateDryRun",
            printer="generated_dry",
        ),
    ),
    "transcode": Command(
        help="Make a cache of another codec or temperatures from a cache, without the teacher.",
        options="commands.options:TranscodeOptions",
        function="commands.transcode:transcode",
        result="commands.build.make:BuildResult",
        printer="transcoded",
        display="TranscodeDisplay",
        examples=(
            "kdcache transcode caches/dense --codec sample:20 --temperatures 1,2 \\",
            "    --out caches/sample",
            "kdcache transcode caches/topk64 --codec topk:16 --out caches/topk16 --workers 0",
            _CONTINUE,
        ),
        next="inspect {out} --row 0",
    ),
    "export": Command(
        help="Write the rows and targets of a cache as Parquet files.",
        options="commands.options:ExportOptions",
        function="commands.export:export",
        result="commands.export:ExportResult",
        printer="exported",
        examples=(
            "kdcache export caches/topk64 --out tables/topk64",
            "kdcache export caches/hidden --top 64 --temperature 2 --out tables/hidden-t2",
            "kdcache export caches/topk64 --layout axolotl --out tables/axolotl",
            "kdcache export caches/chosen caches/rejected --layout dpo --out pairs",
            "kdcache export caches/large caches/small --layout documents --select 0.5 --out chosen",
            _CONTINUE,
        ),
    ),
    "import": Command(
        help="Make a cache of top-k log-probabilities that another program wrote.",
        options="commands.import_.options:ImportOptions",
        function="commands.import_.import_:import_",
        result="commands.build.make:BuildResult",
        printer="imported",
        display="ImportDisplay",
        examples=(
            "kdcache import --corpus 'tables/*.parquet' --tokenizer TEACHER \\",
            "    --out cache",
            "kdcache import --layout distillkit --corpus logits/ --tokenizer TEACHER --out cache",
            "kdcache import --layout plain --targets next --columns target_ids=top_ids \\",
            "    --corpus top.parquet --tokenizer TEACHER --out cache",
            _CONTINUE,
        ),
        next="inspect {out} --row 0",
    ),
    "train": Command(
        help="Train a student on the hard labels and soft targets of a cache.",
        options="commands.train.options:TrainOptions",
        function="commands.train.train:train",
        result="commands.run_folder:TrainResult",
        printer="trained",
        display="TrainDisplay",
        examples=(
            "kdcache train --cache cache --student bilstm --temperature 2 --out run \\",
            "    --epochs 20 --eval-cache dev-cache --patience 3",
            "kdcache train --cache cache --student config.json --alpha 0.5 --out run",
            "Run the same command again to continue from the last checkpoint.",
        ),
    ),
    "sweep": Command(
        help="Train many students on the same caches and compare them.",
        options="commands.options:SweepOptions",
        function="commands.sweep.sweep:sweep",
        result="commands.sweep.results:SweepResult",
        printer="swept",
        display="SweepDisplay",
        examples=(
            "kdcache sweep grid.yaml --out sweeps/novels",
            "kdcache sweep grid.yaml --out sweeps/novels --workers 8 --gpus-per-run 0.5",
            "Run the same command again to continue; a grid with more values only adds runs. "
            "A grid:",
            "    cache: caches/novels",
            "    eval-cache: caches/held-out",
            "    grid:",
            "      student: [tiny.json, small.json]",
            "      alpha: [0.1, 0.5, 1.0]",
            "      seed: [0, 1, 2]",
        ),
        next="report {out}",
    ),
    "finetune": Command(
        help="Fine-tune a teacher: a classifier, tagger, scorer or sequence-to-sequence model.",
        options="commands.finetune.options:FinetuneOptions",
        function="commands.finetune.finetune:finetune",
        result="commands.finetune.finetune:FinetuneResult",
        printer="finetuned",
        display="FinetuneDisplay",
        examples=(
            "kdcache finetune --model bert-base --corpus train.tsv --eval-corpus dev.tsv \\",
            "    --out teacher",
            "kdcache finetune --model bert-base --corpus train.tsv --out teacher \\",
            "    --train-last 4 --head-width 192",
            "kdcache finetune --model t5-small --task seq2seq-lm --corpus pairs.jsonl \\",
            "    --out teacher",
        ),
    ),
    "evaluate": Command(
        help="Compare students with their teacher.",
        options="commands.options:EvaluateOptions",
        function="commands.evaluate.evaluate:evaluate",
        result="commands.evaluate.scores:EvaluateResult",
        printer="evaluated",
        examples=(
            "kdcache evaluate --student run --cache test-cache",
            "kdcache evaluate --student run-a --student run-b --corpus test.tsv \\",
            "    --teacher bert-sst2",
        ),
    ),
    "predict": Command(
        help="Label, score or tag texts, or write their targets, as JSON lines.",
        options="commands.options:PredictOptions",
        function="commands.predict:predict",
        result="commands.predict:PredictResult",
        printer="predicted",
        examples=(
            "kdcache predict --student run --corpus new.jsonl --out labelled.jsonl",
            "echo 'a joy from start to end' | kdcache predict --student run --corpus -",
            "kdcache predict --student tagger --corpus sentences.conll",
            "kdcache predict --student t5-small --corpus sources.jsonl --out pairs.jsonl",
        ),
    ),
    "inspect": Command(
        help="Show what is in a cache: spec, sizes, rows with the teacher's predictions.",
        options="commands.options:InspectOptions",
        function="commands.inspect:inspect",
        result="commands.inspect_result:InspectResult",
        printer="inspected",
        examples=("kdcache inspect cache", "kdcache inspect cache --row 17 --temperature 2"),
        next="report {cache} --out report.html",
    ),
    "report": Command(
        help="Write one page about caches, runs and sweeps, to look at in a browser.",
        options="commands.options:ReportOptions",
        function="commands.report.report:report",
        result="commands.report.report:ReportResult",
        printer="reported",
        examples=(
            "kdcache report caches/lm runs/hard runs/distilled --out report.html",
            "kdcache report sweeps/novels s3://bucket/cache --rows 5 --out report.html",
        ),
    ),
    "verify": Command(
        help="Check every file of a cache, and its targets against the teacher if one is named.",
        options="commands.options:VerifyOptions",
        function="commands.verify:verify",
        result="commands.verify:VerifyResult",
        printer="verified",
        examples=(
            "kdcache verify cache",
            "kdcache verify cache --teacher SmolLM2-135M --sample 64",
        ),
    ),
    "push": Command(
        help="Upload a cache to a dataset repository of the Hugging Face hub, with a card.",
        options="commands.options:PushOptions",
        function="commands.share:push",
        result="commands.share:ShareResult",
        printer="shared",
        examples=(
            "kdcache verify cache --teacher SmolLM2-135M --json > verified.json",
            "kdcache push cache hf://datasets/OWNER/NAME --measured verified.json",
            _CONTINUE,
        ),
        next="inspect {to}",
    ),
    "pull": Command(
        help="Copy a cache from the Hugging Face hub or another store to a folder.",
        options="commands.options:PullOptions",
        function="commands.share:pull",
        result="commands.share:ShareResult",
        printer="shared",
        examples=("kdcache pull hf://datasets/OWNER/NAME cache", _CONTINUE),
        next="inspect {to} --row 0",
    ),
    "repair": Command(
        help="Remove damaged files from a cache, so that the same build makes only these again.",
        options="commands.options:RepairOptions",
        function="commands.upkeep:repair",
        result="commands.upkeep:RepairResult",
        printer="repaired",
        examples=(
            "kdcache repair cache",
            "Then run the same `kdcache build` command to make what was removed.",
        ),
        next="inspect {cache}",
    ),
    "gc": Command(
        help="Remove what crashed builds have left in a cache's folder.",
        options="commands.options:GcOptions",
        function="commands.upkeep:gc",
        result="commands.upkeep:GcResult",
        printer="collected",
        examples=("kdcache gc cache --dry-run",),
        next="inspect {cache}",
    ),
    "demo": Command(
        help="Run the whole workflow on text and models that need no download.",
        options="commands.options:DemoOptions",
        function="commands.demo.demo:demo",
        result="commands.demo.demo:DemoResult",
        printer="shown",
        examples=("kdcache demo",),
    ),
    "env": Command(
        help="Describe this machine and what is installed, for a bug report.",
        options="commands.options:EnvOptions",
        function="commands.env:env",
        result="commands.env:EnvResult",
        printer="described",
        examples=("kdcache env --json",),
        next="demo",
    ),
}


def public_names() -> dict[str, str]:
    """The public names of the commands, each with its module: options, functions and outcomes."""
    rows = [row for command in COMMANDS.values() for row in (command, command.dry_run) if row]
    homes = (home for row in rows for home in (row.options, row.function, row.result))
    return {name: f"kdcache.{module}" for module, name in (home.split(":") for home in homes)}


def load(name: str) -> click.Command:
    """The command of that name, made of its row."""
    from kdcache.cli.options import options_command

    row = COMMANDS[name]
    command = options_command(_find(row.options), *row.examples)(partial(_run, row))
    command.name, command.help = name, row.help
    return command


def _find(home: str) -> Any:
    module, _, name = home.partition(":")
    return getattr(importlib.import_module(f"kdcache.{module}"), name)


def _run(row: Command, options: Any, as_json: bool) -> None:
    """Do what a command is for, then print its outcome and what to type next.

    An outcome with `problems` ends in exit code 1.
    """
    import click

    from kdcache.cli.options import echo, echo_next, print_json, tell

    if row.dry_run is not None and options.dry_run:
        row = row.dry_run
    launched = getattr(options, "launched", None)  # of a launcher's processes the first one reports
    silent = launched is not None and launched.rank > 0
    shown: Any = contextlib.nullcontext()
    if row.display:
        shown = _find(f"cli.display:{row.display}")(quiet=as_json or silent)
    with shown as display:
        function = _find(row.function)
        hooks = {"on_progress": display, "report": display.report if display else tell}
        takes = inspect.signature(function).parameters
        result = function(options, **{name: hooks[name] for name in hooks if name in takes})
    if silent:
        return
    words = None
    if not as_json:
        words = _find(f"cli.printers:{row.printer}")(options, result)
    elif getattr(options, "out", "") is not None:  # else standard output has the outcome itself
        print_json(result)
    problems = getattr(result, "problems", ())
    for problem in problems:
        echo(problem, err=True)
    if words is None:
        words = [word.format_map(vars(options)) for word in row.next.split()]
    if words and not as_json:
        echo_next("kdcache", *words)
    if problems:
        raise click.exceptions.Exit(1)
