"""Losses and gradients against a plain float64 reference: one position, one id at a time."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.loss import (
    distillation_loss,
    fused_linear_distillation,
    passes,
    sliced_linear_distillation,
)
from kdcache.targets import DenseTargets, SparseTargets, Targets
from kdcache.targets.decoded import no_targets

TEMPERATURES = (1.0, 2.0, 4.0)
KINDS = ("dense", "bucket", "renormalize", "sample")
CPU = torch.device("cpu")


def tail_of(kind: str) -> str:
    return "renormalize" if kind == "renormalize" else "bucket"


def plain_softmax(row: list[Tensor]) -> list[Tensor]:
    total = sum(torch.exp(z) for z in row)
    return [torch.exp(z) / total for z in row]


def plain_kl(p: list[Any], q: list[Any]) -> Any:
    return sum(a * torch.log(torch.as_tensor(a) / b) for a, b in zip(p, q, strict=True) if a > 0)


def plain_position(
    z: Tensor, label: int, target: Targets, i: int, t: float, kind: str, divergence: str
) -> tuple[Any, Any]:
    """(hard, soft) of one position from the definitions, without a single trick."""
    hard = -torch.log(plain_softmax(list(z))[label]) if label >= 0 else torch.tensor(0.0).double()
    student = plain_softmax([value / t for value in z])
    if isinstance(target, DenseTargets):
        teacher = plain_softmax([value / t for value in target.logits[i].double()])
    else:
        entries = [
            (int(k), w.double())
            for k, w in zip(target.ids[i], target.weights[i], strict=True)
            if w > 0
        ]
        if kind == "sample":
            return hard, t * t * sum(-w * torch.log(student[k]) for k, w in entries)
        teacher = [w for _, w in entries]
        chosen = [student[k] for k, _ in entries]
        if kind == "renormalize":
            teacher = [w / sum(teacher) for w in teacher]
        elif len(entries) < len(student):
            listed = {k for k, _ in entries}
            teacher.append(target.tail[i].double())
            chosen.append(torch.stack([p for k, p in enumerate(student) if k not in listed]).sum())
        student = chosen
    if divergence == "forward-kl":
        soft = plain_kl(teacher, student)
    elif divergence == "reverse-kl":
        soft = plain_kl(student, teacher)
    else:
        mixture = [(a + b) / 2 for a, b in zip(teacher, student, strict=True)]
        soft = (plain_kl(teacher, mixture) + plain_kl(student, mixture)) / 2
    return hard, t * t * soft


def plain_loss(
    z: Tensor,
    labels: Tensor,
    targets: Targets,
    *,
    alpha: float,
    t: float,
    kind: str,
    divergence: str,
    vocab_size: int,
    count: float,
    position_weights: Tensor,
) -> tuple[Any, Any, Any]:
    hard: Any = 0
    soft: Any = 0
    for i, label in enumerate(labels.tolist()):
        h, s = plain_position(z[i, :vocab_size], label, targets, i, t, kind, divergence)
        hard, soft = hard + position_weights[i] * h, soft + position_weights[i] * s
    hard, soft = hard / count, soft / count
    return alpha * hard + (1 - alpha) * soft, hard, soft


def make_targets(
    kind: str, n: int, v: int, k: int, t: float, dtype: torch.dtype = torch.float64
) -> Targets:
    logits = torch.randn(n, v, dtype=torch.float64) * 2
    if kind == "dense":
        return DenseTargets(logits.to(dtype), t)
    probabilities = (logits / t).softmax(-1)
    weights, ids = probabilities.topk(min(k, v), -1)
    rest = 1 - weights.sum(-1)
    if kind == "sample":
        weights, rest = weights * (torch.rand_like(weights) + 0.5), torch.zeros_like(rest)
    if k < v:  # an unused slot in the first row: id 0, weight 0
        rest[0] += weights[0, -1] if kind != "sample" else 0
        weights[0, -1], ids[0, -1] = 0, 0
    return SparseTargets(ids, weights.to(dtype), rest.to(dtype), kind != "sample", t)


def make_case(
    kind: str, t: float, *, n: int = 7, h: int = 5, v: int = 12, padding: int = 3, k: int = 4
) -> dict[str, Any]:
    labels = torch.randint(0, v, (n,))
    labels[n // 2] = -100
    targets = make_targets(kind, n, v, k, t)
    if isinstance(targets, SparseTargets):
        labels[-1] = targets.ids[-1, 0]  # a label that is among the entries
    return {
        "hidden": torch.randn(n, h, dtype=torch.float64, requires_grad=True),
        "weight": torch.randn(v + padding, h, dtype=torch.float64, requires_grad=True),
        "bias": torch.randn(v + padding, dtype=torch.float64, requires_grad=True),
        "labels": labels,
        "targets": targets,
        "options": {
            "alpha": 0.3,
            "tail": tail_of(kind),
            "vocab_size": v,
            "count": 5.0,
            "position_weights": torch.rand(n, dtype=torch.float64) + 0.5,
        },
    }


def compare(got: Any, want: Any, inputs: list[Tensor], **tolerance: Any) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, torch.as_tensor(w).detach().to(g), **tolerance)
    gradients = (torch.autograd.grad(x[0], inputs, retain_graph=True) for x in (got, want))
    for g, w in zip(*gradients, strict=True):
        torch.testing.assert_close(g, w, **tolerance)


def loss_of(
    form: str,
    inputs: list[Tensor | None],
    labels: Tensor,
    targets: Targets,
    rows: int,
    **options: Any,
) -> Any:
    """The loss in one of its forms, of hidden states, weight and bias."""
    hidden, weight, bias = inputs
    if form == "reference":
        logits = hidden @ weight.T + (0 if bias is None else bias)  # type: ignore[operator,union-attr]
        return distillation_loss(logits, labels, targets, **options)
    function: Any = {"fused": fused_linear_distillation, "sliced": sliced_linear_distillation}[form]
    return function(hidden, weight, bias, labels, targets, rows=rows, **options)


FORMS = ("reference", "sliced", "fused")
DEFINED = [
    *((form, kind, {}) for form in FORMS for kind in KINDS),
    *((form, kind, {"cap": x}) for form in FORMS[1:] for kind in KINDS for x in (0.5, 4.0)),
    *(
        (form, kind, {"divergence": name})
        for form in FORMS[:2]
        for kind in ("dense", "bucket")
        for name in ("reverse-kl", "jsd")
    ),
]


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize(("form", "kind", "more"), DEFINED)
def test_each_form_is_the_definition(form: str, kind: str, more: dict[str, Any], t: float) -> None:
    torch.manual_seed(0)
    case = make_case(kind, t)
    inputs = [case["hidden"], case["weight"], case["bias"]]
    options: dict[str, Any] = case["options"]
    z = inputs[0] @ inputs[1].T + inputs[2]
    if cap := more.get("cap"):
        z = cap * (1 - 2 / ((2 * z / cap).exp() + 1))
    plain = {k: v for k, v in options.items() if k != "tail"}
    divergence = more.get("divergence", "forward-kl")
    want = plain_loss(
        z, case["labels"], case["targets"], t=t, kind=kind, divergence=divergence, **plain
    )
    got = loss_of(form, inputs, case["labels"], case["targets"], 3, **options, **more)
    compare(got, want, inputs, rtol=1e-9, atol=1e-12)
    if not more:
        d_weight = torch.autograd.grad(want[0], inputs[1])[0]
        assert (d_weight[options["vocab_size"] :] == 0).all()
        assert (d_weight[: options["vocab_size"]] != 0).any()


def test_mse_is_the_recipe_of_tang_2019() -> None:
    torch.manual_seed(2)
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 3, dtype=torch.float64)
    labels = torch.tensor([0, 2, -100, 1])
    got = distillation_loss(z, labels, DenseTargets(teacher, 1.0), alpha=0.2, divergence="mse")
    hard = sum(-torch.log(plain_softmax(list(z[i]))[labels[i]]) for i in (0, 1, 3)) / 4
    soft = sum((z[i, j] - teacher[i, j]) ** 2 for i in range(4) for j in range(3)) / 12
    compare(got, (0.2 * hard + 0.8 * soft, hard, soft), [z], rtol=1e-10, atol=1e-12)


def test_high_temperature_keeps_the_gradients_scale() -> None:
    torch.manual_seed(3)
    z = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 8, dtype=torch.float64)
    parts = distillation_loss(z, torch.full((6,), -100), DenseTargets(teacher, 1e4), alpha=0.0)
    got = torch.autograd.grad(parts.total, z)[0]
    difference = z.detach() - teacher
    want = (difference - difference.mean(-1, keepdim=True)) / 8 / 6
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        SimpleNamespace,
        n=st.integers(1, 9),
        h=st.integers(1, 6),
        v=st.integers(2, 40),
        k=st.integers(1, 12),
        padding=st.integers(0, 5),
        rows=st.integers(1, 10),
        t=st.sampled_from([1.0, 1.5, 3.0]),
        kind=st.sampled_from(KINDS),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        bias=st.booleans(),
        cap=st.sampled_from([None, 0.5, 3.0, 30.0]),
        alpha=st.floats(0, 1),
        seed=st.integers(0, 2**31),
    )
)
def test_fused_equals_the_reference_on_the_same_numbers(case: Any) -> None:
    torch.manual_seed(case.seed)
    width = case.v + case.padding
    shapes = (case.n, case.h), (width, case.h), (width,)
    inputs = [torch.randn(s).to(case.dtype).requires_grad_() for s in shapes[: 2 + case.bias]]
    labels = torch.randint(-1, case.v, (case.n,))
    labels[labels < 0] = -100
    targets = make_targets(case.kind, case.n, case.v, case.k, case.t, torch.float32)
    options = {"alpha": case.alpha, "tail": tail_of(case.kind), "vocab_size": case.v}
    exact = [x.detach().double().requires_grad_() for x in inputs]
    z = exact[0] @ exact[1].T + (exact[2] if case.bias else 0)
    z = z if case.cap is None else case.cap * torch.tanh(z / case.cap)
    want = distillation_loss(z, labels, targets, **options)
    options |= {"cap": case.cap, "rows": case.rows}
    bias = inputs[2] if case.bias else None
    got = fused_linear_distillation(*inputs[:2], bias, labels, targets, **options)
    # The compute dtype rounds the logits (relative 2^-8 for bfloat16, of numbers up to about 10)
    # and the gradients.
    loose = {torch.float32: 2e-5, torch.bfloat16: 0.15, torch.float16: 0.02}[case.dtype]
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g.double(), w, rtol=loose, atol=loose)
    want_grads = torch.autograd.grad(want.total, exact)
    for g, w in zip(torch.autograd.grad(got.total, inputs), want_grads, strict=True):
        assert g.dtype == case.dtype
        torch.testing.assert_close(
            g.double(), w, rtol=loose, atol=loose * max(w.abs().max().item(), 0.1)
        )


@pytest.mark.parametrize("t", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_what_all_logits_have_in_common_costs_no_precision(form: str, kind: str, t: float) -> None:
    torch.manual_seed(15)
    z = (torch.randn(6, 12) * 2 + 1e4).requires_grad_()
    exact = z.detach().double().requires_grad_()
    targets, labels = make_targets(kind, 6, 12, 4, t, torch.float32), torch.arange(6)
    if isinstance(targets, DenseTargets):
        targets = DenseTargets(targets.logits - 1e4, t)
    options: dict[str, Any] = {"alpha": 0.3, "tail": tail_of(kind)}
    want = distillation_loss(exact, labels, targets, **options)
    got = loss_of(form, [z, torch.eye(12), None], labels, targets, 4, **options)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(x.total, y)[0] for x, y in ((got, z), (want, exact))]
    torch.testing.assert_close(
        gradients[0].double(), gradients[1], rtol=1e-4, atol=1e-5 * float(gradients[1].abs().max())
    )


def test_entries_of_a_confident_student_are_not_rounded_away() -> None:
    """p = 1 - 1e-3 is 1 in bfloat16; the gradient p - 1 must still be -1e-3, not 0."""
    hidden = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[6.0], [-0.90625]], dtype=torch.bfloat16)
    z = (hidden.detach() @ weight.T).double()
    p = z.softmax(-1)
    assert p[0, 0].to(torch.bfloat16) == 1
    labels = torch.tensor([0])
    got = fused_linear_distillation(hidden, weight, None, labels, no_targets(1, CPU), alpha=1.0)
    want = (p - torch.tensor([[1.0, 0.0]], dtype=torch.float64)) @ weight.double()
    torch.testing.assert_close(
        torch.autograd.grad(got.total, hidden)[0].double(), want, rtol=0.02, atol=0
    )


def test_tail_of_a_confident_student_is_not_lost_in_a_difference() -> None:
    """The student leaves 4e-12 for the tail: 1 - p would be 0 in float32, its log infinite."""
    z = torch.tensor([[30.0, 1.0, 2.0, 3.0]])
    kept = torch.tensor([[0]]), torch.tensor([[0.75]]), torch.tensor([0.25])
    targets, labels = SparseTargets(*kept, exact=True, temperature=1.0), torch.tensor([-100])
    want = distillation_loss(z.double(), labels, targets, alpha=0.0).total
    hidden = z.clone().requires_grad_()
    for got in (
        distillation_loss(z, labels, targets, alpha=0.0).total,
        fused_linear_distillation(hidden, torch.eye(4), None, labels, targets, alpha=0.0).total,
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    assert want > 6
    torch.testing.assert_close(
        torch.autograd.grad(got, hidden)[0].sum(), torch.tensor(0.0), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_top_k_of_the_whole_vocabulary_is_dense(t: float) -> None:
    torch.manual_seed(5)
    teacher = torch.randn(5, 9, dtype=torch.float64)
    weights, ids = (teacher / t).softmax(-1).topk(9, -1)
    rest = torch.full((5,), 1e-8, dtype=torch.float64)  # what rounding leaves
    topk = SparseTargets(ids, weights, rest, True, t)
    labels = torch.tensor([1, 2, -100, 0, 8])
    hidden = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(9, dtype=torch.float64)
    want = distillation_loss(hidden, labels, DenseTargets(teacher, t), alpha=0.5)
    for got in (
        distillation_loss(hidden, labels, topk, alpha=0.5),
        fused_linear_distillation(hidden, eye, None, labels, topk, alpha=0.5),
    ):
        compare(got, want, [hidden], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_accumulation_with_count_equals_one_batch(form: str) -> None:
    torch.manual_seed(7)
    case = make_case("sample", 2.0, n=9)
    hidden, weight, bias, labels, targets = (
        case[k] for k in ("hidden", "weight", "bias", "labels", "targets")
    )
    options: dict[str, Any] = {"alpha": 0.4, "vocab_size": 12}

    def loss(part: slice, count: float | Tensor | None) -> Any:
        inputs = [hidden[part], weight, bias]
        given = (labels[part], targets[part], 4)
        return loss_of(form, inputs, *given, count=count, **options).total

    want = torch.autograd.grad(loss(slice(0, 9), None), [hidden, weight, bias])
    for part in (slice(0, 2), slice(2, 9)):
        loss(part, torch.tensor(9.0)).backward()
    for tensor, gradient in zip((hidden, weight, bias), want, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


@pytest.mark.parametrize(
    "wanted",
    [(True, False, False), (False, True, False), (False, False, True), (False, False, False)],
)
def test_only_the_gradients_asked_for(wanted: tuple[bool, ...]) -> None:
    torch.manual_seed(8)
    case = make_case("bucket", 2.0)
    inputs: list[Any] = [
        case[k].detach().requires_grad_(w)
        for k, w in zip(("hidden", "weight", "bias"), wanted, strict=True)
    ]
    whole = [case[k] for k in ("hidden", "weight", "bias")]
    given = case["labels"], case["targets"], 4
    full = loss_of("fused", whole, *given, **case["options"])
    parts = loss_of("fused", inputs, *given, **case["options"])
    torch.testing.assert_close(parts.total, full.total)
    assert parts.total.requires_grad == any(wanted)
    assert not parts.hard.requires_grad
    if any(wanted):
        parts.total.backward()
        full.total.backward()
    for x, key, w in zip(inputs, ("hidden", "weight", "bias"), wanted, strict=True):
        assert (x.grad is not None) == w
        if w:
            torch.testing.assert_close(x.grad, case[key].grad)
    with torch.no_grad():
        quiet = loss_of("fused", whole, *given, **case["options"])
    assert not quiet.total.requires_grad
    torch.testing.assert_close(quiet.total, full.total)


def test_autocast_computes_in_low_precision_and_returns_float32_gradients() -> None:
    torch.manual_seed(9)
    case = make_case("sample", 1.0, n=32, h=16, v=50, k=8)
    inputs = [case[k].detach().float().requires_grad_() for k in ("hidden", "weight", "bias")]
    options: dict[str, Any] = case["options"] | {"count": None, "position_weights": None}
    given = inputs, case["labels"], case["targets"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss_of("fused", *given, 5, **options)
    want = loss_of("fused", *given, 32, **options)
    assert got.total != want.total
    torch.testing.assert_close(got.total, want.total, rtol=0.02, atol=0.02)
    for g, w in zip(
        torch.autograd.grad(got.total, inputs), torch.autograd.grad(want.total, inputs), strict=True
    ):
        assert g.dtype == torch.float32
        assert (g - w).norm() < 0.02 * w.norm()


def test_float16_gradients_survive_a_large_count_and_a_scaler() -> None:
    """1 / 100,000 of a gradient underflows float16: the scaler's 2^16 must come before rounding."""
    torch.manual_seed(10)
    case = make_case("sample", 1.0, n=16, h=8, v=200, k=4)
    hidden, weight = (case[k].detach().half().requires_grad_() for k in ("hidden", "weight"))
    options: dict[str, Any] = {"alpha": 0.5, "vocab_size": 200, "count": 1e5}
    got = fused_linear_distillation(
        hidden, weight, None, case["labels"], case["targets"], **options
    )
    (got.total * 2.0**16).backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = distillation_loss(exact[0] @ exact[1].T, case["labels"], case["targets"], **options)
    for x, w in zip(
        (hidden, weight), torch.autograd.grad(want.total * 2.0**16, exact), strict=True
    ):
        assert x.grad is not None
        assert (x.grad.double() - w).norm() < 0.005 * w.norm()


