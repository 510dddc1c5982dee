"""Several labels a text, and scores, from `finetune` to `predict`: against a teacher that runs
beside the student, in one process and in two, interrupted and not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from launched import launch
from make_caches import word_tokenizer
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    RobertaConfig,
    RobertaModel,
)

from kdcache.cache import Cache
from kdcache.cache.check import problems
from kdcache.cli.main import cli
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.evaluate.evaluate import evaluate
from kdcache.commands.export import export
from kdcache.commands.finetune.finetune import finetune
from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.commands.options import (
    EvaluateOptions,
    ExportOptions,
    PredictOptions,
    SweepOptions,
    TranscodeOptions,
)
from kdcache.commands.predict.predict import predict
from kdcache.commands.sweep.sweep import sweep
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.commands.transcode import transcode
from kdcache.commands.verify import recheck
from kdcache.errors import UsageError
from kdcache.loss.metrics import macro_average_precision, micro_f1, pearson, spearman
from kdcache.stream import TargetStream
from kdcache.student import DistilledStudent, load_student
from kdcache.tasks import IGNORE
from kdcache.teacher.adapter import quiet_peft

pytestmark = pytest.mark.slow

NAMES = ("blue", "green", "red")  # as finetune sorts them
MANY, SCORE = "multi-label-classification", "regression"


@dataclass(frozen=True)
class Bench:
    """A teacher of a task, its corpora and caches.

    Attributes:
        task: its task.
        folder: with `teacher`, `train.jsonl`, `test.jsonl`, `cache` and `test-cache`.
    """

    task: str
    folder: Path

    def __truediv__(self, name: str) -> str:
        return str(self.folder / name)

    @property
    def many(self) -> bool:
        return self.task == MANY

    def records(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in Path(self / f"{name}.jsonl").read_text().splitlines()]

    def truth(self, name: str) -> np.ndarray:
        """Labels as the corpus has them: [rows, classes] or [rows]."""
        values = [record["labels" if self.many else "score"] for record in self.records(name)]
        if not self.many:
            return np.array([np.nan if value is None else value for value in values])
        rows = [[IGNORE] * 3 if v is None else [int(n in v) for n in NAMES] for v in values]
        return np.array(rows)

    def logits(self, model: str, name: str) -> np.ndarray:
        """Logits of each text by the model's own forward on it alone."""
        own = AutoModelForSequenceClassification.from_pretrained(model).eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
        with torch.inference_mode():
            found = [
                own(**tokenizer(record["text"], return_tensors="pt")).logits
                for record in self.records(name)
            ]
        return torch.cat(found).double().numpy()

    def train(self, out: Path, **more: Any) -> TrainOptions:
        given = {"student": self / "small.json", "epochs": 2.0, "batch_size": 20, **more}
        return TrainOptions((self / "cache",), out=str(out), **given)


@pytest.fixture(scope="module", params=[MANY, SCORE])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(request.param, tmp_path_factory.mktemp(request.param))
    size = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"vocab_size": 64, "max_position_embeddings": 32, "hidden_size": 16, **size}
        BertModel(BertConfig(**shape)).save_pretrained(bench / "encoder")
    for file, content in word_tokenizer().items():
        Path(bench / "encoder", file).write_bytes(content)
    small = {"model_type": "bert", "hidden_size": 8, "max_position_embeddings": 32, **size}
    Path(bench / "small.json").write_text(
        json.dumps({**small, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )
    for name, rows in (("train", 60), ("test", 30)):
        rng = np.random.default_rng(rows)
        lines = []
        for i in range(rows):
            words = rng.integers(7, 64, int(rng.integers(4, 9)))
            chosen = [k for k in range(3) if rng.random() < 0.4]
            words[: len(chosen)] = [4 + k for k in chosen]
            text = " ".join(f"w{w}" for w in rng.permutation(words))
            without = name == "train" and i % 10 == 3  # of a transfer set
            labels = None if without else [NAMES[k] for k in chosen]
            score = None if without else round(2.0 * len(chosen) + float(rng.normal(0, 0.1)), 3)
            lines.append(
                {"text": text, "labels": labels} | ({} if bench.many else {"score": score})
            )
            if not bench.many:
                del lines[-1]["labels"]
        Path(bench / f"{name}.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    made = finetune(
        FinetuneOptions(
            bench / "encoder",
            (bench / "train.jsonl",),
            bench / "teacher",
            (bench / "test.jsonl",),
            task=bench.task,  # type: ignore[arg-type]
            epochs=4,
            learning_rate=0.02,
            batch_size=20,
        )
    )
    assert (made.rows, made.unlabelled) == (54, 6)
    assert made.label_names == (NAMES if bench.many else ())
    figures = (made.micro_f1, made.average_precision) if bench.many else (made.mse,)
    assert all(figure is not None for figure in figures)
    for corpus, cache in (("train", "cache"), ("test", "test-cache")):
        build(build_options(bench, (bench / f"{corpus}.jsonl",), bench / cache))
    return bench


def build_options(bench: Bench, corpus: tuple[str, ...], out: str, **more: Any) -> BuildOptions:
    teacher = (bench / "teacher",)
    given = {"task": bench.task, "workers": 0, "shard_tokens": 100, **more}
    return BuildOptions(teacher, corpus, out, **given)


def sigmoid(z: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-z)))


