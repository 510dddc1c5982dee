"""Hidden states as targets: rounded, stored, turned into the teacher's logits, and trained on."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny_lm
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdcache.cache import Cache
from kdcache.cache.cache import read_layer
from kdcache.cache.check import problems
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.evaluate.evaluate import evaluate
from kdcache.commands.options import EvaluateOptions
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.commands.verify import recheck
from kdcache.errors import CorruptCacheError, UsageError
from kdcache.loss import (
    DIVERGENCES,
    distillation_loss,
    fused_linear_distillation,
    sliced_linear_distillation,
)
from kdcache.stream import TargetStream
from kdcache.targets import (
    Codec,
    DenseTargets,
    Hidden,
    HiddenTargets,
    OutputLayer,
    SoftTargets,
    TargetWriter,
)

V, D = 60, 70
DTYPES = ("float16", "bfloat16", "int8")


def states_of(n: int, width: int = D, *, seed: int = 0) -> Tensor:
    """States whose channels have deviations from 0.03 to 30, and means."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-1.5, 1.5, width)
    return (torch.randn(n, width, generator=generator) + 0.5) * sizes


def layer_of(states: Tensor, *, dtype: torch.dtype = torch.float32, **parts: Any) -> OutputLayer:
    """A layer on which all channels have about the same effect."""
    generator = torch.Generator().manual_seed(1)
    deviation = states.std(0)
    weight = 0.3 * torch.randn(V, states.shape[1], generator=generator) / deviation
    return OutputLayer(weight.to(dtype), **parts).with_channels(states.mean(0), deviation)


def stored(states: Tensor, layer: OutputLayer, dtype: str) -> SoftTargets:
    codec = Codec.parse(f"hidden:{dtype}", (1.0,), V)
    assert isinstance(codec, Hidden)
    return TargetWriter(codec.with_layer(layer)).write(states)


def divergence(own: Tensor, rebuilt: Tensor, temperature: float) -> Tensor:
    """KL(teacher || rebuilt) of each position."""
    p, q = (x.double().div(temperature).log_softmax(-1) for x in (own, rebuilt))
    return (p.exp() * (p - q)).sum(-1)


