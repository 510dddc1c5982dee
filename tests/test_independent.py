"""What only several labels a text and scores have: thresholds, figures, heads and refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from task_examples import NAMES, Desk, built, make_desk, rows_of, targets_of
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from kdcache.commands.build.build import build
from kdcache.commands.evaluate.evaluate import evaluate
from kdcache.commands.finetune.finetune import finetune
from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.commands.options import (
    EvaluateOptions,
    PredictOptions,
    SweepOptions,
    TranscodeOptions,
)
from kdcache.commands.predict import predict
from kdcache.commands.sweep.sweep import sweep
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.commands.transcode import transcode
from kdcache.errors import UsageError
from kdcache.loss.metrics import micro_f1, pearson
from kdcache.tasks import IGNORE

pytestmark = pytest.mark.slow

MANY, SCORE = "multi-label-classification", "regression"


@dataclass(frozen=True)
class Bench(Desk):
    """A desk of one of the two tasks."""

    @property
    def many(self) -> bool:
        return self.task == MANY

    def truth(self) -> np.ndarray:
        """Labels of all rows: [rows, classes] or [rows]."""
        return self.labels(rows_of(self.cache())).numpy()

    def logits(self, model: str) -> np.ndarray:
        return self.answers(model, rows_of(self.cache())).numpy()

    def train(self, out: Path, **more: Any) -> TrainOptions:
        given = {"student": self / "student.json", "epochs": 1.0, "batch_size": 20, **more}
        return TrainOptions((self.cache().url,), out=str(out), **given)


@pytest.fixture(scope="module", params=[MANY, SCORE])
def bench(
    request: pytest.FixtureRequest,
    corpus_texts: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Bench:
    folder = tmp_path_factory.mktemp(request.param)
    made = make_desk(request.param, corpus_texts, folder)
    AutoModel.from_pretrained(folder / "student").save_pretrained(folder / "encoder")
    AutoTokenizer.from_pretrained(folder / "student").save_pretrained(folder / "encoder")
    return Bench(made.task, folder)


def sigmoid(z: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-z)))


def test_a_threshold_decides_what_is_predicted_and_counted(bench: Bench, tmp_path: Path) -> None:
    if not bench.many:
        return
    given: Any = {"threshold": 0.4}
    truth, cache = bench.truth(), bench.cache().url
    q, r = (sigmoid(bench.logits(bench / name)) for name in ("teacher", "student"))
    _, student = evaluate(EvaluateOptions((bench / "student",), cache, **given)).models
    assert student.micro_f1 == pytest.approx(micro_f1(truth, r >= 0.4))
    assert student.agreement == pytest.approx(((q >= 0.4) == (r >= 0.4)).mean())
    out = tmp_path / "out.jsonl"
    predict(PredictOptions(bench / "student", (bench / "corpus.jsonl",), str(out), **given))
    for line, p in zip(map(json.loads, out.read_text().splitlines()), r, strict=True):
        assert line["labels"] == [name for name, x in zip(NAMES, p, strict=True) if x >= 0.4]


def test_a_sweep_has_the_figures_of_the_task(bench: Bench, tmp_path: Path) -> None:
    """Of students and teacher alike: over the classes that are known, and by Huber's loss."""
    truth, cache = bench.truth(), bench.cache().url
    grid: dict[str, Any] = {
        "student": bench / "student.json",
        "max_steps": 2,
        "cache": cache,
    }
    if bench.many:
        truth[np.random.default_rng(0).random(truth.shape) < 0.4] = IGNORE
        known = [[None if v == IGNORE else bool(v) for v in row] for row in truth]
        texts = [record["text"] for record in bench.records()]
        lines = ({"text": t, "labels": v} for t, v in zip(texts, known, strict=True))
        (tmp_path / "part.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        cache = str(tmp_path / "part")
        build(bench.options(cache, corpus=(str(tmp_path / "part.jsonl"),)))
    else:
        grid |= {"divergence": "huber", "huber_delta": 0.3}
    grid |= {"eval_cache": cache, "grid": {"alpha": [0.5, 1.0]}}
    (tmp_path / "grid.yaml").write_text(json.dumps(grid))
    result = sweep(SweepOptions(str(tmp_path / "grid.yaml"), str(tmp_path / "sweep"), workers=0))
    figure = "micro_f1" if bench.many else "pearson"
    assert result.ranked_by in (figure, "hard_loss")  # a constant student has no correlation
    assert result.figure_name != "cross-entropy (nats per position)"

    def hard(z: np.ndarray) -> float:
        if bench.many:
            each = -np.log(sigmoid(np.where(truth == 1, z, -z)))
            return float(each[truth != IGNORE].mean())
        error = np.abs(z[:, 0] - truth)[~np.isnan(truth)]
        return float(np.where(error < 0.3, error**2 / 2, 0.3 * (error - 0.15)).mean())

    known = np.ones(len(truth), bool) if bench.many else ~np.isnan(truth)
    t = bench.logits(bench / "teacher")
    want = micro_f1(truth, t >= 0) if bench.many else pearson(t[known, 0], truth[known])
    assert result.teacher == pytest.approx({figure: want, "hard_loss": hard(t)}, abs=1e-4)
    for run in result.runs:
        assert run.figures["hard_loss"] == pytest.approx(hard(bench.logits(run.out)))
    if bench.many:
        (teacher, student) = evaluate(EvaluateOptions((result.runs[0].out,), cache)).models
        assert teacher.cross_entropy == pytest.approx(result.teacher["hard_loss"])
        assert student.cross_entropy == pytest.approx(result.runs[0].figures["hard_loss"])


def test_where_a_mean_of_probabilities_decides_is_known_at_one_half_alone(
    bench: Bench, tmp_path: Path
) -> None:
    if not bench.many:
        return
    both = {"teacher": (bench / "teacher", bench / "other"), "temperatures": (2.0,)}
    cache = built(bench.options(tmp_path / "both", **both))
    with pytest.raises(UsageError, match="temperature"):
        cache.codec().check_temperature(1.0)
    decided = targets_of(cache, 2.0).numpy() >= 0
    agreed = (decided == (bench.logits(bench / "teacher") >= 0)).mean()
    for threshold, want in ((0.5, pytest.approx(agreed)), (0.4, None)):
        result = evaluate(EvaluateOptions((bench / "teacher",), cache.url, threshold=threshold))
        assert result.models[1].agreement == want
        told = any("Agreement is not known" in note for note in result.notes)
        assert told == (want is None)


def test_codecs_of_distributions_are_refused(bench: Bench, tmp_path: Path) -> None:
    for codec in ("topk:1", "sample:4"):
        with pytest.raises(UsageError, match="Use --codec dense or dense:float16"):
            build(bench.options(tmp_path / "x", codec=codec))
        with pytest.raises(UsageError, match="Use --codec dense or dense:float16"):
            transcode(
                TranscodeOptions(bench.cache().url, codec=codec, out=str(tmp_path / "y"), workers=0)
            )
    assert not (tmp_path / "x").exists()


@dataclass(frozen=True)
class Wrong:
    """What is refused, by whom, and in which words."""

    what: Callable[[Bench, Path], Any]
    many: str | None
    score: str | None


def _train(**more: Any) -> Callable[[Bench, Path], Any]:
    return lambda bench, out: train(bench.train(out / "run", **more))


def _build(line: dict[str, Any], **more: Any) -> Callable[[Bench, Path], Any]:
    def work(bench: Bench, out: Path) -> None:
        (out / "x.jsonl").write_text(json.dumps({"text": "w1", **line}) + "\n")
        build(dataclasses.replace(bench.options(out / "c", corpus=(str(out / "x.jsonl"),)), **more))

    return work


def _as(task: str) -> Callable[[Bench, Path], Any]:
    return _build({}, task=task)


WRONG = [
    Wrong(_train(temperature=2.0), None, "a score has no temperature, but 2 was given"),
    Wrong(_build({}, temperatures=(2.0,)), None, "a score has no temperature. Leave them out"),
    Wrong(
        _train(divergence="forward-kl"), None, "compares distributions, and this cache holds scores"
    ),
    Wrong(_train(divergence="forward-kl", alpha=1.0), None, "this cache holds scores. Train with"),
    Wrong(_train(divergence="huber"), "huber compares scores", None),
    Wrong(_train(divergence="mse", temperature=2.0), "has no temperature", "no temperature"),
    Wrong(_train(eval_cache=("?",), best="accuracy"), "there is no folder", "there is no folder"),
    Wrong(_build({"labels": ["mauve"]}), "'mauve', which is not one of the teacher's", None),
    Wrong(_build({"score": "good"}), None, "the score is 'good', expected a finite number"),
    Wrong(_as(SCORE), "is not a model for regression: its head of 3 outputs is for multi", None),
    Wrong(_as(MANY), None, "Use --task regression, or name a multi-label classifier"),
    Wrong(_as("sequence-classification"), "Use --task multi-label-cl", "Use --task regression, or"),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_refused_in_a_line(bench: Bench, tmp_path: Path, wrong: Wrong) -> None:
    reason = wrong.many if bench.many else wrong.score
    if reason is None:
        wrong.what(bench, tmp_path)  # what one of them refuses is right for the other
        return
    with pytest.raises(UsageError) as caught:
        wrong.what(bench, tmp_path)
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_an_evaluation_that_selects_no_epoch_is_refused(bench: Bench, tmp_path: Path) -> None:
    """Without a single class average precision is not defined; a squared error always is."""
    lines = [{"text": "w4 w5", "labels": []} if bench.many else {"text": "w4", "score": 1.0}]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(line) + "\n" for line in 2 * lines))
    corpora = (bench / "corpus.jsonl",), str(tmp_path / "out"), (str(tmp_path / "dev.jsonl"),)
    options = FinetuneOptions(bench / "encoder", *corpora, task=bench.task, epochs=1)  # type: ignore[arg-type]
    if bench.many:
        with pytest.raises(UsageError, match="no row of --eval-corpus .* has a class"):
            finetune(options)
    else:
        found = finetune(options)
        assert found.mse is not None
        assert found.pearson is None


