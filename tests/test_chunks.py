"""Losses across tokenizers: values and gradients against plain sums over chunks and groups."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcache.loss import chunk_loss, chunks, distillation_loss, fused_linear_distillation
from kdcache.loss.chunks import binary_divergence, log1mexp
from kdcache.loss.reference import soft_capped
from kdcache.targets import ChunkTargets, Groups, SparseTargets

TAUS = (1.0, 3.0, 100.0)
WORDS = (b"", b"a", b"b", b"c", b"ab", b"abc", b"bc", b"ca", b"cab", b"cabc")


def plain_loss(z: Tensor, labels: Tensor, targets: ChunkTargets, alpha: float) -> Any:
    """From the definitions, one chunk and one group at a time."""
    p = torch.softmax(z, -1)
    own = [torch.log(p[i, int(labels[i])]) for i in range(len(labels))]
    hard = -sum(own)
    soft: Any = torch.zeros((), dtype=z.dtype)
    for a, b, t in zip(targets.begin, targets.end, targets.likelihood.double(), strict=True):
        theirs, ours = torch.exp(t / targets.tau), torch.exp(sum(own[a:b]) / targets.tau)
        both = theirs * torch.log(theirs / ours)
        soft = soft + targets.tau * (
            both + (1 - theirs) * torch.log((1 - theirs) / (1 - ours)) if theirs < 1 else both
        )
    if targets.soft is not None and targets.groups is not None and targets.positions is not None:
        for row, place in enumerate(targets.positions):
            soft = soft + plain_groups(p[place], targets.groups, targets.soft, row)
    return alpha * hard + (1 - alpha) * soft


def plain_groups(p: Tensor, groups: Groups, soft: SparseTargets, row: int) -> Any:
    """KL over groups at a position, or the cross-entropy of a sample."""
    mass = {g: p[groups.student == g].sum() for g in range(groups.count)}
    weights: dict[int, float] = {}
    for g, w in zip(soft.ids[row].tolist(), soft.weights[row].double().tolist(), strict=True):
        if w > 0:
            weights[g] = weights.get(g, 0.0) + w
    if not soft.exact:
        return sum(-w * torch.log(mass[g]) for g, w in weights.items())
    loss: Any = sum(w * (math.log(w) - torch.log(mass[g])) for g, w in weights.items())
    rest, outside = soft.tail[row].double(), sum(m for g, m in mass.items() if g not in weights)
    if rest == 0 or outside == 0:  # or the student has no such outcome
        return loss
    return loss + rest * (torch.log(rest) - torch.log(outside))


def some_targets(seed: int, n: int, v: int, tau: float, kind: str) -> ChunkTargets:
    """Chunks of random sizes with gaps between them, and distributions at some of their places."""
    rng = np.random.default_rng(seed)
    edges = np.unique(rng.integers(0, n + 1, n))
    kept = rng.random(max(len(edges) - 1, 0)) < 0.8
    begin, end = edges[:-1][kept], edges[1:][kept]
    likelihood = torch.from_numpy(-rng.exponential(2.0, len(begin)).astype(np.float32))
    likelihood[rng.random(len(begin)) < 0.1] = 0
    targets = ChunkTargets(n, begin, end, likelihood, tau)
    if kind == "likelihood":
        return targets
    torch.manual_seed(seed)
    count, theirs, k = 5, 12, 4
    groups = Groups(torch.randint(0, count, (theirs,)), torch.randint(0, count - 1, (v,)), count)
    top = torch.softmax(torch.randn(len(begin), theirs), -1).topk(k)
    exact = kind == "topk"
    tail = 1 - top.values.sum(-1) if exact else torch.zeros(len(begin))
    soft = groups.of_targets(SparseTargets(top.indices, top.values, tail, exact, 1.0))
    return dataclasses.replace(targets, positions=begin, soft=soft, groups=groups)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 30),
    kind=st.sampled_from(["likelihood", "topk", "sample"]),
    tau=st.sampled_from(TAUS),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_the_loss_is_its_definition(seed: int, n: int, kind: str, tau: float, alpha: float) -> None:
    torch.manual_seed(seed)
    v = 9
    targets = some_targets(seed, n, v, tau, kind)
    z = (2 * torch.randn(n, v, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, v, (n,))
    plain = plain_loss(z, labels, targets, alpha) / 7
    ours = chunk_loss(z, labels, targets, alpha=alpha, count=7)
    torch.testing.assert_close(ours.total, plain, rtol=1e-9, atol=1e-12)
    expected, got = (torch.autograd.grad(x, z)[0] for x in (plain, ours.total))
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        SimpleNamespace,
        seed=st.integers(0, 10**6),
        n=st.integers(0, 40),
        kind=st.sampled_from(["likelihood", "topk", "sample"]),
        tau=st.sampled_from(TAUS),
        rows=st.sampled_from([1, 7, 1000]),
        cap=st.sampled_from([None, 3.0]),
        padding=st.sampled_from([0, 3]),
        listed=st.booleans(),
    )
)
def test_the_fused_loss_is_the_reference(case: Any) -> None:
    torch.manual_seed(case.seed)
    v, h = 9, 6
    targets = some_targets(case.seed, case.n, v, case.tau, case.kind)
    options = {"dtype": torch.float64, "requires_grad": True}
    sizes = (case.n, h), (v + case.padding, h), (v + case.padding,)
    hidden, weight, bias = (torch.randn(size, **options) for size in sizes)
    labels = torch.randint(0, v, (case.n,))
    given_: dict[str, Any] = {"alpha": 0.3, "count": 11.0, "vocab_size": v}
    z = soft_capped(hidden @ weight.T + bias, case.cap)
    want = chunk_loss(z, labels, targets, **given_)
    given_ |= {"cap": case.cap, "rows": case.rows}
    with way(case.listed):
        got = fused_linear_distillation(hidden, weight, bias, labels, targets, **given_)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for a, b in zip(
        *(torch.autograd.grad(x.total, (hidden, weight, bias)) for x in (got, want)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@contextlib.contextmanager
def way(listed: bool) -> Iterator[None]:
    """Have the loss take the ids of listed groups one by one, or all ids of a position at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "_FEW", 0.001 if listed else 1e9)
        yield


