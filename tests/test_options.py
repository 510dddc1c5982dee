"""Options: declared once, at their fields; bounds, lists, words, files, groups."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import pytest
from click.testing import CliRunner

import kdcache
from kdcache.cli.commands import COMMANDS, load
from kdcache.cli.options import options_command
from kdcache.errors import UsageError
from kdcache.options import Options, option, options_of, parse_values


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


@pytest.mark.parametrize("name", ["build", "plan", "evaluate", "finetune", "predict"])
def test_commands_that_read_a_corpus_share_its_options(name: str) -> None:
    params = {param.opts[0] for param in load(name).params}
    assert {"--format", "--record-form", "--on-error", "--columns"} <= params