@pytest.fixture
def heads(bench: Bench, tmp_path: Path) -> Callable[..., str]:
    """Copies of the teacher whose configuration says something else."""

    def make(**changes: Any) -> str:
        shutil.copytree(bench / "teacher", tmp_path / "other", dirs_exist_ok=True)
        config = json.loads(Path(bench / "teacher", "config.json").read_text())
        (tmp_path / "other" / "config.json").write_text(json.dumps({**config, **changes}))
        return str(tmp_path / "other")

    return make


def test_students_with_another_head_are_refused(
    bench: Bench, heads: Callable[..., str], tmp_path: Path
) -> None:
    other = "regression" if bench.many else "multi_label_classification"
    with pytest.raises(UsageError, match="Give the encoder before its fine-tuning, or a"):
        train(bench.train(tmp_path / "run", student=heads(problem_type=other)))
    with pytest.raises(UsageError, match="was saved for|is not a model for"):
        evaluate(EvaluateOptions((heads(problem_type=other),), bench.cache().url))
    if bench.many:
        turned = {"id2label": dict(enumerate(NAMES[::-1]))}
        with pytest.raises(UsageError, match="in this order, the cache"):
            train(bench.train(tmp_path / "run", student=heads(**turned)))
        # Evaluation maps the order, as for other classifiers.
        result = evaluate(EvaluateOptions((heads(**turned),), bench.cache().url))
        truth, t = bench.truth(), bench.logits(bench / "teacher")[:, ::-1]
        assert result.models[1].micro_f1 == pytest.approx(micro_f1(truth, t >= 0))
    else:  # one output that no problem_type names is what transformers would train it for
        unnamed = bench.options(tmp_path / "classes", teacher=(heads(problem_type=None),))
        with pytest.raises(UsageError, match=r"is for regression .* Use --task regression"):
            build(dataclasses.replace(unnamed, task="sequence-classification"))
    # A head of the same task is trained further; without a problem_type it is taken at its word.
    train(bench.train(tmp_path / "further", student=bench / "teacher", max_steps=1))
    train(bench.train(tmp_path / "plain", student=heads(problem_type=None), max_steps=1))


@pytest.mark.parametrize("head_width", [None, 8])
def test_an_encoder_with_a_tokenizer_of_its_own_learns_too(
    bench: Bench, tmp_path: Path, head_width: int | None
) -> None:
    """Also a headed teacher, whose own loss is that of its task."""
    made = finetune(
        FinetuneOptions(
            bench / "encoder",
            (bench / "corpus.jsonl",),
            str(tmp_path / "teacher"),
            task=bench.task,  # type: ignore[arg-type]
            epochs=1,
            head_width=head_width,
        )
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher").eval()
    ids = torch.tensor([[4, 5], [6, 7]])
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0]]) if bench.many else torch.tensor([1.0, 2.0])
    out = model(input_ids=ids, labels=labels)
    z = out.logits.squeeze(-1)
    kind = torch.nn.functional
    want = kind.binary_cross_entropy_with_logits if bench.many else kind.mse_loss
    torch.testing.assert_close(out.loss, want(z, labels))
    assert made.steps
