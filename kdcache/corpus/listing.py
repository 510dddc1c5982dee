"""Lists the files that a corpus's patterns name, and separates the splits of a dataset.

A folder in the layout of the Hugging Face hub (`data/train-00000-of-00002.parquet`, `test.jsonl`,
`validation/0.json`) and a saved `DatasetDict` hold several splits, which should not be mixed in one
corpus by accident. A file's split is its folder in a saved `DatasetDict`. Otherwise it is the word
for a split that is the name of one of its folders, or the first or last word of its own name
without numbers. Among such files, one named `NAME-00000-of-00001` is of split NAME.

Cost: one listing per pattern.
Guarantee: every file is a regular one with a printable name. What can't be read as data (a pipe, a
broken or circular link, a folder that can't be listed) is refused by name, not skipped; the files
of a kdcache cache in a folder are not input, those with the text of a generated corpus are.

A corpus may have a name: a text is `NAME=PATH` if what is before its first `=` could be the name of
a domain, and the whole text is not a file, folder or matching glob. So what has a slash or a colon
before its first `=` (`data/lang=en/x.jsonl`, `s3://bucket/x.parquet?part=1`) is a path, `lang=en`
is one where such a folder exists, and `./lang=en` always is. Cost: a look at the file system for
each text with a name before `=`; a store is not asked.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from glob import glob, has_magic, iglob
from typing import Any, NoReturn

from kdcache.corpus.files import (
    FORMATS,
    KINDS,
    InputFile,
    is_remote,
    kind_of,
    local_version,
    refuse,
    remote_version,
    version_of,
)
from kdcache.domains import NAME_RULE, Named, is_name
from kdcache.errors import UsageError
from kdcache.humanize import counted
from kdcache.storage import redact

ALL = "all"
DICTIONARY = "dataset_dict.json"  # what `DatasetDict.save_to_disk` leaves next to its splits

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLITS = {word: split for split, words in _WORDS.items() for word in words}
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")


def choose(
    pattern: str, names: Sequence[str], split: str | None, saved: Iterable[str] = ()
) -> list[str] | None:
    """The files of one split.

    Args:
        split: Which; None refuses more than one, `all` takes every file.
        saved: Folders of saved `DatasetDict`s, relative; each folder in one is a split.

    Returns:
        Their names in order; None if `split` names one and no file is named after any.

    Raises:
        UsageError: Several splits and none was chosen, or there is none of that name.
    """
    if split == ALL:
        return list(names)
    splits = _splits(names, [f"{folder}/" if folder else "" for folder in saved])
    counts = Counter(found for found in splits if found)
    shown = ", ".join(f"{found} ({counted(count, 'file')})" for found, count in counts.items())
    if split is None:
        if len(counts) > 1:
            raise UsageError(
                f"--corpus {redact(pattern)} holds several splits: {shown}. Choose one with "
                f"--split {next(iter(counts))}, or take every file with --split {ALL}."
            )
        return list(names)
    if not counts:
        return None
    wanted = _SPLITS.get(split, split)
    if wanted not in counts:
        raise UsageError(
            f"--corpus {redact(pattern)} has no split {split!r}; its splits are {shown}. Correct "
            f"--split."
        )
    return [name for name, found in zip(names, splits, strict=True) if found == wanted]


def _splits(names: Sequence[str], saved: Sequence[str]) -> list[str]:
    found = []
    for name in names:
        home = next((folder for folder in saved if name.startswith(folder)), None)
        inside = None if home is None else name.removeprefix(home).split("/")
        found.append(inside[0] if inside and len(inside) > 1 else _by_words(name))
    if any(found):
        stems = [_SHARD.fullmatch(_stem(name)) for name in names]
        pairs = zip(found, stems, strict=True)
        found = [own or (shard.group(1) if shard else "") for own, shard in pairs]
    return found


def _by_words(name: str) -> str:
    words = [word for word in re.split(r"[-._ ]+", _stem(name)) if not word.isdigit()]
    words = [word for word in words if word not in ("", "of")]
    for word in (*name.lower().split("/")[:-1], *words[:1], *words[-1:]):
        if word in _SPLITS:
            return _SPLITS[word]
    return ""


def _stem(name: str) -> str:
    """A file's own name without `.json`, `.json.gz` and the like."""
    return re.sub(r"(\.[a-z]+){1,2}$", "", name.lower().rsplit("/", 1)[-1])


