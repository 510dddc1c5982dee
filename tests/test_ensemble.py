"""Several teachers as one: the mean of their probabilities, exact at each declared temperature."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_lm
from transformers import AutoModelForCausalLM

from kdcache.cache import Cache
from kdcache.cache.figures import teacher_cross_entropy
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.evaluate.evaluate import evaluate
from kdcache.commands.options import EvaluateOptions, PlanOptions
from kdcache.commands.plan.plan import plan
from kdcache.commands.verify import recheck
from kdcache.errors import UsageError
from kdcache.stream import TargetDataset
from kdcache.stream.checks import check_caches
from kdcache.tasks import IGNORE
from kdcache.teacher import memory

pytestmark = pytest.mark.slow


@pytest.fixture
def options(small_build: BuildOptions) -> BuildOptions:
    return dataclasses.replace(small_build, max_length=64)


def ensemble(options: BuildOptions, tokenizer: Path, folder: Path, **change: Any) -> BuildOptions:
    """Two teachers whose heads are padded to other widths, sliced at other positions."""
    other = make_tiny_lm(tokenizer, folder / "second", vocab_size=448, seed=5)
    return dataclasses.replace(
        options,
        teacher=(*options.teacher, str(other)),
        teacher_weight=(3.0, 1.0),
        limit=8,
        **{"out": str(folder / "cache"), **change},
    )


def test_a_mean_of_teachers_is_exact_at_each_declared_temperature(
    options: BuildOptions, tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared: dict[str, Any] = {"codec": "sample:400", "temperatures": (1.0, 2.0, 4.0)}
    monkeypatch.setitem(memory._SLICE_BYTES, "cpu", 4 * 300 * 7)
    both = ensemble(options, tiny_tokenizer, tmp_path, **declared)
    build(both)
    dataset = TargetDataset(both.out)
    models = [AutoModelForCausalLM.from_pretrained(name).eval() for name in both.teacher]
    for data in (dataset[i] for i in range(len(dataset))):
        row = data.row(0)
        ids = torch.from_numpy(row.input_ids).long()[None]
        with torch.inference_mode():
            logits = [one(input_ids=ids).logits[0, row.labels != IGNORE, :300] for one in models]
        for t in declared["temperatures"]:
            want = 0.75 * (logits[0] / t).softmax(-1) + 0.25 * (logits[1] / t).softmax(-1)
            targets = data.targets.at(t)
            got = torch.zeros_like(want).scatter_add_(1, targets.ids, targets.weights)
            torch.testing.assert_close(got, want, rtol=0, atol=0.005)


def test_a_mean_that_a_codec_cannot_keep_is_refused(
    options: BuildOptions, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    both = ensemble(options, tiny_tokenizer, tmp_path, temperatures=(1.0, 2.0))
    for codec in ("dense", "topk:8"):
        with pytest.raises(UsageError, match=f"codec {codec} keeps the mean.*not at 1, 2"):
            build(dataclasses.replace(both, codec=codec))
        build(
            dataclasses.replace(
                both, codec=codec, ensemble="mean-logits", out=str(tmp_path / codec[:4])
            )
        )
    build(dataclasses.replace(both, codec="dense", temperatures=(2.0,)))
    cache = Cache.open(both.out)
    assert not cache.codec().any_temperature
    cache.read(0).targets.at(2.0)
    with pytest.raises(UsageError, match="temperature 1 is not declared by this cache"):
        cache.read(0).targets.at(1.0)
    for temperature in (1.0, 3.0):
        with pytest.raises(UsageError, match="is not declared by this cache"):
            check_caches([cache], [temperature])
    single = dataclasses.replace(options, out=str(tmp_path / "single"), limit=8, codec="dense")
    build(single)
    Cache.open(single.out).read(0).targets.at(3.0)


def test_plan_recheck_and_evaluation_take_the_mean_of_their_temperature(
    options: BuildOptions, tiny_tokenizer: Path, tiny_lm: Path, tmp_path: Path
) -> None:
    both = ensemble(options, tiny_tokenizer, tmp_path, codec="sample:40", temperatures=(1.0, 2.0))
    build(both)
    again = recheck(Cache.open(both.out), both.teacher, sample=4)
    assert again.problems == ()
    assert [found.temperature for found in again.fidelity] == [1.0, 2.0]
    assert all(found.kl is not None and found.kl < 3 * found.floor for found in again.fidelity)
    planned = plan(
        PlanOptions(
            teacher=both.teacher,
            corpus=both.corpus,
            codec=("sample:20000",),
            temperatures=("1", "1,2"),
            max_length=64,
            rows=8,
        )
    )
    for cache in planned.caches:
        assert all(one.noise < 1e-5 for one in cache.fidelity), cache
    hot = dataclasses.replace(both, out=str(tmp_path / "hot"), codec="dense", temperatures=(2.0,))
    build(hot)
    result = evaluate(EvaluateOptions(student=(str(tiny_lm),), cache=hot.out))
    assert result.temperature == 2.0
    (teacher,) = [one for one in result.models if one.role == "teacher"]
    assert teacher.accuracy is not None
    # At T = 1, which the logits do not tell: kept beside them.
    kept = teacher_cross_entropy([Cache.open(hot.out)])
    assert kept is not None
    assert teacher.cross_entropy == pytest.approx(kept)
