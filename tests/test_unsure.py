"""`build --positions`: targets where the teacher is unsure, hard labels elsewhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_tiny_lm
from hypothesis import given
from hypothesis import strategies as st
from small_runs import USUAL, metrics
from test_docs import _block
from test_positions import entropy, in_float64, student_of
from transformers import AutoModelForCausalLM

from kdcache.cache import Cache, CacheSpec
from kdcache.cache.check import problems
from kdcache.cache.shard import column_bytes
from kdcache.cache.unsure import code_of_share
from kdcache.commands.build.build import build, dry_run
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.evaluate.evaluate import evaluate
from kdcache.commands.export import export
from kdcache.commands.inspect import inspect
from kdcache.commands.options import (
    EvaluateOptions,
    ExportOptions,
    InspectOptions,
    TranscodeOptions,
    VerifyOptions,
)
from kdcache.commands.report.gather import _surprise
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.commands.transcode import transcode
from kdcache.commands.verify import verify
from kdcache.errors import CorruptCacheError, UsageError
from kdcache.loss import distillation_loss
from kdcache.stream import TargetStream
from kdcache.stream.lookup import TargetLookup
from kdcache.student import DistilledStudent
from kdcache.student.figures import Totals, mean_parts
from kdcache.targets.label_logprob import decode_logprobs
from kdcache.tasks import IGNORE


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unsure")


@pytest.fixture(scope="module")
def builds(home: Path, tiny_lm: Path, text_corpus: Path) -> dict[str, BuildOptions]:
    """The same cache with all targets, with those of three positions in ten, and a dense one."""
    common: dict[str, Any] = {
        "teacher": (str(tiny_lm),), "corpus": (str(text_corpus),), "max_length": 48, "limit": 60,
        "workers": 0, "codec": "sample:20", "shard_tokens": 1200,
    }  # fmt: skip
    found = {
        name: BuildOptions(out=str(home / name), **common | more)
        for name, more in {
            "whole": {},
            "some": {"positions": 0.3},
            "dense": {"positions": 0.3, "codec": "dense", "temperatures": (1.0, 2.0)},
        }.items()
    }
    for options in found.values():
        build(options)
    return found


def shards(options: BuildOptions) -> list[Any]:
    cache = Cache.open(options.out)
    return [cache.read(span) for span in range(cache.spec.spans)]


@given(
    codes=st.lists(st.integers(0, 255), min_size=1, max_size=60),
    share=st.floats(0.01, 1.0),
)
def test_the_nearest_share_is_taken(codes: list[int], share: float) -> None:
    least = code_of_share(np.array(codes, np.uint8), share)
    gaps = [abs(np.mean(np.array(codes) >= code) - share) for code in range(256)]
    assert gaps[least] == pytest.approx(min(gaps))
    assert code_of_share(np.array(codes, np.uint8), 1.0) == 0  # all, of later text too


def test_what_is_kept_is_what_a_whole_cache_has(builds: dict[str, BuildOptions]) -> None:
    """Targets, labels and their log-probabilities, position by position; and the sums over them."""
    whole, some = (Cache.open(builds[name].out) for name in ("whole", "some"))
    assert some.spec.positions is not None
    least = some.spec.positions["entropy_code"]
    reader: dict[str, Any] = {}
    exec(_block("docs/format.md", "decode"), reader)
    for entry, span in zip(some.manifest.shards, shards(builds["some"]), strict=True):
        found = np.concatenate(reader["hard_labels"](some.url, entry.name))
        assert np.array_equal(found, span.hard_labels)
        ids = [row[1] for row in reader["rows"](some.url, entry.name)]
        assert np.array_equal(np.concatenate(ids), span.labels)
        assert len(list(reader["targets"](some.url, entry.name, 1.0))) == len(span.targets)
    kept = total = 0
    for mine, theirs in zip(shards(builds["some"]), shards(builds["whole"]), strict=True):
        assert theirs.hard_labels is None
        unsure = theirs.entropy >= least
        at = np.flatnonzero(theirs.labels != IGNORE)
        assert np.array_equal(np.flatnonzero(mine.labels != IGNORE), at[unsure])
        assert np.array_equal(np.flatnonzero(mine.hard_labels != IGNORE), at[~unsure])
        assert np.array_equal(mine.every_label, theirs.labels)
        assert np.array_equal(mine.every_logprob, theirs.label_logprob)
        assert np.array_equal(mine.entropy, theirs.entropy[unsure])
        one, other = mine.targets.at(1.0), theirs.targets.take(np.flatnonzero(unsure)).at(1.0)
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.weights, other.weights)
        kept, total = kept + unsure.sum(), total + len(unsure)
    assert 0.2 < kept / total < 0.4
    assert some.manifest.positions == kept
    for mine, theirs in zip(some.manifest.shards, whole.manifest.shards, strict=True):
        assert mine.hard_labels == theirs.positions - mine.positions
        assert mine.label_nats == theirs.label_nats
        assert theirs.hard_labels is None
    assert "hard_labels" not in Path(whole.url, "manifest.json").read_text()
    assert list(problems(some)) == []
    sizes = []
    for cache in (some, whole):
        with cache.hold(cache.manifest.shards[0]) as path:
            sizes.append(sum(n for c, n in column_bytes(path).items() if c.startswith("targets/")))
    assert sizes[0] / sizes[1] < 1.15 * kept / total + 0.02


def test_a_build_knows_its_code_again(builds: dict[str, BuildOptions]) -> None:
    """A finished one makes nothing, a shard that is lost is made with the same code, and another
    share is another cache."""
    options = builds["some"]
    said: list[str] = []
    assert build(options, report=said.append).made == 0
    cache = Cache.open(options.out)
    lost = cache.manifest.shards[1]
    path = Path(options.out, "shards", lost.name)
    content = path.read_bytes()
    path.unlink()
    assert build(options, report=said.append).made == 1
    assert path.read_bytes() == content
    assert not any("measure its entropy" in line for line in said)
    with pytest.raises(UsageError, match="positions.share: 0.3 -> 0.5"):
        build(dataclasses.replace(options, positions=0.5))
    with pytest.raises(UsageError, match="positions.share: 0.3 -> "):
        build(dataclasses.replace(options, positions=None))
    there = dry_run(options)
    assert (there.state, there.done, there.fingerprint) == ("this build", cache.spec.spans, None)
    assert there.bytes < dry_run(builds["whole"]).bytes
    facts = dict(inspect(InspectOptions(options.out)).facts())
    assert "no soft target" in facts["labels of a sure teacher"]
    whole = dict(inspect(InspectOptions(builds["whole"].out)).facts())
    assert "labels of a sure teacher" not in whole
    name = "teacher's cross-entropy"
    assert facts[name] == whole[name]


@pytest.mark.parametrize("codec", ["sample:20", "topk:8", "anchored:4"])
def test_a_transcoded_cache_keeps_the_same(
    codec: str, builds: dict[str, BuildOptions], tmp_path: Path
) -> None:
    transcode(
        TranscodeOptions(
            cache=builds["dense"].out, out=str(tmp_path / "new"), codec=codec, workers=0
        )
    )
    new = Cache.open(str(tmp_path / "new"))
    assert new.spec.positions == Cache.open(builds["dense"].out).spec.positions
    assert list(problems(new)) == []
    old = shards(builds["dense"])
    for span, theirs in enumerate(old):
        mine = new.read(span)
        assert np.array_equal(mine.hard_labels, theirs.hard_labels)
        assert np.array_equal(mine.labels, theirs.labels)


def test_loss_and_gradients_are_of_targets_and_hard_labels(
    builds: dict[str, BuildOptions], tiny_lm: Path
) -> None:
    """In float64: the loss at what has a target, cross-entropy elsewhere, divided by both."""
    student = student_of(tiny_lm)
    stream = TargetStream(builds["dense"].out, batch_size=6, shuffle=False, temperature=2.0)
    batch = in_float64(next(iter(stream)))
    labels, hard = batch["labels"].reshape(-1), batch["hard_labels"].reshape(-1)
    soft_at, hard_at = (x.ne(IGNORE).nonzero()[:, 0] for x in (labels, hard))
    assert float(batch["count"]) == len(soft_at) + len(hard_at)
    logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits = logits.flatten(0, 1)[:, :300]
    soft = distillation_loss(
        logits[soft_at], labels[soft_at], batch["targets"], alpha=0.3, count=1.0
    )
    alone = torch.nn.functional.cross_entropy(logits[hard_at], hard[hard_at], reduction="sum")
    want = (soft.total + alone) / (len(soft_at) + len(hard_at))
    gradients = torch.autograd.grad(want, list(student.parameters()))
    model = DistilledStudent(student, "causal-lm", alpha=0.3, vocab_size=300).train()
    found = model(**batch)
    torch.testing.assert_close(found.loss, want, rtol=1e-9, atol=1e-9)
    made = torch.autograd.grad(found.loss, list(student.parameters()))
    for one, other in zip(made, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    # Hard labels alone: all of them, each with the teacher's log-probability.
    whole = TargetStream(builds["whole"].out, batch_size=6, shuffle=False, temperature=None)
    bare = TargetStream(builds["dense"].out, batch_size=6, shuffle=False, temperature=None)
    one, other = (next(iter(stream)) for stream in (bare, whole))
    assert one["labels"].tolist() == other["labels"].tolist()
    assert torch.equal(one["label_logprob"], other["label_logprob"])
    assert one["count"] == other["count"] == batch["count"]
    assert "hard_labels" not in one
    # Whoever counts `labels` alone, as the Trainer of transformers does, would divide by too few.
    with pytest.raises(UsageError, match="num_items_in_batch"):
        model(**batch, num_items_in_batch=len(soft_at))
    with pytest.raises(UsageError, match="an evaluation needs those of all"):
        Totals(Totals.zeros(1, torch.device("cpu"))[0]).add(stream, batch, found, 1.0)


@pytest.mark.parametrize("layout", ["kdcache", "axolotl"])
def test_an_export_keeps_the_labels_without_a_target(
    layout: Any, builds: dict[str, BuildOptions], tmp_path: Path
) -> None:
    options = ExportOptions((builds["dense"].out,), str(tmp_path), layout=layout, top=4)
    assert export(options).rows == Cache.open(builds["dense"].out).manifest.rows
    rows = [
        row
        for file in sorted(tmp_path.glob("*.parquet"))
        for row in pq.read_table(file).to_pylist()
    ]
    for data in shards(builds["dense"]):
        logprobs = iter(decode_logprobs(data.every_logprob).tolist())
        for begin, end in zip(data.offsets[:-1], data.offsets[1:], strict=True):
            row, labels = rows.pop(0), data.every_label[begin:end]
            kept = data.labels[begin:end] != IGNORE
            if layout == "kdcache":
                assert row["labels"] == labels.tolist()
                assert [bool(ids) for ids in row["target_ids"]] == kept.tolist()
                for label, logprob in zip(labels, row["teacher_logprob"], strict=True):
                    assert logprob == (None if label == IGNORE else next(logprobs))
            else:
                stop = int(np.flatnonzero(labels != IGNORE)[-1]) + 1
                assert row["labels"][1 : stop + 1] == labels[:stop].tolist()
                found = [len(ids) for ids in row["target_token_ids"][1 : stop + 1]]
                assert found == (4 * kept[:stop]).tolist()
    assert not rows


def test_rows_without_a_target_count(
    tiny_tokenizer: Path, text_corpus: Path, tmp_path: Path
) -> None:
    """Where most rows have none: of a teacher with more ids than its tokenizer, all figures."""
    teacher = make_tiny_lm(tiny_tokenizer, tmp_path / "wide", vocab_size=400)
    options = BuildOptions(
        teacher=(str(teacher),), corpus=(str(text_corpus),), out=str(tmp_path / "few"), workers=0,
        max_length=24, limit=30, packing="none", codec="dense", positions=0.01,
    )  # fmt: skip
    result = build(options)
    (data,) = shards(options)
    kept = np.diff(data.position_offsets)
    assert 0 < (kept > 0).sum() < len(kept) / 2
    model = AutoModelForCausalLM.from_pretrained(teacher)
    outside = []
    for i in range(len(data)):
        with torch.no_grad():
            logits = model(torch.from_numpy(data.row(i).input_ids)[None].long()).logits[0]
        begin, end = data.offsets[i : i + 2]
        there = torch.from_numpy(data.every_label[begin:end] != IGNORE)
        outside += logits.double().softmax(-1)[there, 300:].sum(-1).tolist()
    assert result.clipped_mass == pytest.approx(np.mean(outside), rel=1e-3)
    facts = inspect(InspectOptions(options.out, row=int(kept.argmin())))
    assert facts.clipped_mass == pytest.approx(result.clipped_mass)
    assert facts.row is not None
    assert facts.row.positions == ()
    assert "with a soft target" in dict(facts.facts())["teacher's entropy"]
    checked = verify(VerifyOptions(options.out, teacher=options.teacher, sample=1000))
    assert checked.problems == ()
    assert checked.recheck is not None
    assert checked.recheck.rows == (kept > 0).sum()
    assert checked.recheck.worst <= checked.recheck.worst_allowed
    nats = _surprise(Cache.open(options.out), data, np.arange(len(outside)))
    want = -decode_logprobs(data.every_logprob).astype(float).mean()
    assert np.mean(nats) > 0
    assert len(nats) == len(outside)
    assert np.mean(nats) == pytest.approx(want)


def test_a_step_without_a_target_has_no_soft_loss() -> None:
    sums = torch.tensor([2.0, 0.0, 1.0, 0.0, 1.0])
    assert mean_parts(sums, 1, "soft_loss", True) == {"hard_loss": 2.0}
    sums = torch.tensor([2.0, 3.0, 2.0, 1.5, 0.5])
    found = {"hard_loss": 1.0, "soft_loss": 2.0, "kl": 1.0}
    assert mean_parts(sums, 2, "soft_loss", True) == found


@pytest.mark.slow
def test_a_run_logs_means_over_what_they_are_of(
    builds: dict[str, BuildOptions], tiny_lm: Path, tmp_path: Path
) -> None:
    """The first step's parts are those of the student as it begins, whatever slices there are."""
    lines = []
    for slices in (1, 3):
        out = tmp_path / f"run{slices}"
        options: dict[str, Any] = {
            **USUAL, "cache": builds["some"].out, "student": str(tiny_lm), "out": str(out),
            "max_steps": 2, "gradient_accumulation": slices, "alpha": 0.3,
        }  # fmt: skip
        train(TrainOptions(**options))
        lines.append(metrics(out)[0])
    # The student is the teacher, so its losses are the teacher's own figures, of these rows.
    stream = TargetStream(builds["some"].out, batch_size=8, seed=0)
    batch = next(iter(stream))
    mean = float(batch["teacher_entropy"].mean())
    for line in lines:
        assert line["kl"] == pytest.approx(line["soft_cross_entropy"] - mean, abs=2e-3)
        assert abs(line["kl"]) < 0.3 * mean
        assert line["loss"] == pytest.approx(lines[0]["loss"], rel=1e-5)
        assert line["hard_loss"] == pytest.approx(lines[0]["hard_loss"], rel=1e-5)
        soft = lines[0]["soft_cross_entropy"]
        assert line["soft_cross_entropy"] == pytest.approx(soft, rel=1e-5)


