"""Options: declared once, at their fields; bounds, lists, words, files, groups."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import pytest
import yaml
from click.testing import CliRunner

import kdcache
from kdcache import (
    BuildOptions,
    EvaluateOptions,
    ImportOptions,
    PredictOptions,
    TrainOptions,
    VerifyOptions,
)
from kdcache.cli.commands import COMMANDS, _find, load
from kdcache.cli.main import cli
from kdcache.cli.options import options_command
from kdcache.cli.printers import as_words
from kdcache.errors import UsageError
from kdcache.options import Option, Options, option, options_of, parse_values
from kdcache.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Sound(Options):
    """How loud."""

    heading = "Sound"

    volume: float = option(1.0, help="how loud.", at_least=0, at_most=11)


@dataclass(frozen=True)
class Shout(Sound):
    """What is shouted."""

    text: str = option(help="what to shout.", metavar="TEXT")
    to: tuple[str, ...] = option((), help="to whom, in addition to `text`.")
    times: int | None = option(None, help="how often.", auto=True, at_least=1)
    pauses: tuple[float, ...] = option((1.0,), help="seconds between.", comma=True, above=0)
    tone: Literal["high", "low"] = option("low", help="its pitch.")
    echo: bool = option(False, help="twice.", decides="nothing")


def shout(*words: str) -> tuple[int, str, list[Shout]]:
    heard: list[Shout] = []

    @options_command(Shout, "shout --text hey")
    def command(options: Shout, as_json: bool) -> None:
        """Shout."""
        heard.append(options)

    assert isinstance(command, click.Command)
    result = CliRunner().invoke(command, list(words))
    wrong = result.exception if isinstance(result.exception, UsageError) else ""
    return result.exit_code, f"{result.output}{wrong}", heard


def test_a_command_line_gives_every_kind_of_value() -> None:
    words = "--text hey --to a --to b --times 3 --pauses 1,2.5 --tone high --echo --volume 11"
    code, output, heard = shout(*words.split())
    assert code == 0, output
    assert heard == [Shout("hey", ("a", "b"), 3, (1.0, 2.5), "high", True, volume=11.0)]
    assert shout("--text", "hey", "--times", "auto")[2] == [Shout("hey")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "missing --text"),
        ("--text a --times 0", "--times is 0, expected at least 1."),
        ("--text a --times few", "--times is 'few', expected a whole number or auto."),
        ("--text a --volume 12", "--volume is 12, expected 0 to 11."),
        ("--text a --volume nan", "--volume is nan, expected 0 to 11."),
        ("--text a --pauses 1,0", "--pauses is 0, expected more than 0."),
        ("--text a --pauses 1,,2", "expected a number, several with commas."),
        ("--text a --tone flat", "--tone is 'flat', expected one of high, low."),
    ],
)
def test_what_is_wrong_is_named_with_what_was_expected(words: str, message: str) -> None:
    _, output, heard = shout(*words.split())
    assert message in output
    assert heard == []


def test_everything_wrong_is_reported_at_once() -> None:
    with pytest.raises(UsageError) as told:
        Shout("", times=0, volume=-1)
    assert str(told.value).splitlines() == [
        "--text is missing.",
        "--times is 0, expected at least 1.",
        "--volume is -1, expected 0 to 11.",
    ]


def test_values_of_a_file_are_read_like_those_of_a_command_line() -> None:
    found, wrong = parse_values(
        Shout, {"text": 3, "pauses": [1, 2], "to": "a", "times": "auto", "volume": None}
    )
    assert found == {"text": "3", "pauses": (1.0, 2.0), "to": ("a",), "times": None}
    assert wrong == []
    _, wrong = parse_values(Shout, {"time": 2, "text": ["a", "b"], "echo": "maybe", "tone": {}})
    assert wrong == [
        "there is no option time. Did you mean times?",
        'text takes one value, not ["a", "b"].',
        "echo is 'maybe', expected true or false.",
        "tone takes one value, not {}.",
    ]


def test_lists_and_single_values_become_tuples() -> None:
    assert Shout("a", ["b"]).to == ("b",)  # type: ignore[arg-type]
    assert Shout("a", "b").to == ("b",)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"echo": "false"}, "--echo is 'false', expected true or false."),
        ({"times": "3"}, "--times is '3', expected a whole number."),
        ({"times": 2.5}, "--times is 2.5, expected a whole number."),
        ({"times": True}, "--times is True, expected a whole number."),
        ({"volume": "loud"}, "--volume is 'loud', expected a number."),
        ({"volume": None}, "--volume is None, expected a number."),
        ({"pauses": "1,two"}, "--pauses is '1', expected a number."),
        ({"pauses": object}, "--pauses is <class 'object'>, expected a number."),
        ({"pauses": (None,)}, "--pauses is None, expected a number."),
        ({"to": (3,)}, "--to is 3, expected a text."),
        ({"text": ["hey"]}, "--text is ['hey'], expected a text."),
        ({"tone": {}}, "--tone is {}, expected one of high, low."),
    ],
)
def test_values_of_another_type_are_refused_in_python_too(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as told:
        Shout(**{"text": "hey", **values})
    assert str(told.value) == message


def test_values_are_read_in_python_as_on_a_command_line() -> None:
    given: dict[str, Any] = {"times": np.int64(3), "pauses": "1, 2.5", "to": Path("a")}
    options = Shout(Path("hey"), volume=np.float32(2), **given)  # type: ignore[arg-type]
    assert options == Shout("hey", ("a",), 3, (1.0, 2.5), volume=2.0)
    assert [type(value) for value in (options.times, options.volume)] == [int, float]
    assert type(options.text) is str


@pytest.mark.parametrize("name", list(COMMANDS))
def test_no_value_of_another_type_ends_in_a_traceback(name: str) -> None:
    """Nor does a text stand for yes: `trust_remote_code="false"` let code run."""
    kind = getattr(kdcache, f"{name.capitalize()}Options")
    least = {one.name: ("x",) if one.several else "x" for one in options_of(kind) if one.required}
    odd = ("abc", "1,2", 1.5, -3, True, [], ["a", 1], {"a": 1}, object(), b"x", (None,), None)
    for one in options_of(kind):
        for value in odd:
            with contextlib.suppress(UsageError):
                kind(**{**least, one.name: value})
                assert one.type is not bool or value is True, one.flag
                assert one.type is not int or type(value) in (int, type(None)), one.flag


def test_help_has_the_groups_under_their_headings_and_names_options_as_options() -> None:
    _, output, _ = shout("--help")
    own, sound = output.split("Sound:")
    assert "--volume" in sound
    assert "--volume" not in own
    assert "--text." in own
    assert "high|low" in own


def test_a_class_tells_its_fields() -> None:
    assert "times: how often." in (Shout.__doc__ or "")


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_option_of_a_command_is_a_field_and_every_field_an_option(name: str) -> None:
    kind = getattr(kdcache, f"{name.capitalize()}Options")
    fields = {field.name for field in dataclasses.fields(kind)}
    assert {option.name for option in options_of(kind)} == fields
    params = {param.name for param in load(name).params}
    assert params - {"config", "as_json", "quiet", "verbose"} == fields


# Names of options: few, each in a document, and the former ones for one more version

ROOT = Path(__file__).parent.parent
DOCUMENTS = [p for p in (ROOT / "docs").glob("*.md") if p.name != "log.md"] + [ROOT / "README.md"]
KINDS: dict[str, type[Options]] = {name: _find(row.options) for name, row in COMMANDS.items()}


@pytest.fixture(autouse=True)
def every_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extras that are not installed here would be refused."""
    monkeypatch.setattr("kdcache.options.require", lambda extras: None)


