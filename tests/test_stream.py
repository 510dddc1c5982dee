"""The order is a permutation for any world, the batches carry the right targets, threads end."""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from make_caches import CAUSAL, CLASSES, make_cache, make_rows, teacher_logits
from torch.utils.data import DataLoader

from kdcache.cache import Cache
from kdcache.cache.shard import ShardData
from kdcache.errors import CorruptCacheError, UsageError
from kdcache.stream import (
    Batch,
    Collator,
    Cursor,
    TargetDataset,
    TargetStream,
    order,
    reader,
    share,
)
from kdcache.stream.parallel import Background
from kdcache.targets import (
    Codec,
    DenseTargets,
    SparseTargets,
    Targets,
    TargetWriter,
    position_uniform,
    sample,
)
from kdcache.targets.base import running_sum

SIZES = [5, 0, 3, 9, 1, 7, 4]


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """29 rows of classification in 6 shards."""
    return make_cache(tmp_path_factory.mktemp("caches") / "classes", [5, 3, 9, 1, 7, 4])


@pytest.fixture(scope="module", params=["dense", "topk:5", "sample:8"])
def causal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """20 rows of a causal LM in 3 shards, with each codec."""
    folder = tmp_path_factory.mktemp("caches") / "causal"
    return make_cache(folder, [8, 7, 5], task=CAUSAL, codec=request.param)


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("kdcache-")] == []


def numbers(batch: dict[str, torch.Tensor], vocab: int = 64) -> list[int]:
    """Which rows a batch holds; rows of weight zero are not counted."""
    if torch.isinf(batch["count"]):
        return []
    return (batch["input_ids"][:, 0] * vocab + batch["input_ids"][:, 1]).tolist()


def flat(parts: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


# Order


def test_order_is_fixed_for_ever() -> None:
    # A run that is resumed by a later version must meet the order it began with.
    pairs = np.concatenate(list(order(7, 1, [3, 2, 2], 2))).tolist()
    assert pairs == ORDER_7_1
    np.random.default_rng(0).random()
    assert np.concatenate(list(order(7, 1, [3, 2, 2], 2))).tolist() == ORDER_7_1


ORDER_7_1 = [[2, 0], [1, 0], [1, 1], [2, 1], [0, 2], [0, 0], [0, 1]]


def taken_in_turn(
    seed: int, epoch: int, sizes: list[int], group: int, streams: int, shuffle: bool
) -> list[tuple[int, int]]:
    """The global order as its definition reads, on whole lists."""

    def permuted(items: list[Any], use: int, index: int, stream: int) -> list[Any]:
        if not shuffle:
            return items
        words = np.random.Philox(key=[seed, epoch], counter=[0, stream, index, use])
        return [items[i] for i in np.argsort(words.random_raw(len(items)), kind="stable")]

    shards = permuted(list(range(len(sizes))), 0, 0, 0)
    line = [(place, row) for place, shard in enumerate(shards) for row in range(sizes[shard])]
    walks = []
    for stream in range(streams):
        length = len(range(stream, len(line), streams))
        stretch, line = line[:length], line[length:]
        line += [(-1, -1)] * length  # what is cut off does not change the lengths of the others
        # The first stretch begins with the first shard, others with that of their first row.
        begin = stretch[0][0] if stream and stretch else 0
        parts: dict[int, list[tuple[int, int]]] = {}
        for place, row in stretch:
            parts.setdefault((place - begin) // group, []).append((shards[place], row))
        walks.append(flat(permuted(part, 1, index, stream) for index, part in parts.items()))
    turns = [[walk[turn] for walk in walks if turn < len(walk)] for turn in range(len(line))]
    return flat(turns)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 12), max_size=9),
    group=st.integers(1, 5),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 5),
    streams=st.integers(1, 12),
    start=st.integers(0, 60),
    shuffle=st.booleans(),
)
def test_streams_take_turns_and_begin_anywhere(
    sizes: list[int], group: int, seed: int, epoch: int, streams: int, start: int, shuffle: bool
) -> None:
    def walk(stream: int, start: int) -> list[tuple[int, int]]:
        cut: Any = {"streams": streams, "stream": stream, "start": start, "shuffle": shuffle}
        parts = list(order(seed, epoch, sizes, group, **cut))
        assert all(map(len, parts)), "groups of empty shards are left out"
        return [tuple(p) for part in parts for p in part]

    walks = [walk(stream, 0) for stream in range(streams)]
    turns = [[walk[turn] for walk in walks if turn < len(walk)] for turn in range(sum(sizes))]
    assert flat(turns) == taken_in_turn(seed, epoch, sizes, group, streams, shuffle)
    assert [walk(stream, start) for stream in range(streams)] == [walk[start:] for walk in walks]
    assert sorted(flat(turns)) == [(s, r) for s, n in enumerate(sizes) for r in range(n)]


