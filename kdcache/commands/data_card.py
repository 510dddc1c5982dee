"""The card of a published cache: `README.md` of its repository, written from the cache."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from kdcache.cache import Cache
from kdcache.commands.fidelity import Band, Fidelity
from kdcache.commands.inspect import inspect
from kdcache.commands.options import InspectOptions
from kdcache.commands.train.card import table
from kdcache.errors import UsageError
from kdcache.humanize import markdown, percent, size
from kdcache.tasks import TASKS
from kdcache.version import __version__

CARD_FILE = "README.md"
_FILES = 20  # of the corpus
_LICENCE = (
    "To be filled in, here and as `license:` in the head of this file. The cache holds the texts "
    "of its corpus and answers of its teacher: the licences of both bind it."
)


def data_card(cache: Cache, url: str, measured: Sequence[str]) -> str:
    """What a cache holds, how good it is as measured, and how to train on it.

    Args:
        cache: a finished one.
        url: where it will be.
        measured: files with the JSON of `verify --teacher` or `plan`.

    Raises:
        UsageError: a file is neither, or of another cache.
    """
    spec, task = cache.spec, TASKS[cache.spec.task]
    teachers = [str(name) for name in cache.notes.get("teachers", ())]
    name = url.rsplit("/", 1)[-1]
    header = {
        "pretty_name": name,
        "tags": ["knowledge-distillation", "kdcache"],
        "task_categories": [task.pipeline],
        "viewer": False,
    }
    facts = [row for row in inspect(InspectOptions(cache=cache.storage.url)).facts() if row[0]]
    corpus = [(str(file["name"]), size(int(file.get("size", 0)))) for file in spec.corpus[:_FILES]]
    left = len(spec.corpus) - len(corpus)
    fidelity = [row for path in measured for row in _measured(Path(path), cache)]
    train = ["kdcache", "train", "--cache", url, "--student"]
    train += ["CONFIG_OR_MODEL" if task.over_ids else "bilstm", "--out", "run"]
    if not cache.codec().any_temperature and 1.0 not in spec.temperatures:
        train += ["--temperature", f"{spec.temperatures[0]:g}"]
    use = [shlex.join(train), shlex.join(["kdcache", "pull", url, "cache"]), "kdcache verify cache"]
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}# license: (see below)\n---",
        f"# {markdown(name)}",
        f"Soft targets of {markdown(', '.join(teachers) or 'a teacher')} for knowledge "
        f"distillation, a cache of kdcache {__version__}.",
        "## Use",
        "```sh\n" + "\n".join(use) + "\n```",
        "Training reads it from there; `pull` copies it.",
        "## What it is",
        table(("", ""), facts),
        "## Corpus",
        table(("file", "size"), corpus + ([(f"and {left} more", "")] if left else [])),
        "## Fidelity",
        table(("measure", "value"), fidelity) if fidelity else "Not measured.",
        "## Licence",
        _LICENCE,
    ]
    return "\n\n".join(parts) + "\n"


def _measured(path: Path, cache: Cache) -> Iterator[tuple[str, str]]:
    """Names and values of what was measured, from a command's JSON."""
    try:
        found: Any = json.loads(path.read_bytes())
        rows = list(_figures(found, cache))
    except OSError as error:
        raise UsageError(f"--measured {path}: {error.strerror}. Correct the path.") from error
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(
            f"--measured {path} is not what `kdcache verify --teacher` or `kdcache plan` print "
            "with --json."
        ) from error
    if not rows:
        raise UsageError(
            f"--measured {path} is not of this cache: expected the digest {cache.digest}, checked "
            f"against a teacher, or a plan of {cache.spec.codec} at its temperatures."
        )
    yield from rows


def _figures(found: Any, cache: Cache) -> Iterator[tuple[str, str]]:
    spec = cache.spec
    if "recheck" in found:
        checked = found["recheck"]
        if found["digest"] == cache.digest and checked:
            whose = "the teacher of the build" if checked["same_teacher"] else "another teacher"
            yield (
                "difference from live targets",
                f"{checked['cached']:.2g}, of which rounding explains {checked['allowed']:.2g} "
                f"({checked['positions']:,} positions, {whose})",
            )
            for one in checked.get("fidelity", ()):
                bands = tuple(Band(**band) for band in one["bands"])
                yield "fidelity", Fidelity(**{**one, "bands": bands}).line
        return
    for one in found["caches"]:
        if one["codec"] == spec.codec and tuple(one["temperatures"]) == tuple(spec.temperatures):
            for at in one["fidelity"]:
                yield (
                    f"on a sample, at T = {at['temperature']:g}",
                    f"{percent(at['missed'])} of the probability left out or changed, noise "
                    f"{at['noise']:.3g}",
                )
