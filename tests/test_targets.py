"""Codecs: what is stored and what a student gets back, by references and by promised laws."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_every_codec import TEMPERATURES, assert_same, make, make_logits, probabilities
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.targets import (
    Codec,
    Dense,
    Sample,
    SoftTargets,
    SparseTargets,
    TopK,
    position_uniform,
)


def uniforms(n: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(position_uniform(seed, 0, np.arange(n), 0))


# -------------------------------------------------------------------------------------------- text


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


# ------------------------------------------------------------------------------------------- dense


def test_dense_float16_refuses_what_it_cannot_hold() -> None:
    z = torch.full((2, 3), 7e4)
    with pytest.raises(UsageError, match="65504"):
        make(Dense(3, dtype="float16"), z)
    assert make(Dense(3), z).columns["logits"][0, 0] == np.float32(7e4)


# ------------------------------------------------------------------------------------------- top-k


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("vocabulary", [30, 9000])
@pytest.mark.parametrize("with_ranks", [False, True])
@pytest.mark.parametrize("levels", [False, True])
def test_topk_against_float64(
    temperature: float, vocabulary: int, with_ranks: bool, levels: bool
) -> None:
    z = make_logits(16, vocabulary)
    # A cache without T = 1 must not lean on it.
    codec = TopK(vocabulary, (2.0, 4.0) if temperature != 1 else (1.0, 2.0), 8, levels)
    ranks = np.random.default_rng(0).permutation(vocabulary) if with_ranks else None
    made = make(codec, z, ids=ranks)
    targets = made.at(temperature)
    assert isinstance(targets, SparseTargets)
    assert targets.exact
    p = torch.softmax(z.double() / temperature, -1)
    want, ids = p.topk(8, -1)
    assert torch.equal(targets.ids, ids)
    if levels:  # what a loss sees of the rounding
        both = torch.cat([want, 1 - want.sum(-1, keepdim=True)], -1)
        held = torch.cat([targets.weights, targets.tail[:, None]], -1).double()
        kl = (both * (both / held).log()).sum(-1)
        assert kl.mean() < 1e-4
        assert kl.max() < 4e-4
    else:
        torch.testing.assert_close(targets.tail.double(), 1 - want.sum(-1), rtol=1e-5, atol=3e-7)
        # float16 log-probabilities: a relative error of 2^-11 of a number up to 16.
        torch.testing.assert_close(targets.weights.double(), want, rtol=0.01, atol=1e-7)
    tails = np.stack([made.at(t).tail for t in codec.temperatures], -1)
    again = codec.stored(made.columns["ids"], codec.surprises(made.columns), tails)
    assert_same(made, dataclasses.replace(made, columns=again))
    total = targets.weights.double().sum(-1) + targets.tail.double()
    torch.testing.assert_close(total, torch.ones(16, dtype=torch.float64), rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    vocabulary=st.integers(2, 3000),
    k=st.integers(1, 80),
    temperatures=TEMPERATURES,
    scale=st.sampled_from([0.0, 1.0, 5.0, 30.0, 3000.0]),
    seed=st.integers(0, 99),
    levels=st.booleans(),
)
def test_topk_always_sums_to_one(
    vocabulary: int, k: int, temperatures: set[float], scale: float, seed: int, levels: bool
) -> None:
    codec = TopK(vocabulary, tuple(sorted(temperatures)), k, levels)
    z = make_logits(7, vocabulary, seed, scale)
    z[3, 1:] = -math.inf
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
        assert torch.allclose(targets.tail.double(), 1 - kept, atol=7e-3 if levels else 2e-6)
        assert targets.weights[3].tolist() == [1, *[0] * (codec.k - 1)]
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


def test_sample_needs_a_number_for_each_position() -> None:
    codec = Sample(30)
    for u in (None, torch.zeros(3), torch.zeros(2, dtype=torch.float64)):
        with pytest.raises(ValueError, match="float64"):
            codec.encode(make_logits(3, 30), u)


def test_logits_of_another_width_are_a_fault() -> None:
    with pytest.raises(ValueError, match=r"\[3, 31\]"):
        Sample(30).encode(make_logits(3, 31), uniforms(3))


# --------------------------------------------------------------------------------------- positions


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
    assert probabilities(stored.at(1.0), 1000)[:, 3].tolist() == [1.0] * 50
