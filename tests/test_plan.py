"""`kdcache plan`: its figures against what a build makes of the same corpus, and by hand."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcache.cache import Cache
from kdcache.cli.main import cli
from kdcache.cli.views import render_plan
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.options import PlanOptions
from kdcache.commands.plan.fidelity import NEAR, Fidelity, FidelityMeter, FullGradient
from kdcache.commands.plan.plan import plan
from kdcache.commands.plan.result import (
    SMALL,
    PlannedCache,
    PlanResult,
    advice,
    break_even,
    recommended,
)
from kdcache.commands.plan.sample import sample_rows
from kdcache.corpus import Corpus
from kdcache.errors import UsageError
from kdcache.rows import RowSpec
from kdcache.targets import Codec, position_uniform
from kdcache.tasks import TASKS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def options(tiny_lm: Path, text_corpus: Path) -> PlanOptions:
    return PlanOptions(
        teacher=(str(tiny_lm),),
        corpus=(str(text_corpus),),
        codec=("sample:6", "topk:8", "dense"),
        rows=24,
        max_length=64,
    )


@pytest.fixture(scope="module")
def planned(options: PlanOptions) -> PlanResult:
    """What is planned with these options."""
    return plan(options)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_tokenizer)


def by_name(result: PlanResult) -> dict[tuple[str, tuple[float, ...]], PlannedCache]:
    return {(c.codec, c.temperatures): c for c in result.caches}


def test_a_plan_of_the_whole_corpus_says_what_a_build_makes(
    options: PlanOptions, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    lines = Path(options.corpus[0]).read_text().splitlines(keepends=True)
    corpus.write_text("".join(lines[:60]))
    everything = dataclasses.replace(options, corpus=(str(corpus),), rows=10_000)
    result = plan(everything)
    caches = by_name(result)
    assert set(caches) == {(c, t) for c in options.codecs for t in ((1.0,), (1.0, 2.0))}
    for (codec, temperatures), planned in caches.items():
        if (codec == "sample:6") != (len(temperatures) == 2):
            continue
        out = tmp_path / f"{codec}-{len(temperatures)}".replace(":", "")
        built = build(
            BuildOptions(
                teacher=everything.teacher,
                corpus=everything.corpus,
                out=str(out),
                codec=codec,
                temperatures=temperatures,
                max_length=64,
                shard_tokens=1_000_000,
                workers=0,
            )
        )
        targets = Cache.open(str(out)).read(0).targets
        # The last row of a span is shorter in a plan that reads spans to their end, too.
        assert abs(built.positions - result.positions) < 0.02 * built.positions
        assert result.shards == built.spans == 1
        assert planned.shard_bytes > 0
        assert planned.corpus_bytes == pytest.approx(built.bytes, rel=0.06)
        want = {"sample:6": None, "topk:8": 8.0, "dense": 300.0}[codec]
        if want is None:
            counts = targets.codec.counts(targets.columns)
            want = sum(float(n.sum()) for n in counts.values()) / len(targets)
        assert planned.entries == pytest.approx(want, rel=0.03)


def test_hours_and_break_even_follow_from_the_seconds(planned: PlanResult) -> None:
    for cache in planned.caches:
        seconds = planned.corpus_positions * (planned.teacher_seconds + cache.encode_seconds)
        assert cache.hours["1"] == pytest.approx(seconds / 3600)
        assert cache.hours["64"] == pytest.approx(seconds / 3600 / 64)
        assert cache.break_even == break_even(
            planned.teacher_seconds, cache.encode_seconds, cache.read_seconds
        )
    assert break_even(1.0, 0.25, 0.5) == 1.25  # decoding hides behind the student's step
    assert break_even(1.0, 0.0, 1.5) == 2.0
    assert break_even(1.0, 0.0, 2.0) is None


def test_fidelity_tells_exact_from_drawn_from_cut(options: PlanOptions) -> None:
    codecs = ("dense", "topk:8", "sample:6", "anchored:6", "hidden:float16", "hidden:int8")
    caches = by_name(plan(dataclasses.replace(options, codec=codecs)))
    dense, topk, sample, anchored, half, byte = (
        {f.temperature: f for f in caches[(codec, (1.0, 2.0))].fidelity} for codec in codecs
    )
    for t in (1.0, 2.0):
        assert dense[t].noise < 1e-12
        assert dense[t].mass == pytest.approx(1)
        assert dense[t].angle < 0.1
        assert dense[t].norm_ratio == pytest.approx(1, abs=1e-3)
        assert half[t].noise < 1e-8
        assert half[t].noise < byte[t].noise < 1e-4
        assert byte[t].mass == pytest.approx(1)
        assert half[t].near_angle < byte[t].near_angle < 20
        assert topk[t].bias == topk[t].noise > 1e-6
        assert topk[t].missed == pytest.approx(1 - topk[t].mass, abs=5e-3)
        assert sample[t].bias == sample[t].missed == 0
        assert 0 < sample[t].noise < 1 / 6
        assert sample[t].norm_ratio > 1
        assert sample[t].near_angle > sample[t].angle  # the same noise in less gradient
        assert dense[t].near_angle < 0.5
        assert sample[t].near_noise == pytest.approx(sample[t].noise)
        assert anchored[t].near_noise < 0.5 * sample[t].near_noise
        assert anchored[t].near_angle < sample[t].near_angle
        assert anchored[t].noise < 1.02 * sample[t].noise  # a far student loses nothing
        assert anchored[t].mass == pytest.approx(sample[t].mass)
    assert topk[2.0].mass < topk[1.0].mass


def test_gradients_by_hand() -> None:
    codec = Codec.parse("topk:5", (2.0,), 40).in_floats()
    logits = 2 * torch.randn(7, 40, generator=torch.Generator().manual_seed(0))
    raw = {k: v.numpy() for k, v in codec.encode(logits).items()}
    targets = codec.at(codec.pack(raw), 2.0)
    full = FullGradient(logits, 2.0, torch.Generator().manual_seed(1))
    p, q = (logits / 2).softmax(-1), (full.student / 2).softmax(-1)
    torch.testing.assert_close(full.gradient, 2 * (q - p), rtol=1e-4, atol=1e-6)
    top = torch.zeros_like(p, dtype=torch.bool).scatter_(1, p.topk(5).indices, True)
    # Outside the top k the bucket only says how much there is in all.
    rest = (p * ~top).sum(-1, keepdim=True) / (q * ~top).sum(-1, keepdim=True)
    want = 2 * torch.where(top, q - p, q * (1 - rest))
    meter = FidelityMeter(drawn=False)
    near = FullGradient(logits, 2.0, torch.Generator().manual_seed(1), NEAR)
    meter.add(full, near, targets)
    got = meter.result()
    torch.testing.assert_close(full.towards(targets), want, rtol=1e-3, atol=1e-4)
    cosine = torch.nn.functional.cosine_similarity(want.flatten(), full.gradient.flatten(), 0)
    assert got.angle == pytest.approx(math.degrees(math.acos(float(cosine))), abs=0.05)
    cosine = torch.nn.functional.cosine_similarity(
        near.towards(targets).flatten(), near.gradient.flatten(), 0
    )
    assert got.near_angle == pytest.approx(math.degrees(math.acos(float(cosine))), abs=0.05)
    assert got.norm_ratio == pytest.approx(float(want.norm() / full.gradient.norm()), rel=1e-3)
    assert got.bias == pytest.approx(float((p * ~top).square().sum() / 7), rel=0.02)
    assert got.missed == pytest.approx(float((p * ~top).sum() / 7), rel=0.01)


@pytest.mark.parametrize("t", [0.3, 0.05, 0.001])
def test_gradients_that_vanish_have_their_angle_or_none(planned: PlanResult, t: float) -> None:
    """Squares of float32 vanish before the gradients do; where these have, there is no angle."""
    logits = torch.tensor([[9.0, -9.0, 0.0], [-8.0, 9.0, 1.0]])
    full, near = (
        FullGradient(logits, t, torch.Generator().manual_seed(1), student)
        for student in ((0.5, 0.1), (1.0, 0.1))
    )
    codec = Codec.parse("dense", (t,), 3)
    raw = {k: v.numpy() for k, v in codec.encode(logits).items()}
    meter = FidelityMeter(drawn=False)
    meter.add(full, near, codec.at(codec.pack(raw), t))
    got = meter.result()
    sure = [bool((one.gradient == 0).all()) for one in (full, near)]
    assert sure == {0.3: [False, False], 0.05: [False, True], 0.001: [True, True]}[t]
    assert [got.angle, got.near_angle] == [None if one else 0 for one in sure]
    if sure[0]:
        assert [got.mean_angle, got.norm_ratio] == [None, None]
    else:
        assert [got.mean_angle, got.norm_ratio] == pytest.approx([0, 1], abs=1e-4)
    json.loads(json.dumps(dataclasses.asdict(got), allow_nan=False))
    caches = tuple(dataclasses.replace(one, fidelity=(got,)) for one in planned.caches)
    out = io.StringIO()
    for details in (False, True):
        render_plan(dataclasses.replace(planned, caches=caches), Console(file=out), details=details)
    assert "nan°" not in out.getvalue()
    assert sum(line.split()[-1:] == ["-"] for line in out.getvalue().splitlines()) >= sure[1]
    assert advice(caches, 1000).startswith("Take ")


@pytest.mark.parametrize(("centre", "spread", "keeps"), [(0.5, 0.2, True), (2000.0, 3.0, False)])
def test_scores_are_rounded_by_a_share_of_their_spread(
    centre: float, spread: float, keeps: bool, planned: PlanResult
) -> None:
    """Years do not fit float16, however near they are to it by their size."""
    generator = torch.Generator().manual_seed(0)
    scores = centre + spread * torch.randn(600, 1, generator=generator)
    a_cache = by_name(planned)["dense", (1.0,)]
    caches = []
    for name, size in (("dense", 4.0), ("dense:float16", 2.0)):
        codec, meter = Codec.parse(name, (1.0,), 1), FidelityMeter(drawn=False)
        for some in scores.split([1, 200, 399]):
            packed = codec.pack({k: v.numpy() for k, v in codec.encode(some).items()})
            student = FullGradient(some, 1.0, generator, answers="score")
            meter.add(student, student, codec.at(packed, 1.0))
        found = meter.result()
        stored = scores.half().float() if name != "dense" else scores
        want = float((stored - scores).double().abs().mean() / scores.double().std(correction=0))
        assert found.missed == pytest.approx(want, abs=1e-9)
        caches.append(
            dataclasses.replace(a_cache, codec=name, bytes_per_position=size, fidelity=(found,))
        )
    assert recommended(caches, 1000)[0][0].codec == ("dense:float16" if keeps else "dense")


def test_noise_averages_out_of_the_mean_gradient() -> None:
    codec = Codec.parse("sample:10", (1.0,), 200)
    logits = 2 * torch.randn(1, 200, generator=torch.Generator().manual_seed(0))
    few, many = (_sampled(codec, logits, n) for n in (10, 4000))
    assert many.angle > 5
    assert many.mean_angle < 0.25 * few.mean_angle < few.angle


def _sampled(codec: Codec, logits: torch.Tensor, n: int) -> Fidelity:
    u = torch.from_numpy(position_uniform(0, 0, np.arange(n), 0))
    same = logits.expand(n, -1)
    packed = codec.pack({k: v.numpy() for k, v in codec.encode(same, u).items()})
    full = FullGradient(same, 1.0, torch.Generator().manual_seed(0))
    meter = FidelityMeter(drawn=True)
    meter.add(full, full, codec.at(packed, 1.0))
    return meter.result()


def test_the_size_of_a_corpus_is_estimated_from_a_sample(
    tokenizer: Any, corpus_texts: list[str], tmp_path: Path
) -> None:
    lines = "".join(
        json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(corpus_texts)
    )
    (tmp_path / "plain.jsonl").write_text(lines)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "plain.txt").write_text(
        "".join(" ".join(text.split()) + "\n" for text in corpus_texts)
    )
    spec = RowSpec("causal-lm", max_length=32)
    whole = sum(len(ids) + 1 for ids in tokenizer(corpus_texts)["input_ids"])
    for name, most in (("plain.jsonl", 0.15), ("plain.txt", 0.15), ("packed.jsonl.gz", 0.5)):
        corpus = Corpus.open([str(tmp_path / name)], span_bytes=8192)
        sample = sample_rows(corpus, spec, tokenizer, 40)
        assert len(sample.rows) == len(sample.origins) == 40
        assert sample.corpus_positions == pytest.approx(whole, rel=most)
    limited = Corpus.open([str(tmp_path / "plain.jsonl")], span_bytes=8192, limit=100)
    sample = sample_rows(limited, spec, tokenizer, 40)
    first = sum(len(ids) + 1 for ids in tokenizer(corpus_texts[:100])["input_ids"])
    assert sample.corpus_positions == pytest.approx(first, rel=0.3)


def test_long_and_short_records_in_turn_are_estimated_by_their_own_lengths(
    tokenizer: Any, corpus_texts: list[str], tmp_path: Path
) -> None:
    """Every other record is short, and an even stride takes records of one kind alone."""
    long = " ".join(corpus_texts[:20])
    texts = [text for i in range(120) for text in (long[i : i + 2000], corpus_texts[i % 50][:20])]
    path = tmp_path / "turns.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    whole = sum(len(ids) + 1 for ids in tokenizer(texts)["input_ids"])
    for offset in (0, 1):
        lines = path.read_text().splitlines(keepends=True)[offset:]
        (tmp_path / f"{offset}.jsonl").write_text("".join(lines))
        corpus = Corpus.open([str(tmp_path / f"{offset}.jsonl")], span_bytes=60_000)
        sample = sample_rows(corpus, RowSpec("causal-lm", max_length=32), tokenizer, 12)
        assert sample.corpus_positions == pytest.approx(whole, rel=0.15)


def test_rows_come_from_all_over_the_corpus(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i:05d}"}) + "\n" for i in range(5000)))
    corpus = Corpus.open([str(path)], span_bytes=2000)
    sample = sample_rows(corpus, RowSpec("causal-lm", packing="none", max_length=8), tokenizer, 10)
    first = [int(tokenizer.decode(row.input_ids)) for row in sample.rows]
    assert first == sorted(first)
    assert first[0] == 0
    assert first[-1] > 4000


def test_a_classifier_is_planned_too(tiny_classifier: Path, labelled_corpus: Path) -> None:
    result = plan(
        PlanOptions(
            teacher=(str(tiny_classifier),),
            corpus=(str(labelled_corpus),),
            task="sequence-classification",
            max_length=48,
            rows=30,
            temperatures=("2",),
        )
    )
    assert result.rows == result.positions == 30
    assert result.corpus_positions == pytest.approx(200, rel=0.25)
    assert [(c.codec, c.entries) for c in result.caches] == [("dense", 3.0), ("dense:float16", 3.0)]
    half = result.caches[1].fidelity[0]
    assert 0 < half.noise < 1e-6


def test_wrong_options_are_refused(options: PlanOptions, tmp_path: Path) -> None:
    for wrong, message in (
        ({"rows": 0}, "--rows is 0"),
        ({"temperatures": ("1;2",)}, "--temperatures are 1;2"),
        ({"temperatures": ("0",)}, "--temperatures are 0"),
        ({"plot": str(tmp_path / "none" / "x.png")}, "no folder"),
        ({"teacher": ()}, "--teacher is missing"),
    ):
        with pytest.raises(UsageError, match=message):
            dataclasses.replace(options, **wrong)


def test_samples_that_cannot_be_planned_with_are_refused(
    options: PlanOptions, tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n{"text": " "}\n')
    model = AutoModelForCausalLM.from_pretrained(tiny_lm)
    with torch.no_grad():
        model.lm_head.weight[3] = float("inf")
    shutil.copytree(tiny_lm, tmp_path / "broken")
    model.save_pretrained(tmp_path / "broken")
    for wrong, message in (
        ({"corpus": (str(empty),)}, "no row could be made"),
        ({"teacher": (str(tmp_path / "broken"),)}, r"NaN or infinite logits at \d+ of \d+ pos"),
        ({"codec": ("best",)}, "codec 'best' is not known"),
    ):
        with pytest.raises(UsageError, match=message):
            plan(dataclasses.replace(options, **wrong))
    monkeypatch.setattr("kdcache.commands.plan.plan._MOST_BYTES", 1_000_000)
    with pytest.raises(UsageError, match="fewer --rows, or leave this --codec out"):
        plan(options)


def test_the_command_prints_tables_json_and_a_plot(options: PlanOptions, tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    call = ["plan", "--teacher", options.teacher[0], "--corpus", options.corpus[0]]
    call += ["--rows", "8", "--max-length", "64", "--codec", "sample:6", "--codec", "topk:4"]
    call += ["--temperatures", "1", "--temperatures", "1,2", "--plot", str(picture)]
    done = CliRunner().invoke(cli, call)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("Take sample:6 at T = 1: ")
    assert "Cost" not in done.stdout
    for expected in ("sample:6", "topk:4", "1,2", "pays from", "missed", f"Plot: {picture}"):
        assert expected in done.stdout
    done = CliRunner().invoke(cli, [*call, "--all"])
    assert done.stdout.startswith("Take sample:6 at T = 1: ")
    for expected in ("Cost", "Fidelity", "sample:6", "1,2", "64 workers", "break-even", "missed"):
        assert expected in done.stdout
    assert "compress a little better" in " ".join(done.stdout.split())
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    done = CliRunner().invoke(cli, [*call, "--json"])
    values = json.loads(done.stdout)
    assert len(values["caches"]) == 4
    assert set(values["caches"][0]["hours"]) == {"1", "8", "64"}
    assert values["plot"] == str(picture)


def test_the_advice_is_the_cheapest_codec_that_is_good_enough(planned: PlanResult) -> None:
    a_cache = by_name(planned)["dense", (1.0,)]

    def cache(codec: str, size: float, t: float = 1.0, **figures: float) -> PlannedCache:
        one = dataclasses.replace(a_cache.fidelity[0], **{"norm_ratio": 1, "missed": 0, **figures})
        costs = {"corpus_bytes": 3_100_000_000_000, "hours": {"1": 410.0}, "break_even": 1.1}
        return dataclasses.replace(
            a_cache,
            codec=codec,
            bytes_per_position=size,
            temperatures=(t,),
            fidelity=(one,),
            **costs,
        )

    grid = [
        cache("sample:40", 30),
        cache("sample:20", 18.26),
        cache("sample:10", 11),
        cache("anchored:20", 22),
        cache("anchored:10", 13.4),
        cache("topk:16", 40, missed=0.2),
        cache("topk:64", 139, missed=0.05),
        cache("dense", 4000),
        cache("dense:float16", 2000),
        cache("sample:5", 1, t=2.0),
    ]
    want = (
        "Take sample:20 at T = 1: 18.3 B per position, 3.1 TB and 410 CUDA-hours of one worker for "
        "this corpus, which pays from 2 students on; it is for students with random weights or "
        "far from the teacher. Otherwise anchored:10 (13.4 B) for students that begin near it, "
        "pruned or quantised: within a KL of 0.25 nats; topk:64 (139.0 B) for reverse KL, "
        "Jensen-Shannon and evaluation; dense:float16 (2,000.0 B) for any temperature and "
        "divergence."
    )
    assert advice(grid, SMALL, "cuda") == advice(grid[::-1][1:], SMALL, "cuda") == want
    assert "Take sample:10" in advice(grid[2:], SMALL)  # none is good enough: the nearest
    hot = [cache("sample:20", 40, t=2.0), cache("hidden:int8", 600, t=2.0)]
    assert "Take hidden:int8" in advice(hot, SMALL)
    never = dataclasses.replace(grid[0], break_even=None, hours={"1": 0.5})
    assert "30 min 0 s of one worker for this corpus, but it costs more" in advice([never], SMALL)


def test_readme_and_faq_recommend_what_a_plan_does(planned: PlanResult) -> None:
    a_cache = by_name(planned)["dense", (1.0,)]
    plans = TASKS["causal-lm"].plans
    grid = [dataclasses.replace(a_cache, codec=codec) for codec in plans]
    large, small = ([c.codec for c, _ in recommended(grid, n)] for n in (SMALL, SMALL - 1))
    root = Path(__file__).parent.parent
    faq, readme = ((root / name).read_text() for name in ("docs/faq.md", "README.md"))
    assert f"| {SMALL // 10**6} million and more | `{large[0]}` | `{large[1]}` |" in faq
    assert f"| fewer | `{small[0]}` | `{small[1]}` |" in faq
    assert f"`{large[2]}` for evaluation" in faq
    (rule,) = (line for line in readme.split("\n\n") if line.startswith("**Which codec?**"))
    assert set(re.findall(r"`((?:sample|anchored):\d+)`", rule)) == {*large[:2], *small[:2]}
    block = readme.split("<!-- run: language-model -->")[1].split("```")[1]
    assert f"--codec {large[0]}" in block
    assert f"--codec {large[2]}" in block
    assert TASKS["causal-lm"].codec == large[0]
    kl = re.findall(r"KL of ([\d.]+)", recommended(grid, SMALL)[1][1])
    assert all(f"KL of {kl[0]} nats" in " ".join(text.split()) for text in (rule, faq))


def test_a_cache_that_never_pays_is_said_to(planned: PlanResult) -> None:
    never = dataclasses.replace(planned.caches[0], break_even=None)
    result = dataclasses.replace(planned, caches=(never,), clipped_mass=0.25)
    out = io.StringIO()
    render_plan(result, Console(file=out))
    assert "never" in out.getvalue()
    assert "25.0000 % of its probability to ids outside" in out.getvalue()


def test_a_narrow_terminal_folds_headings_and_no_cell(
    options: PlanOptions, planned: PlanResult
) -> None:
    for width in range(80, 125, 4):
        out = io.StringIO()
        console = Console(file=out, width=width, force_terminal=True, color_system=None)
        render_plan(planned, console, details=True)
        lines = [line.split() for line in out.getvalue().splitlines()]
        for codec in options.codecs:
            assert sum(words[:1] == [codec] for words in lines) == 2 + 3  # costs, fidelities


def test_figures_do_not_depend_on_the_size_of_batches(
    options: PlanOptions, planned: PlanResult
) -> None:
    large, small = planned, plan(dataclasses.replace(options, batch_tokens=70))
    assert large.positions == small.positions
    for one, two in zip(large.caches, small.caches, strict=True):
        assert one.entries == pytest.approx(two.entries, rel=1e-3)
        assert one.bytes_per_position == pytest.approx(two.bytes_per_position, rel=0.01)
        for a, b in zip(one.fidelity, two.fidelity, strict=True):
            assert a.noise == pytest.approx(b.noise, rel=0.02, abs=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_plan_takes_the_batch_that_fits_the_gpu(
    options: PlanOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[object] = []

    def share(run: Callable[[], object], _gpus: object) -> float | None:
        tried.append(run())
        return 0.5 if len(tried) == 8 else None

    monkeypatch.setattr("kdcache.commands.plan.plan.peak_share", share)
    assert plan(options).rows == options.rows
    assert len(tried) == 8  # 65,536 tokens down to 512, and rows of 64 would end it


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_the_estimate_is_of_what_filters_keep(tokenizer: Any, tmp_path: Path, name: str) -> None:
    records = [
        {"text": f"word {i} " * 20, "lang": "en" if i % 4 == 0 else "de"} for i in range(2000)
    ]
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=100)
    else:
        lines = "".join(json.dumps(record) + "\n" for record in records).encode()
        path.write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    spec = RowSpec("causal-lm", max_length=64)
    found = {}
    for filters, limit in (((), None), (("lang=en",), None), ((), 1000), (("lang=en",), 1000)):
        corpus = Corpus.open([str(path)], span_bytes=1 << 14, filters=filters, limit=limit)
        found[filters, limit] = sample_rows(corpus, spec, tokenizer, 40).corpus_positions
    for limit in (None, 1000):
        assert found[("lang=en",), limit] == pytest.approx(found[(), limit] / 4, rel=0.1)
