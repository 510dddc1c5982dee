"""Caches in an object store: a real S3 server, a network that fails, and shared copies."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdcache.cache.check import problems

pytest.importorskip("moto")
s3fs = pytest.importorskip("s3fs")

from click.testing import CliRunner  # noqa: E402
from conftest import further  # noqa: E402
from faulty_s3 import CREDENTIALS, Fault, Proxy, S3Server, environment  # noqa: E402
from loaded import Program  # noqa: E402
from make_caches import make_cache  # noqa: E402
from test_storage import (  # noqa: E402, F401
    held,
    test_a_held_file_can_be_read,
    test_a_storage_starts_empty_and_lists_what_was_written,
    test_reading_what_is_missing_raises,
    test_remove_is_silent_about_what_is_gone,
    test_write_replaces_and_create_never_does,
)

from kdcache.cache import Cache, CacheSpec  # noqa: E402
from kdcache.cache.sealing import prepare_manifest, seal  # noqa: E402
from kdcache.cli.main import cli  # noqa: E402
from kdcache.commands import upkeep  # noqa: E402
from kdcache.commands.options import GcOptions  # noqa: E402
from kdcache.commands.upkeep import gc  # noqa: E402
from kdcache.corpus import Corpus  # noqa: E402
from kdcache.errors import CorruptCacheError, IncompleteError, UsageError  # noqa: E402
from kdcache.storage import Storage, filesystem, open_storage  # noqa: E402
from kdcache.stream import TargetStream  # noqa: E402

pytestmark = pytest.mark.slow

BUCKET = "kdcache-tests"
DEADLINE = 60.0


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    server = S3Server()
    server.make_bucket(BUCKET)
    yield server
    server.close()


@pytest.fixture
def proxy(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The way to the server; this process and its children take it."""
    proxy = Proxy(server)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    # The client's own retries would hide most faults from ours, and take seconds.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("KDCACHE_DISK", str(tmp_path / "disk"))
    s3fs.S3FileSystem.clear_instance_cache()  # each knows the endpoint it was made for
    yield proxy
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.close()


@pytest.fixture
def url(proxy: Proxy, request: pytest.FixtureRequest) -> str:
    """A prefix of this test's own."""
    told = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]
    return f"s3://{BUCKET}/{told}/cache"


@pytest.fixture
def storage(url: str) -> Storage:
    return open_storage(url)


def shard(number: int, size: int = 5000) -> tuple[str, bytes]:
    """Name and content of a file whose name carries its hash."""
    data = hashlib.shake_256(str(number).encode()).digest(size)
    return f"shards/{number:05d}-{hashlib.sha256(data).hexdigest()[:16]}.h5", data


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "the condition was never met"
        threading.Event().wait(0.01)


def python(code: str, *words: str, endpoint: str) -> Program:
    """A process of this Python that runs `code` and asks this server."""
    return Program("python", "-c", code, *words, environment=environment(endpoint))


# A network that fails

FAULTS = {
    "500": Fault("error", every=3),
    "503": Fault("error", every=3, status=503, code="SlowDown"),
    "reset": Fault("reset", every=3),
    "answer lost": Fault("lost", every=3),
    "truncated": Fault("truncate", "^GET", every=2),
    "half of it": Fault("short", "^GET /[^?]*/shards/", every=2),
    "a bit flipped": Fault("flip", "^GET /[^?]*/shards/", every=2),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.exhaustive)
        if name in ("500", "503", "reset", "half of it")
        else name
        for name in FAULTS
    ],
)
def test_a_failing_network_changes_nothing(name: str, proxy: Proxy, storage: Storage) -> None:
    fault = FAULTS[name]
    proxy.faults.append(fault)
    files = dict(shard(i) for i in range(6))
    for path, data in files.items():
        storage.write(path, data)
    assert storage.create("spec.json", b"{}") or storage.read("spec.json") == b"{}"
    assert not storage.create("spec.json", b"other")
    assert storage.names("shards") == [path.removeprefix("shards/") for path in files]
    for path, data in files.items():
        assert storage.read(path) == data
        with storage.hold(path) as copy:
            assert copy.read_bytes() == data
    assert fault.hits >= 3


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_SILENCE", 1.0)
    monkeypatch.setattr(filesystem, "_SLOWEST", 1 << 40)
    monkeypatch.setattr(filesystem, "_PATIENCE", 0.5)


