"""The stored bytes of a chunk: shuffled, deflated and with a checksum, as HDF5's own filters do it.

HDF5's deflate looks for repetitions always. In columns of counts and codes, whose symbols follow
each other by chance, the short repetitions that it finds cost more bits than Huffman codes of
single symbols take. A stream of Huffman codes alone is as valid, and every deflate reads it. So a
chunk is deflated both ways, and the smaller stream is kept.

Cost: the second way takes a quarter of the first one's time. Guarantee: the same values give the
same bytes with the same zlib, never more than HDF5's filters would make of them.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

_LEVEL = 4


def stored_chunk(values: npt.NDArray[np.generic]) -> bytes:
    """What shuffle, deflate and fletcher32 make of the values of one chunk.

    Args:
        values: contiguous, little-endian numbers, as many as a whole chunk has.
    """
    planes = values.reshape(-1).view(np.uint8).reshape(-1, values.itemsize).T
    shuffled = np.ascontiguousarray(planes).data
    found = [_deflated(shuffled, way) for way in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY)]
    stream = min(found, key=len)
    return stream + fletcher32(stream).to_bytes(4, "little")


def _deflated(plain: memoryview, strategy: int) -> bytes:
    stream = zlib.compressobj(_LEVEL, strategy=strategy)
    return stream.compress(plain) + stream.flush()


def fletcher32(data: bytes) -> int:
    """HDF5's checksum: two sums of big-endian 16-bit words, modulo 2^16 - 1.

    Sums that are a multiple of the modulus but not 0 are the modulus itself.
    """
    words = np.frombuffer(data + b"\0" * (len(data) % 2), ">u2").astype(np.uint64)
    # Before each sum of products could overflow: 2^16 words of 16 bits, times numbers below 2^16.
    first = second = 0
    for start in range(0, len(words), 1 << 16):
        part = words[start : start + (1 << 16)]
        weights = np.arange(len(part), 0, -1, dtype=np.uint64)
        second += len(part) * first + int((part * weights).sum())
        first += int(part.sum())
    return _folded(second) << 16 | _folded(first)


def _folded(total: int) -> int:
    return total and (total - 1) % 0xFFFF + 1
