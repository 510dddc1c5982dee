"""The checkpoint that becomes the student, and a line where even that one learnt nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from make_caches import make_cache
from small_runs import SMALL, USUAL, metrics

from kdcache.commands.finetune.trainer import best_scores
from kdcache.commands.train.callbacks import Patience
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.loss.metrics import micro_f1
from kdcache.student.checkpoints import CheckpointingTrainer
from kdcache.student.one_answer import OneAnswer, little_learnt


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
