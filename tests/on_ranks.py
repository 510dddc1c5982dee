"""Checks of a loss whose vocabulary is cut, on real processes: `python on_ranks.py WORLD FOLDER`.

Every rank runs the same checks in the same order and compares its part with one process's float64
loss. After each example the ranks agree whether it held, so that a failure leaves none waiting.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdcache.errors import UsageError
from kdcache.loss import (
    Anchor,
    VocabSlice,
    distillation_loss,
    fused,
    fused_linear_distillation,
    passes,
    sliced_linear_distillation,
)
from kdcache.stream import SumOverRanks
from kdcache.targets import (
    AnchoredTargets,
    DenseTargets,
    HiddenTargets,
    LabelTargets,
    OutputLayer,
    SparseTargets,
    Targets,
)
from kdcache.targets.chunks import ChunkTargets

KINDS = ("dense", "masked", "hidden", "bucket", "renormalize", "sample", "anchored", "labels")
FORMS: dict[str, Any] = {
    "fused": fused_linear_distillation,
    "sliced": sliced_linear_distillation,
}
DIVERGENCES = ("forward-kl", "reverse-kl", "jsd", "mse")


def rank() -> int:
    return distributed.get_rank()


def world() -> int:
    return distributed.get_world_size()


def agree(error: str | None) -> None:
    """Fail on all ranks if it failed on one."""
    errors: list[str | None] = [None] * world()
    distributed.all_gather_object(errors, error)
    found = [f"rank {r}: {e}" for r, e in enumerate(errors) if e]
    assert not found, "\n".join(found)


def together(function: Callable[..., None]) -> Callable[..., None]:
    def run(*arguments: Any, **named: Any) -> None:
        error = None
        try:
            function(*arguments, **named)
        except Exception:
            error = traceback.format_exc()
        agree(error)

    return run


def near(got: Tensor, want: Tensor, share: float, whole: Tensor | None = None) -> None:
    """The norm of a difference as a share of the norm of the whole that it is a part of.

    1e-7 is float32's own rounding, where a gradient of nearly equal distributions cancels.
    """
    off, norm = (
        float((got.double() - want).norm()),
        float((want if whole is None else whole).norm()),
    )
    assert off <= share * norm + (1e-12 if got.dtype == torch.float64 else 1e-7), (
        f"{off:.2g} off of {norm:.2g}"
    )


class Case:
    """A student's output layer, targets, and this rank's part of the layer."""

    def __init__(
        self,
        kind: str,
        lengths: list[int],
        *,
        n: int = 9,
        h: int = 5,
        v: int | None = None,
        k: int = 4,
        t: float = 2.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        bias: bool = True,
    ) -> None:
        torch.manual_seed(seed)
        size = sum(lengths)
        v = v or size
        starts = [sum(lengths[:r]) for r in range(world())]
        self.rows = slice(starts[rank()], starts[rank()] + lengths[rank()])
        self.hidden, self.weight = torch.randn(n, h).to(dtype), torch.randn(size, h).to(dtype)
        self.bias = torch.randn(size).to(dtype) if bias else None
        # Every first and last id of a slice is a label and among a target's entries.
        edges = [i for s, m in zip(starts, lengths, strict=True) for i in (s, s + m - 1)]
        edges = [i for i in edges if 0 <= i < v]
        self.labels = torch.randint(0, v, (n,))
        self.labels[::2] = torch.tensor(
            [edges[i % len(edges)] for i in range(len(self.labels[::2]))]
        )
        self.labels[n // 2 : n // 2 + 1] = -100
        self.targets = targets(kind, n, v, min(k, v), t, edges)
        self.options: dict[str, Any] = {
            "alpha": 1.0 if kind == "labels" else 0.3,
            "tail": "renormalize" if kind == "renormalize" else "bucket",
            "vocab_size": v,
            "count": 5.0,
            "position_weights": torch.rand(n) + 0.5,
        }

    def inputs(self, *, mine: bool, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Leaves: hidden states, and weight and bias of this rank or of all."""
        rows = self.rows if mine else slice(None)
        parts = [self.hidden, self.weight[rows]]
        parts += [] if self.bias is None else [self.bias[rows]]
        return [x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in parts]

    def whole(
        self, cap: float | None = None, **more: Any
    ) -> tuple[Any, list[Tensor], list[Tensor]]:
        """One process's loss in float64, its inputs and their gradients."""
        inputs = self.inputs(mine=False, dtype=torch.float64)
        z = inputs[0] @ inputs[1].T + (0 if self.bias is None else inputs[2])
        z = z if cap is None else cap * torch.tanh(z / cap)
        parts = distillation_loss(z, self.labels, self.targets, **self.options, **more)
        return parts, list(torch.autograd.grad(parts.total, inputs))

    def mine(self, gradients: list[Tensor]) -> list[Tensor]:
        """This rank's part of gradients of all."""
        return [gradients[0], *(g[self.rows] for g in gradients[1:])]


