"""The teacher's log-probability of each label, and its entropy: rounding, builds and commands."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from broken_caches import forge, naming, run
from conftest import further, make_tiny_lm
from hypothesis import given
from hypothesis import strategies as st
from make_caches import CAUSAL, make_cache
from test_untrusted import resealed
from textbook import lm_logits, logprobs_of
from transformers import AutoModelForCausalLM

from kdcache.cache import Cache
from kdcache.cache.check import problems
from kdcache.cache.figures import teacher_cross_entropy
from kdcache.cache.shard import ShardData, column_bytes
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.evaluate.evaluate import evaluate
from kdcache.commands.export import export
from kdcache.commands.inspect import inspect
from kdcache.commands.options import EvaluateOptions, ExportOptions, InspectOptions
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.domains import Weights
from kdcache.errors import CorruptCacheError, UsageError
from kdcache.stream import Collator, TargetDataset, TargetStream
from kdcache.student import DistilledStudent
from kdcache.targets import Codec
from kdcache.targets.device import label_logprobs
from kdcache.targets.device import run as device_run
from kdcache.targets.label_logprob import (
    IMPOSSIBLE,
    decode_entropies,
    decode_logprobs,
    encode_entropies,
    encode_logprobs,
    sum_logprobs,
)
from kdcache.tasks import IGNORE

SCALES = {"label_logprob": 8192, "entropy": 4096}


def bound(values: np.ndarray, name: str = "label_logprob") -> np.ndarray:
    """How far a stored value may be off: the step between its neighbours, and float32."""
    step = 45 if name == "label_logprob" else 32
    return np.sqrt(np.abs(values)) / step + 1 / SCALES[name] + 1e-5


# Rounding


@pytest.mark.parametrize("name", SCALES)
@given(share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_the_mean_over_the_noise_is_the_value(name: str, share: float, seed: int) -> None:
    u = (np.arange(4096) + np.random.default_rng(seed).random()) / 4096
    if name == "entropy":
        x, step, codes = 15.8 * share, 32.0, encode_entropies(np.full(4096, 15.8 * share), u)
        np.testing.assert_allclose(decode_entropies(codes), codes.astype(float) ** 2 / 4096)
    else:
        x = 500_000 * share**4
        step, codes = 45.2, encode_logprobs(np.full(4096, -x), u)
    values = codes.astype(float) ** 2 / SCALES[name]
    step = math.sqrt(x) / step + 1 / SCALES[name]
    assert abs(values - x).max() <= step * (1 + 1e-9)
    assert len(np.unique(codes)) <= 2
    # Evenly spaced noise: the mean is right up to one of 4,096 points.
    assert abs(values.mean() - x) <= step / 4096 * 1.01 + 1e-9 * x
    assert values.std() <= step / 2


def test_what_has_no_probability_is_infinite() -> None:
    codes = encode_logprobs([-np.inf, -600_000.0, 1e-7, -0.0], np.zeros(4))
    assert codes.tolist() == [IMPOSSIBLE, IMPOSSIBLE, 0, 0]
    assert decode_logprobs(codes).tolist() == [-math.inf, -math.inf, 0, 0]
    assert sum_logprobs(codes) == (0.0, 2)
    many = np.arange(IMPOSSIBLE, dtype=np.uint16)
    assert sum_logprobs(many) == (sum(c * c for c in range(IMPOSSIBLE)) / 8192, 0)
    assert encode_entropies([-1e-7, 0.0, 15.875, 40], np.full(4, 0.99)).tolist() == [0, 0, 255, 255]


# On the device


@pytest.mark.parametrize(
    ("codec", "temperatures"),
    [("sample:3", (1.0, 2.0)), ("sample:3", (2.0,)), ("topk:4", (2.0,)), ("dense", (1.0,))],
)
@pytest.mark.parametrize("vocabulary", [40, 6000])
def test_it_is_the_log_softmax_whatever_the_codec_has_read(
    codec: str, temperatures: tuple[float, ...], vocabulary: int
) -> None:
    torch.manual_seed(1)
    n = 9
    logits = 5 * torch.randn(n, vocabulary)
    labels = torch.randint(0, vocabulary, (n,))
    labels[0] = logits[0].argmax()
    labels[2], labels[3] = vocabulary, vocabulary + 7  # the tokenizer's, but not the teacher's
    if codec != "dense":
        logits[1, labels[1]] = -math.inf  # a masked id
    want = logits.double().log_softmax(-1).gather(1, labels.clamp(0, vocabulary - 1)[:, None])[:, 0]
    want[2:4] = -math.inf
    encoded = Codec.parse(codec, temperatures, vocabulary).encode(
        logits, torch.rand(n, dtype=torch.float64)
    )
    found = label_logprobs(logits, labels, encoded)
    fresh = label_logprobs(logits[:, None], labels)
    blocks = device_run._sums_by_blocks(logits)  # as on CUDA
    other = device_run._logprobs(logits, labels, blocks["peak"], blocks["normalizer"])[
        "label_logprob"
    ]
    masked = torch.isinf(want)
    for got in (found, fresh, other):
        assert got.dtype == torch.float32
        assert torch.equal(torch.isinf(got), masked)
        torch.testing.assert_close(got[~masked].double(), want[~masked], rtol=2e-6, atol=2e-6)
    assert not {"peak", "normalizer"} & encoded.keys()


@pytest.mark.parametrize("vocabulary", [40, 6000])
def test_the_entropy_is_that_of_the_softmax(vocabulary: int) -> None:
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
        got = device_run.of_positions(logits, labels, sums, entropy=True)["entropy"]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=3e-6)
    broken = logits[:1].clone()
    broken[0, 3] = math.nan
    assert device_run.of_positions(broken, labels[:1], entropy=True)["entropy"].isnan().all()


# Builds


def kept(cache: Cache, name: str = "label_logprob") -> np.ndarray:
    """Log-probabilities, or entropies, of all positions of a cache."""
    parts = [getattr(cache.read(span), name) for span in range(cache.spec.spans)]
    codes = np.concatenate([part for part in parts if part is not None])
    return decode_logprobs(codes) if name == "label_logprob" else decode_entropies(codes)


@pytest.mark.parametrize("codec", ["dense", "topk:8", "sample:20"])
def test_every_cache_of_a_language_model_keeps_them(
    codec: str, lm_caches: dict[str, str], tiny_lm: Path, tmp_path: Path
) -> None:
    cache = Cache.open(lm_caches[codec])
    logits, labels = lm_logits(tiny_lm, lm_caches[codec])
    every = logprobs_of(logits)
    want = {
        "label_logprob": every[np.arange(len(labels)), labels],
        "entropy": -(np.exp(every) * every).sum(-1),
    }
    got = {name: kept(cache, name) for name in want}
    for name, exact in want.items():
        error, most = got[name] - exact, bound(exact, name)
        assert (abs(error) <= most).all()
        # 4 standard errors, of which each is half a step at most.
        assert abs(error.sum()) <= 4 * math.sqrt((most**2).sum()) / 2
    other = Cache.open(lm_caches["dense" if codec != "dense" else "topk:8"])
    same = kept(other) == got["label_logprob"]
    assert same.mean() > 0.999, "the noise is the position's, not the codec's"
    means = {name: values.astype(float).mean() for name, values in got.items()}
    assert teacher_cross_entropy([cache]) == pytest.approx(-means["label_logprob"], abs=1e-6)
    found = inspect(InspectOptions(lm_caches[codec], row=0))
    assert found.teacher_entropy == pytest.approx(means["entropy"], abs=1e-5)
    assert found.row is not None
    shown = [position.entropy for position in found.row.positions]
    assert shown == got["entropy"][: len(shown)].tolist()
    sizes = {column.name: column.bytes_per_position for column in found.columns}
    assert sizes["rows/entropy"] <= 1.05
    if codec == "topk:8":
        export(ExportOptions(lm_caches[codec], str(tmp_path / "table")))
        table = pq.read_table(min((tmp_path / "table").glob("*.parquet")))
        rows = table["teacher_entropy"].to_pylist()
        flat = np.concatenate([np.asarray(row, float) for row in rows])
        known = flat[~np.isnan(flat)]
        assert known.tolist() == got["entropy"][: len(known)].tolist()


def test_a_sample_gives_the_kl(lm_caches: dict[str, str], tiny_lm: Path) -> None:
    """The mean KL over a batch is the soft cross-entropy less the stored entropies."""
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


def test_a_classifiers_cache_keeps_none(class_cache: str) -> None:
    cache = Cache.open(class_cache)
    assert not cache.spec.label_logprob
    assert cache.read(0).label_logprob is None
    assert cache.manifest.shards[0].label_nats is None
    assert inspect(InspectOptions(class_cache)).teacher_cross_entropy is None


def test_a_classifiers_batch_has_its_entropy_and_no_column(class_cache: str) -> None:
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
def test_it_does_not_depend_on_the_batches(small_build: BuildOptions, tmp_path: Path) -> None:
    alone = dataclasses.replace(small_build, out=str(tmp_path / "alone"), batch_tokens=1)
    for options in (small_build, alone):
        build(dataclasses.replace(options, limit=12, max_length=48))
    one, two = (kept(Cache.open(options.out)) for options in (small_build, alone))
    assert len(one) > 300
    assert (one == two).mean() > 0.99  # rounding in the model may move a few


@pytest.mark.slow
def test_ids_beyond_the_vocabulary_take_nothing_from_it(
    small_build: BuildOptions, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    wide = make_tiny_lm(tiny_tokenizer, tmp_path / "wide", vocab_size=384)
    options = dataclasses.replace(small_build, teacher=(str(wide),), limit=12, max_length=48)
    assert build(options).clipped_mass > 0.01
    logits, labels = lm_logits(wide, options.out)
    want = logprobs_of(logits)[np.arange(len(labels)), labels]
    assert (abs(kept(Cache.open(options.out)) - want) <= bound(want)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ensemble", "codec", "temperatures"),
    [
        ("mean-probs", "sample:5", (1.0, 2.0)),
        ("mean-logits", "topk:5", (2.0,)),
        *further(("mean-probs", "sample:5", (2.0,)), ("mean-probs", "dense", (2.0,))),
    ],
)
def test_of_an_ensemble_it_is_the_means(
    ensemble: Any,
    codec: str,
    temperatures: tuple[float, ...],
    small_build: BuildOptions,
    tiny_tokenizer: Path,
    tmp_path: Path,
) -> None:
    other = make_tiny_lm(tiny_tokenizer, tmp_path / "second", seed=5)
    options = dataclasses.replace(
        small_build,
        teacher=(*small_build.teacher, str(other)),
        teacher_weight=(3.0, 1.0),
        ensemble=ensemble,
        codec=codec,
        temperatures=temperatures,
        limit=6,
        max_length=48,
    )
    build(options)
    models = [AutoModelForCausalLM.from_pretrained(name).eval() for name in options.teacher]
    dataset = TargetDataset(options.out)
    for data in (dataset[i] for i in range(len(dataset))):
        row = data.row(0)
        ids = torch.from_numpy(row.input_ids).long()[None]
        places = row.labels != IGNORE
        with torch.inference_mode():
            logits = [one(input_ids=ids).logits[0, places].double() for one in models]
        if ensemble == "mean-probs":
            mean = (0.75 * logits[0].softmax(-1) + 0.25 * logits[1].softmax(-1)).log()
        else:
            mean = (0.75 * logits[0] + 0.25 * logits[1]).log_softmax(-1)
        want = mean[np.arange(places.sum()), row.labels[places]].numpy()
        assert data.label_logprob is not None
        assert (abs(decode_logprobs(data.label_logprob) - want) <= bound(want)).all()


@pytest.mark.slow
def test_it_takes_little_more_than_a_byte(stories260k: Path, novels: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "cache")
    build(
        BuildOptions(
            (str(stories260k),), (str(novels),), out, codec="sample:1", max_length=256, limit=12,
            workers=0,
        )
    )  # fmt: skip
    cache = Cache.open(out)
    assert cache.manifest.positions > 20_000
    sizes = [
        column_bytes(Path(out, "shards", shard.name))["rows/label_logprob"]
        for shard in cache.manifest.shards
    ]
    assert sum(sizes) / cache.manifest.positions < 1.2


# Reading


@pytest.mark.parametrize("soft", [True, False])
def test_batches_hand_it_out_in_the_order_of_their_positions(tmp_path: Path, soft: bool) -> None:
    caches = [
        make_cache(tmp_path / name, [7, 5], task=CAUSAL, first=first, label_logprob=True)
        for name, first in (("a", 0), ("b", 40))
    ]
    temperature = 1.0 if soft else None
    stream = TargetStream(caches, batch_size=5, temperature=temperature, seed=3)
    dataset = TargetDataset(caches)
    loose = [Collator(0, temperature)([dataset[i]]) for i in range(len(dataset))]
    seen = 0
    for batch in (*stream, *loose):
        labels = batch["labels"]
        # `make_caches`: a function of the row's number and the place in the row.
        want = torch.tensor(
            [
                -((((int(ids[0]) * 64 + int(ids[1])) * 31 + place) % 400) ** 2) / 8192
                for ids, row in zip(batch["input_ids"], labels, strict=True)
                for place in (row != IGNORE).nonzero().flatten().tolist()
            ]
        )
        torch.testing.assert_close(batch["label_logprob"], want)
        seen += len(want)
    assert seen == 2 * sum(cache.manifest.positions for cache in caches)


def test_beside_caches_without_it_no_batch_has_it(tmp_path: Path) -> None:
    caches = [
        make_cache(tmp_path / "with", [4, 4], task=CAUSAL, label_logprob=True),
        make_cache(tmp_path / "without", [4, 4], task=CAUSAL, first=40),
    ]
    dataset = TargetDataset(caches)
    for batch in (
        *TargetStream(caches, batch_size=3, group=1),
        *(Collator(0)([dataset[i]]) for i in range(len(dataset))),
    ):
        assert "label_logprob" not in batch
    assert teacher_cross_entropy(caches) is None
    found = teacher_cross_entropy([caches[0], caches[0]], Weights((1.0, 0.5)))
    assert found == pytest.approx(teacher_cross_entropy(caches[:1]))


# Commands


def test_inspect_shows_it_beside_each_token(lm_caches: dict[str, str], tiny_lm: Path) -> None:
    folder = lm_caches["sample:20"]
    logits, labels = lm_logits(tiny_lm, folder)
    want = logprobs_of(logits)[np.arange(len(labels)), labels]
    result = inspect(InspectOptions(folder, row=0))
    assert result.row is not None
    got = np.array([position.label_logprob for position in result.row.positions])
    assert (abs(got - want[: len(got)]) <= bound(want[: len(got)])).all()
    assert result.teacher_cross_entropy == pytest.approx(-want.mean(), abs=2e-3)
    assert result.teacher_perplexity == pytest.approx(math.exp(-want.mean()), rel=2e-3)
    assert result.impossible_labels == 0
    shown = run("inspect", folder, "--row", "0").stdout
    assert f"{result.teacher_cross_entropy:.4f} nats a position (perplexity " in shown
    lines = shown[shown.index("logprob  entropy  teacher's predictions") :].splitlines()[1:]
    assert len(lines) == len(got)
    assert all(f"  {logprob:.2f}  " in line for logprob, line in zip(got, lines, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["topk:8", "sample:20"])
@pytest.mark.parametrize("limit", [None, 7])
def test_evaluate_reports_the_teachers_cross_entropy_without_it(
    codec: str, limit: int | None, lm_caches: dict[str, str], tiny_lm: Path
) -> None:
    options = EvaluateOptions((str(tiny_lm),), cache=lm_caches[codec], limit=limit)
    teacher, same = evaluate(options).models
    assert teacher.cross_entropy == pytest.approx(same.cross_entropy, abs=5e-3)
    assert teacher.perplexity == pytest.approx(same.perplexity, rel=5e-3)


@pytest.mark.end_to_end
def test_train_reports_the_teachers_cross_entropy(
    lm_caches: dict[str, str], tmp_path: Path
) -> None:
    config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300}
    (tmp_path / "student.json").write_text(json.dumps(config))
    common: dict[str, Any] = {"student": str(tmp_path / "student.json"), "max_steps": 2}
    options = TrainOptions(
        (lm_caches["sample:20"],), out=str(tmp_path / "run"), eval_cache=(lm_caches["topk:8"],),
        **common,
    )  # fmt: skip
    result = train(options)
    want = [teacher_cross_entropy([Cache.open(lm_caches[c])]) for c in ("sample:20", "topk:8")]
    assert [result.teacher_cross_entropy, result.eval_teacher_cross_entropy] == want
    again = train(options)
    assert not again.made
    assert again.teacher_cross_entropy == want[0]


# Caches that lie


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return make_cache(tmp_path / "cache", [6, 3], task=CAUSAL, label_logprob=True)


def without(data: ShardData) -> ShardData:
    return dataclasses.replace(data, label_logprob=None)


def test_the_column_is_there_exactly_if_the_spec_says_so(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(CorruptCacheError, match="does not belong to spec"):
        forge(cache, tmp_path / "none", without)
    plain = forge(cache, tmp_path / "plain", without, label_logprob=False)
    assert list(problems(plain)) == []
    with pytest.raises(CorruptCacheError, match="does not belong to spec"):
        forge(plain, tmp_path / "more", lambda _: cache.read(0), spans=1)


@pytest.mark.slow
def test_a_build_of_an_earlier_version_is_not_continued(
    small_build: BuildOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(small_build, limit=8)
    build(options)
    cache = Cache.open(options.out)
    old = forge(cache, Path(options.out + "-old"), without, label_logprob=False)
    with pytest.raises(UsageError, match="label_logprob: null -> true"):
        build(dataclasses.replace(options, out=old.url))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("label_nats", 1.0, "add up to"),
        ("impossible_labels", 1, "another cache"),
        ("label_nats", -1.0, "labels of -1.0 nats"),
        ("label_nats", "x", "labels of x nats"),
        ("impossible_labels", 10**6, "1000000 impossible labels"),
        ("impossible_labels", None, "None impossible labels"),
    ],
)
def test_sums_that_are_not_the_columns_are_found(
    name: str, value: Any, words: str, cache: Cache
) -> None:
    folder = Path(cache.url)
    resealed(folder / "manifest.json", lambda v: v["shards"][0].update({name: value}))
    assert words.replace("add up to", "another cache") in naming(folder)


def test_codes_that_are_not_the_manifests_sum_are_found(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A shard whose attributes agree with the manifest, and whose column does not.
    monkeypatch.setattr("kdcache.cache.cache.sum_logprobs", lambda codes: (7.0, 0))
    lying = forge(cache, tmp_path / "lying", lambda data: data)
    assert [p.file for p in problems(lying)] == [f"shards/{s.name}" for s in lying.manifest.shards]


def test_a_column_of_another_length_is_refused(cache: Cache, tmp_path: Path) -> None:
    def shorter(data: ShardData) -> ShardData:
        assert data.label_logprob is not None
        return dataclasses.replace(data, label_logprob=data.label_logprob[1:])

    found = forge(cache, tmp_path / "shorter", shorter)
    with pytest.raises(CorruptCacheError, match="label_logprob has shape"):
        found.read(0)


@pytest.mark.slow
def test_a_begun_cache_without_entropies_goes_on_without(
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