# Written next to the data by well-known tools; JSON, but not records.
_SIDE_FILES = frozenset(
    {"dataset_info.json", "dataset_infos.json", "state.json", "config.json", DICTIONARY}
)
_COMPUTED = re.compile(
    r"(cache-[0-9a-f]+|tmp\w+)\.arrow"
)  # by `datasets`, from the data next to it
_CACHE_FILES = ("shards", "manifest.json", "tokenizer")  # next to the spec.json of a kdcache cache
_WRITTEN = re.compile(r"(.*/)?shards/\d{5,}-[0-9a-f]{16}[.]parquet")  # of a generated corpus
_LISTING = 256 << 20  # what a listing may weigh at most: a million names

# Size and version of a file, by its URL.
Found = dict[str, tuple[int, str]]


def expand(
    patterns: Sequence[str | Named], forced: str = "auto", split: str | None = None
) -> list[InputFile]:
    """All files that the patterns name: in the patterns' order, sorted inside each, each once.

    Args:
        patterns: Paths, globs (`**` too), folders (read recursively; hidden files and files of
            other kinds are left out) and fsspec URLs of these; with names where corpora have them.
        split: Which split of folders and globs that hold several; `all` for every file.

    Returns:
        The files, empty ones included.

    Raises:
        UsageError: Nothing found, a file of unknown kind, something else, several splits, or a
            scheme that can't be opened.
    """
    if forced not in FORMATS:
        raise UsageError(f"format is {forced!r}; it must be one of {', '.join(FORMATS)}.")
    if not patterns:
        raise UsageError("no corpus was given. Name files, folders or globs with --corpus.")
    files: dict[str, InputFile] = {}
    named = split in (None, ALL)
    for one in patterns:
        domain, pattern = one if isinstance(one, Named) else (None, one)
        if not isinstance(pattern, str):
            raise UsageError(
                f"the corpus is a {type(pattern).__name__}, expected names of files. `build` alone "
                "takes a dataset; elsewhere save it (dataset.to_parquet) and name the file."
            )
        pattern = _index_named(pattern)
        found, has_splits = (_remote if is_remote(pattern) else _local)(pattern, forced, split)
        named |= has_splits
        if not found:
            # The hub does not distinguish private from missing.
            cure = " A private or gated dataset needs HF_TOKEN." if "hf://" in pattern else ""
            if domain is not None:
                cure += f" {domain!r} was read as the corpus's name; a path may begin with './'."
            raise UsageError(
                f"--corpus {redact(pattern)}: no file found. Expected {', '.join(KINDS)} "
                f"(line formats also as .gz or .zst); name other files' kind with --format.{cure}"
            )
        for url, (size, version) in found.items():
            kind = kind_of(redact(url), forced)  # a signed address ends in its signature
            if kind is None:
                raise UsageError(
                    f"{url}: the format cannot be told from the name. Expected {', '.join(KINDS)} "
                    "(line "
                    f"formats also as .gz or .zst); or name it: --format {'|'.join(FORMATS[1:])}."
                )
            file = InputFile(url, size, *kind, version, domain=domain)
            file = _indexed(file) if kind[0] == "bin" else file
            other = files.setdefault(file.url, file).domain
            if other != domain:
                raise UsageError(
                    f"{redact(file.url)} is in the corpus {other} and in {domain}: its rows would "
                    "count twice. Leave it in one of them."
                )
    if not named:
        raise UsageError(
            f"--split is {split!r}, but no file of the corpus says by its name or folder which "
            "split it belongs to. Leave --split out."
        )
    return list(files.values())


def _index_named(pattern: str) -> str:
    """The index where a pattern names the ids next to it, or both without their extension."""
    index = f"{pattern.removesuffix('.bin')}.idx"
    if pattern.endswith(".bin") or not os.path.lexists(pattern):
        return index if os.path.isfile(index) else pattern
    return pattern


def _indexed(index: InputFile) -> InputFile:
    """The `.bin` of an `.idx`."""
    url = re.sub("[.]idx$", ".bin", index.url)
    try:
        if not is_remote(url) and not os.path.lexists(url):
            raise FileNotFoundError
        size, version = version_of(url)
    except FileNotFoundError:
        raise UsageError(
            f"{redact(index.url)}: the ids of this index are not beside it: "
            f"{os.path.basename(redact(url))} is missing. Fetch both."
        ) from None
    return InputFile(url, size, "bin", version=version, beside=(index,), domain=index.domain)


