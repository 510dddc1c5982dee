"""Plain HDF5 columns: checks of untrusted files before a value is read, and how chunks are stored.

HDF5 supports much that a shard never needs: links into other files, values kept in other files,
types of any size, filters loaded from plug-ins. A file that uses any of it is refused. What remains
is numbers in chunks, each behind shuffle, gzip and fletcher32. Offsets and sizes of the chunks are
compared with the file's size and with each other before memory is allocated.

A chunk is deflated twice, and the smaller stream is kept: as HDF5 does it, and with Huffman codes
alone. In columns of counts and codes, short repetitions cost more bits than codes of single symbols
do. Every deflate reads both. Where the smaller one saves too little for what a column is read for
(5 %, of hidden states 25 %), the chunk is stored as it is: inflating it would take three to ten
times as long as all else a reader does.

Cost: some microseconds a column and one a chunk; the second deflate takes a quarter of the first's
time. Guarantee: a column that passes has all its values in the file itself, and takes at most 1,100
times its stored bytes in memory. The same values give the same bytes with the same zlib.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from kdcache.errors import CorruptCacheError, passes

_LEVEL = 4
_BOTH = (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY)

EARLIER = ((_BOTH, 0.95), (_BOTH, math.inf), (_BOTH[:1], math.inf))
"""How earlier versions stored every chunk: how they deflated, and how much that might leave."""

_earlier: ContextVar[tuple[tuple[int, ...], float] | None] = ContextVar("earlier", default=None)


@contextmanager
def written_as(form: tuple[tuple[int, ...], float]) -> Iterator[None]:
    """Columns that are written in the block are stored as one of `EARLIER`."""
    token = _earlier.set(form)
    try:
        yield
    finally:
        _earlier.reset(token)


def stored_chunk(values: npt.NDArray[np.generic], worth: float = 0.95) -> tuple[bytes, int]:
    """What the filters make of the values of one chunk, and which filters it skips.

    Args:
        values: contiguous, little-endian numbers, as many as a whole chunk has.
        worth: share of its bytes that deflate may leave, at most; else it is stored as it is.

    Returns:
        The bytes with their checksum, and HDF5's mask of skipped filters: 0 or `_AS_IT_IS`.
    """
    planes = values.reshape(-1).view(np.uint8).reshape(-1, values.itemsize).T
    shuffled = np.ascontiguousarray(planes).data
    ways, worth = _earlier.get() or (_BOTH, worth)
    found = [_deflated(shuffled, way) for way in ways]
    stream, mask = min(found, key=len), 0
    if len(stream) > worth * values.nbytes:
        stream, mask = values.tobytes(), _AS_IT_IS
    return stream + fletcher32(stream).to_bytes(4, "little"), mask


def _deflated(plain: memoryview, strategy: int) -> bytes:
    stream = zlib.compressobj(_LEVEL, strategy=strategy)
    return stream.compress(plain) + stream.flush()


def fletcher32(data: bytes | memoryview) -> int:
    """HDF5's checksum: two sums of big-endian 16-bit words, modulo 2^16 - 1.

    Sums that are a multiple of the modulus but not 0 are the modulus itself. A word counts as often
    in the second sum as there are words from it to the end. Laid out in lines, the sums of lines
    and of columns are enough. Bytes are swapped at the end: that is a product with 256.
    """
    width, count = 512, -(-len(data) // 2)
    if len(data) % (2 * width):
        data = bytes(data) + bytes(-len(data) % (2 * width))
    words = np.frombuffer(data, "<u2").reshape(-1, width)
    most = np.uint32 if len(words) < 1 << 16 else np.uint64
    lines, columns = (words.sum(axis, most).astype(np.int64) for axis in (1, 0))
    if not lines.any():
        return 0
    after = (count - width * np.arange(len(lines))) % 0xFFFF
    second = int((after * lines).sum()) - int((np.arange(width) * columns).sum())
    return _folded(256 * second) << 16 | _folded(256 * int(lines.sum()))


def _folded(total: int) -> int:
    return (total - 1) % 0xFFFF + 1


NUMBERS = ("|u1", "<u2", "<u4", "<i4", "<f2", "<f4")
"""The types of columns: little-endian, as numpy writes them."""

DEFLATE_LIMIT = 1100
"""Decoded bytes a stored one, at most: deflate cannot shrink below 1/1032."""

_SHUFFLE, _DEFLATE, _FLETCHER = 2, 1, 3
_AS_IT_IS = 0b011  # mask of a chunk that skips the first two
_CHUNK_BYTES = 1 << 20  # of a chunk of more than one item, at most
_WRITTEN_CHUNK = 1 << 19  # of those that are written here
_CHECKSUM = 4  # bytes behind a chunk from fletcher32; deflate has a checksum of its own
_ATTRIBUTE_BYTES = 1 << 16

# What h5py raises for files that are damaged or not what they say.
_ERRORS = (OSError, KeyError, RuntimeError, ValueError, TypeError, NotImplementedError)


@contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """An HDF5 file, open for reading.

    Raises:
        CorruptCacheError: it is missing, or HDF5 fails on it, now or in the `with` block.
    """
    try:
        # Readers on network file systems must not depend on file locks.
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except FileNotFoundError as error:
        raise CorruptCacheError(
            f"{path} is missing. Run the same build again to make it."
        ) from error
    except _ERRORS as error:
        if passes(error):
            raise  # of the disk, which states nothing about the file
        raise CorruptCacheError(
            f"{path} cannot be read ({error}). Delete the file and run the same build again: "
            "only this shard is made again."
        ) from error


def attribute(path: Path, file: Any, name: str, kind: type[str] | type[int]) -> Any:
    """An attribute of an open file: a text, or a number that is not negative.

    Raises:
        CorruptCacheError: there is none of that name and kind.
    """
    if name not in file.attrs:
        raise CorruptCacheError(f"{path} has no attribute {name!r}: it is not a kdcache shard.")
    found = file.attrs.get_id(name)
    if found.shape != () or found.dtype.kind not in ("S" if kind is str else "iu"):
        raise CorruptCacheError(f"{path}: its attribute {name!r} is not a plain {kind.__name__}.")
    if found.get_storage_size() > _ATTRIBUTE_BYTES:
        raise CorruptCacheError(f"{path}: its attribute {name!r} is too long.")
    value = file.attrs[name]
    if kind is str:
        return value.decode("ascii")
    if value < 0:
        raise CorruptCacheError(f"{path}: its attribute {name!r} is {value}.")
    return int(value)


def write_text(file: Any, name: str, text: str) -> None:
    """Give a file an attribute of fixed length, in ASCII.

    HDF5 keeps texts of variable length in a heap, of which it can walk a damaged one for ever.
    """
    file.attrs[name] = np.bytes_(text.encode("ascii"))


def columns_of(
    path: Path, file: Any, name: str, required: Iterable[str] = (), optional: Iterable[str] = ()
) -> Any:
    """A group of an open file, with all members in the file itself.

    Args:
        required: names of its members; none to leave that open.
        optional: names of members that may be there too.

    Raises:
        CorruptCacheError: it is missing, not a group, has other members, or links to elsewhere.
    """
    _members(path, file)
    group = file[name]
    if not isinstance(group, h5py.Group):
        raise CorruptCacheError(f"{path}: {name} is not a group of columns.")
    found, wanted = _members(path, group), set(required)
    if wanted and not wanted <= found <= wanted | set(optional):
        raise CorruptCacheError(
            f"{path}: {name} has the columns {sorted(found)}, expected {sorted(wanted)}."
        )
    return group


def column(path: Path, group: Any, name: str, kinds: Sequence[str] = NUMBERS) -> Any:
    """A column of a group of `columns_of`: its checked dataset.

    Args:
        kinds: the types it may have.

    Raises:
        CorruptCacheError: there is none, it has another type or layout, or it claims what its
            stored bytes cannot hold.
    """
    if name not in group:
        raise CorruptCacheError(f"{path} has no column {name}.")
    dataset = group[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None or dataset.ndim not in (1, 2):
        raise CorruptCacheError(f"{path}: {name} is not a column.")
    kind = dataset.dtype.str
    # The type in the file may have fewer bits, or others, than the one numpy would read it as.
    if kind not in kinds or not h5py.h5t.py_create(dataset.dtype).equal(dataset.id.get_type()):
        raise CorruptCacheError(
            f"{path}: column {name} has type {dataset.dtype}, expected {' or '.join(kinds)}."
        )
    if dataset.size:
        _check_chunks(path, dataset, name)
    return dataset


def values(path: Path, dataset: Any) -> np.ndarray:
    """All of a dataset of `column`.

    HDF5 finds the chunks; they are decoded here, where a stream longer than its chunk is
    cut off, and a missing chunk is not a chunk of zeros.

    Raises:
        CorruptCacheError: a chunk cannot be found or decoded, or its checksum is wrong.
    """
    found = np.empty(dataset.shape, dataset.dtype)
    if not dataset.size:
        return found
    step, *width = dataset.chunks
    count = step * math.prod(width)
    for start in range(0, len(found), step):
        mask, stored = dataset.id.read_direct_chunk((start, *(0 for _ in width)))
        kept = memoryview(stored)[:-_CHECKSUM]
        if mask == _AS_IT_IS:
            if fletcher32(kept) != int.from_bytes(stored[-_CHECKSUM:], "little"):
                raise CorruptCacheError(f"{path}: a chunk of {dataset.name} has a wrong checksum.")
            chunk = np.frombuffer(kept, found.dtype).reshape(step, *width)
            found[start : start + step] = chunk[: len(found) - start]
            continue
        stream = zlib.decompressobj()
        try:
            shuffled = stream.decompress(kept, count * found.itemsize)
            more = stream.decompress(stream.unconsumed_tail, 1)  # reads on to the checksum
        except zlib.error as error:
            raise CorruptCacheError(f"{path}: {dataset.name} is damaged ({error}).") from None
        if len(shuffled) != count * found.itemsize or more or not stream.eof:
            raise CorruptCacheError(f"{path}: a chunk of {dataset.name} has the wrong size.")
        # Shuffled are the lowest bytes of all values, then the next ones, and so on.
        planes = np.frombuffer(shuffled, np.uint8).reshape(found.itemsize, count)
        words = planes[-1].astype(f"<u{found.itemsize}")
        for plane in planes[-2::-1]:
            words <<= 8
            words |= plane
        chunk = words.view(found.dtype).reshape(step, *width)
        found[start : start + step] = chunk[: len(found) - start]
    return found


def read_all(path: Path) -> None:
    """Read every column of a file and discard it.

    Raises:
        CorruptCacheError: as `open_file`, `columns_of` and `column` do.
    """
    with open_file(path) as file:
        for member in file:
            group = columns_of(path, file, member)
            for name in group:
                values(path, column(path, group, name))
        for name in file.attrs:
            attribute(path, file, name, str if file.attrs.get_id(name).dtype.kind == "S" else int)


def _members(path: Path, group: Any) -> set[str]:
    """Names in a group, all of which must be of objects of the file itself."""
    links: list[tuple[bytes, int]] = []
    group.id.links.iterate(lambda name, info: links.append((name, info.type)), info=True)
    for name, kind in links:
        if kind != h5py.h5l.TYPE_HARD:
            raise CorruptCacheError(f"{path}: {name!r} is a link, and links are not followed.")
    names = {name.decode() for name, _ in links}
    if len(names) != len(links):
        raise CorruptCacheError(f"{path}: a name is repeated in {group.name}.")
    return names


def _check_chunks(path: Path, dataset: Any, name: str) -> None:
    """Refuse a dataset unless each of its chunks is in the file once, filtered as we filter."""
    made = dataset.id.get_create_plist()
    filters = [made.get_filter(i) for i in range(made.get_nfilters())]
    plain = [code for code, *_ in filters] == [_SHUFFLE, _DEFLATE, _FLETCHER]
    if (
        made.get_layout() != h5py.h5d.CHUNKED
        or not plain
        or filters[0][2] != (dataset.dtype.itemsize,)
    ):
        raise CorruptCacheError(
            f"{path}: column {name} is not stored in chunks with the filters shuffle, gzip and "
            f"fletcher32."
        )
    rows, *width = dataset.shape
    step, *across = dataset.chunks
    item = dataset.dtype.itemsize * math.prod(width)
    if across != width or not 1 <= step <= rows or (step > 1 and step * item > _CHUNK_BYTES):
        raise CorruptCacheError(
            f"{path}: column {name} is {dataset.shape} in chunks of {dataset.chunks}."
        )
    expected = -(-rows // step)
    limit = path.stat().st_size
    stored = dataset.id.get_storage_size()
    if dataset.nbytes > DEFLATE_LIMIT * min(stored, limit):
        raise CorruptCacheError(
            f"{path}: column {name} claims {dataset.nbytes} bytes, more than its stored bytes can "
            "hold."
        )
    seen = np.zeros(expected, bool)
    # Deflate makes nothing much larger; more stored bytes than that would be a bomb.
    most = step * item + step * item // 100 + 64
    chunks: list[Any] = []

    def note(chunk: Any) -> bool | None:
        chunks.append(chunk)
        return len(chunks) > expected or None  # whether HDF5 may stop: a list may have no end

    dataset.id.chunk_iter(note)
    for chunk in chunks:
        index, rest = divmod(chunk.chunk_offset[0], step)
        inside = chunk.byte_offset + chunk.size <= limit and 0 < chunk.size <= most
        aligned = not rest and not any(chunk.chunk_offset[1:]) and index < expected
        plain = chunk.filter_mask == _AS_IT_IS and chunk.size == step * item + _CHECKSUM
        if not aligned or not inside or seen[index] or (chunk.filter_mask and not plain):
            break
        seen[index] = True
    if not seen.all() or len(chunks) != expected:
        raise CorruptCacheError(f"{path}: the chunks of column {name} are missing or misplaced.")


def write_column(group: Any, name: str, array: np.ndarray, worth: float = 0.95) -> None:
    """Write a column, in chunks that pass through the filters of every HDF5; see `stored_chunk`."""
    if array.size == 0:  # HDF5 cannot chunk nothing
        group.create_dataset(name, data=array)
        return
    row_bytes = array.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
    length = min(len(array), max(1, _WRITTEN_CHUNK // row_bytes))
    dataset = group.create_dataset(
        name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=(length, *array.shape[1:]),
        compression="gzip",
        compression_opts=4,
        shuffle=True,
        fletcher32=True,
    )
    for start in range(0, len(array), length):
        chunk = np.zeros(dataset.chunks, array.dtype)
        part = array[start : start + length]
        chunk[: len(part)] = part
        corner = (start, *(0 for _ in array.shape[1:]))
        stored, mask = stored_chunk(chunk, worth)
        dataset.id.write_direct_chunk(corner, stored, mask)


def read_column(
    path: Path, group: Any, name: str, kinds: Sequence[str], length: int | None, *width: int
) -> np.ndarray:
    """A column, its length (None: as it is) and the shape of its items as expected."""
    dataset = column(path, group, name, kinds)
    found, expected = dataset.shape, (len(dataset) if length is None else length, *width)
    if found != expected:
        raise CorruptCacheError(f"{path}: column {name} has shape {found}, expected {expected}.")
    return values(path, dataset)
