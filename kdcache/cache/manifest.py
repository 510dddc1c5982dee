"""The manifest: the sealed list of a cache's shards with their counts and hashes."""

from __future__ import annotations

import builtins
import dataclasses
import json
import re
from dataclasses import dataclass

from kdcache.cache.spec import FORMAT
from kdcache.errors import CorruptCacheError
from kdcache.shard import ShardCounts

SHARD_NAME = re.compile(r"(\d{5,})-([0-9a-f]{16})\.h5")


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

    @property
    def counts(self) -> ShardCounts:
        """The counts that the shard's file must declare."""
        return ShardCounts(self.rows, self.tokens, self.positions)


@dataclass(frozen=True)
class Manifest:
    """The sealed list of a cache's shards, in the order of their spans."""

    fingerprint: str
    shards: tuple[ShardEntry, ...]

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

    def to_json(self) -> builtins.bytes:
        """Canonical text: the same cache has the same manifest, byte for byte."""
        values = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "rows": self.rows,
            "tokens": self.tokens,
            "positions": self.positions,
            "bytes": self.bytes,
            "skipped": self.skipped,
            "shards": [dataclasses.asdict(s) for s in self.shards],
        }
        return (json.dumps(values, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: builtins.bytes) -> Manifest:
        """Parse and check a manifest.

        Raises:
            CorruptCacheError: not a manifest of this format, names outside the cache's folder, or
                totals that do not add up.
        """
        try:
            values = json.loads(data)
            manifest = cls(values["fingerprint"], tuple(ShardEntry(**s) for s in values["shards"]))
            totals = {k: values[k] for k in ("rows", "tokens", "positions", "bytes", "skipped")}
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptCacheError(f"manifest.json cannot be read: {error!r}.") from error
        for i, shard in enumerate(manifest.shards):
            found = SHARD_NAME.fullmatch(shard.name)
            if found is None or int(found.group(1)) != i or shard.span != i:
                raise CorruptCacheError(
                    f"manifest.json: {shard.name!r} is not the shard of span {i}."
                )
        for name, value in totals.items():
            if getattr(manifest, name) != value:
                raise CorruptCacheError(
                    f"manifest.json: its shards have {getattr(manifest, name)} {name}, it says "
                    f"{value}."
                )
        return manifest