def test_a_server_that_never_answers_ends_in_an_error_that_says_how_to_go_on(
    proxy: Proxy, storage: Storage, hurry: None
) -> None:
    proxy.faults.append(Fault("silence"))
    for request in (
        lambda: storage.write("shards/one", b"1" * 3_000_000),
        lambda: storage.read("shards/one"),
        lambda: storage.names("shards"),
    ):
        with pytest.raises(IncompleteError, match="same command again"):
            request()


def test_a_server_that_never_asks_for_the_body_ends_the_same_way(
    proxy: Proxy, url: str, hurry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The client waits for leave to send the body (100-continue); no timeout of its own counts.
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(IncompleteError, match="same command again"):
            open_storage(url).write("shards/one", b"1")


def test_a_damaged_object_is_never_shown_as_a_copy(proxy: Proxy, storage: Storage) -> None:
    name, data = shard(0)
    storage.write(name, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptCacheError, match=name.split("/")[1]), storage.hold(name):
        pass
    assert not list(Path(os.environ["KDCACHE_DISK"]).glob("*-*"))
    storage.write(name, data)
    assert held(storage, name) == data


def test_a_head_that_is_refused_for_a_moment_is_asked_again(proxy: Proxy, storage: Storage) -> None:
    storage.write("spec.json", b"{}")
    for answers in ([], [Fault("error", "^GET /[^?]*spec", status=503, code="SlowDown", times=1)]):
        proxy.faults[:] = [Fault("error", "^HEAD", status=400, times=2), *answers]
        assert storage.exists("spec.json")
        assert storage.size("spec.json") == 2
        assert proxy.faults[0].hits == 2
    proxy.faults[:] = [Fault("error", "^HEAD", status=400, times=1)]
    assert not storage.exists("nothing.json")


def test_what_a_user_must_mend_is_said_at_once(
    proxy: Proxy, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = open_storage("s3://no-such-bucket/cache")
    with pytest.raises(UsageError, match=r"no such bucket. Create it"):
        nowhere.write("spec.json", b"{}")
    with pytest.raises(UsageError, match="no such bucket"):
        nowhere.exists("spec.json")
    proxy.faults.append(Fault("error", status=403, code="AccessDenied"))
    with pytest.raises(UsageError, match="access denied.*AWS_ACCESS_KEY_ID"):
        storage.write("spec.json", b"{}")
    with pytest.raises(UsageError, match="access denied"):
        storage.exists("spec.json")
    proxy.faults[:] = [Fault("error", "^PUT", status=400, code="ExpiredToken")]
    with pytest.raises(IncompleteError, match="expired.*Renew them"):
        storage.write("spec.json", b"{}")
    # The answer to a HEAD has no body: only its status tells.
    name, _ = shard(0)
    requests: tuple[Callable[[], Any], ...] = (
        lambda: storage.exists("spec.json"),
        lambda: storage.size("spec.json"),
        lambda: storage.read("spec.json"),
        lambda: storage.create("spec.json", b"{}"),
        lambda: storage.names("shards"),
        lambda: storage.entries(),
        lambda: storage.remove("spec.json"),
        lambda: held(storage, name),
    )
    proxy.faults[:] = [Fault("error", status=400, code="ExpiredToken")]
    for request in requests:
        with pytest.raises(IncompleteError, match="the credentials have expired .*Renew them"):
            request()
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UsageError, match="AWS_PROFILE"):
        open_storage("s3://somewhere/cache").exists("spec.json")


@pytest.mark.parametrize("user", ["AKIAKEY:secret", "AKIAKEY:se/cr+et"])
def test_credentials_in_an_s3_address_are_refused_and_never_repeated(user: str) -> None:
    with pytest.raises(UsageError, match="are not allowed") as raised:
        open_storage(f"s3://{user}@bucket/cache")
    assert "AKIA" not in str(raised.value)
    assert "s3://bucket/cache" in str(raised.value)


def test_only_one_of_many_creates_a_file(proxy: Proxy, storage: Storage) -> None:
    # All look before any of them writes: the store itself must decide.
    gate = Fault("hold", "^PUT")
    proxy.faults.append(gate)
    made: list[int] = []
    workers = [
        threading.Thread(
            target=lambda i=i: made.append(i) if storage.create("name", b"%d" % i) else None
        )
        for i in range(5)
    ]
    for worker in workers:
        worker.start()
    wait_for(lambda: gate.hits == 5)
    gate.released.set()
    for worker in workers:
        worker.join(DEADLINE)
    assert [b"%d" % i for i in made] == [storage.read("name")]


def test_a_store_without_conditional_writes_is_looked_at_first(
    proxy: Proxy, storage: Storage
) -> None:
    proxy.faults.append(Fault("error", header="If-None-Match", status=501, code="NotImplemented"))
    assert storage.create("name", b"first")
    assert not storage.create("name", b"second")
    assert storage.read("name") == b"first"


UPLOAD = """
import sys
from kdcache.storage import open_storage
open_storage(sys.argv[1]).write("shards/big", b"0123456789" * 11_000_000)
"""


def test_a_killed_upload_leaves_nothing_to_see(
    proxy: Proxy, server: S3Server, storage: Storage, url: str
) -> None:
    gate = Fault("hold", "partNumber=3")
    proxy.faults.append(gate)
    uploader = python(UPLOAD, url, endpoint=proxy.url)
    assert gate.held.wait(DEADLINE)
    uploader.send_signal(signal.SIGKILL)
    uploader.communicate()
    gate.released.set()
    assert storage.names("shards") == []
    assert not storage.exists("shards/big")
    assert server.objects(url) == {}
    proxy.faults.clear()
    storage.write("shards/big", b"0123456789")
    assert storage.size("shards/big") == 10


# Copies on this machine


READ = """
import sys, hashlib
from kdcache.storage import open_storage
storage = open_storage(sys.argv[1])
for name in sys.argv[2:]:
    with storage.hold(name) as path:
        print(hashlib.sha256(path.read_bytes()).hexdigest(), flush=True)
"""


def test_processes_that_want_the_same_shards_download_each_once(
    proxy: Proxy, storage: Storage, url: str
) -> None:
    files = dict(shard(i) for i in range(4))
    for name, data in files.items():
        storage.write(name, data)
    proxy.requests.clear()
    readers = [python(READ, url, *files, endpoint=proxy.url) for _ in range(3)]
    want = [hashlib.sha256(data).hexdigest() for data in files.values()]
    for reader in readers:
        said = reader.communicate(timeout=DEADLINE)
        assert said.split() == want
    for name in files:
        gets = [r for r in proxy.requests if r.startswith("GET") and r.split("?")[0].endswith(name)]
        assert len(gets) == 1


def test_a_reader_killed_while_downloading_is_in_nobodys_way(
    proxy: Proxy, storage: Storage, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name, data), (other, more) = shard(0, 6000), shard(1, 5000)
    storage.write(name, data)
    storage.write(other, more)
    gate = Fault("hold", f"^GET .*{name}")
    proxy.faults.append(gate)
    reader = python(READ, url, name, endpoint=proxy.url)
    assert gate.held.wait(DEADLINE)
    disk = Path(os.environ["KDCACHE_DISK"])
    assert [path.suffix for path in disk.glob("*-*")] == [".part"]
    reader.send_signal(signal.SIGKILL)
    reader.communicate()
    proxy.faults.clear()
    gate.released.set()
    # What it left gives way to another file, and is no obstacle to the same one.
    monkeypatch.setenv("KDCACHE_DISK_BYTES", "10000")
    bounded = open_storage(url)
    assert held(bounded, other) == more
    assert not list(disk.glob("*.part"))
    assert held(bounded, name) == data


def test_what_comes_next_is_fetched_ahead_within_half_of_the_bound(
    proxy: Proxy, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = dict(shard(i) for i in range(8))
    monkeypatch.setenv("KDCACHE_DISK_BYTES", "40000")
    storage = open_storage(url)
    for name, data in files.items():
        storage.write(name, data)
    disk = Path(os.environ["KDCACHE_DISK"])
    names = list(files)
    storage.prefetch((name, len(files[name])) for name in names)
    wait_for(lambda: len(list(disk.glob("*.h5"))) == 4)
    proxy.faults.append(Fault("error", "^GET /[^?]*/shards/", status=403, code="AccessDenied"))
    for name in names[:4]:  # they are here: nothing is asked for
        assert held(storage, name) == files[name]
    with pytest.raises(UsageError, match="access denied"):
        held(storage, names[4])
    # A list that fails is given up; the next one is begun.
    storage.prefetch([(names[5], 5000)])
    wait_for(lambda: proxy.faults[0].hits == 2)
    proxy.faults.clear()
    storage.prefetch([(names[6], 5000)])
    wait_for(lambda: len(list(disk.glob("*.h5"))) == 5)


def test_a_file_without_a_hash_in_its_name_is_never_old(
    proxy: Proxy, storage: Storage, url: str
) -> None:
    storage.write("events.jsonl", b"old")
    assert held(storage, "events.jsonl") == b"old"
    open_storage(url).write("events.jsonl", b"new")
    assert held(storage, "events.jsonl") == b"new"


# Caches


def upload(folder: Path, url: str) -> None:
    storage = open_storage(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.write(str(path.relative_to(folder)), path.read_bytes())


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a local cache by name, apart from the log of events."""
    return without_events(
        {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    )


def without_events(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if not name.startswith("events")}


def test_a_cache_is_streamed_through_a_disk_smaller_than_itself(
    proxy: Proxy, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = make_cache(tmp_path / "cache", [20, 15, 25, 10, 30])
    upload(tmp_path / "cache", url)
    most = max(entry.bytes for entry in local.manifest.shards)
    monkeypatch.setenv("KDCACHE_DISK_BYTES", str(2 * most))
    cache = Cache.open(url)
    assert cache.digest == local.digest
    assert list(problems(cache)) == []
    cache.prefetch(range(5))

    def batches(of: Cache) -> list[Any]:
        return [b["input_ids"].tolist() for b in TargetStream(of, batch_size=7, group=1).batches(2)]

    want = batches(local)
    results: list[list[Any]] = []
    readers = [
        threading.Thread(target=lambda: results.append(batches(Cache.open(url)))) for _ in range(2)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(DEADLINE)
    assert results == [want, want]
    copies = list(Path(os.environ["KDCACHE_DISK"]).glob("*.h5"))
    assert 0 < sum(path.stat().st_size for path in copies) <= 2 * most


def test_a_damaged_copy_is_downloaded_again(proxy: Proxy, url: str, tmp_path: Path) -> None:
    local = make_cache(tmp_path / "cache", [20])
    upload(tmp_path / "cache", url)
    cache = Cache.open(url)
    for _ in range(2):
        assert cache.read(0).input_ids.tolist() == local.read(0).input_ids.tolist()
        (copy,) = Path(os.environ["KDCACHE_DISK"]).glob("*.h5")
        copy.write_bytes(bytes(copy.stat().st_size))


def test_a_flipped_bit_in_the_store_is_named_though_a_good_copy_is_here(
    proxy: Proxy, url: str, tmp_path: Path
) -> None:
    local = make_cache(tmp_path / "cache", [5, 5])
    upload(tmp_path / "cache", url)
    cache = Cache.open(url)
    assert list(problems(cache)) == []
    name = f"shards/{local.manifest.shards[1].name}"
    damaged = bytearray(cache.storage.read(name))
    damaged[100] ^= 1
    cache.storage.write(name, bytes(damaged))
    (line,) = [problem.text for problem in problems(cache)]
    assert name in line
    cache.storage.remove(name)
    (line,) = [problem.text for problem in problems(cache)]
    assert "missing" in line


def test_a_cache_built_anew_at_the_same_place_is_not_the_old_one(
    proxy: Proxy, url: str, tmp_path: Path
) -> None:
    for number in (0, 1):
        folder = tmp_path / str(number)
        local = make_cache(folder, [6, 4], first=100 * number)
        storage = open_storage(url)
        for name in [*storage.names(), *(f"shards/{n}" for n in storage.names("shards"))]:
            storage.remove(name)
        upload(folder, url)
        cache = Cache.open(url)
        assert cache.digest == local.digest
        assert cache.read(0).input_ids.tolist() == local.read(0).input_ids.tolist()


def test_unfinished_uploads_are_removed(
    proxy: Proxy, server: S3Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)  # the proxy leaves out what the time is
    make_cache(tmp_path / "cache", [4])
    upload(tmp_path / "cache", url)
    store, key = s3fs.S3FileSystem(), url.removeprefix(f"s3://{BUCKET}/")
    for name in (f"{key}/shards/x.h5", f"{key}2/shards/y.h5"):
        begun = store.call_s3("create_multipart_upload", Bucket=BUCKET, Key=name)
        where = {"Bucket": BUCKET, "Key": name, "UploadId": begun["UploadId"]}
        store.call_s3("upload_part", **where, PartNumber=1, Body=b"x" * 1000)
    monkeypatch.setattr(upkeep, "YOUNG", 1e12)
    assert gc(GcOptions(url)).young == 1
    monkeypatch.setattr(upkeep, "YOUNG", 0.0)
    (leftover,) = gc(GcOptions(url)).removed
    assert (leftover.name, leftover.bytes) == ("shards/x.h5", 1000)
    assert gc(GcOptions(url)).removed == ()
    uploads = store.call_s3("list_multipart_uploads", Bucket=BUCKET, Prefix=key)["Uploads"]
    assert [upload["Key"] for upload in uploads] == [f"{key}2/shards/y.h5"]
    assert list(problems(Cache.open(url))) == []


# Beginning a cache


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a cache may be begun: a folder and a prefix."""
    if request.param == "local":
        return str(tmp_path / "place")
    return str(request.getfixturevalue("url"))


def spec_and_files(folder: Path, number: int) -> tuple[CacheSpec, dict[str, bytes]]:
    """A spec and a tokenizer of their own for each number."""
    spec = make_cache(folder / f"spec-{number}", [3], first=number).spec
    return spec, {"tokenizer.json": b"%d" % number * 1000, "tokenizer_config.json": b"{}"}


def test_of_many_different_builds_that_start_at_once_one_begins_the_cache(
    place: str, tmp_path: Path
) -> None:
    builds = [spec_and_files(tmp_path, number) for number in (0, 1, 2)] * 2
    working: list[Cache] = []

    def begin(
        number: int, url: str, gate: threading.Barrier, begun: list[int], refused: list[str]
    ) -> None:
        spec, files = builds[number]
        gate.wait(DEADLINE)
        try:
            working.append(Cache.create_or_resume(url, spec, tokenizer_files=files))
            begun.append(number % 3)
        except UsageError as error:
            refused.append(str(error))

    for turn in range(2):
        url = f"{place}-{turn}"
        gate = threading.Barrier(len(builds))
        begun: list[int] = []
        working.clear()
        refused: list[str] = []
        threads = [
            threading.Thread(target=begin, args=(number, url, gate, begun, refused))
            for number in range(len(builds))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
        assert (len(begun), len(set(begun)), len(refused)) == (2, 1, 4)
        assert all("corpus.0.name" in line for line in refused)
        cache = Cache.resume(url)
        spec, files = builds[begun[0]]
        assert cache.spec == spec
        for name, data in files.items():
            assert cache.read_beside(f"tokenizer/{name}") == data
        assert cache.storage.entries() == ["spec.json", "tokenizer"]


def test_a_start_that_crashed_is_finished_by_the_same_build(place: str, tmp_path: Path) -> None:
    spec, files = spec_and_files(tmp_path, 0)
    storage = open_storage(place)
    # Before the spec: what an earlier version left. After it: a tokenizer that is not all there.
    storage.write("tokenizer/tokenizer.json", b"of another build")
    Cache.create_or_resume(place, spec, tokenizer_files=files)
    assert storage.read("tokenizer/tokenizer.json") == files["tokenizer.json"]
    storage.remove("tokenizer/tokenizer.json")
    cache = Cache.create_or_resume(place, spec, tokenizer_files=files)
    assert cache.read_beside("tokenizer/tokenizer.json") == files["tokenizer.json"]
    storage.write("tokenizer/tokenizer.json", b"damaged")
    with pytest.raises(CorruptCacheError, match="tokenizer.json: sha256"):
        cache.tokenizer()
    with pytest.raises(UsageError, match="other versions of the libraries"):
        Cache.create_or_resume(place, spec, tokenizer_files={"tokenizer.json": b"newer"})


def test_a_folder_of_something_else_is_left_alone(place: str, tmp_path: Path) -> None:
    spec, files = spec_and_files(tmp_path, 0)
    open_storage(place).write("thesis/chapter", b"one")
    with pytest.raises(UsageError, match="not a kdcache cache"):
        Cache.create_or_resume(place, spec, tokenizer_files=files)
    assert open_storage(place).entries() == ["thesis"]


def test_the_first_seal_stands(place: str, tmp_path: Path) -> None:
    spec, files = spec_and_files(tmp_path, 0)
    one = Cache.create_or_resume(place, spec, tokenizer_files=files)
    two = Cache.create_or_resume(place, spec, tokenizer_files=files)
    data = Cache.open(str(tmp_path / "spec-0")).read(0)
    # A teacher whose last bits vary: two builds, two shards of one span.
    entries = [build.commit(0, data, clipped_mass=i) for i, build in enumerate((one, two))]
    entries.sort(key=lambda entry: entry.name)
    open_storage(place).remove(f"shards/{entries[0].name}")
    first = seal(one, prepare_manifest(one))
    assert first.shards[0].name == entries[1].name
    mine = two.commit(0, data, clipped_mass=entries[0].clipped_mass)
    assert prepare_manifest(two) == first  # the other build has sealed meanwhile
    assert prepare_manifest(two, [mine]).shards[0].name == entries[0].name
    assert seal(two, prepare_manifest(two, [mine])) == first
    assert Cache.open(place).manifest == first


# Whole commands


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, corpus_texts: list[str]) -> Path:
    """A folder of JSON lines, of compressed ones, and of a table."""
    folder = tmp_path_factory.mktemp("corpora")
    lines = [json.dumps({"text": text}) + "\n" for text in corpus_texts]
    (folder / "a.jsonl").write_text("".join(lines[:90]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[90:120]).encode(), mtime=0))
    table = pa.table({"text": corpus_texts[120:150]})
    pq.write_table(table, folder / "c.parquet", row_group_size=15)
    return folder


def words(teacher: Path, corpus: str, out: str, *more: str) -> list[str]:
    """The words of a build in this process, of about ten spans."""
    given = {"--teacher": teacher, "--corpus": corpus, "--out": out, "--workers": 0}
    small = {"--max-length": 64, "--codec": "sample:8", "--shard-tokens": 600}
    return ["build", *(str(w) for pair in (given | small).items() for w in pair), *more]


def built(teacher: Path, corpus: Path, out: Path, *more: str) -> dict[str, bytes]:
    """What one undisturbed build makes."""
    result = CliRunner().invoke(cli, words(teacher, str(corpus), str(out), *more))
    assert result.exit_code == 0, result.output
    return content(out)


@pytest.fixture(scope="module")
def alone(
    corpus: Path, stories260k: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, bytes]]:
    """What one undisturbed build makes with each of two seeds."""
    folder = tmp_path_factory.mktemp("alone")
    return [
        built(stories260k, corpus / "a.jsonl", folder / str(seed), "--seed", str(seed))
        for seed in range(2)
    ]


@pytest.mark.end_to_end
@pytest.mark.parametrize("job", ["build", *further("generate")])
def test_what_is_killed_while_it_writes_to_s3_and_run_again_makes_the_same_objects(
    job: str,
    proxy: Proxy,
    server: S3Server,
    url: str,
    corpus: Path,
    stories260k: Path,
    alone: list[dict[str, bytes]],
    tmp_path: Path,
) -> None:
    want, command = alone[0], words(stories260k, str(corpus / "a.jsonl"), url)
    if job == "generate":
        given = {"--model": stories260k, "--corpus": corpus / "a.jsonl", "--workers": 0}
        given |= {"--prompt-tokens": 8, "--max-new-tokens": 8, "--shard-tokens": 600}
        command = ["generate", *(str(w) for pair in given.items() for w in pair), "--out"]
        quiet = CliRunner().invoke(cli, [*command, str(tmp_path / "quiet")])
        assert quiet.exit_code == 0, quiet.output
        want, command = content(tmp_path / "quiet"), [*command, url]
    gate = Fault("hold", "^PUT /[^?]*/shards/00004")
    proxy.faults += [gate, Fault("error", every=9), Fault("lost", "^PUT", every=7)]
    first = python("from kdcache.cli.main import main; main()", *command, endpoint=proxy.url)
    assert gate.held.wait(DEADLINE)
    first.send_signal(signal.SIGKILL)
    said = first.communicate()
    gate.released.set()
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in said
    left = without_events(server.objects(url))
    assert 3 <= len(left) < len(want)
    assert left.items() <= want.items()
    again = CliRunner().invoke(cli, command)
    assert again.exit_code == 0, again.output
    assert without_events(server.objects(url)) == want
    assert proxy.faults[1].hits > 3


@pytest.mark.end_to_end
def test_a_corpus_in_s3_makes_the_same_cache(
    proxy: Proxy, url: str, corpus: Path, stories260k: Path, tmp_path: Path
) -> None:
    upload(corpus, url)
    want = built(stories260k, corpus, tmp_path / "near")
    proxy.faults += [
        Fault("error", "^GET", every=4),
        Fault("truncate", "^GET", every=5),
        Fault("short", "^GET /[^?]*/(a.jsonl|b.jsonl.gz|c.parquet)", every=6),
    ]
    result = CliRunner().invoke(cli, words(stories260k, url, str(tmp_path / "far")))
    assert result.exit_code == 0, result.output
    assert content(tmp_path / "far") == want
    assert all(fault.hits for fault in proxy.faults)


def test_a_corpus_in_s3_that_changes_is_refused(proxy: Proxy, url: str, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"line {i}"}) + "\n" for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    upload(tmp_path, url)
    for pattern in (url, f"{url}/*.jsonl", f"{url}/a.jsonl"):
        corpus = Corpus.open([pattern], span_bytes=1000)
        corpus.check_unchanged()
        assert all(list(Corpus.read(span)) for span in corpus.spans)
    (tmp_path / "a.jsonl").write_text("".join(lines).replace("line 99", "lime 99"))
    upload(tmp_path, url)
    with pytest.raises(UsageError, match=r"a\.jsonl: the file was changed after it was planned"):
        list(Corpus.read(corpus.spans[0]))
    with pytest.raises(UsageError, match=r"a\.jsonl: the file was changed after it was planned"):
        corpus.check_unchanged()


