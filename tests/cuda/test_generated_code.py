"""The code that inductor writes for an H100: how much of it there is, that it compiles, that it is
right.

It is written on fake tensors, compiled by Triton's own ptxas, and run in Triton's interpreter.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import further
from fake import fake_cuda
from torch import Tensor, distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from kdcache.loss import VocabSlice, fused, passes
from kdcache.targets import Anchored, Codec
from kdcache.targets.device import Rule, label_logprobs, run
from kdcache.targets.device.threshold import blocked_sample

pytest.importorskip("triton", reason="Triton is missing: make install brings it")
if torch.__version__ < (2, 13):  # torch's version compares with tuples
    reason = (
        f"written for what the compiler of PyTorch 2.13 and later writes, not {torch.__version__}"
    )
    pytest.skip(reason, allow_module_level=True)

from inductor import Code, compiled_for_sm90, written_for_h100

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

POSITIONS, IDS = 2048, 128_256
ENTRIES = 17
SAMPLE = {"t1": (1.0,), "t12": (1.0, 2.0), "t15": (1.0, 1.5)}
BASE = Anchored(IDS).rule.base


def fake(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def padded(n: int, vocabulary: int) -> Tensor:
    """What is left of the logits of an output layer that is wider than the vocabulary."""
    return fake(n, vocabulary + 64, dtype=torch.bfloat16)[:, :vocabulary]


@functools.cache
def sample_code(
    temperatures: tuple[float, ...], n: int, vocabulary: int, cut: bool, base: float = 0.0
) -> Code:
    with fake_cuda(symbolic=True):
        logits = padded(n, vocabulary) if cut else fake(n, vocabulary, dtype=torch.bfloat16)
        u = fake(n, dtype=torch.float64)
        return written_for_h100(blocked_sample, logits, u, Rule(20, temperatures, 40, 7, base))


@functools.cache
def topk_code(n: int, vocabulary: int) -> Code:
    with fake_cuda(symbolic=True):
        logits = fake(n, vocabulary, dtype=torch.bfloat16)
        return written_for_h100(run._top_blocked, logits, 64, (1.0,))


def slices(n: int, vocabulary: int) -> tuple[Tensor, ...]:
    """What a pass over a slice is given of sparse targets, before its scalars."""
    ids = fake(n, ENTRIES, dtype=torch.int64)
    z, w = fake(n, vocabulary, dtype=torch.bfloat16), fake(n, ENTRIES - 1)
    return (z, fake(n, ENTRIES), ids, w, *(fake(n) for _ in range(3)))


@functools.cache
def loss_code(unit: bool, n: int, vocabulary: int) -> Code:
    with fake_cuda(symbolic=True), torch.no_grad():
        given = slices(n, vocabulary)
        return written_for_h100(passes.sparse_pass, *given, fake(), fake(), unit, False)


@functools.cache
def dense_code(unit: bool, n: int, vocabulary: int) -> Code:
    with fake_cuda(symbolic=True), torch.no_grad():
        z, label = fake(n, vocabulary, dtype=torch.bfloat16), fake(n, 1, dtype=torch.int64)
        given = z, fake(n, 1), fake(n, vocabulary), label, fake(n), fake(n), fake(), fake()
        return written_for_h100(passes.dense_pass, *given, unit, True)


def anchored_pass(
    z: Tensor, x: Tensor, ids: Tensor, w: Tensor, rest: Tensor, valid: Tensor, each: Tensor,
    inverse: Tensor, heads: Tensor, theta: Tensor, alpha: Tensor, inverse_t: Tensor, unit: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options = alpha, inverse_t, unit, False
    return passes.sparse_pass(z, x, ids, w, rest, valid, each, *options, inverse, heads, theta)


@functools.cache
def anchored_code(unit: bool, n: int, vocabulary: int) -> Code:
    with fake_cuda(symbolic=True), torch.no_grad():
        drawn = fake(n, ENTRIES - 1), fake(n, dtype=torch.int64)
        given = *slices(n, vocabulary), *drawn, *(fake() for _ in range(3))
        return written_for_h100(anchored_pass, *given, unit)


@functools.cache
def cap_code(n: int, vocabulary: int) -> Code:
    with fake_cuda(symbolic=True), torch.no_grad():
        return written_for_h100(passes.cap_, fake(n, vocabulary, dtype=torch.bfloat16), 30.0)


@pytest.mark.parametrize(
    ("name", "most", "vocabulary", "cut"),
    [
        ("t1", 22, IDS, False),
        ("t12", 27, 151_665, True),
        *further(("t1", 22, 151_665, True), ("t12", 27, IDS, False), ("t15", 27, IDS, False)),
    ],
)
def test_a_sample_reads_the_logits_once(name: str, most: int, vocabulary: int, cut: bool) -> None:
    code = sample_code(SAMPLE[name], POSITIONS, vocabulary, cut)
    # The last, shorter block of a vocabulary that is no multiple of 128 has kernels of its own.
    assert len(code.launches) <= most + (4 if vocabulary % 128 else 0)
    assert code.library_calls == ["torch.ops.aten.topk"] * 2
    one_pass(code, POSITIONS, vocabulary)


def test_the_best_entries_read_the_logits_once() -> None:
    code = topk_code(POSITIONS, IDS)
    assert len(code.launches) <= 6
    assert code.library_calls == ["torch.ops.aten.topk"] * 2
    one_pass(code, POSITIONS, IDS)


def test_the_mass_outside_a_vocabulary_reads_the_logits_once() -> None:
    with fake_cuda(symbolic=True):
        logits = fake(POSITIONS, IDS + 64, dtype=torch.bfloat16)
        code = written_for_h100(run._outside_by_blocks, logits, IDS)
    assert len(code.launches) <= 4
    assert not code.library_calls
    whole = code.argument(POSITIONS, IDS + 64)
    assert len(code.passes(whole, POSITIONS * (IDS - 128))) == 1
    assert code.largest_buffer < POSITIONS * IDS // 8


def test_the_labels_logprobs_take_one_kernel_or_one_pass() -> None:
    with fake_cuda(symbolic=True):
        logits = fake(POSITIONS, IDS, dtype=torch.bfloat16)
        labels, sums = fake(POSITIONS, dtype=torch.int64), fake(POSITIONS)
        after_the_codec = written_for_h100(run._logprobs, logits, labels, sums, sums)
        alone = written_for_h100(run._sums_by_blocks, logits)
    assert len(after_the_codec.launches) == 1
    assert not after_the_codec.passes(after_the_codec.argument(POSITIONS, IDS), POSITIONS + 1)
    assert len(alone.launches) <= 4
    for code in (after_the_codec, alone):
        assert not code.library_calls
    one_pass(alone, POSITIONS, IDS)


def test_both_ways_to_the_mass_outside_agree() -> None:
    logits = hard_logits(WORDS)[[0, 1, 4]]
    want = torch.softmax(logits.double(), -1)[:, 700:].sum(-1)
    for way in (run._outside, run._outside_by_blocks):
        torch.testing.assert_close(way(logits, 700)["mass"].double(), want, rtol=1e-5, atol=1e-30)


def one_pass(code: Code, n: int, vocabulary: int) -> None:
    logits = code.argument(n, vocabulary)
    assert len(code.passes(logits, n * (vocabulary - 128))) == 1
    assert code.largest_buffer < n * vocabulary // 8, "nothing as large as the logits"


@pytest.mark.parametrize(
    ("made", "most", "unit"),
    [(loss_code, 9, True), (loss_code, 9, False), (anchored_code, 14, False)],
)
def test_the_loss_reads_its_logits_three_times_at_most(
    made: Callable[..., Code], most: int, unit: bool
) -> None:
    code = made(unit, POSITIONS, IDS)
    assert len(code.launches) <= most
    assert not code.library_calls
    # Maximum and sums may share a pass; the last one writes the gradient in place.
    assert 2 <= len(code.passes(code.argument(POSITIONS, IDS), POSITIONS * IDS)) <= 3
    assert code.largest_buffer < POSITIONS * IDS // 8


@pytest.fixture
def eight_ranks() -> Iterator[str]:
    """The name of a group whose other ranks are never asked."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield distributed.group.WORLD.group_name
    distributed.destroy_process_group()


