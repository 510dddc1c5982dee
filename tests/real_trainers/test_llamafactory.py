"""The launcher with the real LLaMA-Factory: `make test-trainers`, in an environment of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from trainer_contract import ALPHA, STEPS, TEXTS, Log, build, check, make_student, steps_of

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.skipif(
        importlib.util.find_spec("llamafactory") is None,
        reason="LLaMA-Factory is missing: make test-trainers",
    ),
]
LORA = {"finetuning_type": "lora", "lora_rank": 8, "lora_target": "all", "lora_dropout": 0}
FORMS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full"},
    "lora": LORA,
}


def run(module: list[str], config: dict[str, Any], folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    environment = {
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
    }
    done = subprocess.run(
        [sys.executable, "-m", *module, str(path)],
        env={**os.environ, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.mark.parametrize("form", FORMS)
def test_the_contract(stories260k: Path, tmp_path: Path, form: str) -> None:
    student = make_student(stories260k, tmp_path / "student")
    rows = [{"instruction": text[:30], "input": "", "output": text[30:]} for text in TEXTS]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    base = {
        "model_name_or_path": str(student),
        "stage": "sft",
        "template": "default",
        "dataset": "rows",
        "dataset_dir": str(tmp_path),
        "tokenized_path": str(tmp_path / "prepared"),
        "cutoff_len": 256,
        "per_device_train_batch_size": len(TEXTS),
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": 10,
        "report_to": "none",
        "output_dir": str(tmp_path / "prepare"),
        **FORMS[form],
    }
    run(["llamafactory.cli", "train"], {**base, "do_train": False}, tmp_path)
    corpus = tmp_path / "prepared" / "train"
    cache = build(stories260k, corpus, tmp_path / "cache", max_length=256)

    def train(name: str, checkpoint: Path | None) -> Log:
        out = tmp_path / name
        more = {"output_dir": str(out), "max_steps": STEPS, "do_train": True}
        if checkpoint is not None:
            more["resume_from_checkpoint"] = str(checkpoint)
        settings = {"cache": cache, "alpha": ALPHA}
        run(["kdcache.integrations.llamafactory"], {**base, **more, "kdcache": settings}, tmp_path)
        state = json.loads((out / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
        return steps_of(state["log_history"])

    check(cache, student, train, tmp_path)
