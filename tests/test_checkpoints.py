"""The checkpoint that becomes the student, a line where even that one learnt nothing, and the end
of trainings whose loss or gradient is not finite: nothing is saved of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from make_caches import make_cache, word_tokenizer
from safetensors.torch import load_file
from small_runs import SMALL, USUAL, metrics
from torch import nn
from transformers import BertConfig, BertModel, Trainer

from kdcache.commands.finetune.finetune import finetune
from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.commands.finetune.trainer import best_scores
from kdcache.commands.run_folder import read_metrics
from kdcache.commands.train.callbacks import Patience
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.errors import UsageError
from kdcache.loss.metrics import micro_f1
from kdcache.student.checkpoints import CheckpointingTrainer, Watch, is_whole
from kdcache.student.one_answer import OneAnswer, little_learnt
from kdcache.student.trainer import DistillationTrainer


def chosen(figures: list[tuple[float, float]], *, rises: bool = True) -> Any:
    """The state after evaluations with these figures and losses, at steps 1, 2, and so on."""
    args = SimpleNamespace(metric_for_best_model="eval_f1", greater_is_better=rises)
    state = SimpleNamespace(best_global_step=None, best_metric=None, log_history=[])
    trainer = SimpleNamespace(args=args, state=state)
    for step, (value, loss) in enumerate(figures, 1):
        line = {"eval_f1": value, "eval_loss": loss}
        state.global_step = step
        state.log_history += [{"loss": 1.0, "step": step}, {**line, "step": step}]
        CheckpointingTrainer._determine_best_metric(trainer, line, None)  # type: ignore[arg-type]
    return state


@pytest.mark.parametrize(
    ("figures", "rises", "best"),
    [
        ([(0.0, 3.0), (0.0, 2.0), (0.0, 2.5)], True, 2),
        ([(0.5, 3.0), (0.0, 2.0)], True, 1),
        ([(0.5, 3.0), (0.5, 3.0)], True, 1),
        ([(0.5, 3.0), (0.5, 2.0)], False, 2),
        ([(0.5, 1.0), (0.4, 2.0)], False, 2),
        ([(float("nan"), 1.0), (0.1, 2.0), (float("nan"), 0.5)], True, 2),
        ([(0.1, float("nan")), (0.1, 2.0)], True, 1),
        ([(float("nan"), 1.0)], True, None),
    ],
)
def test_of_equal_checkpoints_the_one_of_lower_loss_is_the_best(
    figures: list[tuple[float, float]], rises: bool, best: int | None
) -> None:
    state = chosen(figures, rises=rises)
    assert state.best_global_step == best
    assert state.best_metric == (None if best is None else figures[best - 1][0])


def test_patience_and_the_figures_of_a_teacher_follow_that_choice() -> None:
    state = chosen([(0.0, 3.0), (0.0, 2.0), (0.0, 2.5)])
    args = SimpleNamespace(metric_for_best_model="eval_f1", greater_is_better=True)
    for loss, stops in ((1.9, False), (2.1, True)):
        control = SimpleNamespace(should_training_stop=False)
        state.log_history[5] |= {"eval_loss": loss}
        Patience(1).on_evaluate(args, state, control, state.log_history[5])  # type: ignore[arg-type]
        assert control.should_training_stop == stops
    options = SimpleNamespace(task="token-classification")
    assert best_scores(state, options) == {"f1": 0.0}  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_whose_figure_stays_at_nothing_ends_with_its_lowest_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As the F1 of a tagger of which no entity is right."""
    make_cache(tmp_path / "train", [20, 14, 11])
    make_cache(tmp_path / "held", [20], first=500)
    monkeypatch.setattr("kdcache.student.figures.figure", lambda *_: {"accuracy": 0.0})
    options: dict[str, Any] = {
        "cache": str(tmp_path / "train"), "eval_cache": str(tmp_path / "held"), "max_steps": 8,
        "eval_steps": 2, "student": "bilstm", "best": "accuracy", "out": str(tmp_path / "run"),
    }  # fmt: skip
    result = train(TrainOptions(**(USUAL | options | SMALL)))
    losses = {x["step"]: x["eval_loss"] for x in metrics(result.out) if "eval_loss" in x}
    assert result.best_step == min(losses, key=losses.__getitem__) > 2
    assert "no better than one answer for all" in caplog.text
    assert result.warning.endswith("It had 8 steps: give it 500 or more (--epochs).")


