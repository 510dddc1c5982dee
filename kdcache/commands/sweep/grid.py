"""The grid of a sweep: a YAML file becomes runs, and all its problems are reported at once.

    cache: caches/novels            # keys are options of `kdcache train`
    eval-cache: caches/held-out
    grid:                           # every combination
      student: [tiny.json, small.json]
      alpha: [0.1, 0.5, 1.0]
      temperature: [1, 2]
      seed: [0, 1, 2]

Two combinations are one run if nothing that a student depends on differs: values given twice,
options that only change speed or logging, and at alpha 1 or with mse the temperature. A run's key
is a hash of what its student depends on (caches by their digests, the files that it begins from by
their content), so it does not change when the grid around it does.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.cache import Cache
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.prepare import RunPlan
from kdcache.errors import UsageError
from kdcache.files import read_yaml
from kdcache.options import parse_values
from kdcache.storage import redact
from kdcache.stream import open_caches

_GRID = "grid"
_NOT_OURS = {
    "out": "each run has a folder of its own below the --out of the sweep",
    "resume": "runs continue from their last checkpoints by themselves",
    "plot": "the sweep draws its own results.png",
    "num_workers": "each run is one process, and several run at once",
    "fsdp": "each run is one process",
    "worker": "the sweep has --gpus-per-run",
    "gpus_per_worker": "the sweep has --gpus-per-run",
    "address": "the sweep has its own --address",
}
_PATHS = ("student", "cache", "eval_cache", "embeddings", "init_from")
ANY = "-"  # the value of an option that a student does not depend on
_LONGEST_NAME = 100


@dataclass(frozen=True)
class GridRun:
    """One run of a sweep.

    Attributes:
        key: SHA-256 of everything its student depends on.
        name: the values that distinguish it, and the beginning of the key.
        setting: option to value, as people read them, of what the grid crosses; `-` where the
            student does not depend on it.
        plan: its options, all but `out`, with their caches opened.
    """

    key: str
    name: str
    setting: dict[str, str]
    options: TrainOptions
    plan: RunPlan

    def at(self, out: Path) -> RunPlan:
        """The plan of this run in a folder."""
        return dataclasses.replace(
            self.plan, options=dataclasses.replace(self.options, out=str(out))
        )


@dataclass(frozen=True)
class Grid:
    """The runs of a sweep.

    Attributes:
        crossed: options with several values, in the order of the file.
        combinations: how many combinations of values these runs cover.
    """

    crossed: tuple[str, ...]
    runs: tuple[GridRun, ...]
    combinations: int

    @classmethod
    def read(cls, path: str | Path) -> Grid:
        """Read a YAML file and check everything about each run except its student.

        Raises:
            UsageError: lists everything that is wrong.
            IncompleteError: the build of a cache is unfinished.
        """
        fixed, crossed, wrong = _read_file(Path(path))
        combinations = list(itertools.product(*crossed.values()))
        labels = itertools.product(*(_labels(name, values) for name, values in crossed.items()))
        problems: dict[str, list[str]] = {}
        runs: dict[str, GridRun] = {}

        @functools.cache
        def opened(names: Sequence[str]) -> list[Cache]:
            return open_caches(names)

        for values, texts in zip(combinations, labels, strict=True):
            setting = dict(zip(crossed, texts, strict=True))
            try:
                run = _run({**fixed, **dict(zip(crossed, values, strict=True))}, setting, opened)
            except UsageError as error:
                here = " ".join(f"{option_name(name)}={text}" for name, text in setting.items())
                for line in str(error).splitlines():
                    problems.setdefault(line, []).append(here)
            else:
                runs.setdefault(run.key, run)
        for problem, places in problems.items():
            everywhere = len(places) == len(combinations)
            where = f"{len(places)} of {len(combinations)} combinations, first {places[0]}"
            wrong.append(problem if everywhere else f"{problem} ({where})")
        if wrong:
            raise nothing_started(path, wrong)
        return cls(tuple(crossed), tuple(runs.values()), len(combinations))


def nothing_started(path: str | Path, wrong: Sequence[str]) -> UsageError:
    """The error that lists a grid's problems."""
    return UsageError("\n  ".join([f"grid {path}: nothing was started.", *wrong]))


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, list[Any]], list[str]]:
    """Options with one value, those with several (names with `_`), and the problems."""
    try:
        document = read_yaml(path)
    except OSError as error:
        raise UsageError(f"grid {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"grid {path} is not valid YAML: {error}.") from error
    if not isinstance(document, dict):
        raise UsageError(f"grid {path} holds no options: expected lines like `epochs: 1`.")
    grid = document.pop(_GRID, None)
    wrong = []
    if not isinstance(grid, dict) or not grid:
        wrong.append(
            "the grid has no values: expected `grid:` with lines like `alpha: [0.1, 0.5]` below "
            "it. For a single run use `kdcache train`."
        )
        grid = {}
    fixed = {str(key).replace("-", "_"): value for key, value in document.items()}
    crossed = {}
    for key, values in grid.items():
        name = str(key).replace("-", "_")
        if isinstance(values, list) and values:
            crossed[name] = values
        else:
            shown = json.dumps(values, default=str)
            wrong.append(f"{key} under grid is {shown}, expected a list of values.")
        if name in fixed:
            wrong.append(f"{key} is given twice, under `grid` and outside of it. Remove one.")
    for name in _NOT_OURS.keys() & {*fixed, *crossed}:
        wrong.append(f"{option_name(name)} cannot be used in a grid: {_NOT_OURS[name]}.")
        fixed.pop(name, None)
        crossed.pop(name, None)
    return fixed, crossed, wrong


def _run(values: Mapping[str, Any], setting: Mapping[str, str], opened: Any) -> GridRun:
    found, wrong = parse_values(TrainOptions, values)
    wrong += [
        f"{name} is missing." for name in ("cache", "student") if values.get(name) in (None, [])
    ]
    try:
        options = TrainOptions(**{"cache": ("?",), "student": "?", **found, "out": "?"})
    except UsageError as error:
        wrong += str(error).splitlines()
    student = found.get("student", "")
    if student.endswith(".json") and not Path(student).is_file():
        wrong.append(f"student {student}: no such file.")
    if wrong:
        raise UsageError("\n".join(wrong))
    options, setting = _without_idle(options, setting)
    plan = RunPlan.make(options, opened=opened)
    key = _key(plan)
    return GridRun(key, _name(setting, key), setting, plan.options, plan)


def _without_idle(
    options: TrainOptions, setting: Mapping[str, str]
) -> tuple[TrainOptions, dict[str, str]]:
    """Options without effect set to one value, so that equal runs have equal options."""
    idle: dict[str, Any] = {}
    if options.hard_only:
        idle = {"temperature": 1.0, "tail": "bucket"}
        if options.divergence != "huber":  # which is a loss of hard scores too
            idle["divergence"] = None
    elif options.divergence == "mse" and "temperature" in setting:
        idle = {"temperature": 1.0}
    shown = {name: ANY if name in idle else text for name, text in setting.items()}
    return dataclasses.replace(options, **idle), shown


def _key(plan: RunPlan) -> str:
    options = plan.options
    facts = {
        **plan.finished_identity,
        "eval_steps": options.save_steps if options.eval_cache else None,
        "patience": options.patience,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _name(setting: Mapping[str, str], key: str) -> str:
    words = [
        value if name in _PATHS else f"{option_name(name)}{value}"
        for name, value in setting.items()
        if value != ANY
    ]
    readable = re.sub(r"[^\w.+-]+", "_", "-".join(words))[:_LONGEST_NAME]
    return f"{readable}-{key[:8]}"


def _labels(name: str, values: Sequence[Any]) -> list[str]:
    """Short texts for the values of an option, as different as the values are."""
    texts = [list(map(_text, _parts(value))) for value in values]
    if name not in _PATHS:
        return ["+".join(parts) for parts in texts]
    depth = max((len(Path(text).parts) for parts in texts for text in parts), default=1)
    for last in range(1, depth + 1):
        short = ["+".join(_end(text, last) for text in parts) for parts in texts]
        if len(set(short)) == len({tuple(parts) for parts in texts}):
            return short
    return ["+".join(parts) for parts in texts]


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):  # of names to values
        return [f"{name}={each}" for name, each in value.items()]
    return value if isinstance(value, list) else [value]


def _end(text: str, last: int) -> str:
    return "/".join(Path(text).parts[-last:]).removesuffix(".json")


def _text(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, float) else redact(str(value))


def option_name(name: str) -> str:
    """An option as it is typed."""
    return name.replace("_", "-")
