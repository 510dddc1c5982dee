"""A column of rows is declared once: all that reads, writes and picks rows follows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest

from kdcache.cache import shard
from kdcache.cache.columns import Numbers, Texts
from kdcache.errors import CorruptCacheError
from kdcache.rows import Row
from kdcache.stream import ShardRows, join
from kdcache.targets import Codec, SoftTargets
from kdcache.tasks import SEQUENCE_CLASSIFICATION


@dataclass(frozen=True, slots=True, eq=False)
class DatedRow(Row):
    year: int | None = None
    place: str | None = None


@dataclass(kw_only=True)
class DatedShard(shard.ShardData):
    """Two columns more: this declaration is all that the tests below add to the package."""

    years: Annotated[
        np.ndarray | None, Numbers("row", "year", "years", when=None, fill=0, dtype="uint16")
    ] = None
    places: Annotated[
        list[str] | None, Texts("row", "place", "place", when=None, fill="nowhere")
    ] = None


@pytest.fixture(autouse=True)
def dated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "ShardData", DatedShard)
    monkeypatch.setattr(shard, "Row", DatedRow)


CODEC = Codec.parse("dense", (1.0,), 2)


def made(years: list[int | None]) -> shard.ShardData:
    """Rows of one to three tokens, of some years."""
    rows = [
        DatedRow(
            np.arange(1 + i % 3, dtype=np.int32),
            np.zeros(1, np.int32),
            text=f"text {i}",
            year=year,
            place=None if year is None else f"in {year}",
        )
        for i, year in enumerate(years)
    ]
    logits = np.arange(2 * len(rows), dtype=np.float32).reshape(-1, 2)
    targets = SoftTargets(CODEC, {"logits": logits})
    return DatedShard.from_rows(SEQUENCE_CLASSIFICATION, rows, targets)


def test_a_new_column_is_stored_read_picked_and_joined(tmp_path: Path) -> None:
    shard.write_shard(tmp_path / "a.h5", made([1999, 2001, 2026]), attributes={})
    assert {"rows/years", "rows/place", "rows/place_bytes"} <= set(
        shard.column_bytes(tmp_path / "a.h5")
    )
    data = shard.read_shard(tmp_path / "a.h5", CODEC)
    assert isinstance(data, DatedShard)
    assert data.years is not None
    assert (data.years.dtype, data.years.tolist()) == (np.uint16, [1999, 2001, 2026])
    row = data.row(1)
    assert isinstance(row, DatedRow)
    assert (row.year, row.place, row.text) == ([2001], "in 2001", "text 1")
    without = made([None, None])
    assert (without.years, without.places) == (None, None)  # type: ignore[attr-defined]
    picked = ShardRows([data, without]).take(np.array([4, 2, 0, 1]))
    assert isinstance(picked, DatedShard)
    assert picked.years is not None
    assert picked.years.tolist() == [0, 2026, 1999, 2001]
    assert picked.places == ["nowhere", "in 2026", "in 1999", "in 2001"]
    both = join([without, picked])
    assert isinstance(both, DatedShard)
    assert both.places == ["nowhere"] * 3 + ["in 2026", "in 1999", "in 2001"]
    assert both.texts == ["text 0", "text 1", "text 1", "text 2", "text 0", "text 1"]


def test_a_file_with_half_of_a_column_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard.write_shard(tmp_path / "a.h5", made([1999]), attributes={})
    with shard.h5py.File(tmp_path / "a.h5", "a") as file:
        del file["rows/place_bytes"]
    with pytest.raises(CorruptCacheError, match="has no column place_bytes"):
        shard.read_shard(tmp_path / "a.h5", CODEC)
    monkeypatch.undo()  # and to a reader that does not know it, a column is one too many
    with pytest.raises(CorruptCacheError, match="has the columns"):
        shard.read_shard(tmp_path / "a.h5", CODEC)


def test_runs_of_neighbours_are_picked_as_single_rows_are() -> None:
    parts = [made(years) for years in ([1, 2, 3, 4], [None], [], [5, 6, 7, 8, 9])]
    pool = ShardRows(parts)
    rng = np.random.default_rng(0)
    for _ in range(50):
        start = int(rng.integers(len(pool)))
        rows = np.concatenate([np.arange(start, len(pool)), rng.integers(0, len(pool), 3)])
        together, alone = (
            pool.take(rows),
            join([pool.take(rows[i : i + 1]) for i in range(len(rows))]),
        )
        for name, _, values in together.present():
            assert np.array_equal(values, getattr(alone, name)), name
