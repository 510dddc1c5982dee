"""The folder of a run in an object store: `--out s3://bucket/run`.

The run works in a folder of its machine, and what counts is what the store holds. Before the first
step the last whole checkpoint comes from there; each new one is uploaded once it is whole on the
disk, its seal (the list of its files, here with their SHA-256) last, and is removed seal first. The
finished student follows in the same way, `train.json` behind everything else.

Guarantee: as of a run on a disk. Whatever is killed, a checkpoint in the store is whole or does not
count. The training that began last owns the run: an earlier one that still works, on a machine that
was thought lost, ends before its next checkpoint. Cost: a listing and a few requests a checkpoint,
while all workers wait for its upload.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import distributed
from transformers import TrainerCallback, TrainerState

from kdcache.commands.run_folder import METRICS_FILE, RAY, RESULT_FILE, TrainFolder, parse_metrics
from kdcache.errors import CorruptCacheError, UsageError
from kdcache.files import LOCK_FILE, inner, write_json, write_text
from kdcache.storage import redact, sha256_file
from kdcache.storage.disk import DiskCache
from kdcache.storage.remote import RemoteStorage
from kdcache.student.checkpoints import (
    STATE_FILE,
    checkpoint_name,
    checkpoints,
    is_whole,
    step_of,
)

logger = logging.getLogger(__name__)

_OWNER = "owner.json"
_LOGS = "runs"  # of TensorBoard
_METRICS_EVERY = 30.0  # seconds between two uploads of what was logged since


class RunStore(TrainFolder):
    """A run's folder in an object store, and the folder in which this machine works on it."""

    ask_every = 10.0

    def __init__(self, url: str) -> None:
        """Find the store; sends no request yet.

        Args:
            url: fsspec URL of the run's folder.

        Raises:
            UsageError: a URL that cannot be opened.
        """
        self.url = url.rstrip("/")
        self._storage = RemoteStorage(self.url)
        disk = DiskCache.of_environment().folder
        key = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        super().__init__(disk.with_name(f"{disk.name}-runs") / key / self.url.rsplit("/", 1)[-1])
        self.ray = self.path.parent / RAY

    # What is there

    @property
    def shown(self) -> str:
        """See `TrainFolder.shown`."""
        return redact(self.url)

    def names(self) -> set[str]:
        """See `TrainFolder.names`."""
        return {*self._storage.entries()} - {_OWNER}

    def result(self) -> dict[str, Any] | None:
        """See `TrainFolder.result`."""
        return self._json(RESULT_FILE)

    def _is_strange(self, names: Set[str]) -> bool:
        begun = any(name.startswith("checkpoint-") for name in names)
        return super()._is_strange(names) and not begun

    def read_metrics(self) -> list[dict[str, Any]]:
        """See `TrainFolder.read_metrics`."""
        return parse_metrics(self._text(METRICS_FILE))

    def note(self, name: str, text: str) -> None:
        """See `TrainFolder.note`."""
        self._storage.write(f"{RAY}/{name}", text.encode())

    def take_note(self, name: str) -> str:
        """See `TrainFolder.take_note`."""
        text = self._text(f"{RAY}/{name}")
        self._storage.remove(f"{RAY}/{name}")
        return text

    def _text(self, name: str) -> str:
        """A small file; empty where there is none."""
        try:
            return self._storage.read(name).decode()
        except FileNotFoundError:
            return ""

    def _json(self, name: str) -> dict[str, Any] | None:
        text = self._text(name)
        return dict(json.loads(text)) if text else None

    def steps(self) -> dict[int, dict[str, Any]]:
        """Steps and seals of the whole checkpoints."""
        found = {}
        for name in self._storage.entries():
            if name.startswith("checkpoint-") and name.removeprefix("checkpoint-").isdecimal():
                seal, sizes = self._json(f"{name}/{STATE_FILE}"), self._storage.tree(name)
                if seal is not None and all(sizes.get(n) == b for n, b in seal["files"].items()):
                    found[step_of(Path(name))] = seal
        return found

    def last(self) -> str | None:
        """See `TrainFolder.last`."""
        steps = self.steps()
        return f"{self.shown}/{checkpoint_name(max(steps))}" if steps else None

    # Ownership

    def claim(self, owner: str = "") -> None:
        """See `TrainFolder.claim`."""
        self.owner = owner or uuid.uuid4().hex
        if owner:
            self.check_claim()
            return
        self._storage.write(_OWNER, json.dumps({"id": self.owner}).encode())

    def check_claim(self) -> None:
        """Look whether it still is.

        Raises:
            UsageError: another training has begun since.
        """
        owner = (self._json(_OWNER) or {}).get("id")
        if owner != self.owner:
            raise UsageError(
                f"another training has begun in {self.shown} and continues the run: this one ends. "
                "Run one at a time, or choose another --out."
            )

    # Store to disk

    def bring(self) -> None:
        """Bring the log, the last checkpoint and the best one to this machine; drop what differs.

        Processes of one machine take turns, and all but the first find everything there.
        """
        with self._turn():
            steps = self.steps()
            wanted: set[int] = set()
            if steps:
                last = self._fetch(max(steps), steps[max(steps)])
                best = json.loads((last / "trainer_state.json").read_text())["best_global_step"]
                wanted = {max(steps), *({best} & steps.keys())}
                for step in sorted(wanted):
                    self._fetch(step, steps[step])
            for folder in checkpoints(self.path):
                if step_of(folder) not in wanted:
                    shutil.rmtree(folder)
            for path in self.path.iterdir():
                if path.is_file() and path.name != LOCK_FILE:
                    path.unlink()
            if text := self._text(METRICS_FILE):
                write_text(self.path / METRICS_FILE, text)

    def bring_checkpoint(self, step: int) -> None:
        """See `TrainFolder.bring_checkpoint`."""
        with self._turn():
            self._fetch(step, self.steps()[step])

    def _fetch(self, step: int, seal: dict[str, Any]) -> Path:
        """A checkpoint on this machine's disk; nothing is downloaded where it is there."""
        name = checkpoint_name(step)
        folder = self.path / name
        here = folder / STATE_FILE
        if here.is_file() and json.loads(here.read_text()) == seal and is_whole(folder):
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        for file in seal["files"]:
            path = folder / inner(file)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._storage.download(f"{name}/{file}", path)
            found = sha256_file(path)
            if found != seal["sha256"].get(file, found):
                raise CorruptCacheError(
                    f"{self.shown}/{name}/{file}: its bytes have another SHA-256 than they were "
                    f"written with. Delete {self.shown}/{name} to continue from the one before."
                )
        write_json(here, seal)
        return folder

    @contextmanager
    def _turn(self) -> Iterator[None]:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self.path.parent / LOCK_FILE, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # Disk to store

    def upload_checkpoint(self, step: int) -> None:
        """Upload a sealed checkpoint, then remove those that this machine has no longer."""
        self.check_claim()
        name = checkpoint_name(step)
        seal = json.loads((self.path / name / STATE_FILE).read_text())
        self._storage.remove(f"{name}/{STATE_FILE}")  # of a sitting that was killed
        sums = {file: self._upload(f"{name}/{file}") for file in seal["files"]}
        others = self._storage.tree(name)  # of workers on other machines
        seal["files"] = {**{n: b for n, b in others.items() if n not in sums}, **seal["files"]}
        document = {**seal, "sha256": sums}
        write_json(self.path / name / STATE_FILE, document)
        self.check_claim()
        self._upload(f"{name}/{STATE_FILE}")
        self.upload_log()
        kept = {path.name for path in checkpoints(self.path)}
        for entry in self._storage.entries():
            if entry.startswith("checkpoint-") and entry not in kept:
                self._storage.remove(f"{entry}/{STATE_FILE}")
                for file in self._storage.tree(entry):
                    self._storage.remove(f"{entry}/{file}")

    def upload_own(self, step: int) -> None:
        """Upload what a worker on another machine than the first one's has of a checkpoint."""
        name = checkpoint_name(step)
        if (self.path / name / STATE_FILE).is_file() or not (self.path / name).is_dir():
            return
        for path in (self.path / name).rglob("*"):
            if path.is_file():
                self._upload(f"{name}/{path.relative_to(self.path / name)}")
        shutil.rmtree(self.path / name)

    def upload_log(self) -> None:
        """Upload `metrics.jsonl` and the logs of trackers."""
        logs = [self.path / METRICS_FILE, *(self.path / _LOGS).rglob("*")]
        for path in logs:
            if path.is_file():
                self._upload(str(path.relative_to(self.path)))

    def callbacks(self) -> list[TrainerCallback]:
        """See `TrainFolder.callbacks`."""
        return [StoreCallback(self)]

    def finish(self) -> None:
        """See `TrainFolder.finish`."""
        self.check_claim()
        self.upload_log()
        names = {path.name for path in self.path.iterdir() if path.is_file()}
        for name in sorted(names - {LOCK_FILE, METRICS_FILE, RESULT_FILE}):
            self._upload(name)
        self._upload(RESULT_FILE)
        self._storage.remove(_OWNER)

    def clear(self) -> None:
        """See `TrainFolder.clear`; all processes are done with it then."""
        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()
        shutil.rmtree(self.path, ignore_errors=True)

    def _upload(self, name: str) -> str:
        """Upload one file; its SHA-256."""
        self._storage.upload(name, self.path / name)
        return sha256_file(self.path / name)


class StoreCallback(TrainerCallback):  # type: ignore[misc]
    """Uploads each checkpoint when it is whole, and the log every now and then."""

    def __init__(self, store: RunStore) -> None:
        self._store, self._uploaded = store, time.monotonic()

    def on_save(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Upload; workers on other machines their own files first."""
        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()  # the first worker has sealed it
            if args.local_process_index == 0:
                self._store.upload_own(state.global_step)
            distributed.barrier()
        if state.is_world_process_zero:
            self._store.upload_checkpoint(state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Upload the log if the last time is some seconds ago."""
        if state.is_world_process_zero and time.monotonic() - self._uploaded > _METRICS_EVERY:
            self._uploaded = time.monotonic()
            self._store.upload_log()
