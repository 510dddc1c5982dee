"""Targets found by ids are those of the stream, whatever the trainer makes of rows and labels."""

from __future__ import annotations

import pickle
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_caches import CAUSAL, CLASSES, make_cache

import kdcache
from kdcache.cache import Cache
from kdcache.errors import KdcacheError, UsageError
from kdcache.stream import TargetStream, content
from kdcache.stream.content import RECORD, DecodedRows, RowIndex, hashed
from kdcache.targets import SoftTargets, Targets
from kdcache.tasks import IGNORE

GOLDEN = Path(__file__).parent / "golden"
CODECS = ("topk-1-2", "sample-1", "sample-1-2", "anchored-1-2", "hidden-int8", "label-logprob")


class Document(NamedTuple):
    """A cached row or document, up to its last label, which is its last id."""

    ids: np.ndarray
    targets: SoftTargets
    positions: np.ndarray
    places: np.ndarray


def documents_of(cache: Cache) -> list[Document]:
    """All of a cache, in order; of those with equal ids the first alone."""
    found: dict[bytes, Document] = {}
    for span in range(cache.spec.spans):
        data, position = cache.read(span), 0
        for number in range(len(data)):
            for one in data.row(number).documents():
                (places,) = np.nonzero(one.labels != IGNORE)
                positions = np.arange(position, position + len(places))
                position += len(places)
                if len(places):
                    last = places[-1]
                    ids = np.append(one.input_ids[: last + 1], one.labels[last])
                    row = Document(ids, data.targets, positions, places)
                    found.setdefault(ids.tobytes(), row)
    return list(found.values())


def same(one: Targets, two: Targets) -> bool:
    """Whether two values of targets are equal, bit by bit."""
    assert type(one) is type(two)
    for name, value in vars(one).items():
        other = getattr(two, name)
        if not (torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other):
            return False
    return True


