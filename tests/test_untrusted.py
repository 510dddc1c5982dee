"""A cache from elsewhere is data: what it claims, names and links to does no harm."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from broken_caches import files, flip, golden_copy, naming, run
from make_caches import CAUSAL, make_cache

from kdcache.cache import Cache, sandbox
from kdcache.cache.check import problems
from kdcache.cache.hdf5 import fletcher32, write_text
from kdcache.cache.sandbox import Sandbox
from kdcache.cache.shard import read_shard
from kdcache.cache.spec import from_text, to_text
from kdcache.errors import CorruptCacheError
from kdcache.targets import TopK
from kdcache.targets.soft import read_ranks

PACKAGE = Path(__file__).parent.parent / "kdcache"


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return golden_copy(tmp_path / "golden")


def test_the_package_reads_data_and_runs_none() -> None:
    refused = re.compile(
        r"\bpickle|\bmarshal\b|\bshelve\b|joblib|torch\.load\(|allow_pickle=True|\beval\(|\bexec\("
        r"|yaml\.(unsafe_)?load\(|trust_remote_code(: bool | )?=( )?True|weights_only=False"
    )
    sources = sorted(PACKAGE.rglob("*.py"))
    assert len(sources) > 50
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in sources
        for number, line in enumerate(path.read_text().splitlines(), 1)
        # `model.eval()` is no evaluation, some messages speak of pickled weights, and PyTorch's
        # loader of tensors alone reads what `import --logits` names.
        if refused.search(line.replace(".eval(", "").replace("pickled", ""))
        and not (path.name == "apart.py" and "torch.load(" in line and "weights_only=True" in line)
    ]
    assert found == []


def resealed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a document as its author could."""
    values = from_text(path.read_bytes(), path.name)
    change(values)
    path.write_bytes(to_text(values))


NAMES = ["../x", "/etc/passwd", "00000-0123456789abcdef.h5/../../x", "a\0b", "", "00000-\u0663.h5"]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_leaves_the_folder(name: str, golden: Path) -> None:
    before = files(golden)
    resealed(golden / "manifest.json", lambda values: values["shards"][0].update(name=name))
    with pytest.raises(CorruptCacheError, match="manifest.json"):
        Cache.open(str(golden))
    (golden / "manifest.json").write_bytes(before["manifest.json"])
    for beside in (name, f"tokenizer/{name}", f"tokenizer/.{name}", "tokenizer/a\nb"):
        resealed(
            golden / "spec.json", lambda values, n=beside: values["files"].update({n: "0" * 64})
        )
        with pytest.raises(CorruptCacheError, match="spec.json"):
            Cache.open(str(golden))
        (golden / "spec.json").write_bytes(before["spec.json"])


FORGERIES: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "rows that the bytes cannot hold": (
        "manifest.json",
        lambda v: v["shards"][0].update(rows=10**12),
    ),
    "more bytes than a shard has": (
        "manifest.json",
        lambda v: v["shards"][0].update(rows=10**12, bytes=10**13),
    ),
    "a count below zero": ("manifest.json", lambda v: v["shards"][0].update(tokens=-1)),
    "a count that is a truth": ("manifest.json", lambda v: v["shards"][0].update(rows=True)),
    "a count that is a text": ("manifest.json", lambda v: v["shards"][0].update(rows="10")),
    "totals that do not add up": ("manifest.json", lambda v: v.update(rows=11)),
    "another hash than the name's": (
        "manifest.json",
        lambda v: v["shards"][0].update(sha256="0" * 64),
    ),
    "an infinite mass": ("manifest.json", lambda v: v["shards"][0].update(clipped_mass=1e999)),
    "a field too many": ("manifest.json", lambda v: v.update(more=1)),
    "an entry's field too many": ("manifest.json", lambda v: v["shards"][0].update(more=1)),
    "shards that are no list": ("manifest.json", lambda v: v.update(shards={"0": 1})),
    "another format": ("manifest.json", lambda v: v.update(format=2)),
    "a huge number": ("spec.json", lambda v: v["spec"].update(vocab_size=10**4000)),
    "a vocabulary of none": ("spec.json", lambda v: v["spec"].update(vocab_size=-5)),
    "a list for an object": ("spec.json", lambda v: v["spec"].update(rows=[])),
    "an object for a text": ("spec.json", lambda v: v["spec"].update(codec={})),
    "temperatures that are texts": ("spec.json", lambda v: v["spec"].update(temperatures=["1"])),
    "notes that are a number": ("spec.json", lambda v: v.update(notes=5)),
    "no spec": ("spec.json", lambda v: v.pop("spec")),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_document_that_claims_the_impossible_is_refused(what: str, golden: Path) -> None:
    name, change = FORGERIES[what]
    resealed(golden / name, change)
    with pytest.raises(CorruptCacheError, match=name.replace(".", r"\.")):
        Cache.open(str(golden))
    assert run("inspect", str(golden)).exit_code == 1


