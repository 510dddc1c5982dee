"""Anchored samples: the entries of samples, gradients that stay unbiased, and less noise."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import further
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from unbiased import excess, packed

from kdcache.errors import UsageError
from kdcache.loss import (
    Anchor,
    distillation_loss,
    fused_linear_distillation,
    sliced_linear_distillation,
)
from kdcache.targets import (
    Anchored,
    AnchoredTargets,
    DenseTargets,
    Sample,
    SoftTargets,
    SparseTargets,
    TargetWriter,
    position_uniform,
)
from kdcache.targets.device.threshold import blocked_sample, reference_sample

NO_LABEL = -100


def drawn(
    codec: Sample, logits: Tensor, ranks: np.ndarray | None = None, seed: int = 7
) -> SoftTargets:
    u = torch.from_numpy(position_uniform(seed, 0, np.arange(len(logits)), 0))
    return TargetWriter(codec, ranks).write(logits, u)


def teacher(n: int, vocabulary: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    z = scale * torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(seed))
    z[:, 3] += 3
    z[::4, 5] += 9
    return z


def gradient(z: Tensor, targets: Any, anchor: Anchor | None) -> Tensor:
    """Of the summed soft loss by the student's logits [n, V], without the factor T."""
    z = z.clone().requires_grad_()
    labels = torch.full((len(z),), NO_LABEL)
    loss = distillation_loss(z, labels, targets, alpha=0.0, count=1, anchor=anchor)
    (found,) = torch.autograd.grad(loss.total, z)
    return found / targets.temperature


# ------------------------------------------------------------------------------------- as a sample


@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 2.0), (0.7, 1.0, 4.0)])
@pytest.mark.parametrize("vocabulary", [700, 70_000, *further(40)])
def test_entries_are_those_of_a_sample(vocabulary: int, temperatures: tuple[float, ...]) -> None:
    z, ranks = teacher(40, vocabulary), np.random.default_rng(0).permutation(vocabulary)
    anchored = drawn(Anchored(vocabulary, temperatures, 6), z, ranks)
    sample = drawn(Sample(vocabulary, temperatures, 6), z, ranks)
    for t in temperatures:
        got, want = anchored.at(t), sample.at(t)
        assert isinstance(got, AnchoredTargets)
        assert isinstance(want, SparseTargets)
        assert entries(got) == entries(want)
        slots = torch.arange(got.ids.shape[1])
        counts = anchored.codec.counts(anchored.columns)
        used = torch.from_numpy(counts["head"] + counts["near"] + counts["far"])[:, None]
        assert torch.equal(got.heads, torch.from_numpy(counts["head"]).long())
        tail = (slots >= got.heads[:, None]) & (slots < used)
        assert torch.equal(got.inverse > 0, tail)
        assert (got.inverse[tail] >= 0.5).all()
    if len(temperatures) == 1:
        for name, column in sample.columns.items():
            np.testing.assert_array_equal(anchored.columns[name], column)


def entries(targets: SparseTargets) -> list[list[tuple[int, float]]]:
    rows = zip(targets.ids.tolist(), targets.weights.tolist(), strict=True)
    return [[pair for pair in zip(ids, w, strict=True) if pair[1]] for ids, w in rows]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("form", ["reference", "sliced", "fused"])
@pytest.mark.parametrize("theta", [None, 0.0])
def test_at_theta_0_it_is_a_sample_to_the_bit(
    form: str, temperature: float, theta: float | None
) -> None:
    z, temperatures = teacher(60, 300), (1.0, 2.0)
    torch.manual_seed(0)
    states, weight = torch.randn(60, 16), torch.randn(310, 16)
    labels = torch.randint(0, 300, (60,))
    labels[::7] = NO_LABEL
    results = []
    for codec in (Sample(300, temperatures, 8), Anchored(300, temperatures, 8)):
        h, w = states.clone().requires_grad_(), weight.clone().requires_grad_()
        options: dict[str, Any] = {"alpha": 0.2, "vocab_size": 300}
        if form != "sliced":
            options["anchor"] = Anchor(theta)
        targets = drawn(codec, z).at(temperature)
        if form == "reference":
            loss = distillation_loss(h @ w.T, labels, targets, **options)
        else:
            linear = fused_linear_distillation if form == "fused" else sliced_linear_distillation
            loss = linear(h, w, None, labels, targets, rows=25, **options)
        results.append([loss.total, loss.soft, *torch.autograd.grad(loss.total, (h, w))])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


