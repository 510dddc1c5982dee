"""Options: a dataclass whose fields are the options of a command and the arguments of a function.

An option is declared once, at its field, with `option`: default, help, bounds, how it is written,
and what it decides. Groups that several commands share are base classes. The command line, YAML
files and the identity of a run read the fields:

    @dataclass(frozen=True, kw_only=True)
    class ShoutOptions(Options):
        \"\"\"What `shout` is asked for.\"\"\"

        text: str = option(help="what to shout.", metavar="TEXT")
        times: int = option(1, help="how often.", at_least=1)

An option that became a KEY=VALUE of another one is declared with `instead`. It keeps its field,
type and bounds: `--bilstm layers=2` sets the field `layers`. One that became another's value gives
its own to that: with `instead=("workers", "1:{}")`, `--max-workers 8` is `--workers 1:8`. Its flag,
YAML key and environment variable work for one more version, and no help shows them.

Guarantee: a value is checked when the object is made, wherever it came from, and all that is wrong
is reported at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import numbers
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from functools import partial
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

from kdcache.domains import Named
from kdcache.errors import UsageError, require
from kdcache.files import output_problem

Decides = Literal["nothing", "run", "student"]
# By the type of a value: what is one (numpy's numbers are, too), and in words.
_TYPES: dict[type, tuple[type, str]] = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    bool: (bool, "true or false"),
    str: (str, "a text"),
}
_KEY = "kdcache.option"
_KNOWN: dict[type, tuple[Option, ...]] = {}  # of each class that was asked for


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What a field declares of its option; see `option`.

    Attributes:
        help: what it is; begins in lower case, ends with a full stop.
        metavar: what stands for a value in the help.
        at_least: smallest value, or the smallest of several.
        below: value that it must stay under.
        comma: several values stand in one option, with commas; else the option is repeated.
        auto: `auto` is a value and means None.
        positional: on the command line it stands without its name.
        named: its values may have names: `NAME=VALUE`, in Python and YAML a mapping of names.
        output: it names a file or folder to write.
        extra: of this package, which a value needs; of several choices, the one of that name.
        decides: what changes with it. A `"run"` may not continue with another value; an option
            that decides the `"student"` decides the run, too.
        instead: the option, and the KEY of it, that say this one now. One of `columns` renames a
            column as it is read: the value is then KEY, the name that the column gets. A KEY with
            `{}` is the value of that option, with this one's in it; its own default is None.
        keys: its values are `KEY=VALUE` with KEYs of other options' `instead`, and of no others.
        hidden: it works, and no help shows it.
        later: a field that came later: in an identity only where it is not the default.
    """

    help: str = ""
    metavar: str | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    comma: bool = False
    auto: bool = False
    positional: bool = False
    named: bool = False
    output: bool = False
    extra: str = ""
    decides: Decides = "run"
    instead: tuple[str, str] | None = None
    keys: bool = False
    hidden: bool = False
    later: bool = False

    @property
    def now(self) -> str:
        """How to write a former option: `--columns text=...`; empty of a present one."""
        owner, key = self.instead or ("", "")
        value = key.format("...") if "{}" in key else f"{key}=..."
        return f"--{owner.replace('_', '-')} {value}" if owner else ""


def option(default: Any = MISSING, **declared: Any) -> Any:
    """A field of an options dataclass, as `Declared`; without a default it is required."""
    made = Declared(**declared)
    made = replace(made, help=f"now {made.now}", hidden=True) if made.instead else made
    return dataclasses.field(default=default, metadata={_KEY: made})


def again(kind: type[Any], name: str, default: Any, **changed: Any) -> Any:
    """The field `name` of `kind` for another class: with a default, and what else is `changed`."""
    declared = replace(kind.__dataclass_fields__[name].metadata[_KEY], **changed)
    return dataclasses.field(default=default, metadata={_KEY: declared})


