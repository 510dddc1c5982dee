"""Training from caches: the steps of HF's own Trainer, exact resume, workers, checks, files."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from launched import launch
from make_caches import CAUSAL, make_cache
from safetensors.torch import load_file
from small_runs import (
    BERT,
    LLAMA,
    SMALL,
    USUAL,
    StopError,
    losses,
    metrics,
    same,
    stop_at,
    weights,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from kdcache.cache import Cache
from kdcache.cli.main import cli
from kdcache.commands.run_folder import TrainProgress
from kdcache.commands.train.options import Schedule, TrainOptions
from kdcache.commands.train.prepare import RunPlan
from kdcache.commands.train.run import Run
from kdcache.commands.train.student import make_student
from kdcache.commands.train.train import train
from kdcache.errors import UsageError
from kdcache.stream import Collator, TargetDataset, TargetStream
from kdcache.student import (
    DistilledStudent,
    HfTokenize,
    StudentInfo,
    checkpoints,
    figures,
    load_student,
)
from kdcache.student.trainer import DistillationTrainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches `classes` (45 rows), `held` (20 rows), `causal` and `anchored` (24 rows), of two
    teachers and of two classes a row; configs of two students."""
    folder = tmp_path_factory.mktemp("train")
    make_cache(folder / "classes", [20, 14, 11])
    make_cache(folder / "held", [20], first=500)
    make_cache(folder / "causal", [14, 10], task=CAUSAL, codec="topk:6")
    make_cache(folder / "anchored", [14, 10], task=CAUSAL, codec="anchored:4")
    make_cache(folder / "several", [8], first=300, teachers=2)
    make_cache(folder / "sparse", [9], codec="topk:2", first=500)
    (folder / "bert.json").write_text(json.dumps(BERT))
    (folder / "llama.json").write_text(json.dumps(LLAMA))
    return folder


@pytest.fixture
def options(folder: Path, tmp_path: Path) -> Callable[..., TrainOptions]:
    def make(**changes: Any) -> TrainOptions:
        values: dict[str, Any] = {
            "cache": str(folder / "classes"),
            "student": str(folder / "bert.json"),
            "out": str(tmp_path / "run"),
            "epochs": 2,
        }
        return TrainOptions(**(USUAL | values | changes))

    return make


Make = Callable[..., TrainOptions]


# Options


@given(start=st.floats(0, 1), end=st.floats(0, 1), steps=st.integers(1, 50))
def test_a_schedule_is_linear_from_end_to_end(start: float, end: float, steps: int) -> None:
    schedule = Schedule.parse(f"{start!r}:{end!r}", "alpha", "any", math.isfinite)
    assert schedule.at(0, steps) == start
    if steps > 1:
        assert schedule.at(steps - 1, steps) == pytest.approx(end, abs=1e-12)
        middle = schedule.at(0, 3) + schedule.at(2, 3)
        assert 2 * schedule.at(1, 3) == pytest.approx(middle)


def test_wrong_options_are_told_all_at_once() -> None:
    with pytest.raises(UsageError) as error:
        TrainOptions(
            cache=(),
            student="x",
            out="y",
            alpha=1.5,
            temperature="1:two",
            divergence="kl",  # type: ignore[arg-type]
            batch_size=0,
            patience=3,
            precision="fp8",  # type: ignore[arg-type]
            gpus_per_worker=0.5,
            epochs=0,
            learning_rate=-1,
            fsdp=True,
        )
    for word in (
        "--cache is missing", "alpha", "temperature", "divergence", "batch-size", "patience",
        "precision", "worker gpus is 0.5", "epochs", "learning-rate", "fsdp",
    ):  # fmt: skip
        assert word in str(error.value)


@pytest.mark.parametrize("temperature", ["0", "nan", "inf", "1e6", "1:1001"])
def test_temperatures_whose_loss_would_be_rounding_are_refused(temperature: str) -> None:
    """Times T² of a million, float32 gives a KL of 7 as -1,700,000."""
    with pytest.raises(UsageError, match="temperature is .*, expected more than 0, 1,000 at most"):
        TrainOptions(cache=("x",), student="y", out="z", temperature=temperature)
    TrainOptions(cache=("x",), student="y", out="z", temperature=1000)


def test_caches_are_checked_before_anything_is_written(options: Make, folder: Path) -> None:
    wrong = options(
        cache=str(folder / "causal"),
        eval_cache=str(folder / "held"),
        temperature="1:3",
        divergence="mse",
        best="accuracy",
    )
    with pytest.raises(UsageError) as error:
        train(wrong)
    for word in ("needs a dense cache", "mse", "accuracy", "task of", "temperature 3"):
        assert word in str(error.value)
    assert not Path(wrong.out).exists()