def summed(text: bytes) -> bytes:
    """A document with the right sum for what it says now."""
    body = text[: text.rindex(b' "sha256": "')]
    return body + f' "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"seed": 0', b'"seed": 0,\n  "seed": 1'),
        (b'"seed": 0', b'"seed": NaN'),
        (b'"seed": 0', b'"seed": Infinity'),
        (b'"seed": 0', b'"seed": ' + b"9" * 5000),
        (b'"seed": 0', b'"seed": 0,'),
        (b'"task"', b'"\xff"'),
    ],
)
def test_json_that_is_odd_is_refused(old: bytes, new: bytes, golden: Path) -> None:
    text = (golden / "spec.json").read_bytes()
    assert old in text
    (golden / "spec.json").write_bytes(summed(text.replace(old, new)))
    with pytest.raises(CorruptCacheError, match=r"spec\.json cannot be read"):
        Cache.open(str(golden))


def test_a_table_of_ranks_cannot_ask_for_all_memory() -> None:
    with pytest.raises(CorruptCacheError, match=r"ranks\.u32"):
        read_ranks(b"\0" * 4, 2**31 - 1)


def test_what_is_no_file_is_not_read(golden: Path) -> None:
    (shard,) = (golden / "shards").iterdir()
    shard.unlink()
    os.mkfifo(shard)  # a read of it would wait for ever
    with pytest.raises(CorruptCacheError, match="has 0 bytes, the manifest says"):
        Cache.open(str(golden)).read(0)
    shard.unlink()
    shard.symlink_to("/dev/zero")
    assert shard.name in naming(golden)


