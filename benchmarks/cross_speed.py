"""What do a teacher's likelihoods and distributions cost a student of another tokenizer?

    python benchmarks/cross_speed.py --cache CACHE --student-tokenizer DIR [--width 256]
        [--steps 20] [--markdown]

One student (four layers of --width) trains on the same rows on hard labels, by likelihood and
hybrid, one batch of each after the other, so all see the same machine. A step is forward, loss and
backward of one batch, in CPU time of the thread that trains (one thread computes); what the threads
that read ahead do for a batch, decoding, tokenising and aligning its rows, is measured by itself,
for the first epoch, whose rows are new, and for the second, which finds them aligned. Left out: the
optimizer, which is the same for all, and everything before the first batch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from results import keep, machine, table
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kdcache import Cache, CrossTokenizer, DistilledStudent, TargetStream
from kdcache.tasks import CAUSAL_LM, IGNORE
from kdcache.teacher import quiet_transformers

ROWS = 8
SIDES: dict[str, dict[str, Any]] = {
    "hard labels": {"method": "likelihood", "temperature": None},
    "likelihood": {"method": "likelihood", "temperature": 1.0},
    "hybrid": {"method": "hybrid", "temperature": 1.0},
}


def stream_of(cache: Cache, tokenizer: Any, side: str) -> TargetStream:
    """A stream with nothing aligned yet."""
    how = SIDES[side]
    cross = CrossTokenizer(cache, tokenizer, how["method"])
    return TargetStream(cache, batch_size=ROWS, temperature=how["temperature"], cross=cross)


def step_seconds(model: DistilledStudent, batch: dict[str, Any]) -> float:
    """CPU seconds of this thread for one step."""
    begin = time.thread_time()
    model(**batch).loss.backward()
    taken = time.thread_time() - begin
    model.zero_grad()
    return taken


def reading(cache: Cache, tokenizer: Any, side: str) -> tuple[float, float]:
    """CPU milliseconds a batch in a first and a second epoch of nothing but reading."""
    stream, found = stream_of(cache, tokenizer, side), []
    for _ in range(2):
        begin = time.process_time()
        count = sum(1 for _ in stream)
        found.append(1e3 * (time.process_time() - begin) / count)
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", required=True, help="of codec topk, sample or anchored")
    parser.add_argument("--student-tokenizer", required=True)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--markdown", action="store_true", help="keep the result in RESULTS.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cache = Cache.open(options.cache)
    tokenizer = AutoTokenizer.from_pretrained(options.student_tokenizer)
    streams = {side: stream_of(cache, tokenizer, side) for side in SIDES}
    size = streams["hybrid"].reading.vocab_size
    assert size is not None
    with quiet_transformers():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=size,
            hidden_size=options.width,
            intermediate_size=3 * options.width,
            num_hidden_layers=4,
            num_attention_heads=4,
            tie_word_embeddings=True,
        )
        model = DistilledStudent(LlamaForCausalLM(config), CAUSAL_LM, vocab_size=size)
        batches = {side: iter(stream) for side, stream in streams.items()}
        taken: dict[str, list[float]] = {side: [] for side in SIDES}
        positions = 0
        for step in range(options.steps + 2):
            for side, some in batches.items():
                batch = next(some)
                seconds = step_seconds(model, batch)
                if step >= 2:  # the first ones measure the student and touch its memory
                    taken[side].append(seconds)
                    positions += int((batch["labels"] != IGNORE).sum())
    read = {side: reading(cache, tokenizer, side) for side in SIDES}
    hard = statistics.median(taken["hard labels"])
    rows = []
    for side, seconds in taken.items():
        ratios = [a / b for a, b in zip(seconds, taken["hard labels"], strict=True)]
        rows.append(
            [
                side,
                f"{1e3 * statistics.median(seconds):,.1f}",
                f"{statistics.median(ratios):.3f}x",
                f"{read[side][0]:,.1f}",
                f"{read[side][1]:,.1f}",
            ]
        )
    parameters = sum(p.numel() for p in model.parameters())
    header = ["on", "ms a step", "of hard labels", "ms to read a batch", "in later epochs"]
    text = "\n\n".join(
        [
            f"`python benchmarks/cross_speed.py --width {options.width}`; {machine()}.",
            f"{parameters:,} parameters, {size:,} ids, {cache.spec.codec}; "
            f"{positions / options.steps / len(SIDES):,.0f} positions a step; CPU time, medians of "
            f"{options.steps} steps ({hard * 1e3:,.0f} ms on hard labels).",
            table(header, rows),
        ]
    )
    print(text)
    if options.markdown:
        keep("cross-tokenizer speed", text)


if __name__ == "__main__":
    main()
