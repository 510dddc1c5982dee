"""The policy gradient of drawn labels: its formula, what it is the mean of, and runs with it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny_lm
from make_caches import CAUSAL, make_cache
from torch import Tensor

from kdcache.cache import Cache
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.generate.generate import generate
from kdcache.commands.generate.options import GenerateOptions
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.errors import UsageError
from kdcache.loss import distillation_loss, sliced_linear_distillation
from kdcache.loss.reference import MAX_ADVANTAGE
from kdcache.stream import LabelReading, TargetStream
from kdcache.targets import DenseTargets, LabelTargets
from kdcache.targets.label_logprob import decode_logprobs

V = 7


def loss(logits: Tensor, labels: Tensor, targets: LabelTargets, **more: Any) -> Any:
    """The soft loss alone, summed."""
    given = {"alpha": 0.0, "divergence": "policy-gradient", "count": 1.0, **more}
    return distillation_loss(logits, labels, targets, **given)


@pytest.mark.parametrize("clip", [None, 0.5, 2.0, math.inf])
def test_value_and_gradient_are_those_of_the_formula(clip: float | None) -> None:
    """Position by position in plain numbers: -w A, and -w A (onehot - p)."""
    rng = np.random.default_rng(4)
    n = 40
    z, labels = rng.normal(size=(n, V)) * 3, rng.integers(0, V, n)
    labels[3] = -100
    teacher, writer = -rng.exponential(4.0, n), -rng.exponential(2.0, n)
    teacher[:2] = -np.inf, -60.0  # what a teacher finds impossible, or nearly so
    weights, baseline = rng.random(n), rng.normal(size=n)
    value, gradient = 0.0, np.zeros((n, V))
    for i, y in enumerate(labels):
        if y < 0:
            continue
        p = np.exp(z[i]) / np.exp(z[i]).sum()
        pull = min(max(teacher[i] - math.log(p[y]), -MAX_ADVANTAGE), MAX_ADVANTAGE)
        weight = 1.0 if clip is None else min(p[y] / math.exp(writer[i]), clip)
        value -= weights[i] * weight * pull
        gradient[i] = -weights[i] * weight * (pull - baseline[i]) * (np.eye(V)[y] - p)
    logits = torch.from_numpy(z).requires_grad_()
    how = None if clip is None else torch.from_numpy(writer)
    base = torch.from_numpy(baseline)
    targets = LabelTargets(torch.from_numpy(teacher), how, base, clip or math.inf)
    more = {"position_weights": torch.from_numpy(weights)}
    parts = loss(logits, torch.from_numpy(labels), targets, **more)
    parts.total.backward()
    assert float(parts.soft) == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(logits.grad, gradient, rtol=1e-10, atol=1e-12)


def test_its_mean_over_what_a_writer_draws_is_reverse_kl() -> None:
    """Every label by its chance with the writer: value and gradient are those of KL(p || q)."""
    torch.manual_seed(0)
    student, q, b = (torch.randn(3, V, dtype=torch.float64) for _ in range(3))
    teacher, writer = (x.log_softmax(-1) for x in (q, b))
    exact = student.clone().requires_grad_()
    want = distillation_loss(
        exact,
        torch.full((3,), -100),
        DenseTargets(q, 1.0),
        alpha=0.0,
        divergence="reverse-kl",
        count=1.0,
    )
    want.total.backward()
    drawn = student.clone().requires_grad_()
    mean = torch.zeros((), dtype=torch.float64)
    bare = torch.zeros((), dtype=torch.float64)  # w = 1, of what the student draws
    for y in range(V):
        labels = torch.full((3,), y)
        targets = LabelTargets(teacher[:, y], writer[:, y], torch.tensor([0.0, -3.0, 2.0]))
        for i, chance in enumerate(writer[:, y].exp()):
            mean = mean + chance * loss(drawn[[i]], labels[[i]], targets[[i]]).total
        own = LabelTargets(teacher[:, y])
        for i, chance in enumerate(student.log_softmax(-1)[:, y].exp()):
            bare = bare + chance * loss(drawn[[i]], labels[[i]], own[[i]]).total
    for found in (mean, bare):
        (gradient,) = torch.autograd.grad(found, drawn, retain_graph=True)
        torch.testing.assert_close(found, want.total, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, exact.grad, rtol=1e-12, atol=1e-12)


def test_slices_give_the_same_as_whole_logits() -> None:
    torch.manual_seed(1)
    parts = torch.randn(11, 5, dtype=torch.float64), torch.randn(V + 2, 5, dtype=torch.float64)
    labels = torch.randint(0, V, (11,))
    targets = LabelTargets(-torch.rand(11) * 5, -torch.rand(11) * 3, clip=1.5)
    found = []
    for form in (0, 1):
        hidden, weight = (x.clone().requires_grad_() for x in parts)
        given: Any = {"alpha": 0.3, "divergence": "policy-gradient", "vocab_size": V}
        if form:
            made = sliced_linear_distillation(
                hidden, weight, None, labels, targets, rows=4, **given
            )
        else:
            made = distillation_loss(hidden @ weight.T, labels, targets, **given)
        made.total.backward()
        found.append((*made, hidden.grad, weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_it_is_of_drawn_labels_alone() -> None:
    logits, labels = torch.zeros(2, V), torch.zeros(2, dtype=torch.long)
    with pytest.raises(UsageError, match="LabelTargets"):
        distillation_loss(
            logits, labels, DenseTargets(logits, 1.0), alpha=0.0, divergence="policy-gradient"
        )
    with pytest.raises(UsageError, match="no other one"):
        distillation_loss(logits, labels, LabelTargets(torch.zeros(2)), alpha=0.0)


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory, text_corpus: Path, tiny_tokenizer: Path
) -> GenerateOptions:
    """Text of another model than the teacher."""
    home = tmp_path_factory.mktemp("written")
    writer = make_tiny_lm(tiny_tokenizer, home / "writer", seed=1)
    options = GenerateOptions(
        model=str(writer),
        corpus=(str(text_corpus),),
        out=str(home / "text"),
        max_new_tokens=12,
        prompt_tokens=5,
        limit=40,
        shard_tokens=400,
        workers=0,
    )
    generate(options)
    return options


def cache_of(text: str, teacher: Path, out: Path) -> Cache:
    found = build(
        BuildOptions(
            teacher=(str(teacher),),
            corpus=(text,),
            out=str(out),
            codec="sample:4",
            workers=0,
        )
    )
    return Cache.open(found.cache)


@pytest.mark.end_to_end
def test_a_student_trains_on_what_it_wrote(
    written: GenerateOptions, tiny_lm: Path, tmp_path: Path
) -> None:
    """The first loss is minus the mean of log q - log p, which falls; a second epoch goes on."""
    cache = cache_of(written.out, tiny_lm, tmp_path / "cache")
    shards = [cache.read(i) for i in range(cache.spec.spans)]
    gaps = [
        decode_logprobs(one.writer_logprob) - decode_logprobs(one.label_logprob)
        for one in shards
        if one.writer_logprob is not None and one.label_logprob is not None
    ]
    assert len(gaps) == len(shards) > 1
    want = float(np.concatenate(gaps).mean())
    (batch,) = TargetStream(
        [cache], batch_size=40, cross=LabelReading(cache.spec.pad_id, clip=2.0)
    ).batches(1)
    assert isinstance(batch["targets"], LabelTargets)
    options = TrainOptions(
        cache=(cache.url,),
        student=f"{written.model}/config.json",
        out=str(tmp_path / "run"),
        init_from=written.model,
        divergence="policy-gradient",
        alpha=0.0,
        batch_size=40,
        epochs=12.0,
        learning_rate=3e-3,
        eval_cache=(cache.url,),
        eval_steps=1,
    )
    result = train(options)
    assert result.eval["soft_loss"] < 0.9 * want


@pytest.mark.end_to_end
def test_what_lacks_a_writer_is_refused_in_a_line(
    written: GenerateOptions, tiny_lm: Path, tmp_path: Path
) -> None:
    """Warmer text, and a corpus: only without importance weights, and at temperature 1."""
    warm = replace(written, out=str(tmp_path / "warm"), temperature=1.3, limit=8)
    generate(warm)
    caches = {
        "warm": cache_of(warm.out, tiny_lm, tmp_path / "c"),
        "corpus": make_cache(tmp_path / "corpus", [4], task=CAUSAL),
    }
    for name, cache in caches.items():
        options = TrainOptions(
            cache=(cache.url,),
            student=f"{written.model}/config.json",
            out=str(tmp_path / "run"),
            divergence="policy-gradient",
        )
        match = "kdcache generate at --temperature 1" if name == "warm" else "none"
        with pytest.raises(UsageError, match=match):
            train(options)
        assert all(cache.read(i).writer_logprob is None for i in range(cache.spec.spans))
        with pytest.raises(UsageError, match="at temperature 1"):
            train(replace(options, importance_clip=0.0, temperature=2.0))
    result = train(
        TrainOptions(
            cache=(caches["warm"].url,),
            student=f"{written.model}/config.json",
            out=str(tmp_path / "run"),
            divergence="policy-gradient",
            importance_clip=0.0,
            max_steps=1,
        )
    )
    assert result.steps == 1