@pytest.mark.parametrize(
    ("caches", "held", "more", "match"),
    [
        # Logits of an ensemble's mean are of the declared temperatures alone.
        (
            ["classes", "several"],
            [],
            {"temperature": "1:2"},
            "dense cache of one teacher: .*several has the mean",
        ),
        (["classes"], ["sparse"], {"divergence": "mse"}, "mse compares all logits"),
        (["classes"], [], {"precision": "fp16"}, "fp16 needs a GPU"),
        (["classes", "causal"], [], {}, "task of"),
    ],
)
def test_every_cache_must_suit(
    options: Make, folder: Path, caches: list[str], held: list[str], more: Any, match: str
) -> None:
    train_on, evaluate_on = ([str(folder / name) for name in names] for names in (caches, held))
    with pytest.raises(UsageError, match=match):
        train(options(cache=train_on, eval_cache=evaluate_on, **more))
    assert not Path(options().out).exists()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({}, "the task of .* is sequence-classification, but .* has causal-lm. Name a cache"),
        ({"task": CAUSAL, "vocab": 70}, "the vocabulary of .* is 70 ids, but .* has 64 ids. Name"),
        ({"task": CAUSAL, "tokenizer": "u"}, "the tokenizer of .* is SHA-256 u, but .* has SHA"),
    ],
)
@pytest.mark.parametrize("more", [{}, {"best": "soft_loss", "divergence": "reverse-kl"}])
def test_an_eval_cache_of_something_else_is_one_line(
    options: Make, folder: Path, tmp_path: Path, values: dict[str, Any], more: Any, match: str
) -> None:
    """Not also what follows from it: its codec, its labels, its temperatures."""
    held = make_cache(tmp_path / "held", [9], temperatures=(3.0,), labelled=False, **values)
    wrong = options(cache=str(folder / "causal"), eval_cache=held.url, **more)
    with pytest.raises(UsageError, match=f"^--eval-cache: {match}.*$") as error:
        train(wrong)
    assert len(str(error.value).splitlines()) == 1
    assert "None" not in str(error.value)


def test_shards_are_grouped_as_the_stream_groups_them(options: Make, folder: Path) -> None:
    usual = TargetStream(str(folder / "classes"), batch_size=8).group
    assert Run.prepare(RunPlan.make(options())).stream.group == usual != 2
    assert Run.prepare(RunPlan.make(options(shuffle_shards=2))).stream.group == 2


# Losses


class ByHand(Trainer):  # type: ignore[misc]
    """HF's Trainer on given batches."""

    def __init__(self, *args: Any, batches: list[Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches = batches

    def get_train_dataloader(self) -> Any:
        return self.batches


def test_hard_labels_alone_train_as_hf_does(options: Make, folder: Path, tmp_path: Path) -> None:
    no_dropout = tmp_path / "bert.json"
    no_dropout.write_text(json.dumps(BERT | {"hidden_dropout_prob": 0.0}))
    chosen = options(student=str(no_dropout), alpha=1, temperature=7, epochs=1)
    train(chosen)

    stream = TargetStream(str(folder / "classes"), batch_size=8, temperature=None)
    batches = [{k: v for k, v in b.items() if k != "count"} for b in stream]
    info = StudentInfo("sequence-classification", 64, 3, ("c0", "c1", "c2"), bos_id=None)
    model = load_student(str(no_dropout), info)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "hf"),
        max_steps=6,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        log_level="error",
        seed=0,
    )
    trainer = ByHand(model=model, args=arguments, batches=batches, train_dataset=[0] * 48)
    trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses(chosen.out) == pytest.approx(theirs, abs=1e-6)
    assert "soft_loss" not in metrics(chosen.out)[0]
    for name, mine in weights(chosen.out).items():
        torch.testing.assert_close(mine, model.state_dict()[name], atol=1e-5, rtol=1e-4)


