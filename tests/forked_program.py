"""A program `kdcache` that has loaded its libraries: a server forks itself for each command.

Torch and transformers take six seconds of a core to load, and documents run some fifty commands.
Each still has a process, arguments, folder, environment and output of its own. A process that
begins with nothing loaded is what the README's commands are run in.

Run as a script it is the server: `python forked_program.py SOCKET`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMMANDS = ("build", "evaluate", "finetune", "inspect", "plan", "predict", "train", "verify")

_PROGRAM = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [request], [0, 1, 2])
sys.exit(int(server.recv(16) or 70))
"""


@contextmanager
def forked_program(folder: Path) -> Iterator[Path]:
    """The folder of such a program `kdcache`, to be put in front of PATH."""
    address = str(folder / "socket")
    program = folder / "bin" / "kdcache"
    program.parent.mkdir()
    program.write_text(_PROGRAM.format(python=sys.executable, address=address))
    program.chmod(0o755)
    command = [sys.executable, __file__, address]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            yield program.parent
        finally:
            os.killpg(server.pid, signal.SIGTERM)


def _serve(address: str) -> None:
    """Answer each connection with the exit status of the command that it asks for."""
    import kdcache

    for name in COMMANDS:
        getattr(kdcache, name)
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
            _become(*json.loads(request), files)
            return
        _, status = os.waitpid(command, 0)
        connection.send(str(os.waitstatus_to_exitcode(status) % 256).encode())
        os._exit(0)


def _become(words: list[str], folder: str, environment: dict[str, str], files: list[int]) -> None:
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    program = Path(sys.executable).with_name("kdcache")
    sys.argv, sys.path[0] = [str(program), *words], str(program.parent)
    from kdcache.cli.main import main

    main()


if __name__ == "__main__":
    _serve(sys.argv[1])
