"""inspect against the cache itself and the teacher's own forward."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from conftest import CLASSES, built
from textbook import class_logits, lm_logits, logprobs_of, plain
from transformers import AutoTokenizer

from kdcache.cache import Cache
from kdcache.cache import cache as cache_module
from kdcache.cli.views import render_inspection
from kdcache.commands.inspect import inspect
from kdcache.commands.options import InspectOptions
from kdcache.errors import UsageError
from kdcache.storage.disk import DiskCache
from kdcache.tasks import IGNORE

inspection = sys.modules[inspect.__module__]


@pytest.mark.parametrize("finished", [True, False])
def test_no_copy_is_evicted_while_it_is_read(
    finished: bool,
    lm_caches: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whenever a shard is about to be read, another process makes room for files of its own."""
    monkeypatch.setenv("KDCACHE_DISK", str(tmp_path))
    url = f"memory://{tmp_path.name}/cache"
    fsspec.filesystem("memory").put(lm_caches["topk:8"], url, recursive=True)
    if not finished:
        fsspec.filesystem("memory").rm(f"{url}/manifest.json")
    evictions: list[str] = []

    def after_evicting(read: Any) -> Any:
        def call(path: Path, *args: Any, **options: Any) -> Any:
            evictions.append(path.name)
            fresh = (19_999_999, lambda file: None)  # as large as the bound
            DiskCache(tmp_path, 20_000_000).bring(f"{len(evictions)}", lambda: fresh)
            return read(path, *args, **options)

        return call

    places = (
        (inspection, "column_bytes"),
        (cache_module, "read_shard"),
        (cache_module, "read_counts"),
    )
    for module, name in places:
        monkeypatch.setattr(module, name, after_evicting(getattr(module, name)))
    assert inspect(InspectOptions(url, row=2)).row is not None
    assert len(evictions) >= (2 if finished else 3)
    fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize("codec", ["dense", "topk:8", "sample:20"])
def test_inspection_counts_what_is_there(codec: str, lm_caches: dict[str, str]) -> None:
    cache = Cache.open(lm_caches[codec])
    result = inspect(InspectOptions(lm_caches[codec]))
    manifest = cache.manifest
    assert result.finished
    assert (result.rows, result.tokens, result.positions, result.bytes) == (
        manifest.rows,
        manifest.tokens,
        manifest.positions,
        manifest.bytes,
    )
    assert result.bytes_per_position is not None
    assert result.bytes_per_position == pytest.approx(manifest.bytes / manifest.positions)
    assert result.target_bytes_per_position is not None
    assert result.target_bytes_per_position < result.bytes_per_position
    names = {f"targets/{column.name}" for column in cache.codec().columns}
    assert names <= {column.name for column in result.columns}
    sizes = [column.bytes_per_position for column in result.columns]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) <= result.bytes_per_position
    assert result.temperatures == (1.0, 2.0)
    assert result.digest == cache.digest
    assert json.loads(json.dumps(dataclasses.asdict(result), allow_nan=False))["codec"] == codec
    text = plain(render_inspection, result)
    assert f"{manifest.positions:,}" in text
    assert result.fingerprint in text


