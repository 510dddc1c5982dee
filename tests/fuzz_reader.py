"""A process that reads mutated shards and manifests, for test_fuzz.py.

It gets numbers of mutants and folders with what is mutated in turn, and prints one line before each
mutant (so that its parent knows what killed it) and one after.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import sys
from pathlib import Path

import numpy as np

from kdcache.cache import Cache, CacheSpec
from kdcache.cache.check import check_values
from kdcache.cache.shard import ShardCounts, ShardData, read_counts, read_shard
from kdcache.errors import CorruptCacheError, UsageError

MEMORY = 1 << 30


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three flips, cuts, splices, zeroed or repeated ranges and odd numbers."""
    found = bytearray(data)
    used = np.flatnonzero(np.frombuffer(data, np.uint8))  # half of a small HDF5 file is padding
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        at = int(rng.choice(used) if rng.random() < 0.8 else rng.integers(len(data)))
        at = min(at, len(found) - 1)
        length = int(rng.choice([1, 2, 4, 8, 64, 500]))
        kind = int(rng.integers(7))
        if kind <= 1:
            found[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            found[at : at + length] = bytes(len(found[at : at + length]))
        elif kind == 3:
            found[at : at + length] = rng.bytes(len(found[at : at + length]))
        elif kind == 4:  # the same bytes elsewhere
            source = int(rng.integers(len(found)))
            piece = found[source : source + length]
            found[at : at + len(piece)] = piece
        elif kind == 5:  # a number as sizes, counts and addresses are
            value = int(rng.choice([0, 1, 255, 2**16 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1]))
            width = int(rng.choice([2, 4, 8]))
            found[at : at + width] = (value % 256**width).to_bytes(width, "little")
        else:
            found = found[: max(1, at)]
    return bytes(found)


def summary(data: ShardData) -> str:
    """What a shard says, as a hash."""
    digest = hashlib.sha256()
    arrays = [data.offsets, data.input_ids, data.labels, *data.targets.columns.values()]
    if data.type_ids is not None:
        arrays.append(data.type_ids)
    for array in arrays:
        digest.update(repr((array.shape, array.dtype)).encode() + array.tobytes())
    digest.update(repr((data.task, data.texts, data.text_pairs)).encode())
    return digest.hexdigest()


class Shards:
    """Mutants of one shard, read as a cache reads them whose manifest vouches for each."""

    def __init__(self, folder: Path) -> None:
        self.data = (folder / "original.h5").read_bytes()
        self.path = folder / f"mutant-{os.getpid()}.h5"
        facts = json.loads((folder / "facts.json").read_text())
        self.spec = CacheSpec.from_dict(facts["spec"])
        self.ranks = np.array(facts["ranks"]) if facts["ranks"] else None
        self.counts = ShardCounts(**facts["counts"])

    def read(self, data: bytes) -> str:
        self.path.write_bytes(data)
        read_counts(self.path)
        shard = read_shard(
            self.path,
            self.spec.make_codec(),
            counts=self.counts,
            ranks=self.ranks,
            kept=self.spec.kept,
        )
        check_values(shard, self.spec)
        return summary(shard)


class Documents:
    """Mutants of the manifest or spec of a cache, each with its sum made right again."""

    def __init__(self, folder: Path) -> None:
        self.name = (folder / "which").read_text()
        self.folder = folder / str(os.getpid())
        shutil.copytree(folder / "cache", self.folder, dirs_exist_ok=True)
        self.data = (self.folder / self.name).read_bytes()

    def read(self, data: bytes) -> str:
        body = data[: data.rfind(b' "sha256": "')] if b' "sha256": "' in data else data
        digest = hashlib.sha256(body).hexdigest()
        (self.folder / self.name).write_bytes(body + f' "sha256": "{digest}"\n}}\n'.encode())
        cache = Cache.resume(str(self.folder))
        cache.codec()
        return cache.manifest.fingerprint  # what else it says is for its author to say


def main() -> None:
    first, last, step = map(int, sys.argv[1:4])
    folders = [Path(word) for word in sys.argv[4:]]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    readers = [
        Shards(folder) if (folder / "original.h5").exists() else Documents(folder)
        for folder in folders
    ]
    right = [reader.read(reader.data) for reader in readers]
    for number in range(first, last, step):
        reader = readers[number % len(readers)]
        mutant = mutate(reader.data, np.random.default_rng([7, number]))
        print(number, flush=True)
        try:
            found = reader.read(mutant)
            outcome = "right" if found == right[number % len(readers)] else "other"
        except (CorruptCacheError, UsageError):
            outcome = "refused"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(number, outcome, flush=True)


if __name__ == "__main__":
    main()
