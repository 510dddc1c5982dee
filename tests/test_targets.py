"""Codecs: what is stored and what a student gets back, by references and by promised laws."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from unbiased import excess

from kdcache.errors import KdcacheError, UsageError
from kdcache.targets import (
    Anchored,
    Codec,
    Dense,
    DenseTargets,
    Sample,
    SoftTargets,
    SparseTargets,
    TargetWriter,
    TopK,
    position_uniform,
)

TEMPERATURES = st.sets(st.sampled_from([0.5, 1.0, 1.5, 2.0, 4.0]), min_size=1, max_size=3)
CODECS = [
    "dense",
    "dense:float16",
    "topk:1",
    "topk:7",
    "topk:5000",
    "sample:1",
    "sample:9",
    "anchored:9",
]


def make_logits(n: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    z = torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale
    z[::4, vocabulary // 2] += 10
    return z


def uniforms(n: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(position_uniform(seed, 0, np.arange(n), 0))


def make(
    codec: Codec, logits: Tensor, u: Tensor | None = None, ids: np.ndarray | None = None
) -> SoftTargets:
    """Encode and pack; `ids` is the id of each rank."""
    return TargetWriter(codec, ids).write(logits, uniforms(len(logits)) if u is None else u)


def as_dense(targets: DenseTargets | SparseTargets, vocabulary: int) -> Tensor:
    assert isinstance(targets, SparseTargets)
    dense = torch.zeros(len(targets), vocabulary, dtype=torch.float64)
    return dense.scatter_add_(1, targets.ids, targets.weights.double())


def assert_same_columns(a: SoftTargets, b: SoftTargets) -> None:
    assert a.columns.keys() == b.columns.keys()
    for name in a.columns:
        np.testing.assert_array_equal(a.columns[name], b.columns[name], err_msg=name)
        assert a.columns[name].dtype == b.columns[name].dtype


# -------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("text", "canonical", "kind"),
    [
        ("dense", "dense", Dense),
        (" dense:float32", "dense", Dense),
        ("dense:float16", "dense:float16", Dense),
        ("topk:64", "topk:64", TopK),
        ("topk:9999", "topk:300", TopK),
        ("sample:20", "sample:20", Sample),
        ("anchored:20", "anchored:20", Anchored),
    ],
)
def test_text_round_trip(text: str, canonical: str, kind: type[Codec]) -> None:
    codec = Codec.parse(text, [2, 1.0, 1], 300)
    assert isinstance(codec, kind)
    assert str(codec) == canonical
    assert codec.temperatures == (1.0, 2.0)
    assert Codec.parse(str(codec), codec.temperatures, 300) == codec
    assert codec.bytes_per_position > 0
    assert codec.needs_noise == issubclass(kind, Sample)


@pytest.mark.parametrize(
    "text",
    ["", "topk", "topk:", "topk:0", "topk:-1", "topk:x", "sample:1.5", "dense:int8", "best:3"],
)
def test_text_that_is_no_codec_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"codec"):
        Codec.parse(text, [1], 300)


@pytest.mark.parametrize("temperatures", [[], [0], [-1], [math.inf], [math.nan], [1, 0]])
def test_senseless_temperatures_are_refused(temperatures: list[float]) -> None:
    with pytest.raises(UsageError, match="positive"):
        Codec.parse("topk:3", temperatures, 300)


def test_senseless_vocabulary_is_refused() -> None:
    for text in ("topk:1", "sample:3", "anchored:3", "hidden:int8"):
        with pytest.raises(UsageError, match="1 ids"):
            Codec.parse(text, [1], 1)
    with pytest.raises(UsageError, match="0 ids"):
        Codec.parse("dense", [1], 0)
    assert Codec.parse("dense", [1], 1).vocab_size == 1  # a score


@pytest.mark.parametrize("text", ["topk:3", "sample:3"])
def test_undeclared_temperature_is_refused_with_the_declared_ones(text: str) -> None:
    codec = Codec.parse(text, [1, 2.5], 30)
    targets = make(codec, make_logits(4, 30))
    codec.check_temperature(2.5000000001)
    with pytest.raises(UsageError, match=r"temperature 2 .*1, 2\.5"):
        targets.at(2.0)


def test_dense_takes_any_positive_temperature() -> None:
    codec = Codec.parse("dense", [1], 30)
    codec.check_temperature(3.7)
    with pytest.raises(UsageError):
        codec.check_temperature(0)


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("vocabulary", [2, 300, 70_000])
def test_stored_columns_are_as_declared(text: str, vocabulary: int) -> None:
    codec = Codec.parse(text, [1, 2], vocabulary)
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


# ------------------------------------------------------------------------------------------- dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_is_exact(dtype: torch.dtype) -> None:
    z = make_logits(6, 40).to(dtype)
    targets = make(Dense(40), z).at(2.0)
    assert isinstance(targets, DenseTargets)
    assert targets.logits.dtype == torch.float32
    assert torch.equal(targets.logits, z.float())
    half = make(Dense(40, dtype="float16"), z).at(1.0)
    assert isinstance(half, DenseTargets)
    torch.testing.assert_close(half.logits, z.float(), rtol=2**-10, atol=1e-6)


def test_dense_float16_refuses_what_it_cannot_hold() -> None:
    z = torch.full((2, 3), 7e4)
    with pytest.raises(UsageError, match="65504"):
        make(Dense(3, dtype="float16"), z)
    assert make(Dense(3), z).columns["logits"][0, 0] == np.float32(7e4)


@pytest.mark.parametrize("text", ["dense", "topk:3", "sample:3"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_unusable_logits_are_never_packed(text: str, bad: float) -> None:
    z = make_logits(6, 50)
    z[3, 7] = bad
    with pytest.raises(KdcacheError, match="position 3 of this slice"):
        make(Codec.parse(text, [1], 50), z)


# ------------------------------------------------------------------------------------------- top-k


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("vocabulary", [30, 9000])
@pytest.mark.parametrize("with_ranks", [False, True])
def test_topk_against_float64(temperature: float, vocabulary: int, with_ranks: bool) -> None:
    z = make_logits(16, vocabulary)
    # A cache without T = 1 must not lean on it.
    codec = TopK(vocabulary, (2.0, 4.0) if temperature != 1 else (1.0, 2.0), 8)
    ranks = np.random.default_rng(0).permutation(vocabulary) if with_ranks else None
    targets = make(codec, z, ids=ranks).at(temperature)
    assert isinstance(targets, SparseTargets)
    assert targets.exact
    p = torch.softmax(z.double() / temperature, -1)
    want, ids = p.topk(8, -1)
    assert torch.equal(targets.ids, ids)
    torch.testing.assert_close(targets.tail.double(), 1 - want.sum(-1), rtol=1e-5, atol=3e-7)
    # float16 log-probabilities: a relative error of 2^-11 of a number up to 16.
    torch.testing.assert_close(targets.weights.double(), want, rtol=0.01, atol=1e-7)
    total = targets.weights.double().sum(-1) + targets.tail.double()
    torch.testing.assert_close(total, torch.ones(16, dtype=torch.float64), rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    vocabulary=st.integers(2, 3000),
    k=st.integers(1, 80),
    temperatures=TEMPERATURES,
    scale=st.sampled_from([0.0, 1.0, 5.0, 30.0, 3000.0]),
    seed=st.integers(0, 99),
)
def test_topk_always_sums_to_one(
    vocabulary: int, k: int, temperatures: set[float], scale: float, seed: int
) -> None:
    codec = Codec.parse(f"topk:{k}", sorted(temperatures), vocabulary)
    z = make_logits(7, vocabulary, seed, scale)
    stored = make(codec, z)
    for t in temperatures:
        targets = stored.at(t)
        assert isinstance(targets, SparseTargets)
        assert (targets.weights >= 0).all()
        assert (targets.tail >= 0).all()
        if k >= vocabulary:
            assert (targets.tail == 0).all()
        total = targets.weights.double().sum(-1) + targets.tail.double()
        assert torch.allclose(total, torch.ones(7, dtype=torch.float64), atol=1e-6)
        kept = torch.softmax(z.double() / t, -1).topk(min(k, vocabulary), -1).values.sum(-1)
        assert torch.allclose(targets.tail.double(), 1 - kept, atol=2e-6)
        assert all(len(set(row)) == len(row) for row in targets.ids.tolist())


# ------------------------------------------------------------------------------------------ sample


@settings(deadline=None, max_examples=60)
@given(
    vocabulary=st.integers(2, 2000),
    draws=st.integers(1, 300),
    scale=st.sampled_from([0.0, 0.3, 2.0, 6.0, 40.0]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_sample_at_one_temperature_sums_to_one(
    vocabulary: int, draws: int, scale: float, temperature: float, seed: int
) -> None:
    codec = Sample(vocabulary, (temperature,), draws)
    stored = make(codec, make_logits(9, vocabulary, seed, scale))
    targets = stored.at(temperature)
    assert isinstance(targets, SparseTargets)
    assert not targets.exact
    assert (targets.tail == 0).all()
    total = targets.weights.double().sum(-1)
    assert torch.allclose(total, torch.ones(9, dtype=torch.float64), atol=1e-6)
    assert int((targets.weights > 0).sum(-1).max()) <= draws + 1
    counts = codec.counts(stored.columns)
    assert all((count >= 0).all() for count in counts.values())
    for row, heads in zip(targets.weights, counts["head"], strict=True):
        tail = row[heads:][row[heads:] > 0]
        assert len(tail) == 0 or float(tail.max() - tail.min()) == 0


@settings(deadline=None, max_examples=40)
@given(
    vocabulary=st.integers(2, 2000),
    draws=st.integers(1, 40),
    temperatures=TEMPERATURES,
    seed=st.integers(0, 99),
)
def test_sample_weights_are_close_in_the_head_and_few(
    vocabulary: int, draws: int, temperatures: set[float], seed: int
) -> None:
    codec = Codec.parse(f"sample:{draws}", sorted(temperatures), vocabulary)
    z = make_logits(9, vocabulary, seed)
    stored = make(codec, z)
    heads = codec.counts(stored.columns)["head"]
    assert isinstance(codec, Sample)
    for t in temperatures:
        targets = stored.at(t)
        assert isinstance(targets, SparseTargets)
        assert targets.ids.shape[1] <= draws * len(temperatures) + 1
        p = torch.softmax(z.double() / t, -1).gather(1, targets.ids)
        head = torch.arange(targets.ids.shape[1]) < torch.from_numpy(heads)[:, None]
        error = (targets.weights.double() - p).abs()[head]
        assert not len(error) or float(error.max()) <= 1 / codec.rule.units + 1e-5


@pytest.mark.parametrize(
    ("draws", "temperatures"), [(12, (1.0,)), (8, (1.0, 2.0)), (5, (0.7, 1.0, 4.0)), (130, (1.0,))]
)
def test_sample_is_unbiased_after_storage(draws: int, temperatures: tuple[float, ...]) -> None:
    n, vocabulary = 20_000, 200
    codec = Sample(vocabulary, temperatures, draws)
    row = make_logits(1, vocabulary, seed=5, scale=2)
    row[0, 100] -= 7
    ranks = np.random.default_rng(1).permutation(vocabulary)
    u = torch.from_numpy(position_uniform(3, 1, 0, np.arange(n)))
    stored = make(codec, row.expand(n, -1), u, ranks)
    for t in temperatures:
        weights = as_dense(stored.at(t), vocabulary)
        assert excess(weights, torch.softmax(row[0].double() / t, -1)) < 4


def test_sample_needs_a_number_for_each_position() -> None:
    codec = Sample(30)
    for u in (None, torch.zeros(3), torch.zeros(2, dtype=torch.float64)):
        with pytest.raises(ValueError, match="float64"):
            codec.encode(make_logits(3, 30), u)


def test_logits_of_another_width_are_a_fault() -> None:
    with pytest.raises(ValueError, match=r"\[3, 31\]"):
        Sample(30).encode(make_logits(3, 31), uniforms(3))


# --------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("temperatures", [[1], [1, 2]])
@pytest.mark.parametrize("vocabulary", [3, 500, 6000])
def test_a_position_does_not_depend_on_its_batch(
    text: str, temperatures: list[float], vocabulary: int
) -> None:
    codec = Codec.parse(text, temperatures, vocabulary)
    z, u = make_logits(24, vocabulary), uniforms(24)
    whole = make(codec, z, u)
    cuts = [0, 8, 9, 16, 24]
    parts = [make(codec, z[a:b], u[a:b]) for a, b in pairwise(cuts)]
    assert_same_columns(SoftTargets.concat(parts), whole)
    order = np.array([23, 0, 0, 7])
    assert_same_columns(make(codec, z[order], u[order]), whole.take(order))


@pytest.mark.parametrize("text", CODECS)
def test_take_and_concat_keep_the_targets(text: str) -> None:
    codec = Codec.parse(text, [1, 2], 400)
    targets = make(codec, make_logits(30, 400), ids=np.random.default_rng(0).permutation(400))
    order = np.random.default_rng(1).permutation(30)
    joined = SoftTargets.concat([targets.take(order[:11]), targets.take(order[11:])])
    assert len(joined) == 30
    assert_same_columns(joined.take(np.argsort(order)), targets)
    empty = targets.take(np.array([], np.int64))
    assert len(empty) == len(empty.at(2.0)) == 0
    if not text.startswith("dense"):
        got, want = as_dense(joined.at(2.0), 400), as_dense(targets.at(2.0), 400)
        assert torch.equal(got, want[torch.from_numpy(order)])


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
        assert torch.equal(as_dense(plain, vocabulary), as_dense(ranked, vocabulary))


def test_parts_that_do_not_belong_together_are_not_joined() -> None:
    z = make_logits(4, 50)
    a, b = make(TopK(50, (1.0,), 3), z), make(TopK(50, (1.0,), 4), z)
    for parts in ([a, b], []):
        with pytest.raises(ValueError, match=r"differ|nothing"):
            SoftTargets.concat(parts)


def test_sure_positions_take_less_room() -> None:
    codec = Sample(1000, (1.0,), 20)
    flat, sure = torch.zeros(50, 1000), torch.zeros(50, 1000)
    sure[:, 3] = 30
    assert len(make(codec, flat).columns["far_ids"]) > 400
    stored = make(codec, sure)
    assert stored.columns["head_count"].tolist() == [1] * 50
    assert len(stored.columns["near_ids"]) == len(stored.columns["far_ids"]) == 0
    assert as_dense(stored.at(1.0), 1000)[:, 3].tolist() == [1.0] * 50
