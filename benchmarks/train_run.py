"""A whole run of `kdcache train` against the Hugging Face Trainer on hard labels, same rows.

    python benchmarks/train_run.py --teacher SMOLLM2_135M --corpus novels.jsonl.gz [--markdown]

About five minutes on two cores, one of them for the cache.

A cache is built once (`sample:20`, T = 1 and 2). Then, in turns and each in a process of its own:

* Hugging Face: `Trainer` with the model's own loss on the cache's rows, already tokenised and in
  memory, as in any fine-tuning script;
* kdcache: `kdcache.train` from the cache, soft and hard loss at T = 1, and at T = 2;
* kdcache on hard labels alone (alpha = 1).

The same student (random weights), batch size, steps, optimizer, schedule, logging and one
checkpoint at the end. Time is that of the whole call after the imports: opening the cache, making
the student, training, saving. Medians over rounds, of wall and of CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from results import keep, machine, table

import kdcache

HF = "Hugging Face Trainer, hard labels"
WAYS: dict[str, dict[str, Any]] = {
    HF: {},
    "kdcache, hard labels": {"alpha": 1.0},
    "kdcache, T = 1": {"alpha": 0.5, "temperature": 1.0},
    "kdcache, T = 2": {"alpha": 0.5, "temperature": 2.0},
}
BATCH = 8
GOAL = 1.05  # most that a whole run may take of HF's wall time


def student(cache: kdcache.Cache, folder: Path) -> Path:
    """Configuration of a small Llama with the cache's vocabulary."""
    config = transformers.LlamaConfig(
        vocab_size=cache.spec.vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=cache.spec.max_length,
        tie_word_embeddings=True,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder / "config.json"


def hugging_face(cache: kdcache.Cache, config: Path, out: Path, steps: int) -> float:
    """The Trainer's own loop; its last logged loss."""
    rows = [
        {"input_ids": data.row(i).input_ids.tolist()}
        for data in (cache.read(s, targets=False) for s in range(cache.spec.spans))
        for i in range(len(data))
    ]
    for row in rows:
        row["labels"] = row["input_ids"]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(config)
    )
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            str(out),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=5e-4,
            logging_steps=10,
            save_steps=steps,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=transformers.DataCollatorForSeq2Seq(cache.tokenizer(), padding=True),
    )
    trainer.train()
    trainer.save_model(str(out / "student"))
    return float([line["loss"] for line in trainer.state.log_history if "loss" in line][-1])


def child(options: argparse.Namespace) -> dict[str, float]:
    """One run, timed."""
    out = Path(options.out)
    cache = kdcache.Cache.open(options.cache)
    config = student(cache, out / "config")
    # The libraries' own first-use costs are nobody's: a first tensor, a first backward.
    torch.ones(2, requires_grad=True).sum().backward()
    wall, cpu = time.perf_counter(), time.process_time()
    if options.way == HF:
        loss = hugging_face(cache, config, out / "run", options.steps)
    else:
        result = kdcache.train(
            kdcache.TrainOptions(
                cache=(options.cache,),
                student=str(config),
                out=str(out / "run"),
                max_steps=options.steps,
                batch_size=BATCH,
                learning_rate=5e-4,
                report_to=("none",),
                **WAYS[options.way],
            )
        )
        loss = result.loss
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "loss": loss,
    }


def spawn(way: str, cache: str, options: argparse.Namespace) -> dict[str, float]:
    """`child` in a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        call = [sys.executable, __file__, "--way", way, "--cache", cache, "--out", out]
        call += ["--steps", str(options.steps), "--threads", str(options.threads)]
        done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{way}: {found}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher")
    parser.add_argument("--corpus")
    parser.add_argument("--cache", help="a cache of a language model, instead of building one")
    parser.add_argument("--limit", type=int, default=40, help="records to build from")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--markdown", action="store_true", help="keep the result in RESULTS.md")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way:
        print(json.dumps(child(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        url = options.cache or f"{folder}/cache"
        built = kdcache.Cache.open(url) if options.cache else build(options, url)
        taken: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way in WAYS:
                taken[way].append(spawn(way, url, options))
        text = report(built, taken, options)
    print(text)
    if options.markdown:
        keep("train_run", text)


def build(options: argparse.Namespace, url: str) -> kdcache.Cache:
    """The cache that all runs read."""
    kdcache.build(
        kdcache.BuildOptions(
            (options.teacher,),
            (options.corpus,),
            url,
            codec="sample:20",
            temperatures=(1.0, 2.0),
            max_length=128,
            limit=options.limit,
            workers=0,
        )
    )
    return kdcache.Cache.open(url)


def report(
    cache: kdcache.Cache, taken: dict[str, list[dict[str, float]]], options: argparse.Namespace
) -> str:
    """Medians and their ratios to the Hugging Face Trainer."""
    median = {
        way: {key: statistics.median(run[key] for run in runs) for key in ("wall", "cpu", "loss")}
        for way, runs in taken.items()
    }
    rows = [
        [
            way,
            f"{m['wall']:.1f}",
            f"{m['wall'] / median[HF]['wall']:.3f}x",
            f"{m['cpu']:.1f}",
            f"{m['cpu'] / median[HF]['cpu']:.3f}x",
        ]
        for way, m in median.items()
    ]
    return (
        f"`python benchmarks/train_run.py`: {options.steps} steps of {BATCH} rows of "
        f"{cache.spec.max_length}, a Llama of 4 layers of 128, vocabulary "
        f"{cache.spec.vocab_size:,}; median of {options.rounds} rounds; {machine()}.\n\n"
        + table(["run", "wall, s", "", "CPU, s", ""], rows)
        + f"\n\nGoal: at most {GOAL:.2f}x wall time. Reached: "
        + ", ".join(
            f"{way} {'yes' if m['wall'] <= GOAL * median[HF]['wall'] else '**no**'}"
            for way, m in median.items()
            if way != HF
        )
        + "."
    )


if __name__ == "__main__":
    main()
