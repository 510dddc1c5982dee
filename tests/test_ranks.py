"""Frequency ranks: counted once by the driver, stored once in the cache, seen by no student."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from kdcache.cache import Cache
from kdcache.cache.check import problems
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.build.prepare import count_ranks
from kdcache.corpus import Corpus
from kdcache.errors import CorruptCacheError, UsageError
from kdcache.rows import RowSpec
from kdcache.stream import TargetStream
from kdcache.targets import AnchoredTargets, Codec, SoftTargets, SparseTargets, position_uniform
from kdcache.targets.soft import ranks_of_ids, read_ranks

pytestmark = pytest.mark.slow


def dense(targets: SoftTargets, temperature: float) -> Tensor:
    """Weights of all ids, [positions, V]."""
    sparse = targets.at(temperature)
    assert isinstance(sparse, SparseTargets)
    full = torch.zeros(len(sparse), targets.codec.vocab_size, dtype=torch.float64)
    return full.scatter_add_(1, sparse.ids, sparse.weights.double())


def encoded(codec: Codec, n: int, seed: int = 0) -> dict[str, np.ndarray]:
    logits = 2 * torch.randn(n, codec.vocab_size, generator=torch.Generator().manual_seed(seed))
    u = torch.from_numpy(position_uniform(seed, 0, np.arange(n), 0))
    return {k: v.numpy() for k, v in codec.encode(logits, u).items()}


@pytest.fixture
def options(small_build: BuildOptions) -> BuildOptions:
    return dataclasses.replace(
        small_build,
        codec="sample:6",
        temperatures=(1.0, 2.0),
        max_length=64,
        shard_tokens=3000,
    )


def test_a_build_ranks_the_ids_of_its_corpus(options: BuildOptions, tiny_tokenizer: Path) -> None:
    build(options)
    cache = Cache.open(options.out)
    table = cache.rank_to_id
    assert table is not None
    assert sorted(table) == list(range(300))
    labels = np.concatenate([cache.read(s).labels for s in range(cache.spec.spans)])
    counts = np.bincount(labels[labels >= 0], minlength=300)
    # Counted on a part of the corpus: the most frequent ids are at the front all the same.
    assert counts[table[:50]].sum() > 0.9 * np.sort(counts)[::-1][:50].sum()
    again = count_ranks(
        Corpus.open(options.corpus, span_bytes=12_000),
        RowSpec("causal-lm", max_length=64),
        AutoTokenizer.from_pretrained(tiny_tokenizer),
        300,
    )
    assert again == (Path(options.out) / "ranks.u32").read_bytes()


def test_targets_are_those_of_a_build_without_ranks(
    options: BuildOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for codec in ("sample:6", "topk:8"):
        ranked = dataclasses.replace(options, codec=codec, out=str(tmp_path / f"ranked-{codec}"))
        plain = dataclasses.replace(ranked, out=str(tmp_path / f"plain-{codec}"))
        build(ranked)
        with monkeypatch.context() as patch:
            patch.setattr("kdcache.commands.build.prepare.count_ranks", lambda *_: b"")
            build(plain)
        one, two = Cache.open(ranked.out), Cache.open(plain.out)
        assert one.rank_to_id is not None
        assert two.rank_to_id is None
        assert "ranks" not in json.loads((Path(plain.out) / "spec.json").read_text())["spec"]
        for temperature in (1.0, 2.0):
            left, right = (dense(c.read(1).targets, temperature) for c in (one, two))
            torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_caches_of_different_ranks_are_mixed(
    options: BuildOptions, corpus_texts: list[str], tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    lines = [json.dumps({"text": text.upper()}) for text in corpus_texts[200:260]]
    other.write_text("\n".join(lines) + "\n")
    build(options)
    second = dataclasses.replace(options, corpus=(str(other),), out=str(tmp_path / "second"))
    build(second)
    caches = [Cache.open(o.out) for o in (options, second)]
    assert caches[0].spec.ranks != caches[1].spec.ranks
    want = torch.zeros(300, dtype=torch.float64)
    for cache in caches:
        for span in range(cache.spec.spans):
            want += dense(cache.read(span).targets, 2.0).sum(0)
    got = torch.zeros(300, dtype=torch.float64)
    for batch in TargetStream(caches, batch_size=7, seed=0, temperature=2.0):
        targets = batch["targets"]
        got.scatter_add_(0, targets.ids.flatten(), targets.weights.flatten().double())
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("text", ["sample:5", "sample:40", "anchored:5", "topk:7"])
@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 2.0, 4.0)])
def test_renumbered_columns_are_those_of_a_pack_without_ranks(
    text: str, temperatures: tuple[float, ...]
) -> None:
    codec = Codec.parse(text, temperatures, 700)
    raw = encoded(codec, 40)
    ids = np.random.default_rng(0).permutation(700)
    ranked = SoftTargets(codec, codec.pack(raw, ranks_of_ids(ids)), ids)
    plain = ranked.plain()
    assert plain.rank_to_id is None
    want = codec.pack(raw)
    sums: list[Tensor] = []
    for column in codec.columns:
        assert plain.columns[column.name].dtype == column.dtype
        np.testing.assert_array_equal(plain.columns[column.name].shape, want[column.name].shape)
    for t in temperatures:
        # Two entries of one id are added in either order.
        torch.testing.assert_close(dense(plain, t), dense(ranked, t), rtol=1e-12, atol=1e-12)
        if codec.kind == "anchored":
            for one in (plain, ranked):
                found = one.at(t)
                assert isinstance(found, AnchoredTargets)
                sums.append(torch.zeros(40, 700).scatter_add_(1, found.ids, found.inverse))
    for got in sums[1:]:
        torch.testing.assert_close(got, sums[0])
    joined = SoftTargets.concat([ranked, SoftTargets(codec, want)])
    assert torch.allclose(dense(joined, 1.0), dense(ranked, 1.0).repeat(2, 1), atol=1e-12)


def test_small_vocabularies_and_dense_targets_have_no_ranks(options: BuildOptions) -> None:
    assert not Codec.parse("sample:5", (1.0,), 256).uses_ranks
    assert not Codec.parse("dense", (1.0,), 50_000).uses_ranks
    build(dataclasses.replace(options, codec="dense"))
    assert not (Path(options.out) / "ranks.u32").exists()


def test_a_damaged_table_is_refused(options: BuildOptions) -> None:
    build(options)
    path = Path(options.out) / "ranks.u32"
    good = path.read_bytes()
    path.write_bytes(good[4:8] + good[:4] + good[8:])
    with pytest.raises(CorruptCacheError, match=r"ranks\.u32: sha256 is"):
        Cache.open(options.out).read(0)
    assert any("ranks.u32" in p.text for p in problems(Cache.open(options.out)))
    path.unlink()
    with pytest.raises(CorruptCacheError, match="missing"):
        Cache.open(options.out).read(0)
    for wrong in (good[:-1], good[:4] * 2, np.array([300], "<u4").tobytes()):
        with pytest.raises(CorruptCacheError, match="different ids below 300"):
            read_ranks(wrong, 300)


def test_a_corpus_that_ranks_otherwise_is_another_cache(
    options: BuildOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(options)
    monkeypatch.setattr(
        "kdcache.commands.build.prepare.count_ranks", lambda *_: np.arange(5).tobytes()
    )
    with pytest.raises(UsageError, match="ranks: "):
        build(options)
