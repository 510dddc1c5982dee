"""The teacher's entropy: rounding, builds, what is read, what is logged, and caches without it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from textbook import lm_logits, logprobs_of

from kdcache.cache import Cache
from kdcache.cache.shard import column_bytes
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.export import export
from kdcache.commands.inspect import inspect
from kdcache.commands.options import ExportOptions, InspectOptions
from kdcache.stream import TargetDataset, TargetStream
from kdcache.student import DistilledStudent
from kdcache.targets.device import of_positions
from kdcache.targets.device import run as device_run
from kdcache.targets.label_logprob import decode_entropies, encode_entropies


def bound(entropies: np.ndarray) -> np.ndarray:
    """How far a stored value may be off: the step between its neighbours, and float32."""
    return np.sqrt(np.maximum(entropies, 0)) / 32 + 1 / 4096 + 1e-5


@given(x=st.floats(0, 15.8), seed=st.integers(0, 1000))
def test_the_mean_over_the_noise_is_the_value(x: float, seed: int) -> None:
    u = (np.arange(4096) + np.random.default_rng(seed).random()) / 4096
    values = decode_entropies(encode_entropies(np.full(4096, x), u)).astype(float)
    step = math.sqrt(x) / 32 + 1 / 4096
    assert abs(values - x).max() <= step * (1 + 1e-6)
    assert abs(values.mean() - x) <= step / 4096 * 1.01 + 1e-6
    assert values.std() <= step / 2


def test_what_cannot_be_is_the_nearest_value() -> None:
    assert encode_entropies([-1e-7, 0.0, 15.875, 40.0], np.full(4, 0.99)).tolist() == [
        0,
        0,
        255,
        255,
    ]


@pytest.mark.parametrize("vocabulary", [40, 6000])
def test_it_is_that_of_the_softmax(vocabulary: int) -> None:
    torch.manual_seed(2)
    logits = 5 * torch.randn(6, vocabulary)
    logits[1, 1:] = -math.inf  # sure
    logits[2, ::2] = -math.inf  # masked ids
    logits[3] = 1000.0
    p = logits.double().softmax(-1)
    want = torch.special.entr(p).sum(-1)
    labels = torch.zeros(6, dtype=torch.int64)
    blocks = device_run._sums_by_blocks(logits)  # as on CUDA
    for sums in (None, dict(blocks)):
        got = of_positions(logits, labels, sums, entropy=True)["entropy"]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=3e-6)
    broken = logits[:1].clone()
    broken[0, 3] = math.nan
    assert of_positions(broken, labels[:1], entropy=True)["entropy"].isnan().all()


def kept(cache: Cache) -> np.ndarray:
    """Entropies of all positions of a cache."""
    parts = [cache.read(span).entropy for span in range(cache.spec.spans)]
    return decode_entropies(np.concatenate([part for part in parts if part is not None]))


@pytest.mark.parametrize("codec", ["dense", "topk:8", "sample:20"])
def test_every_cache_of_a_language_model_keeps_it(
    codec: str, lm_caches: dict[str, str], tiny_lm: Path, tmp_path: Path
) -> None:
    cache = Cache.open(lm_caches[codec])
    logits, _ = lm_logits(tiny_lm, lm_caches[codec])
    logprobs = logprobs_of(logits)
    want = -(np.exp(logprobs) * logprobs).sum(-1)
    got = kept(cache)
    error = got - want
    assert (abs(error) <= bound(want)).all()
    assert abs(error.sum()) <= 4 * math.sqrt((bound(want) ** 2).sum()) / 2
    found = inspect(InspectOptions(lm_caches[codec], row=0))
    assert found.teacher_entropy == pytest.approx(got.astype(float).mean(), abs=1e-5)
    assert found.row is not None
    assert [p.entropy for p in found.row.positions] == got[: len(found.row.positions)].tolist()
    with cache.hold(cache.manifest.shards[0]) as path:
        size = column_bytes(path)["rows/entropy"] / cache.manifest.shards[0].positions
    assert size <= 1.05
    columns = next(c.bytes_per_position for c in found.columns if c.name == "rows/entropy")
    assert columns <= 1.05
    if codec == "topk:8":
        export(ExportOptions(lm_caches[codec], str(tmp_path / "table")))
        (table,) = [pq.read_table(p) for p in sorted((tmp_path / "table").glob("*.parquet"))][:1]
        flat = np.concatenate(
            [np.asarray(row, float) for row in table["teacher_entropy"].to_pylist()]
        )
        assert flat[~np.isnan(flat)].tolist() == got[: (~np.isnan(flat)).sum()].tolist()


def test_a_sample_gives_the_kl(lm_caches: dict[str, str], tiny_lm: Path) -> None:
    """The mean KL over a batch is the soft cross-entropy less the stored entropies."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_pretrained(tiny_lm)
    for weight in student.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    model = DistilledStudent(student.eval(), "causal-lm", alpha=0.5).eval()
    found = {}
    for codec in ("dense", "sample:20"):
        stream = TargetStream(lm_caches[codec], batch_size=64, shuffle=False)
        sums = []
        for batch in stream:
            with torch.no_grad():
                out = model(**batch)
            kl = out.soft_loss if codec == "dense" else out.kl
            assert kl is not None
            assert (out.kl is None) == (codec == "dense")
            sums.append(float(kl) * float(batch["count"]))
        found[codec] = sum(sums)
    assert found["sample:20"] == pytest.approx(found["dense"], rel=0.1)


def test_a_classifiers_batch_has_it_and_no_column(class_cache: str) -> None:
    cache = Cache.open(class_cache)
    assert not cache.spec.entropy
    batch = next(iter(TargetStream(class_cache, batch_size=4, temperature=2.0)))
    p = batch["targets"].logits.double().softmax(-1)
    torch.testing.assert_close(batch["teacher_entropy"].double(), torch.special.entr(p).sum(-1))
    bare = next(iter(TargetStream(class_cache, batch_size=4, temperature=None)))
    assert "teacher_entropy" not in bare
    shown = inspect(InspectOptions(class_cache, row=0))
    assert shown.row is not None
    first = cache.read(0).targets.at(1.0).logits[0].double().softmax(-1)
    assert shown.row.positions[0].entropy == pytest.approx(float(torch.special.entr(first).sum()))


@pytest.mark.slow
def test_a_begun_cache_without_it_goes_on_without(
    small_build: BuildOptions, tmp_path: Path
) -> None:
    """A build that an earlier version began makes the cache that its spec describes."""
    build(small_build)
    whole = Cache.open(small_build.out)
    assert whole.spec.entropy
    older = dataclasses.replace(whole.spec, entropy=False)
    out = tmp_path / "begun"
    files = whole.tokenizer_files()
    ranks = whole.read_beside("ranks.u32")
    begun = Cache.create_or_resume(str(out), older, tokenizer_files=files, ranks=ranks)
    entry = whole.manifest.shards[0]
    begun.commit(
        0, dataclasses.replace(whole.read(0), entropy=None), clipped_mass=entry.clipped_mass
    )
    build(dataclasses.replace(small_build, out=str(out)))
    finished = Cache.open(str(out))
    assert not finished.spec.entropy
    assert finished.read(0).entropy is None
    np.testing.assert_array_equal(finished.read(0).label_logprob, whole.read(0).label_logprob)
    both = TargetDataset([finished, whole])
    assert both.kept == {"label_logprob"}
    assert both[0].entropy is None
    assert both[len(both) - 1].entropy is None
    assert json.loads((out / "spec.json").read_text())["spec"].get("entropy") is None