RACE = """
import json, os, sys
from kdcache.cli.main import main
# What a build imports, once for all of them; threads are begun only in the children.
import kdcache.commands.build, kdcache.cli.commands, kdcache.cli.display
import transformers.models.llama.modeling_llama
builds, go = json.loads(sys.argv[1]), os.pipe()
children = []
for words in builds:
    child = os.fork()
    if not child:
        os.close(go[1])
        os.read(go[0], 1)  # until the parent closes its end: all start at once
        sys.argv[1:] = words
        main()
    children.append(child)
os.close(go[1])
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


@pytest.mark.end_to_end
def test_builds_on_one_output_at_the_same_time_cooperate_or_are_refused(
    url: str,
    server: S3Server,
    proxy: Proxy,
    corpus: Path,
    stories260k: Path,
    alone: list[dict[str, bytes]],
    tmp_path: Path,
) -> None:
    near, source = tmp_path / "near", str(corpus / "a.jsonl")
    commands = [
        words(stories260k, source, out, "--seed", seed)
        for out in (str(near), url)
        for seed in ("0", "1", "0")
    ]
    racers = python(RACE, json.dumps(commands), endpoint=proxy.url)
    said = racers.communicate()
    codes = json.loads(said.splitlines()[-1])
    for found, ends in (
        (content(near), codes[:3]),
        (without_events(server.objects(url)), codes[3:]),
    ):
        assert ends in ([0, 2, 0], [2, 0, 2]), said
        assert found == alone[ends[0] // 2]
    assert said.count("seed: ") == codes.count(2)
