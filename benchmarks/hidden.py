"""Hidden states as targets: how close the rebuilt logits are, in how many bytes, at what cost.

    python benchmarks/hidden.py TEACHER CORPUS.jsonl.gz

Closeness: a teacher's states at the first tokens of texts, rounded by each type and multiplied by
its output layer again, against its own logits: mean KL(teacher || rebuilt) at four temperatures.
Means and units of the channels come from other texts. Bytes are those before compression.

Cost: three training steps of one student take turns in one process, so that a busy machine slows
all of them: on hard labels alone; the same and one product of the teacher's states with its output
layer; and on hidden states. Half a minute to some minutes on two cores.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from results import keep, machine
from torch import Tensor

from kdcache.student import DistilledStudent
from kdcache.targets import Hidden, HiddenTargets, OutputLayer, TargetWriter

TYPES = ("float16", "bfloat16", "int8")
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
GOALS = {"float16": (1e-6, 2.02), "int8": (5e-4, 1.04)}  # KL, bytes of a channel
STEP_GOAL = 1.1


def states_of(model: Any, tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """States of the first tokens of some texts, [n, D]."""
    parts = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=length)["input_ids"]
        parts.append(model.get_decoder()(torch.tensor([ids])).last_hidden_state[0])
    return torch.cat(parts)


@torch.inference_mode()
def closeness(options: argparse.Namespace) -> list[str]:
    """Lines of the first table."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        options.teacher, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.teacher)
    with gzip.open(options.corpus, "rt") as lines:
        every = [json.loads(line)["text"] for i, line in enumerate(lines) if i % options.every == 5]
    sample, held = every[0 : 2 * options.texts : 2], every[1 : 2 * options.texts : 2]
    by = states_of(model.eval(), tokenizer, sample, 256)
    states = states_of(model, tokenizer, held, options.length)
    head = model.get_output_embeddings()
    layer = OutputLayer(head.weight).with_channels(by.double().mean(0), by.double().std(0))
    own = head(states)
    table = [
        f"{states.shape[0]:,} positions, D = {layer.width}, V = {layer.vocab_size:,}.",
        "",
        f"| type | B a position | a channel | {' | '.join(f'KL, T = {t:g}' for t in TEMPERATURES)} "
        "| goal |",
        "|---|---|---|---|" + "---|" * len(TEMPERATURES),
    ]
    for name in TYPES:
        codec = Hidden(layer.vocab_size, (1.0,), name, layer)
        found = TargetWriter(codec).write(states).at(1.0)
        assert isinstance(found, HiddenTargets)
        rebuilt = found.dense().logits
        figures = []
        for t in TEMPERATURES:
            sums = 0.0
            for a, b in zip(own.split(64), rebuilt.split(64), strict=True):
                p, q = ((x.double() / t).log_softmax(-1) for x in (a, b))
                sums += float((p.exp() * (p - q)).sum())
            figures.append(sums / len(own))
        size = codec.bytes_per_position
        cells = " | ".join(f"{x:.1e}" for x in figures)
        goal = "-"
        if name in GOALS:
            most, most_bytes = GOALS[name]
            met = max(figures) <= most and size / layer.width <= most_bytes
            goal = f"KL {most:g}, {most_bytes} B a channel: {'met' if met else 'MISSED'}"
        table.append(
            f"| `hidden:{name}` | {size:,.0f} | {size / layer.width:.3f} | {cells} | {goal} |"
        )
    return table


def steps_of(options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """The three steps."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.student,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=3 * options.student,
        max_position_embeddings=256,
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    wrapper = DistilledStudent(model.train(), "causal-lm", vocab_size=options.vocab)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(0, options.vocab, (options.positions // 128, 128))
    n = ids.numel()
    layer = OutputLayer(0.02 * torch.randn(options.vocab, options.width))
    states = torch.randn(n, options.width).half()
    targets = HiddenTargets(states, layer, 2.0)
    weight, _ = layer.on(states.device, torch.float32)
    buffer = torch.empty(256, options.vocab)

    def step(soft: HiddenTargets | None) -> None:
        loss = wrapper(ids, soft, input_ids=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def with_product() -> None:
        step(None)
        for piece in states.split(256):
            torch.mm(piece.float(), weight.T, out=buffer[: len(piece)])

    return {
        "hard labels": lambda: step(None),
        "hard labels and the product": with_product,
        "hidden states": lambda: step(targets),
    }


def cost(options: argparse.Namespace) -> list[str]:
    """Lines of the second table."""
    steps = steps_of(options)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(options.steps + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if i:
                times[name].append(time.perf_counter() - begin)
    base = times["hard labels and the product"]
    ratio = statistics.median(a / b for a, b in zip(times["hidden states"], base, strict=True))
    lines = [
        f"A step of {options.positions} positions: a student of width {options.student}, "
        f"V = {options.vocab:,}, the teacher's D = {options.width}, T = 2, float32.",
        "",
        "| step | seconds |",
        "|---|---|",
        *(f"| {name} | {statistics.median(values):.2f} |" for name, values in times.items()),
        "",
        f"Hidden states against hard labels and the product: {ratio:.2f} times "
        f"(goal {STEP_GOAL}: {'met' if ratio <= STEP_GOAL else 'MISSED'}).",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", nargs="?")
    parser.add_argument("corpus", nargs="?")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--student", type=int, default=384)
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    lines = [f"`python benchmarks/hidden.py TEACHER CORPUS.jsonl.gz`. {machine()}.", ""]
    if options.teacher and options.corpus:
        lines += [*closeness(options), ""]
    lines += cost(options)
    print("\n".join(lines))
    if options.teacher:
        keep("Hidden states", "\n".join(lines))


if __name__ == "__main__":
    main()