def targets(kind: str, n: int, v: int, k: int, t: float, edges: list[int]) -> Targets:
    if kind == "hidden":
        layer = OutputLayer(torch.randn(v, 6), torch.randn(v), scale=0.5, cap=4.0)
        return HiddenTargets(torch.randn(n, 6), layer, t)
    logits = torch.randn(n, v) * 2
    logits[:, edges] += 2
    if kind == "drawn":
        return LabelTargets(-torch.rand(n) * 4, -torch.rand(n) * 4, clip=1.5)
    if kind in ("dense", "masked"):
        if kind == "masked":  # ids that the teacher never gives
            logits[:, :-1:3] = -torch.inf
            logits[:, edges[0]] = 0
        return DenseTargets(logits, t)
    weights, ids = (logits / t).softmax(-1).topk(0 if kind == "labels" else k, -1)
    exact = kind in ("bucket", "renormalize")
    rest = 1 - weights.sum(-1) if exact else torch.zeros(n)
    if not exact:
        weights = weights * (torch.rand_like(weights) + 0.5)
    if kind == "sample" and n:
        weights[0, -1], ids[0, -1] = 0, 0  # an unused slot
    plain = SparseTargets(ids, weights, rest, exact, t)
    if kind != "anchored":
        return plain
    heads = torch.arange(n) % (k + 1)
    drawn = torch.arange(k) >= heads[:, None]
    inverse = torch.where(drawn, 1 + 10 * torch.rand(n, k), 0)
    return AnchoredTargets(**vars(plain), inverse=inverse, heads=heads)


def form_of(
    form: str,
    case: Case,
    inputs: list[Tensor],
    group: Any,
    cap: float | None,
    rows: int,
    **more: Any,
) -> Any:
    hidden, weight, *bias = inputs
    given: Any = {**case.options, **more, "group": group}
    if form != "reference":
        b = bias[0] if bias else None
        given |= {"cap": cap, "rows": rows}
        return FORMS[form](hidden, weight, b, case.labels, case.targets, **given)
    # A column-parallel layer: each rank's gradient of its input is a part of the whole.
    z = hidden @ weight.T + (bias[0] if bias else 0)
    z = z if cap is None else cap * torch.tanh(z / cap)
    return distillation_loss(z, case.labels, case.targets, **given)


def compare(
    case: Case, form: str, *, cap: float | None, rows: int, group: Any, **more: Any
) -> None:
    want, gradients = case.whole(cap, **more)
    inputs = case.inputs(mine=True)
    got = form_of(form, case, inputs, group, cap, rows, **more)
    exact = case.hidden.dtype == torch.float64
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-6, atol=1e-12 if exact else 1e-6)
    found = list(torch.autograd.grad(got.total, inputs))
    if form == "reference":
        distributed.all_reduce(found[0])
    for g, w, whole in zip(found, case.mine(gradients), gradients, strict=True):
        near(g, w, 1e-11 if exact else 1e-5, whole)


