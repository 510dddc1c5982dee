"""fsspec with deadlines and retries: a request returns, or raises an error that states what to do.

Each request has a deadline and is retried, with growing pauses, while the store has trouble. The
clients' own handling is not enough: s3fs waits without bound on an upload to a server that falls
silent before the body is sent, gives up on a server's own faults within seconds, and does not check
the length of a range that it received.

Cost: none if the first request succeeds. Guarantee: no request outlives `_PATIENCE` and one
deadline, and the outcome is an answer, `FileNotFoundError`, `FileExistsError`, or an error with a
cure.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import logging
import random
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem
from huggingface_hub import constants

from kdcache.errors import IncompleteError, UsageError, require
from kdcache.humanize import redact

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PATIENCE = 120.0  # seconds in which a request is begun again
_UNRESOLVED = 5.0  # the same where the store's name is unknown and it has never answered
_SILENCE = 60.0  # seconds that an answer may take, and a second for each of these bytes
_SLOWEST = 1 << 18
_LONGEST_PAUSE = 10.0
_BLOCK = 4 << 20
_BLOCKS_KEPT = 2
_AT_ONCE = 32  # ranges, where the client itself asks for one after the other
_S3_CURE = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a role; "
    "it must be allowed to list, get, put and delete objects there."
)
_HUB_CURE = (
    "Sign in with `hf auth login`, or set HF_TOKEN to a token that may read there (write, for a "
    "push), and check the repository's name."
)
_GCS_CURE = (
    "Set GOOGLE_APPLICATION_CREDENTIALS, or give the machine a service account; it must be allowed "
    "to list, get, create and delete objects there."
)
# Protocol: extra of the package that brings it, and where credentials come from.
_STORES = {
    "s3": ("s3", _S3_CURE),
    "s3a": ("s3", _S3_CURE),
    "gs": ("gcs", _GCS_CURE),
    "gcs": ("gcs", _GCS_CURE),
    "hf": (None, _HUB_CURE),
}
_NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "DefaultCredentialsError",
)
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired")
# A request that is at fault itself will be refused again; these words and codes of S3 are troubles
# of the way or of the moment all the same.
_PASSING = (
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InvalidRange",
    "NoSuchUpload",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
)
_PASSING_STATUS = (408, 409, 416, 425, 429)


_ANSWERED: set[type] = set()  # kinds of file systems that have answered this process


class FileSystem:
    """An fsspec file system behind one URL."""

    def __init__(self, url: str) -> None:
        """Find the file system; sends no request yet.

        Raises:
            UsageError: no such protocol, its package is missing, or credentials in an address that
                takes none.
        """
        self.shown = redact(url)
        protocol = url.split("://")[0].split("::")[-1]
        extra, self._cure = _STORES.get(protocol, (None, "Check its permissions and credentials."))
        if extra and self.shown != url.split("?")[0]:
            raise UsageError(
                f"{self.shown}: credentials are not allowed in {protocol}:// addresses. "
                f"{self._cure}"
            )
        if protocol == "hf" and constants.HF_HUB_OFFLINE:
            raise UsageError(
                f"{self.shown}: HF_HUB_OFFLINE is set, so the hub is not asked. Unset it, or name "
                "a copy of the dataset on this machine."
            )
        require({extra: f"{protocol}://"} if extra else {})
        try:
            # Listings are the state of a cache: none may come from memory, or, where the client of
            # the hub keeps them in spite of that, from before.
            fresh = {"skip_instance_cache": True} if protocol == "hf" else {}
            self.fs, self.path = fsspec.core.url_to_fs(url, use_listings_cache=False, **fresh)
        except (ImportError, ValueError) as error:
            raise UsageError(
                f"{self.shown}: can't open {protocol}:// paths ({redact(str(error))}). To "
                "use them, install the package of fsspec for them."
            ) from None

    def ask(self, verb: str, *args: Any, volume: int = 0, **options: Any) -> Any:
        """Call a method of the file system that sends requests.

        Args:
            volume: bytes that go over the wire, at most; the deadline allows for them.

        Raises:
            FileNotFoundError, FileExistsError: as the method means them.
            UsageError: no credentials, no permission, no bucket, or a request that is refused.
            IncompleteError: no answer for too long, or credentials that have expired.
        """

        def request() -> Any:
            try:
                return self._call(verb, *args, volume=volume, **options)
            except Exception as error:
                if verb == "info" and _wordless(error):
                    with contextlib.suppress(FileNotFoundError):  # no file: a folder, perhaps
                        self._call("cat_file", args[0], volume=1, start=0, end=1)
                raise

        return self.patiently(request)

    def read(self, path: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of a file, all of them; raises as `ask` does."""
        return self.read_all([(path, start, stop)])[0]

    def read_all(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """As `read`, of many ranges at a time: path, start and stop of each."""
        done: dict[int, bytes] = {}

        def request() -> list[bytes]:
            left = {i: where for i, where in enumerate(ranges) if i not in done}
            paths, starts, stops = (list(column) for column in zip(*left.values(), strict=True))
            volume = sum(stops) - sum(starts)
            found = self._ranges(paths, starts, stops, volume)
            failed = []
            for (i, (_, start, stop)), data in zip(left.items(), found, strict=True):
                try:
                    done[i] = _whole(data, start, stop)
                except Exception as error:
                    failed.append(error)
            if failed:
                raise failed[0]
            return [done[i] for i in range(len(ranges))]

        return self.patiently(request)

    def _ranges(
        self, paths: list[str], starts: list[int], stops: list[int], volume: int
    ) -> list[bytes | Exception]:
        """The ranges, or their errors, many at a time."""
        in_turn = type(self.fs).cat_ranges is AbstractFileSystem.cat_ranges  # such as hf://
        if len(paths) == 1 or not in_turn:
            found: list[bytes | Exception] = self._call(
                "cat_ranges", paths, starts, stops, on_error="return", volume=volume
            )
            return found

        def one(path: str, start: int, stop: int) -> bytes | Exception:
            return self._ranges([path], [start], [stop], stop - start)[0]

        with ThreadPoolExecutor(min(_AT_ONCE, len(paths))) as pool:
            return list(pool.map(one, paths, starts, stops))

    def _call(self, verb: str, *args: Any, volume: int, **options: Any) -> Any:
        if isinstance(self.fs, AsyncFileSystem) and not self.fs.asynchronous:
            options["timeout"] = _SILENCE + volume / _SLOWEST
        return getattr(self.fs, verb)(*args, **options)

    def patiently(self, request: Callable[[], T]) -> T:
        """Begin a request to this store again while it has trouble; raises as `ask` does."""
        started = time.monotonic()
        for attempt in itertools.count():
            try:
                answer = request()
                _ANSWERED.add(type(self.fs))
                return answer
            except Exception as error:
                self._judge(error)
                waited = time.monotonic() - started
                offline = type(self.fs) not in _ANSWERED and _unresolved(error)
                if waited > (_UNRESOLVED if offline else _PATIENCE):
                    raise IncompleteError(
                        f"{self.shown} has not answered successfully for {waited:.0f} s "
                        f"({_words(error)}). What is committed stays valid: check the network and "
                        "the store's address, and run the same command again."
                    ) from error
                pause = min(_LONGEST_PAUSE, 0.2 * 2**attempt) * random.uniform(0.5, 1.0)
                logger.info("%s: %s; trying again in %.1f s", self.shown, _words(error), pause)
                time.sleep(pause)
        raise AssertionError

    def _judge(self, error: Exception) -> None:
        """Raise errors that a retry cannot cure."""
        code, status = _answer(error)
        kind = type(error).__name__
        if code in _PASSING or status in _PASSING_STATUS or _wordless(error):
            return
        if code == "NoSuchBucket":
            raise UsageError(
                f"{self.shown}: there is no such bucket. Create it, or correct the address."
            ) from error
        if isinstance(error, (FileNotFoundError, FileExistsError)):
            raise error
        if code in _EXPIRED or (status == 401 and "expired" in str(error)):
            raise IncompleteError(
                f"{self.shown}: the credentials have expired ({_words(error)}). Renew them and run "
                "the same command again: what is committed stays valid."
            ) from error
        if kind in _NO_CREDENTIALS:
            raise UsageError(f"{self.shown}: {_words(error)}. {self._cure}") from error
        if isinstance(error, PermissionError) or status in (401, 403):
            raise UsageError(
                f"{self.shown}: access denied ({_words(error)}). {self._cure}"
            ) from error
        refused = status is not None and 400 <= status < 500
        if refused or isinstance(error, ValueError) or kind == "ParamValidationError":
            raise UsageError(
                f"{self.shown}: the store refuses the request ({_words(error)}). Correct the "
                "address, the region or the store's settings."
            ) from error
        unsupported = isinstance(error, OSError) and error.errno == errno.ENOSYS
        ours = (AttributeError, LookupError, NotImplementedError, TypeError)
        if unsupported or isinstance(error, ours):
            raise error


class RemoteFile(io.RawIOBase):
    """A remote file to read and to seek in, fetched in blocks that arrive whole."""

    def __init__(self, url: str) -> None:
        """Ask for the size; raises as `FileSystem.ask` does."""
        self._store = FileSystem(url)
        self._size = int(self._store.ask("info", self._store.path)["size"])
        self._blocks: dict[int, bytes] = {}
        self._at = 0

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            if len(self._blocks) == _BLOCKS_KEPT:
                del self._blocks[next(iter(self._blocks))]
            start = number * _BLOCK
            stop = min(self._size, start + _BLOCK)
            self._blocks[number] = self._store.read(self._store.path, start, stop)
        return self._blocks[number]

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte, counted as files do."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill as much of a buffer as one block has; returns 0 at the end of the file."""
        if self._at >= self._size:
            return 0
        number, start = divmod(self._at, _BLOCK)
        data = self._block(number)[start : start + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _whole(data: bytes | Exception, start: int, stop: int) -> bytes:
    if isinstance(data, Exception):
        raise data
    if len(data) > stop - start and len(data) >= stop:  # all of it: a server without ranges
        data = data[start:stop]
    if len(data) != stop - start:
        raise OSError(errno.EIO, f"received {len(data)} of {stop - start} bytes")
    return bytes(data)


def _unresolved(error: BaseException | None) -> bool:
    """Whether a name could not be resolved: a wrong address, or no network at all."""
    while error is not None and not isinstance(error, socket.gaierror):
        error = error.__cause__ or error.__context__
    return error is not None


def _answer(error: Exception) -> tuple[str | None, int | None]:
    """S3's word for an error and its HTTP status, where the error came as an answer."""
    response = next(
        (r for e in (error, error.__cause__) if (r := getattr(e, "response", None)) is not None),
        None,  # a response of the hub's client is false where it has an error's status
    )
    if not isinstance(response, dict):
        status = getattr(response, "status_code", None)  # of the hub, or of an error of aiohttp
        return None, getattr(error, "status", None) if status is None else int(status)
    code = response.get("Error", {}).get("Code")
    return code, response.get("ResponseMetadata", {}).get("HTTPStatusCode")


def _wordless(error: Exception) -> bool:
    """Whether S3 refused a HEAD. Its answer has no body with a reason: an expired token and a
    passing trouble look the same. The answer to a GET has one."""
    code, status = _answer(error)
    return status == 400 and (code is None or code.isdecimal())


def _words(error: Exception) -> str:
    """An error's message without secrets, on one line."""
    said = getattr(error, "server_message", None) or str(error)  # the hub's own words
    text = " ".join(redact(said).split()) or "no answer in time"
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:197] + '...'}"
