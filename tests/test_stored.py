"""A dataset as a corpus: its rows as they are, written once, found again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from at_once import at_each_moment

import kdcache
from kdcache.cache import Cache
from kdcache.commands.build.options import BuildOptions
from kdcache.corpus import Corpus
from kdcache.corpus.stored import stored
from kdcache.domains import Named
from kdcache.errors import UsageError


class FakeDataset:
    """As much of a `Dataset`, and of an `IterableDataset`, as is asked for."""

    def __init__(self, rows: list[dict[str, Any]], format: str = "python") -> None:
        self.rows, self.format = rows, format
        self.column_names = list(rows[0]) if rows else []

    def with_format(self, format: str) -> FakeDataset:
        return FakeDataset(self.rows, format)

    def iter(self, batch_size: int) -> Iterator[pa.Table]:
        assert self.format == "arrow", "Python objects would be slow"
        for first in range(0, len(self.rows), batch_size):
            yield pa.Table.from_pylist(self.rows[first : first + batch_size])


def rows(count: int) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", "ids": [i, i + 1]} for i in range(count)]


def read(patterns: tuple[str, ...]) -> list[dict[str, Any]]:
    corpus = Corpus.open(patterns, span_bytes=1 << 20)
    found = [record.values for span in corpus.spans for record in Corpus.read(span)]
    return [{**values, "ids": values["ids"].tolist()} for values in found]


def test_rows_are_written_in_files_of_a_size_and_only_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcache.corpus.stored._FILE_BYTES", 30_000)
    out = str(tmp_path / "cache")
    patterns = stored([FakeDataset(rows(2500))], out)
    files = sorted((tmp_path / "cache.corpus" / "0").iterdir())
    assert len(files) == 3
    assert read(patterns) == rows(2500)
    times = [path.stat().st_mtime_ns for path in files]
    assert stored([FakeDataset(rows(2500))], out) == patterns
    assert [path.stat().st_mtime_ns for path in files] == times
    assert stored(["a.jsonl", FakeDataset(rows(7))], out)[0] == "a.jsonl"
    assert stored([Named("web", FakeDataset(rows(7)))], out) == (Named("web", *patterns),)
    assert read(patterns) == rows(7)
    assert sorted(path.name for path in (tmp_path / "cache.corpus").iterdir()) == ["0", "1"]


def test_parts_that_begin_at_once_find_the_same_files(tmp_path: Path) -> None:
    place = tmp_path / "place"

    def write() -> object:
        return stored([FakeDataset(rows(3))], str(place / "cache"))

    waited = 0
    for both in at_each_moment(place, write, write):
        assert read(both.first) == rows(3), both
        assert both.second in (None, both.first), both
        waited += both.second is None
    assert waited >= 2


def test_a_pass_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    class Broken(FakeDataset):
        def with_format(self, format: str) -> FakeDataset:
            return Broken(self.rows, format)

        def iter(self, batch_size: int) -> Iterator[pa.Table]:
            yield from super().iter(batch_size)
            raise RuntimeError("the network is gone")

    patterns = stored([FakeDataset(rows(3))], str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match="network"):
        stored([Broken(rows(9))], str(tmp_path / "cache"))
    assert read(patterns) == rows(3)
    assert [path.name for path in (tmp_path / "cache.corpus").iterdir()] == ["0"]


def test_what_is_no_dataset_is_refused() -> None:
    class Dictionary(dict):  # type: ignore[type-arg]
        @property
        def column_names(self) -> dict[str, list[str]]:
            return {name: ["text"] for name in self}

    with pytest.raises(UsageError, match=r"train, test. Choose one, such as corpus=dataset\['tr"):
        stored([Dictionary(train=1, test=2)], "cache")
    with pytest.raises(UsageError, match="the corpus is a int; expected names of files"):
        stored([3], "cache")
    with pytest.raises(UsageError, match="this place is not on this machine"):
        stored([FakeDataset(rows(1))], "s3://bucket/cache")
    with pytest.raises(UsageError, match="`build` alone takes a dataset"):
        Corpus.open([FakeDataset(rows(1))], span_bytes=1)  # type: ignore[list-item]


@pytest.mark.end_to_end
def test_a_build_of_a_dataset_is_the_build_of_its_rows(
    small_build: BuildOptions, corpus_texts: list[str], tmp_path: Path
) -> None:
    dataset: Any = FakeDataset([{"text": text} for text in corpus_texts[:20]])
    options = replace(small_build, corpus=dataset, codec="topk:4")
    first = kdcache.build(options)
    assert (first.rows > 0, kdcache.build(options).made) == (True, 0)
    files = replace(options, corpus=(f"{options.out}.corpus",), out=str(tmp_path / "files"))
    kdcache.build(files)
    assert Cache.open(options.out).digest == Cache.open(files.out).digest


def test_real_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(rows(9))
    for dataset in (
        made.select([8, 2]),
        made.to_iterable_dataset().filter(lambda r: r["ids"][0] == 4),
    ):
        assert read(stored([dataset], str(tmp_path / "cache"))) == list(dataset)
