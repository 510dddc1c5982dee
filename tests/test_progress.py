"""What a build and a training show while they run: something true from the first second on."""

from __future__ import annotations

import dataclasses
import io
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from make_caches import make_cache

from kdcache.cache import ShardEntry
from kdcache.cli.display import BuildDisplay, TrainDisplay, _facts
from kdcache.commands.build.build import build
from kdcache.commands.build.driver import Progress
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.build.packer import SpanFigures, Steps
from kdcache.commands.build.source import TeacherSource
from kdcache.commands.build.workers import SpanReport, SpanWorker, WorkerFigures
from kdcache.commands.train.callbacks import SlowSteps
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.errors import IncompleteError


def progress_of(*workers: WorkerFigures, **facts: int) -> Progress:
    given = {"spans": 4, "done": 0, "made": 0, "failed": 0, "lost": 0, "positions": 0, "bytes": 0}
    given |= {"stored": 0, **facts}
    return Progress(workers=workers, seconds=9.0, teacher_seconds=0.0, **given)


def worker(*in_flight: SpanFigures, seconds: float = 10.0, **facts: float) -> WorkerFigures:
    since = time.perf_counter() - seconds
    return WorkerFigures("w", since, in_flight=in_flight, **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "at_work",
    [
        (),
        (SpanFigures(0, records=28),),
        (SpanFigures(0, records=28, batches=9),),
        (SpanFigures(0, 28, 9, 0, 0, 4.0), SpanFigures(1, records=3)),
    ],
)
def test_nothing_is_shown_as_zero_while_there_is_work(at_work: tuple[SpanFigures, ...]) -> None:
    shown = "\n".join(_facts(progress_of(worker(*at_work)), "teacher"))
    assert "0 positions/s" not in shown
    assert "busy 0%" not in shown
    for span in at_work:
        what = "batch 1/9" if span.batches else f"{span.records} records read"
        assert f"span {span.span}: {what}" in shown


def test_what_is_answered_of_a_span_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.perf_counter()
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    half = SpanFigures(0, records=28, batches=10, batches_done=5, positions=500, teacher_seconds=9)
    begun = progress_of(worker(half))
    assert begun.positions_per_second == pytest.approx(50, rel=0.01)
    assert begun.teacher_busy == pytest.approx(0.9, rel=0.01)
    assert begun.seconds_left == pytest.approx(3.5 * 1000 / 50, rel=0.01)
    # Once it is committed it counts once.
    done = worker(half)
    done.book(SpanReport(ShardEntry(0, "x", 1, 1, 1000, 1, "0" * 64), 1.0, 9.5))
    assert done.positions_per_second == pytest.approx(100, rel=0.01)
    assert done.teacher_busy == pytest.approx(0.95, rel=0.01)
    left = progress_of(done, done=1, made=1, positions=1000).seconds_left
    assert left == pytest.approx(3 * 1000 / 100, rel=0.01)
    assert progress_of(worker(SpanFigures(0, records=28, batches=10))).seconds_left is None


def test_a_batch_that_is_divided_counts_what_is_left() -> None:
    steps = Steps(7, lambda: None)
    steps.record()
    steps.begin(4)
    steps.batch(10)
    steps.begin(6)  # memory ran out: the three that are left became six
    assert steps.figures(2.0) == SpanFigures(7, 1, 7, 1, 10, 2.0)


def test_a_heartbeat_is_read_while_a_span_begins_to_wait() -> None:
    class Waiting(Steps):
        """A span that waits for its turn as soon as it was looked at."""

        @property
        def last(self) -> float | None:  # type: ignore[override]
            seen, self.seen = self.seen, None
            return seen

        @last.setter
        def last(self, now: float | None) -> None:
            self.seen = now

    worker = SpanWorker.__new__(SpanWorker)
    worker._counted, worker._steps = 0.0, {3: Waiting(3, lambda: None)}
    assert worker.pulse().spans == (SpanFigures(3),)


@pytest.mark.slow
def test_a_build_shows_that_it_measures_the_output_layer(small_build: BuildOptions) -> None:
    said: list[str] = []
    short = dataclasses.replace(small_build, codec="hidden:int8", limit=20, batch_tokens=256)
    build(dataclasses.replace(short, workers=None), report=said.append)
    assert said[1].startswith("loading the teacher for its output layer")
    steps = [line.partition("states: ")[2] for line in said[2:-1]]
    assert len(steps) > 1
    done, total = steps[-1].removesuffix(" rows").split(" of ")
    assert done == total
    assert said[-1].startswith("working in this process (one shard; ")


