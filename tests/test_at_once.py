"""Two commands at once on one place: one works, and the other one does or says what is so.

Whatever moment of the first it is at which the second runs: see `at_once`.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from at_once import at_each_moment
from conftest import further
from make_caches import CLASSES, make_cache, make_rows, make_shard, word_tokenizer

from kdcache.cache import Cache, CacheSpec
from kdcache.cache.sealing import shard_entry
from kdcache.commands.export import ExportResult, export
from kdcache.commands.finetune.finetune import FinetuneResult, finetune
from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.commands.options import ExportOptions, GcOptions, RepairOptions
from kdcache.commands.run_folder import RESULT_FILE, SCRATCH, TrainResult
from kdcache.commands.sweep.sweep import SWEEP_FILE
from kdcache.commands.sweep.sweep import _read_manifest as read_sweep
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.prepare import RunPlan
from kdcache.commands.upkeep import gc, repair
from kdcache.errors import KdcacheError, UsageError
from kdcache.files import LOCK_FILE, alone, clear, filled_folder, write_json
from kdcache.storage import LocalStorage

finetune_module = sys.modules[finetune.__module__]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder for what two commands write."""
    return tmp_path / "place"


def is_refused(outcome: object, work: str) -> bool:
    """Whether a command was refused because another one is at work."""
    return isinstance(outcome, UsageError) and f"another {work} is running" in str(outcome)


@pytest.mark.parametrize("removes", [False, True])
def test_two_begin_in_one_folder_and_give_it_up(place: Path, removes: bool) -> None:
    def begin() -> None:
        with alone(place / "run", "training"):
            if removes:
                (place / "run" / "checkpoint-1").mkdir()
                (place / "run" / "metrics.jsonl").touch()
                clear(place / "run")

    refused = 0
    for both in at_each_moment(place, begin, begin):
        for outcome in (both.first, both.second):
            assert outcome is None or is_refused(outcome, "training"), both
        refused += is_refused(both.second, "training")
        assert not (place / "run").exists(), both
    assert refused >= 2


def test_who_begins_keeps_the_folder_that_another_gives_up(place: Path) -> None:
    def give_up() -> None:
        with alone(place / "run", "training"):
            pass

    def work() -> None:
        with alone(place / "run", "training"):
            (place / "run" / "metrics.jsonl").touch()

    worked = 0
    for both in at_each_moment(place, give_up, work):
        found = sorted(path.name for path in place.glob("run/*"))
        if both.second is None:
            worked += 1
            assert found == [LOCK_FILE, "metrics.jsonl"], both
        else:
            assert is_refused(both.second, "training"), both
            assert not found, both
    assert worked >= 2


def spec_of(codec: str, spans: int = 2) -> CacheSpec:
    """A cache of classes with this codec."""
    return CacheSpec(
        task=CLASSES, teachers=({"sha256": "0", "weight": 1.0},), ensemble="mean-probs",
        dtype="float32", tokenizer="t", vocab_size=3, pad_id=0, eos_id=None,
        label_names=("c0", "c1", "c2"), corpus=({"name": "c", "size": 1, "tag": "x"},),
        rows={"max_length": 16, "packing": "none"}, reading={}, spans=spans, codec=codec,
        temperatures=(1.0,), seed=0,
    )  # fmt: skip


def begin(url: Path, codec: str, files: dict[str, bytes], commits: int = 0) -> Cache:
    """A build that begins, commits some shards, and is interrupted."""
    spec = spec_of(codec)
    cache = Cache.create_or_resume(str(url), spec, tokenizer_files=files)
    try:
        for span in range(commits):
            rows = make_rows(CLASSES, range(span, span + 2), 64, 3)
            cache.commit(span, make_shard(CLASSES, rows, spec.make_codec(), 3))
    finally:
        cache.release()
    return cache


@pytest.mark.parametrize("commits", [1, *further(0)])
def test_a_cache_that_nobody_uses_is_begun_anew_by_one(place: Path, commits: int) -> None:
    words = word_tokenizer()
    others = {**words, "vocab.json": b"{}"}

    def look() -> str:
        """Which cache it is, once all that it names has been found right."""
        cache = Cache.resume(str(place / "cache"))
        for name in cache.files:
            cache.check_beside(name)
        for span, name in cache.committed().items():
            shard_entry(cache, span, name)
        return cache.spec.codec

    begun: list[str] = []
    for both in at_each_moment(
        place,
        lambda: begin(place / "cache", "topk:2", words),
        lambda: begin(place / "cache", "dense", others, commits),
        prepare=lambda: begin(place / "cache", "topk:1", others),
    ):
        codec = look()
        assert codec == "topk:2" or "other options" in str(both.first), both
        if commits:  # else the first may begin anew once the second has ended
            refused = both.second is None or "other options" in str(both.second)
            assert codec == "dense" or refused, both
        begun.append(codec)
    assert set(begun) == {"topk:2", "dense"}


