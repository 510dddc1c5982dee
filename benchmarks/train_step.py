"""A training step with cached soft targets against one without a teacher: time and peak memory.

    python benchmarks/train_step.py --distillkit PATH
    python benchmarks/train_step.py --model 300m --temperature 2 --markdown

Without --model: on a GPU its three configurations, about 4 minutes; on a CPU students of four
widths with vocabularies of three sizes, since the ratios depend on both, about half an hour. All
ways are measured with the middle vocabulary, or with --vocab. --rows FILE keeps each configuration
as a line of JSON; the next run goes on after those that are in there.

Ways to train the same Llama on the same random tokens. Memory is measured in a process for each, so
that one that runs out of memory is a row of the table and not the end of the run:

* hard labels, HF: ``model(input_ids, labels=labels).loss``, what a step costs without a teacher;
* naive: HF's logits of all places, cross-entropy and sparse KD on them with plain PyTorch;
* kdcache: `DistilledStudent`, at the given temperature and at T = 1, on a sample and, at T = 1, on
  an anchored one;
* kdcache, hard labels alone;
* kdcache on hidden states of a teacher of width --teacher-width: as they are stored, in float32 as
  a host would decode them, and with all logits made of them at once;
* what others do with a teacher (`rivals.py`), where they are installed; a line names what is not.

`--share 0.2` measures the loss of that share of the positions, by each figure, against all of them.

On a GPU `--weights float32` is what `kdcache train` does: float32 weights, products in bfloat16 by
autocast. `--weights bfloat16` keeps the weights themselves in bfloat16. Both are measured at 300m.

A step is forward, backward and a fused AdamW update. Time: the median of single steps after warm-up
(CUDA events; on a CPU processor time of one thread, which other work on the machine changes least,
and the ways take turns within one process). Memory: the peak of a step, on CUDA of the allocator,
on a CPU the resident set of a process that does nothing else, less what it had after all imports.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import rivals
import torch
import torch.nn.functional as F
import transformers
from results import keep, machine, memory_mib, table
from torch import Tensor

from kdcache.student import DistilledStudent
from kdcache.student.positions import Share
from kdcache.targets import (
    AnchoredTargets,
    Hidden,
    HiddenTargets,
    OutputLayer,
    SparseTargets,
    TargetWriter,
)
from kdcache.tasks import PositionFigure

MODELS = {
    # hidden, layers, heads, feed-forward; tied embeddings.
    "128": (128, 4, 4, 512),
    "256": (256, 4, 4, 1024),
    "512": (512, 4, 8, 2048),
    "1024": (1024, 4, 16, 4096),
    # With 131,072 ids: 302 M and 988 M parameters.
    "300m": (1024, 13, 16, 2816),
    "1b": (2048, 14, 16, 5632),
}
WIDTHS, VOCABULARIES = ("128", "256", "512", "1024"), (49152, 128256, 151936)
HARD, NAIVE, OURS = "hard labels, HF loss", "sparse KD, naive", "sparse KD, kdcache"
OURS_1 = f"{OURS}, T = 1"
OURS_HARD, ANCHORED = "hard labels, kdcache", "anchored sparse KD, kdcache"
DECODED, LOGITS = "hidden states in float32, kdcache", "hidden:int8, whole logits"
HIDDEN = {
    "hidden:int8, kdcache": "int8",
    "hidden:float16, kdcache": "float16",
    DECODED: "int8",
    LOGITS: "int8",
}
SHARES = {f"{OURS}, a share by {figure}": figure for figure in get_args(PositionFigure)}
KEYS = {"time": "micros", "peak memory": "gib"}

# Most that ours with soft targets may take of HF's hard-label step. Those of a GPU are for an H100.
GOALS = {
    ("cuda", "300m"): {"time": 0.90, "peak memory": 0.60},
    ("cuda", "1b"): {"time": 0.97},
    **{("cpu", width): {"time": 1.05} for width in WIDTHS},
}
OTHER_TEMPERATURE = 1.08  # most that T != 1 may take of T = 1
ANCHOR = 1.05  # most that an anchored sample may take of a sample
SHARE = {"micros": 0.75, "gib": 1.0}  # most that a fifth of the positions may take of all

Step = Callable[[], Tensor]


class Student:
    """A student, its optimizer and one batch with its targets, which all ways share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        torch.manual_seed(0)
        hidden, layers, heads, wide = MODELS[options.model]
        config = transformers.LlamaConfig(
            vocab_size=options.vocab,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=wide,
            max_position_embeddings=options.length,
            tie_word_embeddings=True,
        )
        dtype = getattr(torch, options.weights)
        self.autocast = self.device.type == "cuda" and dtype == torch.float32
        torch.set_float32_matmul_precision("high" if self.autocast else "highest")
        with self.device:
            self.model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.model.train()
        rows = options.positions // options.length
        shape = (rows, options.length + 1)
        ids = torch.randint(0, options.vocab, shape, device=self.device)
        self.inputs, self.labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def targets(self, temperature: float, *, anchored: bool) -> SparseTargets:
        """Made-up targets of all positions."""
        n, entries, device = self.labels.numel(), self.options.entries, self.device
        targets = SparseTargets(
            ids=torch.randint(0, self.options.vocab, (n, entries), device=device),
            weights=torch.full((n, entries), 1 / entries, device=device),
            tail=torch.zeros(n, device=device),
            exact=False,
            temperature=temperature,
        )
        if not anchored:
            return targets
        heads = torch.full((n,), 2, device=device)
        drawn = torch.arange(entries, device=device) >= heads[:, None]
        return AnchoredTargets(**vars(targets), inverse=4.0 * drawn, heads=heads)

    def hidden(self, way: str, temperature: float) -> HiddenTargets:
        """Made-up hidden states of all positions, and the output layer that reads them."""
        width, device = self.options.teacher_width, self.device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        weight = torch.randn(self.options.vocab, width, device=device, dtype=dtype).mul_(0.02)
        layer = OutputLayer(weight, mean=torch.zeros(width), unit=torch.ones(width))
        codec = Hidden(self.options.vocab, (temperature,), HIDDEN[way], layer)
        states = torch.randn(self.labels.numel(), width)
        found = TargetWriter(codec).write(states).at(temperature).to(device)
        assert isinstance(found, HiddenTargets)
        if way == DECODED:
            found = HiddenTargets(found.states, layer, temperature)
        return found

    def loss(self, way: str, temperature: float) -> tuple[Step, Callable[[], object]]:
        """The loss of one way, and what it does after each update."""
        model, inputs, labels = self.model, self.inputs, self.labels
        targets: Any = (
            self.hidden(way, temperature)
            if way in HIDDEN
            else self.targets(temperature, anchored=way == ANCHORED)
        )
        if way in rivals.NEEDS:
            return rivals.loss_of(way, model, inputs, labels, targets), lambda: None
        if way == HARD:
            return lambda: model(input_ids=inputs, labels=inputs, use_cache=False).loss, bool

        def naive() -> Tensor:
            logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1).float()
            hard = F.cross_entropy(logits, labels.flatten())
            logprobs = F.log_softmax(logits / temperature, -1).gather(-1, targets.ids)
            soft = -(targets.weights * logprobs).sum(-1).mean()
            both: Tensor = 0.5 * hard + 0.5 * temperature**2 * soft
            return both

        if way == NAIVE:
            return naive, bool
        rule = Share(SHARES[way], self.options.share) if way in SHARES else None
        wrapper = DistilledStudent(
            model, "causal-lm", vocab_size=self.options.vocab, positions=rule
        )
        places = torch.arange(labels.numel(), device=self.device)  # as `kdcache train` gives them
        more = {"label_positions": places, "input_ids": inputs}
        more |= {"teacher_entropy": torch.rand(labels.numel(), device=self.device)}
        more |= {"label_logprob": -torch.rand(labels.numel(), device=self.device)}

        def ours() -> Tensor:
            soft = None if way == OURS_HARD else targets.dense() if way == LOGITS else targets
            total = wrapper(labels, soft, **more).loss
            assert isinstance(total, Tensor)
            return total

        return ours, wrapper.anchor.update

    def step(self, way: str, temperature: float) -> Step:
        """One training step of one way."""
        loss, afterwards = self.loss(way, temperature)

        def step() -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                value = loss()
            value.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            afterwards()
            self.optimizer.zero_grad(set_to_none=True)
            return value.detach()

        return step