# ---------------------------------------------------------------------------------------- unbiased


def students(z: Tensor) -> dict[str, Tensor]:
    """Logits of a student near the teacher's z, of one far from it, and of one that contradicts."""
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(9))
    return {"near": z + 0.3 * noise, "far": 0.5 * z + 1.5 * noise, "contrary": -0.3 * z}


def target(z: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
    """The target that a student with logits z [V] is pulled to at theta = 1, and which ids the
    sample alone would give weight."""
    q = (z.double() / targets.temperature).softmax(-1)
    t = q - gradient(z.double().expand(len(targets), -1), targets, Anchor(1.0))
    return t, torch.zeros_like(t).scatter_add_(1, targets.ids, targets.weights.double()) > 0


@pytest.mark.parametrize(
    ("draws", "temperatures"), [(10, (1.0,)), (6, (1.0, 2.0)), *further((5, (0.7, 1.0, 4.0)))]
)
def test_mean_of_many_gradients_is_the_full_one(
    draws: int, temperatures: tuple[float, ...]
) -> None:
    n, vocabulary = 8_000, 60
    row = teacher(1, vocabulary, seed=5, scale=1.2)
    ranks = np.random.default_rng(1).permutation(vocabulary)
    stored = drawn(Anchored(vocabulary, temperatures, draws), row.expand(n, -1), ranks)
    for t in temperatures:
        p = (row[0].double() / t).softmax(-1)
        for name, z in students(row[0]).items():
            found, met = target(z, stored.at(t))
            assert excess(found, p, met) < 4, (t, name)


def test_ids_of_the_head_that_weigh_nothing_are_known() -> None:
    """Given to the student's distribution, they would bias the target where they are left out."""
    n, draws = 20_000, 5
    p = torch.tensor([0.55, 0.0925, 0.0925, 0.07] + [0.195 / 12] * 12).double()
    z = torch.stack([p.log(), 2 * p.log()]).float()  # the same distribution at both temperatures
    codec = Anchored(len(p), (1.0, 2.0), draws)
    stored = drawn(codec, z.expand(n, -1, -1))
    silent = (stored.columns["head_units"] == 0).all(-1)
    assert 200 < silent.sum() < n
    targets = stored.at(1.0)
    assert isinstance(targets, AnchoredTargets)
    student = torch.tensor([0.3, 0.2, 0.2] + [0.3 / 13] * 13).log()
    assert excess(target(student, targets)[0], p) < 4
    # The check can fail: without those ids it does.
    kept = torch.arange(targets.ids.shape[1]) < targets.heads[:, None]
    ids = torch.where(kept & (targets.weights == 0), targets.ids[:, :1], targets.ids)
    assert excess(target(student, dataclasses.replace(targets, ids=ids))[0], p) > 4


def test_ids_that_cannot_be_drawn_keep_what_the_format_says() -> None:
    """Of a student with mass on ids that the teacher excludes; no head, so that c is known."""
    n, draws, p = 20_000, 4, torch.ones(20).double() / 20
    p[5:9] *= torch.tensor([2.0, 0.0, 0.0, 2.0])
    p[15:] *= 0.6
    p /= p.sum()
    q = torch.linspace(1, 2, 20).double() / 30
    stored = drawn(Anchored(20, (1.0,), draws), p.log().float().expand(n, -1))
    targets = stored.at(1.0)
    assert isinstance(targets, AnchoredTargets)
    assert not targets.heads.any()
    c = q * min(1.0, 1.25 / (draws * float(q.max()))) ** 2
    dead = p == 0
    share = c[dead].sum() / c.sum()
    want = torch.where(dead, c * (1 - share), p - c * share)
    found, met = target(q.log(), targets)
    assert excess(found, want, met | dead) < 4
    assert excess(found, p, met | dead) > 4


@pytest.mark.parametrize("mass", [0.0, 0.01, *further(0.006)])
def test_theta_sees_mass_on_an_id_that_cannot_be_drawn(mass: float) -> None:
    """Many steps' gradients, added up, are no farther from the full ones than those of samples."""
    n, vocabulary = 128, 300
    z = teacher(n, vocabulary)
    z[:, -1] = -torch.inf
    shaken = 0.05 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    q = (z.double() + shaken).softmax(-1) * (1 - mass)
    q[:, -1] = max(mass, 1e-9)
    full = q - z.double().softmax(-1)
    anchor, codec, thetas = Anchor(), Anchored(vocabulary, (1.0,), 10), []
    error, of_samples = torch.zeros(vocabulary).double(), 0.0
    for step in range(100):
        targets = draw(z, 5 + step, codec)
        thetas.append(float(anchor.theta))
        found, sample = (gradient(q.log(), targets, a) - full for a in (anchor, None))
        anchor.update()
        if step >= 50:
            error += found.sum(0)
            of_samples += float(sample.sum(0).square().sum())
    assert error.square().sum() < (1.5 if mass else 0.1) * of_samples, thetas[::10]
    assert mass or thetas[-1] > 0.9


@pytest.mark.parametrize(
    ("run", "draws", "temperatures"),
    [
        *((reference_sample, 4, (1.0, 3.0)), (blocked_sample, 9, (1.0,))),
        *further((reference_sample, 9, (1.0,)), (blocked_sample, 4, (1.0, 3.0))),
    ],
)
def test_inverses_count_each_id_once_whatever_the_heads_units(
    run: Any, draws: int, temperatures: tuple[float, ...]
) -> None:
    n, vocabulary = 10_000, 150
    row = teacher(1, vocabulary, seed=2, scale=1.2)
    row[:, 5] -= 5
    codec = Anchored(vocabulary, temperatures, draws)
    u = torch.from_numpy(position_uniform(3, 1, 0, np.arange(n)))
    targets = packed(run, codec, row, u).at(1.0)
    assert isinstance(targets, AnchoredTargets)
    met = torch.zeros(n, vocabulary).double()
    met.scatter_add_(1, targets.ids, targets.inverse.double())
    kept = torch.arange(targets.ids.shape[1]) < targets.heads[:, None]
    head = torch.where(kept, targets.weights, 0).sum(-1)
    assert len(head.unique()) > 1
    # Where rounding gave the head everything, nothing is drawn, and the tail has no c either.
    for mass in head.unique()[head.unique() < 1 - 1e-6]:
        group = head == mass
        tail = torch.ones(vocabulary, dtype=torch.bool)
        tail[targets.ids[group][kept[group]].unique()] = False
        assert excess(met[group][:, tail], torch.ones(int(tail.sum())).double()) < 4


# ------------------------------------------------------------------------------------------- noise


def draw(logits: Tensor, seed: int, codec: Anchored) -> AnchoredTargets:
    targets = drawn(codec, logits, seed=seed).at(1.0)
    assert isinstance(targets, AnchoredTargets)
    return targets


def noise(teacher: Tensor, student: Tensor, codec: Anchored, theta: float, draws: int) -> Tensor:
    """E |gradient - full gradient|^2 of each position, over many draws."""
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    z, again = student.double().repeat(draws, 1), teacher.repeat(draws, 1)
    g = gradient(z, draw(again, 3, codec), Anchor(theta)).view(draws, *p.shape)
    return (g - (q - p)).square().sum(-1).mean(0)


@pytest.mark.parametrize("closeness", [0.1, 1.0, *further(0.5)])
def test_noise_is_that_of_the_formula(closeness: float) -> None:
    """Where nothing is certain, so that head and tail are known exactly: c = theta q."""
    codec, vocabulary, theta = Anchored(60, (1.0,), 4), 60, 0.8
    z = 0.6 * torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(1))
    p = z.double().softmax(-1)
    assert (p < 1 / codec.draws).all()
    student = z + closeness * torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    c = theta * student.double().softmax(-1)
    pi = codec.draws * p
    inverse = 1 / pi
    low = codec.rule.base ** (inverse.log() / np.log(codec.rule.base)).floor()
    rounding = pi * c.square() * (inverse - low) * (codec.rule.base * low - inverse)
    want = ((p - c).square() * (1 - pi) / pi + rounding).sum(-1)
    got = noise(z, student, codec, theta, 4000)
    # That c's sum is kept right moves noise among ids, and takes a little of it off.
    assert (got < 1.05 * want).all()
    assert (got > 0.75 * want).all()
    if closeness == 0.1:
        assert (got < 0.15 * noise(z, student, codec, 0.0, 500)).all()


