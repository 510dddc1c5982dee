"""A build under random kills until it is done, against the same build undisturbed.

    python benchmarks/chaos.py --teacher STORIES260K --corpus novels.jsonl.gz [--markdown]

A local Ray cluster of three nodes, two of which hold a worker each. Every few seconds, at random,
one of three things is killed: a worker process, a node (half of the time with notice, as a cloud's
preemption has it, half without), or the driver, that is the `kdcache build` command itself, which
is then started again. A lost node is replaced at once. In the end the files of both caches are
compared byte by byte.

Spans that were redone are counted from the events: those that a lost worker had with it, and
failures of their own. What a killed driver had in flight nobody books: at most four spans a time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from kdcache.cache.check import problems

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
from ray.cluster_utils import Cluster
from results import keep, machine, table

from kdcache.cache import Cache
from kdcache.corpus import Corpus

HEADING = "chaos"
ROOT = Path(__file__).resolve().parent.parent
SPAN_TOKENS, TEXT_BYTES_A_TOKEN = 8192, 4
KINDS = ("worker", "worker", "worker", "node", "driver")  # as often as they are named


def write_text(corpus: str, path: Path, size: int) -> None:
    """Paragraphs of a corpus as lines of a plain file, which is cut by bytes."""
    opened = Corpus.open([corpus], span_bytes=1 << 30)
    left = size
    with open(path, "w", encoding="utf-8") as file:
        for span in opened.spans:
            for record in Corpus.read(span):
                for paragraph in str(record.values["text"]).split("\n\n"):
                    line = " ".join(paragraph.split())
                    if len(line) > 40:
                        left -= file.write(line + "\n")
                    if left <= 0:
                        return
    raise SystemExit(f"{corpus} has {size - left} bytes of text, {size} are needed.")


class Chaos:
    """One build and what is done to it."""

    def __init__(self, options: argparse.Namespace, text: Path, folder: Path) -> None:
        self.options, self.text, self.folder = options, text, folder
        self.random = random.Random(options.seed)
        self.kills: Counter[str] = Counter()
        self.starts = 0
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(2)]

    def start(self, out: Path) -> subprocess.Popen[bytes]:
        """Begin the build, or go on with it."""
        self.starts += 1
        words = [
            *("--teacher", self.options.teacher, "--corpus", str(self.text), "--out", str(out)),
            *("--codec", "sample:20", "--max-length", "256", "--worker", "gpus=0"),
            *("--shard-tokens", str(SPAN_TOKENS), "--batch-tokens", "2048"),
            *("--address", self.cluster.address, "--workers", "2"),
        ]
        with open(self.folder / f"{out.name}-{self.starts}.log", "wb") as log:
            return subprocess.Popen(
                [sys.executable, str(ROOT / "cli.py"), "build", *words], stdout=log, stderr=log
            )

    def workers(self) -> list[psutil.Process]:
        """Processes of the workers of this cluster."""
        found = []
        for node in self.nodes:
            raylet = node.all_processes["raylet"][0].process.pid
            for process in psutil.Process(raylet).children():
                if " ".join(process.cmdline()).startswith("ray::RayWorker"):
                    found.append(process)
        return found

    def strike(self, driver: subprocess.Popen[bytes]) -> str | None:
        """Kill something; says what, or None where there was nothing of that kind."""
        kind = self.random.choice(KINDS)
        if kind == "driver":
            driver.kill()
            driver.wait()
        elif kind == "worker":
            try:
                self.random.choice(self.workers()).kill()
            except (IndexError, psutil.NoSuchProcess):
                return None
        else:
            notice = self.random.random() < 0.5
            victim = self.nodes.pop(self.random.randrange(len(self.nodes)))
            self.cluster.remove_node(victim, allow_graceful=notice)
            self.nodes.append(self.cluster.add_node(num_cpus=1))
            kind = "node, with notice" if notice else "node, without notice"
        self.kills[kind] += 1
        return kind

    def build(self, out: Path, every: float | None) -> float:
        """Build until it is done, striking `every` so many seconds on average; wall seconds."""
        begin = time.perf_counter()
        driver = self.start(out)
        try:
            while True:
                pause = self.random.uniform(0.5, 1.5) * every if every else None
                try:
                    code = driver.wait(pause)
                except subprocess.TimeoutExpired:
                    kind = self.strike(driver)
                    done = len(list((out / "shards").glob("*")))
                    print(
                        f"{time.perf_counter() - begin:6.0f} s: {kind}; {done} shards", flush=True
                    )
                    if kind == "driver":
                        driver = self.start(out)
                    continue
                if code == 0:
                    return time.perf_counter() - begin
                log = (self.folder / f"{out.name}-{self.starts}.log").read_text()
                raise SystemExit(f"the build ended with {code}:\n{log}")
        finally:
            driver.kill()
            driver.wait()


def files(folder: Path) -> dict[str, bytes]:
    """What a cache is: its files but for the events and what killed writers left."""
    found = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if name != "events.jsonl" and not name.startswith("tmp/")
    }


def figures(chaos: Chaos, peace: Path, war: Path, seconds: tuple[float, float]) -> str:
    """Compare the caches and put the outcome into words."""
    same = files(peace) == files(war)
    wrong = list(problems(Cache.open(str(war))))
    events: list[dict[str, Any]] = [
        json.loads(line) for line in (war / "events.jsonl").read_text().splitlines()
    ]
    lost = [e for e in events if e["event"] == "worker lost"]
    spans = Cache.open(str(war)).spec.spans
    rows = [
        ["spans", str(spans)],
        *([f"kills: {kind}", str(count)] for kind, count in sorted(chaos.kills.items())),
        ["kills survived", str(sum(chaos.kills.values()))],
        ["workers that were started", str(sum(e["event"] == "worker ready" for e in events))],
        ["spans redone that were with a lost worker", str(sum(len(e["spans"]) for e in lost))],
        ["failures counted against a span", str(sum(e["event"] == "span failed" for e in events))],
        ["spans set aside", str(sum(e["event"] == "span set aside" for e in events))],
        ["files left in `tmp/`", str(len(list(war.glob("tmp/*"))))],
        ["seconds undisturbed", f"{seconds[0]:.0f}"],
        ["seconds under kills", f"{seconds[1]:.0f}"],
        ["cache byte-identical to the undisturbed one", "yes" if same else "**no**"],
        ["problems that `verify` finds", str(len(wrong))],
    ]
    return (
        f"`python benchmarks/chaos.py --teacher {Path(chaos.options.teacher).name} --corpus "
        f"{Path(chaos.options.corpus).name}`: a kill every {chaos.options.every:g} s on average, "
        f"on three Ray nodes with two workers; {machine()}.\n\n" + table(["", ""], rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--spans", type=int, default=240)
    parser.add_argument("--every", type=float, default=8.0, help="seconds between kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", action="store_true", help="keep the result in RESULTS.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kdcache-chaos-") as name:
        folder = Path(name)
        text = folder / "text.txt"
        write_text(options.corpus, text, options.spans * SPAN_TOKENS * TEXT_BYTES_A_TOKEN)
        chaos = Chaos(options, text, folder)
        try:
            peace = chaos.build(folder / "peace", None)
            war = chaos.build(folder / "war", options.every)
        finally:
            chaos.cluster.shutdown()
        result = figures(chaos, folder / "peace", folder / "war", (peace, war))
    print(result)
    if options.markdown:
        keep(HEADING, result)


if __name__ == "__main__":
    main()