def test_a_spec_that_cannot_be_is_refused(builds: dict[str, BuildOptions]) -> None:
    values = Cache.open(builds["some"].out).spec.to_dict()
    assert CacheSpec.from_dict(values).to_dict() == values
    for wrong in ({"task": "masked-lm"}, {"entropy": None}, {"positions": {"share": 0.3}}):
        with pytest.raises(CorruptCacheError, match="positions is|unknown fields|entropy"):
            CacheSpec.from_dict({**values, **wrong})


def test_what_needs_all_targets_is_refused_in_a_line(
    builds: dict[str, BuildOptions], tiny_lm: Path, tmp_path: Path
) -> None:
    some, whole = builds["some"].out, builds["whole"].out

    def options(**changes: Any) -> TrainOptions:
        given = {"cache": whole, "student": str(tiny_lm), "out": str(tmp_path / "run")}
        return TrainOptions(**given | changes)

    for wrong in (
        options(eval_cache=some),
        options(cache=some, divergence="policy-gradient", importance_clip=0.0),
        options(cache=some, cross_tokenizer="likelihood", student_tokenizer=str(tiny_lm)),
        options(cache=some, positions="teacher-entropy:0.5", alpha=1.0),
    ):
        with pytest.raises(UsageError, match="soft targets of some positions alone"):
            train(wrong)
    with pytest.raises(UsageError, match="an evaluation needs those of all"):
        evaluate(EvaluateOptions(student=(str(tiny_lm),), cache=some))
    with pytest.raises(UsageError, match="content needs those of all"):
        TargetLookup(some)
    with pytest.raises(UsageError, match="--positions is for causal"):
        build(dataclasses.replace(builds["some"], task="masked-lm", out=str(tmp_path / "c")))


def test_the_choice_is_by_the_stored_entropy(
    builds: dict[str, BuildOptions], tiny_lm: Path
) -> None:
    """Against the teacher's own logits: what is far above the code's entropy has a target."""
    spec = Cache.open(builds["dense"].out).spec
    assert spec.positions is not None
    code = spec.positions["entropy_code"]
    for data in shards(builds["dense"]):
        found = entropy(data.targets.at(1.0).logits)
        assert (found >= (code - 1.01) ** 2 / 4096).all()
        assert (decode_logprobs(data.hard_logprob) <= 0).all()
