"""A corpus that is an object: a dataset of the `datasets` library, written to files.

Workers on other machines read files, and a cache names what it was built of. So the rows of a
`Dataset` or an `IterableDataset` are written to Parquet next to the cache, as they are after any
selection, shuffle, mapping or renaming of columns.

Cost: one pass over the dataset in each run. Guarantee: the same rows leave the files of an earlier
run as they are, times of change included, so that a build resumes; files appear whole. Parts of a
build that begin at once write them one after the other.
"""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from kdcache.domains import Named
from kdcache.errors import UsageError
from kdcache.files import output_errors

_BATCH_ROWS = 1000
_FILE_BYTES = 1 << 29  # of Arrow; several files are read by several workers


def stored(corpus: Sequence[Any], out: str) -> tuple[str | Named, ...]:
    """Patterns of a corpus, datasets among them written to `OUT.corpus`.

    Raises:
        UsageError: It is neither, several splits, or the cache is not on this machine.
    """
    patterns: list[str | Named] = []
    for number, given in enumerate(corpus):
        one = given.value if isinstance(given, Named) else given
        if isinstance(one, str):
            patterns.append(given)
            continue
        _check(one)
        if "://" in out:
            raise UsageError(
                f"--out is {out}: rows of a dataset are written beside it, and this place is not "
                "on this machine. Save the dataset to files (dataset.to_parquet) and name them."
            )
        folder = Path(f"{out.rstrip('/')}.corpus").expanduser().absolute() / str(number)
        with output_errors(folder), _turn(folder.parent):
            _write(one, folder)
        there = str(folder)
        patterns.append(Named(given.name, there) if isinstance(given, Named) else there)
    return tuple(patterns)


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Make a folder, and let one process at a time write there: the next finds the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _check(one: Any) -> None:
    names = getattr(one, "column_names", None)
    if isinstance(names, dict):  # of a DatasetDict
        raise UsageError(
            f"the corpus is a dictionary of datasets: {', '.join(map(str, names))}. Choose one, "
            f"such as corpus=dataset[{next(iter(names), 'train')!r}]."
        )
    if not (hasattr(one, "with_format") and hasattr(one, "iter")):
        raise UsageError(
            f"the corpus is a {type(one).__name__}; expected names of files, or a dataset of the "
            "library `datasets`."
        )


def _write(dataset: Any, folder: Path) -> None:
    """Write a dataset; a folder with the same files stays."""
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        _write_files(dataset, scratch)
        if not _same(scratch, folder):
            shutil.rmtree(folder, ignore_errors=True)
            scratch.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_files(dataset: Any, folder: Path) -> None:
    files, left = 0, 0
    with contextlib.ExitStack() as last:
        for table in dataset.with_format("arrow").iter(batch_size=_BATCH_ROWS):
            if left <= 0:
                last.close()
                path = folder / f"{files:05d}.parquet"
                writer = last.enter_context(pq.ParquetWriter(path, table.schema))
                files, left = files + 1, _FILE_BYTES
            writer.write_table(table)
            left -= table.nbytes


def _same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files."""
    names = sorted(path.name for path in one.iterdir())
    if not other.is_dir() or names != sorted(path.name for path in other.iterdir()):
        return False
    _, different, failed = filecmp.cmpfiles(one, other, names, shallow=False)
    return not (different or failed)
