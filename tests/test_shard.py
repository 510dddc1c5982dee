"""Shards: round trip, determinism, and that damage raises instead of giving wrong numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.cache import shard
from kdcache.cache.columns import Numbers, Texts
from kdcache.cache.hdf5 import fletcher32, read_column, write_column
from kdcache.cache.shard import (
    ShardCounts,
    ShardData,
    column_bytes,
    read_shard,
    write_shard,
)
from kdcache.errors import CorruptCacheError
from kdcache.rows import Row
from kdcache.stream import ShardRows, join
from kdcache.targets import Codec, SoftTargets, position_uniform
from kdcache.tasks import IGNORE, SEQUENCE_CLASSIFICATION


def causal_data(lengths: list[int], codec: Codec, seed: int = 0) -> ShardData:
    """Rows of random ids with a few masked labels, and random targets."""
    import torch

    rng = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        stream = rng.integers(0, codec.vocab_size, length + 1).astype(np.int32)
        labels = np.where(rng.random(length) < 0.2, IGNORE, stream[1:]).astype(np.int32)
        rows.append(Row(stream[:-1], labels))
    positions = sum(int((row.labels != IGNORE).sum()) for row in rows)
    logits = torch.from_numpy(rng.normal(size=(positions, codec.vocab_size)) * 3).float()
    u = torch.from_numpy(position_uniform(seed, 0, np.arange(positions), np.zeros(positions, int)))
    packed = codec.pack({name: t.numpy() for name, t in codec.encode(logits, u).items()})
    return ShardData.from_rows("causal-lm", rows, SoftTargets(codec, packed, None))


def equal(a: ShardData, b: ShardData) -> bool:
    """Whether two shards hold the same values."""
    same = all(
        np.array_equal(x, y)
        for x, y in ((a.offsets, b.offsets), (a.input_ids, b.input_ids), (a.labels, b.labels))
    )
    columns = a.targets.columns
    return (
        same
        and all(np.array_equal(columns[n], b.targets.columns[n]) for n in columns)
        and (a.texts, a.text_pairs) == (b.texts, b.text_pairs)
    )


CODECS = [
    Codec.parse(text, (1.0, 2.0), 40) for text in ("dense", "topk:5", "sample:6", "anchored:6")
]


def test_a_classification_shard_keeps_texts_pairs_and_missing_labels(tmp_path: Path) -> None:
    codec = Codec.parse("dense", (1.0,), 3)
    rows = [
        Row(
            np.array([1, 2], np.int32),
            np.array([2], np.int32),
            np.array([0, 1], np.uint8),
            "a é",
            "b",
        ),
        Row(
            np.array([3], np.int32), np.array([IGNORE], np.int32), np.array([0], np.uint8), "", "💡"
        ),
    ]
    targets = SoftTargets(codec, {"logits": np.arange(6, dtype=np.float32).reshape(2, 3)}, None)
    data = ShardData.from_rows("sequence-classification", rows, targets)
    path = tmp_path / "a.h5"
    write_shard(path, data, attributes={})
    again = read_shard(path, codec)
    assert equal(data, again)
    assert again.texts == ["a é", ""]
    assert again.text_pairs == ["b", "💡"]
    assert list(again.labels) == [2, IGNORE]
    row = again.row(1)
    assert (list(row.input_ids), list(row.labels), row.text_pair) == ([3], [IGNORE], "💡")
    assert list(again.position_offsets) == [0, 1, 2]


def test_labels_cost_next_to_nothing_and_sizes_are_reported(tmp_path: Path) -> None:
    data = causal_data([4000] * 4, Codec.parse("topk:2", (1.0,), 40))
    path = tmp_path / "a.h5"
    write_shard(path, data, attributes={})
    sizes = column_bytes(path)
    assert sizes["rows/has_label"] + sizes["rows/next_ids"] < 0.3 * sizes["rows/input_ids"]
    assert sum(sizes.values()) <= path.stat().st_size


def test_chunks_are_what_hdf5_would_read_and_hardly_larger(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 128, (1000, 1027)).astype(np.uint8)  # several chunks, and a part of one
    columns = {
        "codes": rng.geometric(0.3, 600_001).astype(np.uint8),  # more than a chunk, and an odd rest
        "ids": rng.integers(0, 70_000, (99_999, 2)).astype(np.uint32),
        "text": np.frombuffer(b"the same words again and again. " * 999, np.uint8),
        "nothing": np.zeros(1000, np.uint16),
        "states": rng.normal(size=(300, 33)).astype(np.float16),
        # These hardly shrink, so they are stored as they are.
        "one": np.array([255], np.uint8),
        "levels": np.where(rng.random(noise.shape) < 0.8, noise, 127 + noise),
        "words": rng.integers(0, 2**32, (40_000, 5), np.uint32),
    }
    as_they_are = set()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, values in columns.items():
            write_column(file, name, values)
            ours = file[name]
            settings = {"compression": "gzip", "compression_opts": 4, "fletcher32": True}
            theirs = file.create_dataset(
                f"{name}, by HDF5", data=values, chunks=ours.chunks, shuffle=True, **settings
            )
            for dataset in (ours, theirs):
                mask, stored = dataset.id.read_direct_chunk((0,) * values.ndim)
                assert fletcher32(stored[:-4]) == int.from_bytes(stored[-4:], "little")
                as_they_are |= {dataset.name} if mask else set()
            np.testing.assert_array_equal(ours[...], values)
            column = read_column(tmp_path / "a.h5", file, name, (values.dtype.str,), None,
                                 *values.shape[1:])  # fmt: skip
            np.testing.assert_array_equal(column, values)
            sizes = [dataset.id.get_storage_size() for dataset in (ours, theirs)]
            assert sizes[0] <= sizes[1] / (0.95 if ours.name in as_they_are else 1)
        sizes = [file[name].id.get_storage_size() for name in ("codes", "codes, by HDF5")]
    assert as_they_are == {"/one", "/levels", "/words"}
    assert sizes[0] < 0.95 * sizes[1]


@given(
    octets=st.binary(max_size=5000) | st.integers(0, 70_000).map(bytes),
    ends=st.sampled_from([b"", b"\xff", b"\xff\xff", b"\xff" * 140_000]),
)
@settings(max_examples=60, deadline=None)
def test_the_checksum_is_hdf5s_definition(octets: bytes, ends: bytes) -> None:
    first = second = 0
    for high, low in zip(
        *[iter(octets + ends + b"\0" * (len(octets + ends) % 2))] * 2, strict=True
    ):
        first += 256 * high + low
        second += first
    once = [total and (total - 1) % 0xFFFF + 1 for total in (first, second)]
    assert fletcher32(octets + ends) == once[1] << 16 | once[0]


def test_a_flipped_bit_in_any_stored_column_raises(tmp_path: Path) -> None:
    data = causal_data([50] * 20, CODECS[1])
    path = tmp_path / "a.h5"
    write_shard(path, data, attributes={})
    with h5py.File(path, "r", locking=False) as file:
        places = [
            file[name].id.get_chunk_info(0).byte_offset + file[name].id.get_chunk_info(0).size // 2
            for name in column_bytes(path)
        ]
    whole = path.read_bytes()
    assert len(places) >= 6
    for place in places:
        broken = bytearray(whole)
        broken[place] ^= 1
        path.write_bytes(bytes(broken))
        with pytest.raises(CorruptCacheError):
            read_shard(path, CODECS[1])


def test_what_is_not_this_shard_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with pytest.raises(CorruptCacheError, match="missing"):
        read_shard(path, CODECS[0])
    path.write_bytes(b"no hdf5 at all")
    with pytest.raises(CorruptCacheError, match="cannot be read"):
        read_shard(path, CODECS[0])
    with h5py.File(path, "w", locking=False) as file:
        file["x"] = 1
    with pytest.raises(CorruptCacheError, match="not a kdcache shard"):
        read_shard(path, CODECS[0])
    data = causal_data([5], CODECS[1])
    write_shard(path, data, attributes={})
    with pytest.raises(CorruptCacheError, match="codec"):
        read_shard(path, CODECS[0])
    with pytest.raises(CorruptCacheError, match="manifest says"):
        read_shard(path, CODECS[1], counts=ShardCounts(9, 9, 9))


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (10**12, "needs up to 32000000002128 bytes of memory"),  # 2 TB stored, more decoded
        (10**7, "claims 20000000 bytes"),  # little enough for the memory, more than is stored
    ],
)
def test_a_column_that_lies_about_its_length_is_refused_before_it_is_read(
    length: int, message: str, tmp_path: Path
) -> None:
    data = causal_data([5], CODECS[1])
    path = tmp_path / "a.h5"
    write_shard(path, data, attributes={})
    with h5py.File(path, "a", locking=False) as file:
        del file["rows/input_ids"]
        file.create_dataset(
            "rows/input_ids",
            shape=(length,),
            dtype="u2",
            chunks=(1 << 18,),
            compression="gzip",
            shuffle=True,
            fletcher32=True,
        )
    with pytest.raises(CorruptCacheError, match=message):
        read_shard(path, CODECS[1])


# A column is declared once: all that reads, writes and picks rows follows


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


@pytest.fixture
def dated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "ShardData", DatedShard)
    monkeypatch.setattr(shard, "Row", DatedRow)


DATED = Codec.parse("dense", (1.0,), 2)


def dated_rows(years: list[int | None]) -> shard.ShardData:
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
    targets = SoftTargets(DATED, {"logits": logits})
    return DatedShard.from_rows(SEQUENCE_CLASSIFICATION, rows, targets)


def test_a_new_column_is_stored_read_picked_and_joined(tmp_path: Path, dated: None) -> None:
    shard.write_shard(tmp_path / "a.h5", dated_rows([1999, 2001, 2026]), attributes={})
    assert {"rows/years", "rows/place", "rows/place_bytes"} <= set(
        shard.column_bytes(tmp_path / "a.h5")
    )
    data = shard.read_shard(tmp_path / "a.h5", DATED)
    assert isinstance(data, DatedShard)
    assert data.years is not None
    assert (data.years.dtype, data.years.tolist()) == (np.uint16, [1999, 2001, 2026])
    row = data.row(1)
    assert isinstance(row, DatedRow)
    assert (row.year, row.place, row.text) == ([2001], "in 2001", "text 1")
    without = dated_rows([None, None])
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
    tmp_path: Path, dated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard.write_shard(tmp_path / "a.h5", dated_rows([1999]), attributes={})
    with shard.h5py.File(tmp_path / "a.h5", "a") as file:
        del file["rows/place_bytes"]
    with pytest.raises(CorruptCacheError, match="has no column place_bytes"):
        shard.read_shard(tmp_path / "a.h5", DATED)
    monkeypatch.undo()  # and to a reader that does not know it, a column is one too many
    with pytest.raises(CorruptCacheError, match="has the columns"):
        shard.read_shard(tmp_path / "a.h5", DATED)


def test_runs_of_neighbours_are_picked_as_single_rows_are(dated: None) -> None:
    parts = [dated_rows(years) for years in ([1, 2, 3, 4], [None], [], [5, 6, 7, 8, 9])]
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