def test_a_cache_holds_what_the_teacher_answers_and_the_records_say(bench: Bench) -> None:
    config = json.loads(Path(bench / "teacher", "config.json").read_text())
    problem = "multi_label_classification" if bench.many else "regression"
    assert config["problem_type"] == problem
    cache = Cache.open(bench / "cache")
    assert (cache.spec.vocab_size, cache.spec.label_names) == (
        (3, NAMES) if bench.many else (1, None)
    )
    assert [problem.text for problem in problems(cache)] == []
    parts = [cache.read(span) for span in range(cache.spec.spans)]
    assert len(parts) > 1
    labels = np.concatenate([part.labels for part in parts])
    np.testing.assert_allclose(labels, bench.truth("train"), rtol=1e-6)
    assert labels.dtype == (np.int32 if bench.many else np.float32)
    stored = np.concatenate([part.targets.columns["logits"] for part in parts])
    np.testing.assert_allclose(stored, bench.logits(bench / "teacher", "train"), atol=1e-5)
    again = recheck(cache, (bench / "teacher",), sample=16)
    assert (again.problems, again.rows) == ((), 16)


def own_loss(
    student: Any, teacher: Any, batch: dict[str, Any], alpha: float, temperature: float
) -> torch.Tensor:
    """The loss with the teacher run beside the student, by its formula."""
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in batch}
    z, y = student(**inputs).logits, batch["labels"]
    with torch.no_grad():
        t = teacher(**inputs).logits
    n = float(batch["count"])
    if z.shape[1] == 1:
        known = ~y.isnan()
        hard = (z[known, 0] - y[known]).square().sum()
        return alpha * hard / n + (1 - alpha) * (z - t).square().sum() / n
    known, p = y != IGNORE, z.sigmoid()
    hard = -torch.where(y == 1, p.log(), (1 - p).log())[known].sum() / 3
    q, r = (t / temperature).sigmoid(), (z / temperature).sigmoid()
    kl = q * (q / r).log() + (1 - q) * ((1 - q) / (1 - r)).log()
    return alpha * hard / n + (1 - alpha) * temperature**2 * kl.sum() / 3 / n


def test_the_loss_is_that_of_a_teacher_beside_the_student(bench: Bench, tmp_path: Path) -> None:
    train(bench.train(tmp_path / "run", max_steps=1))
    temperature = 2.0 if bench.many else 1.0
    stream = TargetStream(Cache.open(bench / "cache"), batch_size=17, temperature=temperature)
    teacher = AutoModelForSequenceClassification.from_pretrained(bench / "teacher").eval()
    for batch in stream:
        mine = load_student(str(tmp_path / "run")).eval()
        own = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
        wrapped = DistilledStudent(mine, bench.task, alpha=0.3)
        out = wrapped(**batch)
        want = own_loss(own, teacher, batch, 0.3, temperature)
        assert out.loss.item() == pytest.approx(want.item(), abs=1e-5)
        out.loss.backward()
        want.backward()
        theirs = dict(own.named_parameters())
        for name, weight in mine.named_parameters():
            assert weight.grad is not None
            torch.testing.assert_close(weight.grad, theirs[name].grad, rtol=0, atol=1e-5)


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(run / "model.safetensors"))


