"""As much of the Hugging Face hub as reading the files of a dataset takes, on this machine.

It answers what `HfFileSystem` asks: whether there is such a dataset, what is in it, and ranges of
files. Errors are the real hub's: a dataset that is not there is a 401 to somebody who has not
signed in, a gated one a 403.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

DATASET = "team/novels"
GATED = "team/secrets"


@contextmanager
def fake_hub(files: Mapping[str, bytes]) -> Iterator[str]:
    """Serve a dataset of these files (path to content); gives the address, for `HF_ENDPOINT`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if f"/{GATED}" in path:
                self._fail(403, "GatedRepo")
            elif found := re.fullmatch(f"/api/datasets/{DATASET}(/revision/main)?", path):
                self._answer(json.dumps({"id": DATASET, "sha": "0" * 40, "siblings": []}).encode())
            elif found := re.fullmatch(f"/api/datasets/{DATASET}/tree/main/?(.*)", path):
                self._tree(found[1], recursive="recursive=true" in self.path.lower())
            elif found := re.fullmatch(f"/datasets/{DATASET}/resolve/main/(.+)", path):
                self._file(found[1])
            else:
                self._fail(401, "RepoNotFound")

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self) -> None:
            """Facts about some paths; only some versions of the client ask for them."""
            body = unquote(self.rfile.read(int(self.headers["Content-Length"])).decode())
            wanted = re.findall("paths=([^&]*)", body)
            entries = [e for e in _entries(files, "", True) if e["path"] in wanted]
            self._answer(json.dumps(entries).encode())

        def _tree(self, folder: str, recursive: bool) -> None:
            entries = _entries(files, folder, recursive)
            if folder and not entries:
                self._fail(404, "EntryNotFound")
            else:
                self._answer(json.dumps(entries).encode())

        def _file(self, name: str) -> None:
            if name not in files:
                self._fail(404, "EntryNotFound")
                return
            data, status = files[name], 200
            if found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                data, status = data[int(found[1]) : int(found[2]) + 1], 206
            self._answer(data, status)

        def _fail(self, status: int, code: str) -> None:
            self._answer(b"{}", status, {"X-Error-Code": code, "X-Error-Message": code})

        def _answer(
            self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None
        ) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _entries(files: Mapping[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """What the hub lists below a folder; nothing where there is none."""
    base = f"{folder}/" if folder else ""
    found: dict[str, dict[str, Any]] = {}
    for name, content in files.items():
        if not name.startswith(base):
            continue
        steps = name.removeprefix(base).split("/")
        for i in range(1, len(steps) + 1):
            if i > 1 and not recursive:
                break
            path = base + "/".join(steps[:i])
            if path == name:
                found[path] = {"type": "file", "oid": "0" * 40, "size": len(content), "path": path}
            else:
                found[path] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
    return list(found.values())