CODEC = TopK(64, (1.0,), 3, levels=False)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A shard of the codec, to be changed with h5py."""
    cache = make_cache(tmp_path / "made", [5], task=CAUSAL, codec="topk:3", temperatures=(1.0,))
    path = tmp_path / "shard.h5"
    shutil.copy(tmp_path / "made" / "shards" / cache.manifest.shards[0].name, path)
    read_shard(path, CODEC)
    return path


def column(file: Any, values: np.ndarray, name: str = "rows/lengths", **change: Any) -> None:
    settings = {
        "chunks": values.shape,
        "compression": "gzip",
        "shuffle": True,
        "fletcher32": True,
    }
    file.create_dataset(name, data=values, **(settings | change))


def elsewhere(file: Any, lengths: np.ndarray) -> None:
    other = Path(file.filename).with_name("other.h5")
    with h5py.File(other, "w") as made:
        column(made, lengths)
    file["rows/lengths"] = h5py.ExternalLink(str(other), "rows/lengths")


def outside(file: Any, lengths: np.ndarray) -> None:
    raw = Path(file.filename).with_name("raw.bin")
    raw.write_bytes(lengths.tobytes())
    file.create_dataset(
        "rows/lengths", lengths.shape, "<u4", external=[(str(raw), 0, lengths.nbytes)]
    )


def virtual(file: Any, lengths: np.ndarray) -> None:
    layout = h5py.VirtualLayout(lengths.shape, "<u4")
    layout[:] = h5py.VirtualSource(file.filename, "rows/has_label", lengths.shape)
    file.create_virtual_dataset("rows/lengths", layout)


def soft(file: Any, lengths: np.ndarray) -> None:
    column(file, lengths, "elsewhere")
    file["rows/lengths"] = h5py.SoftLink("/elsewhere")


def varying(file: Any, lengths: np.ndarray) -> None:
    kind = h5py.vlen_dtype(np.uint32)
    dataset = file.create_dataset("rows/lengths", lengths.shape, kind)
    dataset[0] = lengths


def unwritten(file: Any, lengths: np.ndarray) -> None:
    file.create_dataset(
        "rows/lengths",
        lengths.shape,
        "<u4",
        chunks=(2,),
        compression="gzip",
        shuffle=True,
        fletcher32=True,
        fillvalue=7,
    )
    file["rows/lengths"][:2] = lengths[:2]  # the other chunks are all sevens


def unfiltered(file: Any, lengths: np.ndarray) -> None:
    column(file, np.zeros_like(lengths))
    # This chunk says of itself that it went through no filter.
    file["rows/lengths"].id.write_direct_chunk((0,), lengths.tobytes(), filter_mask=7)


def as_it_is(file: Any, lengths: np.ndarray, mask: int = 3, bytes_more: int = 0) -> None:
    """A chunk that skips filters, with a right checksum of whatever it has."""
    column(file, np.zeros_like(lengths))
    stored = (lengths.tobytes() + bytes(4))[: lengths.nbytes + bytes_more]
    stored += fletcher32(stored).to_bytes(4, "little")
    file["rows/lengths"].id.write_direct_chunk((0,), stored, filter_mask=mask)


def flipped(file: Any, lengths: np.ndarray) -> None:
    as_it_is(file, lengths)
    _, stored = file["rows/lengths"].id.read_direct_chunk((0,))
    broken = bytes([stored[0] ^ 1]) + stored[1:]
    file["rows/lengths"].id.write_direct_chunk((0,), broken, filter_mask=3)


def bomb(file: Any, lengths: np.ndarray) -> None:
    column(file, np.zeros_like(lengths))
    stored = zlib.compress(bytes(40 << 10)) + bytes(4)
    file["rows/lengths"].id.write_direct_chunk((0,), stored)


CHANGES: dict[str, tuple[Callable[[Any, np.ndarray], None], str]] = {
    "external link": (elsewhere, "is a link"),
    "soft link": (soft, "is a link"),
    "external storage": (outside, "not stored in chunks"),
    "virtual": (virtual, "not stored in chunks"),
    "variable length": (varying, "has type object"),
    "chunks that are not there": (unwritten, "are missing or misplaced"),
    "a chunk without filters": (unfiltered, "are missing or misplaced"),
    "a chunk that skips another filter": (
        lambda f, x: as_it_is(f, x, mask=2),
        "are missing or misplaced",
    ),
    "a chunk as it is, but longer": (
        lambda f, x: as_it_is(f, x, bytes_more=4),
        "are missing or misplaced",
    ),
    "a chunk as it is, but shorter": (
        lambda f, x: as_it_is(f, x, bytes_more=-1),
        "are missing or misplaced",
    ),
    "a chunk as it is, changed": (flipped, "wrong checksum"),
    "a bomb": (bomb, "has the wrong size|are missing or misplaced"),
    "another type": (lambda f, x: column(f, x.astype("<f4")), "has type float32"),
    "big-endian": (lambda f, x: column(f, x.astype(">u4")), "has type >u4"),
    "compound": (
        lambda f, x: f.create_dataset("rows/lengths", x.shape, np.dtype([("a", "<u4")])),
        "has type",
    ),
    "another filter": (lambda f, x: column(f, x, compression="lzf"), "not stored in chunks"),
    "no checksum": (lambda f, x: column(f, x, fletcher32=False), "not stored in chunks"),
    "a scalar": (
        lambda f, x: f.create_dataset("rows/lengths", data=np.uint32(5)),
        "is not a column",
    ),
    "nothing": (
        lambda f, x: f.create_dataset("rows/lengths", data=h5py.Empty("<u4")),
        "not a column",
    ),
    "a group": (lambda f, x: f.create_group("rows/lengths"), "is not a column"),
    "no column": (lambda f, x: None, "has the columns"),
    "a column too many": (
        lambda f, x: (column(f, x), column(f, x, "rows/more")),  # type: ignore[dict-item,return-value,func-returns-value]
        "has the columns",
    ),
    "chunks larger than the column": (
        lambda f, x: column(f, x, chunks=(1000,), maxshape=(None,)),
        "in chunks of",
    ),
    "rows without tokens": (lambda f, x: column(f, zero_first(x)), "rows without tokens"),
    "lengths that do not add up": (lambda f, x: column(f, x + 1), "add up"),
}


def zero_first(lengths: np.ndarray) -> np.ndarray:
    moved = lengths.copy()
    moved[1] += moved[0]
    moved[0] = 0
    return moved


@pytest.mark.parametrize("what", CHANGES)
def test_hdf5_that_is_no_plain_column_is_refused(what: str, shard: Path) -> None:
    change, match = CHANGES[what]
    with h5py.File(shard, "a", locking=False) as file:
        lengths = file["rows/lengths"][...]
        del file["rows/lengths"]
        change(file, lengths)
    with pytest.raises(CorruptCacheError, match=match):
        read_shard(shard, CODEC)


def test_attributes_are_plain_too(shard: Path) -> None:
    for name, value in (
        ("task", "causal-lm"),  # of variable length, as h5py writes texts by itself
        ("rows", -5),
        ("rows", 2.5),
        ("rows", [5, 5]),
        ("task", np.bytes_(b"chess")),
        ("format", h5py.Empty("S5")),
        ("codec", np.bytes_(b"\xff")),
    ):
        with h5py.File(shard, "a", locking=False) as file:
            before = file.attrs[name]
            del file.attrs[name]
            file.attrs[name] = value
        with pytest.raises(CorruptCacheError):
            read_shard(shard, CODEC)
        with h5py.File(shard, "a", locking=False) as file:
            del file.attrs[name]
            if isinstance(before, bytes):
                write_text(file, name, before.decode())
            else:
                file.attrs[name] = before
        read_shard(shard, CODEC)


# Another process opens a file first


@pytest.fixture
def fragile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for faults of HDF5: a file whose name says so kills or holds up who reads it."""
    start = """
import os, signal, sys, time

from kdcache.cache import sandbox
def read_all(path, honest=sandbox.read_all):
    if "00001" in path.name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "00002" in path.name:
        signal.pause()
    if "00003" in path.name:
        bytearray(4 << 30)
    honest(path)
sandbox.read_all = read_all
sandbox.serve()
"""
    begin = sandbox.Sandbox._start

    def patiently(self: sandbox.Sandbox) -> object:  # imports take long on a busy machine
        monkeypatch.setattr(sandbox, "_PATIENCE", 60.0)
        process = begin(self)
        monkeypatch.setattr(sandbox, "_PATIENCE", 5.0)
        return process

    monkeypatch.setattr(sandbox, "_START", start)
    monkeypatch.setattr(sandbox.Sandbox, "_start", patiently)


