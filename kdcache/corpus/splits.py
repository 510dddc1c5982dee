"""Splits: which files of a dataset are its training, validation and test part, by their names.

A folder in the layout of the Hugging Face hub (`data/train-00000-of-00002.parquet`, `test.jsonl`,
`validation/0.json`) and a saved `DatasetDict` hold several splits, which should not be mixed in one
corpus by accident.

A file's split is its folder in a saved `DatasetDict`. Otherwise it is the word for a split that is
the name of one of its folders, or the first or last word of its own name without numbers. Among
such files, one named `NAME-00000-of-00001` is of split NAME.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from kdcache.errors import UsageError
from kdcache.humanize import counted
from kdcache.storage import redact

ALL = "all"
DICTIONARY = "dataset_dict.json"  # what `DatasetDict.save_to_disk` leaves beside its splits

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
        pattern: What the user named, for messages.
        names: Files below it, relative.
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
