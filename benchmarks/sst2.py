"""The original method on SST-2: how much better does a biLSTM get from a BERT teacher's soft
targets?

    python benchmarks/sst2.py --data SST2_DIR --teacher TEACHER_DIR --out WORK_DIR

Tang et al. 2019 (arXiv:1903.12136) distilled BERT into a biLSTM with `a CE + (1 - a) MSE(logits)`,
Hinton et al. 2015 with cross-entropy at a temperature. Every student here is trained from one cache
by `kdcache.train`: hard labels only, KL at T = 1, 2, 4, MSE, a two-layer BERT of random weights
with hard labels and with KL, and the biLSTM on a transfer set: unlabelled phrases of the training
sentences (n-grams, some words masked, as in the paper, without its part-of-speech step) that only
the teacher labels.

Same seeds, same steps, same early stopping on dev accuracy for all. Finished runs are kept in the
work folder, so an interrupted benchmark goes on. The table is mean, standard deviation and range of
test accuracy.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Two layers of 128: what a phone runs. Its words are the teacher's tokens.
TINY_BERT = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "vocab_size": 30522,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "max_position_embeddings": 128,
    "num_labels": 2,
}

BILSTM: dict[str, Any] = {"student": "bilstm", "epochs": 4, "dropout": 0.3}
BERT: dict[str, Any] = {"student": "tiny-bert.json", "epochs": 6, "learning_rate": 5e-4}
# name -> what differs from the other runs; the first of each family is its baseline.
RUNS: dict[str, dict[str, Any]] = {
    "biLSTM, hard labels": {**BILSTM, "alpha": 1.0},
    "biLSTM, KL, T = 1": {**BILSTM, "alpha": 0.5, "temperature": 1.0},
    "biLSTM, KL, T = 2": {**BILSTM, "alpha": 0.5, "temperature": 2.0},
    "biLSTM, KL, T = 4": {**BILSTM, "alpha": 0.5, "temperature": 4.0},
    "biLSTM, MSE": {**BILSTM, "alpha": 0.0, "divergence": "mse"},
    "2-layer BERT, hard labels": {**BERT, "alpha": 1.0},
    "2-layer BERT, KL, T = 2": {**BERT, "alpha": 0.5, "temperature": 2.0},
    "biLSTM, KL, T = 1, transfer set": {
        **BILSTM,
        "alpha": 0.5,
        "temperature": 1.0,
        "epochs": 3,
        "transfer": True,
    },
    "biLSTM, MSE, transfer set": {
        **BILSTM,
        "alpha": 0.0,
        "divergence": "mse",
        "epochs": 3,
        "transfer": True,
    },
}


def augment(text: str, rng: random.Random) -> str:
    """A variant of a sentence: an n-gram of 2 to 10 of its words, each masked with 10 %."""
    words = text.split()
    n = min(len(words), rng.randint(2, 10))
    start = rng.randrange(len(words) - n + 1)
    return " ".join(w if rng.random() >= 0.1 else "[MASK]" for w in words[start : start + n])


def make_caches(options: argparse.Namespace, out: Path) -> float:
    """Build the caches of train, dev, test and the transfer set; the teacher's seconds."""
    from kdcache import BuildOptions, build

    rng = random.Random(0)
    lines = (Path(options.data) / "train.tsv").read_text().splitlines()
    texts = [line.rsplit("\t", 1)[0] for line in lines]
    variants = {augment(text, rng) for _ in range(options.variants) for text in texts} - set(texts)
    transfer = out / "transfer.tsv"
    transfer.write_text("".join(f"{text}\t\n" for text in sorted(variants)))
    sources = {name: Path(options.data) / f"{name}.tsv" for name in ("train", "dev", "test")}
    seconds = 0.0
    for name, source in {**sources, "transfer": transfer}.items():
        result = build(
            BuildOptions(
                teacher=(options.teacher,),
                corpus=(str(source),),
                out=str(out / f"cache-{name}"),
                task="sequence-classification",
                columns=("text", "label"),
                max_length=64,
                workers=0,
            )
        )
        print(f"{name}: {result.rows} rows, teacher {result.teacher_seconds:.0f} s", flush=True)
        seconds += result.teacher_seconds
    return seconds


def one(out: Path, name: str, seed: int) -> dict[str, Any]:
    """Train and test one student; its accuracies."""
    import torch

    from kdcache import EvaluateOptions, TrainOptions, evaluate, train

    run = out / "runs" / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
    kept = run / "sst2.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    torch.set_num_threads(1)
    settings = dict(RUNS[name])
    caches = [str(out / "cache-train")]
    if settings.pop("transfer", False):
        caches.append(str(out / "cache-transfer"))
    if settings["student"].endswith(".json"):
        settings["student"] = str(out / settings["student"])
    begin = time.perf_counter()
    result = train(
        TrainOptions(
            cache=tuple(caches),
            out=str(run),
            batch_size=64,
            eval_cache=(str(out / "cache-dev"),),
            eval_batch_size=256,
            best="accuracy",
            logging_steps=50,
            report_to=(),
            seed=seed,
            **settings,
        )
    )
    seconds = time.perf_counter() - begin
    scores = evaluate(EvaluateOptions(student=(str(run),), cache=str(out / "cache-test")))
    teacher, student = scores.models
    row = {
        "name": name,
        "seed": seed,
        "accuracy": student.accuracy,
        "kl": student.kl,
        "teacher": teacher.accuracy,
        "dev": result.eval.get("accuracy", result.eval.get("eval_accuracy")),
        "seconds": seconds,
    }
    kept.write_text(json.dumps(row))
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean, standard deviation and range a row."""
    lines = [
        "| student | runs | test accuracy, % | std | range | against hard labels |",
        "|---|---|---|---|---|---|",
    ]
    mean = {}
    for name in RUNS:
        values = [100 * row["accuracy"] for row in rows if row["name"] == name]
        if not values:
            continue
        mean[name] = statistics.fmean(values)
        base = mean.get(f"{name.split(',')[0]}, hard labels")
        gain = "" if base is None or "hard" in name else f"{mean[name] - base:+.1f}"
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        lines.append(
            f"| {name} | {len(values)} | {mean[name]:.1f} | {spread:.1f} "
            f"| {min(values):.1f} - {max(values):.1f} | {gain} |"
        )
    lines.append(f"| teacher | | {100 * rows[0]['teacher']:.1f} | | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with train.tsv, dev.tsv, test.tsv")
    parser.add_argument("--teacher", required=True, help="folder of a classifier trained on SST-2")
    parser.add_argument("--out", required=True, help="work folder, kept")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--variants", type=int, default=6, help="variants of each sentence")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--only", help="runs whose name contains this")
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tiny-bert.json").write_text(json.dumps(TINY_BERT))
    seconds = make_caches(options, out)
    # Seed by seed, so that an interrupted benchmark has seen all students equally often.
    work = [
        (name, seed)
        for seed in range(options.seeds)
        for name in RUNS
        if (options.only or "") in name
    ]
    rows = []
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
        running = [pool.submit(one, out, name, seed) for name, seed in work]
        for done in concurrent.futures.as_completed(running):
            row = done.result()
            rows.append(row)
            print(
                f"{row['name']:28s} seed {row['seed']}  test {100 * row['accuracy']:.2f}  "
                f"dev {100 * row['dev']:.2f}  {row['seconds']:.0f} s",
                flush=True,
            )
    print(f"\nteacher seconds, once: {seconds:.0f}; {platform.processor() or platform.machine()}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