def any_shape() -> None:
    @settings(
        max_examples=50,
        deadline=None,
        derandomize=True,  # the same examples on every rank
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        lengths=st.lists(st.integers(0, 12), min_size=world(), max_size=world()),
        padding=st.integers(0, 7),
        n=st.integers(0, 9),
        h=st.integers(1, 6),
        k=st.integers(1, 12),
        rows=st.integers(1, 10),
        t=st.sampled_from([1.0, 1.5, 3.0]),
        kind=st.sampled_from(KINDS),
        form=st.sampled_from(["fused", "sliced", "reference"]),
        divergence=st.sampled_from(DIVERGENCES),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        bias=st.booleans(),
        cap=st.sampled_from([None, 3.0]),
        asked=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    def check(lengths: list[int], padding: int, n: int, h: int, **drawn: Any) -> None:
        size = sum(lengths)
        v = max(size - padding, 2)
        assume(size >= 2)
        kind, form, divergence, t = (drawn[x] for x in ("kind", "form", "divergence", "t"))
        if form == "fused" or kind not in ("dense", "hidden", "bucket"):
            divergence = "forward-kl"
        if divergence == "mse" and (t != 1 or kind not in ("dense", "hidden")):
            divergence = "jsd"
        shape = {name: drawn[name] for name in ("k", "t", "seed", "dtype", "bias")}
        group: Any = distributed.group.WORLD
        if not drawn["asked"]:
            start = sum(lengths[: rank()])
            group = VocabSlice(group.group_name, world(), start, lengths[rank()], size)
        more = {"divergence": divergence, "cap": drawn["cap"], "rows": drawn["rows"]}
        together(compare)(Case(kind, lengths, n=n, h=h, v=v, **shape), form, group=group, **more)

    check()


def every_codec() -> None:
    """What the shapes drawn may leave out: each codec, form and temperature once."""
    lengths = [7, 13, 3, 16][: world()]
    for kind in KINDS:
        for form in ("fused", "sliced", "reference"):
            for t in (1.0, 2.0):
                case = Case(kind, lengths, n=11, v=sum(lengths) - 2, t=t)
                together(compare)(case, form, cap=None, rows=4, group=distributed.group.WORLD)
    for form in ("fused", "reference"):  # a target without a tail, on a rank without ids
        case = Case("bucket", [0, *lengths[1:]], k=sum(lengths), t=1.0)
        together(compare)(case, form, cap=None, rows=4, group=distributed.group.WORLD)


def other_divergences() -> None:
    for divergence in DIVERGENCES[1:]:
        for kind in ("dense", "hidden") if divergence == "mse" else ("dense", "hidden", "bucket"):
            for form in ("sliced", "reference"):
                case = Case(kind, [7, 13, 3, 16][: world()], t=1.0)
                group = distributed.group.WORLD
                more: Any = {"divergence": divergence, "cap": None, "rows": 4}
                together(compare)(case, form, group=group, **more)
    for form in ("sliced", "reference"):
        more = {"divergence": "policy-gradient", "cap": None, "rows": 4}
        case = Case("drawn", [7, 13, 3, 16][: world()], t=1.0)
        together(compare)(case, form, group=distributed.group.WORLD, **more)


def anchored_samples() -> None:
    """The variate's gradient, and the sums that theta is estimated from, on every rank."""
    for t in (1.0, 2.0):
        for form in ("fused", "reference"):
            one, mine = Anchor(), Anchor()
            one.theta = mine.theta = torch.tensor(0.7, dtype=torch.float64)
            case = Case("anchored", [7, 13, 3, 16][: world()], n=40, t=t)
            want, gradients = case.whole(anchor=one)
            inputs = case.inputs(mine=True)
            group = distributed.group.WORLD
            got = form_of(form, case, inputs, group, None, 16, anchor=mine)
            found = list(torch.autograd.grad(got.total, inputs))
            if form == "reference":
                distributed.all_reduce(found[0])

            def check(found: Any, got: Any, want: Any, case: Case, gradients: Any) -> None:
                for g, w, whole in zip(found, case.mine(gradients), gradients, strict=True):
                    near(g, w, 1e-5, whole)
                torch.testing.assert_close(got.total.double(), want.total, rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(mine._step, one._step, rtol=1e-5, atol=1e-6)  # noqa: B023
                assert one._step[0] != 0  # noqa: B023

            together(check)(found, got, want, case, gradients)


class Traffic(TorchDispatchMode):
    """Counts collectives, and the bytes that each rank puts in."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            self.calls[func.__name__.split(".")[0]] += 1
            if isinstance(args[0], Tensor):
                self.bytes += args[0].numel() * args[0].element_size()
        return func(*args, **(kwargs or {}))


def what_is_exchanged() -> None:
    n, h, k, v = 24, 32, 6, 1000 * world()
    entries = {"bucket": k + 1, "sample": k + 1, "anchored": k + 1, "labels": 1}
    for kind in KINDS:
        for t in (1.0, 2.0):
            case = Case(kind, [1000] * world(), n=n, h=h, v=v, k=k, t=t)
            inputs = case.inputs(mine=True)
            name = distributed.group.WORLD.group_name  # type: ignore[union-attr]
            cut = VocabSlice(name, world(), 1000 * rank(), 1000, v)
            with Traffic() as forward:
                got = form_of("fused", case, inputs, cut, None, 8, anchor=Anchor(0.5))
            with Traffic() as backward:
                got.total.backward()
            numbers = (
                2 + 1 + 4
                if kind in ("dense", "masked", "hidden")
                else entries.get(kind, k + 1) + 1 + (1 if t == 1 else 2)
            )

            def check(forward: Traffic, backward: Traffic, numbers: int) -> None:
                assert forward.calls == {"all_reduce": 3 * 2}, forward.calls  # 3 slices
                assert forward.bytes == n * 4 * numbers, (forward.bytes / n, numbers)
                assert backward.calls == {"all_reduce": 1}, backward.calls
                assert backward.bytes == n * h * 4

            together(check)(forward, backward, numbers)


def a_group_costs_one_more() -> None:
    case = Case("bucket", [5] * world())
    with Traffic() as traffic, torch.no_grad():
        form_of("fused", case, case.inputs(mine=True), distributed.group.WORLD, None, 100)
    assert traffic.calls == {"all_reduce": 2, "allgather_": 1}, traffic.calls


def dtensors() -> None:
    """An output layer cut by PyTorch, states whole or cut by positions, logits of a cut layer."""
    mesh = init_device_mesh("cpu", (world(),))
    for n, size in ((8, 21), (7, 4 * world() - 1)):
        case = Case("bucket", split(size), n=n)
        want, gradients = case.whole()
        for placement in (None, Replicate(), Shard(0)):
            for form in ("fused", "sliced"):
                leaves = case.inputs(mine=False)
                weight, bias = (
                    distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_()
                    for x in leaves[1:]
                )
                hidden = leaves[0]
                if placement is not None:
                    hidden = distribute_tensor(hidden.detach(), mesh, [placement]).requires_grad_()
                group = mesh.get_group() if placement is None else None
                if placement is None:  # FSDP's weights look the same
                    with pytest.raises(UsageError, match="FSDP"):
                        form_of(form, case, [hidden, weight, bias], None, None, 3)
                got = form_of(form, case, [hidden, weight, bias], group, None, 3)
                got.total.backward()
                found = [full(x.grad) for x in (hidden, weight, bias)]

                def check(got: Any, want: Any, found: Any, gradients: Any) -> None:
                    torch.testing.assert_close(got.total.double(), want.total, rtol=1e-6, atol=1e-6)
                    for g, w in zip(found, gradients, strict=True):
                        near(g, w, 1e-5)

                together(check)(got, want, found, gradients)
        z = case.hidden @ case.weight.T + case.bias
        logits = distribute_tensor(z, mesh, [Shard(1)]).requires_grad_()
        got = distillation_loss(logits, case.labels, case.targets, **case.options)
        got.total.backward()
        exact = z.double().requires_grad_()
        parts = distillation_loss(exact, case.labels, case.targets, **case.options)
        grad = full(logits.grad)
        together(near)(grad, torch.autograd.grad(parts.total, exact)[0], 1e-5)
        together(near)(got.total.detach()[None], want.total.detach()[None], 1e-6)


def whole_layers() -> None:
    """States cut by positions under an output layer that each rank has whole."""
    mesh = init_device_mesh("cpu", (world(),))
    case = Case("bucket", split(21), n=7)
    want, gradients = case.whole()
    for placement in (Replicate(), Shard(0)):
        for layer in (None, Replicate()):
            for form in ("fused", "sliced"):
                hidden, *leaves = case.inputs(mine=False)
                hidden = distribute_tensor(hidden.detach(), mesh, [placement]).requires_grad_()
                if layer is not None:
                    leaves = [
                        distribute_tensor(x.detach(), mesh, [layer]).requires_grad_()
                        for x in leaves
                    ]
                got = form_of(form, case, [hidden, *leaves], None, None, 3)
                got.total.backward()
                together(near)(got.total.detach()[None], want.total.detach()[None], 1e-6)
                for leaf, gradient in zip((hidden, *leaves), gradients, strict=True):
                    together(near)(full(leaf.grad), gradient, 1e-5)


def split(size: int) -> list[int]:
    """As PyTorch cuts a dimension."""
    chunk = -(-size // world())
    return [max(min(chunk, size - r * chunk), 0) for r in range(world())]


def full(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found


def confident_students() -> None:
    """What all logits have in common costs no precision, and a tail of 1e-60 is still there."""
    lengths = [7, 13, 3, 16][: world()]
    for kind in KINDS:
        for form in ("fused", "reference"):
            case = Case(kind, lengths, n=6, h=sum(lengths), t=1.0, bias=False)
            case.weight = torch.eye(sum(lengths))
            for common, spread in ((1e4, 2.0), (0.0, 60.0)):
                case.hidden = torch.randn(6, sum(lengths)) * spread + common
                want, gradients = case.whole()
                inputs = case.inputs(mine=True)[:1]
                inputs.append(case.weight[case.rows])
                got = form_of(form, case, inputs, distributed.group.WORLD, None, 4)
                (found,) = torch.autograd.grad(got.total, inputs[0])
                if form == "reference":
                    distributed.all_reduce(found)
                together(near)(found, gradients[0], 2e-5)
                together(near)(got.total.detach()[None], want.total.detach()[None], 2e-6)


def low_precision() -> None:
    """As near to float32 as one process's bfloat16 is."""
    case = Case("sample", [50] * world(), n=64, h=16, k=8)
    _, exact = case.whole()
    errors = []
    for group in (None, distributed.group.WORLD):
        inputs = case.inputs(mine=group is not None)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = form_of("fused", case, inputs, group, None, 16)
        found = list(torch.autograd.grad(got.total, inputs))
        want = exact if group is None else case.mine(exact)
        errors.append([float((g - w).norm() / w.norm()) for g, w in zip(found, want, strict=True)])
    whole, cut = errors
    together(_no_worse)(whole, cut)


def _no_worse(whole: list[float], cut: list[float]) -> None:
    assert all(c < 2 * w + 1e-3 for c, w in zip(cut, whole, strict=True)), (whole, cut)


def a_student_that_diverged() -> None:
    """Not a number on one rank is not a number on all."""
    for kind in ("bucket", "sample", "hidden"):
        case = Case(kind, [8] * world())
        inputs = case.inputs(mine=True)
        if rank() == world() - 1:
            inputs[1].data[3] = math.nan
        got = form_of("fused", case, inputs, distributed.group.WORLD, None, 4)
        together(_not_finite)(got.total)


def _not_finite(total: Tensor) -> None:
    assert not total.isfinite()


def counts_of_a_dimension() -> None:
    """Ranks of a tensor-parallel group read the same rows, whose positions count once."""
    tp = 1 + (world() % 2 == 0)
    mesh = init_device_mesh("cpu", (world() // tp, tp), mesh_dim_names=("dp", "tp"))
    dp = mesh["dp"]
    total = SumOverRanks(dp.get_group())(10 ** dp.get_local_rank())
    together(_equal)(int(total), int("1" * dp.size()))


def _equal(got: int, want: int) -> None:
    assert got == want


def refusals() -> None:
    world_group: Any = distributed.group.WORLD
    case = Case("bucket", [5] * world())
    mesh = init_device_mesh("cpu", (world(),))
    sideways = distribute_tensor(torch.zeros(4 * world(), 4 * world()), mesh, [Shard(1)])
    some = slice(0, 3 + rank())
    name = world_group.group_name
    wrong = VocabSlice(name, world(), 0, 4, 4 * world())
    n = len(case.labels)
    chunks = ChunkTargets.__new__(ChunkTargets)
    object.__setattr__(chunks, "temperature", 1.0)
    calls: list[tuple[str, Callable[[], Any]]] = [
        (
            "the same positions",
            lambda: fused_linear_distillation(
                case.hidden[some], case.weight[case.rows], None, case.labels[some],
                case.targets[some], alpha=0.5, group=world_group,
            ),
        ),
        (
            "VocabSlice.of",
            lambda: distillation_loss(
                torch.zeros(n, 5), case.labels, case.targets, alpha=0.5, group=wrong
            ),
        ),
        (
            r"Shard\(0\),\) on a mesh of one dimension",
            lambda: fused_linear_distillation(
                torch.zeros(n, 4 * world()), sideways, None, case.labels, case.targets, alpha=0.5
            ),
        ),
        (
            "another tokenizer",
            lambda: fused_linear_distillation(
                case.hidden, case.weight[case.rows], None, case.labels, chunks, alpha=0.5,
                group=world_group,
            ),
        ),
        (
            "over 5000",
            lambda: distillation_loss(
                torch.zeros(n, 5), case.labels, case.targets, alpha=0.5, vocab_size=5000,
                group=world_group,
            ),
        ),
    ]  # fmt: skip
    for message, call in calls:
        together(_refused)(message, call)


def _refused(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(UsageError, match=message):
        call()


def within_one_graph() -> None:
    """The compiler keeps the exchange inside the graph, and the result is that of plain calls."""
    for kind in ("bucket", "anchored", "hidden"):
        case = Case(kind, [8] * world(), t=2.0)
        results = []
        for wrap in (False, True):
            inputs = case.inputs(mine=True)
            with contextlib.ExitStack() as changed:
                for name in ("sparse_pass", "scratch_pass") if wrap else ():
                    graph: Any = torch.compile(
                        getattr(passes, name), backend="aot_eager", fullgraph=True
                    )
                    changed.enter_context(mock.patch.object(fused, name, graph))
                group, anchor = distributed.group.WORLD, Anchor(0.5)
                got = form_of("fused", case, inputs, group, None, 100, anchor=anchor)
            results.append([got.total.detach(), *torch.autograd.grad(got.total, inputs)])
        for g, w in zip(*results, strict=True):
            together(near)(g, w.double(), 1e-6)


CHECKS = (
    every_codec,
    other_divergences,
    anchored_samples,
    what_is_exchanged,
    a_group_costs_one_more,
    dtensors,
    whole_layers,
    confident_students,
    low_precision,
    a_student_that_diverged,
    counts_of_a_dimension,
    refusals,
    within_one_graph,
    any_shape,
)


def main(number: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=number,
        world_size=ranks,
        timeout=timedelta(seconds=120),
    )
    results = {}
    for check in CHECKS:
        error = None
        try:
            check()
        except BaseException:
            error = traceback.format_exc()
        results[check.__name__] = error
        distributed.barrier()
        if number == 0:
            (folder / "results.json").write_text(json.dumps(results))
    distributed.destroy_process_group()


if __name__ == "__main__":
    children = []
    for number in range(int(sys.argv[1])):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                main(number, int(sys.argv[1]), Path(sys.argv[2]))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    sys.exit(any(os.waitpid(child, 0)[1] for child in children))