def _is_data(name: str, forced: str) -> bool:
    name = os.path.basename(name)
    return not (name in _SIDE_FILES or _COMPUTED.fullmatch(name)) and bool(kind_of(name, forced))


def _data(names: Sequence[str], forced: str) -> tuple[list[str], list[str]]:
    """Of a folder's files (relative names) those that are data, and saved `DatasetDict`s in it."""
    specs = [name for name in names if os.path.basename(name) == "spec.json"]
    caches = tuple(
        spec.removesuffix("spec.json")
        for spec in specs
        if any(name.startswith(_beside(spec)) for name in names)
    )
    data = [
        name
        for name in sorted(names)
        if not any(part.startswith((".", "_")) for part in name.split("/"))
        and not (caches and name.startswith(caches) and not _WRITTEN.fullmatch(name))
        and _is_data(name, forced)
    ]
    return data, [os.path.dirname(name) for name in names if os.path.basename(name) == DICTIONARY]


def _beside(spec: str) -> tuple[str, ...]:
    return tuple(spec.removesuffix("spec.json") + name for name in _CACHE_FILES)


def _chosen(
    pattern: str, found: Found, base: str, saved: Iterable[str], split: str | None
) -> tuple[Found, bool]:
    """The files of a split, and whether names tell splits at all."""
    names = {url.removeprefix(base).lstrip("/"): url for url in found}
    homes = [home.removeprefix(base).lstrip("/") for home in saved]
    chosen = choose(pattern, list(names), split, homes)
    if chosen is None:
        return found, False
    return {names[name]: found[names[name]] for name in chosen}, True


# -- local ---------------------------------------------------------------------------------


def _local(pattern: str, forced: str, split: str | None) -> tuple[Found, bool]:
    path = pattern
    for scheme in ("file://", "local://"):
        path = path.removeprefix(scheme)
    path = os.path.abspath(os.path.expanduser(path))
    # A file whose own name has brackets is that file, not a pattern.
    globbing = has_magic(path) and not os.path.lexists(path)
    if not globbing and not os.path.isdir(path):
        return ({path: local_version(path)} if os.path.lexists(path) else {}), False
    matches = _glob(path, forced) if globbing else [(path, True)]
    urls: list[str] = []
    saved: list[str] = []
    for match, is_folder in matches:
        if is_folder:
            data, homes = _data(list(_walk(match)), forced)
            urls += [os.path.join(match, name) for name in data]
            saved += [os.path.join(match, home) for home in homes]
        else:
            urls.append(match)
    base = _static(path) if globbing else path
    return _chosen(pattern, {url: local_version(url) for url in urls}, base, saved, split)


def _static(pattern: str) -> str:
    """The folder of a pattern up to its first wildcard."""
    return re.split(r"[^/]*[*?[]", pattern, maxsplit=1)[0].rstrip("/")


def _glob(pattern: str, forced: str) -> list[tuple[str, bool]]:
    """What a pattern matches: files that are data, and folders unless `**` lists their files too.

    Each with whether it is a folder.

    A file that is named is taken, or refused aloud; what a glob meets may be passed by.
    """
    top, in_cache, looked_at = _static(pattern), cache(_in_cache), cache(_refuse_loop)
    found = []
    for match in sorted(glob(pattern, recursive=True)):
        for slash in re.finditer("/", match[len(top) + 1 :]):
            looked_at(match[: len(top) + 1 + slash.start()], top)
        if os.path.isdir(match):
            # `**` lists each folder next to its files; walking it again would only cost time.
            if "**" not in pattern:
                found.append((match, True))
        elif _is_data(match, forced) and (
            _WRITTEN.fullmatch(match) or not in_cache(os.path.dirname(match))
        ):
            found.append((match, False))
    return found


def _walk(top: str) -> Iterator[str]:
    """Names of all files below a folder, linked folders included, relative to it."""

    def failed(error: OSError) -> NoReturn:
        refuse(str(error.filename), error)

    for folder, _, names in os.walk(top, followlinks=True, onerror=failed):
        _refuse_loop(folder, top)
        inside = os.path.relpath(folder, top).replace(os.sep, "/")
        yield from (name if inside == "." else f"{inside}/{name}" for name in names)


