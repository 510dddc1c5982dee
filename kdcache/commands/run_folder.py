"""The folder that a command fills step by step: what is there, and whether it is this command's.

`train`, `finetune`, `sweep` and `demo` look once, since another process may begin or end its work
there meanwhile.

That of a training may be in an object store instead (`train/store.py`). Both answer the same: what
is there, where to continue, and what happens to a checkpoint and to the finished student once they
are whole on this machine's disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from kdcache.errors import UsageError
from kdcache.files import found_at, strange, write_text
from kdcache.student.checkpoints import continues_from, last_checkpoint

METRICS_FILE = "metrics.jsonl"
_TAIL = 2**16  # bytes that hold at least one whole line


class RunFolder:
    """A folder on this machine that belongs to one piece of work.

    Attributes:
        path: where this machine works.
        result_file: name of the JSON file that states what the folder holds.
    """

    def __init__(self, path: Path, result_file: str, noun: str, ours: Iterable[str] = ()) -> None:
        """Name the folder; nothing is read yet.

        Args:
            result_file: see the class.
            noun: what it is, in messages: "a sweep of kdcache".
            ours: patterns of what the work writes besides that file.
        """
        self.path, self.result_file = path, result_file
        self._noun, self._ours = noun, tuple(ours)

    @property
    def shown(self) -> str:
        """The folder, for people."""
        return str(self.path)

    def names(self) -> set[str]:
        """What is there, at one moment; a file's own name where it is one."""
        return found_at(self.path)

    def document(self) -> dict[str, Any] | None:
        """What the result file states; None where there is none.

        Raises:
            UsageError: the folder holds something else.
        """
        names = self.names()
        if self.result_file in names:
            return self.result()
        if self._is_strange(names):
            problem = "is a file" if self.path.is_file() else f"is not empty and not {self._noun}"
            raise UsageError(f"{self.shown} {problem}. Choose another --out.")
        return None

    def result(self) -> dict[str, Any] | None:
        """The result file as it is; None where there is none."""
        path = self.path / self.result_file
        return dict(json.loads(path.read_text())) if path.is_file() else None

    def _is_strange(self, names: Set[str]) -> bool:
        """Whether there is what this work does not write."""
        return bool(strange(names, self._ours))


