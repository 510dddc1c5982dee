"""Files that appear whole or not at all, and folders in which one process works at a time.

A file is written under a temporary name in the same folder, flushed to the disk and renamed; a
folder likewise. A folder that must be filled in place (a checkpoint, by several processes) has a
*seal* that marks it as whole: a JSON file with the name, size and CRC-32 of every other file,
written last and removed first.

Guarantee: whatever is killed, a reader finds the old content, the new content or nothing, and a
sealed folder that lacks a byte does not count. A full disk is an `IncompleteError`. Cost: one
fsync a file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import json
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Set
from pathlib import Path
from typing import Any, BinaryIO

from kdcache.errors import IncompleteError, KdcacheError, UsageError, no_space
from kdcache.humanize import redacted

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# ENOENT is of a folder in which nothing can be made, such as /proc.
_NO_PLACE = {
    *(errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST, errno.EISDIR),
    *(errno.ENOENT, errno.EROFS),
}
_SCRATCH = re.compile(r"\.[0-9a-f]{32}\.tmp")  # of `whole_file`
# An empty part, `.` or `..`; so an absolute name too. Or what no name of ours holds.
_OUTSIDE = re.compile(r"(?:^|/)\.{0,2}(?:/|$)|[\x00-\x1f\x7f]")


class OutsideError(KdcacheError, ValueError):
    """A name that came with a file means nothing below the folder that it is for."""


def inner(name: object) -> str:
    """A name from a file or a store, for something below a folder; the folder may be a prefix.

    Every such name goes through this function before it is joined: what was written elsewhere must
    not choose a place on this machine.

    Raises:
        OutsideError: it is absolute, has a part that is empty, `.` or `..`, or is not a name.
    """
    if not isinstance(name, str) or _OUTSIDE.search(name):
        raise OutsideError(
            f"the name {name!r} leads outside of its folder or means none. It came with the files: "
            "restore them from a copy, and use them only if you trust who made them."
        )
    return name


@contextlib.contextmanager
def output_errors(place: str | Path, kept: str = "what is committed stays valid") -> Iterator[None]:
    """Errors of writing to a place, as errors with a cure.

    Args:
        kept: what a full disk does not lose.

    Raises:
        UsageError: the place cannot be written to.
        IncompleteError: no space left.
    """
    try:
        yield
    except Exception as error:
        if no_space(error):
            raise IncompleteError(
                f"no space left on {place}: {kept}. Free some space and run the same command again."
            ) from error
        if not isinstance(error, OSError):
            raise
        if not (isinstance(error, PermissionError) or error.errno in _NO_PLACE):
            raise
        raise UsageError(
            f"cannot write to {place}: {error.strerror}. Make it writable, or choose another place."
        ) from error


@contextlib.contextmanager
def full_disk(place: Path, go_on: Callable[[], str]) -> Iterator[None]:
    """A disk that fills up meanwhile ends the work in order.

    Args:
        place: where the work writes, for the message where the error names no file.
        go_on: what to tell about going on.

    Raises:
        IncompleteError: no space left.
    """
    try:
        yield
    except KdcacheError:
        raise
    except Exception as error:
        if not no_space(error):
            raise
        where = getattr(error, "filename", None) or place
        raise IncompleteError(f"no space left on {where}. Free some. {go_on()}") from error


def local_path(name: str, option: str = "--out") -> Path:
    """The absolute path of an output on this machine.

    Raises:
        UsageError: it is a URL, which would become a folder named `s3:`.
    """
    path = _here(name)
    if path is None:
        raise UsageError(
            f"{option} is {name}, expected a folder or file on this machine: only caches and "
            "trainings can be written to an object store."
        )
    return path


def _here(name: str) -> Path | None:
    """The absolute path of a name on this machine; None of a URL of another place."""
    name = name.removeprefix("file://")
    # Of Path, expanduser fails for a user that does not exist.
    return None if "://" in name else Path(os.path.expanduser(name)).absolute()


def output_problem(name: str, option: str) -> str:
    """Why nothing can be made under a name, as far as looking tells: a sentence, or nothing."""
    path = _here(name)
    if path is None:
        return ""
    path = Path(os.path.abspath(path))
    there = next(parent for parent in path.parents if os.path.lexists(parent))
    if not os.path.isdir(there):
        return f"{option} is {name}, but {there} is not a folder. Choose another place."
    return ""


def file_problems(name: str | None, option: str) -> list[str]:
    """What is wrong with the name of a file to write into a folder that is there."""
    if name is None or output_problem(name, option):  # which the option's own check reports
        return []
    try:
        path = local_path(name, option)
    except UsageError as error:
        return [str(error)]
    if path.is_dir():
        return [f"{option} is {name}, a folder. Name a file."]
    if not path.parent.is_dir():
        return [f"{option}: there is no folder {path.parent}."]
    return []


def try_output(name: str, option: str = "--out") -> None:
    """Make sure that an output can be written, before the work that it is for; leaves nothing.

    Args:
        name: of a file, or of a folder, which is only tried where it is not there yet; of a URL
            nothing is tried.

    Raises:
        UsageError: nothing can be made there.
    """
    path = _here(name)
    if path is None or path.is_dir():
        return
    with output_errors(f"{name} ({option})"):
        there = next(parent for parent in path.parents if parent.is_dir())
        scratch = there / f".{uuid.uuid4().hex}.tmp"
        scratch.mkdir()
        scratch.rmdir()


# Files


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which appears under its name at the end of the `with` block.

    An error leaves what was there before.
    """
    scratch = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(scratch, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write or replace a text file (UTF-8), whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, document: Any) -> None:
    """Write or replace a JSON file, whole or not at all, without secrets."""
    write_text(path, json.dumps(redacted(document), indent=1) + "\n")


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: as `parse_yaml`.
    """
    return parse_yaml(Path(path).read_bytes())


def parse_yaml(data: bytes) -> Any:
    """What a YAML document holds.

    Raises:
        ValueError: it is none; the text is one line: what is wrong, and where.
    """
    import yaml  # which few need

    class Once(yaml.SafeLoader):
        """Refuses a key that is given twice, of which the last would count."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value]
            for key, _ in node.value:
                if names.count(key.value) > 1:
                    raise yaml.MarkedYAMLError(
                        None, None, f"{key.value} is given twice", key.start_mark
                    )
            return super().construct_mapping(node, deep)

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            # YAML 1.1 reads 4:16 as minutes and seconds, 256. Here it is a range or a schedule.
            if node.tag.endswith((":int", ":float")) and ":" in node.value:
                return node.value
            return super().construct_object(node, deep)

    try:
        return Once(data.decode()).get_single_data()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{error.problem or error.context}{where}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # dates are parsed too
        raise ValueError(" ".join(str(error).split())) from error


