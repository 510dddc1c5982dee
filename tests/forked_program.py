"""Programs `kdcache` and `python` that have loaded the libraries: a server forks itself for each.

Torch and transformers take six seconds of a core to load, and documents run some fifty commands.
Each still has a process, arguments, folder, environment and output of its own. `test_loaded` and
the tests of signals start processes in which nothing is loaded.

Run as a script it is the server: `python forked_program.py SOCKET`.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

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
    for name in ("kdcache.cli.main", "transformers.models.bert.modeling_bert", "sklearn.metrics"):
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen()
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
            become(*json.loads(request), files)
            return
        _, status = os.waitpid(command, 0)
        connection.send(str(os.waitstatus_to_exitcode(status) % 256).encode())
        os._exit(0)


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
