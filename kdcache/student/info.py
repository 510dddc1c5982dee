"""What a student must know about the cache it learns from, or learnt from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.errors import UsageError
from kdcache.tasks import TASKS, check_task, task_of
from kdcache.teacher.trust import FACTORY_TYPE


@dataclass(frozen=True)
class StudentInfo:
    """What a student must know about its cache.

    Attributes:
        task: one of `kdcache.tasks.TASKS`.
        vocab_size: ids of the cache's tokenizer.
        num_labels: outputs: classes of a classifier, 1 of a score.
        label_names: names of classes, in order.
        pad_id: id of padding in the cache's batches.
        bos_id: begin-of-sequence id of the cache's tokenizer.
        eos_id: end-of-sequence id.
        max_length: longest row, in tokens.
        texts: training texts for a word vocabulary; read once.
        tokenizer: the cache's tokenizer, to compare with a student's own.
        across: whether vocabulary and tokenizer are the student's and not the cache's.
        seed: of random weights.
        decoder_start: of a sequence-to-sequence cache: what its teacher's decoder reads first.
    """

    task: str
    vocab_size: int
    num_labels: int | None = None
    label_names: tuple[str, ...] | None = None
    pad_id: int = 0
    bos_id: int | None = None
    eos_id: int | None = None
    max_length: int = 512
    texts: Iterable[str] | None = None
    tokenizer: Any = None
    across: bool = False
    seed: int = 0
    decoder_start: int | None = None

    def __post_init__(self) -> None:
        check_task(self.task)
        if not TASKS[self.task].over_ids and not self.num_labels:
            raise UsageError("a classification student needs the number of classes (num_labels).")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the outputs as transformers has them, which names those without one, too."""
        return self.label_names or tuple(f"LABEL_{i}" for i in range(self.num_labels or 0))

    @classmethod
    def saved(cls, name: str, config: Mapping[str, Any]) -> StudentInfo:
        """The same from the `config.json` of a student that was trained.

        Raises:
            UsageError: it is not the folder of one.
        """
        if config.get("model_type") == FACTORY_TYPE:
            return cls(**config["info"])
        task = task_of(config)
        if task is None or not Path(name).is_dir():
            raise UsageError(
                f"{name} is not the folder of a trained student: its config.json names none of "
                f"the tasks {', '.join(TASKS)}. Name the --out of a kdcache train."
            )
        if TASKS[task].over_ids:
            text = config.get("text_config", config)
            start = config.get("decoder_start_token_id") if TASKS[task].source else None
            pad_id = text.get("pad_token_id") or 0
            return cls(task, int(text["vocab_size"]), pad_id=pad_id, decoder_start=start)
        names = {int(i): str(label) for i, label in config.get("id2label", {}).items()}
        labels = tuple(names[i] for i in sorted(names)) or ("LABEL_0", "LABEL_1")
        shown = labels if TASKS[task].named else None
        return cls(task, 0, len(labels), shown, config.get("pad_token_id") or 0)


def label_config(info: StudentInfo) -> dict[str, Any]:
    """What a classifier's `config.json` says of its outputs.

    `problem_type` only where that is not the default of as many outputs: what was written before
    other tasks existed stays the same.
    """
    kind = TASKS[info.task]
    if kind.over_ids:
        return {}
    found: dict[str, Any] = {
        "id2label": dict(enumerate(info.names)),
        "label2id": {name: i for i, name in enumerate(info.names)},
    }
    return found if kind.answers == "classes" else {**found, "problem_type": kind.problem}
