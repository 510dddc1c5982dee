"""Models that read images besides are language models where they are given none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_zoo as zoo_tests
import torch
from test_zoo import Den, check_evaluation, check_student, check_teacher, train
from transformers import AutoModelForImageTextToText
from zoo import BLIP2, MLLAMA, SEEING, Species, forms

import kdcache
from kdcache.errors import UsageError
from kdcache.tasks import task_of
from kdcache.teacher import TeacherFiles, auto_class

pytestmark = [pytest.mark.end_to_end, pytest.mark.filterwarnings("default")]
dens, field = zoo_tests.dens, zoo_tests.field


def _save(field: Den, species: Species, folder: Path) -> Path:
    """A checkpoint as hubs have it: the whole model, its text part named within it."""
    return species.save(folder, AutoModelForImageTextToText, field.tokenizer)


def _load(folder: Path) -> Any:
    config = TeacherFiles.find(str(folder)).config
    return auto_class("causal-lm", config).from_pretrained(folder).eval()


@pytest.mark.parametrize("species", forms(SEEING, "images"))
def test_one_that_reads_images_gives_its_own_numbers(
    species: Species, field: Den, tmp_path: Path
) -> None:
    folder = _save(field, species, tmp_path / "model")
    model = _load(folder)
    check_teacher(field, folder, model, tmp_path / "cache")
    loss = check_student(field, model)
    assert train(field, folder, tmp_path / "run").loss == pytest.approx(loss, rel=1e-3)
    student = kdcache.load_student(str(tmp_path / "run"))
    check_evaluation(field, tmp_path / "run", student)
    assert task_of(student.config.to_dict()) == "causal-lm"


def test_its_hidden_states_are_those_of_the_text(field: Den, tmp_path: Path) -> None:
    folder = _save(field, SEEING[0], tmp_path / "model")
    model = _load(folder)
    cache = field.build(folder, tmp_path / "cache", codec="hidden:float16")
    data = kdcache.TargetDataset([cache])[0]
    want = field.own(model, data.row(0), cache.spec.vocab_size)
    torch.testing.assert_close(data.targets.at(1.0).dense().logits, want, rtol=0, atol=2e-2)


def test_a_text_model_that_could_not_be_read_again_is_no_student(
    field: Den, tmp_path: Path
) -> None:
    folder = _save(field, MLLAMA, tmp_path / "model")
    check_teacher(field, folder, _load(folder), tmp_path / "cache")
    with pytest.raises(UsageError, match="transformers could not load") as error:
        train(field, folder, tmp_path / "run")
    assert "\n" not in str(error.value)


def test_one_that_reads_no_text_alone_is_refused(field: Den, tmp_path: Path) -> None:
    folder = _save(field, BLIP2, tmp_path / "model")
    with pytest.raises(UsageError, match="transformers has no model for causal-lm"):
        field.build(folder, tmp_path / "cache")
