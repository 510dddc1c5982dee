"""Teachers that read a row otherwise beside a longer one: rotary positions, and BigBird."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from kdcache.rows import Row
from kdcache.student import StudentInfo, load_student
from kdcache.teacher import Teacher, TeacherOptions
from kdcache.teacher.lengths import length_class

ORIGINAL = 32
SHORT, LONG = [20] * 4, 60


def rope(kind: str) -> dict[str, Any]:
    if kind == "llama":
        return {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    return {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": ORIGINAL,
    }


@pytest.fixture(params=["llama", "phi3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model that was stretched from `ORIGINAL` tokens."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    stretched = {"max_position_embeddings": ORIGINAL if request.param == "llama" else 4 * ORIGINAL}
    if request.param == "phi3":
        stretched["original_max_position_embeddings"] = ORIGINAL
    config = AutoConfig.for_model(
        request.param,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        initializer_range=0.3,
        pad_token_id=0,
        rope_parameters=rope(request.param),
        **sizes,
        **stretched,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    return tmp_path


def rows_of(*lengths: int) -> list[Row]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 64, n).astype(np.int32) for n in lengths]
    return [Row(one, one) for one in ids]


def class_rows(*lengths: int) -> list[Row]:
    return [Row(row.input_ids, np.zeros(1, np.int32)) for row in rows_of(*lengths)]


def alone(folder: Path, row: Row) -> torch.Tensor:
    """The logits of a row by a model that has read nothing else."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0]


def test_a_row_has_the_logits_that_it_has_alone(folder: Path) -> None:
    teacher = Teacher(TeacherOptions((str(folder),), "causal-lm", device="cpu"), 64)
    teacher.probe(rows_of(9, 7, 5))  # a real one's rows are shorter than what it was stretched from
    for lengths in ((LONG, 50, ORIGINAL, *SHORT), (50, 40, 40), SHORT):
        rows = rows_of(*lengths)
        want = torch.cat([alone(folder, row) for row in rows])
        got = torch.cat([z.clone() for z in teacher.logits(rows)])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_a_bigbird_attends_to_blocks_of_long_rows_alone(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "big_bird",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.3,
        attention_type="block_sparse",
        block_size=4,
        num_random_blocks=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    options = TeacherOptions((str(tmp_path),), "sequence-classification", device="cpu")
    teacher = Teacher(options, 2)
    teacher.probe(class_rows(9, 7, 5))
    for lengths in ((80, 80, 66, 28, 20), (20, 9), (50, 20)):
        rows = class_rows(*lengths)
        want = []
        for row in rows:
            model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
            ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
            with torch.inference_mode():
                want.append(model(input_ids=ids).logits)
        got = torch.cat([z.clone() for z in teacher.logits(rows)])
        torch.testing.assert_close(got, torch.cat(want), rtol=0, atol=1e-4)


def test_a_student_forgets_the_length_of_earlier_batches(folder: Path) -> None:
    student = load_student(str(folder), StudentInfo("causal-lm", 64, max_length=LONG)).eval()
    for length in (LONG, 50, 20):
        (row,) = rows_of(length)
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            torch.testing.assert_close(student(input_ids=ids).logits[0], alone(folder, row))


def test_few_batches_are_cut(folder: Path) -> None:
    classify = length_class(AutoModelForCausalLM.from_pretrained(folder))
    assert classify is not None
    assert classify(1) == classify(ORIGINAL) != classify(ORIGINAL + 1)
    dynamic = "llama" in AutoConfig.from_pretrained(folder).model_type
    assert (classify(40) != classify(50)) == dynamic
