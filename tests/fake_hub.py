"""As much of the Hugging Face hub as reading and writing the files of a dataset takes, here.

It answers what `HfFileSystem` asks: whether there is such a dataset, what is in it, and ranges of
files. Errors are the real hub's: a dataset that is not there is a 401 to somebody who has not
signed in, a gated one a 403. Uploads go by git LFS: what is small is in the commit itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

DATASET = "team/novels"
GATED = "team/secrets"


@dataclass
class Account:
    """Whose dataset is written to.

    Attributes:
        token: what every request must have.
        expired: whether it has.
        fault: called with each request, "PUT /path": an HTTP status or 0, which drops the
            connection, and None to answer.
        requests: those that were answered.
        private: how the repository was made.
    """

    token: str
    expired: bool = False
    fault: Callable[[str], int | None] = lambda request: None
    requests: list[str] = field(default_factory=list)
    private: bool | None = None
    objects: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def fake_hub(files: Mapping[str, bytes], account: Account | None = None) -> Iterator[str]:
    """Serve a dataset of these files (path to content); gives the address, for `HF_ENDPOINT`.

    With an account the files, a dictionary, change as it writes.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def _refused(self) -> bool:
            """Answer what has a fault, or no token that is right."""
            if account is None:
                return False
            path = unquote(urlsplit(self.path).path)
            request = f"{self.command} {path}"
            status = account.fault(request)
            if status == 0:
                self.close_connection = True
                self.connection.close()
            elif status is not None:
                self._fail(status, "InternalError")
            elif account.expired:
                self._fail(401, 'User Access Token "mine" is expired')
            elif path.startswith("/lfs/"):  # an address that needs no token
                return False
            elif self.headers["Authorization"] != f"Bearer {account.token}":
                self._fail(401, "Invalid username or password.")
            else:
                account.requests.append(request)
                return False
            return True

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self._refused():
                return
            assert account is not None
            digest = urlsplit(self.path).path.rsplit("/", 1)[-1]
            assert hashlib.sha256(body).hexdigest() == digest
            account.objects[digest] = body
            account.requests.append("PUT")
            self._answer(b"")

        def _write(self, path: str, body: bytes) -> bool:
            """Answer a request that writes."""
            if account is None:
                return False
            if path == "/api/repos/create":
                made, asked = account.private is None, json.loads(body)
                account.private = asked.get("private", asked.get("visibility") == "private")
                self._answer(
                    json.dumps(
                        {"url": f"http://{self.headers['Host']}/datasets/{DATASET}"}
                    ).encode(),
                    200 if made else 409,
                )
            elif path == "/api/validate-yaml":
                self._answer(b'{"errors": [], "warnings": []}')
            elif path == f"/api/datasets/{DATASET}/preupload/main":
                found = [
                    {"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                self._answer(json.dumps({"files": found}).encode())
            elif path == f"/datasets/{DATASET}.git/info/lfs/objects/batch":
                place = f"http://{self.headers['Host']}/lfs"
                found = []
                for one in json.loads(body)["objects"]:
                    upload = {"href": f"{place}/{one['oid']}?X-Amz-Signature=signed"}
                    there = one["oid"] in account.objects
                    found.append({**one, **({} if there else {"actions": {"upload": upload}})})
                self._answer(json.dumps({"transfer": "basic", "objects": found}).encode())
            elif path == f"/api/datasets/{DATASET}/commit/main":
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])  # type: ignore[index]
                    elif line["key"] == "lfsFile":
                        files[value["path"]] = account.objects[value["oid"]]  # type: ignore[index]
                url = f"http://{self.headers['Host']}/datasets/{DATASET}/commit/{'0' * 40}"
                self._answer(json.dumps({"commitUrl": url, "commitOid": "0" * 40}).encode())
            else:
                return False
            return True

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if self._refused():
                return
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
            data = self.rfile.read(int(self.headers["Content-Length"]))
            if self._refused() or self._write(unquote(urlsplit(self.path).path), data):
                return
            body = unquote(data.decode())
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


def _mode(path: str) -> str:
    """How a file is kept: in git itself, or beside it."""
    return "lfs" if path.endswith(".h5") else "regular"


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
                if _mode(path) == "lfs":
                    digest = hashlib.sha256(content).hexdigest()
                    found[path]["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
                else:
                    text = b"blob %d\0" % len(content) + content
                    found[path]["oid"] = hashlib.sha1(text).hexdigest()
            else:
                found[path] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
    return list(found.values())
