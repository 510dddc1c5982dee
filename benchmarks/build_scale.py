"""How a build grows: two workers against one, ten times the corpus, and what the driver costs.

    python benchmarks/build_scale.py --teacher STORIES260K --corpus novels.jsonl.gz [--markdown]

Every build is a process of its own that starts a Ray, with as many cores as it has workers (it and
its children are bound to them) and one thread of arithmetic a worker. The rate is that of the
steady state: from the first progress after each worker has committed a span to the last, as the
driver counts. Peak resident memory is the kernel's own high-water mark of the driver and of the
largest worker, at the end and when a tenth of the spans is made: what a build takes may not depend
on its length. The driver's CPU seconds a thousand spans leave its start-up out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from results import keep, machine, memory_mib, table


def child(options: argparse.Namespace) -> dict[str, float]:
    """One build, in this process and its Ray."""
    cores = sorted(os.sched_getaffinity(0))[: options.workers]
    os.sched_setaffinity(0, cores)
    import ray

    from kdcache import BuildOptions, build
    from kdcache.commands.build.driver import Progress

    ray.init(
        "local",  # and no cluster that runs on this machine already
        num_cpus=len(cores),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    seen: list[tuple[float, int, int, float]] = []
    peak = {"worker": 0.0, "worker early": 0.0, "driver early": 0.0}
    done = threading.Event()

    def look() -> None:
        while not done.wait(1.0):
            peak["worker"] = max(peak["worker"], largest("ray::"))

    def note(progress: Progress) -> None:
        if progress.made <= max(2 * options.workers, progress.spans / 10):
            peak["worker early"], peak["driver early"] = peak["worker"], own_peak()
        seen.append((time.perf_counter(), progress.positions, progress.made, time.process_time()))

    watcher = threading.Thread(target=look)
    watcher.start()
    with tempfile.TemporaryDirectory() as folder:
        try:
            build(
                BuildOptions(
                    (options.teacher,),
                    (options.corpus,),
                    f"{folder}/cache",
                    limit=options.limit,
                    max_length=256,
                    shard_tokens=options.shard_tokens,
                    workers=options.workers,
                    gpus_per_worker=0,
                ),
                on_progress=note,
            )
        finally:
            done.set()
            watcher.join()
            ray.shutdown()
    steady = [s for s in seen if s[2] >= 2 * options.workers]
    (start, before, first, cpu), (end, after, last, cpu_after) = steady[0], steady[-1]
    return {
        "rate": (after - before) / (end - start),
        "spans": last,
        "positions": after,
        "driver_cpu": 1000 * (cpu_after - cpu) / (last - first),
        "driver_mib": own_peak(),
        "driver_early": peak["driver early"],
        "worker_mib": peak["worker"],
        "worker_early": peak["worker early"],
    }


def own_peak() -> float:
    """Peak resident MiB of this process."""
    return memory_mib()


def largest(name: str) -> float:
    """Peak resident MiB of the largest process below this one whose command begins like this."""
    facts: dict[int, dict[str, str]] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
            lines["command"] = (status.parent / "cmdline").read_bytes().decode(errors="replace")
            facts[int(status.parent.name)] = lines

    def below(process: int) -> bool:
        while process in facts and process != os.getpid():
            process = int(facts[process]["PPid"])
        return process == os.getpid()

    found = [
        int(lines["VmHWM"].split()[0]) / 1024
        for process, lines in facts.items()
        if lines["command"].startswith(name) and "VmHWM" in lines and below(process)
    ]
    return max(found, default=0.0)


def spawn(options: argparse.Namespace, workers: int, limit: int) -> dict[str, Any]:
    """`child` in a process of its own."""
    call = [sys.executable, __file__, "--child", "--teacher", options.teacher]
    call += ["--corpus", options.corpus, "--workers", str(workers), "--limit", str(limit)]
    call += ["--shard-tokens", str(options.shard_tokens)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{workers} workers, {limit} records: {found}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--limit", type=int, default=1000, help="records of the larger corpus")
    parser.add_argument("--shard-tokens", type=int, default=8192)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--markdown", action="store_true", help="keep the result in RESULTS.md")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options)))
        return
    one = spawn(options, 1, options.limit)
    two = spawn(options, options.workers, options.limit)
    tenth = spawn(options, options.workers, options.limit // 10)
    rows = [
        [
            str(workers),
            f"{r['positions']:,}",
            f"{r['spans']:,}",
            f"{r['rate']:,.0f}",
            f"{r['driver_cpu']:.1f}",
            f"{r['driver_mib']:.0f}",
            f"{r['worker_mib']:.0f}",
        ]
        for workers, r in ((1, one), (options.workers, two), (options.workers, tenth))
    ]
    header = ["workers", "positions", "spans", "positions a second", "driver's CPU s a 1,000 spans"]
    text = "\n\n".join(
        [
            f"`python benchmarks/build_scale.py --teacher {Path(options.teacher).name} --corpus "
            f"{Path(options.corpus).name}`, `sample:20`; {machine()} a worker.",
            table([*header, "driver, peak MiB", "worker, peak MiB"], rows),
            f"{options.workers} workers on {options.workers} cores against one on one: "
            f"{two['rate'] / one['rate']:.2f}x (goal 1.8x). Ten times the corpus: "
            f"{two['driver_mib'] / tenth['driver_mib']:.2f}x the driver's and "
            f"{two['worker_mib'] / tenth['worker_mib']:.2f}x the worker's peak memory. From a "
            "tenth of the larger build to its end: driver "
            f"{two['driver_early']:.0f} to {two['driver_mib']:.0f} MiB, worker "
            f"{two['worker_early']:.0f} to {two['worker_mib']:.0f} MiB.",
        ]
    )
    print(text)
    if options.markdown:
        keep("build_scale", text)


if __name__ == "__main__":
    main()