@dataclass(frozen=True)
class TrainProgress:
    """The progress of a run.

    Attributes:
        epoch: passes over the caches, with the part of the present one.
        seconds: training time so far, over all sittings of the run.
        logs: what was just logged: losses, learning rate, or metrics of an evaluation (`eval_...`).
    """

    step: int
    steps: int
    epoch: float
    seconds: float
    logs: dict[str, float]


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        rows: rows trained on, over all epochs.
        loss: last logged training loss, alpha and T as they were then.
        hard_loss: its cross-entropy with the hard labels, a labelled position (of scores the
            error); None without labels.
        soft_loss: its T^2 times the divergence from the teacher, a position; None on hard labels
            alone and on sampled targets.
        soft_cross_entropy: on sampled targets: its T^2 times the cross-entropy with the teacher,
            which is KL plus the teacher's entropy.
        best_step: step of the checkpoint that became the student, where there were evaluations;
            None where the figure that selects it was defined in none: it is then the last one.
        vocabulary: ids of the student's own tokenizer; None where it reads the cache's ids.
        unknown: share of that tokenizer's tokens of the training texts that are unknown; None where
            its vocabulary has no unknown.
        eval_unknown: the same of the evaluation texts.
        pretrained: how many of its ids began with a vector of `embeddings`; None without these.
        teacher_cross_entropy: the teacher's, with the hard labels of the training caches at T = 1,
            as `hard_loss` is the student's; None where they do not keep it (`label_logprob`).
        eval_teacher_cross_entropy: the same of the evaluation caches.
        lost: stretches of text, in the rows trained on, that a student's own tokens do not give
            back, so without labels; None where there were none.
        cut: labels left out of the rows trained on because the student's rows would be longer than
            it reads, or than asked for; None where there were none.
        epoch_rows: rows that an epoch has of each domain, and of each cache without names; None
            where no cache has names.
        one_answer: figures of one answer for all (`kdcache.student.one_answer`), by the names of
            `eval`: on the labels of the evaluation caches, or else of the training caches.
        warning: where the student is hardly better than that: what was compared, what to change.
        made: False where the run was finished before.
    """

    out: str
    steps: int
    epochs: float
    rows: int
    loss: float
    hard_loss: float | None = None
    soft_loss: float | None = None
    soft_cross_entropy: float | None = None
    eval: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    seconds: float = 0.0
    parameters: int = 0
    trained: int | None = None
    vocabulary: int | None = None
    unknown: float | None = None
    eval_unknown: float | None = None
    pretrained: int | None = None
    teacher_cross_entropy: float | None = None
    eval_teacher_cross_entropy: float | None = None
    lost: int | None = None
    cut: int | None = None
    epoch_rows: dict[str, int] | None = None
    one_answer: dict[str, float] = field(default_factory=dict)
    warning: str = ""
    task: str | None = None
    made: bool = True


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """What a run logged so far: `step`, `seconds` (of training, over all its sittings), `epoch`,
    and losses or the metrics of an evaluation (`eval_...`); nothing where nothing is there.
    """
    path = run / METRICS_FILE
    return parse_metrics(path.read_text() if path.is_file() else "")


def parse_metrics(text: str) -> list[dict[str, Any]]:
    """As `read_metrics`, of the content of the file."""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def last_metrics(run: Path) -> dict[str, Any] | None:
    """The last of `read_metrics`, found from the end of the file; None where nothing was logged."""
    path = run / METRICS_FILE
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = file.read().rpartition(b"\n")[0].splitlines()
    return dict(json.loads(lines[-1])) if lines else None


def cut_metrics(run: Path, last: int) -> None:
    """Drop what was logged after step `last`: the resumed run will log it again."""
    lines = [line for line in read_metrics(run) if line["step"] <= last]
    if lines or (run / METRICS_FILE).is_file():
        write_text(run / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in lines))


def seconds_before(run: Path) -> float:
    """Training time of the earlier, interrupted runs, as far as they count."""
    last = last_metrics(run)
    return float(last["seconds"]) if last else 0.0


RESULT_FILE = "train.json"
SCRATCH = "student.tmp"
RAY = ".ray"  # what Ray notes of a training, and a worker of why it cannot begin


class TrainFolder(RunFolder):
    """A training's folder on this machine.

    Attributes:
        owner: which training owns a run in an object store; empty elsewhere, where a lock does.
        ray: folder of this machine in which Ray keeps its notes.
        ask_every: seconds between two looks at what was logged.
    """

    owner = ""
    ask_every = 0.0

    def __init__(self, path: Path) -> None:
        """Name the folder; nothing is read yet."""
        super().__init__(
            path, RESULT_FILE, "a run of kdcache", ("checkpoint-*", METRICS_FILE, "runs", RAY)
        )
        self.ray = path / RAY

    def _is_strange(self, names: Set[str]) -> bool:
        # A run that was killed while its model's files moved has some of them.
        return super()._is_strange(names) and SCRATCH not in names and self.last() is None

    def last(self) -> Path | str | None:
        """The last whole checkpoint: a path, or an address without credentials."""
        return last_checkpoint(self.path)

    def continues(self) -> str:
        """How the same command continues, and from where."""
        last = self.last()
        often = " --save-steps takes them more often."
        return continues_from(last) + (often if last is None else "")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines that were logged so far."""
        return read_metrics(self.path)

    def note(self, name: str, text: str) -> None:
        """Leave a text for the process that started this one."""
        write_text(self.ray / name, text)

    def take_note(self, name: str) -> str:
        """Read such a text; empty where there is none."""
        path = self.ray / name
        return path.read_text() if path.is_file() else ""

    # What only a folder elsewhere needs

    def claim(self, owner: str = "") -> None:
        """Become the training that owns the run, or a process of the one that does."""

    def bring(self) -> None:
        """Bring what the run resumes from to this machine."""

    def bring_checkpoint(self, step: int) -> None:
        """Bring one checkpoint to this machine."""

    def callbacks(self) -> list[TrainerCallback]:
        """What keeps the folder up to date while the run trains."""
        return []

    def finish(self) -> None:
        """The finished student is on this machine's disk: publish it."""

    def clear(self) -> None:
        """Remove what this machine needs no longer."""
