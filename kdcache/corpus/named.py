"""Names of corpora: `NAME=PATH`, and paths that contain `=` themselves.

A text is `NAME=PATH` if what is before its first `=` could be the name of a domain, and the whole
text is no file, folder or glob with a match. So what has a slash or a colon before its first `=`
(`data/lang=en/x.jsonl`, `s3://bucket/x.parquet?part=1`) is a path, `lang=en` is one where such a
folder exists, and `./lang=en` always is. Cost: a look at the file system for each text with a name
before `=`; a store is not asked.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from glob import has_magic, iglob

from kdcache.domains import NAME_RULE, Named, is_name
from kdcache.errors import UsageError
from kdcache.storage import redact


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