# The codec


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 31, 64, 70, 576])
def test_states_come_back_within_the_rounding_of_their_type(dtype: str, width: int) -> None:
    states = states_of(50, width)
    layer = layer_of(states)
    targets = stored(states, layer, dtype)
    assert str(targets.codec) == f"hidden:{dtype}"
    size = sum(column.nbytes for column in targets.columns.values()) / len(states)
    assert size == targets.codec.bytes_per_position
    if width >= 64:
        assert size <= (1.04 if dtype == "int8" else 2.02) * width
    found = targets.at(3.0)
    assert isinstance(found, HiddenTargets)
    assert found.temperature == 3.0
    error = (found.states.float() - states).abs()
    if dtype == "int8":
        assert layer.unit is not None
        assert layer.mean is not None
        blocks = max(1, width // 32)
        pieces = ((states - layer.mean) / layer.unit).abs().split(-(-width // blocks), 1)
        largest = torch.cat([p.amax(1, keepdim=True).expand_as(p) for p in pieces], 1)
        assert (error <= largest / 127 * 2 ** (1 / 16) / 2 * layer.unit * 1.001 + 1e-6).all()
    else:
        assert (error <= states.abs() * (2.0**-11 if dtype == "float16" else 2.0**-8) + 1e-7).all()


@given(n=st.integers(0, 140), width=st.integers(1, 200), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_levels_are_the_numbers_of_the_format(n: int, width: int, seed: int) -> None:
    """Bit for bit in float32, in slices and by any device's operations, and near float64."""
    states = states_of(n + 2, width, seed=seed)
    layer = layer_of(states)
    targets = stored(states[:n], layer, "int8")
    assert layer.unit is not None
    assert layer.mean is not None
    mean, unit = layer.mean.numpy(), layer.unit.numpy()
    levels, steps = (targets.columns[name] for name in ("states", "steps"))
    each = np.repeat(2.0 ** (steps / 16 - 14), -(-width // steps.shape[1]), 1)[:, :width]
    found = targets.at(1.0)
    assert isinstance(found, HiddenTargets)
    want = (levels.astype(np.float32) - 128) * each.astype(np.float32) * unit + mean
    np.testing.assert_array_equal(found.states.numpy(), want)
    exact = mean + unit.astype(float) * (levels.astype(float) - 128) * each
    np.testing.assert_allclose(want, exact, rtol=3e-7, atol=3e-7 * float(abs(exact).max(initial=1)))


def test_a_batch_holds_levels_and_the_loss_is_that_of_their_numbers() -> None:
    """A byte a number on the way to the device; sliced, joined and sent like other targets."""
    states = states_of(300)
    layer = layer_of(states)
    targets = stored(states, layer, "int8").at(2.0)
    assert isinstance(targets, HiddenTargets)
    parts = HiddenTargets.concat([targets[:100], targets[torch.arange(100, 300)]])
    sent = pickle.loads(pickle.dumps(parts.to("cpu")))
    sent = replace(sent, layer=layer)
    assert {name: t.dtype for name, t in sent._tensors().items()} == {
        "stored": torch.uint8,
        "steps": torch.uint8,
    }
    assert sum(t.nbytes for t in sent._tensors().values()) == 300 * (D + D // 32)
    plain = HiddenTargets(targets.states, layer, 2.0)
    for form in (fused_linear_distillation, sliced_linear_distillation):
        inputs = problem(300, wide=torch.float32)
        want, got = (gradients(form, inputs, targets=each, rows=90) for each in (plain, sent))
        for mine, theirs in zip(got, want, strict=True):
            assert torch.equal(mine, theirs)


def test_an_outlier_costs_its_own_block_alone() -> None:
    states = states_of(40, 96)
    layer = layer_of(states)
    spoilt = states.clone()
    spoilt[:, 40] *= 30
    plain, other = (stored(x, layer, "int8").at(1.0) for x in (states, spoilt))
    assert isinstance(plain, HiddenTargets)
    assert isinstance(other, HiddenTargets)
    outside = torch.cat([torch.arange(32), torch.arange(64, 96)])
    assert torch.equal(plain.states[:, outside], other.states[:, outside])
    assert (other.states[:, 40] - spoilt[:, 40]).abs().max() < 0.01 * spoilt[:, 40].abs().max()


def test_a_channel_that_the_sample_hardly_moves_is_no_division_by_zero() -> None:
    states = states_of(40, 64)
    calm = states.clone()
    calm[:, 5] = 2.0
    layer = layer_of(states).with_channels(calm.mean(0), calm.std(0))
    found = stored(states, layer, "int8").at(1.0)
    assert isinstance(found, HiddenTargets)
    assert (found.states - states).abs().max() < 0.05 * states.abs().max()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_states_that_the_type_cannot_hold_are_refused(dtype: str) -> None:
    states = states_of(5)
    layer = layer_of(states)
    states[3, 2] = 70_000.0
    with pytest.raises(UsageError, match=f"larger than hidden:{dtype} can hold"):
        stored(states, layer, dtype)
    assert len(stored(states, layer, "bfloat16")) == 5


def test_codecs_and_layers_that_do_not_fit() -> None:
    for text in ("hidden", "hidden:", "hidden:int4", "hidden:float32"):
        with pytest.raises(UsageError, match="hidden:float16|bfloat16|int8"):
            Codec.parse(text, (1.0,), V)
    layer = OutputLayer(torch.randn(V, D))
    with pytest.raises(ValueError, match="60 ids, expected 61"):
        Hidden(V + 1, (1.0,)).with_layer(layer)
    with pytest.raises(ValueError, match="no mean and unit"):
        Hidden(V, (1.0,), "int8").with_layer(layer)
    codec = Hidden(V, (1.0,)).with_layer(layer)
    with pytest.raises(ValueError, match="states are"):
        codec.encode(torch.randn(3, V))
    with pytest.raises(UsageError, match="positive"):
        codec.check_temperature(0.0)


def test_positions_of_two_layers_are_not_joined() -> None:
    states = states_of(9)
    targets, other = (stored(states, layer_of(states), "int8") for _ in range(2))
    with pytest.raises(ValueError, match="differ"):
        SoftTargets.concat([targets, other])
    with pytest.raises(ValueError, match="one kind"):
        HiddenTargets.concat([targets.at(1.0), other.at(1.0)])  # type: ignore[list-item]


# The loss


def problem(n: int = 21, *, wide: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, V, (n,), generator=generator)
    labels[::5] = -100
    return {
        "hidden": torch.randn(n, 12, generator=generator, dtype=wide),
        "weight": torch.randn(V + 3, 12, generator=generator, dtype=wide),
        "bias": torch.randn(V + 3, generator=generator, dtype=wide),
        "labels": labels,
        "alpha": 0.3,
        "position_weights": torch.rand(n, generator=generator),
    }


def gradients(function: Any, inputs: dict[str, Any], **more: Any) -> list[Tensor]:
    leaves = [inputs[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    rest = {k: v for k, v in inputs.items() if k not in ("hidden", "weight", "bias")}
    parts = function(*leaves, **rest, **more)
    parts.total.backward()
    return [*parts, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", DIVERGENCES[:4])  # of distributions
@pytest.mark.parametrize("parts", [{}, {"bias": True, "scale": 0.25, "cap": 5.0}])
def test_loss_and_gradients_are_those_of_the_rebuilt_logits(
    kind: str, parts: dict[str, Any], temperature: float
) -> None:
    """float64 throughout, against `dense` targets of the same logits, on whole logits."""
    states = states_of(21)
    if parts:
        parts = {**parts, "bias": torch.randn(V, generator=torch.Generator().manual_seed(3))}
    layer = layer_of(states, **parts)
    temperature = 1.0 if kind == "mse" else temperature
    hidden = HiddenTargets(states.double(), layer, temperature)
    product = states.double() @ layer.weight.double().T
    if parts:
        product = 5 * torch.tanh((product + parts["bias"].double()) * 0.25 / 5)
    dense = DenseTargets(product, temperature)

    def reference(h: Tensor, w: Tensor, b: Tensor, **options: Any) -> Any:
        return distillation_loss(h @ w.T + b, **options)

    want = gradients(reference, problem(), targets=dense, divergence=kind)
    forms = [reference, sliced_linear_distillation]
    if kind == "forward-kl":
        forms.append(fused_linear_distillation)
    for form in forms:
        more = {} if form is reference else {"rows": 4}
        got = gradients(form, problem(), targets=hidden, divergence=kind, **more)
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_of_stored_states_is_that_of_the_teachers_logits(dtype: str) -> None:
    states = states_of(400)
    layer = layer_of(states)
    dense = DenseTargets(layer.logits(states.double()), 2.0)
    hidden = stored(states, layer, dtype).at(2.0)
    inputs = problem(400)
    want = gradients(fused_linear_distillation, inputs, targets=dense)
    got = gradients(fused_linear_distillation, inputs, targets=hidden)
    allowed = {"float16": 2e-4, "bfloat16": 2e-3, "int8": 4e-3}[dtype]
    for mine, theirs in zip(got, want, strict=True):
        assert (mine - theirs).norm() <= allowed * theirs.norm()


@pytest.mark.parametrize("rows", [None, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_logits_and_numbers_of_the_teacher_never_exist(rows: int | None, dtype: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    states = states_of(1300)
    targets = stored(states, layer_of(states), dtype).at(2.0)
    largest = {V: 0, V + 3: 0, D: 0}

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.ndim == 2 and out.dtype == torch.float32:
                width = out.shape[1]
                largest[width] = max(largest.get(width, 0), len(out))
            return out

    inputs = problem(1300, wide=torch.float32)
    with Largest():
        gradients(fused_linear_distillation, inputs, targets=targets, rows=rows)
    assert 0 < max(largest[V], largest[V + 3]) <= 1024
    assert 0 < largest[D] <= 1024


def test_mixed_precision_keeps_the_rebuilt_logits_wide() -> None:
    states = states_of(200)
    layer = layer_of(states)
    inputs = problem(200, wide=torch.bfloat16)
    options = {k: v for k, v in inputs.items() if k not in ("hidden", "weight", "bias")}
    student = [inputs[name] for name in ("hidden", "weight", "bias")]
    own = fused_linear_distillation(
        *student, targets=DenseTargets(layer.logits(states), 1.0), **options
    )
    rebuilt = fused_linear_distillation(
        *student, targets=HiddenTargets(states, layer, 1.0), **options
    )
    torch.testing.assert_close(rebuilt.soft, own.soft, rtol=1e-5, atol=1e-6)


# Caches


@pytest.fixture(scope="module")
def corpus(corpus_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "texts.txt"
    path.write_text("\n".join(text.replace("\n", " ") for text in corpus_texts[:40]))
    return path


def options(teacher: Path, corpus: Path, out: Path, codec: str, **more: Any) -> BuildOptions:
    settings: dict[str, Any] = {"workers": 0, "max_length": 64, "shard_tokens": 600, **more}
    return BuildOptions(
        teacher=(str(teacher),), corpus=(str(corpus),), out=str(out), codec=codec, **settings
    )


@pytest.fixture(scope="module")
def caches(
    tiny_lm: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Cache]:
    """The same build by each codec."""
    folder = tmp_path_factory.mktemp("caches")
    for codec in ("dense", *(f"hidden:{dtype}" for dtype in DTYPES)):
        build(options(tiny_lm, corpus, folder / codec, codec))
    return {path.name: Cache.open(str(path)) for path in sorted(folder.iterdir())}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_rebuilds_the_teachers_logits(caches: dict[str, Cache], dtype: str) -> None:
    cache, dense = caches[f"hidden:{dtype}"], caches["dense"]
    assert cache.spec.spans > 1
    assert [problem.text for problem in problems(cache)] == []
    allowed = {"float16": 1e-6, "bfloat16": 1e-4, "int8": 5e-4}[dtype]
    for temperature in (0.5, 1.0, 2.0, 4.0):
        found = []
        for span in range(cache.spec.spans):
            mine, own = (c.read(span).targets.at(temperature) for c in (cache, dense))
            assert isinstance(mine, HiddenTargets)
            assert isinstance(own, DenseTargets)
            found.append(divergence(own.logits, mine.dense().logits, temperature))
        assert float(torch.cat(found).mean()) <= allowed


@pytest.mark.slow
def test_an_interrupted_build_takes_the_layer_that_is_there(
    caches: dict[str, Cache], tiny_lm: Path, corpus: Path, tmp_path: Path
) -> None:
    import shutil

    whole = caches["hidden:int8"]
    shutil.copytree(whole.storage.url, tmp_path / "cache")
    (tmp_path / "cache" / "manifest.json").unlink()
    lost = sorted((tmp_path / "cache" / "shards").iterdir())[1]
    lost.unlink()
    again = options(tiny_lm, corpus, tmp_path / "cache", "hidden:int8", batch_tokens=200)
    result = build(again)
    assert result.made == 1
    assert Cache.open(str(tmp_path / "cache")).spec == whole.spec
    # What batches are decides nothing but rounding; the layer is the same bytes either way.
    (layer,) = (tmp_path / "cache").glob("output_layer-*")
    layer.unlink()
    (tmp_path / "cache" / "manifest.json").unlink()
    build(options(tiny_lm, corpus, tmp_path / "cache", "hidden:int8"))
    assert layer.is_file()


@pytest.mark.slow
def test_a_layer_travels_between_processes_as_an_address(caches: dict[str, Cache]) -> None:
    cache = caches["hidden:int8"]
    targets = cache.read(0).targets.at(1.0)
    assert isinstance(targets, HiddenTargets)
    words = pickle.dumps(targets)
    assert len(words) < targets.states.nbytes + 4000
    assert pickle.loads(words).layer is targets.layer is cache.output_layer
    own = OutputLayer(torch.randn(V, D))  # of no cache: by value
    assert pickle.loads(pickle.dumps(own)).same(own)


@pytest.mark.end_to_end
def test_training_on_states_is_training_on_logits(
    caches: dict[str, Cache], tiny_lm: Path, tmp_path: Path
) -> None:
    """At an undeclared temperature, by two divergences, to nearly the same weights."""
    for kind, temperature in (("forward-kl", 3.0), ("reverse-kl", 0.7)):
        weights = []
        for name in ("dense", "hidden:float16"):
            out = tmp_path / f"{kind}-{name}"
            train(
                TrainOptions(
                    cache=(caches[name].storage.url,),
                    student=str(tiny_lm),
                    out=str(out),
                    divergence=kind,
                    temperature=str(temperature),
                    batch_size=4,
                    max_steps=3,
                    learning_rate=1e-2,
                )
            )
            weights.append(load_file(out / "model.safetensors"))
        for name, want in weights[0].items():
            assert (weights[1][name] - want).norm() <= 2e-3 * want.norm(), name


@pytest.mark.end_to_end
def test_evaluation_and_recheck_by_states(
    caches: dict[str, Cache], tiny_lm: Path, tmp_path: Path
) -> None:
    url = caches["hidden:float16"].storage.url
    found = evaluate(EvaluateOptions(cache=url, student=(str(tiny_lm),), temperature=3.0))
    teacher, student = found.models
    assert teacher.perplexity is not None
    assert student.kl is not None
    assert student.kl < 1e-5  # the student is the teacher itself
    assert len(found.notes) == 1  # its weights are random
    assert "no better than one answer for all" in found.notes[0]
    cache = caches["hidden:int8"]
    assert recheck(cache, [str(tiny_lm)], sample=4).problems == ()
    other = make_tiny_lm(tiny_lm, tmp_path / "other", seed=1)
    first, second = recheck(cache, [str(other)], sample=4).problems
    assert "output layer of the cache is not this teacher's" in first
    assert "the targets are not those of this teacher" in second


@pytest.mark.slow
def test_caches_of_one_layer_are_mixed_and_no_others(
    caches: dict[str, Cache], tiny_lm: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "other.txt"
    corpus.write_text("\n".join(f"Another text of number {i}." for i in range(60)))
    for dtype in ("float16", "int8"):
        out = tmp_path / dtype
        build(options(tiny_lm, corpus, out, f"hidden:{dtype}", shard_tokens=10_000))
        both = [caches[f"hidden:{dtype}"].storage.url, str(out)]
        if dtype == "int8":  # the channels were measured on another corpus
            with pytest.raises(UsageError, match="output_layer of .* mixed only where these agree"):
                TargetStream(both, batch_size=4)
            continue
        stream = TargetStream(both, batch_size=4, group=50, temperature=0.5)
        layers = {id(batch["targets"].layer) for batch in stream}
        assert len(layers) == 1


@pytest.mark.slow
def test_ensembles_and_classifiers_are_refused(
    tiny_lm: Path, tiny_classifier: Path, corpus: Path, tmp_path: Path
) -> None:
    many = options(tiny_lm, corpus, tmp_path / "c", "hidden:int8")
    for other in (
        {"teacher": (str(tiny_lm), str(tiny_lm))},
        {"teacher": (str(tiny_classifier),), "task": "sequence-classification"},
    ):
        with pytest.raises(UsageError, match="one language model"):
            build(BuildOptions(**{**vars(many), **other}))
    assert not (tmp_path / "c").exists()


# Hostile caches


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.update(weight=t["weight"][:-1]), "299 ids, expected 300"),
        (lambda t: t["weight"].fill_(torch.nan), "weight is not finite"),
        (lambda t: t.update(weight=t["weight"].long()), "not of floats"),
        (lambda t: t.update(mean=t["mean"][:-1]), "mean"),
        (lambda t: t["unit"].zero_(), "unit is not above 0"),
        (lambda t: t.pop("mean"), "only one of mean and unit"),
        (lambda t: [t.pop(n) for n in ("mean", "unit")], "no mean and unit"),
        (lambda t: t.update(cap=torch.tensor([-1.0])), "cap"),
        (lambda t: t.update(scale=torch.ones(2)), "scale is not one number"),
        (lambda t: t.update(extra=torch.ones(2)), "its tensors are"),
        (lambda t: t.pop("weight"), "its tensors are"),
        (None, "not an output layer"),
    ],
)
def test_layers_of_hostile_caches(
    caches: dict[str, Cache], tmp_path: Path, change: Any, problem: str
) -> None:
    """With the right hash everywhere: only what is in the file is wrong."""
    from dataclasses import replace

    from kdcache.storage import sha256_file

    cache = caches["hidden:int8"]
    (source,) = Path(cache.storage.url).glob("output_layer-*")
    path = tmp_path / source.name
    if change is None:
        path.write_bytes(b"\x10" + bytes(40))
    else:
        tensors = {name: tensor.clone() for name, tensor in load_file(source).items()}
        change(tensors)
        save_file(tensors, path)
    with pytest.raises((CorruptCacheError, ValueError), match=problem):
        codec = cache.spec.make_codec()
        assert isinstance(codec, Hidden)
        codec.with_layer(read_layer(str(tmp_path), path.name, sha256_file(path)))
    assert replace(cache.spec, output_layer="0" * 64).fingerprint != cache.spec.fingerprint


@pytest.mark.slow
def test_a_layer_that_is_not_the_specs_is_found(caches: dict[str, Cache], tmp_path: Path) -> None:
    import shutil

    for damage in ("changed", "missing"):
        folder = tmp_path / damage
        shutil.copytree(caches["hidden:int8"].storage.url, folder)
        (path,) = folder.glob("output_layer-*")
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.unlink()
        if damage == "changed":
            path.write_bytes(content)
        cache = Cache.open(str(folder))
        (found,) = problems(cache)
        assert path.name in found.text
        assert found.file == path.name
        with pytest.raises(CorruptCacheError, match=path.name):
            read_layer(str(folder), path.name, str(cache.spec.output_layer))