def _refuse_loop(folder: str, top: str) -> None:
    """Raise if a linked folder holds a folder that it is reached through."""
    if folder == top or not os.path.islink(folder):
        return
    real, above = os.path.join(os.path.realpath(folder), ""), folder
    while above not in (top, os.path.dirname(above)):
        above = os.path.dirname(above)
        if os.path.join(os.path.realpath(above), "").startswith(real):
            raise UsageError(
                f"{folder}: a link to {os.readlink(folder)}, a folder that holds it. Remove it, or "
                f"name the files without it."
            )


def _in_cache(folder: str) -> bool:
    """Whether the files of a folder belong to a kdcache cache."""
    specs = [os.path.join(place, "spec.json") for place in (folder, os.path.dirname(folder))]
    return any(os.path.isfile(spec) and any(map(os.path.exists, _beside(spec))) for spec in specs)


# -- remote --------------------------------------------------------------------------------


def _remote(pattern: str, forced: str, split: str | None) -> tuple[Found, bool]:
    from kdcache.storage.filesystem import FileSystem

    store = FileSystem(pattern)
    path = store.path
    # In a web address `?` starts a query; servers list nothing anyway.
    globbing = has_magic(path) and not pattern.startswith(("http://", "https://"))
    try:
        if globbing:
            top = store.ask("glob", path, detail=True, volume=_LISTING)
        else:
            top = {path: store.ask("info", path)}
    except FileNotFoundError:
        top = {}
    infos: dict[str, Any] = {}
    saved: list[str] = []
    for name, info in sorted(top.items()):
        if info["type"] != "directory":
            if not globbing or _is_data(name, forced):
                infos[name] = info
        elif "**" not in pattern:
            base = name.rstrip("/") + "/"
            listed = store.ask("find", name, detail=True, volume=_LISTING)
            inside = {key.removeprefix(base): value for key, value in listed.items()}
            data, homes = _data(list(inside), forced)
            infos |= {base + key: inside[key] for key in data}
            saved += [base + home for home in homes]
    unsized = next((name for name, info in infos.items() if info.get("size") is None), None)
    if unsized is not None:
        raise UsageError(f"{unsized}: the server does not report its size. Copy the file first.")
    found = {name: remote_version(info) for name, info in infos.items()}
    if list(found) == [path]:
        # A chain of file systems (simplecache::...) has no other name than the one it came by.
        url = pattern if "::" in pattern else store.fs.unstrip_protocol(path)
        return {url: found[path]}, False
    chosen, has_splits = _chosen(pattern, found, _static(path) if globbing else path, saved, split)
    return {store.fs.unstrip_protocol(name): value for name, value in chosen.items()}, has_splits


def named(corpora: Sequence[str | Named]) -> list[str | Named]:
    """Corpora with their names.

    Args:
        corpora: Paths, `NAME=PATH`, or pairs of both.

    Returns:
        Pairs where they have names, otherwise their paths as they are.

    Raises:
        UsageError: A name that cannot be, one without a path, or some with names and some without.
    """
    found = [one if isinstance(one, Named) else _split(one) for one in corpora]
    bare = [one for one in found if not isinstance(one, Named)]
    pairs = [one for one in found if isinstance(one, Named)]
    for pair in pairs:
        if not is_name(pair.name):
            raise UsageError(f"--corpus: {pair.name!r} is not a name; expected {NAME_RULE}.")
    if bare and pairs:
        raise UsageError(
            f"--corpus {redact(str(pairs[0]))} has a name and --corpus {redact(str(bare[0]))} has "
            "none. Name every corpus, as in NAME=PATH, or none."
        )
    return found


def _split(text: str) -> str | Named:
    name, equals, path = text.partition("=") if isinstance(text, str) else ("", "", "")
    if not equals or not is_name(name) or _is_there(text):
        return text
    if not path:
        raise UsageError(f"--corpus {text}: no path follows the name. Expected NAME=PATH.")
    return Named(name, path)


def _is_there(text: str) -> bool:
    """Whether a file, a folder, an index of ids or a match of a glob has this very name."""
    if os.path.lexists(text) or os.path.isfile(f"{text}.idx"):
        return True
    return has_magic(text) and next(iglob(text, recursive=True), None) is not None
