"""A run's folder tells what it is, loads as it says, and trackers record what was distilled."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from make_caches import CAUSAL, make_cache
from safetensors.torch import load_file
from small_runs import BERT, LLAMA
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    TrainerCallback,
    TrainingArguments,
)

import kdcache
from kdcache.cache import Cache
from kdcache.commands.train.card import CARD_FILE
from kdcache.errors import UsageError
from kdcache.student.trainer import recorded

BAG = """
import torch

class Bag(torch.nn.Module):
    def __init__(self, info):
        super().__init__()
        self.bag = torch.nn.Embedding(info.vocab_size, info.num_labels)
    def forward(self, input_ids, attention_mask):
        return (self.bag(input_ids) * attention_mask[..., None]).sum(1)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_cache(folder / "classes", [9, 7])
    make_cache(folder / "causal", [9, 7], task=CAUSAL, codec="topk:6")
    (folder / "bert.json").write_text(json.dumps(BERT))
    (folder / "llama.json").write_text(json.dumps(LLAMA))
    (folder / "bags_of_a_run.py").write_text(BAG)
    return folder


def load_as_the_card_says(card: str) -> nn.Module:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    model = names["model"]
    assert isinstance(model, nn.Module)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "cache"),
    [
        ("bilstm", "classes"), ("bert.json", "classes"), ("bags_of_a_run:Bag", "classes"),
        ("llama.json", "causal"),
    ],
)  # fmt: skip
def test_a_run_loads_as_its_card_says(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, student: str, cache: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(folder))
    given = str(folder / student) if student.endswith(".json") else student
    kdcache.train(
        kdcache.TrainOptions(
            cache=str(folder / cache), student=given, out="my run", max_steps=2, batch_size=4,
            eval_cache=str(folder / cache), report_to="none",
            **({"embedding_size": 8, "hidden_size": 8} if student == "bilstm" else {}),
        )
    )  # fmt: skip
    card = Path("my run", CARD_FILE).read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["pipeline_tag"] in ("text-generation", "text-classification")
    assert f"`{Cache.open(str(folder / cache)).digest}`" in card
    stored = load_file(Path("my run", "model.safetensors"))
    factory = student.startswith("bags")
    for model in (
        load_as_the_card_says(card),
        kdcache.load_student("my run", trust_remote_code=factory),
    ):
        assert not model.training
        own = model.state_dict()
        assert stored.keys() <= own.keys()
        assert all(torch.equal(own[name], value) for name, value in stored.items())
    sys.modules.pop("bags_of_a_run", None)
    if factory:
        with pytest.raises(UsageError, match="trust"):
            kdcache.load_student("my run")


def test_what_was_not_trained_is_not_loaded_alone(folder: Path) -> None:
    for name in (str(folder / "bert.json"), str(folder), "bilstm"):
        with pytest.raises(UsageError, match="is not the folder of a trained student"):
            kdcache.load_student(name)


class Tracker(TrainerCallback):  # type: ignore[misc]
    """Records what every tracker of transformers asks for."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}

    def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        self.config = args.to_dict()
        assert json.loads(args.to_json_string())["kdcache_codec"] == self.config["kdcache_codec"]


def test_trackers_record_the_caches_and_the_loss(folder: Path, tmp_path: Path) -> None:
    cache = Cache.open(str(folder / "classes"))
    tracker = Tracker()
    inner = BertForSequenceClassification(BertConfig(**BERT, vocab_size=64, num_labels=3))
    trainer = kdcache.DistillationTrainer(
        model=kdcache.DistilledStudent(inner, cache.spec.task, divergence="reverse-kl"),
        args=TrainingArguments(
            str(tmp_path), max_steps=3, use_cpu=True, save_strategy="no", report_to="none",
            log_level="error", disable_tqdm=True,
        ),
        train_dataset=kdcache.TargetStream(cache, batch_size=4, temperature=2.0),
        alpha=lambda step: 0.5 + step / 4,
        callbacks=[tracker],
    )  # fmt: skip
    trainer.train()
    found = {k.removeprefix("kdcache_"): v for k, v in tracker.config.items() if "kdcache" in k}
    assert found == {
        "cache_digests": [cache.digest], "codec": "dense", "cache_temperatures": [1.0, 2.0],
        "temperature": 2.0, "alpha": "0.5:1", "divergence": "reverse-kl", "tail": "bucket",
        "batch_size": 4, "seed": 0, "streams": 1, "group": trainer.train_dataset.group,
    }  # fmt: skip
    assert tracker.config["max_steps"] == 3
    assert "kdcache_codec" not in trainer.args.to_dict()


@pytest.mark.parametrize(("given", "kept"), [(None, "estimated"), (0.5, 0.5)])
def test_trackers_record_theta_of_anchored_caches(
    tmp_path: Path, given: float | None, kept: str | float
) -> None:
    cache = make_cache(tmp_path / "cache", [4], task=CAUSAL, codec="anchored:8")
    student = kdcache.DistilledStudent(nn.Linear(1, 1), CAUSAL, anchor=given)
    stream = kdcache.TargetStream(cache, batch_size=2)
    facts = recorded(stream, student, None, 2)
    assert (facts["kdcache_anchor"], facts["kdcache_alpha"]) == (kept, 0.5)
