"""Input files: which ones a pattern names, their formats and sizes, and how to open them.

Local files are opened directly, URLs through fsspec. Cost: one listing per pattern and, for `tags`,
128 KiB read per file (many remote files at a time).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa

from kdcache.errors import UsageError
from kdcache.storage import redact
from kdcache.storage.filesystem import FileSystem, RemoteFile

if TYPE_CHECKING:
    pass

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
LINE_KINDS = frozenset({"jsonl", "txt", "tsv", "csv"})
FORMATS = ("auto", "jsonl", "txt", "csv", "tsv", "parquet", "arrow")
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}

# Written next to the data by well-known tools; JSON, but not records.
_SIDE_FILES = frozenset({"dataset_info.json", "dataset_infos.json", "state.json", "config.json"})
_TAG_BYTES = 64 << 10
_BUFFER = 1 << 20
_LISTING = 256 << 20  # what a listing may weigh at most: a million names
_DECOMPRESSED_AT_ONCE = 64 << 10
_TAGGED_AT_ONCE = 128


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of a corpus.

    Attributes:
        url: Absolute path or URL.
        size: Bytes, as stored.
        kind: One of the values of `KINDS`.
        compression: `""`, `"gz"` or `"zst"`.
    """

    url: str
    size: int
    kind: str
    compression: str


def is_remote(path: str) -> bool:
    """Whether `path` names something that only fsspec can open."""
    return "://" in path and not path.startswith(("file://", "local://"))


def _local(path: str) -> str:
    for scheme in ("file://", "local://"):
        path = path.removeprefix(scheme)
    return os.path.abspath(os.path.expanduser(path))


def kind_of(name: str, forced: str = "auto") -> tuple[str, str] | None:
    """Kind and compression of a file by its name.

    Args:
        name: Path or URL.
        forced: The kind of all files (one of `FORMATS`); `auto` goes by the extension.

    Returns:
        For example `("jsonl", "gz")`; None if the extension says nothing.
    """
    stem, extension = os.path.splitext(name.lower().rstrip("/"))
    compression = COMPRESSIONS.get(extension, "")
    if compression:
        extension = os.path.splitext(stem)[1]
    kind = forced if forced != "auto" else KINDS.get(extension)
    if kind is None or (compression and kind not in LINE_KINDS):
        return None
    return kind, compression


def _in_folder(names: Iterable[str], forced: str) -> Iterator[str]:
    """Of a folder's files (relative names) those that are data, sorted."""
    for name in sorted(names):
        parts = name.split("/")
        if not any(part.startswith((".", "_")) for part in parts) and _is_data(name, forced):
            yield name


def _is_data(name: str, forced: str) -> bool:
    return os.path.basename(name) not in _SIDE_FILES and kind_of(name, forced) is not None


def _expand_local(pattern: str, forced: str) -> list[tuple[str, int]]:
    path = _local(pattern)
    # A file whose own name has brackets is that file, not a pattern.
    globbing = has_magic(path) and not os.path.exists(path)
    matches = glob(path, recursive=True) if globbing else [path]
    found = []
    for match in sorted(matches):
        if os.path.isdir(match):
            # `**` lists each folder next to its files; walking it again would only cost time.
            if "**" in pattern:
                continue
            inside = (
                os.path.relpath(os.path.join(folder, name), match).replace(os.sep, "/")
                for folder, _, names in os.walk(match)
                for name in names
            )
            found += [os.path.join(match, name) for name in _in_folder(inside, forced)]
        # A file that is named is taken, or refused aloud; what a glob meets may be passed by.
        elif os.path.exists(match) and (not globbing or _is_data(match, forced)):
            found.append(match)
    return [(name, os.stat(name).st_size) for name in found]


def _expand_remote(pattern: str, forced: str) -> list[tuple[str, int]]:
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
    found: dict[str, Any] = {}
    for name, info in sorted(top.items()):
        if info["type"] != "directory":
            if not globbing or _is_data(name, forced):
                found[name] = info
        elif "**" not in pattern:
            base = name.rstrip("/") + "/"
            listed = store.ask("find", name, detail=True, volume=_LISTING)
            inside = {key.removeprefix(base): value for key, value in listed.items()}
            found |= {base + key: inside[key] for key in _in_folder(inside, forced)}
    unsized = next((name for name, info in found.items() if info.get("size") is None), None)
    if unsized is not None:
        raise UsageError(f"{unsized}: its server doesn't tell its size. Copy the file first.")
    if "::" in pattern and list(found) == [path]:
        # A chain of file systems (simplecache::...) has no other name than the one it came by.
        return [(pattern, int(found[path]["size"]))]
    return [(store.fs.unstrip_protocol(name), int(info["size"])) for name, info in found.items()]


