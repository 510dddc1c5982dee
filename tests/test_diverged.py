"""A loss or a gradient that is not finite ends a training, and nothing is saved of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from make_caches import make_cache, word_tokenizer
from safetensors.torch import load_file
from small_runs import SMALL, USUAL
from torch import nn
from transformers import BertConfig, BertModel, Trainer

from kdcache.commands.finetune.finetune import finetune
from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.commands.run_folder import read_metrics
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.errors import UsageError
from kdcache.student.checkpoints import CheckpointingTrainer, Watch, is_whole
from kdcache.student.trainer import DistillationTrainer


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
