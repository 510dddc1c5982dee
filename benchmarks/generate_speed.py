"""Tokens a second of `generate` against the same engine called bare, on the same prompts.

    python benchmarks/generate_speed.py --model stories260k [--engine vllm]

Both sides load the model once, answer the same prompts in the same order and take turns in one
process; loading and the first round, which warms up, are left out. Bare transformers is
`model.generate` over batches of as many rows, sorted by length and padded on the left, which writes
until the last row of a batch has ended; bare vLLM is `LLM.generate` with all prompts at once, run
in a process of its own before kdcache's. kdcache's side draws by noise of its own and keeps
log-probabilities; transformers' draws without keeping any.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcache.rows.spec import Sampling
from kdcache.tasks import CAUSAL_LM
from kdcache.teacher import EngineOptions, TeacherOptions
from kdcache.teacher.writer import Writer

Run = Callable[[], int]
_RATES = "rates of the bare engine:"


def prompts_of(tokenizer: Any, count: int) -> list[np.ndarray]:
    """Beginnings of Python's language reference, of 4 to 35 tokens."""
    from pydoc_data.topics import topics

    texts = [p for text in topics.values() for p in text.split("\n\n") if len(p) > 200][:count]
    ids = [tokenizer(text)["input_ids"][: 4 + 7 * i % 32] for i, text in enumerate(texts)]
    return [np.array(each, np.int32) for each in ids]


def bare_transformers(
    name: str, prompts: Sequence[np.ndarray], how: Sampling, rows: int, ends: list[int]
) -> Run:
    """`model.generate`, batch by batch."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    ordered = sorted(prompts, key=len)

    @torch.inference_mode()
    def run() -> int:
        total = 0
        for start in range(0, len(ordered), rows):
            batch = ordered[start : start + rows]
            width = max(map(len, batch))
            ids = np.zeros((len(batch), width), np.int64)
            mask = np.zeros_like(ids)
            for i, prompt in enumerate(batch):
                ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = prompt, 1
            out = model.generate(
                torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask),
                do_sample=True,
                temperature=how.temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=how.max_new_tokens,
                eos_token_id=ends,
                pad_token_id=ends[0],
            )
            for row in out[:, width:].tolist():
                at = next((i for i, one in enumerate(row) if one in ends), len(row) - 1)
                total += at + 1
        return total

    return run


def kdcache_writer(
    options: TeacherOptions,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    how: Sampling,
    batch_tokens: int,
    ends: list[int],
) -> Run:
    """`Writer.write`, or the engine's."""
    shared: dict[str, Any] = {
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "ends": ends,
        "tokenizer": tokenizer,
    }
    if options.engine is None:
        one: Any = Writer(options, how, **shared, batch_tokens=batch_tokens)
    else:
        kind = importlib.import_module("kdcache.teacher.engine.model").EngineWriter
        one = kind(options, how, **shared)
    spans = iter(range(1 << 30))
    return lambda: sum(len(a.ids) for a in one.write(next(spans), prompts, lambda _: None))


def timed(run: Run) -> tuple[float, int]:
    """Tokens a second, and tokens."""
    begin = time.perf_counter()
    tokens = run()
    return tokens / (time.perf_counter() - begin), tokens


def bare_vllm(options: argparse.Namespace) -> None:
    """Print the rates of `LLM.generate`, as JSON."""
    vllm = importlib.import_module("vllm")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    asked = [{"prompt_token_ids": ids.tolist()} for ids in prompts_of(tokenizer, options.prompts)]
    llm = vllm.LLM(
        model=options.model,
        dtype="float32",
        max_model_len=options.length,
        enforce_eager=True,
        disable_log_stats=True,
        gpu_memory_utilization=0.4,
    )
    params = vllm.SamplingParams(
        temperature=1.0,
        max_tokens=options.new,
        logprobs=0,
        stop_token_ids=[tokenizer.eos_token_id],
        detokenize=False,
    )
    found = []
    for _ in range(options.repeats + 1):
        begin = time.perf_counter()
        answers = llm.generate(asked, params, use_tqdm=False)
        tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
        found.append(tokens / (time.perf_counter() - begin))
    print(_RATES, json.dumps(found[1:]))


def main() -> None:
    """Run both sides."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--new", type=int, default=96, help="tokens of an answer, at most")
    parser.add_argument("--rows", type=int, default=32, help="of a batch of transformers")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        bare_vllm(options)
        return
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts, ends = prompts_of(tokenizer, options.prompts), [int(tokenizer.eos_token_id)]
    how = Sampling(max_new_tokens=options.new)
    engine = EngineOptions(options.length) if options.engine == "vllm" else None
    teacher = TeacherOptions((options.model,), CAUSAL_LM, engine=engine)
    batch_tokens = options.rows * (max(map(len, prompts)) + options.new)
    rates: dict[str, list[float]] = {"bare": [], "kdcache": []}
    if engine is not None:
        words = [sys.executable, __file__, *sys.argv[1:], "--bare"]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        # The engine's processes write to the same output as they end.
        (line,) = (one for one in done.stdout.splitlines() if one.startswith(_RATES))
        rates["bare"] = json.loads(line.removeprefix(_RATES))
        print("bare:", *(f"{rate:,.0f} tokens/s" for rate in rates["bare"]))
    mine = kdcache_writer(teacher, tokenizer, prompts, how, batch_tokens, ends)
    sides = {"kdcache": mine}
    if engine is None:
        bare = bare_transformers(options.model, prompts, how, options.rows, ends)
        sides = {"bare": bare, "kdcache": mine}
    for turn in range(options.repeats + 1):
        for name, run in sides.items():
            rate, tokens = timed(run)
            print(f"{name}: {rate:,.0f} tokens/s, {tokens:,} tokens{' (warm-up)' * (not turn)}")
            if turn:
                rates[name].append(rate)
    ratio = statistics.median(rates["kdcache"]) / statistics.median(rates["bare"])
    print(f"ratio of medians: {ratio:.2f} (goal 0.95)")
    print(
        f"{options.engine}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