@pytest.fixture(autouse=True)
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of local copies."""
    monkeypatch.setenv("KDCACHE_DISK", str(tmp_path / "disk"))
    return tmp_path / "disk"


@pytest.fixture(scope="module", params=[*CODECS, "dense", "documents"])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("caches") / request.param
    if request.param == "dense":
        return make_cache(folder, [5, 0, 3, 4], task=CAUSAL, codec="dense", temperatures=(1.0,))
    shutil.copytree(GOLDEN / request.param, folder)
    return Cache.open(str(folder))


@pytest.fixture
def topk(tmp_path: Path) -> Cache:
    """12 rows in three shards."""
    return make_cache(tmp_path / "topk", [5, 3, 4], task=CAUSAL, codec="topk:4")


def padded(rows: list[np.ndarray], fill: int, left: bool = False) -> torch.Tensor:
    width = max(map(len, rows))
    around = [((width - len(row), 0) if left else (0, width - len(row))) for row in rows]
    return torch.from_numpy(
        np.stack([np.pad(r, a, constant_values=fill) for r, a in zip(rows, around, strict=True)])
    )


def as_trained(rows: list[Document], fill: int = 0, left: bool = False) -> dict[str, torch.Tensor]:
    """A batch as a collator of transformers makes it: labels stand beside their own ids."""
    labels = [np.full(len(row.ids), IGNORE) for row in rows]
    for row, own in zip(rows, labels, strict=True):
        own[row.places + 1] = row.ids[row.places + 1]
    ones = [np.ones(len(row.ids), int) for row in rows]
    return {
        "input_ids": padded([row.ids for row in rows], fill, left),
        "labels": padded(labels, IGNORE, left),
        "attention_mask": padded(ones, 0, left),
    }


@pytest.mark.filterwarnings("error")
def test_a_stream_s_batches_find_their_own_targets(cache: Cache) -> None:
    lookup = kdcache.TargetLookup(cache, labels="next")
    unique = len(documents_of(cache))
    for batch in TargetStream(cache, batch_size=3, shuffle=True, seed=4):
        found = lookup.find(batch["input_ids"], batch["labels"], batch.get("position_ids"))
        assert torch.equal(found.labels, batch["labels"])
        assert found.hard is None
        assert same(found.targets, batch["targets"])
    assert unique == lookup.rows  # no two documents had the same ids, so all are compared
    assert lookup.missed == 0


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[*HealthCheck])
def test_any_batch_order_packing_and_mask(cache: Cache, disk: Path, data: Any) -> None:
    known = documents_of(cache)
    temperature = data.draw(st.sampled_from(cache.spec.temperatures))
    lookup = kdcache.TargetLookup(cache, temperature=temperature)
    picks = data.draw(st.lists(st.integers(0, len(known) - 1), min_size=1, max_size=6))
    rows = [known[pick] for pick in picks]
    kept = [
        np.array(
            data.draw(st.lists(st.booleans(), min_size=len(row.places), max_size=len(row.places))),
            bool,
        )
        for row in rows
    ]
    fewer = [
        row._replace(places=row.places[own], positions=row.positions[own])
        for row, own in zip(rows, kept, strict=True)
    ]
    form = data.draw(st.sampled_from(["padded", "left", "flat", "packed"]))
    if form in ("padded", "left"):
        batch = as_trained(fewer, fill=data.draw(st.integers(0, 3)), left=form == "left")
        if form == "padded":
            del batch["attention_mask"]
    else:
        each = [as_trained([row]) for row in fewer]
        batch = {n: torch.cat([one[n] for one in each], 1) for n in ("input_ids", "labels")}
        places = torch.cat([torch.arange(len(row.ids)) for row in rows])[None]
        if form == "packed":  # two rows that hold the same documents, padded with zeros
            more = data.draw(st.integers(0, 3))
            pads = {"input_ids": 0, "labels": IGNORE, "position_ids": 0}
            batch = {
                name: torch.nn.functional.pad(value, (0, more), value=pads[name]).repeat(2, 1)
                for name, value in {**batch, "position_ids": places}.items()
            }
            fewer = fewer * 2
        else:
            batch["position_ids"] = places
    want = SoftTargets.concat([row.targets.take(row.positions) for row in fewer])
    found = lookup.find(**batch)
    assert same(found.targets, want.at(temperature))
    assert int((found.labels != IGNORE).sum()) == len(want)
    shifted = torch.full_like(batch["labels"], IGNORE)
    shifted[:, :-1] = batch["labels"][:, 1:]
    assert torch.equal(found.labels, shifted)


def test_caches_answer_in_turn(tmp_path: Path) -> None:
    urls = [tmp_path / name for name in ("one", "two")]
    for number, url in enumerate(urls):
        make_cache(url, [4], task=CAUSAL, codec="sample:8", first=4 * number)
    known = [documents_of(Cache.open(str(url))) for url in urls]
    rows = [known[1][2], known[0][1], known[1][0]]
    want = SoftTargets.concat([row.targets.take(row.positions) for row in rows]).at(2.0)
    lookup = kdcache.TargetLookup([str(url) for url in urls], temperature=2.0)
    again = pickle.loads(pickle.dumps(lookup))
    batch = as_trained(rows)
    for one in (lookup, again, pickle.loads(pickle.dumps(lookup))):
        assert same(one.lookup(batch["input_ids"], batch["labels"]), want)


def test_labels_that_the_cache_does_not_learn_are_an_error(topk: Cache) -> None:
    row = next(r for r in documents_of(topk) if len(r.places) < len(r.ids) - 1)
    lacks = int(np.setdiff1d(np.arange(len(row.ids) - 1), row.places)[0])
    every = row._replace(places=np.arange(len(row.ids) - 1))
    batch = as_trained([every])
    with pytest.raises(
        KdcacheError, match=f"label for its token {lacks + 1}, and the cache has no"
    ):
        kdcache.TargetLookup(topk).find(**batch)


def test_labels_beside_other_ids_are_an_error(topk: Cache) -> None:
    batch = as_trained(documents_of(topk)[:4])
    with pytest.raises(UsageError, match='Try labels="token"'):
        kdcache.TargetLookup(topk, labels="next").find(**batch)
    with pytest.raises(UsageError, match=r"expected two of one shape"):
        kdcache.TargetLookup(topk).find(batch["input_ids"], batch["labels"][:, 1:])


def test_caches_that_are_not_asked_by_content(tmp_path: Path) -> None:
    classes = make_cache(tmp_path / "classes", [3], task=CLASSES)
    with pytest.raises(UsageError, match=r"found by content for causal-lm only"):
        kdcache.TargetLookup(classes)
    made = make_cache(tmp_path / "lm", [3], task=CAUSAL)
    object.__setattr__(made.spec, "rows", {"max_length": 16, "packing": "concat"})
    with pytest.raises(UsageError, match=r"--packing none or whole, or with --attend document"):
        kdcache.TargetLookup(made)
    with pytest.raises(UsageError, match="on_miss is 'skip', expected error or hard"):
        kdcache.TargetLookup(str(tmp_path / "lm"), on_miss="skip")  # type: ignore[arg-type]


# Rows that are not there


def missing(cache: Cache, ids: np.ndarray, learnt: int = 1) -> str:
    """The message about a row of these ids, all labelled."""
    row = Document(ids, cache.read(0).targets, np.arange(0), np.arange(learnt - 1, len(ids) - 1))
    with pytest.raises(KdcacheError) as error:
        kdcache.TargetLookup(cache).find(**as_trained([documents_of(cache)[0], row]))
    assert "1 of the 2 rows of a batch are not in" in str(error.value)
    return str(error.value)


def test_a_miss_names_its_cause(topk: Cache) -> None:
    longest = max(documents_of(topk), key=lambda row: len(row.ids)).ids
    text = " ".join(f"w{i}" if i > 1 else ("[PAD]", "[UNK]")[i] for i in longest)
    cut = missing(topk, longest[:-1])
    assert text[:30] in cut
    assert f"The cache has a row of {len(longest)} ids that begins with it" in cut
    assert f"has its first {len(longest)} ids as a row" in missing(topk, np.append(longest, 9))
    both = np.concatenate([documents_of(topk)[1].ids, longest])
    assert "lays several end to end without position_ids" in missing(topk, both)
    assert "without its first id, 7: the trainer adds a BOS" in missing(topk, np.append(7, longest))
    assert "has the id 64, and the cache's tokenizer has 64" in missing(topk, np.array([5, 64, 2]))
    assert "build the cache from the rows that the trainer prepares" in missing(
        topk, np.arange(60, 40, -1)
    )
    other = np.where(np.arange(len(longest)) == len(longest) - 1, longest[-1] % 62 + 2, longest)
    assert "are not in" in missing(topk, other)  # the last label alone is another one


def test_a_template_and_a_bos_are_told_apart(tmp_path: Path, monkeypatch: Any) -> None:
    made = make_cache(tmp_path / "lm", [5, 3], task=CAUSAL, codec="topk:4")
    known = documents_of(made)[2].ids
    assert f"after the id {known[0]}: the trainer adds no BOS" in missing(made, known[1:])
    monkeypatch.setattr("kdcache.stream.lookup._ALIKE", 3)
    framed = np.concatenate([[50, 51, 52], known[1:], [50, 51]])
    assert "another chat template" in missing(made, framed)


def test_missed_rows_train_on_hard_labels(topk: Cache, caplog: pytest.LogCaptureFixture) -> None:
    known = documents_of(topk)
    strange = known[1]._replace(ids=known[1].ids[::-1].copy())
    lookup = kdcache.TargetLookup(topk, on_miss="hard")
    for _ in range(2):
        batch = as_trained([known[0], strange, known[2]])
        found = lookup.find(**batch)
        assert same(
            found.targets,
            SoftTargets.concat([r.targets.take(r.positions) for r in (known[0], known[2])]).at(1.0),
        )
        assert found.hard is not None
        shifted = torch.full_like(batch["labels"], IGNORE)
        shifted[:, :-1] = batch["labels"][:, 1:]
        assert torch.equal(found.hard[1], shifted[1])
        assert torch.equal(found.labels[[0, 2]], shifted[[0, 2]])
        assert (found.labels[1] == IGNORE).all()
        assert (found.hard[[0, 2]] == IGNORE).all()
    assert (lookup.rows, lookup.missed, lookup.missed_share) == (6, 2, 1 / 3)
    assert caplog.text.count("They train on hard labels") == 1
    alone = lookup.find(**as_trained([strange]))
    assert len(alone.targets) == 0


# The index


def index_file(cache: Cache) -> Path:
    (path,) = Path(cache.storage.url, "lookup").glob("*.index")
    return path


def found_all(cache: Cache) -> bool:
    """Whether a new lookup finds the targets of every row."""
    rows = documents_of(cache)
    want = SoftTargets.concat([row.targets.take(row.positions) for row in rows]).at(1.0)
    batch = as_trained(rows)
    return same(kdcache.TargetLookup(cache).lookup(batch["input_ids"], batch["labels"]), want)


def test_an_index_takes_24_bytes_a_row_and_is_made_once(topk: Cache) -> None:
    assert found_all(topk)
    path = index_file(topk)
    assert path.stat().st_size <= 96 + 24 * topk.manifest.rows
    before = path.stat().st_ino, path.stat().st_mtime_ns
    assert found_all(topk)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == before
    assert len(RowIndex(path, topk.digest)) == len(documents_of(topk))


def test_no_index_leads_to_a_wrong_target(topk: Cache, tmp_path: Path) -> None:
    """Other bytes in the header and in the records, fewer, more, or those of another cache."""
    other = make_cache(tmp_path / "other", [6], task=CAUSAL, first=3)
    assert found_all(topk)
    assert found_all(other)
    whole = index_file(topk).read_bytes()
    records = len(whole) - 24 * topk.manifest.rows
    ends = [*range(0, records, 16), *range(records, len(whole), 41), len(whole) - 1]
    flipped = [whole[:at] + bytes([whole[at] ^ 129]) + whole[at + 1 :] for at in ends]
    cut = [whole[:at] for at in (0, 7, records, records + 24, len(whole) - 1)]
    for changed in (*flipped, *cut, whole + bytes(24), index_file(other).read_bytes()):
        index_file(topk).write_bytes(changed)
        assert found_all(topk)


def test_a_forged_index_misses_and_is_never_believed(topk: Cache) -> None:
    assert found_all(topk)
    path, rows = index_file(topk), documents_of(topk)
    good = RowIndex(path, topk.digest).records.copy()
    for span, row in ((0, 1), (2, 3), (3, 0), (2**32 - 1, 2**32 - 1), (1, 3)):
        forged = good.copy()
        forged["span"], forged["row"] = span, row
        making = content._Making(topk, path.parent)
        making._scratch, making._ends = (path.parent / "scratch").open("w+b"), [0]
        making.add(forged)
        with path.open("wb") as file:
            making(file)
        assert RowIndex(path, topk.digest).intact()
        right = (span, row) in {(int(r["span"]), int(r["row"])) for r in good}
        batch, lookup = as_trained(rows), kdcache.TargetLookup(topk, on_miss="hard")
        found = lookup.find(**batch)
        assert lookup.missed == len(rows) - right
        assert len(found.targets) == int((found.labels != IGNORE).sum())
        if right:
            (one,) = (r for r in rows if not (found.labels == IGNORE).all() and _is(r, found, rows))
            assert same(found.targets, one.targets.take(one.positions).at(1.0))


def _is(row: Document, found: Any, rows: list[Document]) -> bool:
    number = next(i for i, other in enumerate(rows) if other is row)
    return bool((found.labels[number] != IGNORE).any())


@given(st.lists(st.binary(min_size=16, max_size=16), max_size=40), st.integers(1, 7))
@settings(max_examples=50, deadline=None, suppress_health_check=[*HealthCheck])
def test_runs_are_merged(tmp_path: Path, topk: Cache, keys: list[bytes], run: int) -> None:
    """Each key once, with its first place, whatever fits in memory at once."""
    keys = keys + keys[: len(keys) // 3]
    making = content._Making(topk, tmp_path)
    making._scratch, making._ends = (tmp_path / "scratch").open("w+b"), [0]
    records = np.zeros(len(keys), RECORD)
    numbers = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
    records["high"], records["low"], records["row"] = *numbers.T, np.arange(len(keys))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(content, "_RUN", run)
        for begin in range(0, len(keys), run):
            making.add(records[begin : begin + run])
        with (tmp_path / "made").open("w+b") as file:
            making(file)
    index = RowIndex(tmp_path / "made", topk.digest)
    assert index.intact()
    assert len(index) == len(set(keys))
    assert index.find(keys) == [(0, keys.index(key)) for key in keys]
    assert index.find([b"\0" * 15 + b"\1"]) == [
        (0, keys.index(b"\0" * 15 + b"\1")) if b"\0" * 15 + b"\1" in keys else None
    ]


def test_a_cache_that_cannot_be_written_has_its_index_with_the_copies(
    topk: Cache, disk: Path
) -> None:
    folder = Path(topk.storage.url)
    (folder / "lookup").write_text("no folder can be made here")
    assert found_all(topk)
    assert len(list(disk.glob("*.index"))) == 1
    (folder / "lookup").unlink()
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (folder / "lookup").symlink_to(elsewhere)
    assert found_all(topk)
    assert list(elsewhere.iterdir()) == []  # nothing is written through a link


def test_a_remote_cache_has_its_index_with_the_copies(topk: Cache, disk: Path) -> None:
    store, there = fsspec.filesystem("memory"), f"/{disk.parent.name}/lookup"
    store.put(topk.storage.url, there, recursive=True)
    remote = Cache.open(f"memory:/{there}")
    for _ in range(2):
        assert found_all(remote)
        assert len(list(disk.glob("*.index"))) == 1
        assert not store.exists(f"{there}/lookup")


def test_decoded_rows_that_were_changed_are_decoded_again(topk: Cache, disk: Path) -> None:
    assert found_all(topk)
    for path in disk.glob("*.rows"):
        data = bytearray(path.read_bytes())
        data[-40] ^= 255
        path.write_bytes(data)
        with pytest.raises((KdcacheError, ValueError)):
            DecodedRows(path, topk.codec(), topk.rank_to_id)
    assert found_all(topk)
    for path in disk.glob("*.rows"):
        path.write_bytes(b"")
    assert found_all(topk)


def test_too_small_a_folder_is_named_once(
    topk: Cache, disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def warned() -> int:
        caplog.clear()
        monkeypatch.setattr(content, "_warned", set())
        assert found_all(topk)
        return caplog.text.count("shards fit the folder of copies")

    assert warned() == 0
    decoded = list(disk.glob("*.rows"))
    size = max(path.stat().st_size for path in decoded)
    for path in decoded:
        path.unlink()
    monkeypatch.setenv("KDCACHE_DISK_BYTES", str(2 * size))
    assert warned() == 1
    assert f"2 of its {topk.spec.spans} shards" in caplog.text


def test_an_index_that_two_need_at_once_is_made_once(
    topk: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    """Its lock is on the file, for each that opens it: of threads as of processes."""
    caplog.set_level("INFO", "kdcache.stream.content")
    gate = threading.Barrier(2)

    def index(_: int) -> RowIndex:
        cache = Cache.open(topk.storage.url)
        gate.wait()
        return RowIndex.of_cache(cache)

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(index, range(2)))
    assert [(len(one), one.intact()) for one in both] == [(len(documents_of(topk)), True)] * 2
    assert caplog.text.count("indexing") == 1


def test_a_key_is_of_ids_alone() -> None:
    def ids(dtype: str) -> Iterator[bytes]:
        yield hashed(np.array([1, 2, 70_000], dtype)).digest()
        yield hashed(np.array([1, 0, 2, 0, 70_000, 0], dtype)[::2]).digest()

    assert len({key for dtype in ("int32", "int64") for key in ids(dtype)}) == 1
