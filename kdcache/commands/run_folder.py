"""The folder that a command fills step by step: what is there, and whether it is this command's.

`train`, `finetune`, `sweep` and `demo` look once, since another process may begin or end its work
there meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

from kdcache.errors import UsageError
from kdcache.files import found_at, strange


class RunFolder:
    """A folder on this machine that belongs to one piece of work.

    Attributes:
        path: where this machine works.
        result_file: name of the JSON file that says what the folder holds.
    """

    def __init__(self, path: Path, result_file: str, noun: str, ours: Iterable[str] = ()) -> None:
        """Name the folder; nothing is read yet.

        Args:
            path: the folder.
            result_file: name of the JSON file that says what it holds.
            noun: what it is, in messages: "a sweep of kdcache".
            ours: patterns of what the work writes beside that file.
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
        """What the result file says; None where there is none.

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
