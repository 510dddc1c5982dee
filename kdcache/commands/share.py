"""`kdcache push` and `kdcache pull`: a cache as a dataset repository of the Hugging Face hub, and
a copy of a cache from there or from any other store.

A copy has its manifest last, so it is readable when it is whole and not before, as a build is. The
same command continues where it stopped: what is there with its hash is not sent again. `push`
makes a commit of some files at a time; the last one has spec, manifest and card. All requests are
`huggingface_hub`'s, and the credentials are those that it finds.

Cost: `push` reads each shard twice, to hash it; `pull` has a file of the cache in memory at a time.
Guarantee: the copy has the digest of the cache. Files that are not the cache's are never replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from kdcache import __version__
from kdcache.cache import Cache
from kdcache.commands.fidelity import Band, Fidelity
from kdcache.commands.inspect import inspect
from kdcache.commands.options import InspectOptions, PullOptions, PushOptions
from kdcache.commands.train.card import table
from kdcache.errors import CorruptCacheError, UsageError
from kdcache.files import try_output
from kdcache.humanize import counted, markdown, percent, size
from kdcache.storage import Storage, open_storage, redact, sha256_file
from kdcache.storage.filesystem import FileSystem
from kdcache.tasks import TASKS

_LAST = ("spec.json", "manifest.json")
_FILES, _BYTES = 64, 4 << 30  # of a commit, about
_REPOSITORY = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+?)/?")


@dataclass(frozen=True)
class ShareResult:
    """A cache that was copied.

    Attributes:
        to: where the copy is.
        files: how many were copied now.
        present: how many were there already.
    """

    to: str
    digest: str
    files: int
    bytes: int
    present: int


@dataclass(frozen=True)
class _File:
    """A file of a cache: its name, its SHA-256, and a way to it on this machine."""

    name: str
    sha256: str
    hold: Callable[[], contextlib.AbstractContextManager[Path]]


def push(options: PushOptions, report: Callable[[str], None] = lambda line: None) -> ShareResult:
    """Upload a cache to a dataset repository; one that is made for it is private.

    Raises:
        UsageError: no such cache or repository, no right to write there, or it holds something
            else.
        IncompleteError: the hub has not answered for too long, or the token has expired: what was
            committed stays.
        CorruptCacheError: a file is not that of the manifest.
    """
    cache = Cache.open(options.cache)
    hub = _Hub(options.to)
    card = data_card(cache, redact(options.to), options.measured)
    there = hub.files()
    files = list(_files(cache))
    names = {file.name for file in files}
    _check_place(hub.url, there.keys() - {CARD_FILE, ".gitattributes"}, names)
    missing = [file for file in files if not _is_there(file, there)]
    if wrong := [f.name for f in missing if f.name in _LAST and f.name in there]:
        raise _another(hub.url, wrong[0])
    first = [file for file in missing if file.name not in _LAST]
    last = [file for file in missing if file.name in _LAST]
    sent = total = 0
    for batch in _batches(first, {f"shards/{s.name}": s.bytes for s in cache.manifest.shards}):
        total += hub.commit(batch, {}, f"{counted(len(batch), 'file')} of a kdcache cache")
        sent += len(batch)
        report(f"{hub.url}: {sent:,} of {counted(len(missing), 'file')}, {size(total)}")
    if last:
        texts = {} if CARD_FILE in there else {CARD_FILE: card.encode()}
        total += hub.commit(last, texts, f"kdcache cache {cache.digest}")
    return ShareResult(hub.url, cache.digest, len(missing), total, len(files) - len(missing))


def pull(options: PullOptions, report: Callable[[str], None] = lambda line: None) -> ShareResult:
    """Copy a cache, whole or not at all.

    Raises:
        UsageError: no such cache, or the folder holds something else.
        IncompleteError: the cache is not finished, or its store does not answer.
        CorruptCacheError: a file is not that of the manifest.
    """
    try_output(options.to, "CACHE")
    cache, target = Cache.open(options.cache), open_storage(options.to)
    files = list(_files(cache))
    _check_place(target.url, _tree(target), {file.name for file in files})
    missing = [file for file in files if not _is_here(file, target)]
    if wrong := [f.name for f in missing if f.name in _LAST and target.exists(f.name)]:
        raise _another(target.url, wrong[0])
    sizes = {f"shards/{s.name}": s.bytes for s in cache.manifest.shards}
    cache.storage.prefetch([(f.name, sizes[f.name]) for f in missing if f.name in sizes])
    total = 0
    for i, file in enumerate(missing, 1):
        with file.hold() as path:
            data = path.read_bytes()
        _check(file, hashlib.sha256(data).hexdigest())
        target.write(file.name, data)
        total += len(data)
        report(f"{target.url}: {i:,} of {counted(len(missing), 'file')}, {size(total)}")
    return ShareResult(target.url, cache.digest, len(missing), total, len(files) - len(missing))


def _files(cache: Cache) -> Iterator[_File]:
    """All files of a cache, the manifest last."""
    for entry in cache.manifest.shards:
        yield _File(f"shards/{entry.name}", entry.sha256, partial(cache.hold, entry))
    for name, sha256 in cache.files.items():
        yield _File(name, sha256, partial(cache.storage.hold, name))
    for name in _LAST:
        data = cache.storage.read(name, 1 << 30)
        yield _File(name, hashlib.sha256(data).hexdigest(), partial(cache.storage.hold, name))


def _check(file: _File, found: str) -> None:
    if found != file.sha256:
        raise CorruptCacheError(
            f"{file.name}: sha256 is {found[:16]}…, expected {file.sha256[:16]}…. Restore it from "
            "a copy, or `kdcache repair` the cache and run its build again."
        )


def _check_place(url: str, there: Iterable[str], own: set[str]) -> None:
    if others := sorted(set(there) - own):
        raise UsageError(
            f"{redact(url)} holds other files than this cache's (first: {others[0]}). Choose "
            "another place."
        )


def _another(url: str, name: str) -> UsageError:
    return UsageError(
        f"{redact(url)} holds another cache: its {name} is not this one's. Choose another place."
    )


def _tree(storage: Storage) -> list[str]:
    """Names of the files of a folder and of its folders."""
    found = []
    for name in storage.entries():
        if name not in ("tmp", "lookup", CARD_FILE, ".gitattributes"):
            inside = storage.names(name) if not storage.exists(name) else []
            found += [f"{name}/{one}" for one in inside] if inside else [name]
    return [name for name in found if name not in ("shards", "tokenizer")]  # empty ones


def _is_here(file: _File, target: Storage) -> bool:
    if not target.exists(file.name):
        return False
    with target.hold(file.name, fresh=True) as path:
        return sha256_file(path) == file.sha256


def _is_there(file: _File, there: Mapping[str, Any]) -> bool:
    """Whether the hub has the file: large ones by their SHA-256, small ones by git's hash."""
    if file.name not in there:
        return False
    found = there[file.name]
    if found.lfs is not None:
        return bool(found.lfs.sha256 == file.sha256)
    with file.hold() as path:
        data = path.read_bytes() if path.stat().st_size == found.size else b""
    text = b"blob %d\0" % len(data) + data
    return bool(hashlib.sha1(text, usedforsecurity=False).hexdigest() == found.blob_id)


