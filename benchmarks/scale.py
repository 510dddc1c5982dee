"""What a very large build costs the one process that drives it: figures for docs/scale.md.

    python benchmarks/scale.py [--spans 100000] [--workers 1000] [--markdown]

Four parts, each in this process and without a teacher:

- the manifest of a cache of that many shards: bytes, seconds to write and to open, memory;
- the seal of a cache whose shards earlier runs have made, from their receipts;
- the listing of that many names, on this machine's disk, and how many requests an object store
  needs for it;
- the driver, real code (`Driver`, `RayWorkers`) on a simulated Ray: workers that take a random time
  for a span, die now and then and are replaced. The clock is simulated, but runs on by what the
  driver computes, so workers that wait for a slow driver show.

Times of the driver are CPU times of its process; what Ray itself takes for a call is measured
apart, with a real actor that does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import os
import platform
import random
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from results import keep, table

from kdcache.cache import Cache, CacheSpec, Manifest, ShardEntry, sealing
from kdcache.cache.sealing import Receipts, remove_receipts
from kdcache.commands.build.driver import Driver, Progress
from kdcache.commands.build.on_ray import RayWorkers
from kdcache.commands.build.options import WorkerOptions
from kdcache.commands.build.packer import Pulse
from kdcache.commands.build.source import TeacherSourceOptions
from kdcache.commands.build.workers import EventLog, Job, SpanReport
from kdcache.corpus import InputFile, Span
from kdcache.rows import RowSpec
from kdcache.storage import LocalStorage
from kdcache.teacher import TeacherOptions

HEADING = "scale"
LISTED_AT_ONCE = 1000  # names that S3 and its like give in one answer


def entry(span: int) -> ShardEntry:
    digest = hashlib.sha256(str(span).encode()).hexdigest()
    return ShardEntry(
        span, f"{span:05d}-{digest[:16]}.h5", 1024, 1_048_576, 1_047_552, 19_267_584, digest
    )


def manifest(count: int) -> list[tuple[str, str]]:
    """Write and read a manifest."""
    made = Manifest("f" * 64, tuple(map(entry, range(count))))
    begin = time.process_time()
    text = made.to_json()
    written = time.process_time() - begin
    begin = time.process_time()
    read = Manifest.from_json(text)
    opened = time.process_time() - begin
    assert read == made
    del made, read
    tracemalloc.start()
    again = Manifest.from_json(text)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(again.shards) == count
    return [
        ("manifest.json", f"{len(text) / 1e6:.1f} MB"),
        ("written (CPU)", f"{written:.2f} s"),
        ("opened: parsed and checked (CPU)", f"{opened:.2f} s"),
        ("memory while it is open", f"{kept / 1e6:.0f} MB"),
        ("memory at the peak of opening it", f"{peak / 1e6:.0f} MB"),
    ]


def listing(count: int) -> list[tuple[str, str]]:
    """List that many names on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        shards.mkdir()
        for span in range(count):
            (shards / entry(span).name).touch()
        storage = LocalStorage(folder)
        begin = time.perf_counter()
        names = storage.names("shards")
        seconds = time.perf_counter() - begin
        assert len(names) == count
    calls = -(-count // LISTED_AT_ONCE)
    return [
        ("one listing, local disk, in the kernel's cache", f"{seconds:.2f} s"),
        (f"one listing, object store, {LISTED_AT_ONCE} names a request", f"{calls} requests"),
    ]


def seal(count: int) -> list[tuple[str, str]]:
    """Seal a cache whose shards earlier runs have made; the files are as long as real ones."""
    with tempfile.TemporaryDirectory() as folder:
        storage = LocalStorage(folder)
        spec = CacheSpec(
            task="causal-lm", teachers=({"sha256": "0", "weight": 1.0},), ensemble="mean-probs",
            dtype="float32", tokenizer="t", vocab_size=8, pad_id=0, eos_id=None, label_names=None,
            corpus=(), rows={}, reading={}, spans=count, codec="dense", temperatures=(1.0,), seed=0,
        )  # fmt: skip
        cache = Cache(storage, spec)
        for name in ("shards", "events"):
            (Path(folder) / name).mkdir()
        receipts = Receipts(storage)
        for span in range(count):
            with open(Path(folder) / "shards" / entry(span).name, "wb") as file:
                file.truncate(entry(span).bytes)  # holes
            receipts.add(entry(span))
        begin, cpu = time.perf_counter(), time.process_time()
        made = sealing.prepare_manifest(cache)
        sealing.seal(cache, made)
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        read = sum(path.stat().st_size for path in (Path(folder) / "events").iterdir())
        remove_receipts(storage)
    return [
        ("seal after a resume: time", f"{seconds:.1f} s (CPU {cpu:.1f} s)"),
        ("seal after a resume: bytes read", f"{read / 1e6:.0f} MB, {read / made.bytes:.4%}"),
    ]


class Simulation:
    """A Ray whose actors take simulated time; stands in for the module `ray`."""

    def __init__(self, workers: int, span_seconds: float, deaths: float, seed: int) -> None:
        self.now = 0.0
        self.idle = self.busy = 0.0
        self.deaths = deaths  # share of spans whose worker dies
        self.killed = 0
        self._span_seconds = span_seconds
        self._workers = workers
        self._due: list[tuple[float, int, Future[Any], Any]] = []
        self._count = 0
        self._random = random.Random(seed)
        self._real = time.perf_counter()
        self.most_at_once = 0
        self.exceptions = SimpleNamespace(
            RayTaskError=type("RayTaskError", (Exception,), {}),
            ActorUnavailableError=type("ActorUnavailableError", (Exception,), {}),
            NodeDiedError=type("NodeDiedError", (Exception,), {}),
        )

    # What RayWorkers uses of ray

    def is_initialized(self) -> bool:
        """Yes: nobody needs to connect."""
        return True

    def nodes(self) -> list[dict[str, Any]]:
        """One node that lives for ever: a worker that dies is at fault itself."""
        return [{"NodeID": "n", "Alive": True, "Resources": {"CPU": float(self._workers)}}]

    def remote(self, **_: Any) -> Any:
        """The class of actors is this simulation's own."""
        return lambda _class: self

    def options(self, **_: Any) -> Any:
        """What makes an actor."""
        return SimpleNamespace(remote=lambda *_: Actor(self))

    def kill(self, actor: Any) -> None:
        """Note that an actor is dead."""
        actor.dead = True

    # The clock

    def answer(self, after: float, value: Any) -> Any:
        """A reference whose future is resolved at that simulated time from now."""
        future: Future[Any] = Future()
        self._count += 1
        heapq.heappush(self._due, (self.now + after, self._count, future, value))
        return SimpleNamespace(future=lambda: future)

    def span_seconds(self) -> float:
        """Time of a span, log-normal."""
        return self._random.lognormvariate(0.0, 0.3) * self._span_seconds

    def dies(self) -> bool:
        """Whether a worker dies of this span."""
        return self._random.random() < self.deaths

    def advance(self) -> None:
        """Go on by what the driver computed, or to the next answer if that is later."""
        self.now += time.perf_counter() - self._real
        if self._due:
            self.now = max(self.now, self._due[0][0])
        answers = 0
        while self._due and self._due[0][0] <= self.now:
            _, _, future, value = heapq.heappop(self._due)
            answers += 1
            if isinstance(value, Exception):
                future.set_exception(value)
            else:
                future.set_result(value)
        self.most_at_once = max(self.most_at_once, answers)
        self._real = time.perf_counter()


class Actor:
    """One simulated worker: spans one after the other."""

    def __init__(self, simulation: Simulation) -> None:
        self._ray = simulation
        self.dead = False
        self._free: float | None = None
        self.where = SimpleNamespace(remote=self._where)
        self.run = SimpleNamespace(remote=self._run)
        self.pulse = SimpleNamespace(
            options=lambda **_: SimpleNamespace(remote=lambda: simulation.answer(0.001, Pulse()))
        )

    def _where(self) -> Any:
        return self._ray.answer(30.0, (f"node:{id(self)}", "n", 4096))

    def _run(self, span: Span) -> Any:
        ray = self._ray
        seconds, now = ray.span_seconds(), ray.now
        if self._free is not None and now > self._free:
            ray.idle += now - self._free
        begin = max(now, self._free or 0.0)
        self._free = begin + seconds
        ray.busy += seconds
        if ray.dies():
            ray.killed += 1
            return ray.answer(self._free - now, RuntimeError("the worker died"))
        report = SpanReport(entry(span.index), seconds, 0.95 * seconds)
        return ray.answer(self._free - now, report)


class SimulatedWorkers(RayWorkers):
    """The real workers on the simulated Ray."""

    def collect(self, seconds: float) -> list[Any]:
        """Simulated instead of real time goes by."""
        self._ray.advance()
        return super().collect(0.0)


def drive(count: int, workers: int, span_seconds: float) -> list[tuple[str, str]]:
    """Run the driver over that many spans."""
    simulation = Simulation(workers, span_seconds, deaths=0.001, seed=0)
    real, sys.modules["ray"] = sys.modules.get("ray"), simulation  # type: ignore[assignment]
    spans: Sequence[Span] = [
        Span(i, InputFile("/corpus/a.jsonl", 1 << 30, "jsonl"), i, i + 1) for i in range(count)
    ]
    shown = [0, 0.0]
    try:
        with tempfile.TemporaryDirectory() as folder:
            log = EventLog(LocalStorage(folder))

            def show(progress: Progress) -> None:
                begin = time.process_time()
                json.dumps(progress.figures())
                shown[0] += 1
                shown[1] += time.process_time() - begin

            driver = Driver(spans, show, log)
            source = TeacherSourceOptions(
                RowSpec("causal-lm"), TeacherOptions((), "causal-lm"), batch_tokens=0
            )
            job = Job("", source)
            begin = time.process_time()
            driver.run(
                lambda: [s for s in range(count) if s not in driver.made],
                lambda: SimulatedWorkers(job, WorkerOptions(workers=workers), gpus=0, tell=log),
            )
            cpu = time.process_time() - begin
            size = (Path(folder) / "events.jsonl").stat().st_size
    finally:
        del sys.modules["ray"]
        if real is not None:
            sys.modules["ray"] = real
    assert len(driver.made) == count
    idle = simulation.idle / (simulation.idle + simulation.busy)
    return [
        ("spans a second, all workers together", f"{count / simulation.now:.1f}"),
        ("driver, CPU a 1,000 spans", f"{1000 * cpu / count:.2f} s"),
        ("driver busy", f"{cpu / simulation.now:.1%}"),
        ("workers that died", f"{simulation.killed:,}"),
        ("most answers waiting at once", f"{simulation.most_at_once:,}"),
        ("workers' time without a span", f"{idle:.2%}"),
        ("events.jsonl", f"{size / 1e6:.1f} MB"),
        ("one figure for the display", f"{1e3 * shown[1] / max(1, shown[0]):.2f} ms"),
    ]


def ray_call(calls: int = 2000) -> list[tuple[str, str]]:
    """What a call of a real actor costs the driver, answer included."""
    import queue

    import ray

    class Nothing:
        def run(self, span: Span) -> SpanReport:
            return SpanReport(entry(span.index), 0.0, 0.0)

    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR")
    try:
        actor = ray.remote(Nothing).options(num_cpus=1).remote()
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        span = Span(0, InputFile("/corpus/a.jsonl", 1, "jsonl"), 0, 1)
        ray.get(actor.run.remote(span))
        begin = time.process_time()
        for _ in range(calls):
            actor.run.remote(span).future().add_done_callback(answers.put)
            answers.get()
        cpu = time.process_time() - begin
    finally:
        ray.shutdown()
    return [("Ray itself, CPU a 1,000 calls", f"{1000 * cpu / calls:.2f} s")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spans", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--markdown", action="store_true", help="keep the result in RESULTS.md")
    options = parser.parse_args()
    parts = [
        (
            f"{options.spans:,} shards",
            manifest(options.spans) + listing(options.spans) + seal(options.spans),
        ),
        *(
            (
                f"{options.workers:,} workers, {seconds:g} s a span",
                drive(options.spans, options.workers, seconds),
            )
            for seconds in (60.0, 5.0)
        ),
        ("Ray", ray_call()),
    ]
    text = (
        f"`python benchmarks/scale.py`: {os.cpu_count()} cores of a shared {platform.machine()} "
        f"machine, Python {platform.python_version()}. Explained in "
        "[docs/scale.md](../docs/scale.md).\n\n"
    )
    text += table(["", "", ""], [(name, *line) for name, lines in parts for line in lines])
    print(text)
    if options.markdown:
        keep(HEADING, text)


if __name__ == "__main__":
    main()
