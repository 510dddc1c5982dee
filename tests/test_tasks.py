"""The table of tasks: whole, and the one rule of positions."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
import transformers

from kdcache.errors import UsageError
from kdcache.rows import RowSpec
from kdcache.targets import Codec
from kdcache.tasks import (
    IGNORE,
    TASKS,
    Answers,
    Task,
    check_task,
    could_be,
    labelled,
    positions,
    task_of,
)


def test_the_table_has_each_task_of_the_options() -> None:
    assert tuple(TASKS) == get_args(Task)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_names_a_class_of_transformers_and_codecs_that_exist(task: str) -> None:
    kind = TASKS[task]
    auto = getattr(transformers, kind.auto)
    assert auto._model_mapping
    for name in (kind.codec, *kind.plans):
        assert Codec.parse(name, (1.0,), 300)
    assert not kind.causal or kind.per_token
    assert kind.answers in get_args(Answers)
    # Ids have no names of their own, and a value is one of none.
    assert (kind.over_ids, kind.named) == {
        "ids": (True, False),
        "classes": (False, True),
        "labels": (False, True),
        "score": (False, False),
    }[kind.answers]


@pytest.mark.parametrize("task", TASKS)
def test_the_architectures_of_a_task_are_known_as_its_own(task: str) -> None:
    mapping = getattr(transformers, TASKS[task].auto)._model_mapping
    for names in mapping._model_mapping.values():
        for name in [names] if isinstance(names, str) else names:
            config = {"architectures": [name], "problem_type": TASKS[task].problem}
            found = task_of(config)
            assert found is None or could_be(config, found)
            # Not each model that answers a task is named after it; none is named after another.
            assert found in (task, None) or TASKS[task].marks[0] not in name, (name, found)


@pytest.mark.parametrize("task", TASKS)
def test_positions_of_tokens_have_labels_and_all_rows_are_positions(task: str) -> None:
    labels = np.array([3, IGNORE, 0])
    kind = TASKS[task]
    if kind.answers == "score":
        labels = np.array([3.5, np.nan, 0], np.float32)
    elif kind.answers == "labels":
        labels = np.array([[1, IGNORE], [IGNORE, IGNORE], [0, 0]])
    want = [True, not kind.per_token, True]
    assert labelled(labels, task).tolist() == [True, False, True]
    assert positions(labels, task).tolist() == want
    assert positions(torch.from_numpy(labels), task).tolist() == want


def test_an_unknown_task_is_refused_with_those_that_are_known() -> None:
    for refuse in (check_task, lambda task: RowSpec(task=task)):
        with pytest.raises(UsageError, match="'translation', expected one of causal-lm, masked-lm"):
            refuse("translation")


def test_a_classifier_without_a_problem_type_is_what_transformers_would_train() -> None:
    names = {"architectures": ["BertForSequenceClassification"]}
    several = {**names, "id2label": {"0": "a", "1": "b", "2": "c"}}
    assert task_of(names) == task_of(several) == "sequence-classification"
    assert task_of({**names, "id2label": {"0": "LABEL_0"}}) == "regression"
    assert task_of({**several, "problem_type": "multi_label_classification"}) == (
        "multi-label-classification"
    )
    assert could_be(several, "multi-label-classification")
    assert not could_be({**several, "problem_type": "regression"}, "multi-label-classification")
    assert not could_be({"architectures": ["BertModel"]}, "regression")
