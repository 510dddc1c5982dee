"""What a cache of any language model promises: the same checks for every task that makes one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from click.testing import CliRunner

import kdcache
from kdcache.cli.main import cli
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.options import TranscodeOptions, VerifyOptions
from kdcache.commands.train.options import TrainOptions
from kdcache.errors import UsageError
from kdcache.loss import distillation_loss
from kdcache.rows import Row
from kdcache.targets import DenseTargets
from kdcache.tasks import IGNORE, TASKS

Make = Callable[..., BuildOptions]
"""Makes the options of a build by the name of its folder, with changes."""
Own = Callable[[Any, Row], torch.Tensor]
"""Logits of a row's positions by a model's own forward on it alone."""


class Stop(Exception):  # noqa: N818 - not an error
    """Ends a training."""


def built(options: BuildOptions) -> kdcache.Cache:
    kdcache.build(options)
    return kdcache.Cache.open(options.out)


def rows_of(cache: kdcache.Cache) -> list[tuple[Row, Any]]:
    """Each row with the targets of its positions."""
    found = []
    for span in range(cache.spec.spans):
        data = cache.read(span)
        for i in range(len(data)):
            places = np.arange(*data.position_offsets[i : i + 2])
            found.append((data.row(i), data.targets.take(places)))
    return found


def labels_of(rows: Iterable[Row]) -> torch.Tensor:
    """Labels of all positions."""
    return torch.from_numpy(np.concatenate([r.labels[r.labels != IGNORE] for r in rows])).long()


def load(task: str, folder: Any) -> Any:
    return getattr(transformers, TASKS[task].auto).from_pretrained(folder).eval()


def run(*words: str) -> str:
    """What a command prints that succeeds."""
    done = CliRunner().invoke(cli, list(words))
    assert done.exit_code == 0, done.output
    return done.output


def check_refused(cases: Iterable[tuple[Callable[[], Any], str]]) -> None:
    """Each call ends with one line of these words."""
    for call, message in cases:
        with pytest.raises(UsageError) as error:
            call()
        assert message in str(error.value), str(error.value)
        assert "\n" not in str(error.value), str(error.value)


def with_telling_weights(model: Any) -> Any:
    """A model with random weights whose biases and norms show where they are left out."""
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data += 0.2 * torch.randn_like(weight)
    return model


def check_codecs(options: Make) -> None:
    """Hidden states give the distribution of logits; what is transcoded from these is what a build
    with the codec makes."""
    dense = built(options("dense"))
    hidden = built(options("hidden", codec="hidden:float16"))
    for (row, want), (same, got) in zip(rows_of(dense), rows_of(hidden), strict=True):
        assert np.array_equal(row.input_ids, same.input_ids)
        p, q = want.at(1.0).logits.softmax(-1), got.at(1.0).dense().logits.softmax(-1)
        torch.testing.assert_close(p, q, rtol=0, atol=5e-3)
    for codec in ("sample:5", "anchored:5", "topk:8"):
        direct = built(options(codec.replace(":", ""), codec=codec))
        again = TranscodeOptions(dense.url, codec=codec, out=f"{direct.url}-again", workers=0)
        kdcache.transcode(again)
        copy = kdcache.Cache.open(again.out)
        for span in range(direct.spec.spans):
            a, b = direct.read(span), copy.read(span)
            assert a.label_logprob is not None
            for name in ("labels", "input_ids", "source", "source_offsets", "label_logprob"):
                assert np.array_equal(getattr(a, name), getattr(b, name)), name
            for name, column in a.targets.columns.items():
                assert np.array_equal(column, b.targets.columns[name]), (codec, name)


def check_verify(options: Make, other: Path) -> None:
    """Cached targets are found to be the teacher's, and not those of another model."""
    chosen = options(codec="sample:5")
    kdcache.build(chosen)
    good = kdcache.verify(VerifyOptions(chosen.out, teacher=chosen.teacher))
    assert good.problems == ()
    assert good.recheck is not None
    assert good.recheck.problems == ()
    bad = kdcache.verify(VerifyOptions(chosen.out, teacher=(str(other),)))
    assert bad.recheck is not None
    assert "not those of this teacher" in bad.recheck.problems[0]


def check_parts(options: Make, **in_parts: Any) -> None:
    """Parts in any order, and a build that goes on, give the bytes of a whole build."""
    whole = built(options("whole", codec="sample:5"))
    for part in ("2/3", "3/3"):
        kdcache.build(options("parts", codec="sample:5", part=part, **in_parts))
    parts = built(options("parts", codec="sample:5"))
    assert parts.spec.fingerprint == whole.spec.fingerprint
    assert parts.digest == whole.digest


def check_resume(cache: kdcache.Cache, student: Path, folder: Path) -> None:
    """A training that was stopped and goes on ends with the bytes of one that was not."""
    plan = TrainOptions(
        cache=(cache.url,), student=str(student), out=str(folder / "whole"), batch_size=4,
        max_steps=8, save_steps=3, report_to="none", precision="float32",
    )  # fmt: skip
    kdcache.train(plan)
    halves = dataclasses.replace(plan, out=str(folder / "halves"))

    def stop(now: Any) -> None:
        if now.step >= 5:
            raise Stop

    with pytest.raises(Stop):
        kdcache.train(halves, on_progress=stop)
    kdcache.train(halves)
    whole, again = (
        (folder / name / "model.safetensors").read_bytes() for name in ("whole", "halves")
    )
    assert whole == again


