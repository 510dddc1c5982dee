"""The manifest: the final list of a cache's shards with their counts and hashes."""

from __future__ import annotations

import builtins
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcache.cache.hdf5 import DEFLATE_LIMIT
from kdcache.cache.shard import ShardCounts
from kdcache.cache.spec import FORMAT, Spec, from_text, to_text
from kdcache.domains import is_name
from kdcache.errors import CorruptCacheError
from kdcache.storage import Storage, sha256_file

SHARD_NAME = re.compile(r"([0-9]{5,})-([0-9a-f]{16})\.(h5|parquet)")
BESIDE = re.compile(
    r"ranks\.u32|output_layer-[0-9a-f]{16}\.safetensors|tokenizer/(?!\.)[^/\\\x00-\x1f]+"
)
"""Names of files that lie next to `spec.json`; no other can be named."""

SPAN_FACTS = (
    *("skipped", "filtered", "clipped_mass", "label_nats", "impossible_labels", "domain"),
    *("stopped", "hard_labels"),
)
"""What an entry and the shard's `span` attribute both say."""

_LARGEST = 256 << 20  # bytes of a manifest: a million shards
_SHA256 = re.compile("[0-9a-f]{64}")
COUNTS = ("rows", "tokens", "positions", "bytes", "skipped")
_MOST = 1 << 31  # of anything in one shard, which is held in memory whole
_CURE = "Delete the file and run the same build again: only this shard is made again."


@dataclass(frozen=True)
class ShardEntry:
    """One committed shard as the manifest lists it."""

    span: int
    name: str
    rows: int
    tokens: int
    positions: int
    bytes: int
    sha256: str
    skipped: int = 0
    clipped_mass: float = 0.0
    label_nats: float | None = None
    impossible_labels: int | None = None
    domain: str | None = None
    filtered: int | None = None
    stopped: int | None = None  # answers of a generated corpus that ended by themselves
    hard_labels: int | None = None  # labels without a soft target, where the teacher was sure

    @property
    def counts(self) -> ShardCounts:
        """The counts that the shard's file must declare."""
        return ShardCounts(self.rows, self.tokens, self.positions)

    @property
    def answered(self) -> int:
        """Positions that the teacher answered, those without a soft target too."""
        return self.positions + (self.hard_labels or 0)

    @property
    def facts(self) -> dict[str, Any]:
        """Those of `SPAN_FACTS` that it has."""
        return {name: value for name in SPAN_FACTS if (value := getattr(self, name)) is not None}

    def check(self, path: Path | None) -> None:
        """Compare a file, None where there is known to be none, with this entry: 1 GB/s a core.

        Raises:
            CorruptCacheError: it is missing, or its size or hash is another.
        """
        shard = f"shard {self.span}: {self.name}"
        missing = missing_shard(shard)
        if path is None or not path.exists():
            raise missing
        try:
            size = path.stat().st_size
            # With the right size it is a file, and has an end.
            found = sha256_file(path) if size == self.bytes else ""
        except FileNotFoundError:  # a repair has removed it since
            raise missing from None
        if size != self.bytes:
            raise CorruptCacheError(
                f"{shard} has {size} bytes, the manifest says {self.bytes}. {_CURE}"
            )
        if found != self.sha256:
            raise CorruptCacheError(
                f"{shard}: sha256 is {found[:16]}…, the manifest says {self.sha256[:16]}…. {_CURE}"
            )

    @classmethod
    def from_dict(cls, values: Any, span: int) -> ShardEntry:
        """Check and build the entry of a span.

        Raises:
            ValueError: it cannot be.
        """
        entry = cls(**values)
        found = SHARD_NAME.fullmatch(entry.name)
        if found is None or not int(found.group(1)) == entry.span == span:
            raise ValueError(f"{entry.name!r} is not the shard of span {span}")
        if not (_SHA256.fullmatch(entry.sha256) and entry.sha256.startswith(found.group(2))):
            raise ValueError(f"{entry.name} does not match the sha256 in its name")
        for name in ("span", *COUNTS):
            value = getattr(entry, name)
            if not _is_count(value) or (name == "bytes" and not value):
                raise ValueError(f"{entry.name} has an invalid number of {name}: {value}")
        # So many numbers, compressed as far as can be.
        if max(entry.rows, entry.tokens, entry.positions) > DEFLATE_LIMIT * entry.bytes:
            raise ValueError(f"{entry.name} claims {entry.counts} in {entry.bytes} bytes")
        mass = entry.clipped_mass
        if type(mass) not in (int, float) or not (math.isfinite(mass) and mass >= 0):
            raise ValueError(f"{entry.name} has a clipped mass of {mass}")
        nats, impossible = entry.label_nats, entry.impossible_labels
        if nats is not None or impossible is not None:
            if type(nats) is not float or not (math.isfinite(nats) and nats >= 0):
                raise ValueError(f"{entry.name} has labels of {nats} nats")
            if type(impossible) is not int or not 0 <= impossible <= entry.answered:
                raise ValueError(f"{entry.name} has {impossible} impossible labels")
        for name in ("filtered", "stopped", "hard_labels"):
            value = getattr(entry, name)
            if value is not None and not _is_count(value):
                raise ValueError(f"{entry.name} has an invalid number of {name}: {value}")
        if entry.domain is not None and not is_name(entry.domain):
            raise ValueError(f"{entry.name} has an invalid domain: {entry.domain!r}")
        return entry


