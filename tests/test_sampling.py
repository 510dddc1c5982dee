"""Threshold sampling: bounds, no bias, the fast form against the readable one, keyed noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import further
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from unbiased import excess, packed

from kdcache.targets import Sample, position_uniform
from kdcache.targets.device import Rule, sample_entries, top_entries
from kdcache.targets.device.blocks import BLOCK, largest, open_blocks, read_blocks
from kdcache.targets.device.threshold import blocked_sample, reference_sample, split
from kdcache.teacher import logits_at


def logits_like_a_teacher(n: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    """Normal logits with a few sure positions, a flat one and one with ties."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, vocabulary, generator=generator) * scale
    z[::5, 0] += 12
    if n > 2:
        z[1] = 0
        z[2] = z[2].round()
    return z


def uniforms(n: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(position_uniform(seed, 0, np.arange(n), 0))


def rule(draws: int, temperatures: tuple[float, ...] = (1.0,)) -> Rule:
    return Rule(draws, temperatures, max(2, len(temperatures)) * draws, 7)


# ------------------------------------------------------------------------------------------- noise


def test_position_uniform_is_a_pure_function_of_its_key() -> None:
    table = position_uniform(7, 3, np.arange(50)[:, None], np.arange(40))
    assert table.shape == (50, 40)
    assert table.dtype == np.float64
    assert table[11, 5] == position_uniform(7, 3, 11, 5)
    # The format promises the same bytes from the same build: these values must never change.
    np.testing.assert_array_equal(
        position_uniform(0, 0, [0, 1], [0, 2]),
        np.array([0.1296456182997474, 0.10317913945866874]),
    )


def test_position_uniform_is_uniform() -> None:
    values = position_uniform(1, 2, np.arange(400)[:, None], np.arange(500)).ravel()
    assert values.min() >= 0
    assert values.max() < 1
    counts = np.bincount((values * 1000).astype(int), minlength=1000)
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert abs(chi_square - 999) < 4 * np.sqrt(2 * 999)
    # The parts of the number that other decisions use must be as good as its top.
    for shift in (21, 37):
        low = (values * 2.0**shift) % 1
        counts = np.bincount((low * 1000).astype(int), minlength=1000)
        assert abs(((counts - 200) ** 2 / 200).sum() - 999) < 4 * np.sqrt(2 * 999)


@pytest.mark.parametrize("field", range(4))
def test_neighbouring_keys_are_independent(field: int) -> None:
    rows, places = np.arange(300)[:, None], np.arange(300)
    shift = [int(field == i) for i in range(4)]
    here = position_uniform(5, 6, rows, places)
    there = position_uniform(5 + shift[0], 6 + shift[1], rows + shift[2], places + shift[3])
    correlation = np.corrcoef(here.ravel(), there.ravel())[0, 1]
    # For independent numbers the correlation of n pairs has a standard deviation of 1 / sqrt(n).
    assert abs(correlation) < 4 / np.sqrt(here.size)
    assert not np.array_equal(here, there)


def test_key_fields_are_not_interchangeable() -> None:
    assert position_uniform(1, 2, 3, 4) != position_uniform(1, 2, 4, 3)
    assert position_uniform(1, 2, 3, 4) != position_uniform(2, 1, 3, 4)
    assert position_uniform(-1, 0, 0, 0) != position_uniform(1, 0, 0, 0)


# ------------------------------------------------------------------------------------------ checks


@pytest.mark.parametrize("vocabulary", [40, 3000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_are_flagged(vocabulary: int, bad: float) -> None:
    z = logits_like_a_teacher(6, vocabulary)
    z[4, vocabulary // 2] = bad
    sampled = sample_entries(z, uniforms(6), rule(3))["finite"]
    best = top_entries(z, 3, (1.0,))["finite"]
    assert sampled.tolist() == best.tolist() == [True, True, True, True, False, True]


# ------------------------------------------------------------------------------------------ blocks


@pytest.mark.parametrize("vocabulary", [BLOCK, 5 * BLOCK, 5 * BLOCK + 1, 6 * BLOCK - 1])
@pytest.mark.parametrize("temperatures", [(1.0,), (0.5, 1.0, 2.0), (1.0, 1.7), (1.0, 2.0, 64.0)])
def test_block_masses_are_those_of_the_softmax(
    vocabulary: int, temperatures: tuple[float, ...]
) -> None:
    z = logits_like_a_teacher(7, vocabulary) + 40
    z[3, :BLOCK] = -torch.inf if vocabulary > BLOCK else 1.0
    blocks = read_blocks(z, temperatures)
    for i, t in enumerate(temperatures):
        p = torch.softmax(z.double() / t, -1)
        want = torch.stack([part.sum(-1) for part in torch.split(p, BLOCK, 1)], 1)
        torch.testing.assert_close(blocks.mass[..., i].double(), want, rtol=1e-5, atol=1e-12)
    which = torch.tensor([[0, blocks.top.shape[1] - 1]]).expand(7, -1)
    opened = open_blocks(z, which)
    last = z[:, (blocks.top.shape[1] - 1) * BLOCK :]
    torch.testing.assert_close(opened[:, 0, :BLOCK], z[:, :BLOCK])
    torch.testing.assert_close(opened[:, 1, : last.shape[1]], last)
    assert (opened[:, 1, last.shape[1] :] == -torch.inf).all()


@pytest.mark.parametrize("vocabulary", [2000, 8192, 9001])
@pytest.mark.parametrize(
    ("draws", "temperatures"),
    [(1, (1.0,)), (4, (1.0,)), (12, (1.0, 2.0)), (3, (0.5, 1.0, 4.0)), (5, (3.0,))],
)
def test_blocked_draws_what_the_reference_draws(
    vocabulary: int, draws: int, temperatures: tuple[float, ...]
) -> None:
    z = logits_like_a_teacher(64, vocabulary)
    z[2] += torch.arange(vocabulary) * 1e-6  # equal logits may be told apart in any order
    z[7, BLOCK : 3 * BLOCK] = -torch.inf
    constants = rule(draws, temperatures)
    want = reference_sample(z, uniforms(64), constants)
    got = blocked_sample(z, uniforms(64), constants)
    slots = torch.arange(want["ids"].shape[1])
    used = slots < (want["heads"] + want["draws"])[:, None]
    for name in ("heads", "draws", "finite"):
        assert torch.equal(got[name], want[name]), name
    same = (got["ids"] == want["ids"]) & (got["values"] == want["values"]).all(-1)
    # A draw within rounding of the border between two ids may fall on either: among thousands of
    # equal ids, a float32 sum places a border to about a thousandth of an id.
    assert same[used].float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_logits_are_taken_at_their_value(dtype: torch.dtype) -> None:
    z = logits_like_a_teacher(16, 9000).to(dtype)
    for run in (blocked_sample, reference_sample):
        half, full = run(z, uniforms(16), rule(4)), run(z.float(), uniforms(16), rule(4))
        for name, value in half.items():
            assert torch.equal(value, full[name]), name
    half, full = top_entries(z, 8, (1.0, 2.0)), top_entries(z.float(), 8, (1.0, 2.0))
    torch.testing.assert_close(half["logprobs"], full["logprobs"])
    torch.testing.assert_close(half["tail"], full["tail"])


def test_logits_are_left_as_they_were() -> None:
    for vocabulary in (50, 9000):
        z = logits_like_a_teacher(8, vocabulary)
        before = z.clone()
        sample_entries(z, uniforms(8), rule(4, (1.0, 2.0)))
        top_entries(z, 4, (1.0, 2.0))
        assert torch.equal(z, before)


# ------------------------------------------------------------------------------------------ bounds


@given(
    sizes=st.lists(st.floats(0, 1, width=32), min_size=2, max_size=40),
    draws=st.integers(1, 30),
)
def test_split_keeps_every_large_size_and_few_entries(sizes: list[float], draws: int) -> None:
    total = sum(sizes)
    if total < 1e-3:
        sizes, total = [1.0, *sizes], total + 1
    top = (torch.tensor([sizes], dtype=torch.float64) / total).sort(-1, descending=True).values
    heads, left = split(top, torch.zeros(1, dtype=torch.float64), draws)
    h, s = int(heads), float(left)
    n = int(np.ceil(s * draws * (1 - 1e-5)))
    assert s == pytest.approx(float(top[0, h:].sum()), abs=1e-12)
    assert h + n <= draws + 1
    if n:
        # No id of the tail can be drawn twice.
        assert float(top[0, h:].max()) <= s / n * (1 + 2e-5)


@settings(deadline=None, max_examples=60)
@given(
    vocabulary=st.integers(2, 1500),
    draws=st.integers(1, 60),
    temperatures=st.sets(st.sampled_from([0.5, 1.0, 1.5, 2.0, 4.0]), min_size=1, max_size=3),
    scale=st.sampled_from([0.0, 0.1, 1.0, 4.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_entries_stay_within_the_bound(
    vocabulary: int, draws: int, temperatures: set[float], scale: float, seed: int
) -> None:
    ts = tuple(sorted(temperatures))
    z = logits_like_a_teacher(24, vocabulary, seed, scale)
    out = sample_entries(z, uniforms(24, seed), rule(draws, ts))
    entries = out["heads"] + out["draws"]
    assert int(entries.max()) <= min(draws * len(ts), vocabulary) + 1
    assert int(out["ids"].min()) >= 0
    assert int(out["ids"].max()) < vocabulary
    for position in range(24):
        heads, n = int(out["heads"][position]), int(out["draws"][position])
        head = out["ids"][position, :heads].tolist()
        tail = out["ids"][position, heads : heads + n].tolist()
        assert len(set(head)) == heads
        assert not set(head) & set(tail)
        assert tail == sorted(tail)
        # Units of all entries and of the tail make up the whole: n follows from them.
        rest = len(ts) * rule(draws, ts).units - int(out["values"][position, :heads].sum())
        assert n == -(-rest * draws // rule(draws, ts).units)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize(("n", "width", "k"), [(7, 512, 20), (3, 40, 40), (1, 3, 1), (5, 2560, 64)])
def test_the_largest_are_those_of_topk(threads: int, n: int, width: int, k: int) -> None:
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(k))
    x[0, ::3] = -torch.inf
    x[-1, 0] = torch.nan  # counts as the largest, as in `topk`
    want, before = x.topk(k, -1), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values, places = largest(x, k)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(values, want.values, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x.gather(1, places), values, rtol=0, atol=0, equal_nan=True)
    assert all(len(set(line.tolist())) == k for line in places)


def test_masked_ids_are_never_met() -> None:
    for vocabulary in (60, 9000):
        z = torch.zeros(200, vocabulary)
        z[:, vocabulary // 3 :] = -torch.inf
        out = sample_entries(z, uniforms(200), rule(8, (1.0, 2.0)))
        used = torch.arange(out["ids"].shape[1]) < (out["heads"] + out["draws"])[:, None]
        assert int(out["ids"][used].max()) < vocabulary // 3


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("vocabulary", [60, 9000, 9001, 71 * BLOCK + 1])
def test_the_best_are_different_ids_where_fewer_are_finite(k: int, vocabulary: int) -> None:
    z = torch.full((50, vocabulary), -torch.inf)
    z[:, -1] = 2.0  # in the last, shorter block
    z[:25, 3] = 1.0
    out = top_entries(z, k, (1.0,))
    assert int(out["ids"].max()) < vocabulary
    assert all(len(set(line)) == k for line in out["ids"].tolist())
    assert out["ids"][:, 0].tolist() == [vocabulary - 1] * 50
    assert (
        out["logprobs"].isfinite().sum(-1) == torch.tensor([2] * 25 + [1] * 25).clamp_max(k)
    ).all()


# ---------------------------------------------------------------------------------------- unbiased


@pytest.mark.parametrize("run", [blocked_sample, *further(reference_sample)])
@pytest.mark.parametrize("draws", [6, *further(1, 17)])
def test_mean_of_many_draws_is_the_distribution(run: Any, draws: int) -> None:
    check_unbiased(run, draws, teacher_row())


def test_mean_of_many_draws_is_that_of_several_teachers() -> None:
    """Whose temperatures have logits of their own."""
    other = logits_like_a_teacher(1, 300, seed=4, scale=1.0)
    check_unbiased(reference_sample, 6, torch.stack([teacher_row(), teacher_row() + other], 1))


def teacher_row() -> Tensor:
    row = logits_like_a_teacher(1, 300, seed=3)
    row[:, :2] += torch.tensor([2.0, 1.0])
    return row


def check_unbiased(run: Any, draws: int, row: Tensor) -> None:
    n, codec = 20_000, Sample(300, (1.0, 2.0), draws)
    u = torch.from_numpy(position_uniform(1, 2, np.arange(n), 0))
    stored = packed(run, codec, row, u)
    each = row.unbind(1) if row.ndim == 3 else (row, row)
    for t, own in zip(codec.temperatures, each, strict=True):
        targets = stored.at(t)
        weights = torch.zeros(n, 300, dtype=torch.float64)
        weights.scatter_add_(1, targets.ids, targets.weights.double())
        assert excess(weights, torch.softmax(own[0].double() / t, -1)) < 4


def test_ids_that_a_cold_temperature_nearly_excludes_are_right_on_average() -> None:
    """Their shares are below 2^-16 of a unit: one in 70,000 draws must round up."""
    n, ts = 400_000, (0.5, 4.0)
    z = torch.full((12,), -8.028)
    z[0] = 0
    p = torch.stack([torch.softmax(z.double() / t, -1) for t in ts])
    constants = rule(10, ts)
    units = constants.share_units * p[0, 1] / p[:, 1].sum()
    assert 0.8 < units * 2**16 < 1
    met = weighed = 0
    for u in torch.from_numpy(position_uniform(0, 1, np.arange(n), 0)).split(100_000):
        out = reference_sample(z.expand(len(u), -1), u, constants)
        slot = torch.arange(out["ids"].shape[1])
        tail = (slot >= out["heads"][:, None]) & (slot < (out["heads"] + out["draws"])[:, None])
        met += int(tail.sum())
        weighed += int((out["values"][..., 0][tail] > 0).sum())
    expected = float(met * units)
    assert expected > 30
    assert abs(weighed - expected) < 4 * expected**0.5


def test_the_same_logits_at_each_temperature_are_those_of_one_teacher() -> None:
    z, u = logits_like_a_teacher(3000, 300), uniforms(3000)
    constants = rule(6, (1.0, 1.5, 2.0))
    want = sample_entries(z, u, constants)
    for name, value in sample_entries(z[:, None].expand(-1, 3, -1), u, constants).items():
        assert torch.equal(value, want[name]), name


def test_logits_of_some_temperatures_are_found_by_their_temperature() -> None:
    logits = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(logits_at(logits, (1.0, 1.5, 2.0), (2.0, 1.0)), logits[:, [2, 0]])
    one = logits[:, 0]
    assert torch.equal(logits_at(one, (1.0, 1.5, 2.0), (2.0,)), one), "any teacher but such a mean"


def test_the_check_of_bias_can_fail() -> None:
    p = torch.softmax(torch.randn(50, generator=torch.Generator().manual_seed(0)).double(), 0)
    draws = torch.multinomial(p, 20_000, True, generator=torch.Generator().manual_seed(1))
    weights = torch.nn.functional.one_hot(draws, 50).double()
    assert excess(weights, p) < 4
    wrong = p.clone()
    likeliest = p.topk(2).indices
    wrong[likeliest] += torch.tensor([0.02, -0.02])
    assert excess(weights, wrong) > 4


# -------------------------------------------------------------------------------------------- cuda


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("vocabulary", [512, 128_256, 50_257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 2.0)])
def test_compiled_on_cuda_agrees_with_the_cpu(
    vocabulary: int, dtype: torch.dtype, temperatures: tuple[float, ...]
) -> None:
    z = logits_like_a_teacher(256, vocabulary).to(dtype)
    # bfloat16 ties among the largest may be told apart in any order.
    z[:, :64] = torch.linspace(8, 0, 64).to(dtype)
    constants = rule(20, temperatures)
    want = sample_entries(z, uniforms(256), constants)
    got = sample_entries(z.cuda(), uniforms(256).cuda(), constants)
    used = torch.arange(want["ids"].shape[1]) < (want["heads"] + want["draws"])[:, None]
    agree = (got["heads"].cpu() == want["heads"]) & (got["draws"].cpu() == want["draws"])
    assert agree.float().mean() > 0.98
    same = got["ids"].cpu() == want["ids"]
    assert same[agree[:, None] & used].float().mean() > 0.99
    best, far = top_entries(z, 16, temperatures), top_entries(z.cuda(), 16, temperatures)
    torch.testing.assert_close(far["logprobs"].cpu(), best["logprobs"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(far["tail"].cpu(), best["tail"], rtol=1e-4, atol=1e-5)