@pytest.mark.parametrize("removed", ["shards", *further("spec.json", "manifest.json")])
def test_what_a_repair_removes_while_it_is_read_is_missing(
    place: Path, tmp_path: Path, removed: str
) -> None:
    make_cache(tmp_path / "cache", [2, 2])

    def read() -> int:
        cache = Cache.open(str(place / "cache"))
        return sum(len(cache.read(span)) for span in range(cache.spec.spans))

    def remove() -> None:
        storage = LocalStorage(place / "cache")
        names = [f"shards/{name}" for name in storage.names("shards")]
        for name in names if removed == "shards" else [removed]:
            storage.remove(name)

    outcomes = [
        both.first
        for both in at_each_moment(
            place, read, remove, lambda: shutil.copytree(tmp_path / "cache", place / "cache")
        )
    ]
    assert isinstance(outcomes[0], KdcacheError)
    assert all(outcome == 4 or isinstance(outcome, KdcacheError) for outcome in outcomes)


@pytest.mark.parametrize("sealed", [True, False])
def test_two_remove_what_is_left_over(place: Path, tmp_path: Path, sealed: bool) -> None:
    cache = make_cache(tmp_path / "cache", [2, 2])

    def prepare() -> None:
        shutil.copytree(tmp_path / "cache", place / "cache")
        scratch = place / "cache" / "tmp" / f"{0:032x}.tmp"
        scratch.parent.mkdir()
        scratch.touch()
        os.utime(scratch, (0, 0))
        name = cache.manifest.shards[0].name
        if sealed:
            (place / "cache" / "shards" / f"{name[:5]}-{0:016x}.h5").touch()
        else:
            (place / "cache" / "manifest.json").unlink()
            (place / "cache" / "shards" / name).write_bytes(b"broken")

    def work() -> object:
        cache = str(place / "cache")
        return gc(GcOptions(cache)), None if sealed else repair(RepairOptions(cache))

    for both in at_each_moment(place, work, work, prepare):
        assert isinstance(both.first, tuple), both
        assert isinstance(both.second, tuple), both
        assert len(list(place.glob("cache/shards/*"))) == 1 + sealed, both
        assert not list(place.glob("cache/tmp/*")), both


def test_two_exports_into_one_folder(place: Path, tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", [2, 2])
    options = ExportOptions(str(tmp_path / "cache"), str(place / "out"))

    refused = 0
    for both in at_each_moment(place, lambda: export(options), lambda: export(options)):
        assert isinstance(both.first, ExportResult), both
        assert isinstance(both.second, ExportResult) or is_refused(both.second, "export"), both
        assert len(list(place.glob("out/*.parquet"))) == 2, both
        refused += is_refused(both.second, "export")
    assert refused >= 2


def test_a_sweep_is_looked_at_while_another_one_begins(place: Path) -> None:
    def begin() -> None:
        with alone(place / "out", "sweep"):
            (place / "out" / "runs").mkdir()
            write_json(place / "out" / SWEEP_FILE, {"runs": {"key": "run"}})

    def look() -> object:
        return read_sweep(place / "out")

    for both in at_each_moment(place, look, begin):
        assert both.first in ({}, {"key": "run"}), both
    for both in at_each_moment(place, begin, look):
        assert both.second in ({}, {"key": "run"}), both


def test_a_teacher_is_looked_for_while_another_fine_tuning_ends(
    place: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "w7", "label": "a"}\n')
    options = FinetuneOptions(
        model=str(tmp_path), corpus=str(tmp_path / "text.jsonl"), out=str(place / "teacher")
    )
    result = FinetuneResult(options.out, ("a", "b"), 1, 0, 1, 1, 1, 0.5)
    document = {"options": finetune_module._plain(options), "result": asdict(result)}

    def prepare() -> None:
        (place / "ready").mkdir()
        write_json(place / "ready" / finetune_module.RESULT_FILE, document)

    def look() -> object:
        return finetune_module._finished(options, place / "teacher")

    def end() -> None:
        (place / "ready").rename(place / "teacher")

    for both in at_each_moment(place, look, end, prepare):
        assert both.first is None or both.first.loss == 0.5, both


def test_a_run_is_looked_at_while_it_ends(place: Path, tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", [9])
    options = TrainOptions(
        cache=str(tmp_path / "cache"), student="bilstm", out=str(place / "run"), max_steps=1,
        report_to="none", embedding_size=4, hidden_size=4, dense_size=4,
    )  # fmt: skip
    plan = RunPlan.make(options)
    result = TrainResult(
        task=CLASSES, out=str(plan.out), steps=1, epochs=1.0, rows=9, loss=0.5, eval={},
        best_step=None, seconds=1.0, parameters=1, trained=1,
    )  # fmt: skip

    def write(folder: Path) -> None:
        write_json(folder / "config.json", {})
        write_json(
            folder / RESULT_FILE,
            {"identity": plan.finished_identity, "result": asdict(result)},
        )

    def end() -> None:
        with filled_folder(plan.out, SCRATCH, last=RESULT_FILE) as folder:
            write(folder)

    def begun() -> None:
        (plan.out / SCRATCH).mkdir(parents=True)
        write(plan.out / SCRATCH)
        (plan.out / SCRATCH / "config.json").rename(plan.out / "config.json")

    for both in at_each_moment(place, plan.finished, end, begun):
        assert both.first is None or both.first.loss == 0.5, both
    for both in at_each_moment(place, end, plan.finished, begun):
        assert both.second is None or both.second.loss == 0.5, both
