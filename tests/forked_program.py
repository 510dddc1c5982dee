"""Programs `kdcache` and `python` that have loaded the libraries: a server forks itself for each.

Torch and transformers take six seconds of a core to load, and documents run some fifty commands.
Each still has a process, arguments, folder, environment and output of its own. `test_loaded` and
the tests of signals start processes in which nothing is loaded.

Run as a script it is the server: `python forked_program.py SOCKET`.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NoReturn

LATE = (
    "kdcache.cli.main",
    "kdcache.plots",
    "kdcache.student.trainer",
    "matplotlib.pyplot",
    "sklearn.metrics",
    "torch._dynamo",
    "transformers.models.bert.modeling_bert",
)
COMMANDS = ("build", "evaluate", "finetune", "inspect", "plan", "predict", "train", "verify")

_PROGRAM = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
request = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [request], [0, 1, 2])
sys.exit(int(server.recv(16) or 70))
"""


@contextmanager
def forked_program(folder: Path) -> Iterator[Path]:
    """The folder of such programs, to be put in front of PATH."""
    address = str(folder / "socket")
    programs = folder / "bin"
    programs.mkdir()
    for name in ("kdcache", "python"):
        (programs / name).write_text(_PROGRAM.format(python=sys.executable, address=address))
        (programs / name).chmod(0o755)
    command = [sys.executable, __file__, address]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            yield programs
        finally:
            os.killpg(server.pid, signal.SIGTERM)


def _serve(address: str) -> None:
    """Answer each connection with the exit status of the command that it asks for."""
    import kdcache

    for name in COMMANDS:
        getattr(kdcache, name)
    for name in LATE:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen()
    os.fsync = lambda _: None  # type: ignore[assignment,misc]  # as in `conftest.py`
    gc.freeze()  # else each program's collector would copy all that is shared
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    while True:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        request, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
        command = os.fork()
        if not command:
            listener.close()
            connection.close()
            _end(partial(become, *json.loads(request), files))
        _, status = os.waitpid(command, 0)
        connection.send(str(os.waitstatus_to_exitcode(status) % 256).encode())
        os._exit(0)


def _end(run: Callable[[], None]) -> NoReturn:
    """Run a program and end with its exit status, without taking a million objects apart."""
    try:
        run()
        status: object = 0
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status or 0))  # type: ignore[call-overload]


def become(words: list[str], folder: str, environment: dict[str, str], files: list[int]) -> None:
    """Be the program of these words from here on: its three files, its folder, its environment."""
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    program, *words = words
    if Path(program).name == "kdcache":
        sys.argv = [str(Path(sys.executable).with_name("kdcache")), *words]
        sys.path[0] = str(Path(sys.executable).parent)
        from kdcache.cli.main import main

        main()
    elif words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        exec(words[1], vars(ModuleType("__main__")))
    elif words[0].startswith("-"):
        os.execv(sys.executable, [sys.executable, *words])
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    _serve(sys.argv[1])
