"""Ends the processes of an engine when the process that started them ends, however it ends.

vLLM's own processes outlive a parent that is killed (by the kernel for memory, by Ray at the end of
every build) and would keep their GPUs. So a small process waits at a pipe: when the other end
closes, it kills what it saw start.

Cost: a process of 15 MB. Guarantee: none if the guard itself is killed first.
"""

from __future__ import annotations

import os
import subprocess
import sys

_SCRIPT = """
import os, select, sys
import psutil
parent = psutil.Process(int(sys.argv[1]))
before = set(parent.children(recursive=True))
print(flush=True)
engine, said = set(), None
while said is None:
    if select.select([0], [], [], 0.2)[0]:
        said = os.read(0, 1)
    try:
        engine |= set(parent.children(recursive=True)) - before
    except psutil.Error:
        pass
if said:
    print(flush=True)
while said:
    said = os.read(0, 1)
for process in engine:
    try:
        if "resource_tracker" not in " ".join(process.cmdline()):
            process.kill()
    except psutil.Error:
        pass
"""


class Guard:
    """Watches this process and the children that it starts until `started`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the build
        )
        assert self._process.stdin is not None, "it has a pipe"
        assert self._process.stdout is not None, "it has a pipe"
        self._pipe, self._answers = self._process.stdin, self._process.stdout
        self._answers.readline()

    def started(self) -> None:
        """The engine is up: what is started from now on is none of its processes."""
        self._pipe.write(b"+")
        self._pipe.flush()
        self._answers.readline()

    def close(self) -> None:
        """Kill what is left of the engine."""
        self._pipe.close()
        self._process.wait()
        self._answers.close()
