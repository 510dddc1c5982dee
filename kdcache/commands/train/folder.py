"""The folder of a training: on this machine here, in an object store in `store.py`.

Whoever trains asks for the same things in both: what is there, where to continue, and what happens
to a checkpoint and to the finished student once they are whole on this machine's disk.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from kdcache.commands.run_folder import RunFolder
from kdcache.commands.train.callbacks import METRICS_FILE, read_metrics
from kdcache.files import write_text
from kdcache.student.checkpoints import continues_from, last_checkpoint

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
        often = " --save-steps, or --eval-steps with an --eval-cache, takes them more often."
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