@example(first=0, rows=25, streams=19, world=2, slices=1)
@given(
    first=st.integers(0, 10**12),
    rows=st.integers(0, 200),
    streams=st.integers(1, 40),
    world=st.integers(1, 40),
    slices=st.integers(1, 4),
)
def test_ranks_share_a_batch_equally_and_read_few_streams(
    first: int, rows: int, streams: int, world: int, slices: int
) -> None:
    shares = [
        share(first, rows, streams=streams, rank=rank, world_size=world, slices=slices)
        for rank in range(world)
    ]
    sizes = [np.diff(mine.bounds) for mine in shares]
    assert np.ptp(sizes) <= 1
    slots: list[int] = []
    for mine in shares:
        read = [
            row * streams + stream for stream, low, high in mine.reads for row in range(low, high)
        ]
        slots += read[mine.bounds[0] : mine.bounds[-1]]
        if streams > 1:
            assert (mine.bounds[0], mine.bounds[-1]) == (0, len(read))
            # Whole streams, or a stretch of them of which the first and the last are parts.
            whole = len(read) // max(1, rows // streams) + 2
            assert len(mine.reads) <= (streams // world if streams % world == 0 else whole)
    assert sorted(slots) == list(range(first, first + rows))


# Batches


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Cache]:
    """Caches of 13 and 11 rows, numbered from 0 and from 100, whose files are read but once."""
    folder = tmp_path_factory.mktemp("caches")
    caches = [
        make_cache(folder / "a", [4, 0, 6, 3]),
        make_cache(folder / "b", [1, 8, 2], first=100),
    ]
    for cache in caches:
        cache.read = functools.cache(cache.read)  # type: ignore[method-assign]
    return caches