def test_low_precision_weight_gradient_does_not_lose_late_slices() -> None:
    """1,024 equal slices: a running sum in bfloat16 would stop growing at 2^8 times one slice."""
    hidden = torch.ones(1024, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels, empty = torch.zeros(1024, dtype=torch.int64), no_targets(1024, CPU)
    parts = loss_of("fused", [hidden, weight, None], labels, empty, 1, alpha=1.0, count=1.0)
    assert torch.autograd.grad(parts.total, weight)[0].tolist() == [[-512.0], [512.0]]


def test_a_slice_on_a_cpu_is_small_against_the_weight() -> None:
    rows = {}
    for width, size in ((49_152, 576), (128_256, 576), (128_256, 1024), (128_256, 8192)):
        rows[width, size] = passes.slice_rows(10**6, width, size, CPU, None)
    assert list(rows.values()) == [341, 144, 256, 1024]
    assert all(n * width <= max(2**24, width * size / 4) for (width, size), n in rows.items())


def test_an_infinite_count_is_weight_zero() -> None:
    case = make_case("sample", 2.0)
    options: dict[str, Any] = case["options"] | {"count": torch.tensor(math.inf)}
    parts = fused_linear_distillation(
        case["hidden"], case["weight"], None, case["labels"], case["targets"], **options
    )
    parts.total.backward()
    assert parts.total == 0
    assert (case["weight"].grad == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_batch_is_zero_and_connected(form: str) -> None:
    hidden = torch.zeros(0, 3, requires_grad=True)
    weight = torch.randn(6, 3, requires_grad=True)
    targets, labels = make_targets("bucket", 7, 6, 2, 2.0)[:0], torch.zeros(0, dtype=torch.int64)
    parts = loss_of(form, [hidden, weight, None], labels, targets, 4, alpha=0.5)
    parts.total.backward()
    assert parts.total == 0
    assert weight.grad is not None
    assert (weight.grad == 0).all()


ONE_ID = (torch.tensor([[0]]), torch.ones(1, 1), torch.zeros(1))
SPARSE = SparseTargets(*ONE_ID, exact=True, temperature=1.0)
SAMPLE = SparseTargets(*ONE_ID, exact=False, temperature=1.0)


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (SPARSE, {"divergence": "mse"}, "--codec dense"),
        (SAMPLE, {"divergence": "mse"}, "--codec dense"),
        (SAMPLE, {"divergence": "reverse-kl"}, "forward-kl"),
        (SAMPLE, {"divergence": "jsd"}, "forward-kl"),
        (SPARSE, {"divergence": "jsd", "tail": "renormalize"}, "--tail bucket"),
        (DenseTargets(torch.zeros(1, 3), 2.0), {"divergence": "mse"}, "--temperature 1"),
        (SPARSE, {"divergence": "kl"}, "forward-kl, reverse-kl, jsd, mse"),
        (SPARSE, {"tail": "drop"}, "bucket, renormalize"),
        (SPARSE, {"vocab_size": 4}, "3 outputs.*over 4"),
        (DenseTargets(torch.zeros(1, 5), 1.0), {}, "3 outputs.*over 5"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_combinations_without_a_meaning(
    targets: Targets, options: dict[str, Any], message: str, form: str
) -> None:
    inputs = [torch.zeros(1, 2), torch.zeros(3, 2), None]
    given = torch.tensor([0]), targets, 4
    with pytest.raises(UsageError, match=message):
        loss_of(form, inputs, *given, **{"alpha": 0.5, **options})
    if form == "fused":
        with pytest.raises(UsageError, match="use sliced_linear_distillation"):
            loss_of(form, inputs, given[0], SPARSE, 4, alpha=0.5, divergence="jsd")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [1.0, 2.0])
def test_on_a_gpu(t: float, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(12)
    n, h, v, k = 300, 64, 1000, 8
    hidden, weight = (
        torch.randn(n, h, device="cuda", dtype=dtype),
        torch.randn(v + 24, h, device="cuda", dtype=dtype) / 4,
    )
    labels = torch.randint(0, v, (n,), device="cuda")
    targets = make_targets(kind, n, v, k, t, torch.float32).to("cuda")
    options: dict[str, Any] = {"alpha": 0.3, "vocab_size": v, "tail": tail_of(kind)}
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    cap = None if t == 1 else 3.0
    z = exact[0] @ exact[1].T
    z = z if cap is None else cap * torch.tanh(z / cap)
    want = distillation_loss(z, labels, targets, **options)
    options |= {"cap": cap, "rows": 128}
    got = fused_linear_distillation(hidden, weight, None, labels, targets, **options)
    loose = {torch.float32: 2e-3, torch.bfloat16: 0.02, torch.float16: 5e-3}[dtype]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=loose, atol=loose)
    for g, w in zip(
        torch.autograd.grad(got.total, inputs), torch.autograd.grad(want.total, exact), strict=True
    ):
        assert (g.double() - w).norm() < loose * w.norm()