def test_noise_is_never_more_than_a_samples() -> None:
    """theta from past steps, of a student near its teacher, farther away, and contrary to it."""
    codec, vocabulary = Anchored(100, (1.0,), 8), 100
    z = 1.5 * torch.randn(200, vocabulary, generator=torch.Generator().manual_seed(4))
    shaken = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
    tried = {
        "the teacher itself": z,
        "near": z + 0.3 * shaken,
        "farther": z + 1.0 * shaken,
        "far": 0.5 * z + 2.0 * shaken,
        "contrary": -z,
        "sure of what the teacher excludes": z.sort(-1, descending=True).values.flip(-1),
    }
    ratios, thetas = {}, {}
    for name, student in tried.items():
        anchor = Anchor()
        for step in range(20):
            gradient(student, draw(z, 100 + step, codec), anchor)
            anchor.update()
        thetas[name] = float(anchor.theta)
        found = [noise(z[:25], student[:25], codec, t, 60).mean() for t in (thetas[name], 0.0)]
        ratios[name] = float(found[0] / found[1])
    assert max(ratios.values()) < 1.02, (ratios, thetas)
    assert ratios["the teacher itself"] < 0.15
    assert ratios["near"] < 0.25
    assert ratios["near"] < ratios["farther"] < 0.95
    assert thetas["contrary"] < 0.01 < thetas["farther"] < thetas["near"] <= 1