@pytest.mark.slow
def test_a_build_shows_its_work_before_the_first_shard(small_build: BuildOptions) -> None:
    """The teacher goes on after two batches only once the work so far was shown."""
    shown = threading.Event()
    said: list[str] = []
    seen: list[tuple[dict[str, Any], SpanFigures]] = []
    ask = TeacherSource._run

    def look(now: Progress) -> None:
        for span in now.workers[0].in_flight:
            seen.append((now.figures(), span))
            if span.batches_done:
                shown.set()

    options = dataclasses.replace(small_build, batch_tokens=256, max_length=64)
    first = threading.Event()

    def after_the_first(self: TeacherSource, *args: Any) -> Any:
        if first.is_set():
            assert shown.wait(60)
        first.set()
        return ask(self, *args)

    with mock.patch.object(TeacherSource, "_run", after_the_first):
        result = build(options, on_progress=look, report=said.append)
    assert said == ["reading what the options name", "loading the teacher"]
    figures, busy = next((f, span) for f, span in seen if span.batches_done)
    assert figures["made"] == 0
    assert figures["positions_per_second"] > 0
    assert 0 < figures["teacher_busy"] <= 1
    assert figures["seconds_left"] > 0
    assert busy.records == 150  # the whole corpus
    assert busy.batches_done == 1 < busy.batches
    assert result.made == 1


@pytest.mark.slow
def test_a_resumed_build_names_what_is_there(
    small_build: BuildOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(small_build, shard_tokens=1024, max_length=32)

    def stop(progress: Progress) -> None:
        if progress.made:
            raise KeyboardInterrupt

    with pytest.raises(IncompleteError):
        build(options, on_progress=stop)
    shards = [path.stat().st_size for path in Path(options.out, "shards").iterdir()]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with BuildDisplay() as display:
        result = build(options, on_progress=display, report=display.report)
    lines = sys.stderr.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0] == "build: loading libraries"
    there = f"build: resuming {options.out}: {len(shards)} of {result.spans} shards are there, "
    assert lines[2].startswith(there)
    assert f"build: {result.spans}/{result.spans} spans  1 worker  " in lines[-1]


@pytest.mark.slow
def test_a_resumed_training_names_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache(tmp_path / "cache", [20, 14])
    options = TrainOptions(
        (str(tmp_path / "cache"),),
        "bilstm",
        str(tmp_path / "run"),
        embedding_size=8,
        hidden_size=8,
        dense_size=8,
        max_steps=6,
        save_steps=2,
        logging_steps=1,
        batch_size=4,
    )
    with pytest.raises(IncompleteError):
        train(options, on_progress=lambda now: (_ for _ in ()).throw(KeyboardInterrupt))
    checkpoints = list((tmp_path / "run").glob("checkpoint-*"))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with TrainDisplay() as display:
        train(options, on_progress=display, report=display.report)
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert ("resuming" in said) == bool(checkpoints)
    assert "steps to do" in said
    again = dataclasses.replace(options, out=str(tmp_path / "again"))

    def stop(now: object) -> None:
        if now.step == 5:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with pytest.raises(IncompleteError):
        train(again, on_progress=stop)
    lines: list[str] = []
    train(again, report=lines.append)
    assert f"resuming from {tmp_path / 'again' / 'checkpoint-4'}: step 4 of 6" in lines


def test_slow_steps_are_reported_between_the_lines_of_the_log() -> None:
    said: list[str] = []
    now = [0.0]
    state = mock.Mock(global_step=4, max_steps=10)
    clock = "kdcache.commands.train.callbacks.time.perf_counter"
    with mock.patch(clock, side_effect=lambda: now[0]):
        callback = SlowSteps(said.append, every=10.0)
        callback.on_train_begin(None, state, None)
        for step, seconds in ((5, 8.0), (6, 16.0), (7, 24.0), (8, 27.0)):
            state.global_step, now[0] = step, seconds
            callback.on_step_end(None, state, None)
            if step == 7:
                callback.on_log(None, state, None)
    assert said == ["6 steps to do", "step 6 of 10, 8.0 s a step, 32 s left"]