@settings(max_examples=25, deadline=None)
@given(
    batch_size=st.integers(1, 30),
    worlds=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    accumulations=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    streams=st.integers(1, 6) | st.sampled_from([12, 60]),
    group=st.none() | st.integers(1, 8),
    weights=st.tuples(*[st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0])] * 2),
    drop_last=st.booleans(),
    stop=st.integers(0, 30),
)
def test_any_workers_share_the_batches_of_one_and_go_on_where_others_stopped(
    pair: list[Cache],
    batch_size: int,
    worlds: tuple[int, int],
    accumulations: tuple[int, int],
    streams: int,
    group: int | None,
    weights: tuple[float, float],
    drop_last: bool,
    stop: int,
) -> None:
    common: dict[str, Any] = {"batch_size": batch_size, "seed": 5, "group": group}
    common |= {"weights": weights, "streams": streams, "sum_over": int}
    rows = TargetStream(pair, **common).rows
    drop_last = drop_last and batch_size <= rows

    def ranks_of(phase: int, cursor: Cursor | None = None) -> list[TargetStream]:
        world, pieces = worlds[phase], accumulations[phase]
        return [
            TargetStream(
                pair,
                rank=rank,
                world_size=world,
                accumulation=pieces,
                drop_last=drop_last,
                cursor=cursor,
                **common,
            )
            for rank in range(world)
        ]

    def steps(ranks: list[TargetStream], epochs: int) -> Iterator[list[list[int]]]:
        """Rows of each global batch, in slices; all ranks keep step."""
        batches = [rank.batches(epochs) for rank in ranks]
        pieces = ranks[0].accumulation
        try:
            for first in batches[0]:
                step = [first, *(next(b) for b in batches[1:])]
                step += [next(b) for _ in range(pieces - 1) for b in batches]
                found = [numbers(piece) for piece in step]
                sizes = [len(part) for part in found]
                assert max(sizes) - min(sizes) <= 1
                # A number is not summed here, so a rank's slices have what is read by that rank.
                world = len(ranks)
                for rank in range(world):
                    counts = [p["count"] for p in step[rank::world] if numbers(p)]
                    read = sum(sizes if streams == 1 else sizes[rank::world])
                    assert counts == [read] * len(counts)
                yield found
            assert [next(b, None) for b in batches] == [None] * len(batches)
        finally:
            for b in batches:
                b.close()  # type: ignore[attr-defined]

    alone = TargetStream(pair, drop_last=drop_last, **common)
    whole = [numbers(b) for b in alone.batches(2)]
    before = ranks_of(0)
    stop = min(stop, len(whole) - 1)
    seen = []
    for step in steps(before, 2):
        seen.append(step)
        if len(seen) > stop:
            break
    cursors = {rank.cursor for rank in before}
    assert len(cursors) == 1
    seen += steps(ranks_of(1, cursors.pop()), 2)
    assert [sorted(flat(step)) for step in seen] == [sorted(batch) for batch in whole]
    if streams == 1 and accumulations == (1, 1):  # one after the other, as before there were more
        assert [flat(step) for step in seen] == whole

    if drop_last:
        assert [len(batch) for batch in whole] == [batch_size] * (2 * (rows // batch_size))
        return
    for epoch in (whole[: alone.steps], whole[alone.steps :]):
        times = Counter(flat(epoch))
        assert times.total() == rows
        for cache, weight, first in zip(pair, weights, (0, 100), strict=True):
            mine = range(first, first + cache.manifest.rows)
            used = [times.pop(row, 0) for row in mine]
            assert set(used) <= {int(weight), math.ceil(weight)}
            assert abs(sum(used) - weight * len(mine)) <= 0.5
        assert not times


def test_a_cursor_stops_between_the_slices_of_a_step(classes: Cache) -> None:
    stream = TargetStream(classes, batch_size=10, accumulation=2)
    batches = stream.batches(1)
    next(batches)
    assert stream.state_dict() == {"epoch": 0, "rows_seen": 0, "step": 0, "streams": 1}
    next(batches)
    assert stream.state_dict() == {"epoch": 0, "rows_seen": 10, "step": 1, "streams": 1}
    batches.close()  # type: ignore[attr-defined]
    other = TargetStream(classes, batch_size=3)
    other.load_state_dict(stream.state_dict())
    seen = flat(numbers(b) for b in other)
    assert len(seen) == 19
    assert other.cursor == Cursor(1, 0, 1 + 7)


def test_iterating_twice_gives_two_epochs(classes: Cache) -> None:
    stream = TargetStream(classes, batch_size=8)
    first = flat(numbers(b) for b in stream)
    second = flat(numbers(b) for b in stream)
    assert sorted(first) == sorted(second) == list(range(29))
    assert first != second
    assert stream.state_dict() == {"epoch": 2, "rows_seen": 0, "step": 8, "streams": 1}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_targets_stay_with_their_positions(causal: Cache, temperature: float) -> None:
    rows = make_rows(CAUSAL, range(20), 64, 3)
    firsts = [0, 8, 15]
    stream = TargetStream(causal, batch_size=6, temperature=temperature, group=2, seed=5)
    for batch in stream:
        ids = numbers(batch)
        want = [rows[i] for i in ids]
        width = max(len(r.input_ids) for r in want)
        assert batch["input_ids"].shape == (len(ids), width)
        for line, row in enumerate(want):
            length = len(row.input_ids)
            assert batch["input_ids"][line].tolist() == [*row.input_ids, *[0] * (width - length)]
            assert batch["attention_mask"][line].tolist() == [1] * length + [0] * (width - length)
            assert batch["labels"][line].tolist() == [*row.labels, *[-100] * (width - length)]
        logits = teacher_logits(want, CAUSAL, 64)
        assert int((batch["labels"] != -100).sum()) == len(logits) == int(batch["count"])
        probs = torch.softmax(logits / temperature, -1)
        targets = batch["targets"]
        assert targets.temperature == temperature
        if isinstance(targets, DenseTargets):
            torch.testing.assert_close(targets.logits, logits)
            continue
        assert targets.exact == causal.spec.codec.startswith("topk")
        if targets.exact:
            kept, weights = targets.ids, targets.weights
            used = weights > 0
            torch.testing.assert_close(
                weights[used], probs.gather(1, kept)[used], rtol=2e-3, atol=1e-4
            )
        begin = 0
        for number in ids:
            shard = next(s for s in (2, 1, 0) if number >= firsts[s])
            data = causal.read(shard)
            bounds = data.position_offsets[number - firsts[shard] :][:2]
            stored = data.targets.take(np.arange(*bounds)).at(temperature)
            here = slice(begin, begin + len(stored))
            begin = here.stop
            for name in ("ids", "weights", "tail"):
                value = getattr(stored, name)
                mine = getattr(targets, name)[here]
                if value.ndim == 2:
                    assert not mine[:, value.shape[1] :].any()
                    mine = mine[:, : value.shape[1]]
                assert torch.equal(mine, value)


def test_classification_batches_carry_labels_types_and_logits(classes: Cache) -> None:
    (batch,) = TargetStream(classes, batch_size=29, shuffle=False)
    rows = make_rows(CLASSES, range(29), 64, 3)
    assert batch["labels"].tolist() == [int(r.labels[0]) for r in rows]
    torch.testing.assert_close(batch["targets"].logits, teacher_logits(rows, CLASSES, 3))
    for line, row in enumerate(rows):
        assert row.type_ids is not None
        length = len(row.input_ids)
        assert batch["token_type_ids"][line, :length].tolist() == row.type_ids.tolist()


def test_without_a_temperature_the_count_is_that_of_hard_labels(classes: Cache) -> None:
    (batch,) = TargetStream(classes, batch_size=29, temperature=None)
    assert "targets" not in batch
    assert int(batch["count"]) == int((batch["labels"] != -100).sum()) < 29


def test_a_student_may_bring_its_own_tokens(classes: Cache) -> None:
    def tokenize(texts: list[str], pairs: list[str] | None) -> dict[str, torch.Tensor]:
        assert pairs is None
        return {"input_ids": torch.tensor([[len(t)] for t in texts])}

    (batch,) = TargetStream(classes, batch_size=29, shuffle=False, tokenize=tokenize)
    rows = make_rows(CLASSES, range(29), 64, 3)
    assert batch["input_ids"].tolist() == [[len(r.text or "")] for r in rows]
    assert "attention_mask" not in batch


def test_a_schedule_sees_the_step(classes: Cache) -> None:
    stream = TargetStream(
        classes, batch_size=10, temperature=lambda step: 1.0 + step, accumulation=2
    )
    assert [b["targets"].temperature for b in stream] == [1, 1, 2, 2, 3, 3]
    assert [b["targets"].temperature for b in stream] == [4, 4, 5, 5, 6, 6]


# Several caches


@pytest.mark.parametrize("codec", ["topk:5", "sample:8"])
def test_caches_with_other_ranks_are_mixed(tmp_path: Path, codec: str) -> None:
    rng = np.random.default_rng(0)
    tables = [rng.permutation(64), rng.permutation(64), None]
    caches = [
        make_cache(tmp_path / f"{i}", [5, 4], task=CAUSAL, codec=codec, first=100 * i)
        for i in range(len(tables))
    ]
    for cache, table in zip(caches, tables, strict=True):
        cache.__dict__["rank_to_id"] = table
    stream = TargetStream(caches, batch_size=27, temperature=2.0)
    (batch,) = stream
    begin = 0
    for number in numbers(batch):
        cache, row = caches[number // 100], number % 100
        data = cache.read(row // 5)
        places = np.arange(*data.position_offsets[row % 5 :][:2])
        want = dense(data.targets.take(places).at(2.0))
        here = slice(begin, begin + len(want))
        begin = here.stop
        torch.testing.assert_close(dense(batch["targets"][here]), want)
    assert begin == len(batch["targets"])


def dense(targets: Targets) -> torch.Tensor:
    """Weights of all ids, float32 [positions, 64]."""
    assert isinstance(targets, SparseTargets)
    return torch.zeros(len(targets), 64).scatter_add_(1, targets.ids, targets.weights)


def test_caches_that_do_not_fit_are_refused_with_every_reason(tmp_path: Path) -> None:
    a = make_cache(tmp_path / "a", [2], task=CAUSAL, codec="topk:4")
    causal: dict[str, Any] = {"task": CAUSAL}
    others = [
        make_cache(tmp_path / "b", [2], tokenizer="other", codec="dense"),
        make_cache(tmp_path / "c", [2], tokenizer="other", codec="topk:4", **causal),
        make_cache(tmp_path / "d", [2], vocab=65, codec="topk:4", **causal),
        make_cache(tmp_path / "e", [2], codec="sample:4", **causal),
    ]
    with pytest.raises(UsageError) as error:
        TargetStream([a, *others], batch_size=0, temperature=3.0)
    lines = str(error.value).splitlines()
    expected = [
        *("batch_size is 0", "temperature 3", f"the task of {others[0].url}"),
        *(f"the tokenizer of {others[1].url}", f"the vocabulary of {others[2].url} is 65 ids"),
        *(f"codec of {others[3].url}", f"{others[3].url}: temperature 3"),
    ]
    assert len(lines) == len(expected), lines
    for line, word in zip(lines, expected, strict=True):
        assert word in line


@pytest.mark.parametrize("classes", [2, 4])
def test_caches_of_other_classes_are_refused_by_name(tmp_path: Path, classes: int) -> None:
    a, b = make_cache(tmp_path / "a", [2]), make_cache(tmp_path / "b", [2], classes=classes)
    with pytest.raises(UsageError, match=r"the classes of .*b is c0, c1.*has c0, c1, c2\. Name"):
        TargetStream([a, b], batch_size=2)


@pytest.mark.parametrize("first", [0, 1])
def test_a_cache_of_an_ensemble_binds_a_mix_to_its_temperatures(tmp_path: Path, first: int) -> None:
    """Whichever cache comes first: the logits of one teacher are right at any."""
    caches = [make_cache(tmp_path / f"{n}", [6], teachers=n, first=6 * n) for n in (1, 2)]
    mixed = [caches[first], caches[1 - first]]
    for temperature in (lambda step: 1.0 + step, lambda step: 1.0 + step / 2):
        stream = TargetStream(mixed, batch_size=4, temperature=temperature)
        with pytest.raises(UsageError, match=r"temperature (1\.5|3) is not declared"):
            list(stream)
    assert len(list(TargetStream(mixed, batch_size=4, temperature=2.0))) == 3


def test_a_group_holds_so_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(tmp_path / "a", [6] * 24)
    size = cache.manifest.bytes / 24
    assert TargetStream(cache, batch_size=4).group > 24  # all of it: this cache is small
    monkeypatch.setattr(reader, "_GROUP_BYTES", int(10.5 * size))
    assert TargetStream(cache, batch_size=4).group == 10
    monkeypatch.setattr(reader, "_GROUP_BYTES", 1)
    assert TargetStream(cache, batch_size=4).group == 3
    assert TargetStream(cache, batch_size=4, group=2, world_size=2).group == 2
    assert TargetStream(cache, batch_size=4, streams=2).group == 2  # four shards in every batch
    assert TargetStream(cache, batch_size=4, world_size=8).group == 1
    with pytest.raises(UsageError, match="group is 0"):
        TargetStream(cache, batch_size=4, group=0)


# Threads


def test_leaving_early_ends_the_threads(classes: Cache) -> None:
    for _ in TargetStream(classes, batch_size=2, group=1, prefetch=1):
        break


def test_an_error_while_reading_reaches_the_consumer(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "a", [4, 4, 4])
    next((tmp_path / "a" / "shards").glob("00001-*")).unlink()
    stream = TargetStream(cache, batch_size=1, shuffle=False, group=1)
    batches = iter(stream)
    assert flat(numbers(next(batches)) for _ in range(4)) == [0, 1, 2, 3]
    with pytest.raises(CorruptCacheError, match="00001-"):
        next(batches)


def test_background_keeps_its_distance() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(10):
            made.append(i)
            yield i

    ahead = Background(items(), 2, "kdcache-test")
    for i in range(10):
        assert next(ahead) == i
        assert len(made) <= i + 4  # one handed out, two ready, one being made
    with pytest.raises(StopIteration):
        next(ahead)
    ahead.close()


class Reads:
    """The shards that were read, and how many were in memory at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spans: list[int] = []
        self.most = 0
        alive: set[int] = set()
        read = Cache.read

        def counting(cache: Cache, span: int, *, targets: bool = True) -> ShardData:
            data = read(cache, span, targets=targets)
            self.spans.append(span)
            alive.add(span)
            weakref.finalize(data.input_ids, alive.discard, span)
            self.most = max(self.most, len(alive))
            return data

        monkeypatch.setattr(Cache, "read", counting)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


@pytest.mark.parametrize("streams", [1, 4, 8])
def test_a_rank_reads_its_share_and_holds_its_streams(
    tmp_path: Path, reads: Reads, streams: int
) -> None:
    shards, world = 20, 4
    cache = make_cache(tmp_path / "a", [6] * shards)
    split: list[int] = []
    for rank in range(world):
        reads.spans.clear()
        reads.most = 0
        stream = TargetStream(
            cache, batch_size=8, group=1, prefetch=1, streams=streams, sum_over=int,
            rank=rank, world_size=world,
        )  # fmt: skip
        assert sum(len(numbers(b)) for b in stream) == 6 * shards // world
        if streams == 1:
            assert len(reads.spans) == shards
            assert reads.most <= 3
            continue
        # Its share, and at each end of each of its stretches a shard that is another's too.
        own = streams // world
        assert len(reads.spans) == len(set(reads.spans)) <= shards / world + 2 * own
        assert reads.most <= 2 * own + 1
        split += reads.spans
    if streams > 1:
        assert set(split) == set(range(shards))
        assert len(split) <= shards + streams - 1


def test_a_state_keeps_its_streams_on_any_number_of_workers(classes: Cache) -> None:
    four = TargetStream(classes, batch_size=8, world_size=4, sum_over=int)
    next(batches := four.batches(1))
    batches.close()  # type: ignore[attr-defined]
    state = four.state_dict()
    assert state == {"epoch": 0, "rows_seen": 8, "step": 1, "streams": 4}
    rest = flat(numbers(b) for b in TargetStream(classes, batch_size=8, cursor=state))
    alone = TargetStream(classes, batch_size=8, streams=4)
    assert rest == flat([numbers(b) for b in alone][1:])
    with pytest.raises(UsageError, match="the state is of 4 streams.*made with 2"):
        TargetStream(classes, batch_size=8, streams=2, cursor=state)
    with pytest.raises(UsageError, match="streams is 0"):
        TargetStream(classes, batch_size=8, streams=0)


def test_several_workers_need_a_sum_for_their_count(classes: Cache) -> None:
    with pytest.raises(UsageError, match=r"each of 2 workers reads its share.*not set up"):
        next(iter(TargetStream(classes, batch_size=8, world_size=2)))


def test_shards_are_announced_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = [make_cache(tmp_path / "a", [3] * 5), make_cache(tmp_path / "b", [2] * 4, first=100)]
    told: dict[str, list[int]] = {}
    read = Cache.read

    def prefetch(self: Cache, spans: Iterable[int]) -> None:
        told[self.url] = list(spans)

    def checking(self: Cache, span: int, *, targets: bool = True) -> ShardData:
        known = told[self.url]
        assert span in known
        assert len(known) == len(set(known)) <= 2 * 3  # this group and the next one
        return read(self, span, targets=targets)

    monkeypatch.setattr(Cache, "prefetch", prefetch)
    monkeypatch.setattr(Cache, "read", checking)
    stream = TargetStream(caches, batch_size=4, group=3, weights=[2, 1])
    assert sum(len(numbers(b)) for b in stream.batches(2)) == 2 * 38


# Map-style


def same_batch(one: Batch, other: Batch) -> bool:
    left, right = ({**b, **vars(b["targets"])} for b in (one, other))
    del left["targets"], right["targets"]
    return left.keys() == right.keys() and all(
        torch.equal(torch.as_tensor(left[name]), torch.as_tensor(right[name])) for name in left
    )


def test_a_plain_loader_gives_the_same_batches(classes: Cache, causal: Cache) -> None:
    for cache, rows in ((classes, 29), (causal, 20)):
        dataset = TargetDataset(cache, keep=1)
        assert len(dataset) == rows
        loader = DataLoader(dataset, batch_size=6, collate_fn=Collator(cache.spec.pad_id, 2.0))
        stream = TargetStream(cache, batch_size=6, shuffle=False, temperature=2.0)
        for left, right in zip(loader, stream, strict=True):
            assert same_batch(left, right)
    with pytest.raises(IndexError):
        dataset[20]


def test_a_stream_in_a_loader_and_not_in_worker_processes(classes: Cache) -> None:
    stream = TargetStream(classes, batch_size=10)
    assert len(DataLoader(stream, batch_size=None)) == 3
    assert sum(len(numbers(b)) for b in DataLoader(stream, batch_size=None)) == 29


@pytest.mark.filterwarnings("ignore")  # torchdata's own
def test_a_stateful_loader_goes_on_where_it_stopped(classes: Cache) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is optional")

    def loader() -> Any:
        stream = TargetStream(classes, batch_size=4, accumulation=2)
        return torchdata.StatefulDataLoader(stream, batch_size=None)

    whole = [numbers(batch) for batch in loader()]
    begun = loader()
    batches = iter(begun)
    seen = [numbers(next(batches)) for _ in range(4)]
    state = begun.state_dict()
    del batches
    rest = loader()
    rest.load_state_dict(state)
    assert seen + [numbers(batch) for batch in rest] == whole


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_for_a_gpu_are_page_locked(causal: Cache) -> None:
    plain = TargetStream(causal, batch_size=5)
    for batch, same in zip(TargetStream(causal, batch_size=5, pin_memory=True), plain, strict=True):
        values = [*batch.values(), *vars(batch["targets"]).values()]
        assert all(value.is_pinned() for value in values if isinstance(value, torch.Tensor))
        assert same_batch(batch, same)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("stored", [np.bool_, np.uint8, np.uint16, np.int32, np.uint32])
@given(data=st.data())
def test_a_running_sum_is_that_of_numpy(stored: type, dtype: type, data: st.DataObject) -> None:
    highest = 1 if stored is np.bool_ else np.iinfo(stored).max
    numbers = data.draw(st.lists(st.integers(0, int(highest)), max_size=9))
    values = np.array(numbers, stored)
    values.flags.writeable = False
    # Where 32 bits overflow too: differences of such sums are right all the same.
    found, want = running_sum(values, dtype), np.cumsum(values, dtype=dtype)
    assert found.dtype == dtype
    assert np.array_equal(found, want)


@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 2.0), (1.0, 2.0, 3.0)])
def test_targets_decoded_in_slices_are_those_of_one_by_one(
    temperatures: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = Codec.parse("sample:8", temperatures, 700)
    logits = torch.randn(23, 700, generator=torch.Generator().manual_seed(0)) * 3
    logits[7] = -50.0  # nothing but a head
    logits[7, 3] = 50.0
    u = torch.from_numpy(position_uniform(0, 0, np.arange(23), 0))
    table = np.random.default_rng(0).permutation(700)
    soft = TargetWriter(codec, table).write(logits, u)
    monkeypatch.setattr(sample, "_SLICE", 5)
    for temperature in temperatures:
        whole = soft.at(temperature)
        assert isinstance(whole, SparseTargets)
        for i in range(23):
            alone = soft.take(np.array([i])).at(temperature)
            assert isinstance(alone, SparseTargets)
            width = alone.ids.shape[1]
            assert torch.equal(whole.ids[i, :width], alone.ids[0])
            assert torch.equal(whole.weights[i, :width], alone.weights[0])
            assert not whole.ids[i, width:].any()
            assert not whole.weights[i, width:].any()
