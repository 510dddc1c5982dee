"""Every codec: what is stored, what a student gets back against float64, and what no batch, file,
order or numbering of ids may change.

A new codec is an entry of `CODECS`; other files test what only one of them has. Codecs of hidden
states are given logits as states, and the identity as their output layer.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from conftest import further
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from unbiased import excess

from kdcache.cache.shard import ShardCounts, ShardData, read_counts, read_shard, write_shard
from kdcache.errors import KdcacheError, UsageError
from kdcache.rows import Row
from kdcache.targets import (
    Codec,
    Hidden,
    OutputLayer,
    Sample,
    SoftTargets,
    TargetWriter,
    position_uniform,
)
from kdcache.tasks import CAUSAL_LM

CODECS = {
    "dense": 1e-12,
    "dense:float16": 1e-5,
    "hidden:float16": 1e-5,
    "hidden:bfloat16": 1e-3,
    "hidden:int8": 1e-3,
    "topk:1": None,
    "topk:7": None,
    "topk:5000": None,
    "sample:1": None,
    "sample:9": None,
    "anchored:9": None,
}
"""KL from the teacher to what comes back, at most; None: a part of the distribution is stored."""
TEMPERATURES = st.sets(st.sampled_from([0.5, 1.0, 1.5, 2.0, 4.0]), min_size=1, max_size=3)


def make_logits(n: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    z = torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale
    z[::4, vocabulary // 2] += 10
    return z


def codec_of(text: str, temperatures: Any, vocabulary: int) -> Codec:
    codec = Codec.parse(text, temperatures, vocabulary)
    if not isinstance(codec, Hidden):
        return codec
    layer = OutputLayer(torch.eye(vocabulary))
    return codec.with_layer(
        layer.with_channels(torch.zeros(vocabulary), 3 * torch.ones(vocabulary))
    )


def make(
    codec: Codec, logits: Tensor, u: Tensor | None = None, ids: np.ndarray | None = None
) -> SoftTargets:
    """Encode and pack; `ids` is the id of each rank."""
    uniforms = torch.from_numpy(position_uniform(0, 0, np.arange(len(logits)), 0))
    return TargetWriter(codec, ids).write(logits, uniforms if u is None else u)


def probabilities(targets: Any, vocabulary: int) -> Tensor:
    """What targets give each id, [n, V] in float64."""
    if hasattr(targets, "dense"):
        targets = targets.dense()
    if hasattr(targets, "logits"):
        found: Tensor = (targets.logits.double() / targets.temperature).softmax(-1)
        return found
    whole = torch.zeros(len(targets), vocabulary, dtype=torch.float64)
    return whole.scatter_add_(1, targets.ids, targets.weights.double())


def assert_same(a: SoftTargets, b: SoftTargets) -> None:
    assert a.columns.keys() == b.columns.keys()
    for name in a.columns:
        np.testing.assert_array_equal(a.columns[name], b.columns[name], err_msg=name)
        assert a.columns[name].dtype == b.columns[name].dtype


def test_each_kind_of_codec_is_here() -> None:
    assert {text.partition(":")[0] for text in CODECS} == Codec._kinds.keys()


@pytest.mark.parametrize("text", CODECS)
def test_its_text_is_its_identity(text: str) -> None:
    codec = Codec.parse(text, [2, 1.0, 1], 300)
    assert codec.temperatures == (1.0, 2.0)
    assert str(codec) == text.replace("5000", "300")
    assert Codec.parse(f" {codec}", codec.temperatures, 300) == codec
    assert codec.needs_noise == isinstance(codec, Sample)


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("vocabulary", [2, 300, 70_000])
def test_stored_columns_are_as_declared_and_of_the_size_that_is_told(
    text: str, vocabulary: int
) -> None:
    if text.startswith("hidden"):
        vocabulary = min(vocabulary, 300)
    codec = codec_of(text, [1, 2], vocabulary)
    targets = make(codec, make_logits(5, vocabulary))
    counts = codec.counts(targets.columns)
    assert list(targets.columns) == [column.name for column in codec.columns]
    for column in codec.columns:
        stored = targets.columns[column.name]
        assert stored.dtype == np.dtype(column.dtype)
        assert stored.shape[1:] == column.shape
        length = 5 if column.per == "position" else int(counts[column.per].sum())
        assert len(stored) == length
    assert len(targets) == len(targets.at(1.0)) == 5
    if CODECS[text]:
        size = sum(column.nbytes for column in targets.columns.values())
        assert size == 5 * codec.bytes_per_position


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("vocabulary", [40, 600])
@pytest.mark.parametrize("ranked", [False, True])
def test_what_comes_back_is_the_teachers_distribution(
    text: str, vocabulary: int, ranked: bool
) -> None:
    """Right at every temperature, or at the declared ones and refused at others."""
    codec = codec_of(text, [1, 2], vocabulary)
    ranks = np.random.default_rng(0).permutation(vocabulary) if ranked else None
    z = make_logits(30, vocabulary)
    stored = make(codec, z, ids=ranks)
    for t in (1.0, 2.0, 0.7):
        if t == 0.7 and not codec.any_temperature:
            with pytest.raises(UsageError, match=r"temperature 0\.7 .*1, 2"):
                stored.at(t)
            continue
        targets = stored.at(t)
        assert targets.temperature == t
        p, q = (z.double() / t).softmax(-1), probabilities(targets, vocabulary)
        bound = CODECS[text]
        if bound is not None:
            assert float((p * (p.log() - q.log())).sum(-1).mean()) <= bound
            continue
        assert not hasattr(targets, "logits")
        assert (targets.weights >= 0).all()
        if targets.exact:  # a sample sums to one on average, if it is for several temperatures
            whole = q.sum(-1) + targets.tail.double()
            torch.testing.assert_close(whole, torch.ones(30).double(), rtol=0, atol=1e-6)
            best, ids = p.topk(min(codec.most_entries, vocabulary), -1)
            assert torch.equal(targets.ids, ids)
            both = torch.cat([best, (1 - best.sum(-1, keepdim=True)).clamp_min(1e-9)], -1)
            held = torch.cat([q.gather(1, ids), targets.tail[:, None].clamp_min(1e-9)], -1)
            assert float((both * (both / held).log()).sum(-1).mean()) < 1e-4


@pytest.mark.parametrize("text", ["sample:12", "anchored:12", *further("sample:130")])
@pytest.mark.parametrize("temperatures", [(1.0,), (0.7, 1.0, 4.0)])
def test_a_sample_is_unbiased_after_storage(text: str, temperatures: tuple[float, ...]) -> None:
    n, vocabulary = 20_000, 200
    codec = Codec.parse(text, temperatures, vocabulary)
    row = make_logits(1, vocabulary, seed=5, scale=2)
    row[0, 100] -= 7
    ranks = np.random.default_rng(1).permutation(vocabulary)
    u = torch.from_numpy(position_uniform(3, 1, 0, np.arange(n)))
    stored = make(codec, row.expand(n, -1), u, ranks)
    for t in temperatures:
        weights = probabilities(stored.at(t), vocabulary)
        assert excess(weights, torch.softmax(row[0].double() / t, -1)) < 4


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("temperatures", [[1], [1, 2]])
@pytest.mark.parametrize("vocabulary", [3, 500, 6000])
def test_a_position_does_not_depend_on_its_batch(
    text: str, temperatures: list[float], vocabulary: int
) -> None:
    if text.startswith("hidden"):
        vocabulary = min(vocabulary, 500)
    codec = codec_of(text, temperatures, vocabulary)
    z, u = make_logits(24, vocabulary), torch.from_numpy(position_uniform(0, 0, np.arange(24), 0))
    whole = make(codec, z, u)
    parts = [make(codec, z[a:b], u[a:b]) for a, b in pairwise([0, 8, 9, 16, 24])]
    assert_same(SoftTargets.concat(parts), whole)
    order = np.array([23, 0, 0, 7])
    assert_same(make(codec, z[order], u[order]), whole.take(order))


@pytest.mark.parametrize("text", CODECS)
def test_positions_are_taken_and_joined(text: str) -> None:
    codec = codec_of(text, [1, 2], 400)
    targets = make(codec, make_logits(30, 400), ids=np.random.default_rng(0).permutation(400))
    order = np.random.default_rng(1).permutation(30)
    joined = SoftTargets.concat([targets.take(order[:11]), targets.take(order[11:])])
    assert len(joined) == 30
    assert_same(joined.take(np.argsort(order)), targets)
    empty = targets.take(np.array([], np.int64))
    assert len(empty) == len(empty.at(2.0)) == 0
    got, want = (probabilities(one.at(2.0), 400) for one in (joined, targets))
    assert torch.equal(got, want[torch.from_numpy(order)])


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_cannot_be_used_are_never_packed(text: str, bad: float) -> None:
    z = make_logits(6, 50)
    z[3, 7] = bad
    with pytest.raises(KdcacheError, match="position 3 of this slice"):
        make(codec_of(text, [1], 50), z)


@settings(deadline=None, max_examples=40)
@given(
    text=st.sampled_from(["topk:6", "sample:6", "sample:40", "anchored:6"]),
    vocabulary=st.sampled_from([2, 255, 256, 257, 700, 66_000]),
    temperatures=TEMPERATURES,
    seed=st.integers(0, 9),
)
def test_ranks_change_the_bytes_and_nothing_else(
    text: str, vocabulary: int, temperatures: set[float], seed: int
) -> None:
    codec = Codec.parse(text, sorted(temperatures), vocabulary)
    z = make_logits(5, vocabulary, seed)
    ranks = np.random.default_rng(seed).permutation(vocabulary)
    for t in temperatures:
        plain, ranked = make(codec, z).at(t), make(codec, z, ids=ranks).at(t)
        assert torch.equal(*(probabilities(one, vocabulary) for one in (plain, ranked)))


@pytest.mark.parametrize("text", CODECS)
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), max_size=6))
def test_a_shard_gives_back_what_was_written(
    text: str, lengths: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    codec, rng = codec_of(text, [1, 2], 40), np.random.default_rng(0)
    streams = [rng.integers(0, 40, length + 1).astype(np.int32) for length in lengths]
    masks = [rng.random(length) < 0.2 for length in lengths]
    rows = [
        Row(ids[:-1], np.where(mask, -100, ids[1:]).astype(np.int32))
        for ids, mask in zip(streams, masks, strict=True)
    ]
    positions = sum(int((~mask).sum()) for mask in masks)
    data = ShardData.from_rows(CAUSAL_LM, rows, make(codec, make_logits(positions, 40)))
    path = tmp_path_factory.mktemp("shard") / "a.h5"
    write_shard(path, data, attributes={"index": 7})
    counts = ShardCounts(len(data), len(data.input_ids), len(data.targets))
    again = read_shard(path, codec, counts=counts)
    for name in ("offsets", "input_ids", "labels"):
        np.testing.assert_array_equal(getattr(again, name), getattr(data, name), err_msg=name)
    assert_same(again.targets, data.targets)
    assert again.position_offsets[-1] == positions
    assert read_counts(path)[1] == {"index": 7}
    write_shard(path.with_name("b.h5"), data, attributes={"index": 7})
    assert path.read_bytes() == path.with_name("b.h5").read_bytes()
