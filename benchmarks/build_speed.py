r"""What targets cost a build beyond the forward of its teacher, and what the sampler costs alone.

    python benchmarks/build_speed.py --teacher SMOLLM2_135M --corpus novels.jsonl.gz --limit 8 \
        --shard-tokens 2048 --block 1
    python benchmarks/build_speed.py --teacher STORIES260K --corpus novels.jsonl.gz --limit 150
    python benchmarks/build_speed.py --shape 1b --tokens 4000000       # random weights, 128k ids
    python benchmarks/build_speed.py --sampler

Build: blocks of spans go through the worker of this process (`--workers 0`), as in `kdcache build`:
read, tokenised, batched, computed, encoded, compressed and committed, two spans in flight. The bare
forward of the same model, all logits of a batch at once and nothing done with them, goes over the
same batches. Both take turns block by block, in changing order, so that other work on the machine
slows both. Start-up (planning, creating the cache) and the loading of the model are apart. Wall
time and CPU time of the process, which counts all threads, are given.

Floor: the stages of a build by themselves, one after the other, on some rows of the first span.
Where they share a core, no build can be faster than their sum; with cores to spare, all but the
teacher and `encode` run beside the teacher.

Sampler: `Codec.encode` on logits of one slice against what is commonly written instead, on a GPU by
CUDA events around several calls. `--padding 128` gives either an output layer wider than the
vocabulary, as Qwen's and Gemma's are: the build cuts it and counts its mass.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import transformers
from results import keep, machine, table

from kdcache.cache import Cache
from kdcache.cache.shard import ShardData, shard_bytes
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.build.prepare import Prepared, prepare
from kdcache.commands.build.source import TeacherSource, TeacherSourceOptions
from kdcache.commands.build.workers import Job, LocalWorkers
from kdcache.corpus import Corpus, Span
from kdcache.pretrained import tokenizer_files
from kdcache.rows import Row, make_encoder
from kdcache.rows.batches import batches
from kdcache.targets import Codec, SoftTargets, TargetWriter
from kdcache.targets.device import outside_mass
from kdcache.tasks import IGNORE

CODECS = (("topk:64", (1.0,)), ("sample:20", (1.0,)), ("sample:20", (1.0, 2.0)))
SHAPES = {
    # hidden, layers, heads, key-value heads, feed-forward, of Llama 3 models
    "1b": (2048, 16, 32, 8, 8192),
    "8b": (4096, 32, 32, 8, 14336),
}
IDS = 128_256
_CALLS = 5


@dataclass
class Clock:
    """Wall and CPU seconds of one side."""

    wall: float = 0.0
    cpu: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside; a device is waited for."""
        _wait_for_device()
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        _wait_for_device()
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


@dataclass
class Sides:
    """One codec: a build and the bare forward over the same batches.

    Attributes:
        codec: its text.
        temperatures: declared.
        planning: seconds from options to an empty cache.
        loading: seconds until the worker is ready.
        positions: cached.
        build: in steady state.
        forward: over the same batches.
        teacher: seconds of the build in its teacher and codec.
        stages: seconds a position of each stage by itself.
    """

    codec: str
    temperatures: tuple[float, ...]
    planning: float = 0.0
    loading: float = 0.0
    positions: int = 0
    build: Clock = field(default_factory=Clock)
    forward: Clock = field(default_factory=Clock)
    teacher: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def wall_ratio(self) -> float:
        """Build by forward, wall time."""
        return self.build.wall / self.forward.wall

    @property
    def cpu_ratio(self) -> float:
        """Build by forward, CPU time."""
        return self.build.cpu / self.forward.cpu


