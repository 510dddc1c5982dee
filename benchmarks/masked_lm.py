"""A masked language model: how much better does a student of half the size get from its teacher?

    python benchmarks/masked_lm.py --out WORK_DIR

A BERT of 2 layers of 64 with a WordPiece vocabulary of 256 is trained on the Python language
reference, which every CPython carries, each pass with another draw of masks. Students of 2 layers
of 32 then learn from caches of its answers on half of that text (`sample:20`, two draws of the
masks): from the hard labels alone, and with KL beside them. Held out: every tenth paragraph, which
neither has seen, in one more cache (`topk:64`). Same steps and learning rates for all.

Finished steps are kept in the work folder, so an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

VOCABULARY, LENGTH, BATCH = 256, 48, 32
TEACHER = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 256}
STUDENT = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 128}
RUNS: dict[str, dict[str, Any]] = {
    "hard labels": {"alpha": 1.0},
    "distilled, T = 1": {"alpha": 0.1, "temperature": 1.0},
}


def configuration(sizes: dict[str, int]) -> dict[str, Any]:
    """Of a BERT with these sizes."""
    return {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "vocab_size": VOCABULARY,
        "max_position_embeddings": LENGTH,
        "num_attention_heads": 4,
        "pad_token_id": 0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **sizes,
    }


def write_corpora(out: Path) -> None:
    """`all.jsonl`: paragraphs that the teacher reads; `part.jsonl`: those of the students;
    `held-out.jsonl`: those that neither reads.
    """
    from pydoc_data.topics import topics

    whole = (p.strip() for text in topics.values() for p in text.split("\n\n"))
    paragraphs = list(dict.fromkeys(p for p in whole if len(p) > 40))
    held = paragraphs[::10]
    read = [p for i, p in enumerate(paragraphs) if i % 10]
    for name, texts in {"all": read, "part": read[::2], "held-out": held}.items():
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (out / f"{name}.jsonl").write_text("".join(lines))


def make_tokenizer(out: Path) -> Any:
    """A WordPiece vocabulary of the corpus."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    folder = out / "tokenizer"
    if not folder.exists():
        pieces = BertWordPieceTokenizer()
        texts = [json.loads(line)["text"] for line in (out / "all.jsonl").open()]
        pieces.train_from_iterator(texts, vocab_size=VOCABULARY, show_progress=False)
        fast = BertTokenizerFast(tokenizer_object=pieces._tokenizer, model_max_length=LENGTH)
        fast.save_pretrained(folder)
    return BertTokenizerFast.from_pretrained(folder)


def train_teacher(out: Path, tokenizer: Any, steps: int) -> None:
    """Masked language modelling; a pass draws its own masks."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    from kdcache.corpus import Record
    from kdcache.rows import RowSpec, make_encoder
    from kdcache.rows.batches import pad_rows, padded

    texts = [json.loads(line)["text"] for line in (out / "all.jsonl").open()]
    torch.manual_seed(0)
    given = configuration(TEACHER)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(given.pop("model_type"), **given))
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps, pct_start=0.1)
    step, passes = 0, 0
    while step < steps:
        spec = RowSpec(task="masked-lm", max_length=LENGTH, mask_seed=1000 + passes)
        records = (Record({"text": text}, "all", "-") for text in texts)
        rows = list(make_encoder(spec, tokenizer).encode(records))
        order = np.random.default_rng(passes).permutation(len(rows))
        for start in range(0, len(rows) - BATCH, BATCH):
            some = [rows[i] for i in order[start : start + BATCH]]
            lengths = np.array([len(row.labels) for row in some])
            labels = padded(np.concatenate([row.labels for row in some]), lengths, -100)
            inputs = {name: torch.from_numpy(ids) for name, ids in pad_rows(some, 0).items()}
            loss = model(**inputs, labels=torch.from_numpy(labels)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            step += 1
            if step % 100 == 0:
                print(f"teacher: step {step}, pass {passes}, loss {loss.item():.3f}", flush=True)
            if step == steps:
                break
        passes += 1
    model.save_pretrained(out / "teacher")
    tokenizer.save_pretrained(out / "teacher")
    (out / "teacher.json").write_text(json.dumps({"steps": steps, "passes": passes}))


def make_caches(out: Path) -> None:
    """Two draws of the students' part, and the held-out novels."""
    from kdcache import BuildOptions, build

    for name, corpus, codec, seed in (
        ("cache-0", "part", "sample:20", 0),
        ("cache-1", "part", "sample:20", 1),
        ("held-out", "held-out", "topk:64", 0),
    ):
        result = build(
            BuildOptions(
                teacher=(str(out / "teacher"),),
                corpus=(str(out / f"{corpus}.jsonl"),),
                out=str(out / name),
                task="masked-lm",
                codec=codec,
                max_length=LENGTH,
                mask_seed=seed,
                workers=0,
            )
        )
        print(f"{name}: {result.rows} rows, {result.positions} positions, "
              f"{result.bytes_per_position:.1f} B a position", flush=True)  # fmt: skip