def test_theta_never_looks_at_its_own_step() -> None:
    z = teacher(30, 80)
    codec, anchor = Anchored(80, (1.0,), 6), Anchor()
    assert float(anchor.theta) == 0
    gradient(z, draw(z, 0, codec), anchor)
    assert float(anchor.theta) == 0
    anchor.update()
    after = float(anchor.theta)
    assert after > 0
    gradient(z, draw(z, 1, codec), anchor)
    assert float(anchor.theta) == after


def test_theta_is_the_same_however_a_step_is_cut() -> None:
    z = teacher(48, 80)
    targets = draw(z, 0, Anchored(80, (1.0,), 6))
    student = z + torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    anchors = Anchor(), Anchor(), Anchor()
    for _ in range(3):
        gradient(student, targets, anchors[0])
        anchors[0].update()
        for part in torch.arange(48).split(11):  # accumulated slices
            gradient(student[part], targets[part], anchors[1])
        anchors[1].update()
        ranks = []  # workers, whose sums are added up
        for part in torch.arange(48).split(20):
            one = Anchor()
            gradient(student[part], targets[part], one)
            ranks.append(one._step)
        anchors[2].met = True
        anchors[2].update(lambda _, ranks=ranks: torch.stack(ranks).sum(0))
    for one in anchors[1:]:
        torch.testing.assert_close(one.theta, anchors[0].theta, rtol=1e-12, atol=0)


def test_a_state_continues_exactly_and_an_overflow_is_forgotten() -> None:
    z, codec = teacher(30, 80), Anchored(80, (1.0,), 6)
    student = z + 1
    whole, first = Anchor(), Anchor()
    for step in range(6):
        if step == 3:
            stored = json.dumps(first.state_dict())
            first = Anchor()
            first.load_state_dict(json.loads(stored))
        for anchor in (whole, first):
            gradient(student, draw(z, step, codec), anchor)
            anchor.update()
        assert torch.equal(whole.theta, first.theta)
    before = whole.state_dict()
    whole.add(torch.tensor([1.0, torch.inf, torch.nan, 1.0, 1.0]), torch.tensor(1.0))
    whole.update()
    assert 0 <= float(whole.theta) <= 1
    assert whole.state_dict()["past"] == pytest.approx([0.99 * x for x in before["past"]])
    fixed = Anchor(0.3)
    fixed.load_state_dict(before)
    assert float(fixed.theta) == pytest.approx(0.3)


@pytest.mark.parametrize("form", ["reference", "fused"])
def test_theta_does_not_depend_on_the_unit_of_the_weights(form: str) -> None:
    """Of a student whose favourites are never drawn: what the draws fall short of decides."""
    z = teacher(60, 200, scale=3.0)
    codec, contrary = Anchored(200, (1.0,), 8), z.clone()
    contrary[:, 150] = z.amax(-1) + 2
    contrary[:, 3:6] = z[:, 3:6]
    thetas = []
    for unit in (0.01, 1.0, 30.0):
        anchor, weights = Anchor(), unit * torch.linspace(0.5, 2, len(z))
        for step in range(3):
            targets = draw(z, step, codec)
            options: dict[str, Any] = {"alpha": 0.0, "position_weights": weights, "anchor": anchor}
            labels, student = torch.full((len(z),), NO_LABEL), contrary.clone().requires_grad_()
            if form == "reference":
                distillation_loss(student, labels, targets, **options)
            else:
                fused_linear_distillation(student, torch.eye(200), None, labels, targets, **options)
            anchor.update()
        thetas.append(float(anchor.theta))
    assert thetas[0] == pytest.approx(thetas[1], rel=1e-3)
    assert thetas[2] == pytest.approx(thetas[1], rel=1e-3)
    assert 0 < thetas[1] < 1