def _batches(files: list[_File], sizes: Mapping[str, int]) -> Iterator[list[_File]]:
    """Files of a commit each; a file of no known size is small."""
    batch: list[_File] = []
    total = 0
    for file in files:
        batch.append(file)
        total += sizes.get(file.name, 0)
        if len(batch) == _FILES or total >= _BYTES:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


class _Hub:
    """A dataset repository of the hub, through `huggingface_hub`, with this package's patience."""

    def __init__(self, url: str) -> None:
        found = _REPOSITORY.fullmatch(url)
        if found is None:
            raise UsageError(
                f"{redact(url)} is not hf://datasets/OWNER/NAME, a repository for the cache alone. "
                "Other stores take a copy by their own tools, the manifest last."
            )
        from huggingface_hub import HfApi, utils

        client: Any = utils
        client.logging.set_verbosity_error()  # its warnings about retries have signed addresses
        client.disable_progress_bars()
        self.url, self._store, self._api = redact(url), FileSystem(url), HfApi()
        self._where: dict[str, Any] = {"repo_id": found[1], "repo_type": "dataset"}

    def files(self) -> dict[str, Any]:
        """What is there, by name, as the hub describes it; makes the repository first."""

        def request() -> dict[str, Any]:
            self._api.create_repo(**self._where, private=True, exist_ok=True)
            listed = self._api.list_repo_tree(**self._where, recursive=True)
            return {one.path: one for one in listed if hasattr(one, "blob_id")}

        return self._store.patiently(request)

    def commit(self, files: Iterable[_File], texts: Mapping[str, bytes], message: str) -> int:
        """Add files in one commit; returns their bytes.

        Raises:
            CorruptCacheError: one is not that of the manifest.
        """
        from huggingface_hub import CommitOperationAdd

        with contextlib.ExitStack() as held:
            paths = {file.name: held.enter_context(file.hold()) for file in files}
            for file in files:
                _check(file, sha256_file(paths[file.name]))
            sources: dict[str, Any] = {**{n: str(p) for n, p in paths.items()}, **texts}

            def request() -> None:
                added = [
                    CommitOperationAdd(path_in_repo=name, path_or_fileobj=source)
                    for name, source in sources.items()
                ]
                self._api.create_commit(**self._where, operations=added, commit_message=message)

            self._store.patiently(request)
            return sum(os.path.getsize(path) for path in paths.values())


# The card: `README.md` of a repository, written from the cache

CARD_FILE = "README.md"
_NAMED = 20  # files of the corpus
_LICENCE = (
    "To be filled in, here and as `license:` in the head of this file. The cache holds the texts "
    "of its corpus and answers of its teacher: the licences of both bind it."
)


def data_card(cache: Cache, url: str, measured: Sequence[str]) -> str:
    """What a cache holds, how good it is as measured, and how to train on it.

    Args:
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
    corpus = [(str(file["name"]), size(int(file.get("size", 0)))) for file in spec.corpus[:_NAMED]]
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