@dataclass(frozen=True)
class Manifest:
    """The final list of a cache's shards, in the order of their spans.

    Attributes:
        files: SHA-256 of each file written with the spec.
    """

    fingerprint: str
    shards: tuple[ShardEntry, ...]
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows in all shards."""
        return sum(s.rows for s in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(s.tokens for s in self.shards)

    @property
    def positions(self) -> int:
        """Positions with a soft target in all shards."""
        return sum(s.positions for s in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all shard files."""
        return sum(s.bytes for s in self.shards)

    @property
    def skipped(self) -> int:
        """Records left out of all spans (empty, or broken with `--on-error skip`)."""
        return sum(s.skipped for s in self.shards)

    def fits(self, spec: Spec, files: Mapping[str, str]) -> bool:
        """Whether it is of a sealed cache of this spec.

        Args:
            files: SHA-256 of each of its other files.
        """
        own = (self.fingerprint, self.files, [shard.domain for shard in self.shards])
        kept = {shard.label_nats is not None for shard in self.shards}
        domains = [spec.domain_of(span) for span in range(spec.spans)]
        return own == (spec.fingerprint, files, domains) and not kept - {spec.label_logprob}

    def to_json(self) -> builtins.bytes:
        """Canonical text: the same cache has the same manifest, byte for byte."""
        return to_text(
            {
                "format": FORMAT,
                "fingerprint": self.fingerprint,
                **{name: getattr(self, name) for name in COUNTS},
                "files": dict(sorted(self.files.items())),
                "shards": [
                    {k: v for k, v in vars(s).items() if v is not None} for s in self.shards
                ],
            }
        )

    @classmethod
    def read(cls, storage: Storage) -> Manifest:
        """The manifest of a sealed cache; raises as `from_json` and `Storage.read` do."""
        return cls.from_json(storage.read("manifest.json", _LARGEST))

    @classmethod
    def from_json(cls, data: builtins.bytes) -> Manifest:
        """Parse and check a manifest.

        Raises:
            CorruptCacheError: not a manifest of this format, changed or truncated, names outside
                the cache's folder, counts that cannot be, or totals that do not add up.
        """
        values = from_text(data, "manifest.json")
        try:
            if values["format"] != FORMAT:
                raise ValueError(f"its format is {values['format']}, this kdcache reads {FORMAT}")
            if values.keys() != {"format", "fingerprint", "files", "shards", *COUNTS}:
                raise ValueError(f"its fields are {', '.join(values)}")
            if not _SHA256.fullmatch(values["fingerprint"]):
                raise ValueError("its fingerprint is invalid")
            manifest = cls(
                values["fingerprint"],
                tuple(ShardEntry.from_dict(s, i) for i, s in enumerate(values["shards"])),
                check_files(values["files"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptCacheError(f"manifest.json cannot be read: {error!r}.") from error
        for name in COUNTS:
            if getattr(manifest, name) != values[name]:
                raise CorruptCacheError(
                    f"manifest.json: its shards have {getattr(manifest, name)} {name}, it says "
                    f"{values[name]}."
                )
        return manifest


def missing_shard(shard: str) -> CorruptCacheError:
    """The error of a shard that is listed and not there."""
    return CorruptCacheError(
        f"{shard} is missing. Run the same build again: only this shard is made again."
    )


def label_sums(shards: Iterable[ShardEntry]) -> tuple[float, int, int] | None:
    """What the teacher thought of the labels of some shards.

    Returns:
        Minus the sum of its log-probabilities of those that it can predict, in nats, their number,
        and the number of the others; None where a shard keeps none.
    """
    nats, predicted, impossible = 0.0, 0, 0
    for shard in shards:
        if shard.label_nats is None or shard.impossible_labels is None:
            return None
        nats += shard.label_nats
        impossible += shard.impossible_labels
        predicted += shard.answered - shard.impossible_labels
    return nats, predicted, impossible


def filtered_records(shards: Iterable[ShardEntry]) -> int | None:
    """Records that filters left out of some shards.

    Returns:
        None where one does not say: the cache has no filter, or is of an earlier version.
    """
    counts = [shard.filtered for shard in shards]
    return sum(n for n in counts if n is not None) if counts and None not in counts else None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST


def check_files(files: Any) -> dict[str, str]:
    """Names and hashes of the files written with `spec.json`, from a spec or a manifest.

    Raises:
        ValueError: a name that could leave the folder, or a hash that is none.
    """
    if not isinstance(files, dict):
        raise ValueError("its files are not a JSON object")
    for name, sha256 in files.items():
        if not (BESIDE.fullmatch(name) and type(sha256) is str and _SHA256.fullmatch(sha256)):
            raise ValueError(f"{name!r} is not a name of a cache's small files")
    return files