# Folders


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name, and the place of an older one, at the end.

    One process at a time: see `alone`.
    """
    scratch = path.with_name(path.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        sync_tree(scratch)
        shutil.rmtree(path, ignore_errors=True)
        scratch.replace(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sync_folder(path.parent)


@contextlib.contextmanager
def filled_folder(path: Path, name: str, last: str) -> Iterator[Path]:
    """A scratch folder to fill, whose files move up into `path` at the end.

    They move one by one, so one of them is the last and shows that all are there. The scratch
    folder stays until then, also where this process is killed.

    Args:
        name: of the scratch folder in it.
        last: name of the file that moves last.
    """
    scratch = path / name
    scratch.mkdir(parents=True, exist_ok=True)
    clear(scratch)
    yield scratch
    sync_tree(scratch)
    for part in sorted(scratch.iterdir(), key=lambda part: (part.name == last, part.name)):
        shutil.rmtree(path / part.name, ignore_errors=True)  # a folder of an earlier attempt
        part.replace(path / part.name)
    sync_folder(path)
    scratch.rmdir()


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush all files below a folder to the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            with open(Path(place, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))


def refuse_links(folder: Path) -> None:
    """Refuse to write into a folder that holds links: one made elsewhere may point anywhere.

    Raises:
        UsageError: names the first link. That the folder itself is one is the user's own choice.
    """
    for place, folders, names in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *names)):
            if path.is_symlink():
                raise UsageError(
                    f"{path} is a link, and what is written there would end up elsewhere. Replace "
                    "it by what it points to, or choose another --out."
                )


@contextlib.contextmanager
def alone(folder: Path, work: str) -> Iterator[None]:
    """Make a folder if need be, and keep a second process out of it.

    The lock is the kernel's and ends with this process, however that ends.

    Args:
        work: what it does there, for the message to the second one.

    Raises:
        UsageError: another process is at work there, the folder cannot be written to, or it holds
            links.
    """
    refuse_links(folder)
    path = folder / LOCK_FILE
    with contextlib.ExitStack() as held:
        while True:
            with output_errors(f"{folder} (--out)"):
                file = held.enter_context(_lock_file(path))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(
                    f"another {work} is running in {folder}. Wait for it, or choose another --out."
                ) from error
            except OSError as error:  # some network file systems have no locks
                logger.warning(
                    "%s cannot be locked (%s): run no other %s there", folder, error, work
                )
                break
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    for left in filter(_SCRATCH.fullmatch, os.listdir(folder)):
                        (folder / left).unlink(missing_ok=True)  # of a process that was killed
                    break
            file.close()  # whoever held it has removed the folder: look again
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                if os.listdir(folder) == [LOCK_FILE]:  # nothing was begun
                    path.unlink()
                    with contextlib.suppress(OSError):  # another process has begun since
                        folder.rmdir()


def clear(folder: Path) -> None:
    """Empty a folder in which this process is alone; `alone` removes the lock and the folder."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()


def listed(folder: Path) -> set[str]:
    """Names in a folder at one moment; none where there is no such folder.

    Another process may begin or end its work there: two looks, one after the other, may contradict
    each other.

    Raises:
        NotADirectoryError: it is a file.
    """
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()


def found_at(path: Path) -> set[str]:
    """What a command that makes a folder finds in its place: names as `listed`, or a file's own."""
    try:
        return listed(path)
    except NotADirectoryError:
        return {path.name}


def strange(names: Set[str], ours: Iterable[str] = ()) -> set[str]:
    """The names in a folder that are of no work of kdcache there.

    Args:
        ours: patterns of what that work writes, besides its lock and files under temporary names.
    """
    known = (fnmatch.filter(names, pattern) for pattern in (LOCK_FILE, ".*.tmp", *ours))
    return set(names).difference(*known)


def _lock_file(path: Path) -> BinaryIO:
    """The lock of a folder that other processes may make and remove at the same time."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # a folder that is gone again
                if not stat.S_ISDIR(path.parent.lstat().st_mode):
                    raise
        with contextlib.suppress(FileNotFoundError):  # the folder is gone again
            return open(path, "ab")