def measure(options: BuildOptions, block: int, model: Any = None) -> Sides:
    """Build a cache block by block, in turns with the bare forward.

    Args:
        options: of the build; its `out` is made.
        block: spans of a block.
        model: the teacher for the bare forward. Default: loaded.
    """
    sides = Sides(options.codec or "", options.temperatures)
    begin = time.perf_counter()
    prepared = prepare(options)
    Cache.create_or_resume(
        options.out,
        prepared.spec,
        tokenizer_files=tokenizer_files(prepared.tokenizer),
        ranks=prepared.ranks,
    )
    sides.planning = time.perf_counter() - begin
    begin = time.perf_counter()
    source = TeacherSourceOptions(prepared.rows, prepared.teacher, prepared.batch_tokens)
    job = Job(options.out, source)
    workers = LocalWorkers(job)
    sides.loading = time.perf_counter() - begin
    model = model if model is not None else load(prepared)
    spans = list(prepared.corpus.spans)
    for start in range(0, len(spans), block):
        part = spans[start : start + block]
        cut = list(batches_of(prepared, part))
        if start == 0:  # kernels are chosen and compiled at their first call
            bare_forward(model, cut[:1])
            run(workers, part[:1])
        turns: list[Callable[[], None]] = [
            partial(_timed_build, sides, workers, part),
            partial(_timed_forward, sides, model, cut),
        ]
        for take in turns if start // block % 2 else reversed(turns):
            take()
        sides.positions += sum(int((r.labels != IGNORE).sum()) for batch in cut for r in batch)
        print(
            f"  {sides.codec}, span {start + len(part)} of {len(spans)}: wall "
            f"{sides.wall_ratio:.3f}, CPU {sides.cpu_ratio:.3f}",
            flush=True,
        )
    workers.stop()
    del workers
    sides.stages = stages(source.open(options.out), spans[0])
    return sides


@torch.inference_mode()
def stages(source: TeacherSource, span: Span) -> dict[str, float]:
    """Seconds a position of each stage by itself: wall time on a GPU, else CPU time."""
    clocks: dict[str, Clock] = defaultdict(Clock)
    writer = TargetWriter(source.codec)
    with clocks["tokenise"].running():
        rows = list(make_encoder(source.options.rows, source.tokenizer).encode(Corpus.read(span)))
    share = [row for row in rows if (row.labels != IGNORE).any()]
    read = sum(int((row.labels != IGNORE).sum()) for row in rows)
    cut = list(batches([len(row.input_ids) for row in share], source.batch_tokens))[:2]
    used = [share[i] for batch in cut for i in batch]
    parts, done = [], 0
    for batch in cut:
        logits_of = source.teacher.logits([share[i] for i in batch])
        while True:
            with clocks["teacher"].running():
                logits = next(logits_of, None)
            if logits is None:
                break
            u = torch.rand(len(logits), dtype=torch.float64, device=logits.device)
            with clocks["encode"].running():
                encoded = writer.codec.encode(logits, u)
            host = {name: value.cpu() for name, value in encoded.items()}
            with clocks["pack"].running():
                parts.append(writer.pack(host))
            done += len(logits)
    with clocks["compress"].running():
        data = ShardData.from_rows("causal-lm", used, SoftTargets.concat(parts))
        shard_bytes(data, attributes={})
    on_gpu = torch.cuda.is_available()
    taken = {name: clock.wall if on_gpu else clock.cpu for name, clock in clocks.items()}
    return {name: t / (read if name == "tokenise" else done) for name, t in taken.items()}


def run(workers: LocalWorkers, spans: Sequence[Span]) -> float:
    """Make the spans, two in flight as the driver has them; seconds in the teacher."""
    waiting, seconds, in_flight = list(spans), 0.0, 0
    while waiting or in_flight:
        while waiting and workers.has_room():
            workers.submit(waiting.pop(0))
            in_flight += 1
        for outcome in workers.collect(1.0):
            in_flight -= 1
            if outcome.report is None:
                raise outcome.error or RuntimeError("a span was lost")
            seconds += outcome.report.teacher_seconds
    return seconds


def _timed_build(sides: Sides, workers: LocalWorkers, spans: Sequence[Span]) -> None:
    with sides.build.running():
        sides.teacher += run(workers, spans)


def _timed_forward(sides: Sides, model: Any, cut: Sequence[Sequence[Row]]) -> None:
    with sides.forward.running():
        bare_forward(model, cut)