@pytest.mark.parametrize(
    ("kind", "listed"), [("likelihood", True), ("topk", True), ("topk", False)]
)
@pytest.mark.parametrize("tau", TAUS)
def test_float32_keeps_the_gradient_of_a_student_that_is_nearly_sure(
    tau: float, kind: str, listed: bool
) -> None:
    torch.manual_seed(0)
    n, v = 24, 9
    targets = some_targets(3, n, v, tau, kind)
    labels = torch.randint(0, v, (n,))
    weight = torch.eye(v)
    # 1 - p of these is from 1e-1 to 1e-10, or 1 at a label that is wrong.
    hidden = torch.zeros(n, v).scatter(1, labels[:, None], torch.linspace(4, 25, n)[:, None])
    hidden[::5] = hidden[::5].roll(1, -1)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        x = hidden.to(dtype).requires_grad_()
        with way(listed):
            loss = fused_linear_distillation(x, weight.to(dtype), None, labels, targets, alpha=0.3)
        gradients.append(torch.autograd.grad(loss.total, x)[0])
        reference = chunk_loss(hidden.double(), labels, targets, alpha=0.3).total
        torch.testing.assert_close(loss.total.double(), reference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=2e-4, atol=1e-12)
    assert gradients[0].isfinite().all()


def test_certain_and_impossible_numbers_stay_finite() -> None:
    teacher = torch.tensor([0.0, 0.0, -1e-30, -90.0, -1e4])
    student = torch.tensor([0.0, -3.0, -1e-12, 0.0, -2e4]).requires_grad_()
    for tau in TAUS:
        loss = binary_divergence(teacher, student, tau)
        (slope,) = torch.autograd.grad(loss.sum(), student)
        assert loss.isfinite().all()
        assert slope.isfinite().all()
        assert (loss >= -1e-6).all()
        torch.testing.assert_close(loss[1], torch.tensor(3.0))  # a sure teacher: cross-entropy
    x = torch.tensor([-1e-30, -1e-8, -0.5, -1.0, -50.0, -1e4], dtype=torch.float64)
    torch.testing.assert_close(log1mexp(x), torch.log(-torch.expm1(x)), rtol=1e-12, atol=1e-20)