def one(out: Path, name: str, seed: int, steps: int) -> dict[str, Any]:
    """Train a student and measure it on the held-out novels."""
    from kdcache import EvaluateOptions, TrainOptions, evaluate, train

    run = out / "runs" / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
    kept = run / "masked-lm.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    begin = time.perf_counter()
    result = train(
        TrainOptions(
            cache=(str(out / "cache-0"), str(out / "cache-1")),
            student=str(out / "student.json"),
            out=str(run),
            batch_size=BATCH,
            max_steps=steps,
            learning_rate=2e-3,
            warmup=0.05,
            logging_steps=100,
            report_to=(),
            seed=seed,
            **RUNS[name],
        )
    )
    teacher, student = evaluate(
        EvaluateOptions(student=(str(run),), cache=str(out / "held-out"))
    ).models
    row = {
        "name": name,
        "seed": seed,
        "steps": result.steps,
        "seconds": time.perf_counter() - begin,
        "parameters": student.parameters,
        "cross_entropy": student.cross_entropy,
        "kl": student.kl,
        "accuracy": student.accuracy,
        "agreement": student.agreement,
        "teacher": {"cross_entropy": teacher.cross_entropy, "accuracy": teacher.accuracy},
    }
    kept.write_text(json.dumps(row))
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    lines = [
        "| student | runs | masked CE, nats | KL, nats | accuracy | agreement |",
        "|---|---|---|---|---|---|",
    ]
    for name in RUNS:
        mine = [row for row in rows if row["name"] == name]

        def cell(key: str, scale: float = 1.0, own: Any = mine) -> str:
            values = [scale * row[key] for row in own]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            return f"{statistics.fmean(values):.3f} ± {spread:.3f}"

        shares = f"{cell('accuracy', 100)} % | {cell('agreement', 100)} %"
        lines.append(
            f"| {name} | {len(mine)} | {cell('cross_entropy')} | {cell('kl')} | {shares} |"
        )
    best = rows[0]["teacher"]
    accuracy = f"{100 * best['accuracy']:.3f} %"
    lines.append(f"| teacher | | {best['cross_entropy']:.3f} | | {accuracy} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="work folder, kept")
    parser.add_argument("--teacher-steps", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=800, help="of each student")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "all.jsonl").exists():
        write_corpora(out)
    tokenizer = make_tokenizer(out)
    if not (out / "teacher.json").exists():
        train_teacher(out, tokenizer, options.teacher_steps)
    (out / "student.json").write_text(json.dumps(configuration(STUDENT)))
    make_caches(out)
    rows = []
    for seed in range(options.seeds):
        for name in RUNS:
            row = one(out, name, seed, options.steps)
            print(json.dumps(row), flush=True)
            rows.append(row)
    print(table(rows))


if __name__ == "__main__":
    main()