@pytest.mark.parametrize(
    ("task", "labels", "found", "said"),
    [
        ("sequence-classification", [0, 0, 1, -100], {"accuracy": 2 / 3}, "no better"),
        ("sequence-classification", [0, 0, 1, -100], {"accuracy": 0.7}, "hardly better"),
        ("sequence-classification", [0, 0, 1, -100], {"accuracy": 0.74}, ""),
        ("sequence-classification", [0, 1], {"hard_loss": 1.1}, "no better"),
        ("sequence-classification", [0, 0], {"accuracy": 1.0}, ""),
        ("token-classification", [0, 0, 1, -101, -100], {"accuracy": 0.5}, "accuracy 50.0% here"),
        ("token-classification", [0, 0, 1], {"accuracy": 0.9, "f1": 0.0}, "entity F1 0.0% here"),
        ("regression", [1.0, 3.0, np.nan], {"hard_loss": 1.5}, "1.5 here, and 1 of the mean score"),
        ("regression", [1.0, 3.0, np.nan], {"mse": 0.9}, ""),
        ("regression", [1.0, 3.0], {"pearson": 0.9}, ""),
        (
            "multi-label-classification",
            [[0, 1], [1, 1]],
            {"micro_f1": 0.5},
            "here, and 85.7%",
        ),
        ("causal-lm", [0, 0, 1, 1, -100], {"accuracy": 0.9, "hard_loss": 0.95}, "no better"),
        ("causal-lm", [0, 0, 1, 1, -100], {"accuracy": 0.1, "cross_entropy": 0.6}, ""),
        ("causal-lm", [-100], {"cross_entropy": 9.0}, ""),
    ],
)
def test_a_model_hardly_better_than_one_answer_for_all_is_told(
    task: str, labels: Any, found: dict[str, float], said: str
) -> None:
    one = OneAnswer(task, 2, ("O", "B-PER"))
    one.add(np.array(labels))
    text = little_learnt(task, found, one.figures(), "here", 15)
    assert np.isfinite(list(one.figures().values())).all()
    assert said in text
    assert bool(text) == bool(said)
    assert ("It had 15 steps: give it 500" in text) == bool(said)


def test_one_answer_is_the_best_of_its_kind() -> None:
    """Counts of parts add up, a rare id is not foreseen, and nothing constant has a better F1."""
    rng = np.random.default_rng(0)
    ids = rng.zipf(1.5, 4000).clip(max=999)
    parts = [OneAnswer("causal-lm", 1000) for _ in range(3)]
    parts[0].add(ids[:1000])
    parts[1].add(ids[1000:])
    parts[2].merge(parts[0])
    parts[2].merge(parts[1])
    found = parts[2].figures()
    counts = np.bincount(ids, minlength=1000)
    entropy = -float(np.sum(counts[counts > 0] / 4000 * np.log(counts[counts > 0] / 4000)))
    assert entropy < found["cross_entropy"] < entropy + 0.2
    assert found["accuracy"] == counts.max() / 4000
    alone = OneAnswer("causal-lm", 50_000)
    alone.add(np.arange(100))  # each once: a model that had counted itself would say log(100)
    assert alone.figures()["cross_entropy"] > np.log(50_000)
    truth = (rng.random((300, 6)) < [0.8, 0.6, 0.4, 0.3, 0.1, 0.02]).astype(int)
    several = OneAnswer("multi-label-classification", 6)
    several.add(truth)
    every = [np.array([i >> k & 1 for k in range(6)], bool) for i in range(1, 64)]
    best = max(micro_f1(truth, np.broadcast_to(one, truth.shape)) for one in every)
    assert several.figures()["micro_f1"] == pytest.approx(best)


