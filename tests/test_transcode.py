"""Transcoding: another codec of a cache without its teacher, against the build that had one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broken_caches import files
from conftest import further, make_tiny_lm
from make_caches import CAUSAL, make_cache
from small_runs import StopError

from kdcache.cache import Cache
from kdcache.cache.check import problems
from kdcache.cache.shard import ShardData
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.inspect import inspect
from kdcache.commands.options import InspectOptions, TranscodeOptions
from kdcache.commands.transcode import transcode
from kdcache.errors import CorruptCacheError, IncompleteError, UsageError
from kdcache.targets import DenseTargets, Targets

pytestmark = pytest.mark.slow

SHAPE = {"max_length": 48, "limit": 60, "shard_tokens": 600, "workers": 0}


def options(cache: str, codec: str, out: Path, *temperatures: float, **more: Any) -> Any:
    return TranscodeOptions(
        cache=cache, codec=codec, out=str(out), temperatures=temperatures, **{"workers": 0} | more
    )


@pytest.fixture(scope="module")
def dense(tiny_lm: Path, text_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dense cache of a few shards. To be read only."""
    out = str(tmp_path_factory.mktemp("dense") / "cache")
    build(BuildOptions((str(tiny_lm),), (str(text_corpus),), out, codec="dense", **SHAPE))
    return out


def direct(dense: str, codec: str, out: Path, tiny_lm: Path, corpus: Path, *at: float) -> Cache:
    """The cache that the teacher makes."""
    names = (str(tiny_lm),), (str(corpus),), str(out)
    build(BuildOptions(*names, codec=codec, temperatures=at, **SHAPE))
    assert Cache.open(dense).spec.spans == Cache.open(str(out)).spec.spans > 2
    return Cache.open(str(out))


