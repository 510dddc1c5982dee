"""The adapter in the real ms-swift: `make test-trainers`, in an environment of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trainer_contract import ALPHA, STEPS, TEXTS, Log, build, check, make_student, steps_of

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.skipif(
        importlib.util.find_spec("swift") is None, reason="ms-swift is missing: make test-trainers"
    ),
]
LORA = {"tuner_type": "lora", "lora_rank": 8, "lora_dropout": 0, "target_modules": "all-linear"}
FORMS: dict[str, dict[str, Any]] = {
    "full": {"tuner_type": "full"},
    "lora": LORA,
}


def run(module: str, options: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = {
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "MODELSCOPE_CACHE": str(folder / "modelscope"),
    }
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        env={**os.environ, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
    )


def prepared(student: Path, folder: Path) -> dict[str, Any]:
    """Prepare the rows; the options that training shares with it."""
    rows = folder / "rows.jsonl"
    turns = [(text[:30], text[30:]) for text in TEXTS]
    chats = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
        for asked, told in turns
    ]
    rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    shared = {
        "model": student,
        "model_type": "llama",
        "template": "default",
        "use_hf": "true",
        "dataset": rows,
        "max_length": 256,
        "torch_dtype": "float32",
    }
    done = run("kdcache.integrations.swift", {**shared, "output_dir": folder / "prepared"}, folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return shared


def train_options(plugin: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "external_plugins": plugin,
        "output_dir": out,
        "add_version": "false",
        "max_steps": STEPS,
        "per_device_train_batch_size": len(TEXTS),
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "logging_steps": 1,
        "save_steps": 10,
        "split_dataset_ratio": 0,
        "report_to": "none",
        **more,
    }


@pytest.mark.parametrize("form", FORMS)
def test_the_contract(stories260k: Path, tmp_path: Path, form: str) -> None:
    student = make_student(stories260k, tmp_path / "student")
    shared = prepared(student, tmp_path)
    cache = build(stories260k, tmp_path / "prepared" / "train", tmp_path / "cache", max_length=256)
    plugin = tmp_path / "kd.py"
    plugin.write_text(
        f"from kdcache.integrations.swift import use\n\nuse(cache={cache!r}, alpha={ALPHA})\n"
    )

    def train(name: str, checkpoint: Path | None) -> Log:
        out = tmp_path / name
        more = {**FORMS[form]}
        if checkpoint is not None:
            more["resume_from_checkpoint"] = checkpoint
        options = {**shared, **train_options(plugin, out, **more)}
        done = run("swift.cli.sft", options, tmp_path)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        state = json.loads((out / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
        return steps_of(state["log_history"])

    check(cache, student, train, tmp_path)