def load(prepared: Prepared) -> Any:
    """The model as `transformers` loads it, in the build's dtype and on its device."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        prepared.teacher.names[0], dtype=getattr(torch, prepared.spec.dtype)
    )
    return model.to("cpu" if prepared.teacher.device == "cpu" else "cuda").eval()


def batches_of(prepared: Prepared, spans: Sequence[Span]) -> Iterator[list[Row]]:
    """The batches that a build makes of these spans."""
    for span in spans:
        rows = list(make_encoder(prepared.rows, prepared.tokenizer).encode(Corpus.read(span)))
        for batch in batches([len(row.input_ids) for row in rows], prepared.batch_tokens):
            yield [rows[i] for i in batch]


@torch.inference_mode()
def bare_forward(model: Any, cut: Sequence[Sequence[Row]]) -> None:
    """The model's own forward, all logits, nothing done with them."""
    for rows in cut:
        ids = np.zeros((len(rows), max(len(row.input_ids) for row in rows)), np.int64)
        for line, row in zip(ids, rows, strict=True):
            line[: len(row.input_ids)] = row.input_ids
        model(input_ids=torch.from_numpy(ids).to(model.device), use_cache=False)


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ------------------------------------------------------------------------- a teacher of any shape


def random_teacher(shape: str, folder: Path, padding: int) -> Path:
    """A Llama of random weights and a tokenizer whose 128k words are `w0`, `w1`, ...; the output
    layer has so many columns more."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    hidden, layers, heads, kv_heads, wide = SHAPES[shape]
    config = transformers.LlamaConfig(
        vocab_size=IDS + padding,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=wide,
        max_position_embeddings=4096,
        tie_word_embeddings=shape == "1b",
        eos_token_id=0,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # Random weights give a flat distribution; larger outputs give it the entropy of a real one.
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(6.0)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(IDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="w0", pad_token="w0"
    ).save_pretrained(folder)
    return folder


def random_corpus(tokens: int, path: Path) -> Path:
    """Documents of 1,000 words with Zipf's frequencies."""
    generator = np.random.default_rng(0)
    ids = np.minimum(generator.zipf(1.2, tokens), IDS - 1)
    with path.open("w") as file:
        for part in np.array_split(ids, max(1, tokens // 1000)):
            file.write(json.dumps({"text": " ".join(f"w{i}" for i in part)}) + "\n")
    return path


# ----------------------------------------------------------------------------------------- sampler


@torch.inference_mode()
def sampler(vocab: int, positions: int, rounds: int, padding: int) -> str:
    """Microseconds a position of each codec and of what is written without them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    whole = torch.randn(positions, vocab + padding, device=device, generator=generator)
    whole = 4 * whole.to(dtype)
    logits = whole[:, :vocab]
    u = torch.rand(positions, dtype=torch.float64, device=device, generator=generator)
    ways: dict[str, Callable[[], Any]] = {
        "read once (`amax`)": lambda: logits.amax(-1),
        "`log_softmax` and `torch.topk`, 64": lambda: logits.float().log_softmax(-1).topk(64),
        "`multinomial`, 50 draws": lambda: torch.multinomial(
            logits.float().softmax(-1), 50, replacement=True
        ),
    }
    for text, temperatures in (("topk:16", (1.0,)), *CODECS):
        codec = Codec.parse(text, temperatures, vocab)
        ways[f"`{codec}`, T = {name(temperatures)}"] = partial(codec.encode, logits, u)
    if padding:
        ways[f"mass of {padding} columns beyond"] = partial(outside_mass, whole, vocab)
    taken = by_events(ways, rounds) if device == "cuda" else in_turns(ways, rounds)
    rows = [
        [way, f"{1e6 * statistics.median(seconds) / positions:.2f}"]
        for way, seconds in taken.items()
    ]
    return (
        f"{positions:,} positions of {vocab:,} ids, {dtype}".replace("torch.", "")
        + f"; {machine()}. Median of {rounds} rounds.\n\n"
        + table(["encode", "µs a position"], rows)
    )


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of single calls, all ways in each round."""
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for encode in ways.values():
        encode()
    for _ in range(rounds):
        for way, encode in ways.items():
            clock = Clock()
            with clock.running():
                encode()
            taken[way].append(clock.wall)
    return taken


def by_events(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call on a GPU, between two events around several.

    Each way is compiled anew for its own shapes, as in a build: what another codec left in the
    compiler's caches would make sizes dynamic.
    """
    taken: dict[str, list[float]] = {}
    for way, encode in ways.items():
        torch._dynamo.reset()
        for _ in range(3):
            encode()
        taken[way] = []
        for _ in range(rounds):
            event: Any = torch.cuda.Event
            begin, end = (event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(_CALLS):
                encode()
            end.record()
            end.synchronize()
            taken[way].append(begin.elapsed_time(end) / 1e3 / _CALLS)
    return taken


# ------------------------------------------------------------------------------------------ report


def name(temperatures: Sequence[float]) -> str:
    """Declared temperatures in words."""
    return ", ".join(f"{t:g}" for t in temperatures)


def report(found: Sequence[Sides], what: str) -> str:
    """Ratios and seconds as markdown."""
    rows = [
        [
            f"`{s.codec}`, T = {name(s.temperatures)}",
            f"{s.wall_ratio:.3f}x",
            f"{s.cpu_ratio:.3f}x",
            f"{1e6 * s.forward.wall / s.positions:.1f}",
            f"{1e6 * s.build.wall / s.positions:.1f}",
            f"{s.teacher / s.build.wall:.0%}",
            f"{s.planning:.1f} s",
            f"{s.loading:.1f} s",
        ]
        for s in found
    ]
    header = ["cache", "wall", "CPU", "forward, µs", "build, µs", "in the teacher", "planning"]
    floors = [
        [
            f"`{s.codec}`, T = {name(s.temperatures)}",
            *(f"{1e6 * seconds:.2f}" for seconds in s.stages.values()),
            f"{(s.stages['teacher'] + s.stages['encode']) / s.stages['teacher']:.3f}x",
            f"{sum(s.stages.values()) / s.stages['teacher']:.3f}x",
        ]
        for s in found
    ]
    kind = "wall" if torch.cuda.is_available() else "CPU"
    return "\n\n".join(
        [
            f"{what}: {found[0].positions:,} positions; {machine()}. Build by bare forward of the "
            "same model over the same batches; microseconds a position of wall time.",
            table([*header, "loading"], rows),
            f"The stages by themselves, microseconds a position of {kind} time, and what follows: "
            "no build is faster than teacher and `encode` by the teacher alone where other cores "
            "do the rest, nor than their sum where one core does everything.",
            table(["cache", *found[0].stages, "floor", "floor on one core"], floors),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", help="a causal LM")
    parser.add_argument("--corpus", help="what to build from")
    parser.add_argument("--shape", choices=SHAPES, help="random weights and words instead")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="words of a random corpus")
    parser.add_argument("--limit", type=int, help="records of the corpus")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--shard-tokens", type=int, help="as of `kdcache build`")
    parser.add_argument("--batch-tokens", type=int, help="as of `kdcache build`")
    parser.add_argument("--block", type=int, default=8, help="spans between turns")
    parser.add_argument("--sampler", action="store_true", help="the sampler alone")
    parser.add_argument("--vocab", type=int, default=IDS, help="of the sampler")
    parser.add_argument("--padding", type=int, default=0, help="columns beyond the vocabulary")
    parser.add_argument("--positions", type=int, default=4096, help="of the sampler")
    parser.add_argument("--rounds", type=int, default=11, help="of the sampler")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--markdown", metavar="HEADING", help="keep it in RESULTS.md below this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.sampler:
        text = sampler(options.vocab, options.positions, options.rounds, options.padding)
    else:
        text = builds(options)
    print(text)
    if options.markdown:
        keep(options.markdown, text)


def builds(options: argparse.Namespace) -> str:
    """All codecs, one after the other."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        teacher, corpus, what = options.teacher, options.corpus, ""
        if options.shape:
            teacher = str(random_teacher(options.shape, folder / "teacher", options.padding))
            corpus = str(random_corpus(options.tokens, folder / "corpus.jsonl"))
            what = f"a {options.shape} Llama of random weights, {IDS:,} ids, random words"
            what += f", {options.padding} more columns" if options.padding else ""
        else:
            what = f"{Path(teacher).name} on {Path(corpus).name}"
        model, found = None, []
        for number, (codec, temperatures) in enumerate(CODECS):
            build = BuildOptions(
                (teacher,),
                (corpus,),
                str(folder / f"cache-{number}"),
                codec=codec,
                temperatures=temperatures,
                max_length=options.max_length,
                limit=options.limit,
                shard_tokens=options.shard_tokens,
                batch_tokens=options.batch_tokens,
                workers=0,
            )
            model = model if model is not None else load(prepare(build))
            found.append(measure(build, options.block, model))
        return report(found, what)


if __name__ == "__main__":
    main()
