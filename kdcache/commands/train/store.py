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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdcache.commands.train.callbacks import METRICS_FILE
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


class RunStore:
    """A run's folder in an object store, and the folder in which this machine works on it."""

    def __init__(self, url: str) -> None:
        """Find the store; sends no request yet.

        Args:
            url: fsspec URL of the run's folder.

        Raises:
            UsageError: a URL that cannot be opened.
        """
        self.url = url.rstrip("/")
        self.shown = redact(self.url)
        self.owner = ""
        self._storage = RemoteStorage(self.url)
        disk = DiskCache.of_environment().folder
        key = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.folder = disk.with_name(f"{disk.name}-runs") / key / self.url.rsplit("/", 1)[-1]

    # What is there

    def entries(self) -> list[str]:
        """Names of the files and folders at the top."""
        return [name for name in self._storage.entries() if name != _OWNER]

    def document(self, name: str) -> dict[str, Any] | None:
        """A JSON file; None where there is none."""
        try:
            return dict(json.loads(self._storage.read(name)))
        except FileNotFoundError:
            return None

    def take(self, name: str) -> str:
        """Read a small text and remove it; empty where there is none."""
        try:
            text = self._storage.read(name).decode()
        except FileNotFoundError:
            return ""
        self._storage.remove(name)
        return text

    def read_metrics(self) -> str:
        """The log, as far as it was uploaded."""
        try:
            return self._storage.read(METRICS_FILE).decode()
        except FileNotFoundError:
            return ""

    def steps(self) -> dict[int, dict[str, Any]]:
        """Steps and seals of the whole checkpoints."""
        found = {}
        for name in self._storage.entries():
            if name.startswith("checkpoint-") and name.removeprefix("checkpoint-").isdecimal():
                seal, sizes = self.document(f"{name}/{STATE_FILE}"), self._storage.tree(name)
                if seal is not None and all(sizes.get(n) == b for n, b in seal["files"].items()):
                    found[step_of(Path(name))] = seal
        return found

    def last(self) -> str | None:
        """Address of the last whole checkpoint, without credentials."""
        steps = self.steps()
        return f"{self.shown}/{checkpoint_name(max(steps))}" if steps else None

    # Ownership

    def claim(self, owner: str = "") -> None:
        """Become the training that owns the run, or a process of the one that does."""
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
        owner = (self.document(_OWNER) or {}).get("id")
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
            for folder in checkpoints(self.folder):
                if step_of(folder) not in wanted:
                    shutil.rmtree(folder)
            for path in self.folder.iterdir():
                if path.is_file() and path.name != LOCK_FILE:
                    path.unlink()
            if text := self.read_metrics():
                write_text(self.folder / METRICS_FILE, text)

    def bring_checkpoint(self, step: int) -> None:
        """Bring a checkpoint to this machine, unless it is there."""
        with self._turn():
            self._fetch(step, self.steps()[step])

    def _fetch(self, step: int, seal: dict[str, Any]) -> Path:
        """A checkpoint on this machine's disk; nothing is downloaded where it is there."""
        name = checkpoint_name(step)
        folder = self.folder / name
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
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self.folder.parent / LOCK_FILE, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # Disk to store

    def upload_checkpoint(self, step: int) -> None:
        """Upload a sealed checkpoint, then remove those that this machine has no longer."""
        self.check_claim()
        name = checkpoint_name(step)
        seal = json.loads((self.folder / name / STATE_FILE).read_text())
        self._storage.remove(f"{name}/{STATE_FILE}")  # of a sitting that was killed
        sums = {file: self._upload(f"{name}/{file}") for file in seal["files"]}
        others = self._storage.tree(name)  # of workers on other machines
        seal["files"] = {**{n: b for n, b in others.items() if n not in sums}, **seal["files"]}
        document = {**seal, "sha256": sums}
        write_json(self.folder / name / STATE_FILE, document)
        self.check_claim()
        self._upload(f"{name}/{STATE_FILE}")
        self.upload_log()
        kept = {path.name for path in checkpoints(self.folder)}
        for entry in self._storage.entries():
            if entry.startswith("checkpoint-") and entry not in kept:
                self._storage.remove(f"{entry}/{STATE_FILE}")
                for file in self._storage.tree(entry):
                    self._storage.remove(f"{entry}/{file}")

    def upload_own(self, step: int) -> None:
        """Upload what a worker on another machine than the first one's has of a checkpoint."""
        name = checkpoint_name(step)
        if (self.folder / name / STATE_FILE).is_file() or not (self.folder / name).is_dir():
            return
        for path in (self.folder / name).rglob("*"):
            if path.is_file():
                self._upload(f"{name}/{path.relative_to(self.folder / name)}")
        shutil.rmtree(self.folder / name)

    def upload_log(self) -> None:
        """Upload `metrics.jsonl` and the logs of trackers."""
        logs = [self.folder / METRICS_FILE, *(self.folder / _LOGS).rglob("*")]
        for path in logs:
            if path.is_file():
                self._upload(str(path.relative_to(self.folder)))

    def finish(self, last: str) -> None:
        """Upload the finished student.

        Args:
            last: name of the file that is uploaded last.
        """
        self.check_claim()
        self.upload_log()
        names = {path.name for path in self.folder.iterdir() if path.is_file()}
        for name in sorted(names - {LOCK_FILE, METRICS_FILE, last}):
            self._upload(name)
        self._upload(last)
        self._storage.remove(_OWNER)

    def clear(self) -> None:
        """Remove the folder of this machine."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _upload(self, name: str) -> str:
        """Upload one file; its SHA-256."""
        self._storage.upload(name, self.folder / name)
        return sha256_file(self.folder / name)


class StoreCallback(TrainerCallback):  # type: ignore[misc]
    """Uploads each checkpoint when it is whole, and the log every now and then."""

    def __init__(self, store: RunStore) -> None:
        self._store, self._uploaded = store, time.monotonic()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Upload; workers on other machines their own files first."""
        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()  # the first worker has sealed it
            if args.local_process_index == 0:
                self._store.upload_own(state.global_step)
            distributed.barrier()
        if state.is_world_process_zero:
            self._store.upload_checkpoint(state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Upload the log if the last time is some seconds ago."""
        if state.is_world_process_zero and time.monotonic() - self._uploaded > _METRICS_EVERY:
            self._uploaded = time.monotonic()
            self._store.upload_log()