def test_large_tau_compares_surprisals() -> None:
    a, b = torch.tensor([0.3, 2.0, 7.0]).double(), torch.tensor([1.0, 0.5, 9.0]).double()
    limit = a * (a / b).log() + b - a
    torch.testing.assert_close(binary_divergence(-a, -b, 1e6), limit, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exact", [True, False])
def test_one_tokenizer_on_both_sides_is_the_usual_loss(exact: bool) -> None:
    torch.manual_seed(1)
    vocabulary = [bytes([i]) for i in range(65, 74)]
    groups = Groups.of(vocabulary, vocabulary)
    assert sorted(groups.student.tolist()) == list(range(1, 10))
    n, v = 12, len(vocabulary)
    top = torch.softmax(torch.randn(n, v), -1).topk(4)
    tail = 1 - top.values.sum(-1) if exact else torch.zeros(n)
    usual = SparseTargets(top.indices, top.values, tail, exact, 1.0)
    none = np.zeros(0, np.int64)
    soft = groups.of_targets(usual)
    places = np.arange(n)
    ours = ChunkTargets(n, none, none, torch.zeros(0), 1.0, places, soft, groups)
    labels = torch.randint(0, v, (n,))
    z = torch.randn(n, v, dtype=torch.float64, requires_grad=True)
    want = distillation_loss(z, labels, usual, alpha=0.3)
    eye = torch.eye(v, dtype=torch.float64)
    for got in (
        chunk_loss(z, labels, ours, alpha=0.3),
        fused_linear_distillation(z, eye, None, labels, ours, alpha=0.3),
    ):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        a, b = (torch.autograd.grad(x.total, z, retain_graph=True)[0] for x in (got, want))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_slices_and_batches_add_up() -> None:
    torch.manual_seed(2)
    n, v = 30, 9
    whole = some_targets(5, n, v, 2.0, "topk")
    z = torch.randn(n, v, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, v, (n,))
    want = torch.autograd.grad(chunk_loss(z, labels, whole, alpha=0.3, count=n).total, z)[0]
    parts = list(whole.cuts(8))
    assert len(parts) > 2
    total: Any = sum(
        chunk_loss(z[part], labels[part], whole[part], alpha=0.3, count=n).total for part in parts
    )
    torch.testing.assert_close(torch.autograd.grad(total, z)[0], want)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(0, 50), step=st.integers(1, 20))
def test_cuts_cover_all_positions_and_divide_no_chunk(seed: int, n: int, step: int) -> None:
    targets = some_targets(seed, n, 9, 1.0, "likelihood")
    parts = list(targets.cuts(step))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(n))
    for a, b in zip(targets.begin, targets.end, strict=True):
        assert any(part.start <= a and b <= part.stop for part in parts)
    for part in parts:
        longest = max((targets.end - targets.begin).tolist(), default=1)
        assert 0 < part.stop - part.start <= max(step, longest)


@settings(max_examples=80, deadline=None)
@given(
    teacher=st.lists(st.sampled_from(WORDS), max_size=12),
    student=st.lists(st.sampled_from(WORDS), max_size=12),
)
def test_each_group_is_what_begins_with_bytes_that_both_have(
    teacher: list[bytes], student: list[bytes]
) -> None:
    groups = Groups.of(teacher, student)
    assert len(groups.teacher) == len(teacher)
    assert len(groups.student) == len(student)
    members: dict[int, list[tuple[str, bytes]]] = {}
    for side, tokens, found in (("t", teacher, groups.teacher), ("s", student, groups.student)):
        for token, group in zip(tokens, found.tolist(), strict=True):
            assert 0 <= group < groups.count
            if group:
                members.setdefault(group, []).append((side, token))
    assert sorted(members) == list(range(1, groups.count))
    for inside in members.values():
        root = min((token for _, token in inside), key=len)
        assert {side for side, token in inside if token == root} == {"t", "s"}
        assert all(token.startswith(root) for _, token in inside)
    both = set(teacher) & set(student) - {b""}
    for token in both:  # it is together with its like
        groups_of_it = {
            int(found[i])
            for tokens, found in ((teacher, groups.teacher), (student, groups.student))
            for i in range(len(tokens))
            if tokens[i] == token
        }
        assert len(groups_of_it) == 1
        assert 0 not in groups_of_it


def test_mass_that_a_student_cannot_express_joins_the_tail() -> None:
    groups = Groups.of([b"a", b"b", b"x", b""], [b"a", b"ab", b"b", b""], {3: 3})
    assert groups.teacher.tolist() == [1, 2, 0, 3]
    assert groups.student.tolist() == [1, 1, 2, 3]
    ids, weights = torch.tensor([[0, 2, 3]]), torch.tensor([[0.5, 0.2, 0.2]])
    exact = groups.of_targets(SparseTargets(ids, weights, torch.tensor([0.1]), True, 1.0))
    assert exact.weights.tolist() == [[0.5, 0.0, pytest.approx(0.2)]]
    assert exact.tail.tolist() == [pytest.approx(0.3)]
    sample = groups.of_targets(SparseTargets(ids, weights, torch.zeros(1), False, 1.0))
    assert sample.tail.tolist() == [0]
    assert sample.weights[0, 1] == 0