def test_the_two_losses_add_up_under_schedules(options: Make, folder: Path) -> None:
    chosen = options(alpha="0.9:0.1", temperature="1:3", epochs=1)
    train(chosen)
    lines = metrics(chosen.out)
    assert [round(x["alpha"], 3) for x in lines] == [0.9, 0.74, 0.58, 0.42, 0.26, 0.1]
    assert [round(x["temperature"], 3) for x in lines] == [1, 1.4, 1.8, 2.2, 2.6, 3]
    # The loss divides both parts by all rows; as a figure, the hard one is of the labelled rows.
    stream = TargetStream(str(folder / "classes"), batch_size=8)
    shares = [float((batch["labels"] != -100).double().mean()) for batch in stream]
    assert min(shares) < 1
    for x, share in zip(lines, shares, strict=True):
        both = x["alpha"] * x["hard_loss"] * share + (1 - x["alpha"]) * x["soft_loss"]
        assert x["loss"] == pytest.approx(both, rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_hard_loss_is_the_mean_over_the_labelled_rows(
    options: Make, folder: Path, accumulation: int
) -> None:
    chosen = options(
        student="bilstm", learning_rate=1e-30, epochs=1, logging_steps=100, dropout=0.0,
        gradient_accumulation=accumulation, batch_size=9, eval_cache=str(folder / "classes"),
        **SMALL,
    )  # fmt: skip
    train(chosen)
    logged, evaluated = metrics(chosen.out)
    # The student never changes, and every batch of 9 of the 45 rows is whole.
    stream = TargetStream(str(folder / "classes"), batch_size=9)
    unlabelled = {int((batch["labels"] == -100).sum()) for batch in stream}
    assert len(unlabelled) > 1
    assert logged["hard_loss"] == pytest.approx(evaluated["eval_hard_loss"], rel=1e-5)
    assert logged["soft_loss"] == pytest.approx(evaluated["eval_soft_loss"], rel=1e-5)


def test_a_short_batch_counts_in_the_hard_loss_by_its_labels(
    options: Make, folder: Path, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"student": "bilstm", "learning_rate": 1e-30, "dropout": 0.0}
    for name, every in (("each", 1), ("whole", 100)):
        out = str(tmp_path / name)
        train(options(out=out, logging_steps=every, epochs=1, batch_size=8, **common, **SMALL))
    each = [line["hard_loss"] for line in metrics(tmp_path / "each")]
    stream = TargetStream(str(folder / "classes"), batch_size=8)  # 45 rows: the last five are alone
    known = [(batch["labels"] != -100).double() for batch in stream]
    shares = [float(labels.mean()) for labels in known]
    summed = sum(loss * share for loss, share in zip(each, shares, strict=True))
    rows, labelled = len(torch.cat(known)), int(torch.cat(known).sum())
    (line,) = metrics(tmp_path / "whole")
    assert line["hard_loss"] == pytest.approx(summed / sum(shares), rel=1e-5)
    assert line["hard_loss"] != pytest.approx(summed / len(each) * rows / labelled, rel=1e-4)
    assert min(each) < line["hard_loss"] < max(each)


@pytest.mark.parametrize(("undefined", "patience"), [({2}, None), ({2, 4, 6}, None), ({2, 4}, 2)])
def test_an_evaluation_whose_figure_is_not_defined_is_never_the_best(
    options: Make,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    undefined: set[int],
    patience: int | None,
) -> None:
    """As the correlation of equal scores, and the F1 where no class is a label or predicted."""
    steps, figure = itertools.count(2, 2), figures.figure
    monkeypatch.setattr(
        figures, "figure", lambda *given: {} if next(steps) in undefined else figure(*given)
    )
    result = train(
        options(
            student="bilstm", eval_cache=str(folder / "held"), best="accuracy", eval_steps=2,
            max_steps=6, patience=patience, keep_checkpoints=3, **SMALL,
        )
    )  # fmt: skip
    found = {x["step"]: x for x in metrics(result.out) if "eval_loss" in x}
    assert {step for step, line in found.items() if "eval_accuracy" not in line} == undefined
    assert result.steps == (4 if patience else 6)
    known = {
        step: (x["eval_accuracy"], -x["eval_loss"])
        for step, x in found.items()
        if "eval_accuracy" in x
    }
    assert result.best_step == (max(known, key=known.__getitem__) if known else None)
    chosen = result.best_step or result.steps
    assert result.eval["loss"] == found[chosen]["eval_loss"]
    kept = load_file(Path(result.out, f"checkpoint-{chosen}", "model.safetensors"))
    for name, weight in weights(result.out).items():
        assert torch.equal(weight, kept[f"student.{name}"])


def test_a_loss_of_routers_that_is_asked_for_is_told_to_be_left_out(
    options: Make, folder: Path, tmp_path: Path
) -> None:
    experts = {**LLAMA, "model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
    (tmp_path / "plain.json").write_text(json.dumps(experts))
    (tmp_path / "asks.json").write_text(json.dumps({**experts, "output_router_logits": True}))
    told, found = {}, {}
    for name in ("plain", "asks"):
        lines: list[str] = []
        made = options(
            cache=str(folder / "causal"), student=str(tmp_path / f"{name}.json"), max_steps=2,
            out=str(tmp_path / name),
        )  # fmt: skip
        train(made, report=lines.append)
        told[name] = [line for line in lines if "output_router_logits" in line]
        found[name] = losses(tmp_path / name)
    assert (len(told["plain"]), len(told["asks"])) == (0, 1)
    assert found["plain"] == found["asks"]


def test_without_labels_there_is_no_hard_loss(options: Make, tmp_path: Path) -> None:
    make_cache(tmp_path / "bare", [9], labelled=False)
    bare = str(tmp_path / "bare")
    with pytest.raises(UsageError, match=r"alpha 1 trains on hard labels alone.*--label-column"):
        train(options(cache=bare, alpha=1))
    with pytest.raises(UsageError, match=r"evaluation caches have no hard labels"):
        train(options(eval_cache=bare, best="accuracy"))
    with pytest.raises(UsageError, match=r"evaluation caches have no hard labels"):
        train(options(eval_cache=bare, alpha=1))
    assert not Path(options().out).exists()
    lines: list[str] = []
    result = train(options(cache=bare, eval_cache=bare), report=lines.append)
    assert result.hard_loss is None
    told = "no row of the caches' first shards has a hard label: whatever --alpha says"
    assert [line for line in lines if line.startswith(told)]
    lines.clear()
    train(options(cache=bare, alpha=0, out=str(tmp_path / "soft")), report=lines.append)
    assert not [line for line in lines if line.startswith(told)]
    lines = metrics(result.out)
    assert not any("hard_loss" in line or "eval_hard_loss" in line for line in lines)
    assert result.soft_loss is not None
    assert lines[0]["loss"] == pytest.approx(0.5 * lines[0]["soft_loss"])


def test_a_samples_soft_part_is_called_a_cross_entropy(
    options: Make, folder: Path, tmp_path: Path
) -> None:
    make_cache(tmp_path / "sampled", [14, 10], task=CAUSAL, codec="sample:4")
    result = train(
        options(
            cache=str(tmp_path / "sampled"), student=str(folder / "llama.json"), epochs=1,
            eval_cache=str(tmp_path / "sampled"), best="soft_loss",
        )
    )  # fmt: skip
    assert result.soft_loss is None
    assert result.soft_cross_entropy == metrics(result.out)[-2]["soft_cross_entropy"]
    assert result.eval["soft_cross_entropy"] == metrics(result.out)[-1]["eval_soft_cross_entropy"]
    assert not any("soft_loss" in name for line in metrics(result.out) for name in line)


@pytest.mark.parametrize("accumulation", [pytest.param(2, marks=pytest.mark.exhaustive), 5])
def test_accumulation_takes_the_same_steps(
    options: Make, tmp_path: Path, folder: Path, accumulation: int
) -> None:
    # Batches of 45 rows by 8 leave 5: some slices of the last one have one row, or none.
    for name, student in (("classes", "bert.json"), ("causal", "llama.json")):
        config = json.loads((folder / student).read_text()) | {"hidden_dropout_prob": 0.0}
        path = tmp_path / student
        path.write_text(json.dumps(config))
        common = {"cache": str(folder / name), "student": str(path), "batch_size": 7}
        whole = options(out=str(tmp_path / f"{name}-1"), **common)
        cut = options(out=str(tmp_path / f"{name}-n"), gradient_accumulation=accumulation, **common)
        train(whole)
        train(cut)
        assert losses(cut.out) == pytest.approx(losses(whole.out), abs=1e-5)
        for name_, value in weights(cut.out).items():
            torch.testing.assert_close(value, weights(whole.out)[name_], atol=1e-4, rtol=1e-3)


def test_gradient_checkpointing_changes_nothing_and_bfloat16_little(
    options: Make, folder: Path, tmp_path: Path
) -> None:
    common = {"cache": str(folder / "causal"), "student": str(folder / "llama.json")}
    for name, more in (
        ("plain", {}),
        ("again", {"gradient_checkpointing": True}),
        ("low", {"precision": "bf16"}),
    ):
        train(options(out=str(tmp_path / name), **common, **more))
    plain = losses(tmp_path / "plain")
    assert losses(tmp_path / "again") == pytest.approx(plain, abs=1e-6)
    low = losses(tmp_path / "low")
    assert low == pytest.approx(plain, abs=0.02)
    assert low != pytest.approx(plain, abs=1e-6)
    with pytest.raises(UsageError, match="precision: auto -> bf16"):
        train(options(out=str(tmp_path / "plain"), precision="bf16", **common))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_float16_is_scaled(options: Make, folder: Path, tmp_path: Path) -> None:
    common = {"cache": str(folder / "causal"), "student": str(folder / "llama.json"), "epochs": 4}
    train(options(out=str(tmp_path / "plain"), **common))
    train(options(out=str(tmp_path / "half"), precision="fp16", **common))
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "plain"), abs=0.05)
    assert list(Path(tmp_path, "half").glob("checkpoint-*/scaler.pt"))


