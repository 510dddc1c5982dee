"""Processes of tests that cost milliseconds instead of seconds.

They are forks of a server that has imported torch, transformers and what such tests run. There is
one such server a process of pytest, and it begins with the first of them: its list of modules is
here and nowhere else.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from forked_program import become

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "kdcache.commands.train.process_group",
        "kdcache.commands.export",
        "kdcache.commands.import_.import_",
        "kdcache.commands.build",
        "kdcache.commands.sweep.sweep",
        "forked_program",
        "s3fs",
        "frozen",  # the last one
    ]
)


class Program:
    """`kdcache WORDS` or `python -c CODE WORDS`, begun as `subprocess.Popen` begins it.

    Its output goes to a file, so that it never waits for a reader.
    """

    def __init__(self, *words: str, environment: Mapping[str, str] = os.environ) -> None:
        self._output = Path(tempfile.mkstemp(prefix="program-")[1])
        given = (words, os.getcwd(), dict(environment), str(self._output))
        self._process = CONTEXT.Process(target=_run, args=given)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """As `poll()` gives it: negative where a signal ended it, None while it runs."""
        return self._process.exitcode

    def send_signal(self, sign: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, sign)

    def communicate(self, timeout: float = 300) -> str:
        """Wait for its end: what it wrote, of both streams."""
        self._process.join(timeout)
        assert self.returncode is not None, f"it did not end: {self._output.read_text()}"
        text = self._output.read_text()
        self._output.unlink()
        return text


def _run(words: Sequence[str], folder: str, environment: dict[str, str], output: str) -> None:
    out = os.open(output, os.O_WRONLY | os.O_APPEND)
    become(list(words), folder, environment, [os.open(os.devnull, os.O_RDONLY), out, os.dup(out)])
