"""Input files: of what kind one is, whether it has changed, and how to open it.

Local files are opened directly, URLs through fsspec. Cost: for `tags`, 128 KiB read per file (many
remote files at a time); for `check_unchanged`, one request a file.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any, BinaryIO, NoReturn

import pyarrow as pa

from kdcache.errors import UsageError
from kdcache.storage import redact

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".conll": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".conllu": "conllu",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".idx": "bin",  # an index: the ids are in the .bin next to it
}
LINE_KINDS = frozenset({"jsonl", "txt", "tsv", "csv", "conll", "conllu"})
FORMATS = ("auto", "jsonl", "txt", "csv", "tsv", "conll", "conllu", "parquet", "arrow")
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
ARROW_FILE_MAGIC = b"ARROW1"  # of a file with an index; a stream has none

_TAG_BYTES = 64 << 10
_BUFFER = 1 << 20
_DECOMPRESSED_AT_ONCE = 64 << 10
_TAGGED_AT_ONCE = 128
_ASKED_AT_ONCE = 32
# What stores call that which changes with a file's content, the same in a listing and asked singly.
_VERSIONS = ("ETag", "etag", "blob_id", "generation", "sha", "CRC", "mtime", "created")


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of a corpus.

    Attributes:
        kind: One of the values of `KINDS`.
        compression: `""`, `"gz"` or `"zst"`.
        version: What changes when the file is written: the time of its last change, or the store's
            word for its content; `""` where it is not known.
        beside: Files that it cannot be read without: the index of a `.bin`.
        domain: Name of the corpus that it belongs to; None where corpora have no names.
    """

    url: str
    size: int
    kind: str
    compression: str = ""
    version: str = ""
    beside: tuple[InputFile, ...] = ()
    domain: str | None = None

    @property
    def versions(self) -> str:
        """The versions of it and of the files that it needs."""
        return " ".join(file.version for file in (self, *self.beside))

    @property
    def sequential(self) -> bool:
        """Whether it can't be entered in the middle, so that part i of n has each nth record."""
        return self.kind == "csv" or bool(self.compression)

    @property
    def full_kind(self) -> str:
        """Kind and compression, such as `jsonl.gz`."""
        return f"{self.kind}.{self.compression}".rstrip(".")


def is_remote(path: str) -> bool:
    """Whether `path` names something that only fsspec can open."""
    return "://" in path and not path.startswith(("file://", "local://"))


def kind_of(name: str, forced: str = "auto") -> tuple[str, str] | None:
    """Kind and compression of a file by its name.

    Args:
        forced: The kind of all files (one of `FORMATS`); `auto` goes by the extension.

    Returns:
        For example `("jsonl", "gz")`; None if the extension states nothing.
    """
    stem, extension = os.path.splitext(name.lower().rstrip("/"))
    compression = COMPRESSIONS.get(extension, "")
    if compression:
        extension = os.path.splitext(stem)[1]
    kind = forced if forced != "auto" else KINDS.get(extension)
    if kind is None or (compression and kind not in LINE_KINDS):
        return None
    return kind, compression


def local_version(url: str) -> tuple[int, str]:
    """Size and version of a local file, which must be a regular one."""
    try:
        found = os.stat(url)
    except FileNotFoundError as error:
        if not os.path.islink(url):
            refuse(url, error)
        raise UsageError(
            f"{url}: a link to {os.readlink(url)}, which is not there. Restore what it links to, "
            "or remove it."
        ) from None
    except OSError as error:
        refuse(url, error)
    if not stat.S_ISREG(found.st_mode):
        raise UsageError(f"{url} is not a regular file. Write what it holds into a file first.")
    return found.st_size, str(found.st_mtime_ns)


def remote_version(info: Mapping[str, Any]) -> tuple[int, str]:
    """Size and version of a remote file, by what its store states of it."""
    word = next((info[key] for key in _VERSIONS if info.get(key)), "")
    # Some stores give a time as a number in a listing, and else as a `datetime`.
    return int(info["size"]), str(word.timestamp() if isinstance(word, datetime) else word)