@pytest.mark.parametrize(
    ("codec", "temperature"), [("dense", 2.0), ("topk:8", 1.0), ("sample:20", 2.0)]
)
def test_a_row_shows_the_teachers_best_guesses(
    codec: str, temperature: float, lm_caches: dict[str, str], tiny_lm: Path
) -> None:
    result = inspect(InspectOptions(lm_caches[codec], row=2, temperature=temperature, top=3))
    view = result.row
    assert view is not None
    data = Cache.open(lm_caches[codec]).read(0)
    row = data.row(2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    assert view.text == tokenizer.decode(row.input_ids.tolist())
    assert "".join(p.token or "" for p in view.positions) == view.text
    assert len(view.positions) == (row.labels != IGNORE).sum()
    assert [p.label for p in view.positions] == row.labels.tolist()
    logits, _ = lm_logits(tiny_lm, lm_caches[codec])
    q = np.exp(logprobs_of(logits, temperature))[data.position_offsets[2] :]
    assert view.exact == (codec != "sample:20")
    for position, p in zip(view.positions, q, strict=False):
        shown = [guess.probability for guess in position.guesses]
        assert shown == sorted(shown, reverse=True)
        assert len({guess.id for guess in position.guesses}) == len(shown) <= 3
        if view.exact:
            assert [guess.id for guess in position.guesses] == np.argsort(-p)[:3].tolist()
            np.testing.assert_allclose(shown, np.sort(p)[::-1][:3], atol=0.01)
            assert position.rest == pytest.approx(1 - np.sort(p)[::-1][:3].sum(), abs=0.02)
    text = plain(render_inspection, result)
    assert f"Row 2 (shard 0, {view.tokens} tokens), T = {temperature:g}" in text
    assert repr(view.positions[0].token) in text


def test_a_classified_row(class_cache: str, tiny_classifier: Path) -> None:
    z = class_logits(tiny_classifier, class_cache)
    data = Cache.open(class_cache).read(0)
    assert data.texts is not None
    for number in (3, 4):
        view = inspect(InspectOptions(class_cache, row=number, temperature=5.0)).row
        assert view is not None
        assert view.text == data.texts[number]
        (position,) = view.positions
        label = data.labels[number]
        assert position.label_text == (None if label == IGNORE else CLASSES[label])
        found = {guess.text: guess.probability for guess in position.guesses}
        want = np.exp(logprobs_of(z, 5.0))[number]
        assert found == pytest.approx(dict(zip(CLASSES, want, strict=True)), abs=1e-5)
        assert position.rest == pytest.approx(0, abs=1e-9)
    result = inspect(InspectOptions(class_cache, row=3))
    assert data.texts[3] in plain(render_inspection, result)


@pytest.fixture(scope="module")
def many_shards(
    tiny_classifier: Path, labelled_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Cache:
    """A classification cache of several shards. To be read only."""
    given = {"task": "sequence-classification", "shard_tokens": 1024}
    out = tmp_path_factory.mktemp("many") / "cache"
    cache = Cache.open(built(tiny_classifier, labelled_corpus, out, **given))
    assert cache.spec.spans > 3
    return cache


@pytest.mark.slow
def test_rows_are_found_across_shards(many_shards: Cache, class_cache: str) -> None:
    texts = Cache.open(class_cache).read(0).texts
    assert texts is not None
    first = many_shards.manifest.shards[0].rows
    for number in (0, first - 1, first, 120, 199):
        view = inspect(InspectOptions(many_shards.url, row=number)).row
        assert view is not None
        assert view.text == texts[number]
        assert (view.shard == 0) == (number < first)


@pytest.mark.slow
def test_an_unfinished_cache_shows_what_it_has(many_shards: Cache, tmp_path: Path) -> None:
    url, shards = str(tmp_path / "copy"), many_shards.manifest.shards
    shutil.copytree(many_shards.url, url)
    gone = shards[1]
    want = inspect(InspectOptions(url, row=199)).row
    assert want is not None
    Path(url, "manifest.json").unlink()
    Path(url, "shards", gone.name).unlink()
    last = 199 - gone.rows
    result = inspect(InspectOptions(url, row=last))
    assert (result.finished, result.done, result.spans) == (False, len(shards) - 1, len(shards))
    assert result.rows == 200 - gone.rows
    assert result.bytes == sum(shard.bytes for shard in shards) - gone.bytes
    assert result.digest is None
    assert result.row == dataclasses.replace(want, row=last)
    text = plain(render_inspection, result)
    assert f"unfinished: {len(shards) - 1} of {len(shards)} shards" in text
    with pytest.raises(UsageError, match=f"unfinished cache has so far {result.rows} rows"):
        inspect(InspectOptions(url, row=result.rows))
    for path in Path(url, "shards").iterdir():
        path.unlink()
    empty = inspect(InspectOptions(url))
    assert (empty.done, empty.bytes_per_position, empty.columns) == (0, None, ())
    assert "unfinished: 0 of" in plain(render_inspection, empty)


def test_wrong_inspections(tmp_path: Path, lm_caches: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="not a kdcache cache"):
        inspect(InspectOptions(str(tmp_path)))
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(UsageError, match="is the folder of a model, not of a cache"):
        inspect(InspectOptions(str(tmp_path)))
    rows = Cache.open(lm_caches["topk:8"]).manifest.rows
    with pytest.raises(UsageError, match=f"the cache has {rows} rows, numbered from 0"):
        inspect(InspectOptions(lm_caches["topk:8"], row=rows))
    with pytest.raises(UsageError, match="temperature 4 is not declared"):
        inspect(InspectOptions(lm_caches["topk:8"], row=0, temperature=4.0))