def same_rows(one: ShardData, other: ShardData) -> None:
    for name in ("offsets", "input_ids", "labels", "label_logprob", "type_ids"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        assert a is None or np.array_equal(a, b), name
    assert (one.texts, one.text_pairs) == (other.texts, other.text_pairs)


def spread(targets: Targets, width: int) -> torch.Tensor:
    """What targets give each id, [n, V]."""
    assert not isinstance(targets, DenseTargets)
    sums = torch.zeros(len(targets), width, dtype=torch.float64)
    return sums.scatter_add_(1, targets.ids, targets.weights.double())


# What is made


@pytest.mark.parametrize(
    ("codec", "temperatures"),
    [("sample:20", (1.0, 2.0)), *further(("sample:3", (4.0,)))],
)
def test_from_dense_it_is_what_the_teacher_would_have_made(
    codec: str, temperatures: tuple[float, ...], dense: str, tiny_lm: Path, text_corpus: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "new"
    result = transcode(options(dense, codec, out, *temperatures))
    want = direct(dense, codec, tmp_path / "direct", tiny_lm, text_corpus, *temperatures)
    got, source = Cache.open(str(out)), Cache.open(dense)
    assert (result.made, result.positions) == (got.spec.spans, source.manifest.positions)
    assert list(problems(got)) == []
    for span in range(got.spec.spans):
        new, old, direct_one = (cache.read(span) for cache in (got, source, want))
        same_rows(new, old)
        same_rows(new, direct_one)
        for temperature in temperatures:
            here, there = (d.targets.at(temperature) for d in (new, direct_one))
            assert torch.equal(*(spread(t, got.spec.vocab_size) for t in (here, there)))
    # What the cache should hold: the same, of that source.
    facts = dict.fromkeys(("source", "ranks"))
    assert dataclasses.replace(got.spec, **facts) == dataclasses.replace(want.spec, **facts)
    assert got.spec.source == {"codec": "dense", "digest": source.digest}
    assert got.notes["source"] == source.url
    assert got.notes["teachers"] == source.notes["teachers"]
    entries = zip(got.manifest.shards, source.manifest.shards, strict=True)
    for one, other in entries:
        for name in ("skipped", "clipped_mass", "label_nats", "impossible_labels"):
            assert getattr(one, name) == getattr(other, name)


def test_a_classifiers_logits_are_sampled(
    class_cache: str, tmp_path: Path, tiny_classifier: Path, labelled_corpus: Path
) -> None:
    transcode(options(class_cache, "sample:2", tmp_path / "sample", 2.0))
    build(
        BuildOptions(
            (str(tiny_classifier),), (str(labelled_corpus),), str(tmp_path / "direct"),
            task="sequence-classification", codec="sample:2", temperatures=(2.0,), max_length=64,
            workers=0,
        )
    )  # fmt: skip
    sample, direct = (Cache.open(str(tmp_path / name)).read(0) for name in ("sample", "direct"))
    same_rows(sample, direct)
    for name, column in direct.targets.columns.items():
        assert np.array_equal(sample.targets.columns[name], column), name


def test_top_k_becomes_fewer_with_what_it_leaves_in_the_tail(
    lm_caches: dict[str, str], tmp_path: Path
) -> None:
    source = Cache.open(lm_caches["topk:8"])
    transcode(options(source.url, "topk:3", tmp_path / "new", 2.0))
    new = Cache.open(str(tmp_path / "new"))
    assert list(problems(new)) == []
    assert (new.spec.codec, new.spec.temperatures) == ("topk:3", (2.0,))
    assert new.spec.ranks == source.spec.ranks
    one, other = source.read(0), new.read(0)
    same_rows(one, other)
    was, now = (data.targets.at(2.0) for data in (one, other))
    assert not isinstance(was, DenseTargets)
    assert not isinstance(now, DenseTargets)
    assert torch.equal(now.ids, was.ids[:, :3])
    torch.testing.assert_close(now.weights, was.weights[:, :3], rtol=0.06, atol=1e-7)
    torch.testing.assert_close(now.tail + now.weights.sum(-1), torch.ones(len(now)))
    # Of the whole, not only of what was known before.
    transcode(options(source.url, "topk:8", tmp_path / "same"))
    same = Cache.open(str(tmp_path / "same")).read(0).targets
    for name, column in one.targets.columns.items():
        assert np.array_equal(same.columns[name], column), name


def test_a_transcoded_cache_can_be_transcoded(dense: str, tmp_path: Path) -> None:
    transcode(options(dense, "topk:20", tmp_path / "a", 1.0, 2.0))
    transcode(options(str(tmp_path / "a"), "topk:5", tmp_path / "b"))
    a, b = (Cache.open(str(tmp_path / name)) for name in "ab")
    assert b.spec.source == {"codec": "topk:20", "digest": a.digest}
    assert b.spec.temperatures == (1.0, 2.0)
    assert b.notes["teachers"] == Cache.open(dense).notes["teachers"]
    facts = dict(inspect(InspectOptions(b.url)).facts())
    assert facts["transcoded from"] == f"topk:20 ({a.digest})"


def test_a_mean_of_teachers_stays_at_its_temperature(
    small_build: BuildOptions, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    other = make_tiny_lm(tiny_tokenizer, tmp_path / "second", seed=5)
    both = dataclasses.replace(
        small_build, teacher=(*small_build.teacher, str(other)), limit=6, max_length=48,
        codec="dense", temperatures=(2.0,),
    )  # fmt: skip
    build(both)
    with pytest.raises(UsageError, match="temperature 1 is not declared"):
        transcode(options(both.out, "sample:5", tmp_path / "wrong", 1.0))
    transcode(options(both.out, "sample:5", tmp_path / "new"))
    direct = dataclasses.replace(both, codec="sample:5", out=str(tmp_path / "direct"))
    build(direct)
    one, two = (Cache.open(str(tmp_path / n)).read(0) for n in ("new", "direct"))
    same_rows(one, two)
    assert torch.equal(*(spread(d.targets.at(2.0), 300) for d in (one, two)))


def test_from_hidden_states_rounding_moves_few_entries(
    stories260k: Path, corpus_texts: list[str], tmp_path: Path
) -> None:
    corpus = tmp_path / "text.jsonl"
    corpus.write_text("".join(json.dumps({"text": t}) + "\n" for t in corpus_texts[:200]))
    names = (str(stories260k),), (str(corpus),)
    common: Any = {"max_length": 128, "workers": 0}
    build(BuildOptions(*names, str(tmp_path / "hidden"), codec="hidden:float16", **common))
    build(BuildOptions(*names, str(tmp_path / "direct"), codec="sample:10", **common))
    transcode(options(str(tmp_path / "hidden"), "sample:10", tmp_path / "new"))
    new, want = (Cache.open(str(tmp_path / name)) for name in ("new", "direct"))
    assert new.spec.output_layer is None
    assert [p.text for p in problems(new)] == []
    one, two = new.read(0), want.read(0)
    same_rows(one, two)
    a, b = (spread(d.targets.at(1.0), new.spec.vocab_size) for d in (one, two))
    # Measured on novels: 97.9 % of positions, 99.7 % of entries, 0.002 of the mass.
    assert (a == b).all(-1).double().mean() > 0.96
    assert ((a > 0) != (b > 0)).sum() < 0.02 * (b > 0).sum()
    assert (a - b).abs().sum(-1).mean() / 2 < 0.004


# What is refused


@pytest.mark.parametrize(
    ("source", "codec", "temperatures", "words"),
    [
        ("sample:4", "topk:2", (), "draws from the teacher's distributions"),
        ("sample:4", "sample:2", (), "draws from the teacher's distributions"),
        ("topk:4", "topk:5", (), "only topk of 4 ids or fewer"),
        ("topk:4", "sample:5", (), "only topk of 4 ids or fewer"),
        ("topk:4", "topk:2", (4.0,), "temperature 4 is not declared"),
        ("dense", "nonsense", (), "codec 'nonsense' is not known"),
        ("dense", "hidden:int8", (), "no cache's logits determine"),
    ],
)
def test_targets_that_do_not_determine_the_new_ones_are_refused(
    source: str, codec: str, temperatures: tuple[float, ...], words: str, tmp_path: Path
) -> None:
    cache = make_cache(tmp_path / "cache", [5], task=CAUSAL, codec=source)
    out = tmp_path / "new"
    with pytest.raises(UsageError, match=words) as error:
        transcode(options(cache.url, codec, out, *temperatures))
    assert "\n" not in str(error.value)
    assert not out.exists()


def test_an_unfinished_or_damaged_source_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    make_cache(folder, [5, 4], task=CAUSAL)
    (shard, *_) = sorted((folder / "shards").iterdir())
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(CorruptCacheError, match="bytes, the manifest says"):
        transcode(options(str(folder), "topk:4", tmp_path / "new"))
    shard.write_bytes(whole)
    assert transcode(options(str(folder), "topk:4", tmp_path / "new")).made >= 1
    (folder / "manifest.json").unlink()
    with pytest.raises(IncompleteError, match="has not finished"):
        transcode(options(str(folder), "topk:4", tmp_path / "more"))


def test_another_source_or_codec_does_not_continue_it(tmp_path: Path) -> None:
    out = tmp_path / "new"
    one = make_cache(tmp_path / "one", [5, 4], task=CAUSAL)
    other = make_cache(tmp_path / "other", [5, 4], task=CAUSAL, first=30)
    transcode(options(one.url, "topk:4", out))
    for source, codec, words in (
        (other, "topk:4", "source.digest: "),
        (one, "topk:3", "codec: "),
    ):
        with pytest.raises(UsageError, match=words):
            transcode(options(source.url, codec, out))
    assert transcode(options(one.url, "topk:4", out)).made == 0


# Stopped


def kept(folder: Path) -> dict[str, bytes]:
    """The cache's own files."""
    found = files(folder)
    return {n: d for n, d in found.items() if not n.startswith(("events", "tmp/"))}


def test_an_interruption_and_a_lost_shard_are_made_good(
    dense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = options(dense, "sample:6", tmp_path / "plain")
    transcode(plain)
    assert not caplog.messages, "its receipts have a folder"
    stopped = dataclasses.replace(plain, out=str(tmp_path / "stopped"))
    read, done = Cache.read, []

    def once(cache: Cache, span: int, **rest: Any) -> ShardData:
        done.append(span)
        if len(done) == 3:
            raise KeyboardInterrupt
        return read(cache, span, **rest)

    with monkeypatch.context() as patched:
        patched.setattr(Cache, "read", once)
        with pytest.raises((IncompleteError, KeyboardInterrupt, StopError)):
            transcode(stopped)
    result = transcode(stopped)
    assert result.made >= 1
    assert kept(tmp_path / "stopped") == kept(tmp_path / "plain")
    min((tmp_path / "stopped" / "shards").iterdir()).unlink()
    assert transcode(stopped).made == 1
    assert kept(tmp_path / "stopped") == kept(tmp_path / "plain")