def check_beside(cache: kdcache.Cache, teacher: Path, student: Path, own: Own) -> Any:
    """Loss and gradients of a padded batch are those with the teacher running on the same rows.

    Returns:
        The batch, and the student with its wrapper.
    """
    task, width = cache.spec.task, cache.spec.vocab_size
    rows = [row for row, _ in rows_of(cache)][:12]
    beside, model = load(task, teacher), load(task, student)
    with torch.inference_mode():
        targets = torch.cat([own(beside, row) for row in rows]).clone().double()
    logits = torch.cat([own(model, row) for row in rows]).double()
    want = distillation_loss(logits, labels_of(rows), DenseTargets(targets, 2.0), alpha=0.3).total
    want.backward()
    grads = {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
    model.zero_grad()
    dataset = kdcache.TargetDataset([cache])
    batch = kdcache.Collator(pad_id=0, temperature=2.0)([dataset[i] for i in range(12)])
    distilled = kdcache.DistilledStudent(model, task, alpha=0.3, vocab_size=width).eval()
    got = distilled(**batch).loss
    got.backward()
    assert float(got.detach()) == pytest.approx(float(want.detach()), abs=1e-5)
    for name, weight in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(weight.grad, grads[name], rtol=1e-4, atol=1e-5, msg=name)
    return batch, distilled


def check_evaluation(
    cache: kdcache.Cache,
    models: tuple[Path, Path],
    corpus: Path,
    own: Own,
    *,
    off: float,
    **live: Any,
) -> None:
    """Figures against the cache and against the teacher itself are those of the models' own logits.

    Args:
        cache: a dense one.
        models: teacher and student.
        corpus: what the cache was built of.
        own: a model's own logits.
        off: by how much the KL of the live teacher may differ.
        live: options of an evaluation beside the live teacher.
    """
    rows = [row for row, _ in rows_of(cache)]
    with torch.inference_mode():
        both = (load(cache.spec.task, model) for model in models)
        p, q = (torch.cat([own(model, row) for row in rows]).double() for model in both)
    labels = labels_of(rows)
    kl = float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean())
    hard = float(torch.nn.functional.cross_entropy(q, labels))
    of_cache, beside = (
        kdcache.evaluate(kdcache.EvaluateOptions(student=(str(models[1]),), **given))
        for given in (
            {"cache": cache.url},
            {"teacher": str(models[0]), "corpus": (str(corpus),), **live},
        )
    )
    assert of_cache.task == beside.task == cache.spec.task
    scores = of_cache.models[1]
    assert scores.cross_entropy == pytest.approx(hard, rel=1e-5)
    assert scores.perplexity == pytest.approx(np.exp(hard), rel=1e-4)
    assert scores.kl == pytest.approx(kl, rel=1e-4)
    assert scores.accuracy == pytest.approx(float((q.argmax(-1) == labels).double().mean()))
    same = (q.argmax(-1) == p.argmax(-1)).double().mean()
    assert scores.agreement == pytest.approx(float(same))
    assert beside.models[1].kl == pytest.approx(kl, rel=off)
    shown = run("evaluate", "--student", str(models[1]), "--cache", cache.url)
    assert "perplexity" in shown


def check_shown(cache: kdcache.Cache, teacher: Path, corpus: Path, folder: Path) -> Any:
    """A cache is shown, exported, reported, and planned again.

    Returns:
        The view of its first row, that row of the table, and the text of the page.
    """
    run("inspect", cache.url, "--row", "0")
    run("export", cache.url, "--out", str(folder / "table"))
    run("report", cache.url, "--out", str(folder / "page.html"))
    words = ["--teacher", str(teacher), "--corpus", str(corpus), "--task", cache.spec.task]
    run("plan", *words, "--max-length", "48", "--rows", "8")
    run("build", *words, "--dry-run", "--out", str(folder / "no"))
    assert not (folder / "no").exists()
    row = rows_of(cache)[0][0]
    first = pq.read_table(folder / "table").slice(0, 1).to_pylist()[0]  # type: ignore[no-untyped-call]
    assert first["input_ids"] == row.input_ids.tolist()
    assert first["labels"] == row.labels.tolist()
    view = kdcache.inspect(kdcache.InspectOptions(cache.url, row=0)).row
    assert view is not None
    return view, first, (folder / "page.html").read_text()


def check_run(options: BuildOptions, config: dict[str, Any], folder: Path, kind: str) -> Any:
    """A student from a configuration alone is a model of transformers; its card says how it loads.

    Returns:
        What transformers loads.
    """
    cache = built(options)
    (folder / "student.json").write_text(json.dumps(config))
    out = str(folder / "run")
    plan = kdcache.TrainOptions(
        cache=(cache.url,), student=str(folder / "student.json"), out=out, batch_size=8,
        max_steps=3, eval_cache=(cache.url,), report_to="none",
    )  # fmt: skip
    assert kdcache.train(plan).eval
    card = Path(out, "README.md").read_text()
    assert kind in card
    assert f"{TASKS[cache.spec.task].auto}.from_pretrained" in card
    assert kdcache.load_student(out) is not None
    again = {"student": (out,), "corpus": options.corpus, "teacher": options.teacher[0]}
    assert kdcache.evaluate(kdcache.EvaluateOptions(**again)).task == cache.spec.task
    return load(cache.spec.task, out)
