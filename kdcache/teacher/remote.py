"""Models whose files are in an object store or on the hub.

Every process of a node that loads a model takes its files from the copies that the node's
`DiskCache` keeps, so each file is fetched once a node: under a lock, by the process that comes
first. The driver of a build needs no weights: for their identity it takes the checksums that the
store lists, which a worker compares before it loads the model.

Cost: a listing, and once a node the bytes of the files. Weights in a store that lists no checksums
are fetched by the driver, too, and hashed.
Guarantee: what is loaded has the sizes and checksums that the store lists before and after it is
fetched; a model that was replaced is refused. Bits on their way are guarded by TLS alone.
"""

from __future__ import annotations

import contextlib
import fnmatch
import shutil
import tempfile
import weakref
from pathlib import Path

from kdcache.errors import UsageError
from kdcache.pretrained import PATTERNS, WEIGHTS
from kdcache.storage import open_storage, redact
from kdcache.storage.remote import RemoteStorage


class RemoteModel:
    """The files of a model at a URL, in a folder of links to this machine's copies.

    Attributes:
        folder: with the files that were fetched. It is removed with this object.
        weights: size and checksum of each weight file, by name.
    """

    def __init__(self, url: str, role: str, *, weights: bool) -> None:
        """Fetch what this machine does not have.

        Raises:
            UsageError: there is no model.
        """
        storage = open_storage(url)
        assert isinstance(storage, RemoteStorage), "a URL is remote"
        listed = storage.facts()
        files = {n: f for n, f in listed.items() if any(fnmatch.fnmatch(n, p) for p in PATTERNS)}
        if "config.json" not in files and "adapter_config.json" not in files:
            raise UsageError(
                f"{role} {redact(url)} has no config.json: it is not a Hugging Face model folder. "
                "Name the folder that directly holds the model's files."
            )
        self.weights = {n: f for n, f in files.items() if fnmatch.fnmatch(n, WEIGHTS)}
        held = contextlib.ExitStack()  # copies in use are not removed
        weakref.finalize(self, held.close)
        self.folder = Path(tempfile.mkdtemp(prefix="kdcache-teacher-"))
        held.callback(shutil.rmtree, self.folder, ignore_errors=True)
        for name, facts in files.items():
            if weights or name not in self.weights or not facts.checksum:
                version = facts.checksum or facts.changed
                path = held.enter_context(storage.hold(name, version=version))
                (self.folder / name).symlink_to(path)
        now = storage.facts()
        for name, facts in files.items():
            if now.get(name) != facts:
                raise UsageError(
                    f"{redact(url)}/{name} was changed while it was fetched. Leave a model as it "
                    "is while it is in use, and run the same command again."
                )