def expand(patterns: Sequence[str], forced: str = "auto") -> list[InputFile]:
    """All files that the patterns name: in the patterns' order, sorted inside each, each once.

    Args:
        patterns: Paths, globs (`**` too), folders (read recursively; hidden files and files of
            other kinds are left out) and fsspec URLs of these.
        forced: See `kind_of`.

    Returns:
        The files, empty ones included.

    Raises:
        UsageError: Nothing found, a file of unknown kind, or a scheme that can't be opened.
    """
    if forced not in FORMATS:
        raise UsageError(f"format is {forced!r}; it must be one of {', '.join(FORMATS)}.")
    if not patterns:
        raise UsageError("no corpus was given. Name files, folders or globs with --corpus.")
    files: dict[str, InputFile] = {}
    for pattern in patterns:
        found = (_expand_remote if is_remote(pattern) else _expand_local)(pattern, forced)
        if not found:
            # The hub does not distinguish private from missing.
            cure = " A private or gated dataset needs HF_TOKEN." if "hf://" in pattern else ""
            raise UsageError(
                f"--corpus {redact(pattern)}: no file found. Expected {', '.join(KINDS)} "
                f"(line formats also as .gz or .zst); name other files' kind with --format.{cure}"
            )
        for url, size in found:
            kind = kind_of(redact(url), forced)  # a signed address ends in its signature
            if kind is None:
                raise UsageError(
                    f"{url}: can't tell the format by the name. Expected {', '.join(KINDS)} (line "
                    f"formats also as .gz or .zst); or name it: --format {'|'.join(FORMATS[1:])}."
                )
            files.setdefault(url, InputFile(url, size, *kind))
    return list(files.values())


def open_bytes(url: str) -> BinaryIO:
    """Open a file's bytes as they are stored, seekable.

    Raises:
        UsageError: The file is not there or may not be read.
    """
    try:
        if not is_remote(url):
            return open(url, "rb")
        return io.BufferedReader(RemoteFile(url), _BUFFER)
    except FileNotFoundError:
        raise UsageError(f"{url}: the file is gone. Restore it, or plan the corpus anew.") from None
    except PermissionError:
        raise UsageError(f"{url}: may not be read. Check its permissions.") from None


class _Decompressed(io.RawIOBase):
    """A decompressor as a raw stream that hands out all it has before it raises an error.

    A cut-short stream fails in the read that meets the cut. Were that a read for a whole buffer,
    the good records before the cut would be lost with it.
    """

    def __init__(self, read: Callable[[int], bytes], *to_close: Any) -> None:
        self._read = read
        self._to_close = to_close

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._read(min(len(buffer), _DECOMPRESSED_AT_ONCE))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            for stream in self._to_close:
                stream.close()


def open_plain(url: str, compression: str) -> BinaryIO:
    """Open a file's content, decompressed.

    Cut-short or foreign content raises `EOFError` or `OSError` (`gzip.BadGzipFile` is one) or
    `zlib.error` while reading; several members or frames in a row are read as one.
    """
    raw = open_bytes(url)
    if not compression:
        return raw
    if compression == "gz":
        unzipped = gzip.GzipFile(fileobj=raw, mode="rb")
        stream = _Decompressed(unzipped.read1, unzipped, raw)
    else:
        # Arrow's reader, unlike python-zstandard's, detects a truncated stream.
        if not pa.Codec.is_available("zstd"):
            raise UsageError(f"{url}: this pyarrow has no zstd. Install pyarrow from PyPI.")
        unpacked = pa.CompressedInputStream(raw, "zstd")
        stream = _Decompressed(unpacked.read, unpacked, raw)
    # A buffer on top: its line iteration is C, GzipFile's own is a Python call a line.
    return io.BufferedReader(stream, _BUFFER)


def names(files: Sequence[InputFile]) -> list[str]:
    """Names of the files below their nearest common folder: moving a corpus changes nothing."""
    split = [
        tuple(redact(file.url).split("/")) if is_remote(file.url) else Path(file.url).parts
        for file in files
    ]
    # The first and the last in order differ earliest; a file's own name is never shared.
    low, high = min(split), max(split)
    most = min(map(len, split)) - 1
    shared = next((i for i in range(most) if low[i] != high[i]), most)
    return ["/".join(parts[shared:]) for parts in split]


def tags(files: Sequence[InputFile]) -> Iterator[str]:
    """Content tag of each file: SHA-256 over its first and last 64 KiB, 32 hex digits.

    A change in the middle of a larger file that keeps its size goes unseen: the price of not
    reading the corpus to plan it.
    """
    for first in range(0, len(files), _TAGGED_AT_ONCE):
        group = files[first : first + _TAGGED_AT_ONCE]
        # An empty file has no range to ask a store for.
        remote = _remote_ends([file for file in group if file.size and is_remote(file.url)])
        for file in group:
            ranges = remote[file.url] if file.url in remote else _local_ends(file)
            yield hashlib.sha256(b"".join(ranges)).hexdigest()[:32]


def _ranges(size: int) -> list[tuple[int, int]]:
    if size <= 2 * _TAG_BYTES:
        return [(0, size)]
    return [(0, _TAG_BYTES), (size - _TAG_BYTES, size)]


def _local_ends(file: InputFile) -> list[bytes]:
    ends = []
    with open_bytes(file.url) as stream:
        for start, stop in _ranges(file.size):
            stream.seek(start)
            ends.append(stream.read(stop - start))
    return ends


def _remote_ends(files: Sequence[InputFile]) -> dict[str, list[bytes]]:
    ends: dict[str, list[bytes]] = {file.url: [] for file in files}
    for _, same_store in groupby(files, key=lambda file: file.url.split("://")[0]):
        wanted = [(file, *ends_of) for file in same_store for ends_of in _ranges(file.size)]
        store = FileSystem(wanted[0][0].url)
        # One call: stores with an async client fetch all ranges at the same time.
        blocks = store.read_all(
            [(FileSystem(file.url).path, start, stop) for file, start, stop in wanted]
        )
        for (file, _, _), block in zip(wanted, blocks, strict=True):
            ends[file.url].append(block)
    return ends


def is_dealt(kind: str, compression: str) -> bool:
    """Whether a file can't be entered in the middle, so that records are dealt to its parts."""
    return kind == "csv" or bool(compression)