@pytest.mark.end_to_end
@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_slices_and_two_workers_take_the_steps_of_one(
    bench: Bench, tmp_path: Path, alpha: float
) -> None:
    common: dict[str, Any] = {"alpha": alpha, "max_steps": 4, "save_steps": 4, "streams": 2}
    options = {
        name: bench.train(tmp_path / name, **common, **more)
        for name, more in (("one", {}), ("sliced", {"gradient_accumulation": 3}), ("both", {}))
    }
    train(options["one"])
    train(options["sliced"])
    for ended in launch(options["both"], 2):
        assert ended.error is None
    want = weights_of(tmp_path / "one")
    for name in ("sliced", "both"):
        for key, weight in weights_of(tmp_path / name).items():
            torch.testing.assert_close(weight, want[key], rtol=0, atol=2e-6)


def test_a_run_that_was_stopped_goes_on_to_the_bit(bench: Bench, tmp_path: Path) -> None:
    options = bench.train(tmp_path / "whole", save_steps=2, eval_cache=(), keep_checkpoints=9)
    train(options)
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    result = train(dataclasses.replace(options, out=str(tmp_path / "cut")))
    assert result.task == bench.task
    want = weights_of(tmp_path / "whole")
    assert all(torch.equal(w, want[key]) for key, w in weights_of(tmp_path / "cut").items())


@pytest.fixture(scope="module")
def run(bench: Bench) -> str:
    train(
        TrainOptions(
            (bench / "cache",),
            student="bilstm",
            out=bench / "run",
            eval_cache=(bench / "test-cache",),
            best="micro_f1" if bench.many else "pearson",
            epochs=2,
            batch_size=20,
            hidden_size=8,
            embedding_size=8,
        )
    )
    return bench / "run"


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_figures_and_predictions_are_those_of_the_model_alone(
    bench: Bench, run: str, tmp_path: Path
) -> None:
    """A biLSTM with words of its own, beside its teacher."""
    z, t = (bench.logits(model, "test") for model in (run, bench / "teacher"))
    truth = bench.truth("test")
    common: Any = {"threshold": 0.4} if bench.many else {}
    results = (
        evaluate(EvaluateOptions((run,), bench / "test-cache", **common)),
        evaluate(
            EvaluateOptions((run,), None, (bench / "test.jsonl",), bench / "teacher", **common)
        ),
    )
    logged = json.loads(Path(run, "train.json").read_text())["result"]["eval"]
    for result in results:
        teacher, student = result.models
        if bench.many:
            assert student.micro_f1 == pytest.approx(micro_f1(truth, sigmoid(z) >= 0.4))
            want = macro_average_precision(truth, t)
            assert teacher.macro_average_precision == pytest.approx(want)
            q, r = sigmoid(t), sigmoid(z)
            kl = q * np.log(q / r) + (1 - q) * np.log((1 - q) / (1 - r))
            assert student.kl == pytest.approx(kl.mean(), abs=1e-6)
            bce = -np.where(truth == 1, np.log(r), np.log(1 - r)).mean()
            assert student.cross_entropy == pytest.approx(bce, abs=1e-6)
            alike = ((q >= 0.4) == (r >= 0.4)).mean()
            assert student.agreement == pytest.approx(alike)
            assert logged["micro_f1"] == pytest.approx(micro_f1(truth, z >= 0))
        else:
            assert student.mse == pytest.approx(np.mean((z[:, 0] - truth) ** 2), rel=1e-5)
            assert student.pearson == pytest.approx(pearson(z[:, 0], truth), abs=1e-6)
            assert teacher.spearman == pytest.approx(spearman(t[:, 0], truth), abs=1e-6)
            assert student.teacher_mse == pytest.approx(np.mean((z - t) ** 2), rel=1e-5)
            assert logged["pearson"] == pytest.approx(pearson(z[:, 0], truth), abs=1e-5)
    predict(PredictOptions(run, (bench / "test.jsonl",), str(tmp_path / "out.jsonl"), **common))
    for line, own in zip(answers(tmp_path / "out.jsonl"), z, strict=True):
        if bench.many:
            p = dict(zip(NAMES, sigmoid(own).tolist(), strict=True))
            assert line["probabilities"] == {
                name: pytest.approx(p[name], abs=1e-5) for name in NAMES
            }
            assert line["labels"] == [name for name in NAMES if p[name] >= 0.4]
        else:
            assert line["score"] == pytest.approx(own[0], abs=1e-5)
            assert set(line) == {"text", "score"}


