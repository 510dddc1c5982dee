"""A real S3 server in a process of its own, and a proxy before it that misbehaves by rule.

The server is moto's, which keeps objects in memory. The proxy speaks real HTTP on a real socket, so
that clients meet what a network does to them: errors, silence, cut connections, lost answers.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import fsspec

# What any S3 client needs to know; the server takes every signature.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIATESTING",
    "AWS_SECRET_ACCESS_KEY": "never/printed+anywhere",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_DEADLINE = 60.0


class S3Server:
    """moto's server as a process on a free port of the loopback device."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + _DEADLINE
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/moto-api/"):
                    return
            except urllib.error.URLError:
                assert self._process.poll() is None, "the server ended while it started"
                assert time.monotonic() < deadline, "the server does not answer"
                threading.Event().wait(0.05)

    def close(self) -> None:
        """End the process."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def make_bucket(self, name: str) -> None:
        """An empty bucket of that name."""
        self._store().mkdir(name)

    def objects(self, url: str) -> dict[str, bytes]:
        """Name below `url` (`s3://bucket/prefix`) and content of every object there."""
        store = self._store()
        prefix = url.removeprefix("s3://")
        found = store.find(prefix)
        return {name[len(prefix) + 1 :]: store.cat_file(name) for name in found}

    def _store(self) -> Any:
        return fsspec.filesystem(
            "s3",
            key=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            secret=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=self.url,
            use_listings_cache=False,
        )


Kind = Literal["error", "silence", "reset", "lost", "truncate", "short", "flip", "hold"]


@dataclass
class Fault:
    """What goes wrong with which requests.

    Attributes:
        kind: `error` answers with `status`; `silence` never answers; `reset` cuts the connection
            before the request reaches the server and `lost` after it did; `truncate` breaks off in
            the middle of the answer; `short` sends half of it as if it were all; `flip` changes
            one bit of it; `hold` lets the request wait until the fault is released.
        match: what the line `METHOD /path?query` must contain, as a regular expression.
        header: a header the request must have.
        every: of the requests that match, each one of this number.
        times: how often at most.
        status: of `error`.
        code: S3's word for that error.
    """

    kind: Kind
    match: str = ""
    header: str | None = None
    every: int = 1
    times: int | None = None
    status: int = 500
    code: str = "InternalError"
    seen: int = 0
    hits: int = 0
    held: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def strikes(self, line: str, headers: Mapping[str, str]) -> bool:
        """Whether this request is one of those; counts it."""
        if not re.search(self.match, line) or (self.header and self.header not in headers):
            return False
        self.seen += 1
        if self.seen % self.every or (self.times is not None and self.hits >= self.times):
            return False
        self.hits += 1
        return True


class Proxy:
    """Passes requests on to a server, apart from the faults it is given."""

    def __init__(self, server: S3Server) -> None:
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self._lock = threading.Lock()
        self._conditional = threading.Lock()
        self._closed = threading.Event()
        upstream = server.url.removeprefix("http://")
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = _DEADLINE

            def log_message(self, *_: Any) -> None:
                pass

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy._fault(f"{self.command} {self.path}", self.headers)
                kind = None if fault is None else fault.kind
                if fault is not None and kind == "error":
                    return self._answer(fault.status, {}, _error(fault.code))
                if fault is not None and kind == "hold":
                    fault.held.set()
                    proxy._wait(fault.released)
                if kind == "silence":
                    proxy._wait(proxy._closed)
                if kind in ("silence", "reset"):
                    return self._cut()
                # moto looks and writes in two steps; a store does it in one.
                one_step = "If-None-Match" in self.headers
                with proxy._conditional if one_step else contextlib.nullcontext():
                    status, headers, answer = _ask(
                        upstream, self.command, self.path, self.headers, body
                    )
                if kind == "lost":
                    return self._cut()
                if kind == "short":
                    answer = answer[: len(answer) // 2]
                    headers["Content-Length"] = str(len(answer))
                if kind == "flip" and answer:
                    middle = len(answer) // 2
                    answer = answer[:middle] + bytes([answer[middle] ^ 1]) + answer[middle + 1 :]
                self._answer(status, headers, answer, cut=kind == "truncate")

            def _answer(
                self, status: int, headers: dict[str, str], body: bytes, cut: bool = False
            ) -> None:
                headers.setdefault("Content-Length", str(len(body)))
                self.send_response_only(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body[: len(body) // 2] if cut else body)
                if cut:
                    self.wfile.flush()
                    self._cut()

            def _cut(self) -> None:
                # Without lingering, closing sends a reset instead of an orderly end.
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.close_connection = True
                self.connection.close()

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass  # a client that was killed is part of the tests

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def _fault(self, line: str, headers: Any) -> Fault | None:
        with self._lock:
            self.requests.append(line)
            return next((f for f in self.faults if f.strikes(line, headers)), None)

    def _wait(self, event: threading.Event) -> None:
        while not event.wait(0.1) and not self._closed.is_set():
            pass

    def close(self) -> None:
        """Stop listening, and let go of what is held."""
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def environment(endpoint: str) -> dict[str, str]:
    """The environment of a process that is to use this endpoint."""
    return {**os.environ, **CREDENTIALS, "AWS_ENDPOINT_URL": endpoint}


def _ask(
    upstream: str, method: str, path: str, headers: Any, body: bytes
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(upstream, timeout=_DEADLINE)
    try:
        connection.request(method, path, body, {k: v for k, v in headers.items() if k != "Expect"})
        response = connection.getresponse()
        hop = {"connection", "transfer-encoding", "date", "server"}
        kept = {k: v for k, v in response.getheaders() if k.lower() not in hop}
        return response.status, kept, response.read()
    finally:
        connection.close()


def _error(code: str) -> bytes:
    return (
        f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>as injected</Message></Error>'
    ).encode()