def options(name: str) -> list[Option]:
    return [one for one in options_of(KINDS[name]) if not one.hidden]


def test_there_are_at_most_320_options() -> None:
    assert sum(len(options(name)) for name in KINDS) <= 320


def test_every_option_stands_in_a_document() -> None:
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    flags = {one.flag for name in KINDS for one in options(name) if not one.positional}
    assert [f for f in sorted(flags) if not re.search(rf"{f}(?![\w-])", text)] == []


@pytest.mark.parametrize("name", list(KINDS))
def test_a_help_begins_with_ten_options_at_most_and_shows_no_former_one(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"], terminal_width=100)
    parts = dict(re.findall(r"^([A-Z][^\n]*):\n((?:  .*\n|\n)+)", result.output, re.MULTILINE))
    first = re.findall(r"^  --(\S+)", parts.get("Options", ""), re.MULTILINE)
    assert len(first) <= 10
    needed = {one.words for one in options(name) if one.required and not one.positional}
    assert needed <= set(first)
    assert "--config" in parts["Of every command"]
    shown = set(re.findall(r"^  (--[a-z0-9-]+)", result.output, re.MULTILINE))
    want = {one.flag for one in options(name) if not one.positional}
    assert shown == want | {"--config", "--json"}


BUILD = {"teacher": ("t",), "corpus": ("c",), "out": "o"}
TRAIN = {"cache": ("c",), "student": "bilstm", "out": "o"}
NAMES: list[tuple[type[Any], dict[str, Any], str, str, dict[str, Any]]] = [
    # kind, what else is needed, the former flag, the present one, fields that both set
    (BuildOptions, BUILD, "--engine vllm --tensor-parallel 2 --pipeline-parallel 3",
     "--engine vllm --engine-arg tensor_parallel_size=2 --engine-arg pipeline-parallel-size=3",
     {"tensor_parallel": 2, "pipeline_parallel": 3, "engine_args": {}}),
    (VerifyOptions, {"cache": "c"}, "--quantization fp8", "--engine-arg quantization=fp8",
     {"quantization": "fp8", "engine_args": {}}),
    (BuildOptions, BUILD, "--mask-share 0.3 --mask-unit word --mask-seed 4 --task masked-lm",
     "--mask share=0.3,unit=word,seed=4 --task masked-lm",
     {"mask_share": 0.3, "mask_unit": "word", "mask_seed": 4}),
    (TrainOptions, TRAIN, "--hidden-size 32 --layers 2 --dropout 0.5 --pooling max --max-words 9 "
     "--min-count 2 --dense-size 8 --embedding-size 4 --freeze-embeddings",
     "--bilstm hidden-size=32,layers=2,dropout=0.5,pooling=max,max-words=9,min_count=2,"
     "dense-size=8,embedding-size=4,freeze-embeddings=true",
     {"bilstm_settings": {
         "hidden_size": 32, "layers": 2, "dropout": 0.5, "pooling": "max", "max_words": 9,
         "min_count": 2, "dense_size": 8, "embedding_size": 4, "freeze_embeddings": True}}),
    (PredictOptions, {"student": "s", "corpus": ("c",)}, "--pair-column pair",
     "--columns pair=second", {"pair_column": "pair"}),
    (BuildOptions, BUILD, "--max-workers 4", "--workers 1:4", {"worker_range": (1, 4)}),
    (ImportOptions, {"corpus": ("c",), "tokenizer": "t", "out": "o"}, "--from jsonl",
     "--format jsonl", {"format": "jsonl", "from_": None}),
    (EvaluateOptions, {"student": ("s",), "corpus": ("c",)}, "--pair-column pair",
     "--columns text,pair,label", {"pair_column": "pair"}),
    (BuildOptions, BUILD, "--documents line --delimiter ; --max-record-bytes 99",
     "--read documents=line,delimiter=;,max-record-bytes=99",
     {"documents": "line", "delimiter": ";", "max_record_bytes": 99}),
    (ImportOptions, {"corpus": ("c",), "tokenizer": "t", "out": "o"}, "--max-record-bytes 99",
     "--read max-record-bytes=99", {"max_record_bytes": 99}),
    (BuildOptions, BUILD, "--chat-template f --chat-template-kwargs {} --learn a,b "
     "--reasoning read",
     "--chat template=f --chat template-kwargs={} --chat learn=a,b --chat reasoning=read",
     {"chat_template": "f", "chat_template_kwargs": "{}", "learn": ("a", "b"),
      "reasoning": "read"}),
    (PredictOptions, {"student": "s", "corpus": ("c",)},
     "--max-source-length 9 --source-lang x --target-lang y",
     "--seq2seq max-source-length=9,source-lang=x,target-lang=y",
     {"max_source_length": 9, "source_lang": "x", "target_lang": "y"}),
    (BuildOptions, BUILD,
     "--gpus-per-worker 0.5 --cpus-per-worker 2 --hang-seconds 9 --wait-minutes 3",
     "--worker gpus=0.5,cpus=2,hang-seconds=9,wait-minutes=3",
     {"gpus_per_worker": 0.5, "cpus_per_worker": 2, "hang_seconds": 9.0, "wait_minutes": 3.0}),
    (TrainOptions, TRAIN, "--gpus-per-worker 0 --max-failures 4 --wait-minutes 3 "
     "--shuffle-shards 5 --prefetch 6 --eval-steps 7",
     "--worker gpus=0,max-failures=4,wait-minutes=3 --read shuffle-shards=5,prefetch=6 "
     "--save-steps 7",
     {"gpus_per_worker": 0.0, "max_failures": 4, "wait_minutes": 3.0, "shuffle_shards": 5,
      "prefetch": 6, "save_steps": 7, "eval_steps": None}),
]  # fmt: skip


def made(kind: type[Any], words: list[str], **environment: str) -> Any:
    """The options that a command line gives."""
    name = next(name for name, one in KINDS.items() if one is kind)
    found: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "kdcache.cli.commands._run", lambda row, options, as_json: found.append(options)
        )
        result = CliRunner().invoke(cli, [name, *words], env={**os.environ, **environment})
    assert result.exit_code == 0, result.output
    return found[0]