def test_a_shard_that_kills_its_reader_is_that_shards_problem(
    fragile: None, tmp_path: Path
) -> None:
    cache = make_cache(tmp_path / "cache", [4, 4, 4, 4, 4])
    found = list(problems(cache))
    assert [p.file for p in found] == [f"shards/{e.name}" for e in cache.manifest.shards[1:4]]
    for problem, how in zip(found, ("SIGSEGV", "did not answer", "more memory"), strict=True):
        assert how in problem.text
        assert Path(problem.file).name in problem.text
    flip(Path(cache.url) / "shards" / cache.manifest.shards[1].name, 77)
    assert "sha256" in next(problems(cache)).text  # what is known to be wrong is not opened


def test_inspect_survives_it_too(fragile: None, tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", [4, 4])
    for words in (("--row", "5"), ()):
        result = run("inspect", str(tmp_path / "cache"), *words)
        assert result.exit_code == 1
        assert "SIGSEGV" in result.stderr
    (tmp_path / "cache" / "manifest.json").unlink()
    assert "SIGSEGV" in run("inspect", str(tmp_path / "cache")).stderr


def test_what_is_not_hdf5_is_refused_by_the_other_process(golden: Path) -> None:
    with Sandbox() as one, pytest.raises(CorruptCacheError, match="signature"):
        one.open(golden / "spec.json")