def measure_cuda(step: Step, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds, peak GiB, and the seconds of the warm-up."""
    start = time.perf_counter()
    for _ in range(options.warmup):
        step()
    torch.cuda.synchronize()
    warm = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(options.steps):
        event: Any = torch.cuda.Event
        begin, end = (event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    memory = torch.cuda.max_memory_allocated() / 2**30
    return {"seconds": statistics.median(times), "gib": memory, "warmup": warm}


def child(options: argparse.Namespace) -> dict[str, Any]:
    """One way in this process."""
    rivals.installed(options.distillkit)
    loaded = memory_mib(most=False)
    try:
        step = Student(options).step(options.way, options.temperature)
        if options.device == "cuda":
            return dict(measure_cuda(step, options))
        step()
        return {"gib": (memory_mib() - loaded) / 1024}
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}


def spawn(way: str, temperature: float, options: argparse.Namespace) -> dict[str, Any]:
    """What `child` finds, in a process of its own."""
    command = [sys.executable, __file__]
    for key, value in {**vars(options), "way": way, "temperature": temperature}.items():
        if key not in ("markdown", "rows", "only", "full") and value is not None:
            command += [f"--{key.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return {"error": "out of memory" if done.returncode == -9 else last[:80]}
    return dict(json.loads(lines[-1]))


def take_turns(plan: list[tuple[str, float]], options: argparse.Namespace) -> list[float]:
    """Median seconds of each way on a CPU, of processor time, steps interleaved."""
    student = Student(options)
    steps = [student.step(way, t) for way, t in plan]
    times: list[list[float]] = [[] for _ in plan]
    for i in range(options.warmup + options.steps):
        for step, mine in zip(steps, times, strict=True):
            start = time.process_time()
            step()
            if i >= options.warmup:
                mine.append(time.process_time() - start)
    return [statistics.median(mine) for mine in times]


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds, GiB or both of each way of one student, by the way and its temperature."""
    plan = [(HARD, 1.0), (OURS, 1.0), (OURS_HARD, 1.0)]
    if options.share:
        plan = [*plan[:2], *((way, 1.0) for way in SHARES)]
    elif options.temperature != 1:
        plan.append((OURS, options.temperature))
    if options.full and not options.share:
        plan += [(ANCHORED, 1.0), (NAIVE, 1.0)]
        plan += [(way, 1.0) for way in HIDDEN if options.model != "1b"]
        plan += [(way, 1.0) for way in rivals.installed(options.distillkit)]
    names = [f"{way}, T = {t:g}" if way == OURS else way for way, t in plan]
    if options.only == "seconds":
        return {n: {"seconds": s} for n, s in zip(names, take_turns(plan, options), strict=True)}
    return {n: spawn(way, t, options) for n, (way, t) in zip(names, plan, strict=True)}


Found = dict[tuple[int, str, str], dict[str, dict[str, Any]]]  # vocabulary, weights, model: ways


def layout(found: Found, options: argparse.Namespace) -> str:
    """Tables of ratios to HF's hard labels, one for each vocabulary and type of the weights."""
    parts = []
    for vocab, weights in dict.fromkeys(key[:2] for key in found):
        models = [key[2] for key in found if key[:2] == (vocab, weights)]
        columns = [found[vocab, weights, model] for model in models]
        dtype = f"{weights} weights"
        if options.device == "cuda" and weights == "float32":
            dtype += ", bfloat16 by autocast"
        lines = [[f"{HARD}: µs a position, GiB", *(_cell(c[HARD], None) for c in columns)]]
        for way in dict.fromkeys(way for column in columns for way in column if way != HARD):
            lines.append([way, *(_cell(c.get(way, {}), c[HARD]) for c in columns)])
        if options.device == "cpu":
            models = [f"width {int(model):,}" if model.isdigit() else model for model in models]
        size = f"{options.positions:,} positions, {options.entries} entries"
        size += f", states of {options.teacher_width:,}"
        parts += [
            f"### {vocab:,} ids, {size}, {dtype}",
            table(["step: time and memory of hard labels", *models], lines),
        ]
    return "\n\n".join([*parts, goals(found, options)])


def _cell(r: dict[str, Any], base: dict[str, Any] | None) -> str:
    """Time and memory of one way, as they are or by those of another one."""
    if "error" in r:
        return str(r["error"])
    keys = [key for key in KEYS.values() if key in r and (base is None or key in base)]
    if base is not None:
        return ", ".join(f"{r[key] / base[key]:.2f}x" for key in keys)
    return ", ".join(f"{r[key]:,.{2 * (key == 'gib')}f}" for key in keys)


def goals(found: Found, options: argparse.Namespace) -> str:
    """What was to be reached and what was, over all students; none where a step failed."""
    ratios: dict[tuple[str, float], list[float]] = {}
    other = f"{OURS}, T = {options.temperature:g}"
    for (_, _, model), ways in found.items():
        limits = GOALS.get((options.device, model), {})
        pairs = [
            (f"{what} against hard labels of HF", most, OURS_1, HARD, key)
            for (what, key), most in zip(KEYS.items(), map(limits.get, KEYS), strict=True)
        ]
        pairs += [
            (
                f"time at T = {options.temperature:g} against T = 1",
                OTHER_TEMPERATURE,
                other,
                OURS_1,
                "micros",
            ),
            ("time of an anchored sample against a sample's", ANCHOR, ANCHORED, OURS_1, "micros"),
        ]
        pairs += [
            (f"{what} {way.removeprefix(OURS)[2:]} against all", SHARE[key], way, OURS_1, key)
            for way in SHARES
            for what, key in KEYS.items()
        ]
        for what, most, one, base, key in pairs:
            if most and key in ways.get(one, {}) and key in ways.get(base, {}) and one != base:
                ratios.setdefault((what, most), []).append(ways[one][key] / ways[base][key])
    lines = [
        [
            what,
            f"≤ {most:.2f}x",
            f"{min(r):.2f} to {max(r):.2f}x",
            "yes" if max(r) <= most else "**no**",
        ]
        for (what, most), r in ratios.items()
    ]
    return table(["kdcache", "goal", "reached", ""], lines)


def figures(options: argparse.Namespace) -> list[str | None]:
    """What is measured by itself: on a CPU time, and memory where every way is."""
    if options.device == "cuda":
        return [None]
    some = ["seconds", "gib"] if options.full else ["seconds"]
    return [key for key in some if options.only in (None, key)]


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=[*MODELS], help="default: see above")
    parser.add_argument("--vocab", type=int, help="default: 131,072 on a GPU, else see above")
    parser.add_argument("--positions", type=int, default=8192 if cuda else 512)
    parser.add_argument("--length", type=int, default=1024 if cuda else 128, help="places of a row")
    parser.add_argument("--entries", type=int, default=16)
    parser.add_argument("--teacher-width", type=int, default=4096 if cuda else 1024)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--share", type=float, help="of the positions, measured against all")
    parser.add_argument("--steps", type=int, default=20 if cuda else 5)
    parser.add_argument("--warmup", type=int, default=5 if cuda else 1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if cuda else "cpu")
    parser.add_argument("--weights", choices=["float32", "bfloat16"], help="default: see above")
    parser.add_argument("--distillkit", help="folder of a checkout of DistillKit")
    parser.add_argument("--only", choices=["seconds", "gib"], help="on a CPU: time or memory alone")
    parser.add_argument("--rows", help="file of what was measured, to go on with")
    parser.add_argument("--markdown", action="store_true", help="keep the result in RESULTS.md")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way:
        print(json.dumps(child(options)))
        return
    students = [("300m", "float32"), ("300m", "bfloat16"), ("1b", "float32")]
    if not cuda:
        students = [(width, "float32") for width in WIDTHS]
    if options.model or options.weights:
        students = [(options.model or students[0][0], options.weights or "float32")]
    vocabularies = (131072,) if cuda else VOCABULARIES
    if options.vocab:
        vocabularies = (options.vocab,)
    print(machine(), flush=True)
    kept = Path(options.rows) if options.rows else None
    done = [json.loads(line) for line in kept.open()] if kept and kept.exists() else []
    for vocab in vocabularies:
        for model, weights in students:
            options.full = bool(options.vocab) or vocab in (131072, VOCABULARIES[1])
            options.full &= weights == "float32"  # what `kdcache train` does
            for only in figures(options):
                what = {"vocab": vocab, "weights": weights, "model": model, "only": only}
                if any(what.items() <= row.items() for row in done):
                    continue
                now = argparse.Namespace(**{**vars(options), **what})
                done.append(what | {"found": measure(now)})
                print(json.dumps(done[-1]), flush=True)
                if kept:
                    kept.open("a").write(json.dumps(done[-1]) + "\n")
    found: Found = {}
    for row in done:
        ways = found.setdefault((row["vocab"], row["weights"], row["model"]), {})
        for way, r in row["found"].items():
            ways.setdefault(way, {}).update(r)
            if "seconds" in r:
                ways[way]["micros"] = r["seconds"] / options.positions * 1e6
    text = layout(found, options)
    print(text)
    if options.markdown:
        named = f" --share {options.share:g}" if options.share else ""
        keep(
            f"{'positions' if options.share else 'train_step'}: {options.device}",
            f"`python benchmarks/train_step.py{named}`: {machine()}\n\n{text}",
        )


if __name__ == "__main__":
    main()
