"""An options dataclass becomes a click command: each field is an option. And how much is printed:
`-v` shows more and `-q` nothing but results and errors, before and after the name of a command.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
import shlex
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import click

from kdcache.files import read_yaml
from kdcache.humanize import printable
from kdcache.options import Option, Options, options_of, parse_values

_ALWAYS = "Of every command"
Kind = TypeVar("Kind", bound=Options)


class Volume(enum.Enum):
    """What is said, and from which level on log messages are shown."""

    QUIET = logging.ERROR
    NORMAL = logging.WARNING
    VERBOSE = logging.INFO


_KEY = "kdcache.volume"


def set_volume(chosen: Volume) -> None:
    """Take a volume for the running command, unless one was chosen already."""
    meta = click.get_current_context().meta
    if chosen is Volume.NORMAL:
        chosen = meta.get(_KEY, chosen)
    meta[_KEY] = chosen
    logging.getLogger().setLevel(chosen.value)
    shown: Literal["default", "ignore"] = "default" if chosen is Volume.VERBOSE else "ignore"
    warnings.filterwarnings(shown, module=r"(torch|transformers|ray|accelerate)\b")


def is_quiet() -> bool:
    """Whether the running command shows nothing but its result and errors."""
    context = click.get_current_context(silent=True)
    return context is not None and context.meta.get(_KEY) is Volume.QUIET


def volume_options() -> list[click.Option]:
    """`-v` and `-q`."""

    def take(chosen: Volume) -> Any:
        def callback(ctx: click.Context, param: click.Parameter, given: bool) -> None:
            if given:
                set_volume(chosen)

        return callback

    words = {
        Volume.VERBOSE: "Show the log messages of the libraries used.",
        Volume.QUIET: "Show nothing but the result and errors.",
    }
    return [
        click.Option(
            [f"-{name[0]}", f"--{name}"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=take(chosen),
            help=words[chosen],
        )
        for chosen in words
        for name in [chosen.name.lower()]
    ]


def tell(line: str) -> None:
    """What a command reports on its way: on standard error, and nothing with --quiet."""
    if not is_quiet():
        echo(line, err=True)


def echo(text: str, *, err: bool = False) -> None:
    """Print a line on standard output, or on standard error."""
    click.echo(printable(text), err=err)


def echo_next(*words: str) -> None:
    """Say on standard error what to type next; words in capitals are for the user to fill in."""
    if not is_quiet():
        echo(f"Next: {shlex.join(words)}", err=True)


class _Value(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A value as its field declares it."""

    name = "value"

    def __init__(self, option: Option) -> None:
        self._option = option

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse a text; a value of a `--config` file comes parsed."""
        try:
            return self._option.parse(value)
        except ValueError as error:
            raise click.UsageError(f"{self._option.flag} is {error}.", ctx) from None


class OptionsCommand(click.Command):
    """A command whose help lists its options under the headings of their groups."""

    groups: dict[str, str]  # name of a parameter to its heading
    first: tuple[str, ...]  # names of those that come first
    arguments: list[tuple[str, str]]  # each argument without a name, and its help

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse an option that is given twice and takes one value: one of them would be lost."""
        given = self.make_parser(ctx).parse_args(args=list(args))[2]
        for param in given:
            one = isinstance(param, click.Option) and not (param.multiple or param.is_flag)
            if one and given.count(param) > 1:
                raise click.UsageError(f"{param.opts[0]} is given twice: it takes one value.", ctx)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the arguments, the options that matter first, then a section for each group."""
        if self.arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(self.arguments)
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        params = {str(param.name): param for param in self.get_params(ctx)}
        for name in dict.fromkeys((*self.first, *params)):
            record = params[name].get_help_record(ctx)
            if record is not None and isinstance(params[name], click.Option):
                heading = "Options" if name in self.first else self.groups.get(name, _ALWAYS)
                sections.setdefault(heading, []).append(record)
        for heading in dict.fromkeys(("Options", *self.groups.values(), _ALWAYS)):
            if sections.get(heading):
                with formatter.section(heading):
                    formatter.write_dl(sections[heading])


def options_command(
    kind: type[Kind], *examples: str
) -> Callable[[Callable[[Kind, bool], None]], click.Command]:
    """Make a click command whose options are the fields of an options dataclass.

    Args:
        kind: the options dataclass.
        examples: lines of worked examples, shown as they are.

    Returns:
        A decorator for `function(options, as_json)`.
    """

    def decorate(function: Callable[[Kind, bool], None]) -> click.Command:
        def run(as_json: bool, **values: Any) -> None:
            missing = [o.flag for o in options if o.required and values[o.name] in (None, ())]
            if missing:
                raise click.UsageError(
                    f"missing {', '.join(missing)} (a flag, or a key of --config)."
                )
            given = {k: v for k, v in values.items() if v is not None and v != ()}
            for o in options:
                if o.hidden and given.get(o.name, False) not in (False, o.default):
                    now = f" Say {o.now} instead." if o.instead else ""
                    tell(f"{o.flag} goes with the next version.{now}")
            function(kind(**given), as_json)

        options = options_of(kind)
        names = [option.name for option in options]
        params: list[click.Parameter] = [_parameter(option, names) for option in options]
        params.append(
            click.Option(
                ["--config"],
                type=click.Path(exists=True, dir_okay=False),
                is_eager=True,
                expose_value=False,
                callback=lambda ctx, _, path: _load(kind, ctx, path),
                help="YAML file with option names as keys; flags take precedence.",
            )
        )
        params.append(
            click.Option(
                ["--json", "as_json"], is_flag=True, help="Print the result as one JSON object."
            )
        )
        params += volume_options()
        command = OptionsCommand(
            params=params,
            name=None,
            callback=run,
            epilog="\n".join(["\b", "Examples:", *(f"  {line}" for line in examples)]),
        )
        command.first = kind.first or tuple(o.name for o in options if not o.group)
        command.groups = {option.name: option.group or "More options" for option in options}
        command.arguments = [
            (option.metavar or "", _help(option, names)) for option in options if option.positional
        ]
        return command

    return decorate


def _help(option: Option, names: Sequence[str]) -> str:
    text = option.help[:1].upper() + option.help[1:]
    # A help speaks of other fields, which are options here; a word to choose is not a field.
    for name in set(names) - {option.name, *option.choices}:
        text = text.replace(f"`{name}`", f"--{name.rstrip('_').replace('_', '-')}")
    return text.replace("`", "")


def _parameter(option: Option, names: Sequence[str]) -> click.Parameter:
    if option.positional:
        count = -1 if option.several else 1
        metavar = f"{option.metavar}..." if option.several else option.metavar
        return click.Argument([option.name], metavar=metavar, nargs=count, required=True)
    text = _help(option, names)
    if option.type is bool:
        return click.Option(
            [option.flag, option.name], is_flag=True, default=False, help=text, hidden=option.hidden
        )
    if option.required:
        text += "  [required]"
    elif option.default not in (None, ()):
        several = option.default if option.several else (option.default,)
        shown = ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in several)
        text = f"{text}  [default: {shown}]"
    elif option.auto and option.default is None:
        text += "  [default: auto]"
    return click.Option(
        [option.flag, option.name],
        type=_Value(option),
        multiple=option.several and not option.comma,
        help=text,
        metavar=_metavar(option),
        hidden=option.hidden,
    )


def _metavar(option: Option) -> str:
    plain = {str: "TEXT", int: "N", float: "X"}
    one = option.metavar or "|".join(option.choices) or plain[option.type]
    if option.auto:
        return f"auto|{one}"
    return f"{one}[,{one}...]" if option.comma else one


def _load(kind: type[Any], ctx: click.Context, path: str | None) -> None:
    """Take the values of a `--config` file as defaults."""
    if path is None:
        return
    try:
        values = read_yaml(path)
    except ValueError as error:
        raise click.UsageError(f"{path} is not valid YAML: {error}.") from error
    if not isinstance(values, dict):
        raise click.UsageError(f"{path} holds no options: expected lines like `max-length: 512`.")
    found, wrong = parse_values(kind, values)
    if wrong:
        raise click.UsageError(f"{path}: {' '.join(wrong)}")
    ctx.default_map = {**(ctx.default_map or {}), **found}


def print_json(value: Any) -> None:
    """Print a dataclass or mapping as one JSON object."""
    plain = value if isinstance(value, dict) else dataclasses.asdict(value)
    click.echo(json.dumps(plain, default=str))