@pytest.mark.parametrize(("kind", "needs", "former", "now", "fields"), NAMES)
def test_former_names_do_what_the_present_ones_do(
    kind: type[Any], needs: dict[str, Any], former: str, now: str, fields: dict[str, Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    first: list[str] = []
    for one in options_of(kind):
        if one.name in needs:
            value = needs[one.name][0] if one.several else needs[one.name]
            first += [value] if one.positional else [one.flag, value]
    for words in (former, now):
        options = made(kind, [*first, *words.split()])
        assert {name: getattr(options, name) for name in fields} == fields
        # The same from a file and from the environment.
        pairs = re.findall(r"--([a-z0-9-]+)(?: (?!--)(\S+))?", words)
        file = tmp_path / "options.yaml"
        lines: dict[str, list[str]] = {}
        for name, value in pairs:
            lines.setdefault(name, []).append(value or "true")
        values = {name: v if len(v) > 1 else v[0] for name, v in lines.items()}
        file.write_text(yaml.safe_dump(values))
        assert made(kind, [*first, "--config", str(file)]) == options
        command = next(name for name, one in KINDS.items() if one is kind).upper()
        names = {one.words: one.name.upper() for one in options_of(kind)}
        environment = {f"KDCACHE_{command}_{names[name]}": " ".join(v) for name, v in lines.items()}
        assert made(kind, first, **environment) == options
        again = kind(**{**needs, **parse_values(kind, dict(_words(as_words(options, kind))))[0]})
        assert again == options


def _words(words: list[str]) -> list[tuple[str, Any]]:
    found: dict[str, Any] = {}
    for i, word in enumerate(words):
        if word.startswith("--"):
            value = words[i + 1] if i + 1 < len(words) and words[i + 1][:2] != "--" else "true"
            old = found.get(word[2:])
            found[word[2:]] = (
                value if old is None else [*(old if isinstance(old, list) else [old]), value]
            )
    return list(found.items())


ROWS = {  # options, and the rows of their spec.json: fields of the first version, and later ones
    "token-classification": (
        {"words_column": "w", "label_column": "none"},
        """
        "text_column": "text", "pair_column": null, "label_column": null, "label_names":
        ["a", "b"], "max_length": 17, "packing": "none", "messages_column": "messages",
        "prompt_column": "prompt", "completion_column": "completion", "record_form":
        "auto", "on_error": "fail", "words_column": "w"
        """,
    ),
    "causal-lm": (
        {
            "attend": "document",
            "learn": ("a", "b"),
            "chat_template_kwargs": "{}",
            "reasoning": "read",
        },
        """
        "text_column": "text", "pair_column": null, "label_column": "label",
        "label_names": null, "max_length": 17, "packing": "concat", "attend":
        "document", "messages_column": "messages", "chat_template_kwargs": "{}",
        "learn": ["a", "b"], "reasoning": "read", "prompt_column": "prompt",
        "completion_column": "completion", "record_form": "auto", "on_error": "fail"
        """,
    ),
    "masked-lm": (
        {"mask": {"share": 0.3, "unit": "word"}, "text_column": "x", "on_error": "skip"},
        """
        "text_column": "x", "pair_column": null, "label_column": "label", "label_names":
        null, "max_length": 17, "packing": "concat", "messages_column": "messages",
        "prompt_column": "prompt", "completion_column": "completion", "record_form":
        "auto", "on_error": "skip", "mask_share": 0.3, "mask_unit": "word"
        """,
    ),
    "seq2seq-lm": (
        {"source_lang": "x", "columns": "target=theirs", "max_source_length": 7},
        """
        "text_column": "text", "pair_column": null, "label_column": "label",
        "label_names": null, "max_length": 17, "packing": "none", "messages_column":
        "messages", "prompt_column": "prompt", "completion_column": "completion",
        "record_form": "auto", "on_error": "fail", "max_source_length": 1024,
        "source_lang": "x"
        """,
    ),
}


@pytest.mark.parametrize("task", ROWS)
def test_a_row_spec_is_written_as_it_always_was(task: Task) -> None:
    given, text = ROWS[task]
    options = BuildOptions(**{**BUILD, **given, "task": task})
    spec = options.row_spec(task, ("a", "b"), max_length=17)
    assert json.dumps(spec.to_dict()) == f'{{"task": "{task}", {" ".join(text.split())}}}'


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TrainOptions, {**TRAIN, "bilstm": "layers=many"},
         "--bilstm layers is 'many', expected a whole number."),
        (TrainOptions, {**TRAIN, "bilstm": "depth=2"},
         "--bilstm is 'depth=2', expected KEY=VALUE of freeze-embeddings, embedding-size, "
         "hidden-size, layers, dense-size, dropout, pooling, min-count, max-words."),
        (TrainOptions, {**TRAIN, "bilstm": {"pooling": "mean"}},
         "--bilstm pooling is 'mean', expected one of last, max."),
        (TrainOptions, {**TRAIN, "bilstm": "layers=2", "layers": 3},
         "--layers and --bilstm layers=2 differ: give the latter alone."),
        (BuildOptions, {**BUILD, "engine": "vllm", "engine_arg": ("tensor_parallel_size=0",)},
         "--engine-arg tensor_parallel_size is 0, expected at least 1."),
        (TrainOptions, {**TRAIN, "save_steps": 2, "eval_steps": 3},
         "--eval-steps and --save-steps differ: give the latter alone."),
        (BuildOptions, {**BUILD, "worker": {"gpus": "many"}},
         "--worker gpus is 'many', expected a number."),
        (BuildOptions, {**BUILD, "mask": "share=2"},
         "--mask share is 2, expected more than 0 and less than 1."),
        (BuildOptions, {**BUILD, "pair_column": "a", "columns": "pair=b"},
         "--pair-column and --columns pair=b differ: give the latter alone."),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_key_is_told(
    kind: type[Any], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as told:
        kind(**values)
    assert str(told.value) == message


def test_a_former_name_is_told_on_the_command_line() -> None:
    result = CliRunner().invoke(
        cli, ["predict", "--student", "none", "--corpus", "none", "--pair-column", "b"]
    )
    assert (
        "--pair-column goes with the next version. Say --columns pair=... instead." in result.stderr
    )