@pytest.mark.parametrize("unit", [False, *further(True)])
def test_a_cut_vocabularys_loss_exchanges_within_its_one_graph(
    eight_ranks: str, unit: bool
) -> None:
    own = IDS // 8 + 32  # spare columns behind this rank's ids
    over = VocabSlice(eight_ranks, 8, 0, IDS // 8, IDS)
    with fake_cuda(symbolic=True), torch.no_grad():
        code = written_for_h100(
            functools.partial(passes.sparse_pass, over=over),
            *slices(POSITIONS, own),
            *(fake(), fake(), unit, False),
        )
    assert code.text.count("_c10d_functional.all_reduce_.default(") == 2
    assert len(code.launches) <= 12
    assert not code.library_calls
    assert 2 <= len(code.passes(code.argument(POSITIONS, own), POSITIONS * own)) <= 3
    assert code.largest_buffer < POSITIONS * own // 8


def test_an_anchored_sample_reads_the_logits_once() -> None:
    code, plain = (sample_code((1.0,), POSITIONS, IDS, False, base) for base in (BASE, 0.0))
    assert len(code.launches) <= len(plain.launches) + 2
    one_pass(code, POSITIONS, IDS)


def test_a_soft_cap_takes_one_pass() -> None:
    code = cap_code(POSITIONS, IDS)
    assert len(code.launches) == 1
    assert not code.library_calls


class TestGraphs:
    """One graph for each shape of tensor, not for each number of positions."""

    @pytest.fixture
    def made(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
        made: list[int] = []

        def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
            made.append(len(graph.graph.nodes))
            return graph.forward

        own = torch.compile
        compiled = functools.partial(own, backend=count, fullgraph=True)
        monkeypatch.setattr(torch, "compile", compiled)
        monkeypatch.setattr(run, "compiles", lambda: True)
        monkeypatch.setattr(fused, "compiles", lambda: True)
        for cached in (run._compiled, passes.compiled):
            cached.cache_clear()
        torch._dynamo.reset()
        yield made
        for cached in (run._compiled, passes.compiled):
            cached.cache_clear()
        torch._dynamo.reset()

    @pytest.mark.parametrize("codec", ["sample:20", "topk:64"])
    def test_three_in_a_build_at_most(self, codec: str, made: list[int]) -> None:
        chosen = Codec.parse(codec, (1.0,), IDS)
        with fake_cuda(symbolic=True):
            for n in (2048, 653, 2048, 411, 2048, 7, 1, 2, 2048):
                with torch.inference_mode():  # as the teacher's own
                    logits = fake(n, IDS, dtype=torch.bfloat16)
                encoded = chosen.encode(logits, fake(n, dtype=torch.float64))
                label_logprobs(logits, fake(n, dtype=torch.int64), encoded)
        assert 2 <= len(made) <= 6, "three of the codec, three of the labels"

    @pytest.mark.parametrize("anchored", [False, True])
    def test_three_in_a_training_at_most(self, made: list[int], anchored: bool) -> None:
        options = fused._Options(torch.ones(()), torch.ones(()), True, False)
        with fake_cuda(symbolic=True), torch.no_grad():
            options = options._replace(alpha=fake(), inverse_t=fake())
            for n, entries in ((4096, 16), (4096, 15), (100, 12), (4096, 17), (1, 16), (7, 3)):
                targets: Any = fused.SparseTargets(
                    ids=fake(n, entries, dtype=torch.int64),
                    weights=fake(n, entries),
                    tail=fake(n),
                    exact=False,
                    temperature=1.0,
                )
                if anchored:
                    more = {"inverse": fake(n, entries), "heads": fake(n, dtype=torch.int64)}
                    targets = fused.AnchoredTargets(**vars(targets), **more)
                fused._logits_to_gradient_(
                    fake(n, 32_000, dtype=torch.bfloat16),
                    fake(n, dtype=torch.int64),
                    targets,
                    fake(n),
                    options,
                    theta=fake() if anchored else None,
                )
        assert 1 <= len(made) <= 3


@pytest.mark.parametrize(
    "what", ["sample t1", "sample t12", "topk", "loss", "loss t2", "anchored", "dense", "cap"]
)
def test_every_kernel_compiles_for_sm_90(what: str) -> None:
    written = {
        "sample t1": lambda: sample_code((1.0,), POSITIONS, IDS, False),
        "sample t12": lambda: sample_code((1.0, 2.0), POSITIONS, 151_665, True),
        "topk": lambda: topk_code(POSITIONS, IDS),
        "loss": lambda: loss_code(True, POSITIONS, IDS),
        "loss t2": lambda: loss_code(False, POSITIONS, IDS),
        "anchored": lambda: anchored_code(False, POSITIONS, IDS),
        "dense": lambda: dense_code(False, POSITIONS, IDS),
        "cap": lambda: cap_code(POSITIONS, IDS),
    }
    code = written[what]()
    made = compiled_for_sm90(code)
    assert {one.kernel for one in made} == set(code.kernels)
    for one in made:
        assert one.machine_code.startswith(b"\x7fELF")
        assert one.shared <= 227 << 10, one.kernel


# ------------------------------------------------------------------------------ the code, executed

ROWS, WORDS, MANY_WORDS = 6, 12_800, 32_897
LOSS_ROWS, LOSS_IDS = 5, 3000
EXECUTED = ("t1", "t15")  # one temperature, and several that are not one another's doubles


def hard_logits(vocabulary: int) -> Tensor:
    """Rows with ties among the largest, a NaN, nothing but -inf, masked blocks."""
    torch.manual_seed(0)
    z = (3 * torch.randn(ROWS, vocabulary + 64)).to(torch.bfloat16)
    z[1, 7] = 60
    z[2, 9] = torch.nan
    z[3] = -torch.inf
    z[4, 100:] = -torch.inf
    return z[:, :vocabulary]


def loss_arguments(unit: bool) -> dict[str, Any]:
    """Repeated ids, labels among the targets, unused slots, rows without a label."""
    torch.manual_seed(1)
    n = LOSS_ROWS
    z = (3 * torch.randn(n, LOSS_IDS)).to(torch.bfloat16)
    ids = torch.randint(0, LOSS_IDS, (n, ENTRIES))
    ids[0, 3], ids[1, -1], ids[2, 5:8] = ids[0, 2], ids[1, 0], 0
    w = torch.rand(n, ENTRIES - 1)
    w[2, 5:] = 0
    x = z.gather(1, ids).float()
    z.scatter_(1, ids, -torch.inf)
    return {
        "z": z, "x": x, "ids": ids, "w": w,
        "rest": torch.rand(n) / 8, "valid": torch.tensor([1.0, 1, 0, 1, 1]),
        "each": torch.tensor([1.0, 0.5, 1, 1, 2]), "alpha": torch.tensor(0.3),
        "inverse_t": torch.tensor(1.0 if unit else 0.5),
    }  # fmt: skip


def anchored_arguments() -> dict[str, Any]:
    """The same, with a head, and tail ids that were drawn."""
    named = loss_arguments(False)
    n, heads = LOSS_ROWS, torch.tensor([2, 1, 0, 4, ENTRIES - 1])
    tail = torch.arange(ENTRIES - 1) >= heads[:, None]
    named["w"] = named["w"] / named["w"].sum(-1, keepdim=True)
    inverse = torch.where(tail & (named["w"] > 0), 1 + 30 * torch.rand(n, ENTRIES - 1), 0)
    options = {name: named.pop(name) for name in ("alpha", "inverse_t")}
    return named | {"inverse": inverse, "heads": heads, "theta": torch.tensor(0.7)} | options


def capped_logits() -> Tensor:
    torch.manual_seed(3)
    sizes = torch.tensor([0.01, 1, 30, 100, 1000])[:, None]
    return (sizes * torch.randn(LOSS_ROWS, LOSS_IDS)).to(torch.bfloat16)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the interpreter makes of each module, in one process: it starts slowly."""
    jobs: dict[str, tuple[str, list[Any]]] = {}
    noise = torch.rand(ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for name in EXECUTED:
        code = sample_code(SAMPLE[name], ROWS, WORDS, True, BASE)
        jobs[name] = code.text, [hard_logits(WORDS), noise]
    whole = hard_logits(MANY_WORDS).contiguous()
    jobs["topk"] = topk_code(ROWS, MANY_WORDS).text, [whole]
    for unit in (True, False):
        code, named = loss_code(unit, LOSS_ROWS, LOSS_IDS), loss_arguments(unit)
        jobs[f"loss {unit}"] = code.text, [named[name] for name in code.inputs]
    code, named = anchored_code(False, LOSS_ROWS, LOSS_IDS), anchored_arguments()
    jobs["anchored"] = code.text, [named[name] for name in code.inputs]
    jobs["cap"] = cap_code(LOSS_ROWS, LOSS_IDS).text, [capped_logits()]
    folder = tmp_path_factory.mktemp("interpreter")
    torch.save(list(jobs.values()), folder / "jobs.pt")
    script = Path(__file__).with_name("interpreter.py")
    subprocess.run([sys.executable, script, folder / "jobs.pt", folder / "results.pt"], check=True)
    results = torch.load(folder / "results.pt")
    return {name: (jobs[name][1], *result) for name, result in zip(jobs, results, strict=True)}


@pytest.mark.parametrize("name", EXECUTED)
def test_the_samples_code_draws_what_eager_draws(executed: dict[str, Any], name: str) -> None:
    (logits, u), found, _ = executed[name]
    want = blocked_sample(logits, u, Rule(20, SAMPLE[name], 40, 7, BASE))
    got = {key: value.view(want[key].shape) for key, value in zip(want, found, strict=True)}
    assert want["finite"].tolist() == [True, True, False, False, True, True]
    for key in ("heads", "draws", "finite"):
        assert torch.equal(got[key], want[key]), key
    assert ((got["ids"] >= 0) & (got["ids"] < WORDS)).all()
    for row in want["finite"].nonzero().flatten():
        heads, used = int(want["heads"][row]), int(want["heads"][row] + want["draws"][row])
        one, other = ((x["ids"][row, :used].long(), x["values"][row, :used]) for x in (got, want))
        assert torch.equal(got["inverse"][row, heads:used], want["inverse"][row, heads:used])
        # Equal logits of the head may change places; what each place weighs may not.
        assert torch.equal(logits[row, one[0][:heads]], logits[row, other[0][:heads]])
        assert torch.equal(one[0][heads:], other[0][heads:])
        assert torch.equal(one[1], other[1])


def test_the_best_entries_code_finds_what_eager_finds(executed: dict[str, Any]) -> None:
    (logits,), found, _ = executed["topk"]
    want = run._top_blocked(logits, 64, (1.0,))
    got = {key: value.view(want[key].shape) for key, value in zip(want, found, strict=True)}
    good = want["finite"]
    assert torch.equal(got["finite"], good)
    assert good.tolist() == [True, True, False, False, True, True]
    for key in ("logprobs", "tail"):
        torch.testing.assert_close(got[key][good], want[key][good], rtol=0, atol=1e-6)
    # Which of equal logits is found is open.
    assert torch.equal(
        logits[good].gather(1, got["ids"][good].long()).float().log_softmax(-1),
        logits[good].gather(1, want["ids"][good].long()).float().log_softmax(-1),
    )


@pytest.mark.parametrize("unit", [True, False])
def test_the_losses_code_computes_what_eager_computes(executed: dict[str, Any], unit: bool) -> None:
    _, (losses, entries), after = executed[f"loss {unit}"]
    named = loss_arguments(unit)
    want_losses, want_entries = passes.sparse_pass(*named.values(), unit, False)
    torch.testing.assert_close(losses.view(2), want_losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entries.view_as(want_entries), want_entries, rtol=1e-5, atol=1e-6)
    (gradient,) = (x for x in after if x.shape == (LOSS_ROWS, LOSS_IDS))
    # Equal, or neighbours in bfloat16.
    torch.testing.assert_close(gradient.float(), named["z"].float(), rtol=2**-7, atol=1e-30)


def test_the_anchored_losses_code_computes_what_eager_computes(executed: dict[str, Any]) -> None:
    _, (losses, entries), after = executed["anchored"]
    named = anchored_arguments()
    want_losses, want_entries = anchored_pass(*named.values(), False)
    torch.testing.assert_close(losses.view(7), want_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entries.view_as(want_entries), want_entries, rtol=1e-5, atol=1e-6)
    (gradient,) = (x for x in after if x.shape == (LOSS_ROWS, LOSS_IDS))
    torch.testing.assert_close(gradient.float(), named["z"].float(), rtol=2**-7, atol=1e-30)


def test_the_caps_code_computes_what_eager_computes(executed: dict[str, Any]) -> None:
    _, (slope,), (capped,) = executed["cap"]
    want = capped_logits()
    want_slope = passes.cap_(want, 30.0)
    torch.testing.assert_close(capped.float(), want.float(), rtol=2**-7, atol=1e-30)
    torch.testing.assert_close(
        slope.view_as(want).float(), want_slope.float(), rtol=2**-7, atol=1e-6
    )