def test_doubt_fades_with_the_draws_that_theta_rests_on() -> None:
    found = []
    for draws in (1, 30, 3000, 300_000):
        anchor = Anchor()
        cost = 2.0
        figures = torch.tensor([0.8, cost, 0.0, cost**2 / draws, 0.0]).double()
        anchor.add(figures, torch.tensor(1.0))
        anchor.update()
        found.append(float(anchor.theta))
    assert found == sorted(found)
    assert found[0] < 0.2
    assert found[-1] == pytest.approx(0.4, rel=0.01)


# ------------------------------------------------------------------------------------------- fused


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        SimpleNamespace,
        n=st.integers(1, 9),
        v=st.integers(2, 40),
        draws=st.integers(1, 12),
        padding=st.integers(0, 5),
        rows=st.integers(1, 10),
        temperatures=st.sampled_from([(1.0,), (1.5,), (1.0, 3.0)]),
        dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
        cap=st.sampled_from([None, 3.0]),
        weighted=st.booleans(),
        alpha=st.floats(0, 1),
        theta=st.floats(0, 1),
        sharp=st.sampled_from([0.3, 1.0, 6.0]),
        seed=st.integers(0, 2**31),
    )
)
def test_fused_equals_the_reference(case: Any) -> None:
    torch.manual_seed(case.seed)
    logits = case.sharp * torch.randn(case.n, case.v)
    stored = drawn(Anchored(case.v, case.temperatures, case.draws), logits)
    targets = stored.at(case.temperatures[-1])
    sizes = ((case.n, 1.0), (case.v + case.padding, case.sharp))
    inputs = [(x * torch.randn(n, 4)).to(case.dtype).requires_grad_() for n, x in sizes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    labels = torch.randint(-1, case.v, (case.n,))
    labels[labels < 0] = NO_LABEL
    options: dict[str, Any] = {"alpha": case.alpha, "vocab_size": case.v, "count": 3.0}
    options["position_weights"] = torch.rand(case.n) + 0.5 if case.weighted else None
    anchors = Anchor(case.theta), Anchor(case.theta)
    z = exact[0] @ exact[1].T
    z = z if case.cap is None else case.cap * torch.tanh(z / case.cap)
    want = distillation_loss(z, labels, targets, anchor=anchors[0], **options)
    options |= {"rows": case.rows, "cap": case.cap, "anchor": anchors[1]}
    got = fused_linear_distillation(*inputs, None, labels, targets, **options)
    loose = {torch.float64: 1e-9, torch.float32: 5e-5, torch.bfloat16: 0.2}[case.dtype]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=loose, atol=loose)
    want_gradients = torch.autograd.grad(want.total, exact)
    for g, w in zip(torch.autograd.grad(got.total, inputs), want_gradients, strict=True):
        # One entry of a rare id outweighs all others of the batch.
        largest = max(w.abs().max().item(), 0.1)
        torch.testing.assert_close(g.double(), w, rtol=loose, atol=loose * largest)
    if case.dtype != torch.bfloat16:
        torch.testing.assert_close(anchors[1]._step, anchors[0]._step, rtol=50 * loose, atol=1e-3)


def test_nothing_is_counted_where_nothing_is_learnt() -> None:
    targets = drawn(Anchored(50, (1.0,), 5), teacher(4, 50)).at(1.0)
    labels, z = torch.full((4,), NO_LABEL), torch.randn(4, 50, requires_grad=True)
    anchor = Anchor()
    with torch.no_grad():
        distillation_loss(z, labels, targets, alpha=0.0, anchor=anchor)
    distillation_loss(z, labels, targets, alpha=0.0, anchor=anchor, count=float("inf"))
    distillation_loss(z, labels, DenseTargets(torch.zeros(4, 50), 1.0), alpha=0.0, anchor=anchor)
    assert not anchor._step.any()
    distillation_loss(z, labels, targets, alpha=0.0, anchor=anchor)
    assert anchor._step.all()


@pytest.mark.parametrize("theta", [-0.1, 1.1, float("nan")])
def test_a_senseless_theta_is_refused(theta: float) -> None:
    with pytest.raises(UsageError, match="0 to 1"):
        Anchor(theta)