def test_tensorboard_gets_the_curves(options: Make, folder: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is optional"
    )
    chosen = options(report_to="auto", eval_cache=str(folder / "held"))
    train(chosen)
    (events,) = Path(chosen.out).rglob("events.out.tfevents.*")
    log = accumulator.EventAccumulator(str(events.parent)).Reload()
    drawn = [event.value for event in log.Scalars("train/loss")]
    assert drawn == pytest.approx(losses(chosen.out))
    assert {"train/hard_loss", "train/soft_loss", "eval/loss", "eval/accuracy"} <= set(
        log.Tags()["scalars"]
    )


def test_each_training_is_a_run_of_weights_and_biases(
    options: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is optional")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    seen: dict[str, float] = {}

    def look(_: TrainProgress) -> None:
        seen[wandb.run.name] = wandb.run.summary.get("train/loss")  # the line before this one

    for name in ("one", "two"):
        chosen = options(out=str(tmp_path / name), report_to="wandb", student="bilstm", **SMALL)
        train(chosen, on_progress=look)
        assert wandb.run is None
        assert seen[name] == pytest.approx(losses(chosen.out)[-2])
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    with wandb.init(project="mine") as mine:
        train(options(report_to="wandb", student="bilstm", **SMALL))
        assert wandb.run is mine


def test_trackers_that_are_not_there_are_told(options: Make, tmp_path: Path) -> None:
    missing = next(
        name
        for name in INTEGRATION_TO_CALLBACK
        if name not in get_available_reporting_integrations()
    )
    with pytest.raises(UsageError) as told:
        train(options(report_to=("auto", "tensorbord", missing)))
    assert "report_to is 'tensorbord', expected one of auto, none, " in str(told.value)
    assert f"report_to is {missing}, which is not installed" in str(told.value)
    assert not (tmp_path / "run").exists()


# Resume


@pytest.mark.parametrize("accumulation", [1, 2])
def test_theta_goes_on_to_the_bit(
    options: Make, folder: Path, tmp_path: Path, accumulation: int
) -> None:
    common = {
        "cache": str(folder / "anchored"), "student": str(folder / "llama.json"), "alpha": 0.1,
        "save_steps": 2, "epochs": 3, "temperature": 2, "gradient_accumulation": accumulation,
    }  # fmt: skip
    whole, halves = (options(out=str(tmp_path / name), **common) for name in ("whole", "halves"))
    train(whole)
    with pytest.raises(StopError):
        train(halves, on_progress=stop_at(5))
    train(halves)
    assert same(halves.out, whole.out)
    thetas = [line["anchor"] for line in metrics(whole.out)]
    assert len(set(thetas[1:])) > 5
    if accumulation == 2:  # another way of cutting a step changes rounding alone
        one = options(out=str(tmp_path / "one"), **common | {"gradient_accumulation": 1})
        train(one)
        same_metrics(metrics(one.out), metrics(whole.out), 1e-3, 2e-5)


def test_an_anchor_may_be_fixed_or_off(options: Make, folder: Path, tmp_path: Path) -> None:
    make_cache(tmp_path / "sampled", [14, 10], task=CAUSAL, codec="sample:4")
    common = {"student": str(folder / "llama.json"), "alpha": 0.1, "epochs": 1, "temperature": 2}
    anchored = {"cache": str(folder / "anchored"), **common}
    runs = {
        name: options(out=str(tmp_path / name), **more)
        for name, more in {
            "sample": {"cache": str(tmp_path / "sampled"), **common},
            "off": {"anchor": "off", **anchored},
            "half": {"anchor": 0.5, **anchored},
            "auto": anchored,
        }.items()
    }
    for run in runs.values():
        train(run)
    assert metrics(runs["off"].out) == metrics(runs["sample"].out)
    assert {line["anchor"] for line in metrics(runs["half"].out)} == {0.5}
    # The first step's loss is the sample's; its gradient is where theta comes in.
    first = {name: metrics(run.out)[0] for name, run in runs.items()}
    assert first["half"]["loss"] == first["auto"]["loss"] == first["sample"]["loss"]
    assert first["half"]["grad_norm"] != first["sample"]["grad_norm"]
    assert first["auto"]["grad_norm"] == first["sample"]["grad_norm"]
    with pytest.raises(UsageError, match=r"anchor: 0\.5 -> auto"):
        train(options(out=runs["half"].out, **anchored))
    with pytest.raises(UsageError, match="--anchor is 1, but the cache is sample:4"):
        train(options(anchor=1, **{"cache": str(tmp_path / "sampled"), **common}))
    for wrong in ("on", -0.1, "nan", 2):
        with pytest.raises(UsageError, match="expected auto, off, or 0 to 1"):
            options(anchor=wrong, **anchored)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_window_of_logging_is_whole_after_a_resume(
    options: Make, tmp_path: Path, accumulation: int
) -> None:
    common = {
        "save_steps": 4, "logging_steps": 5, "epochs": 3, "alpha": "0.8:0.2",
        "gradient_accumulation": accumulation,
    }  # fmt: skip
    whole = options(out=str(tmp_path / "whole"), **common)
    train(whole)
    halves = options(out=str(tmp_path / "halves"), **common)
    for step in (5, 10):  # back to checkpoints at 4 and 8: four and three steps into a window
        with pytest.raises(StopError):
            train(halves, on_progress=stop_at(step))
    epochs: dict[int, float] = {}
    result = train(halves, on_progress=lambda now: epochs.update({now.step: now.epoch}))
    assert epochs == pytest.approx({n: n // 6 + n % 6 * 8 / 45 for n in (10, 15, 18)})
    assert (result.steps, result.rows, result.epochs) == (18, 135, 3.0)
    assert [line["step"] for line in metrics(halves.out)] == [5, 10, 15, 18]
    assert metrics(halves.out) == metrics(whole.out)


def test_train_begins_at_the_first_row_however_far_the_stream_was_read(
    folder: Path, tmp_path: Path
) -> None:
    info = StudentInfo("sequence-classification", 64, 3)
    (tmp_path / "bert.json").write_text(json.dumps(BERT | {"hidden_dropout_prob": 0.0}))

    def trainer(stream: TargetStream) -> DistillationTrainer:
        arguments = TrainingArguments(
            str(tmp_path / "run"), num_train_epochs=2, use_cpu=True, disable_tqdm=True,
            save_strategy="no", log_level="error", logging_steps=1, learning_rate=0.0,
            report_to="none",
        )  # fmt: skip
        inner = load_student(str(tmp_path / "bert.json"), info)
        return DistillationTrainer(
            model=DistilledStudent(inner, info.task), args=arguments, train_dataset=stream
        )

    def losses_of(trained: DistillationTrainer) -> list[float]:
        return [line["loss"] for line in trained.state.log_history if "loss" in line]

    cache = str(folder / "classes")
    fresh = trainer(TargetStream(cache, batch_size=8))
    fresh.train()
    want = losses_of(fresh)
    assert len(want) == 12
    read = TargetStream(cache, batch_size=8)
    for _ in read:
        break
    looked = trainer(read)
    looked.train()
    assert losses_of(looked) == want
    looked.train()  # learning rate 0: the same losses again
    assert losses_of(looked)[-12:] == want
    begun = TargetStream(cache, batch_size=8, cursor={"epoch": 0, "rows_seen": 16})
    with pytest.raises(UsageError, match=r"begins at .*16.*, and train\(\) at its first row"):
        trainer(begun).train()


def test_a_changed_cache_or_option_is_refused(options: Make, folder: Path, tmp_path: Path) -> None:
    chosen = options(save_steps=3)
    with pytest.raises(StopError):
        train(chosen, on_progress=stop_at(4))
    with pytest.raises(UsageError, match=r"alpha: 0\.5 -> 0\.25"):
        train(options(save_steps=3, alpha=0.25))
    with pytest.raises(UsageError, match="caches: "):
        train(options(save_steps=3, cache=str(folder / "held")))
    with pytest.raises(UsageError, match="never"):
        train(options(save_steps=3, resume="never"))
    with pytest.raises(UsageError, match=r"no kdcache_state\.json"):
        train(options(resume=str(tmp_path)))
    assert train(options(save_steps=2, logging_steps=5)).steps == 12


def test_a_checkpoint_of_another_trainer_is_refused(options: Make, tmp_path: Path) -> None:
    """Those of finetune have a seal of the same name, and no cursor."""
    other = tmp_path / "checkpoint-6"
    other.mkdir()
    checkpoints._seal(other, {"seconds": 1.0, "identity": {}})
    with pytest.raises(UsageError, match="checkpoint-6 is not a checkpoint of `kdcache train`"):
        train(options(resume=str(other)))


def test_a_finished_run_is_left_alone(options: Make) -> None:
    first = train(options())
    stamp = Path(first.out, "train.json").stat().st_mtime_ns
    again = train(options(logging_steps=3))
    assert not again.made
    assert (again.loss, again.steps, again.out) == (first.loss, first.steps, first.out)
    assert Path(first.out, "train.json").stat().st_mtime_ns == stamp
    with pytest.raises(UsageError, match="epochs: 2 -> 3"):
        train(options(epochs=3))
    before = weights(first.out)
    Path(first.out, "config.json").unlink()  # whoever removes that has no model
    assert train(options()).made
    assert Path(first.out, "config.json").is_file()
    assert all(torch.equal(weights(first.out)[k], w) for k, w in before.items())


def test_a_run_killed_while_its_files_move_is_finished_by_the_same_command(
    options: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    move, out = Path.replace, Path(options().out)

    def stop(path: Path, target: Path) -> Path:
        if target == out / "model.safetensors":
            raise StopError
        return move(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", stop)
        with pytest.raises(StopError):
            train(options())
    assert (out / "config.json").is_file()
    assert not (out / "train.json").exists()
    again = train(options())
    assert again.made
    assert not (out / "student.tmp").exists()
    assert same(again.out, train(options(out=options().out + "-whole")).out)


def test_a_run_reports_its_words(options: Make, folder: Path) -> None:
    words = {"student": "bilstm", "epochs": 1, **SMALL}
    result = train(options(**words, eval_cache=str(folder / "held"), max_words=40))
    own = AutoTokenizer.from_pretrained(result.out)
    assert result.vocabulary == len(own) == 40
    for name, share in (("classes", result.unknown), ("held", result.eval_unknown)):
        cache = Cache.open(str(folder / name))
        texts = [text for span in range(cache.spec.spans) for text in cache.read(span).texts or []]
        ids = [own(text)["input_ids"] for text in texts]
        assert share == pytest.approx(sum(row.count(1) for row in ids) / sum(map(len, ids)))
        assert 0 < share < 1
    command = [
        *("train", "--cache", str(folder / "classes"), "--eval-cache", str(folder / "held")),
        *("--student", "bilstm", "--bilstm", "hidden-size=8,max-words=40", "--max-steps", "1"),
        *("--report-to", "none", "--out", options().out + "-printed"),
    ]
    line = f"vocabulary of 40 (unknown: {result.unknown:.1%} of the words, "
    assert line + f"{result.eval_unknown:.1%} in" in CliRunner().invoke(cli, command).output
    whole = train(options(**words, out=options().out + "-whole"))
    assert (whole.unknown, whole.eval_unknown, whole.pretrained) == (0, None, None)
    known = [word for word in own.get_vocab() if "<" not in word][:7]
    vectors = folder / "vectors.txt"
    vectors.write_text("".join(f"{word} 0.5 0.25\n" for word in [*known, "of-no-text"]))
    command[-1] += "-vectors"
    printed = CliRunner().invoke(cli, [*command, "--embeddings", str(vectors)]).output
    assert "in evaluation); word vectors for 7 of them" in printed
    assert json.loads(Path(command[-1], "train.json").read_text())["result"]["pretrained"] == 7
    plain = train(options(out=options().out + "-plain", epochs=1))
    assert (plain.vocabulary, plain.unknown, plain.eval_unknown) == (None, None, None)


# Evaluation


def test_the_best_checkpoint_becomes_the_student(
    options: Make, folder: Path, tmp_path: Path
) -> None:
    chosen = options(
        student="bilstm",
        eval_cache=str(folder / "held"),
        eval_steps=2,
        patience=2,
        epochs=40,
        **SMALL,
    )
    result = train(chosen)
    lines = [x for x in metrics(chosen.out) if "eval_loss" in x]
    best = min(lines, key=lambda x: x["eval_loss"])
    assert result.best_step == best["step"] < lines[-1]["step"]
    assert result.eval["loss"] == best["eval_loss"]
    assert result.steps < 240  # patience ended it
    assert len(lines) == lines.index(best) + 3

    # The metrics are those of the saved student on the rows of the cache.
    student = AutoModelForSequenceClassification.from_pretrained(result.out).eval()
    tokenize = HfTokenize(AutoTokenizer.from_pretrained(result.out), 512)
    (batch,) = TargetStream(str(folder / "held"), batch_size=20, shuffle=False, tokenize=tokenize)
    with torch.no_grad():
        logits = student(batch["input_ids"], batch["attention_mask"]).logits
    labelled = batch["labels"] != -100
    right = (logits.argmax(-1) == batch["labels"])[labelled].float().mean()
    hard = torch.nn.functional.cross_entropy(logits, batch["labels"])
    teacher = torch.log_softmax(batch["targets"].logits, -1)
    soft = (teacher.exp() * (teacher - torch.log_softmax(logits, -1))).sum(-1).mean()
    assert result.eval["accuracy"] == pytest.approx(float(right))
    assert result.eval["hard_loss"] == pytest.approx(float(hard), rel=1e-5)
    assert result.eval["soft_loss"] == pytest.approx(float(soft), rel=1e-5)
    share = float(labelled.float().mean())
    assert result.eval["loss"] == pytest.approx(
        0.5 * float(hard) * share + 0.5 * float(soft), rel=1e-5
    )


# Students


def test_a_language_model_learns_and_is_saved(options: Make, folder: Path) -> None:
    chosen = options(
        cache=str(folder / "causal"), student=str(folder / "llama.json"), temperature=2, epochs=8,
        eval_cache=str(folder / "causal"), precision="float32", alpha=0.2,
    )  # fmt: skip
    result = train(chosen)
    lines = [x for x in metrics(chosen.out) if "eval_loss" in x]
    assert lines[-1]["eval_soft_loss"] < lines[0]["eval_soft_loss"]
    assert "accuracy" not in result.eval
    model = AutoModelForCausalLM.from_pretrained(result.out)
    assert model.config.use_cache
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("held_out", ["topk:6", "dense"])
def test_an_eval_cache_may_have_another_codec(
    options: Make, folder: Path, tmp_path: Path, held_out: str
) -> None:
    make_cache(tmp_path / "sampled", [14, 10], task=CAUSAL, codec="sample:4")
    held = make_cache(tmp_path / "held", [9], task=CAUSAL, codec=held_out, first=500)
    common = {
        "cache": str(tmp_path / "sampled"), "student": str(folder / "llama.json"), "temperature": 2,
        "epochs": 2,
    }  # fmt: skip
    alone = train(options(**common, out=str(tmp_path / "alone")))
    result = train(options(**common, eval_cache=held.url, eval_steps=2, best="soft_loss"))
    losses = [
        {x["step"]: x["loss"] for x in metrics(run.out) if "loss" in x} for run in (alone, result)
    ]
    assert losses[0] == losses[1]  # training goes on with its own codec
    student = DistilledStudent(
        AutoModelForCausalLM.from_pretrained(result.out), CAUSAL,
        vocab_size=held.spec.vocab_size,
    ).eval()  # fmt: skip
    total = count = 0.0
    with torch.no_grad():
        for batch in TargetStream(held, batch_size=4, temperature=2.0):
            total += float(student(**batch).soft_loss) * float(batch["count"])
            count += float(batch["count"])
    assert result.eval["soft_loss"] == pytest.approx(total / count, rel=1e-4)


# Other loops


@pytest.mark.parametrize("kind", [Trainer, DistillationTrainer])
@pytest.mark.parametrize("name", ["classes", "causal"])
def test_a_plain_trainer_accumulates(kind: type, name: str, folder: Path, tmp_path: Path) -> None:
    """Batches bring the count of their own positions, which must not win over that of the step."""
    cache = Cache.open(str(folder / name))
    spec = cache.spec
    info = StudentInfo(spec.task, 64, spec.num_labels)
    config = {"classes": BERT | {"hidden_dropout_prob": 0.0}, "causal": LLAMA}[name]
    (tmp_path / "student.json").write_text(json.dumps(config))
    found = []
    for slices in (1, 2):
        student = DistilledStudent(load_student(str(tmp_path / "student.json"), info), spec.task)
        trainer = kind(
            model=student,
            args=TrainingArguments(
                str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=8 // slices,
                gradient_accumulation_steps=slices, logging_steps=1, save_strategy="no",
                remove_unused_columns=False, label_names=["labels"], use_cpu=True,
                disable_tqdm=True, log_level="error", report_to="none", seed=0,
            ),
            train_dataset=TargetDataset(cache),
            data_collator=Collator(pad_id=spec.pad_id),
        )  # fmt: skip
        trainer.train()
        logs = [line for line in trainer.state.log_history if "loss" in line]
        found.append([(line["loss"], line["grad_norm"]) for line in logs])
    for one, both in zip(*found, strict=True):
        assert both == pytest.approx(one, rel=1e-4)


# Workers


def on_two_workers(options: TrainOptions) -> set[str]:
    """Train in two processes, as torchrun starts them; the kinds of parameters they had."""
    ends = launch(options, 2)
    for end in ends:
        assert end.error is None, end.error
        assert end.exitcode == 0
    return {*ends[0].kinds, *ends[1].kinds}


def same_metrics(
    mine: list[dict[str, Any]], theirs: list[dict[str, Any]], rel: float, abs: float
) -> None:
    assert len(mine) == len(theirs)
    for x, y in zip(mine, theirs, strict=True):
        assert x == pytest.approx(y, rel=rel, abs=abs)


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("name", "more"),
    [
        pytest.param("classes", {}, marks=pytest.mark.exhaustive),
        ("causal", {"lora": "r=2", "gradient_checkpointing": True}),
        ("anchored", {"fsdp": True, "gradient_checkpointing": True}),
    ],
    ids=["classes", "causal-lora", "anchored-fsdp"],
)
def test_two_workers_take_the_steps_of_one(
    options: Make, folder: Path, tmp_path: Path, name: str, more: dict[str, Any]
) -> None:
    student = "bert.json" if name == "classes" else "llama.json"
    path = tmp_path / student
    path.write_text(
        json.dumps(json.loads((folder / student).read_text()) | {"hidden_dropout_prob": 0.0})
    )
    lora = {name: more[name] for name in ("lora",) if name in more}
    if lora:
        pytest.importorskip("peft", reason="peft is optional")
        config = AutoConfig.for_model(**LLAMA, vocab_size=64, pad_token_id=0)
        path = tmp_path / "base"
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    common = {
        "cache": str(folder / name), "student": str(path), "batch_size": 11, "epochs": 2,
        "eval_cache": str(folder / name), "temperature": 2, "gradient_accumulation": 2, **lora,
    }  # fmt: skip
    alone = options(out=str(tmp_path / "alone"), streams=2, **common)
    train(alone)
    both = options(out=str(tmp_path / "both"), num_workers=2, **common | more)
    kinds = on_two_workers(both)
    assert kinds == ({"DTensor"} if "fsdp" in more else {"Parameter"})
    same_metrics(metrics(both.out), metrics(alone.out), 1e-3, 2e-5)
    assert weights(both.out).keys() == weights(alone.out).keys()
    for key, value in weights(both.out).items():
        torch.testing.assert_close(value, weights(alone.out)[key], atol=1e-4, rtol=1e-3)
    if name != "classes":
        AutoModelForCausalLM.from_pretrained(both.out)
    if "fsdp" in more:  # a checkpoint of sharded workers holds whole weights, as any other
        last = sorted(path.name for path in Path(both.out).glob("checkpoint-*"))[-1]
        mine, theirs = (weights(Path(run.out, last)) for run in (both, alone))
        for key, value in theirs.items():
            torch.testing.assert_close(mine[key], value, atol=1e-4, rtol=1e-3)
    if name == "anchored":
        assert any(0 < line.get("anchor", 0) < 1 for line in metrics(both.out))
    assert not train(both).made


@pytest.mark.end_to_end
@pytest.mark.parametrize("first", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_another_number_of_workers_goes_on(
    options: Make, folder: Path, tmp_path: Path, first: int
) -> None:
    common = {
        "cache": str(folder / "anchored"), "student": str(folder / "llama.json"), "batch_size": 7,
        "epochs": 3, "save_steps": 3, "keep_checkpoints": 9, "alpha": "0.8:0.2",
    }  # fmt: skip
    # The run keeps the streams that its first workers gave it.
    alone = options(out=str(tmp_path / "alone"), streams=first, **common)
    train(alone)
    runs = {n: options(out=str(tmp_path / "run"), num_workers=n, **common) for n in (1, 2)}

    def work(workers: int) -> None:
        if workers == 1:
            train(runs[1])
        else:
            on_two_workers(runs[2])

    work(first)
    # As if it had stopped after 6 of 12 steps, in the middle of the second epoch.
    Path(runs[first].out, "train.json").unlink()
    for checkpoint in ("checkpoint-9", "checkpoint-12"):
        Path(runs[first].out, checkpoint, "kdcache_state.json").unlink()
    before = metrics(runs[first].out)
    work(3 - first)
    found = metrics(runs[first].out)
    assert [line["step"] for line in found] == list(range(1, 13))
    assert found[:6] == before[:6]
    # The later steps were taken anew, by another number of workers: the sums round differently.
    assert found[6:] != before[6:]
    same_metrics(found, metrics(alone.out), 1e-3, 2e-5)
    for key, value in weights(runs[first].out).items():
        torch.testing.assert_close(value, weights(alone.out)[key], atol=1e-4, rtol=1e-3)
    assert not any(train(run).made for run in runs.values())
    with pytest.raises(UsageError, match=f"streams: {first} -> 3"):
        train(options(out=runs[first].out, streams=3, **common))


@pytest.mark.end_to_end
def test_sharded_workers_in_bfloat16_go_on_to_the_bit(
    options: Make, folder: Path, tmp_path: Path
) -> None:
    common = {
        "cache": str(folder / "causal"), "student": str(folder / "llama.json"), "batch_size": 11,
        "eval_cache": str(folder / "causal"), "temperature": 2, "precision": "bf16",
    }  # fmt: skip
    alone = options(out=str(tmp_path / "alone"), streams=2, **common)
    train(alone)
    both = options(out=str(tmp_path / "both"), num_workers=2, fsdp=True, **common)
    on_two_workers(both)
    whole, trained = metrics(both.out), weights(both.out)
    same_metrics(whole, metrics(alone.out), 0.05, 2e-3)
    # The loss is computed in float32 and arrives so.
    assert any(float(torch.tensor(x).bfloat16()) != x for x in losses(both.out))
    Path(both.out, "train.json").unlink()
    for path in sorted(Path(both.out, "checkpoint-6").iterdir(), reverse=True):
        path.unlink()
    on_two_workers(both)
    assert metrics(both.out) == whole
    assert all(torch.equal(weights(both.out)[name], trained[name]) for name in trained)
    with pytest.raises(UsageError, match="fsdp: True -> False"):
        train(options(out=both.out, **common))


def test_only_hugging_face_students_are_sharded(options: Make) -> None:
    with pytest.raises(UsageError, match="--fsdp shards the layers of a Hugging Face student"):
        make_student(RunPlan.make(options(student="bilstm", num_workers=2, fsdp=True, **SMALL)))


PORTS = """
import ipaddress, os
from pathlib import Path
import psutil
from kdcache.student import load_student


def make(info):
    for port in psutil.Process().net_connections("inet"):
        ip = ipaddress.ip_address(port.laddr.ip.removeprefix("::ffff:"))
        with Path("ports.txt").open("a") as file:
            if not port.raddr:
                file.write(f"{os.getpid()} {ip} {ip.is_loopback}\\n")
    return load_student("bert.json", info)
"""


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_ray_train_runs_two_workers(
    options: Make, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing outside this machine can reach them: they are of a Ray of our own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "listening.py").write_text(PORTS)
    (tmp_path / "bert.json").write_text(json.dumps(BERT | {"hidden_dropout_prob": 0.0}))
    alone = options(out=str(tmp_path / "alone"), student="bert.json", streams=2)
    train(alone)
    both = options(out=str(tmp_path / "both"), student="listening:make", num_workers=2)
    seen: list[int] = []
    result = train(both, on_progress=lambda now: seen.append(now.step))
    assert result.made
    assert seen == list(range(1, 13))
    assert losses(both.out) == pytest.approx(losses(alone.out), abs=1e-4)
    ports = [line.split() for line in (tmp_path / "ports.txt").read_text().splitlines()]
    assert len({process for process, _, _ in ports}) == 2
    assert [ip for _, ip, private in ports if private != "True"] == []