def test_other_commands_show_and_keep_them(bench: Bench, run: str, tmp_path: Path) -> None:
    cli_run = CliRunner().invoke
    shown = cli_run(cli, ["inspect", bench / "cache", "--row", "0"])
    assert shown.exit_code == 0, shown.output
    assert ("3 classes" if bench.many else "over 1 score") in shown.output
    for command in (
        ["evaluate", "--student", run, "--cache", bench / "test-cache"],
        ["report", bench / "cache", run, "--out", str(tmp_path / "page.html")],
        ["verify", bench / "cache"],
        ["plan", "--teacher", bench / "teacher", "--task", bench.task, "--corpus",
         bench / "train.jsonl", "--rows", "8"],
    ):  # fmt: skip
        done = cli_run(cli, command)
        assert done.exit_code == 0, done.output
        if command[0] == "evaluate":
            word = "micro average precision" if bench.many else "Spearman correlation"
            assert word in done.output
    assert ("micro f1" if bench.many else "pearson") in (tmp_path / "page.html").read_text()
    export(ExportOptions(bench / "cache", str(tmp_path / "table")))
    table = pq.read_table(tmp_path / "table").to_pydict()
    truth, t = bench.truth("train"), bench.logits(bench / "teacher", "train")
    if bench.many:
        want = [[None if v == IGNORE else int(v) for v in row] for row in truth]
        assert table["labels"] == want
        np.testing.assert_allclose(table["target_probs"], sigmoid(t), atol=1e-5)
    else:
        found = [np.nan if v is None else v for v in table["label"]]
        np.testing.assert_allclose(found, truth, rtol=1e-6)
        np.testing.assert_allclose(table["target_score"], t[:, 0], atol=1e-5)