def version_of(url: str) -> tuple[int, str]:
    """Size and version of a file; `FileNotFoundError` where a store has none."""
    if is_remote(url):
        from kdcache.storage.filesystem import FileSystem

        store = FileSystem(url)
        return remote_version(store.ask("info", store.path))
    return local_version(url)


def check_unchanged(file: InputFile) -> None:
    """Compare a file with what it was when it was planned.

    Raises:
        UsageError: It has another size, was written since, or is gone.
    """
    for other in file.beside:
        check_unchanged(other)
    try:
        found = version_of(file.url)
    except FileNotFoundError as error:
        refuse(file.url, error)
    if file.version and found not in ((file.size, file.version), (file.size, "")):
        what = f"it had {file.size:,} bytes and has {found[0]:,}"
        if found[0] == file.size:
            what = "it has been written to"
        raise UsageError(
            f"{redact(file.url)}: the file was changed after it was planned: {what}. Restore it "
            "and run the same command again, or build the new corpus in another folder. (Copies of "
            "one corpus on several machines must keep the times of its files: cp -p, rsync -t.)"
        )


def check_all_unchanged(files: Sequence[InputFile]) -> None:
    """`check_unchanged` of many files, several at a time."""
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        for _ in pool.map(check_unchanged, files):
            pass


def refuse(url: str, error: OSError) -> NoReturn:
    """Raise for a file that can't be asked for or opened."""
    if isinstance(error, FileNotFoundError):
        raise UsageError(
            f"{url}: the file is gone. Restore it, or build the corpus as it is now "
            "in another folder."
        ) from None
    if isinstance(error, PermissionError):
        raise UsageError(f"{url}: may not be read. Check its permissions.") from None
    raise error


def open_bytes(url: str) -> BinaryIO:
    """Open a file's bytes as they are stored, seekable.

    Raises:
        UsageError: The file is not there or may not be read.
    """
    try:
        if not is_remote(url):
            return open(url, "rb")
        from kdcache.storage.filesystem import RemoteFile

        return io.BufferedReader(RemoteFile(url), _BUFFER)
    except OSError as error:
        refuse(url, error)


@functools.lru_cache(1024)
def is_stream(file: InputFile) -> bool:
    """Whether an Arrow file is a stream, which has no index of its batches."""
    try:
        with open_bytes(file.url) as raw:
            return raw.read(len(ARROW_FILE_MAGIC)) != ARROW_FILE_MAGIC
    except (UsageError, OSError):  # which the span that reads it will say
        return False


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


def open_plain(file: InputFile) -> BinaryIO:
    """Open a file's content, decompressed.

    Cut-short or foreign content raises `EOFError` or `OSError` (`gzip.BadGzipFile` is one) or
    `zlib.error` while reading; several members or frames in a row are read as one.
    """
    raw = open_bytes(file.url)
    if not file.compression:
        return raw
    if file.compression == "gz":
        unzipped = gzip.GzipFile(fileobj=raw, mode="rb")
        stream = _Decompressed(unzipped.read1, unzipped, raw)
    else:
        # Arrow's reader, unlike python-zstandard's, detects a truncated stream.
        unpacked = pa.CompressedInputStream(raw, "zstd")
        stream = _Decompressed(unpacked.read, unpacked, raw)
    # A buffer on top: its line iteration is C, GzipFile's own is a Python call a line.
    return io.BufferedReader(stream, _BUFFER)


def names(files: Sequence[InputFile]) -> list[str]:
    """Names of the files below their nearest common folder: moving a corpus changes nothing."""
    split = [
        tuple(redact(file.url).split("/"))
        if is_remote(file.url)
        else ("/", *file.url.split("/")[1:])  # `Path.parts` of an absolute path, in a tenth
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
        from kdcache.storage.filesystem import FileSystem

        store = FileSystem(wanted[0][0].url)
        # One call: stores with an async client fetch all ranges at the same time.
        blocks = store.read_all(
            [(FileSystem(file.url).path, start, stop) for file, start, stop in wanted]
        )
        for (file, _, _), block in zip(wanted, blocks, strict=True):
            ends[file.url].append(block)
    return ends
