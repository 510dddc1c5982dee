"""Every task through every command, against the models themselves: one row at a time, without
batches and padding, by plain autograd.

`task_examples` has what is particular to a task; other files test what only one of them has.
"""

from __future__ import annotations

import dataclasses
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from task_examples import (
    EXAMPLES,
    LOSSES,
    NAMES,
    TAGS,
    Desk,
    built,
    known,
    make_desk,
    rows_of,
    targets_of,
)
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

import kdcache
from kdcache.cli.main import cli
from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.commands.options import (
    EvaluateOptions,
    ExportOptions,
    InspectOptions,
    PredictOptions,
    TranscodeOptions,
    VerifyOptions,
)
from kdcache.commands.train.options import TrainOptions
from kdcache.errors import UsageError
from kdcache.loss.metrics import Entities, micro_f1, pearson
from kdcache.rows import Row
from kdcache.student.figures import figure_of
from kdcache.targets import DenseTargets
from kdcache.tasks import IGNORE, TASKS, UNLABELLED, labelled

pytestmark = pytest.mark.slow

ALPHA = 0.3


class Stop(Exception):  # noqa: N818 - not an error
    """Ends a training."""


@pytest.fixture(scope="module", params=TASKS)
def desk(
    request: pytest.FixtureRequest,
    corpus_texts: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Desk:
    return make_desk(request.param, corpus_texts, tmp_path_factory.mktemp(request.param))


def test_each_task_has_an_example() -> None:
    assert tuple(EXAMPLES) == tuple(TASKS)


def run(*words: str) -> str:
    """What a command prints that succeeds."""
    done = CliRunner().invoke(cli, list(words))
    assert done.exit_code == 0, done.output
    return done.output


# The cache


def truth(desk: Desk, tokenizer: Any, record: dict[str, Any]) -> list[Any]:
    """The labels of a record's positions, as the usual script for the task has them."""
    if desk.task == "regression":
        return [np.nan if record["score"] is None else np.float32(record["score"])]
    if desk.task == "multi-label-classification":
        names = record["labels"]
        return [[IGNORE if names is None else int(name in names) for name in NAMES]]
    if desk.task == "sequence-classification":
        return [IGNORE if record["label"] is None else NAMES.index(record["label"])]
    if desk.task == "token-classification":
        tags = record["tags"] or [None] * len(record["tokens"])
        return [UNLABELLED if tag is None else TAGS.index(tag) for tag in tags]
    return list(tokenizer(record["target"] if desk.kind.source else record["text"])["input_ids"])


def test_a_cache_holds_the_teachers_own_answers_and_the_labels(desk: Desk) -> None:
    cache = desk.cache()
    assert cache.spec.spans > 2
    rows = rows_of(cache)
    torch.testing.assert_close(
        targets_of(cache).double(), desk.answers(desk / "teacher", rows), rtol=1e-5, atol=1e-4
    )
    tokenizer = AutoTokenizer.from_pretrained(desk / "teacher")
    records = desk.records()
    assert cache.manifest.rows == len(rows) == len(records)
    for row, record in zip(rows, records, strict=True):
        want, there = truth(desk, tokenizer, record), row.positions(desk.task)
        if desk.task == "causal-lm":
            assert [*row.input_ids[:1], *row.labels[there]] in (
                want,
                [*want, tokenizer.eos_token_id],
            )
        elif desk.task == "masked-lm":
            read = np.where(row.labels == IGNORE, row.input_ids, row.labels)
            assert read.tolist() == want
            assert len(there)
        else:
            np.testing.assert_array_equal(row.labels[there], want)
    assert cache.spec.label_names == ({3: NAMES, 5: TAGS}.get(cache.spec.vocab_size))


def test_cached_targets_are_found_to_be_the_teachers_and_no_others(desk: Desk) -> None:
    cache = desk.cache(codec=desk.kind.codec)
    good = kdcache.verify(VerifyOptions(cache.url, teacher=(desk / "teacher",)))
    assert good.problems == ()
    assert good.recheck is not None
    assert good.recheck.problems == ()
    bad = kdcache.verify(VerifyOptions(cache.url, teacher=(desk / "other",)))
    assert bad.recheck is not None
    assert "not those of this teacher" in bad.recheck.problems[0]


def test_parts_in_any_order_and_a_build_that_goes_on_give_the_bytes_of_a_whole_one(
    desk: Desk, tmp_path: Path
) -> None:
    whole = desk.cache(codec=desk.kind.codec)
    given = {"codec": desk.kind.codec}
    for part in ("2/3", "3/3"):
        kdcache.build(desk.options(tmp_path / "parts", part=part, **given))
    parts = built(desk.options(tmp_path / "parts", **given))
    assert (parts.spec.fingerprint, parts.digest) == (whole.spec.fingerprint, whole.digest)
    with pytest.raises(UsageError, match="seed: 0 -> 1"):
        kdcache.build(desk.options(tmp_path / "parts", seed=1, **given))


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_two_workers_make_the_bytes_of_one(desk: Desk, ray: None, tmp_path: Path) -> None:
    given = {"codec": desk.kind.codec}
    two = built(desk.options(tmp_path / "two", workers=2, **given))
    assert two.digest == desk.cache(**given).digest


def test_what_is_transcoded_is_what_a_build_makes(desk: Desk, tmp_path: Path) -> None:
    codecs = ("sample:5", "anchored:5", "topk:8") if desk.kind.over_ids else ("dense:float16",)
    for codec in codecs:
        direct = desk.cache(codec=codec)
        out = str(tmp_path / codec)
        kdcache.transcode(TranscodeOptions(desk.cache().url, codec=codec, out=out, workers=0))
        copy = kdcache.Cache.open(out)
        for span in range(direct.spec.spans):
            a, b = direct.read(span), copy.read(span)
            for name in dataclasses.asdict(a).keys() - {"targets", "words"}:
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
            assert a.words == b.words
            for name, column in a.targets.columns.items():
                np.testing.assert_array_equal(column, b.targets.columns[name], err_msg=name)
    if not desk.kind.over_ids:
        return
    hidden = desk.cache(codec="hidden:float16")
    p, q = (targets_of(cache).softmax(-1) for cache in (desk.cache(), hidden))
    torch.testing.assert_close(p, q, rtol=0, atol=5e-3)


@pytest.mark.parametrize("ensemble", ["mean-probs", "mean-logits"])
def test_an_ensemble_is_the_mean_of_its_members(desk: Desk, ensemble: Any, tmp_path: Path) -> None:
    teachers, t = (desk / "teacher", desk / "other"), desk.temperature
    more = {"teacher_weight": (3.0, 1.0), "ensemble": ensemble, "temperatures": (t,)}
    cache = built(desk.options(tmp_path / "both", teacher=teachers, **more))
    one, two = (desk.answers(teacher, rows_of(cache)) / t for teacher in teachers)
    got = targets_of(cache, t).double() / t
    squash = torch.sigmoid if desk.kind.answers == "labels" else partial(torch.softmax, dim=-1)
    if ensemble == "mean-probs" and desk.kind.has_temperature:
        got, one, two = squash(got), squash(one), squash(two)
    elif desk.kind.distribution:
        got, one, two = (z.log_softmax(-1) for z in (got, one, two))
        want = (0.75 * one + 0.25 * two).log_softmax(-1)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert len(targets_of(cache, 0.7)) == len(got), "logits are right at any temperature"
        return
    torch.testing.assert_close(got, 0.75 * one + 0.25 * two, rtol=1e-4, atol=1e-4)


def names_of(desk: Desk, row: Row) -> list[str | None]:
    """What the labels of a row are called."""
    if desk.kind.answers == "labels":
        chosen = [name for name, y in zip(NAMES, row.labels[0], strict=True) if y == 1]
        return [", ".join(chosen) or "none"]
    names = TAGS if desk.kind.words else NAMES
    return [names[y] if y >= 0 else None for y in row.labels[row.positions(desk.task)]]


def test_rows_are_shown_exported_reported_and_planned(desk: Desk, tmp_path: Path) -> None:
    cache = desk.cache()
    row, label = rows_of(cache)[0], desk.labels(rows_of(cache)[:1])
    assert run("inspect", cache.url, "--row", "0")
    view = kdcache.inspect(InspectOptions(cache.url, row=0)).row
    assert view is not None
    assert len(view.positions) == len(row.positions(desk.task))
    if desk.kind.named:
        number = next(
            i for i, one in enumerate(rows_of(cache)) if labelled(one.labels, desk.task).any()
        )
        seen = kdcache.inspect(InspectOptions(cache.url, row=number)).row
        assert seen is not None
        found = [position.label_text for position in seen.positions]
        assert found == names_of(desk, rows_of(cache)[number])
    run("report", cache.url, "--out", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert (desk.kind.perplexity or "") in page
    words = ["--teacher", desk / "teacher", "--corpus", desk / "corpus.jsonl", "--task", desk.task]
    run("plan", *words, "--max-length", "48", "--rows", "8")
    run("build", *words, "--dry-run", "--out", str(tmp_path / "no"))
    assert not (tmp_path / "no").exists()
    kdcache.export(ExportOptions(cache.url, str(tmp_path / "table")))
    table = pq.read_table(tmp_path / "table").to_pylist()  # type: ignore[no-untyped-call]
    assert len(table) == cache.manifest.rows
    assert table[0]["input_ids"] == row.input_ids.tolist()
    first = targets_of(cache)[: len(row.positions(desk.task))].double()
    if desk.task == "regression":
        assert table[0]["target_score"] == pytest.approx(float(first[0, 0]))
        assert table[0]["label"] == pytest.approx(float(label[0]), nan_ok=True)
    elif desk.kind.answers == "labels":
        assert table[0]["target_probs"] == pytest.approx(first[0].sigmoid().tolist(), abs=1e-5)
        assert table[0]["labels"] == [None if y == IGNORE else y for y in row.labels[0].tolist()]
    elif desk.kind.per_token:
        found = [probs for probs in table[0]["target_probs"] if probs]
        ids = [ids for ids in table[0]["target_ids"] if ids]
        for z, probs, at in zip(first, found, ids, strict=True):
            torch.testing.assert_close(torch.tensor(probs), z.softmax(-1)[at].float(), **NEAR)
        hard = np.where(row.labels == UNLABELLED, IGNORE, row.labels)
        assert table[0]["labels"] == hard.tolist()


NEAR = {"rtol": 1e-3, "atol": 1e-5}


# Students


def test_a_student_learns_what_it_would_beside_its_teacher(desk: Desk) -> None:
    """Loss and gradients of a padded batch, by every divergence of the task."""
    cache = desk.cache()
    rows = rows_of(cache)[:12]
    assert len({row.sizes for row in rows}) > 3
    dataset, labels = kdcache.TargetDataset([cache]), desk.labels(rows)
    answers = desk.answers(desk / "teacher", rows)
    model = desk.load(desk / "student")
    for divergence in desk.kind.divergences:
        t = 1.0 if divergence in ("mse", "huber") else desk.temperature
        how: dict[str, Any] = {"alpha": ALPHA, "divergence": divergence}
        logits = torch.cat([desk.own(model, row) for row in rows]).double()
        reference = LOSSES[desk.kind.answers]
        want = reference(logits, labels, DenseTargets(answers, t), **how).total
        want.backward()
        grads = {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
        model.zero_grad()
        pad = cache.spec.pad_id
        batch = kdcache.Collator(pad_id=pad, temperature=t)([dataset[i] for i in range(12)])
        student = kdcache.DistilledStudent(
            model, desk.task, vocab_size=cache.spec.vocab_size, **how
        )
        got = student.eval()(**batch).loss
        got.backward()
        assert float(got.detach()) == pytest.approx(float(want.detach()), abs=1e-5, rel=1e-5)
        largest = max(float(grad.abs().max()) for grad in grads.values())
        for name, weight in model.named_parameters():
            if name in grads:
                assert weight.grad is not None, name
                off = float((weight.grad - grads[name]).abs().max())
                assert off <= 1e-4 * largest + 1e-5, (divergence, name)
        model.zero_grad()


@pytest.mark.parametrize(("workers", "accumulation"), [(2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("soft", [True, False])
def test_slices_of_several_workers_add_up_to_the_whole_batch(
    desk: Desk, workers: int, accumulation: int, soft: bool
) -> None:
    """The mean is over positions, and without soft targets over hard labels, of all slices."""
    cache = desk.cache()
    width = cache.spec.vocab_size
    model = desk.load(desk / "student")
    loss = kdcache.DistilledStudent(model, desk.task, alpha=ALPHA, vocab_size=width).eval()

    def losses(**options: Any) -> np.ndarray:
        t = desk.temperature if soft else None
        given = {"batch_size": 12, "temperature": t, "seed": 5, "streams": 1, **options}
        stream = kdcache.TargetStream(cache, **given)
        with torch.no_grad():
            return np.array([float(loss(**batch).loss) for batch in stream])

    whole = losses()
    parts = [losses(rank=r, world_size=workers, accumulation=accumulation) for r in range(workers)]
    sums = sum(part.reshape(-1, accumulation).sum(1) for part in parts)
    np.testing.assert_allclose(sums, whole, rtol=1e-5)


def plan(desk: Desk, out: Path, **more: Any) -> TrainOptions:
    given: dict[str, Any] = {
        "cache": (desk.cache().url,), "student": desk / "student", "batch_size": 8,
        "report_to": "none", "precision": "float32", "learning_rate": 1e-2, **more,
    }  # fmt: skip
    return TrainOptions(out=str(out), **given)


def test_a_training_that_was_stopped_goes_on_to_the_bit(desk: Desk, tmp_path: Path) -> None:
    whole = plan(desk, tmp_path / "whole", max_steps=6, save_steps=2)
    kdcache.train(whole)
    halves = dataclasses.replace(whole, out=str(tmp_path / "halves"))

    def stop(now: Any) -> None:
        if now.step >= 4:
            raise Stop

    with pytest.raises(Stop):
        kdcache.train(halves, on_progress=stop)
    kdcache.train(halves)
    one, two = (tmp_path / name / "model.safetensors" for name in ("whole", "halves"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("student", ["student.json", "bilstm"])
def test_a_run_is_a_model_of_transformers_with_the_figures_of_its_training(
    desk: Desk, student: str, tmp_path: Path
) -> None:
    """Of a student from a configuration alone, and with words of its own."""
    given: dict[str, Any] = {"embedding_size": 6, "hidden_size": 5} if student == "bilstm" else {}
    name, out = desk / student if student != "bilstm" else student, tmp_path / "run"
    options = plan(desk, out, student=name, max_steps=4, eval_cache=(desk.cache().url,), **given)
    if student == "bilstm" and not desk.kind.rereads:
        with pytest.raises(UsageError, match=f"bilstm is a classifier; for {desk.task} give"):
            kdcache.train(options)
        return
    done = kdcache.train(dataclasses.replace(options, best=desk.example.best))
    card = (out / "README.md").read_text()
    assert desk.kind.pipeline in card
    assert kdcache.load_student(str(out)) is not None
    assert type(desk.load(out)).__name__ in str(json.loads((out / "config.json").read_text()))
    (_, scores) = kdcache.evaluate(EvaluateOptions((str(out),), desk.cache().url)).models
    figure = figure_of(desk.task)
    if figure is not None:
        mine = getattr(scores, "entity_f1" if figure == "f1" and desk.kind.words else figure)
        assert mine == pytest.approx(done.eval[figure], abs=1e-5)
    assert (
        scores.kl == pytest.approx(done.eval["soft_loss"], rel=1e-3) or not desk.kind.distribution
    )


def test_an_adapter_is_trained_saved_and_measured(desk: Desk, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the extra lora")
    options = partial(plan, desk, tmp_path / "run", max_steps=2, lora="r=2")
    if desk.task == "masked-lm":
        with pytest.raises(UsageError, match="--lora is for causal-lm, "):
            kdcache.train(options())
        return
    done = kdcache.train(options())
    assert done.trained < done.parameters
    assert not (tmp_path / "run" / "model.safetensors").exists()
    found = kdcache.evaluate(EvaluateOptions((str(tmp_path / "run"),), desk.cache().url))
    assert found.task == desk.task


# Figures


def figures(desk: Desk, p: torch.Tensor, q: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """Figures of a student with logits q, beside a teacher with logits p."""
    if desk.task == "regression":
        there, z = ~y.isnan(), q[:, 0]
        found = {"mse": float((z - y)[there].square().mean())}
        found["pearson"] = pearson(z[there].numpy(), y[there].numpy())
        return found | {"teacher_mse": float((p - q).square().mean())}
    if desk.kind.answers == "labels":
        pairs = ((p.sigmoid(), q.sigmoid()), ((-p).sigmoid(), (-q).sigmoid()))
        there = y != IGNORE
        hard = functional.binary_cross_entropy_with_logits(q[there], y[there].double())
        found = {"kl": float(sum((a * (a / b).log()).mean() for a, b in pairs))}
        found["agreement"] = float(((p > 0) == (q > 0)).double().mean())
        found["micro_f1"] = micro_f1(y.numpy(), (q > 0).numpy())
        return found | {"cross_entropy": float(hard)}
    there, p, q = known(y), p.log_softmax(-1), q.log_softmax(-1)
    best = q.argmax(-1)
    return {
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "cross_entropy": float(functional.nll_loss(q[there], y[there].long())),
        "accuracy": float((best == y)[there].double().mean()),
        "agreement": float((best == p.argmax(-1)).double().mean()),
    }


def entity_f1(desk: Desk, answers: torch.Tensor) -> float:
    """By the usual script: sentence by sentence, over words that have a tag."""
    entities, done = Entities(TAGS), 0
    for record in desk.records():
        tags = record["tags"] or [None] * len(record["tokens"])
        found = answers[done : done + len(tags)].argmax(-1).numpy()
        done += len(tags)
        keep = np.array([tag is not None for tag in tags], bool)
        want = np.array([TAGS.index(tag or "O") for tag in tags], int)
        entities.add(want[keep], found[keep], np.array([keep.sum()]))
    return entities.f1


def test_an_evaluation_has_the_figures_of_the_models_own_answers(desk: Desk) -> None:
    cache, models = desk.cache(), (desk / "teacher", desk / "student")
    rows = rows_of(cache)
    p, q = (desk.answers(model, rows) for model in models)
    want = figures(desk, p, q, desk.labels(rows))
    if desk.kind.words:
        want["entity_f1"] = entity_f1(desk, q)
    from_cache = kdcache.evaluate(EvaluateOptions((models[1],), cache.url))
    # A corpus is one span here and several in the cache, so its masks are others.
    given: dict[str, Any] = {"corpus": (desk / "corpus.jsonl",), "max_length": 48}
    given |= desk.example.build
    live = kdcache.evaluate(EvaluateOptions((models[1],), teacher=models[0], **given))
    assert from_cache.task == live.task == desk.task
    for name, value in want.items():
        assert getattr(from_cache.models[1], name) == pytest.approx(value, rel=1e-4, abs=1e-5), name
        if desk.task != "masked-lm":
            assert getattr(live.models[1], name) == pytest.approx(value, rel=2e-4, abs=1e-5), name
    if desk.kind.perplexity:
        perplexity = np.exp(want["cross_entropy"])
        assert from_cache.models[1].perplexity == pytest.approx(perplexity, rel=1e-4)
    printed = run("evaluate", "--student", models[1], "--cache", cache.url)
    assert "perplexity" in printed or not desk.kind.perplexity


def test_predictions_are_the_models_own_in_the_order_of_the_corpus(
    desk: Desk, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    given = {"max_length": 9} if desk.kind.source else {}
    options = PredictOptions(desk / "student", (desk / "corpus.jsonl",), str(out), **given)
    if desk.kind.over_ids and not desk.kind.source:
        with pytest.raises(UsageError, match="; predict is for classifiers"):
            kdcache.predict(options)
        return
    records = desk.records()
    assert kdcache.predict(options).records == len(records)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    rows = rows_of(desk.cache())
    answers = iter(desk.answers(desk / "student", rows))
    model, same = desk.load(desk / "student"), 0
    tokenizer = AutoTokenizer.from_pretrained(desk / "student")
    for line, record, row in zip(lines, records, rows, strict=True):
        z = [next(answers) for _ in row.positions(desk.task)]
        if desk.kind.source:
            assert line["source"] == record["source"]
            ids = torch.tensor([tokenizer(line["source"])["input_ids"]])
            found = model.generate(ids, max_new_tokens=9, do_sample=False)[0]
            same += line["target"] == tokenizer.decode(found, skip_special_tokens=True).strip()
        elif desk.kind.words:
            assert line["tokens"] == record["tokens"]
            assert line["tags"] == [TAGS[int(one.argmax())] for one in z]
            want = [float(one.softmax(-1).max()) for one in z]
            assert line["probabilities"] == pytest.approx(want, abs=1e-5)
        elif desk.kind.named:
            p = z[0].sigmoid() if desk.kind.answers == "labels" else z[0].softmax(-1)
            want = dict(zip(NAMES, p.tolist(), strict=True))
            assert line["probabilities"] == pytest.approx(want, abs=1e-5)
        else:
            assert line["score"] == pytest.approx(float(z[0]), abs=1e-5)
    if desk.kind.source:  # of a batch two ids may be as probable as each other, up to rounding
        assert same >= 0.9 * len(records)


def test_an_encoder_becomes_a_teacher_with_the_figures_of_its_evaluation(
    desk: Desk, tmp_path: Path
) -> None:
    start = desk / "student"
    if not desk.kind.source:  # before its fine-tuning it has no head
        start = str(tmp_path / "encoder")
        AutoModel.from_pretrained(desk / "student").save_pretrained(start)
        AutoTokenizer.from_pretrained(desk / "student").save_pretrained(start)
    corpus, out = (desk / "corpus.jsonl",), str(tmp_path / "tuned")
    given: dict[str, Any] = {"task": desk.task, "epochs": 1, "learning_rate": 1e-2}
    if not desk.example.figures:
        with pytest.raises(UsageError, match="Train a language model with transformers or TRL"):
            FinetuneOptions(start, corpus, out, corpus, **given)
        return
    made = kdcache.finetune(FinetuneOptions(start, corpus, out, corpus, **given))
    records = desk.records()
    without = sum(None in record.values() for record in records)
    assert (made.rows, made.unlabelled) == (len(records) - without, without)
    assert os.path.exists(f"{out}/config.json")
    (scores,) = kdcache.evaluate(EvaluateOptions((out,), corpus=corpus, max_length=48)).models
    for mine, theirs in desk.example.figures.items():
        assert getattr(made, mine) == pytest.approx(getattr(scores, theirs), abs=1e-5), mine
