"""Command-line options and `--config` files become the options dataclass of a command."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click
import yaml

Options = TypeVar("Options")
Command = TypeVar("Command", bound=Callable[..., Any])


class CommaList(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """`1,2,4`: several values of one type in one option."""

    name = "LIST"

    def __init__(self, item: Callable[[str], Any]) -> None:
        self._item = item

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """Parse a comma-separated text; a list of a YAML file is taken as it is."""
        items = value if isinstance(value, (list, tuple)) else str(value).split(",")
        try:
            return tuple(self._item(str(v).strip()) for v in items)
        except ValueError:
            self.fail(
                f"{value!r} is not a comma-separated list of {self._item.__name__}s", param, ctx
            )


class AutoInt(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A whole number, or `auto` for None."""

    name = "auto|N"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        """Parse."""
        if value == "auto":
            return None
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither auto nor a whole number", param, ctx)


def config_option(command: Command) -> Command:
    """Add `--config FILE.yaml`, whose keys are the names of the command's options; flags win."""

    def load(ctx: click.Context, _: click.Parameter, path: str | None) -> None:
        if path is None:
            return
        try:
            values = yaml.safe_load(Path(path).read_text())
        except yaml.YAMLError as error:
            raise click.UsageError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(values, dict):
            raise click.UsageError(
                f"{path} holds no options: expected lines like `max-length: 512`."
            )
        known = {
            opt.lstrip("-"): p for p in ctx.command.params for opt in p.opts if opt.startswith("--")
        }
        unknown = [str(key) for key in values if str(key).replace("_", "-") not in known]
        if unknown:
            raise click.UsageError(
                f"{path}: `{ctx.info_name}` has no option {', '.join(unknown)}. "
                f"Known: {', '.join(sorted(known))}."
            )
        defaults: dict[str, Any] = {}
        for key, value in values.items():
            param = known[str(key).replace("_", "-")]
            several = isinstance(param, click.Option) and param.multiple
            defaults[str(param.name)] = (
                [value] if several and not isinstance(value, list) else value
            )
        ctx.default_map = {**(ctx.default_map or {}), **defaults}

    return click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=load,
        help="YAML file whose keys are option names; flags win.",
    )(command)


def options_command(
    kind: type[Options],
    *,
    name: str,
    epilog: str = "",
    commas: Mapping[str, Callable[[str], Any]] | None = None,
    metavars: Mapping[str, str] | None = None,
    arguments: Sequence[str] = (),
) -> Callable[[Callable[[Options, bool], None]], click.Command]:
    """Make a click command whose options are the fields of a dataclass: one place to say it all.

    A field's name is the option's, its type and default decide how it is parsed, and its line in
    the docstring's `Attributes:` is the help.

    Args:
        kind: the options dataclass.
        name: name of the command.
        epilog: worked examples, shown as they are.
        commas: fields that take several values in one comma-separated option, with their item type.
        metavars: what stands for a field's value in the help.
        arguments: fields that are positional.

    Returns:
        A decorator for `function(options, as_json)`; its docstring is the command's help.
    """
    commas, metavars = commas or {}, metavars or {}

    def decorate(function: Callable[[Options, bool], None]) -> click.Command:
        def run(as_json: bool, **values: Any) -> None:
            absent = [
                f"--{field.name.replace('_', '-')}"
                for field in fields
                if field.default is dataclasses.MISSING and values.get(field.name) in (None, ())
            ]
            if absent:
                raise click.UsageError(
                    f"missing {', '.join(absent)} (a flag, or a key of --config)."
                )
            given = {k: v for k, v in values.items() if v is not None and v != ()}
            function(kind(**given), as_json)

        fields = dataclasses.fields(kind)  # type: ignore[arg-type]
        hints, helps = get_type_hints(kind), _attributes(kind.__doc__ or "")
        command: Any = config_option(run)
        command = click.option(
            "--json", "as_json", is_flag=True, help="Print the outcome as one JSON object."
        )(command)
        for field in reversed(fields):
            if field.name in arguments:
                command = click.argument(field.name, metavar=metavars.get(field.name))(command)
                continue
            command = _option(
                field,
                hints[field.name],
                helps.get(field.name, ""),
                commas.get(field.name),
                metavars.get(field.name),
            )(command)
        return click.command(name, help=function.__doc__, epilog=epilog)(command)

    return decorate


def read_values(kind: type[Any], values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Values of a YAML file as the command line would read them.

    Args:
        kind: the options dataclass of a command.
        values: names of options to values; `-` or `_` in names, an absent value is None.

    Returns:
        Fields of `kind` with their values, and what is wrong, one sentence each.
    """
    command = options_command(kind, name="values")(lambda _options, _as_json: None)
    context = click.Context(command)
    fields = {field.name for field in dataclasses.fields(kind)}
    known = {str(param.name): param for param in command.params if param.name in fields}
    found: dict[str, Any] = {}
    wrong: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        key = name.replace("_", "-")
        param = known.get(name)
        if param is None:
            near = difflib.get_close_matches(name, known, 1)
            meant = f" Did you mean {near[0].replace('_', '-')}?" if near else ""
            wrong.append(f"there is no option {key}.{meant}")
        elif isinstance(value, (list, dict)) and not param.multiple:
            wrong.append(f"{key} takes one value, not {json.dumps(value, default=str)}.")
        elif value is not None:
            several = param.multiple and not isinstance(value, list)
            try:
                found[name] = param.type_cast_value(context, [value] if several else value)
            except click.BadParameter as error:
                wrong.append(f"{key}: {error.message}")
    return found, wrong


def _option(
    field: dataclasses.Field[Any],
    hint: Any,
    help_text: str,
    comma: Callable[[str], Any] | None,
    metavar: str | None,
) -> Callable[[Any], Any]:
    flag = f"--{field.name.replace('_', '-')}"
    default = None if field.default is dataclasses.MISSING else field.default
    if hint is bool:
        return click.option(flag, is_flag=True, default=False, help=help_text)
    if default not in (None, ()):
        shown = ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in _items(default))
        help_text = f"{help_text}  [default: {shown}]"
    union = get_origin(hint) in (Union, UnionType)
    members = [m for m in (get_args(hint) if union else (hint,)) if m is not type(None)]
    several = any(get_origin(m) is tuple for m in members)
    kind: Any = str
    if comma is not None:
        kind, several = CommaList(comma), False
    elif get_origin(members[0]) is Literal:
        kind = click.Choice(list(get_args(members[0])))
    elif several:
        inner = next((m for m in members if get_origin(m) is tuple), hint)
        kind = get_args(inner)[0]
    elif field.name == "workers" and union:
        kind = AutoInt()
    elif members in ([int], [float]):
        kind = members[0]
    return click.option(
        flag, type=kind, multiple=several, default=None, help=help_text, metavar=metavar
    )


def _items(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _attributes(doc: str) -> dict[str, str]:
    """The `Attributes:` of a Google docstring: field name -> its text on one line."""
    found: dict[str, str] = {}
    name = ""
    _, _, section = inspect.cleandoc(doc).partition("Attributes:\n")
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name = start.group(1)
            found[name] = start.group(2)
        elif name and line.strip():
            found[name] += " " + line.strip()
    return {k: (v[:1].upper() + v[1:]).replace("`", "") for k, v in found.items()}


def print_json(value: Any) -> None:
    """Print a dataclass or mapping as one JSON object."""
    plain = value if isinstance(value, dict) else dataclasses.asdict(value)
    click.echo(json.dumps(plain, default=str))
