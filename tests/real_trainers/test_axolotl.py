"""The plugin in the real axolotl: `make test-trainers`, in an environment of its own."""

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

import kdcache

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.skipif(
        importlib.util.find_spec("axolotl") is None, reason="axolotl is missing: make test-trainers"
    ),
]
# Its kernels of LoRA need a GPU.
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")
LORA = {
    "adapter": "lora",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_linear": True,
    **dict.fromkeys(KERNELS, False),
}
FORMS: dict[str, dict[str, Any]] = {
    "text": {"datasets": [{"type": "completion"}]},
    "instructions": {"datasets": [{"type": "alpaca"}], "train_on_inputs": False},
    "lora": {"datasets": [{"type": "completion"}], **LORA},
}


def run(command: str, config: dict[str, Any], folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    environment = {
        "CUDA_VISIBLE_DEVICES": "",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "ACCELERATE_USE_CPU": "true",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
    }
    done = subprocess.run(
        [sys.executable, "-m", f"axolotl.cli.{command}", str(path)],
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
    rows = [
        {"text": text, "instruction": text[:30], "input": "", "output": text[30:]} for text in TEXTS
    ]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {**FORMS[form]}
    own["datasets"] = [{"path": str(corpus), "ds_type": "json", **own["datasets"][0]}]
    base = {
        "base_model": str(student),
        "plugins": ["kdcache.integrations.axolotl.KdcachePlugin"],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "sequence_len": 256,
        "seed": 42,
        "micro_batch_size": len(TEXTS),
        "gradient_accumulation_steps": 1,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "learning_rate": 2e-3,
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_steps": 10,
        "val_set_size": 0,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "special_tokens": {"pad_token": "</s>"},
        "output_dir": str(tmp_path / "prepare"),
        **own,
    }
    run("preprocess", base, tmp_path)
    cache = build(stories260k, tmp_path / "prepared", tmp_path / "cache", max_length=256)

    def train(name: str, checkpoint: Path | None) -> Log:
        out = tmp_path / name
        more: dict[str, Any] = {"output_dir": str(out), "max_steps": STEPS}
        if checkpoint is not None:
            more["resume_from_checkpoint"] = str(checkpoint)
        run("train", {**base, **more, "kdcache": {"cache": cache, "alpha": ALPHA}}, tmp_path)
        state = json.loads((out / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
        return steps_of(state["log_history"])

    check(cache, student, train, tmp_path)


def test_its_own_plugin_reads_an_export(stories260k: Path, tmp_path: Path) -> None:
    """The collator of axolotl's KD plugin, which its loss reads from: one id later each."""
    import torch
    from axolotl.integrations.kd.collator import DataCollatorForKD
    from pyarrow import parquet
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    rows = tmp_path / "rows.jsonl"
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    rows.write_text("".join(json.dumps({"input_ids": i, "labels": i}) + "\n" for i in ids))
    cache = build(stories260k, rows, tmp_path / "cache", max_length=256)
    kdcache.export(kdcache.ExportOptions(cache=cache, out=str(tmp_path / "out"), layout="axolotl"))
    (table,) = (tmp_path / "out").glob("*.parquet")
    names = {"target_token_ids", "target_logprobs", "target_mask"}
    given = parquet.read_table(table).to_pylist()
    batch = DataCollatorForKD(tokenizer)(given)
    assert batch["input_ids"].shape == batch["labels"].shape
    assert all(batch[name].shape == (*batch["labels"].shape, 32) for name in names)
    learnt = batch["labels"] != -100
    assert torch.equal(batch["target_mask"].bool().all(-1), learnt)
    assert torch.equal(batch["target_mask"].bool().any(-1), learnt)
    sums = batch["target_logprobs"][learnt].exp().sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-4)
    assert int(learnt.sum()) == kdcache.Cache.open(cache).manifest.positions