def test_a_sweep_has_the_figures_of_the_task(bench: Bench, tmp_path: Path) -> None:
    """Of students and teacher alike: over the classes that are known, and by Huber's loss."""
    truth, cache = bench.truth("test"), bench / "test-cache"
    grid: dict[str, Any] = {
        "student": bench / "small.json",
        "max_steps": 2,
        "cache": bench / "cache",
    }
    if bench.many:
        truth[np.random.default_rng(0).random(truth.shape) < 0.4] = IGNORE
        known = [[None if v == IGNORE else bool(v) for v in row] for row in truth]
        texts = [record["text"] for record in bench.records("test")]
        lines = ({"text": t, "labels": v} for t, v in zip(texts, known, strict=True))
        (tmp_path / "part.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        cache = str(tmp_path / "part")
        build(build_options(bench, (str(tmp_path / "part.jsonl"),), cache))
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
        error = np.abs(z[:, 0] - truth)
        return float(np.where(error < 0.3, error**2 / 2, 0.3 * (error - 0.15)).mean())

    t = bench.logits(bench / "teacher", "test")
    want = micro_f1(truth, t >= 0) if bench.many else pearson(t[:, 0], truth)
    assert result.teacher == pytest.approx({figure: want, "hard_loss": hard(t)}, abs=1e-4)
    for run in result.runs:
        assert run.figures["hard_loss"] == pytest.approx(hard(bench.logits(run.out, "test")))
    if bench.many:
        (teacher, student) = evaluate(EvaluateOptions((result.runs[0].out,), cache)).models
        assert teacher.cross_entropy == pytest.approx(result.teacher["hard_loss"])
        assert student.cross_entropy == pytest.approx(result.runs[0].figures["hard_loss"])


@pytest.mark.parametrize("ensemble", ["mean-probs", "mean-logits"])
def test_an_ensemble_is_the_mean_of_its_answers(
    bench: Bench, tmp_path: Path, ensemble: Any
) -> None:
    shutil.copytree(bench / "teacher", tmp_path / "second")
    weights = load_file(tmp_path / "second" / "model.safetensors")
    from safetensors.torch import save_file

    moved = {k: v + 0.3 * (k == "classifier.bias") for k, v in weights.items()}
    save_file(moved, tmp_path / "second" / "model.safetensors", metadata={"format": "pt"})
    temperature = 2.0 if bench.many else 1.0
    build(
        dataclasses.replace(
            build_options(bench, (bench / "test.jsonl",), str(tmp_path / "cache")),
            teacher=(bench / "teacher", str(tmp_path / "second")),
            teacher_weight=(3.0, 1.0),
            ensemble=ensemble,
            temperatures=(temperature,),
        )
    )
    cache = Cache.open(str(tmp_path / "cache"))
    parts = [cache.read(span).targets.at(temperature) for span in range(cache.spec.spans)]
    found = np.concatenate([part.logits.double().numpy() for part in parts])
    z = [bench.logits(m, "test") for m in (bench / "teacher", str(tmp_path / "second"))]
    if bench.many and ensemble == "mean-probs":
        want = 0.75 * sigmoid(z[0] / 2) + 0.25 * sigmoid(z[1] / 2)
        np.testing.assert_allclose(sigmoid(found / 2), want, atol=1e-5)
        with pytest.raises(UsageError, match="temperature"):
            cache.codec().check_temperature(1.0)
        # Where the mean decides at T = 1 is known at 1/2 alone.
        for threshold in (0.5, 0.4):
            result = evaluate(EvaluateOptions((bench / "teacher",), cache.url, threshold=threshold))
            agreed = ((want >= 0.5) == (z[0] >= 0)).mean()
            assert result.models[1].agreement == (
                pytest.approx(agreed) if threshold == 0.5 else None
            )
            told = any("Agreement is not known" in note for note in result.notes)
            assert told == (threshold != 0.5)
    else:
        np.testing.assert_allclose(found, 0.75 * z[0] + 0.25 * z[1], atol=1e-5)


def test_half_precision_is_kept_and_other_codecs_are_refused(bench: Bench, tmp_path: Path) -> None:
    transcode(
        TranscodeOptions(
            bench / "cache", codec="dense:float16", out=str(tmp_path / "half"), workers=0
        )
    )
    half, whole = (Cache.open(str(p)).read(0) for p in (tmp_path / "half", bench / "cache"))
    np.testing.assert_array_equal(half.labels, whole.labels)
    np.testing.assert_allclose(
        half.targets.columns["logits"], whole.targets.columns["logits"], rtol=1e-3
    )
    for codec in ("topk:1", "sample:4"):
        with pytest.raises(UsageError, match="Use --codec dense or dense:float16"):
            build(build_options(bench, (bench / "test.jsonl",), str(tmp_path / "x"), codec=codec))
        with pytest.raises(UsageError, match="Use --codec dense or dense:float16"):
            transcode(
                TranscodeOptions(bench / "cache", codec=codec, out=str(tmp_path / "y"), workers=0)
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
        build(build_options(bench, (str(out / "x.jsonl"),), str(out / "c"), **more))

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
    Wrong(_build({"labels": [True, False]}), "or 3 values of true and false", None),
    Wrong(_build({"score": "good"}), None, "the score is 'good', expected a finite number"),
    Wrong(_build({"score": 1e400}), None, "the score is inf, expected a finite number"),
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
    corpora = (bench / "train.jsonl",), str(tmp_path / "out"), (str(tmp_path / "dev.jsonl"),)
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
        evaluate(EvaluateOptions((heads(problem_type=other),), bench / "test-cache"))
    if bench.many:
        turned = {"id2label": dict(enumerate(NAMES[::-1]))}
        with pytest.raises(UsageError, match="in this order, the cache"):
            train(bench.train(tmp_path / "run", student=heads(**turned)))
        # Evaluation maps the order, as for other classifiers.
        result = evaluate(EvaluateOptions((heads(**turned),), bench / "test-cache"))
        truth, t = bench.truth("test"), bench.logits(bench / "teacher", "test")[:, ::-1]
        assert result.models[1].micro_f1 == pytest.approx(micro_f1(truth, t >= 0))
    # A head of the same task is trained further; without a problem_type it is taken at its word.
    train(bench.train(tmp_path / "further", student=bench / "teacher", max_steps=1))
    train(bench.train(tmp_path / "plain", student=heads(problem_type=None), max_steps=1))


def test_an_adapter_teaches_students_with_words_and_tokens_of_their_own(
    bench: Bench, tmp_path: Path
) -> None:
    """`finetune --lora`, a build of the adapter, word vectors, and a tokenizer of bytes."""
    peft = pytest.importorskip("peft", reason="the extra lora")
    adapter, corpus = str(tmp_path / "adapter"), (bench / "test.jsonl",)
    given: dict[str, Any] = {"task": bench.task, "lora": "r=4", "learning_rate": 0.02}
    made = finetune(FinetuneOptions(bench / "encoder", corpus, adapter, epochs=1, **given))
    assert made.trained < made.parameters / 2
    cache = str(tmp_path / "cache")
    build(dataclasses.replace(build_options(bench, corpus, cache), teacher=(adapter,)))
    classes = 3 if bench.many else 1
    with quiet_peft():
        alone = peft.AutoPeftModelForSequenceClassification.from_pretrained(
            adapter, num_labels=classes
        )
    tokenizer, texts = AutoTokenizer.from_pretrained(adapter), bench.records("test")
    with torch.inference_mode():
        want = [alone(**tokenizer(one["text"], return_tensors="pt")).logits for one in texts]
    data = [Cache.open(cache).read(span) for span in range(Cache.open(cache).spec.spans)]
    cached = np.concatenate([part.targets.columns["logits"] for part in data])
    np.testing.assert_allclose(cached, torch.cat(want), atol=1e-5)

    known = len({word for one in texts for word in one["text"].split()})
    words = tmp_path / "vectors.txt"
    words.write_text("".join(f"w{i} {i} 0.5 -{i}\n" for i in range(4, 64)))
    bytes_ = AutoTokenizer.from_pretrained(Path(__file__).parent / "tiny_tokenizers" / "bytes")
    shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    RobertaModel(
        RobertaConfig(
            vocab_size=len(bytes_), num_hidden_layers=1, max_position_embeddings=130, **shape
        )
    ).save_pretrained(tmp_path / "roberta")
    bytes_.save_pretrained(tmp_path / "roberta")
    students: dict[str, dict[str, Any]] = {
        "bilstm": {"embeddings": str(words), "hidden_size": 6},
        str(tmp_path / "roberta"): {},
    }
    runs = [str(tmp_path / f"run-{number}") for number in range(2)]
    for run, (student, options) in zip(runs, students.items(), strict=True):
        result = train(TrainOptions((cache,), student=student, out=run, max_steps=2, **options))
        assert result.pretrained == (known if options else None)
    for run, found in zip(
        runs, evaluate(EvaluateOptions(tuple(runs), cache)).models[1:], strict=True
    ):
        z, t = bench.logits(run, "test"), cached.astype(np.float64)
        if bench.many:
            p, q = sigmoid(t), sigmoid(z)
            kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
            assert found.kl == pytest.approx(kl.mean(), abs=1e-6)
        else:
            assert found.teacher_mse == pytest.approx(np.mean((z - t) ** 2), rel=1e-4)


@pytest.mark.parametrize("head_width", [None, 8])
def test_an_encoder_with_a_tokenizer_of_its_own_learns_too(
    bench: Bench, tmp_path: Path, head_width: int | None
) -> None:
    """Also a headed teacher, whose own loss is that of its task."""
    made = finetune(
        FinetuneOptions(
            bench / "encoder",
            (bench / "train.jsonl",),
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