# A training that diverges


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], None]:
    """Spoils the loss of a step, or the gradient of a parameter."""

    def spoil(step: int, name: str) -> None:
        own = DistillationTrainer.compute_loss

        def compute_loss(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            loss = own(self, model, *args, **kwargs)
            if self.state.global_step + 1 != step:
                return loss
            if not name:
                return loss * torch.inf
            weight = dict(model.named_parameters())[name]
            hook = weight.register_hook(lambda gradient: gradient * torch.nan)
            weight.register_post_accumulate_grad_hook(lambda _: hook.remove())
            return loss

        monkeypatch.setattr(DistillationTrainer, "compute_loss", compute_loss)

    return spoil


@pytest.mark.parametrize("name", ["", "student.dense.weight"])
@pytest.mark.parametrize("every", [{"logging_steps": 1}, {"logging_steps": 100}])
@pytest.mark.slow
def test_a_training_ends_at_the_step_and_keeps_the_checkpoint_before(
    tmp_path: Path, spoilt: Callable[[int, str], None], name: str, every: dict[str, int]
) -> None:
    make_cache(tmp_path / "train", [20, 14, 11])
    out = tmp_path / "run"
    options: dict[str, Any] = {
        "cache": str(tmp_path / "train"), "student": "bilstm", "out": str(out), "save_steps": 4,
        "max_steps": 12, **every,
    }  # fmt: skip
    spoilt(8, name)
    what = f"the gradient of {name.removeprefix('student.')}" if name else "the loss"
    with pytest.raises(UsageError, match=r"diverged at step 8 \(rows 9 to 16 of epoch 2\)") as told:
        train(TrainOptions(**(USUAL | options | SMALL)))
    assert f"{what} is not finite" in str(told.value)
    assert "checkpoint-4 is whole" in str(told.value)
    left = {path.name for path in out.iterdir()} - {".lock", "metrics.jsonl"}
    assert left == {"checkpoint-4"}
    assert is_whole(out / "checkpoint-4")
    kept = load_file(out / "checkpoint-4" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in kept.values())
    assert all(line["step"] < 8 for line in read_metrics(out))


@pytest.mark.slow
def test_a_run_of_one_step_too(tmp_path: Path, spoilt: Callable[[int, str], None]) -> None:
    make_cache(tmp_path / "train", [20])
    spoilt(1, "student.dense.weight")
    options = {"cache": str(tmp_path / "train"), "student": "bilstm", "out": str(tmp_path / "run")}
    with pytest.raises(UsageError, match="no checkpoint was taken before"):
        train(TrainOptions(**(USUAL | options | SMALL | {"max_steps": 1, "logging_steps": 9})))
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_fine_tuning_too(tmp_path: Path) -> None:
    size = {"vocab_size": 64, "max_position_embeddings": 32, "hidden_size": 16}
    BertModel(
        BertConfig(num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **size)
    ).save_pretrained(tmp_path / "bert")
    for file, content in word_tokenizer().items():
        (tmp_path / "bert" / file).write_bytes(content)
    lines = [{"text": f"w{10 + i}", "label": i % 2} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = FinetuneOptions(
        model=str(tmp_path / "bert"), corpus=(str(tmp_path / "rows.jsonl"),),
        out=str(tmp_path / "teacher"), batch_size=5, learning_rate=1e38, max_length=8, warmup=0.0,
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"training diverged at step [23]: "):
        finetune(options)
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize(("scaler", "found"), [(None, (1, "weight")), (object(), None)])
def test_the_scaler_of_fp16_judges_by_itself(scaler: object, found: tuple[int, str] | None) -> None:
    model, trainer = nn.Linear(2, 2), CheckpointingTrainer.__new__(CheckpointingTrainer)
    model.weight.grad = torch.full((2, 2), torch.inf)
    trainer.accelerator = SimpleNamespace(sync_gradients=True, scaler=scaler)
    trainer.state = SimpleNamespace(global_step=0)
    trainer._watch = Watch(torch.device("cpu"))
    with mock.patch.object(Trainer, "training_step", return_value=torch.ones(())):
        trainer.training_step(model)
    assert trainer._watch.found(lambda values: values) == found


def test_the_first_of_all_processes_counts_and_later_steps_do_not() -> None:
    good, bad = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    empty = torch.nn.Parameter(torch.ones(0))
    watch = Watch(torch.device("cpu"))
    for step in range(1, 6):
        good.grad, empty.grad = torch.full((3,), 3e38), torch.ones(0)
        bad.grad = torch.tensor([1.0, torch.nan if step == 3 else 1.0, 1.0])
        loss = torch.tensor(torch.nan if step == 4 else 1.0)
        watch.look(step, loss, [("a", good), ("none", empty), ("b", bad)])
        assert (watch.found(lambda x: x) is None) == (step < 3)
    assert watch.found(lambda x: x) == (3, "b")
    other = torch.tensor([-1, 2 << 20])
    assert watch.found(lambda x: torch.cat([x, other])) == (2, "")
