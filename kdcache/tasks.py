"""The tasks of a teacher, and which labels of a row are positions.

The single place for their names, for the label that means "none" and for the rule that decides
where a soft target is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, TypeVar, get_args

Task = Literal["causal-lm", "sequence-classification"]
CAUSAL_LM: Final = "causal-lm"
SEQUENCE_CLASSIFICATION: Final = "sequence-classification"
TASKS: tuple[str, ...] = get_args(Task)

IGNORE: Final = -100  # a label that is none: the default `ignore_index` of torch's cross-entropy

Labels = TypeVar("Labels", bound=Any)


def positions(labels: Labels, task: str) -> Labels:
    """Which labels have a soft target.

    Args:
        labels: integers of any shape, a numpy array or a tensor, `IGNORE` where there is none:
            the id to predict after each token of a language model, the class of each row of a
            classifier.
        task: one of `TASKS`.

    Returns:
        bool, in the shape of `labels`. A language model's positions are where a label is; a
        classifier's are all rows, since a transfer set has soft targets without hard labels.
    """
    labelled: Any = labels != IGNORE
    every: Labels = labelled if task == CAUSAL_LM else labelled | True
    return every


def task_of(config: Mapping[str, Any]) -> str | None:
    """The task of a Hugging Face model by its `config.json`, or None if that does not say."""
    names = " ".join(config.get("architectures") or ())
    if "SequenceClassification" in names:
        return SEQUENCE_CLASSIFICATION
    return CAUSAL_LM if "CausalLM" in names or "LMHead" in names else None
