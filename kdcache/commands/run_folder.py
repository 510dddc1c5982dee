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
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from kdcache.commands.train.callbacks import METRICS_FILE, read_metrics
from kdcache.errors import UsageError
from kdcache.files import found_at, strange, write_text
from kdcache.student.checkpoints import continues_from, last_checkpoint


class RunFolder:
    """A folder on this machine that belongs to one piece of work.

    Attributes:
        path: where this machine works.
        result_file: name of the JSON file that states what the folder holds.
    """

    def __init__(self, path: Path, result_file: str, noun: str, ours: Iterable[str] = ()) -> None:
        """Name the folder; nothing is read yet.

        Args:
            path: the folder.
            result_file: name of the JSON file that states what it holds.
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