@dataclass(frozen=True, kw_only=True)
class Option(Declared):
    """An option: its field, and what that declares.

    Attributes:
        types: that one value may have in Python; empty where any.
        choices: the words that are allowed; empty where all are.
        several: whether its value is a tuple.
        default: `dataclasses.MISSING` where it is required.
        group: heading in the help of the class that declares it; empty for the command's own.
    """

    name: str
    types: tuple[type, ...]
    nullable: bool
    choices: tuple[str, ...]
    several: bool
    default: Any
    group: str

    @property
    def type(self) -> type:
        """Of one value on the command line: `str`, `int`, `float` or `bool`.

        What may be a number or a text is a text, which is checked later.
        """
        return self.types[0] if len(self.types) == 1 else str

    @property
    def words(self) -> str:
        """Its name in files: `max-length`."""
        return self.name.rstrip("_").replace("_", "-")  # `from_` is --from

    @property
    def flag(self) -> str:
        """Its name on the command line: `--max-length`."""
        return f"--{self.words}"

    @property
    def spelled(self) -> str:
        """How to say it on a command line: `--max-length`, `--bilstm layers` of a KEY, `CACHE`."""
        if self.instead is not None and "{}" not in self.instead[1]:
            return f"--{self.instead[0].replace('_', '-')} {self.instead[1]}"
        return self.metavar or self.flag if self.positional else self.flag

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is MISSING

    def parse(self, value: Any) -> Any:
        """One value of a command line or a YAML file, or with `comma` all of them.

        Raises:
            ValueError: it has another type; the text continues "--name is ...".
        """
        if self.comma:
            items = value if isinstance(value, (list, tuple)) else str(value).split(",")
            return tuple(self._parse_one(str(item).strip()) for item in items)
        return self._parse_one(value)

    def _parse_one(self, value: Any) -> Any:
        if self.auto and value in ("auto", None):
            return None
        if isinstance(value, Named):  # of a mapping
            return value
        if self.type is str:
            return str(value)
        _, expected = _TYPES[self.type]
        if self.type is bool or isinstance(value, bool):
            words = {"true": True, "false": False}
            if self.type is bool and str(value).lower() in words:
                return words[str(value).lower()]
            raise ValueError(f"{value!r}, expected {expected}")
        try:
            return self.type(str(value))
        except ValueError:
            also = " or auto" if self.auto else ""
            each = ", several with commas" if self.comma else ""
            raise ValueError(f"{value!r}, expected {expected}{also}{each}") from None

    def unlike(self, value: Any) -> str:
        """What is wrong with the type of a value, as one sentence; empty if nothing is."""
        if value is None and self.nullable:
            return ""
        for one in value if self.several and value is not None else (value,):
            if self.types and not any(map(partial(_is_a, one), self.types)):
                kinds = " or ".join(_TYPES[kind][1] for kind in self.types)
                expected = f"one of {', '.join(self.choices)}" if self.choices else kinds
                return f"{self.spelled} is {one!r}, expected {expected}."
        return ""

    def wrong(self, value: Any) -> str:
        """What is wrong with a value of the right type, as one sentence; empty if nothing is."""
        for one in value if self.several and value is not None else (value,):
            if one is None:
                continue
            if self.output and (problem := output_problem(str(one), self.spelled)):
                return problem
            if self.choices and one not in self.choices:
                return f"{self.spelled} is {one!r}, expected one of {', '.join(self.choices)}."
            shown = str(one).removesuffix(".0")  # 1.0 was written 1
            if self.type in (int, float) and not self._fits(one):
                return f"{self.spelled} is {shown}, expected {self._bounds()}."
        return ""

    def _fits(self, value: float) -> bool:
        return (
            value == value
            and abs(value) != float("inf")
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def _bounds(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            return f"{self.at_least:g} to {self.at_most:g}"
        bounds = (
            ("at least", self.at_least),
            ("more than", self.above),
            ("at most", self.at_most),
            ("less than", self.below),
        )
        words = [f"{word} {bound:g}" for word, bound in bounds if bound is not None]
        return " and ".join(words) or "a finite number"


class Options:
    """Base of the options of a command: its fields are declared with `option`.

    Class attributes:
        heading: for a class of options that several commands share: their heading in the help.
        first: the options that a command's help shows first; empty for all of its own class.
        unused: classes of options without effect on this command, which no help shows.

    Raises:
        UsageError: when an object is made whose values cannot be; a sentence each, one a line.
    """

    heading = ""
    first: ClassVar[tuple[str, ...]] = ()
    unused: ClassVar[tuple[type[Options], ...]] = ()

    def __init_subclass__(cls) -> None:
        """Tell readers of the class what its own fields are."""
        fields = {n: getattr(cls, n, None) for n in inspect.get_annotations(cls)}
        lines = [
            textwrap.indent(textwrap.fill(f"{name}: {field.metadata[_KEY].help}", 90), "    ")
            for name, field in fields.items()
            if isinstance(field, dataclasses.Field)
        ]
        cls.__doc__ = "\n".join([f"{cls.__doc__}\n\nAttributes:", *lines])

    def __post_init__(self) -> None:
        """Check every value, those of a tuple's type given as a list or one text included."""
        options = options_of(type(self))
        for one in options:
            object.__setattr__(self, one.name, _given(one, getattr(self, one.name)))
        problems, judged = self._take_keys(options), True
        for one in options:
            value = getattr(self, one.name)
            missing = one.required and (value is None or value in ((), ""))
            unlike = one.unlike(value)
            wrong = "" if unlike else one.wrong(value)
            problems.append(f"{one.flag} is missing." if missing else unlike or wrong)
            # Of values of a wrong type, or an unknown task, conflicts cannot be told.
            judged = judged and not unlike and not (one.name == "task" and wrong)
        if judged:
            problems += self.conflicts()
        lines = "\n".join(filter(None, problems)).splitlines()
        if lines:
            raise UsageError("\n".join(dict.fromkeys(lines)))
        require(self.extras())

    def _take_keys(self, options: Sequence[Option]) -> list[str]:
        """Set the fields that others say as KEY=VALUE; what is wrong with these."""
        problems = []
        for one in options:
            if one.instead is None:
                continue
            value, (owner, key) = getattr(self, one.name), one.instead
            if "{}" in key:
                if value is not None and not one.unlike(value):
                    target = next(o for o in options if o.name == owner)
                    present, given = getattr(self, owner), target.parse(key.format(value))
                    if present not in (given, target.default):
                        both = f"{one.flag} and {target.flag}"
                        problems.append(f"{both} differ: give the latter alone.")
                    object.__setattr__(self, owner, given)
                    object.__setattr__(self, one.name, None)
                continue
            text = key_values(getattr(self, owner, ())).get(_key(key))
            if text is None:
                continue
            try:
                given = key if owner == "columns" else one.parse(text)
            except ValueError as error:
                problems.append(f"{one.spelled} is {error}.")
                continue
            if text and value not in (one.default, given):
                both = f"{one.flag} and {one.spelled}={text}"
                problems.append(f"{both} differ: give the latter alone.")
            object.__setattr__(self, one.name, given)
        for one in options:
            known = [o.instead[1] for o in options if o.instead and o.instead[0] == one.name]
            for item in getattr(self, one.name) or () if one.keys else ():
                key, equals, _ = str(item).partition("=")
                if not equals or _key(key) not in map(_key, known):
                    keys = ", ".join(known)
                    problems.append(f"{one.flag} is {item!r}, expected KEY=VALUE of {keys}.")
        return problems

    def conflicts(self) -> Sequence[str]:
        """What is wrong with values next to each other, a sentence each. Their types are right."""
        return ()

    def extras(self) -> dict[str, str]:
        """The extras of this package that the values need, each with its option."""
        asked = [one for one in options_of(type(self)) if one.extra and getattr(self, one.name)]
        return {o.extra: o.flag for o in asked if not o.choices or getattr(self, o.name) == o.extra}


def problems_of(*reads: Callable[[], Any]) -> list[str]:
    """What is wrong with options that are read in parts: the message of each that raises one."""
    found = []
    for read in reads:
        try:
            read()
        except UsageError as error:
            found.append(str(error))
    return found


def key_values(items: Any) -> dict[str, str]:
    """The values of KEY=VALUE items by their keys, of which `-` and `_` are the same."""
    texts = (item.partition("=") for item in items or () if isinstance(item, str))
    return {_key(key): value.strip() for key, _, value in texts}


def key_items(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The KEY=VALUE items of a mapping: lists with commas, mappings as JSON."""
    of: dict[type, Callable[[Any], str]] = {list: lambda v: ",".join(map(str, v)), dict: json.dumps}
    return tuple(f"{key}={of.get(type(value), str)(value)}" for key, value in values.items())


def _key(text: str) -> str:
    return text.strip().replace("-", "_")


def _given(one: Option, value: Any) -> Any:
    """A value as its field has it: several as a tuple, paths as texts, numbers as Python's own."""
    if not one.several or value is None:
        return _plain(value)
    if one.keys and isinstance(value, Mapping):
        value = key_items(value)
    if one.comma and isinstance(value, str):
        try:
            value = one.parse(value)
        except ValueError:
            value = value.split(",")  # which the check of its types refuses
    # A dataset of the library `datasets` is one value, not its rows; so are several in a mapping,
    # which are refused later.
    elif (
        isinstance(value, (str, bytes))
        or hasattr(value, "column_names")
        or not isinstance(value, Iterable)
    ):
        value = (value,)
    elif one.named and isinstance(value, Mapping):
        value = pairs_of(value)
    return tuple(map(_plain, value))


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (int, float)):  # a truth value is one, too
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _is_a(value: Any, kind: type) -> bool:
    """Whether a value is of the type of an option; a truth value is not a number."""
    return isinstance(value, _TYPES[kind][0]) and (kind is bool or not isinstance(value, bool))


def pairs_of(values: Mapping[str, Any]) -> tuple[Named, ...]:
    """Values with their names; a list stands for several values of one name."""
    listed = {k: v if isinstance(v, (list, tuple)) else [v] for k, v in values.items()}
    return tuple(Named(str(name), one) for name, several in listed.items() for one in several)


def options_of(kind: type[Any]) -> tuple[Option, ...]:
    """The options of a dataclass: its own first, then those of each group, as declared."""
    if kind in _KNOWN:  # each object of options asks
        return _KNOWN[kind]
    # Not `typing.get_type_hints`, which on Python 3.10 refuses a class with `_: KW_ONLY`.
    hints: dict[str, Any] = {}
    for owner in reversed(kind.__mro__):
        hints |= inspect.get_annotations(owner, eval_str=True)
    groups = [c for c in kind.__mro__[1:] if issubclass(c, Options)]
    classes = [kind]
    for heading in dict.fromkeys(group.heading for group in groups):
        classes += [group for group in reversed(groups) if group.heading == heading]
    found: dict[str, Option] = {}
    shared = {name for group in groups for name in inspect.get_annotations(group)}
    for owner in classes:
        heading = "" if owner is kind else owner.heading
        for name in inspect.get_annotations(owner):
            if owner is kind and name in shared:
                continue  # of a group, with another default here
            field = kind.__dataclass_fields__.get(name)
            if field is not None and _KEY in field.metadata and name not in found:
                one = _read(field, hints[name], heading)
                found[name] = replace(one, hidden=True) if owner in kind.unused else one
    _KNOWN[kind] = tuple(found.values())
    return _KNOWN[kind]


def _read(field: dataclasses.Field[Any], hint: Any, group: str) -> Option:
    members = [hint]
    if get_origin(hint) in (Union, UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
    several = any(get_origin(member) is tuple for member in members)
    inner = get_args(members[0])[0] if several else members[0]
    choices: tuple[str, ...] = ()
    types = (inner,) if len(members) == 1 else tuple(members)
    if Named in get_args(inner):  # or a dataset
        types = ()
    elif get_origin(inner) is Literal:
        choices, types = get_args(inner), (str,)
    return Option(
        name=field.name,
        types=types,
        nullable=type(None) in get_args(hint),
        choices=choices,
        several=several,
        default=field.default,
        group=group,
        **vars(field.metadata[_KEY]),
    )


def parse_values(kind: type[Any], values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Values of a YAML file as the command line would read them; `-` or `_` in names.

    Returns:
        Fields of `kind` with their values, and the problems, one sentence each.
    """
    known = {one.words.replace("-", "_"): one for one in options_of(kind)}
    found: dict[str, Any] = {}
    wrong: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        one = known.get(name)
        if one is None:
            near = difflib.get_close_matches(name, known, 1)
            meant = f" Did you mean {known[near[0]].words}?" if near else ""
            wrong.append(f"there is no option {name.replace('_', '-')}.{meant}")
        elif one.name in found:
            wrong.append(f"{one.words} is given twice.")
        elif isinstance(value, dict) and one.named:
            found[one.name] = pairs_of(value)
        elif isinstance(value, dict) and one.keys:
            found[one.name] = key_items(value)
        elif isinstance(value, dict) or (isinstance(value, list) and not one.several):
            wrong.append(f"{one.words} takes one value, not {json.dumps(value, default=str)}.")
        elif value is not None:
            try:
                if one.several and not one.comma:
                    items = value if isinstance(value, list) else [value]
                    found[one.name] = tuple(one.parse(item) for item in items)
                else:
                    found[one.name] = one.parse(value)
            except ValueError as error:
                wrong.append(f"{one.words} is {error}.")
    return found, wrong
